"""FlexAttention's language, against its definition in dense float64: see `flex_cases`."""

from __future__ import annotations

import doctest
import math
import re
from functools import partial
from typing import Any

import pytest
import torch
from flex_cases import (
    BATCH,
    DIM,
    HEADS,
    IDS,
    LENGTH,
    MASKS,
    SCORES,
    Case,
    agree,
    causal,
    dense,
    inputs,
    learnable,
    sliding_window,
)
from paths import ROOT
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap
from torch.nn.attention import flex_attention as theirs

import tilefold.frontends.torch.flash
from tilefold.frontends.torch.flex import attention, block_mask
from tilefold.frontends.torch.flex.requests import request_of
from tilefold.frontends.torch.flex.tracing import traced
from tilefold.torch import create_block_mask, flex_attention

pytestmark = pytest.mark.slow  # kernels are compiled


@pytest.mark.feature("T10")
@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    q, k, v = inputs(gqa=name == "documents")
    case = Case(mask=MASKS[name])
    block_mask = create_block_mask(MASKS[name], BATCH, HEADS, LENGTH, LENGTH)
    o, aux = flex_attention(
        q.detach(),
        k.detach(),
        v.detach(),
        block_mask=block_mask,
        enable_gqa=name == "documents",
        return_aux=theirs.AuxRequest(lse=True, max_scores=True),
    )
    agree((o, aux.lse, aux.max_scores), dense(q, k, v, case))


@pytest.mark.feature("T09")
@pytest.mark.parametrize("name", SCORES)
def test_scores_and_their_gradients(name: str) -> None:
    given, case = inputs(), SCORES[name]()
    o, lse = flex_attention(*given, score_mod=case.score, mask_mod=case.mask, return_lse=True)
    expected = dense(*given, case)
    agree((o, lse), expected[:2])
    do, leaves = torch.randn_like(o), (*given, *case.leaves)
    slopes = torch.autograd.grad((o * do).sum() + lse.square().sum(), leaves)
    wanted = (expected[0] * do).sum() + expected[1].square().sum()
    agree(slopes, torch.autograd.grad(wanted, leaves), 1e-9)


COMPILED = ("alibi", "T5", "buckets", "waves", "documents", "flamingo", "floats")


@pytest.mark.feature("T09")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_functions(name: str) -> None:
    """The functions are traced with the graph; what they read are its inputs, and get gradients."""
    case = SCORES[name]() if name in SCORES else Case(mask=MASKS[name])
    given = inputs()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        aux = theirs.AuxRequest(lse=True)
        options = {"mask_mod": case.mask, "return_aux": aux}
        o, found = flex_attention(q, k, v, case.score, **options)
        return o, found.lse

    torch._dynamo.reset()
    o, lse = step(*given)
    expected, leaves = dense(*given, case)[:2], (*given, *case.leaves)
    agree((o, lse), expected)
    do = torch.randn_like(o)
    slopes = torch.autograd.grad((o * do).sum(), leaves)
    agree(slopes, torch.autograd.grad((expected[0] * do).sum(), leaves), 1e-9)


