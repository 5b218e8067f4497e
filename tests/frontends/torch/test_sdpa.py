"""tilefold.torch.scaled_dot_product_attention has torch's arguments, meaning and errors."""

from __future__ import annotations

import doctest
import inspect
import math
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from paths import ROOT
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import tilefold.torch
from tilefold.frontends.torch import recognised
from tilefold.torch import scaled_dot_product_attention as sdpa

TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def three(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [normal(*shape, seed=seed, dtype=dtype) for seed in range(3)]


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    tolerance = TOLERANCES[dtype]
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    """Torch's products of matrices in float64; a causal mask is joined to the other by hand."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    if mask is not None and options.pop("is_causal"):
        seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        mask = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -math.inf)
    with sdpa_kernel(SDPBackend.MATH):
        every = (x.double() for x in (q, k, v))
        return F.scaled_dot_product_attention(*every, attn_mask=mask, **options)


def test_the_arguments_are_those_of_torch() -> None:
    words = F.scaled_dot_product_attention.__doc__.partition(")")[0].partition("(")[2]
    theirs = [part.split("=")[0].strip() for part in words.split(",")]
    parameters = inspect.signature(sdpa).parameters
    assert [*parameters] == theirs
    keywords = [name for name, each in parameters.items() if each.kind is each.KEYWORD_ONLY]
    assert keywords == ["scale", "enable_gqa"]
    assert sdpa.__doc__ is not None and all(name in sdpa.__doc__ for name in theirs)


@pytest.mark.slow
def test_the_examples_of_the_functions_run() -> None:
    outcome = doctest.testmod(tilefold.torch)
    assert outcome.attempted > 10 and not outcome.failed


DOCUMENTED: dict[str, Callable[[], tuple[Any, ...]]] = {
    "as in the example": lambda: (*three(4, 8, 32, 16), {}),
    "half": lambda: (*three(2, 4, 32, 16, dtype=torch.float16), {}),
    "grouped heads": lambda: (
        normal(2, 8, 24, 16),
        normal(2, 2, 24, 16),
        normal(2, 2, 24, 16, seed=1),
        {"enable_gqa": True},
    ),
    "causal from the upper left": lambda: (
        normal(1, 2, 3, 8),
        normal(1, 2, 6, 8),
        normal(1, 2, 6, 8),
        {"is_causal": True},
    ),
    "a mask of bool": lambda: (*three(1, 2, 6, 8), {"attn_mask": torch.ones(6, 6).tril() > 0}),
    "a mask of floats": lambda: (*three(1, 2, 6, 8), {"attn_mask": normal(6, 6, seed=9)}),
    "scale": lambda: (*three(1, 2, 6, 8), {"scale": 0.3}),
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_what_torch_documents(name: str) -> None:
    """The function that torch's documentation writes out gives the same."""
    q, k, v, options = DOCUMENTED[name]()
    factor = options.get("scale", 1 / math.sqrt(q.shape[-1]))
    k2, v2 = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3).double() for x in (k, v))
    scores = q.double() @ k2.mT * factor
    mask = options.get("attn_mask")
    if options.get("is_causal"):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        seen = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -math.inf) if seen else scores + mask
    close(sdpa(q, k, v, **options), scores.softmax(-1) @ v2, q.dtype)