def test_new_documents_run_the_same_graph() -> None:
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def step(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, slopes: Tensor) -> Any:
        def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
            return s - slopes[h] * (q - k)

        def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
            return (ids[q] == ids[k]) & (q >= k)

        blocks = create_block_mask(mask, None, None, q.shape[2], k.shape[2])
        return flex_attention(q, k, v, score, blocks)

    for number in range(4):
        given, slopes = inputs(), torch.rand(HEADS, dtype=torch.float64, requires_grad=True)
        ids = (torch.arange(LENGTH) + number) // (7 + number)

        def score(s: Any, b: Any, h: Any, q: Any, k: Any, slopes: Tensor = slopes) -> Any:
            return s - slopes[h] * (q - k)

        def mask(b: Any, h: Any, q: Any, k: Any, ids: Tensor = ids) -> Any:
            return (ids[q] == ids[k]) & (q >= k)

        o, expected = step(*given, ids, slopes), dense(*given, Case(score, mask))[0]
        agree((o,), (expected,))
        pairs = (torch.autograd.grad(x.sum(), (given[0], slopes)) for x in (o, expected))
        agree(*pairs, 1e-9)
    assert counter.frame_count == 1
    assert counter.graphs[0].code.count("attention_extended") >= 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_transforms_and_tracers() -> None:
    """`torch.func` differentiates what functions read; a tracer has it as inputs."""
    q, k, v = (x.detach() for x in inputs())
    slopes, later = torch.rand(HEADS, dtype=torch.float64), torch.arange(LENGTH) // 5

    def loss(attend: Any, q: Tensor, slopes: Tensor) -> Tensor:
        case = Case(lambda s, b, h, q, k: s - slopes[h] * (q - k), causal)
        o: Tensor = attend(q, k, v, case)
        return o.square().sum()

    def mine(q: Tensor, k: Tensor, v: Tensor, case: Case) -> Any:
        return flex_attention(q, k, v, case.score, mask_mod=case.mask)

    def formula(q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
        return dense(q, k, v, case)[0]

    both = torch.stack((q, q + 1)), torch.stack((slopes, 2 * slopes))
    found = vmap(grad(partial(loss, mine), (0, 1)))(*both)
    wanted = [grad(partial(loss, formula), (0, 1))(*each) for each in zip(*both, strict=True)]
    agree(found, map(torch.stack, zip(*wanted, strict=True)), 1e-9)

    def documents(q: Tensor, ids: Tensor) -> Any:
        return flex_attention(q, k, v, mask_mod=lambda b, h, q, k: ids[q] == ids[k])

    traced_graph = torch.jit.trace(documents, (q, IDS))
    agree((traced_graph(q, later),), (documents(q, later),))
    with FakeTensorMode(allow_non_fake_inputs=True):
        ids = torch.empty(LENGTH, dtype=torch.int64)
        assert documents(torch.empty(BATCH, HEADS, LENGTH, DIM).double(), ids).shape == q.shape


def test_what_a_function_reads_is_never_stale() -> None:
    """Tensors that change in place, scalars, and Python's values: each call reads them again."""
    q, k, v = (x.detach() for x in inputs())
    ids, slope, size = torch.zeros(LENGTH, dtype=torch.int64), torch.tensor(0.5).double(), [5]
    first = torch.tensor(0)

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (ids[q] == ids[k]) & (k >= first) & (q - k < size[0])

    def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return s * slope

    def check() -> None:
        o = flex_attention(q, k, v, score, mask_mod=mask)
        agree((o,), dense(q, k, v, Case(score, mask))[:1])

    check()
    ids[20:] = 3
    check()
    ids.numpy()[50:] = 7  # behind PyTorch's back
    check()
    slope.fill_(2.0)
    first.add_(4)
    check()
    size[0] = 9
    check()


def test_a_repeated_call_finds_its_request() -> None:
    ids = torch.arange(LENGTH) // 9
    sizes = (1, 1, LENGTH, LENGTH)

    def found() -> Any:
        return request_of(traced(None, lambda b, h, q, k: ids[q] == ids[k], sizes), 1.0)[0]

    first = found()
    assert found() is first
    ids[:3] = 8
    assert found() is not first and found() is found()


@pytest.mark.feature("T07")
def test_hidden_tiles_are_skipped() -> None:
    """Also where the score hides, as documents and windows in it do."""
    ids = torch.arange(1024) // 256

    def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        near = torch.where((ids[q] == ids[k]) & (q - k < 64), s, -float("inf"))
        return torch.where(q - k < 500, near, torch.tensor(-math.inf))

    found = traced(score, causal, (1, 1, 1024, 1024))
    assert found.score is None
    counts = request_of(found, 1.0)[0].mask.blocks(1024, 1024, 64, 64)
    assert (counts.skip, counts.full, counts.partial) == (256 - 28, 0, 28)


def test_masks_of_blocks() -> None:
    """`create_block_mask` has the blocks of torch's, and makes nothing of queries x keys."""
    mask = create_block_mask(sliding_window(100), None, None, 2**22, 2**22)
    assert mask.shape == (1, 1, 2**22, 2**22) and mask.numel() == 2**44
    ids = torch.arange(512) // 200

    def by_head(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k + 64 * h) & (ids[q] == ids[k])

    mine = create_block_mask(by_head, 1, 3, 500, 450, BLOCK_SIZE=(64, 128))
    other = theirs.create_block_mask(by_head, 1, 3, 500, 450, "cpu", BLOCK_SIZE=(64, 128))
    assert torch.equal(mine.to_dense(), other.to_dense().bool())
    assert mine.seq_lengths == other.seq_lengths and mine.shape == other.shape
    part, same = mine[0, 1:3, -2], other[0, 1:3, -2]
    assert torch.equal(part.to_dense(), same.to_dense().bool())
    assert mine._adjust(400, 450).shape == (1, 3, 400, 450) and mine.to("cpu").shape == mine.shape
    assert 0 < mine.sparsity() < 100 and "500" in repr(mine)
    for index, error in (((0, 5), IndexError), ((slice(0, 1, 2),), NotImplementedError)):
        with pytest.raises(error):
            mine[index]
    with pytest.raises(NotImplementedError, match="integer or a slice"):
        mine[torch.tensor([0])]


def test_masks_of_torch() -> None:
    q, k, v = (x.detach() for x in inputs())
    mine = theirs.create_block_mask(causal, None, None, LENGTH, LENGTH, "cpu", BLOCK_SIZE=16)
    agree((flex_attention(q, k, v, block_mask=mine),), dense(q, k, v, Case(mask=causal))[:1])
    wide = lambda b, h, q, k: (q // 16) >= k // 16  # noqa: E731
    every = mine.kv_num_blocks, mine.kv_indices, mine.full_kv_num_blocks, mine.full_kv_indices
    blocks = theirs.BlockMask.from_kv_blocks(*every, BLOCK_SIZE=16)
    o = flex_attention(q, k[:1], v[:1], block_mask=blocks)  # a batch of keys for all
    agree((o,), dense(q, k[:1].expand_as(q), v[:1].expand_as(q), Case(mask=wide))[:1])
    both = flex_attention(q, k, v, block_mask=blocks, mask_mod=causal)
    agree((both,), dense(q, k, v, Case(mask=causal))[:1])
    with pytest.raises(RuntimeError, match="sliced"):
        flex_attention(q[:, :1], k[:, :1], v[:, :1], block_mask=mine[:, 0])


def test_rows_of_tensors() -> None:
    """Multi-head latent attention: a second product, of positions, is added to the scores."""
    given, size = inputs(), 5
    left = learnable(BATCH, HEADS, LENGTH, size)
    right = learnable(BATCH, 1, LENGTH, size)

    def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return s + torch.dot(left[b, h, q], right[b, h // HEADS, k]) / 4

    def formula(s: Any, *_: Any) -> Any:
        return s + left @ right.mT / 4

    o, expected = flex_attention(*given, score), dense(*given, Case(formula))[0]
    agree((o,), (expected,))
    slopes = (torch.autograd.grad(x.square().sum(), (*given, left, right)) for x in (o, expected))
    agree(*slopes, 1e-9)


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_a_strict_export_reads_tensors() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, ids: Tensor, slopes: Tensor) -> Tensor:
            return tilefold.torch.flex_attention(
                *[q] * 3,
                score_mod=lambda s, b, h, i, j: s - slopes[h, 0] * (i - j),
                mask_mod=lambda b, h, i, j: ids[i] == ids[j],
            )

    given = torch.randn(1, 2, 12, 8), torch.arange(12) // 5, torch.rand(2, 1)
    program = torch.export.export(Model(), given, strict=True)
    assert torch.equal(program.module()(*given), Model()(*given))


@pytest.mark.parametrize("kind", ["int8", "uint8", "int16", "uint16", "uint32", "uint64"])
def test_integers_of_every_type(kind: str) -> None:
    """They are compared, computed with beyond their bits, and they are indices."""
    q, table, wide = torch.randn(1, 1, 12, 8), torch.randn(256), torch.arange(12) // 4
    narrow = wide.to(getattr(torch, kind))

    def call(ids: Any) -> Any:
        return tilefold.torch.flex_attention(
            *[q] * 3,
            score_mod=lambda s, b, h, i, j: s + table[ids[i]] + table[ids[j] * 100],
            mask_mod=lambda b, h, i, j: (ids[i] == ids[j]) & (ids[3] <= i),
        )

    assert torch.equal(call(narrow), call(wide))


def test_half_types_and_autocast() -> None:
    double = [x.detach() for x in inputs()]
    q, k, v = (x.float() for x in double)
    case = Case(lambda s, b, h, q, k: s - 0.125 * (q - k), causal)
    expected = dense(*double, case)[0].float()
    o = flex_attention(*(x.bfloat16() for x in (q, k, v)), case.score, mask_mod=case.mask)
    assert o.dtype == torch.bfloat16
    agree((o.float(),), (expected,), 0.03)
    with torch.autocast("cpu"):
        assert flex_attention(q, k, v, case.score).dtype == torch.bfloat16


@pytest.mark.feature("T15")
def test_arguments_that_do_not_fit() -> None:
    q, k, v = (x.detach() for x in inputs())
    ids, table = torch.zeros(LENGTH, dtype=torch.int64), torch.zeros(LENGTH, 2)
    two = create_block_mask(causal, BATCH, 2, LENGTH, LENGTH)
    for options, error, words in (
        ({"block_mask": create_block_mask(causal, None, None, 60, LENGTH)}, ValueError, "60 quer"),
        ({"block_mask": two}, ValueError, "heads=2"),
        ({"score_mod": lambda s, b, h, q, k: None}, TypeError, "score_mod returned None"),
        ({"score_mod": lambda s, b, h, q, k: q > k}, TypeError, "number, got a truth"),
        ({"mask_mod": lambda b, h, q, k: q - k}, TypeError, "truth, got a number"),
        ({"score_mod": lambda s, *_: torch.erf(s)}, NotImplementedError, "erf of a score"),
        ({"score_mod": lambda s, *_: torch.sort(s)}, NotImplementedError, "sort"),
        ({"score_mod": lambda s, *_: s.sum(0)}, NotImplementedError, "sum"),
        ({"score_mod": lambda s, *_: s + table}, NotImplementedError, r"\(64, 2\)"),
        ({"score_mod": lambda s, b, h, q, k: s + table[q]}, NotImplementedError, "all of its axes"),
        ({"score_mod": lambda s, b, h, q, k: s + ids[q, k]}, IndexError, "2 indices"),
        ({"score_mod": lambda s, b, h, q, k: s + ids[q + k]}, IndexError, "0 to 126"),
        ({"mask_mod": lambda b, h, q, k: q > k and q > 3}, NotImplementedError, r"& \| ~"),
        ({"mask_mod": lambda b, h, q, k: [1, 2][q] == 1}, NotImplementedError, "lists"),
        ({"mask_mod": lambda b, h, q, k: q // (k + 1) == 0}, NotImplementedError, "several indic"),
        ({"mask_mod": lambda b, h, q, k: (ids + 2**40)[q] == 0}, ValueError, "32 bits"),
    ):
        with pytest.raises(error, match=words):
            flex_attention(q, k, v, **options)
    with pytest.raises(ValueError, match="enable_gqa"):
        flex_attention(q, k[:, :2], v[:, :2])
    with pytest.raises(ValueError, match="multiple"):
        flex_attention(q, k[:, :3], v[:, :3], enable_gqa=True)
    with pytest.raises(ValueError, match="batch of 2 and key of 1"):
        flex_attention(q, k[:1], v[:1])
    with pytest.raises(NotImplementedError, match=r"query must have 4 axes.*\(4, 64, 8\)"):
        flex_attention(q[0], k[0], v[0])
    with pytest.raises(TypeError, match="mask_mod must be a function"):
        create_block_mask(3, 1, 1, 2, 2)  # type: ignore[arg-type]  # it is refused


@pytest.mark.feature("T12")
def test_the_page_and_the_examples_run() -> None:
    page = (ROOT / "docs" / "flex_attention.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, Any] = {}  # later blocks go on from earlier ones
    for block in blocks:
        for long, short in (("2048", "64"), ("512", "16"), ("256", "16"), ("500", "20")):
            block = block.replace(long, short)
        exec(block, names)
    assert names["slopes"].grad.all() and names["aux"].lse.shape == (1, 8, 64)
    assert torch.equal(names["o"], names["same"])
    for module in (tilefold.frontends.torch.flash, attention, block_mask):
        outcome = doctest.testmod(module, raise_on_error=False)
        assert outcome.attempted and not outcome.failed