def drawn(draw: random.Random) -> tuple[list[Tensor], dict[str, Any]]:
    """q, k, v and perhaps a mask, and the other options: in few types, which have kernels each."""
    axes = draw.choice([2, 3, 4, 4, 4, 5])
    len_q, len_k = draw.choice([(1, 7), (5, 5), (18, 18), (18, 7), (20, 33)])
    grouped = axes > 2 and draw.random() < 0.3
    heads = [4, 2, 2] if grouped else draw.choice([[3, 3, 3], [3, 1, 1], [3, 3, 1], [1, 3, 3]])
    batches = [[draw.choice([1, 2]) for _ in range(3)] for _ in range(axes - 3)]
    sizes = [(len_q, 8), (len_k, 8), (len_k, 6 if axes == 2 else 8)]
    given = []
    for place, size in enumerate(sizes):
        shape = (*[each[place] for each in batches], heads[place])[: max(0, axes - 2)] + size
        x = normal(*shape, seed=draw.randrange(10**6))
        if axes == 4 and draw.random() < 0.3:  # the view that layers make
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        given.append(x.requires_grad_())
    options = {
        "is_causal": draw.random() < 0.3,
        "scale": draw.choice([None, None, 0.7]),
        "enable_gqa": grouped,
    }
    kind = draw.choice(["none", "bool", "floats", "learned", "rule"])
    if kind != "none":
        full = (*[max(each[:2]) for each in batches], max(heads[:2]), len_q, len_k)[-axes:]
        padding = (*full[:-3], *(1,) * min(2, axes - 1), len_k)  # one row for all heads
        shape = draw.choice([full, full[-2:], padding, (len_q, 1)])
        shape = full if kind == "learned" else shape
        mask = normal(*shape, seed=draw.randrange(10**6))
        if kind == "bool":
            mask = mask > -1
        elif kind == "rule":
            ahead = torch.arange(len_q)[:, None] - torch.arange(len_k)
            mask = (ahead >= 0) & (ahead < draw.choice([4, 100]))
        elif kind == "learned":
            mask = mask.requires_grad_()
        given.append(mask)
    return given, options


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_a_grid_of_arguments_beside_products_in_float64(
    part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recognised, "FEWEST_FLOPS", 0)
    draw = random.Random(part)
    for number in range(20):
        given, options = drawn(draw)
        q, k, v, mask = (*given, None)[:4]
        learned = [x for x in given if x.requires_grad]
        assert q is not None and k is not None and v is not None
        got = sdpa(q, k, v, mask, **options)
        want = exact(q, k, v, mask, **options)
        told = f"case {number}: {[tuple(x.shape) for x in given]} {q.dtype} {options}"
        do = normal(*got.shape, seed=7).to(got.dtype)
        try:
            close(got, want, q.dtype)
            pairs = zip(
                torch.autograd.grad(got, learned, do),
                torch.autograd.grad(want, learned, do.double()),
                strict=True,
            )
            for one, other in pairs:
                close(one, other, q.dtype)
            with torch.no_grad():
                close(sdpa(q, k, v, mask, **options), want, q.dtype)
        except AssertionError as error:
            raise AssertionError(f"{told}: {error}") from error


def test_a_query_that_sees_no_key_gets_zeros_as_in_torch() -> None:
    q, k, v = three(1, 2, 20, 8)
    seen = torch.ones(20, 20, dtype=torch.bool)
    seen[3] = seen[17] = False
    added = torch.zeros(20, 20).masked_fill(~seen, -math.inf)
    for mask in (seen, added):
        x = q.clone().requires_grad_()
        o = sdpa(x, k, v, mask)
        close(o, F.scaled_dot_product_attention(q, k, v, mask), q.dtype)
        assert not o[:, :, 3].any()
        (slope,) = torch.autograd.grad(o.sum(), x)
        assert slope.isfinite().all() and not slope[:, :, 17].any()


@pytest.mark.slow
def test_dropout_follows_the_generator_of_torch() -> None:
    q, k, v = three(1, 2, 64, 8)
    ones = torch.ones_like(v).requires_grad_()
    torch.manual_seed(4)
    first = sdpa(q, k, ones, dropout_p=0.5)
    torch.manual_seed(4)
    assert torch.equal(first, sdpa(q, k, ones, dropout_p=0.5))
    assert not torch.equal(first, sdpa(q, k, ones, dropout_p=0.5))
    assert abs(float(first.detach().mean()) - 1) < 0.05 and float(first.detach().std()) > 0.05
    (slope,) = torch.autograd.grad(first.sum(), ones)
    torch.testing.assert_close(slope.sum(), first.detach().sum())
    assert not sdpa(q, k, v, dropout_p=1.0).any()
    close(sdpa(q, k, v, dropout_p=0.0), F.scaled_dot_product_attention(q, k, v), q.dtype)


@pytest.mark.slow
def test_in_compiled_functions_transforms_and_autocast() -> None:
    q, k, v = three(2, 3, 20, 8)
    masks = [None, torch.ones(20, 20).tril() > 0, normal(2, 1, 20, 20, seed=5)]

    def step(q: Tensor, mask: Tensor | None) -> Tensor:
        return sdpa(q * 1, k, v, mask, is_causal=mask is None).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for mask in masks:
        x = q.clone().requires_grad_()
        (want,) = torch.autograd.grad(step(x, mask), x)
        (got,) = torch.autograd.grad(compiled(x, mask), x)
        close(got, want, q.dtype)
        close(torch.func.grad(step)(q, mask), want, q.dtype)
        each = torch.stack([q, -q])
        stacked = torch.stack([sdpa(x, k, v, mask) for x in each])
        close(torch.func.vmap(lambda x, mask=mask: sdpa(x, k, v, mask))(each), stacked, q.dtype)
        with torch.autocast("cpu"):
            o, theirs = sdpa(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask)
        assert o.dtype == theirs.dtype == torch.bfloat16
        close(o, theirs, o.dtype)


@pytest.mark.slow
def test_derivatives_of_second_order_with_masks() -> None:
    given = [x.double().requires_grad_() for x in three(1, 1, 17, 4)]
    for mask in (normal(17, 17, seed=3) > 0, torch.ones(17, 17).tril() > 0):
        assert torch.autograd.gradgradcheck(
            lambda q, k, v, mask=mask: sdpa(q[:, :, :3], k, v, mask[:3]), given, atol=1e-4
        )


Q, K, V = three(2, 4, 5, 8)
REFUSED: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "a list": (([1.0], K, V), {}, "query must be a Tensor, got list"),
    "one axis": ((Q[0, 0, 0], K, V), {}, r"query must have at least the axes \(length, dim\)"),
    "types": ((Q, K.double(), V), {}, "must have one type.*float64"),
    "integers": ((Q.int(), K.int(), V.int()), {}, "must have one type.*int32"),
    "heads": ((Q, K[:, :2], V[:, :2]), {}, "need enable_gqa"),
    "groups": ((Q, K[:, :3], V[:, :3]), {"enable_gqa": True}, "must divide.*4, 3 and 3"),
    "batches": ((Q, K.repeat(2, 1, 1, 1)[:3], V), {}, "must broadcast"),
    "mask type": ((Q, K, V, torch.ones(5, 5).int()), {}, "attn_mask must be of bool.*int32"),
    "mask float64": ((Q, K, V, torch.ones(5, 5).double()), {}, "attn_mask must be.*float64"),
    "mask shape": ((Q, K, V, torch.ones(3, 5)), {}, r"attn_mask must broadcast.*got \(3, 5\)"),
    "mask axes": ((Q, K, V, torch.ones(2, 1, 1, 5, 5)), {}, "attn_mask must broadcast"),
    "mask list": ((Q, K, V, [[True]]), {}, "attn_mask must be a Tensor, got list"),
    "probability": ((Q, K, V), {"dropout_p": 2.0}, "probability from 0 to 1, got 2"),
    "dropout": ((Q, K, V), {"dropout_p": "x"}, "dropout_p must be a number, got str"),
    "causal": ((Q, K, V), {"is_causal": 1}, "is_causal must be True or False, got int"),
    "device": ((Q.to("meta"), K, V), {}, "query is on meta and key on cpu"),
    "dim": ((Q, K[..., :5], V), {}, "query has a dim of 8 and key one of 5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_has_the_type_of_the_error_of_torch(name: str) -> None:
    given, options, words = REFUSED[name]
    with pytest.raises((RuntimeError, TypeError)) as theirs:
        F.scaled_dot_product_attention(*given, **options)
    with pytest.raises(theirs.type, match=words) as ours:
        sdpa(*given, **options)
    assert "\n" not in str(ours.value)


def test_a_device_without_kernels_is_named() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(1, 2, 4, 8, device="xpu")
        with pytest.raises(NotImplementedError, match=r"q is on xpu.*CPU.*\(cuda\).*\(mps\)"):
            sdpa(q, q, q)
    number = normal(1, 2, 4, 8)
    with pytest.raises(RuntimeError, match="there are 4 keys and 3 values"):
        sdpa(number, number, number[:, :, :3])
    with pytest.raises(TypeError, match="positional"):
        sdpa(number, number, number, None, 0.0, False, 2.0)  # type: ignore[misc]


@pytest.mark.slow
def test_the_page_runs() -> None:
    page = (ROOT / "docs" / "torch.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, Any] = {}  # later blocks go on from earlier ones
    for block in blocks:
        small = block.replace("2048", "256").replace("1500", "200").replace("print(", "told = (")
        exec(small, names)
    assert names["told"] == 1 and names["y"].shape == (2, 128, 64)
    want = F.scaled_dot_product_attention(names["q"], names["k"], names["v"], is_causal=True)
    torch.testing.assert_close(names["o"], want)
    assert names["windowed"].shape == (2, 8, 256, 64)
