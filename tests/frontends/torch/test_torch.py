"""PyTorch CPU tensors: autograd, opcheck, torch.compile, and the messages of that frontend."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import ml_dtypes  # noqa: F401  # NumPy knows the name "bfloat16" from it
import numpy as np
import pytest
import torch
from compare import assert_near, dense, tolerances
from opchecks import opcheck
from torch import Tensor
from torch.overrides import TorchFunctionMode

import tilefold
from tilefold import Rule, attention, attention_backward
from tilefold.frontends.torch.tensors import check
from tilefold.problems import reference
from tilefold.problems.attention import Problem
from tilefold.problems.request import LAYOUTS, Request

CAUSAL = tilefold.causal()
RULES = [
    tilefold.full(),
    CAUSAL,
    tilefold.causal("start") & tilefold.local(3),
    ~tilefold.documents([0, 0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0]) | tilefold.prefix(2),
    tilefold.dense(np.tril(np.ones((7, 5), bool))),
    (tilefold.causal(lengths=[3, 5]) & tilefold.lengths([2, 5], side="left"))
    | tilefold.documents([0, 0, 1, 1, 1, 2, 2], [0, 1, 1, 2, 2], causal=True),
    tilefold.rule(lambda h, q, k: (q + k + h) % 3 != 0),
]


HALVES = (torch.float16, torch.bfloat16)
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def tensors(dtype: torch.dtype = torch.float64, layout: str = "bhnd") -> list[Tensor]:
    """q, k, v that require gradients: two sizes of head groups, length and dim."""
    torch.manual_seed(0)
    shapes = (2, 4, 7, 3), (2, 2, 5, 3), (2, 2, 5, 2)
    drawn = [torch.randn(shape, dtype=dtype).permute(LAYOUTS[layout]) for shape in shapes]
    return [tensor.contiguous().requires_grad_() for tensor in drawn]


def value_and_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    o = function(*inputs)
    weights = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).reshape(o.shape)
    return [o, *torch.autograd.grad((o * weights).sum(), inputs)]


def same(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.slow
@pytest.mark.feature("T09")
@pytest.mark.parametrize("mask", RULES, ids=repr)
def test_gradcheck(mask: Rule) -> None:
    assert torch.autograd.gradcheck(lambda *inputs: attention(*inputs, mask=mask), tensors())


@pytest.mark.feature("T02")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.slow
def test_agrees_with_the_reference(layout: str, dtype: torch.dtype) -> None:
    inputs = tensors(dtype, layout)
    o, lse = attention(*inputs, mask=CAUSAL, layout=layout, return_lse=True)
    do = torch.randn_like(o)
    gradients = torch.autograd.grad(o, inputs, do)
    axes = LAYOUTS[layout]
    q, k, v, canonical_do = (x.detach().permute(axes).double().numpy() for x in (*inputs, do))
    expected = reference.attention(q, k, v, mask=CAUSAL)
    slopes = reference.attention_backward(canonical_do, q, k, v, *expected, mask=CAUSAL)
    tolerance = TOLERANCES[dtype]
    for got, want in zip((o, *gradients), (expected[0], *slopes), strict=True):
        assert got.dtype == dtype and got.is_contiguous()
        values = got.detach().permute(axes).double().numpy()
        np.testing.assert_allclose(values, want, rtol=tolerance, atol=tolerance)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    operands = {name: x.astype(as_numpy(o).dtype) for name, x in zip("qkv", (q, k, v), strict=True)}
    operands["do"] = canonical_do.astype(as_numpy(o).dtype)
    problem = Problem.of(q.shape, k.shape, v.shape, dtype=str(operands["q"].dtype), mask=CAUSAL)
    want = dense(operands, problem.mask, problem.scale)
    tolerance = tolerances(problem, operands, want)["lse"]
    assert_near("lse", lse.detach().numpy(), want["lse"], tolerance)


@pytest.mark.slow
def test_explicit_backward_is_what_autograd_computes() -> None:
    inputs = tensors()
    o, lse = attention(*inputs, scale=0.3, return_lse=True)
    do = torch.randn_like(o)
    explicit = attention_backward(do, *inputs, o, lse, scale=0.3)
    same(list(explicit), list(torch.autograd.grad(o, inputs, do)))


@pytest.mark.slow
@pytest.mark.feature("T01", "T09")
@pytest.mark.parametrize("dtype", HALVES)
def test_half_types(dtype: torch.dtype) -> None:
    """Gradients in the type of their inputs, and the same numbers as NumPy arrays give."""
    inputs = tensors(dtype)
    o, lse = attention(*inputs, mask=RULES[2], return_lse=True)
    do = torch.randn_like(o)
    gradients = torch.autograd.grad(o, inputs, do)
    explicit = attention_backward(do, *inputs, o, lse, mask=RULES[2])
    assert [x.dtype for x in (o, lse, *gradients)] == [dtype, torch.float32, *[dtype] * 3]
    arrays = [as_numpy(tensor) for tensor in (do, *inputs, o)]
    slopes = attention_backward(*arrays, lse.detach().numpy(), mask=RULES[2])
    for got, again, array in zip(gradients, explicit, slopes, strict=True):
        assert torch.equal(got, again)
        np.testing.assert_array_equal(as_numpy(got), array)
    shapes = [tensor.to("meta") for tensor in inputs]
    o, lse = attention(*shapes, return_lse=True)
    assert (o.dtype, lse.dtype) == (dtype, torch.float32)


def as_numpy(tensor: Tensor) -> Any:
    """The same numbers in NumPy's type."""
    name = str(tensor.dtype).removeprefix("torch.")
    return tensor.detach().float().numpy().astype(np.dtype(name))


def test_gradients_of_a_broadcast_sum_and_of_views() -> None:
    """`sum().backward()` hands over a do of strides zero; inputs are views of one tensor."""
    packed = torch.randn(2, 7, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    q, k, v = packed.unbind(2)
    attention(q, k, v, layout="bnhd").sum().backward()
    assert packed.grad is not None
    dense = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    attention(*dense, layout="bnhd").sum().backward()
    for index, tensor in enumerate(dense):
        torch.testing.assert_close(packed.grad[:, :, index], tensor.grad)


def test_only_the_asked_gradients_flow() -> None:
    q, k, v = tensors()
    attention(q, k.detach(), v.detach()).sum().backward()
    assert q.grad is not None and k.grad is None and v.grad is None
    with torch.no_grad():
        assert not attention(q, k, v).requires_grad


@pytest.mark.parametrize("view", [lambda x: x[::2], lambda x: x.mT.contiguous().mT, torch.flip])
def test_strided_tensors(view: Any) -> None:
    base = torch.randn(4, 2, 6, 5, dtype=torch.float64)
    given = torch.flip(base, (0, 2)) if view is torch.flip else view(base)
    assert torch.equal(
        attention(given, given, given),
        attention(*[given.contiguous()] * 3),
    )


def test_lazy_negation_and_misaligned_memory() -> None:
    plain = torch.randn(1, 1, 3, 4, dtype=torch.float64)
    negated = torch.complex(torch.zeros_like(plain), plain).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(attention(negated, plain, plain), attention(-plain, plain, plain))
    raw = np.zeros(97, np.uint8)
    raw[1:] = np.frombuffer(plain.numpy().tobytes(), np.uint8)
    crooked = torch.frombuffer(raw, dtype=torch.float64, offset=1, count=12).reshape(plain.shape)
    assert crooked.data_ptr() % 8
    assert torch.equal(attention(crooked, plain, plain), attention(plain, plain, plain))


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4)])
def test_empty_axes(shape: tuple[int, ...]) -> None:
    inputs = [torch.ones(shape, requires_grad=True) for _ in range(3)]
    o, lse = attention(*inputs, return_lse=True)
    assert o.shape == shape and lse.shape == shape[:3]
    o.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.shape == shape for tensor in inputs)


def test_tensors_without_data_give_shapes() -> None:
    q, k, v = (tensor.to("meta") for tensor in tensors())
    o, lse = attention(q, k, v, return_lse=True)
    assert o.device.type == "meta" and o.shape == (2, 4, 7, 2) and lse.shape == (2, 4, 7)


@pytest.mark.slow
@pytest.mark.parametrize("mask", [tilefold.full(), RULES[3]], ids=repr)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(mask: Rule, layout: str) -> None:
    opcheck(tensors(layout=layout), Request(mask, 0.5, layout, "high"))


@pytest.mark.slow
@pytest.mark.feature("T01")
@pytest.mark.parametrize("dtype", HALVES)
def test_opcheck_and_compile_of_half_types(dtype: torch.dtype) -> None:
    inputs = tensors(dtype)
    opcheck(inputs, Request(tilefold.causal()))

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, mask=tilefold.causal())

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = value_and_gradients(compiled, inputs)
    assert [tensor.dtype for tensor in got] == [dtype] * 4
    for a, b in zip(got, value_and_gradients(model, inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("mask", [None, *RULES], ids=repr)
def test_compile(mask: Rule | None) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, lse = attention(2 * q, k, v, mask=mask, scale=0.3, return_lse=True)
        return o * lse.isfinite()[..., None]

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    same(value_and_gradients(compiled, tensors()), value_and_gradients(model, tensors()))


@pytest.mark.slow
def test_compile_with_rules_made_and_joined_inside() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        near = tilefold.causal(lengths=4) & tilefold.local(3, align="start")
        return attention(q, k, v, mask=near | tilefold.prefix(4) | tilefold.chunked(2))

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    same(value_and_gradients(compiled, tensors()), value_and_gradients(model, tensors()))


@pytest.mark.slow
def test_a_compiled_function_leaves_its_graph_for_a_rule_that_it_negates() -> None:
    """PyTorch's compiler has no `~` for objects."""

    def model(q: Tensor, k: Tensor, v: Tensor, n: Tensor) -> Tensor:
        return attention(q, k, v, mask=~(tilefold.prefix(4) & tilefold.lengths(n)))

    n = torch.tensor([2, 3])[: tensors()[0].shape[0]]
    compiled = torch.compile(model, backend="aot_eager")
    same([compiled(*tensors(), n)], [model(*tensors(), n)])


@pytest.mark.slow
def test_compile_again_for_another_rule_alone() -> None:
    graphs = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    def model(q: Tensor, k: Tensor, v: Tensor, mask: Rule) -> Tensor:
        return attention(q, k, v, mask=mask)

    compiled = torch.compile(model, fullgraph=True, backend=count)
    ids = [0, 0, 1, 1, 1, 0, 0]
    for expected, mask in (
        (1, tilefold.documents(ids, ids[:5])),
        (1, tilefold.documents(ids, ids[2:])),
        (2, tilefold.causal()),
        (2, tilefold.causal()),
    ):
        same([compiled(*tensors(), mask)], [model(*tensors(), mask)])
        assert len(graphs) == expected


@pytest.mark.slow
def test_compile_with_lengths_that_change() -> None:
    compiled = torch.compile(
        lambda q, k: attention(q, k, k, mask=tilefold.causal()),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for len_q, len_k in ((5, 7), (9, 6), (11, 30)):
        q, k = torch.randn(1, 2, len_q, 4), torch.randn(1, 2, len_k, 4)
        assert torch.equal(compiled(q, k), attention(q, k, k, mask=tilefold.causal()))


FIRST = """
import torch, tilefold
{before}
q = torch.randn(1, 1, 4, 8, requires_grad=True)
f = lambda q: tilefold.attention(q, q, q, mask={mask})
torch.compile(f, fullgraph=True, backend='aot_eager')(q).sum().backward()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "mask", ["None", "tilefold.causal()", "made", "tilefold.local(2).window(9, 9)"]
)
def test_the_first_call_may_be_a_compiled_one(mask: str) -> None:
    code = FIRST.format(mask=mask, before="made = tilefold.causal(lengths=[3]) & tilefold.local(2)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


Q = torch.zeros(1, 2, 3, 4)
ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "NumPy beside torch": (
        lambda: attention(Q, Q.numpy(), Q),
        TypeError,
        "k must be a torch tensor as q is, got ndarray",
    ),
    "torch beside NumPy": (
        lambda: attention_backward(Q.numpy(), Q, Q, Q, Q, Q[..., 0]),
        TypeError,
        "do must be a torch tensor as q is, got ndarray",
    ),
    "half": (
        lambda: attention(Q, Q, Q.bfloat16()),
        TypeError,
        "v must be of float32 as q is, got bfloat16",
    ),
    "mixed halves": (
        lambda: attention(Q.half(), Q.bfloat16(), Q.half()),
        TypeError,
        "k must be of float16 as q is, got bfloat16",
    ),
    "lse of half types": (
        lambda: attention_backward(*[Q.half()] * 5, Q[..., 0].half()),
        TypeError,
        "lse must be of float32 where q is float16, got float16",
    ),
    "integers": (
        lambda: attention(Q.int(), Q, Q),
        TypeError,
        "q must be of float32, float64, float16 or bfloat16, got int32",
    ),
    "complex": (
        lambda: attention(Q, Q * 1j, Q),
        TypeError,
        "k must be of float32, float64, float16 or bfloat16, got complex64",
    ),
    "mixed types": (
        lambda: attention(Q, Q, Q.double()),
        TypeError,
        "v must be of float32 as q is, got float64",
    ),
    "sparse": (
        lambda: attention(Q, Q.to_sparse(), Q),
        TypeError,
        "k must be a strided tensor, got torch.sparse_coo; pass k.to_dense()",
    ),
    "tensor in a rule": (
        lambda: tilefold.rule(lambda q, k: torch.arange(9)[q] == k),
        TypeError,
        "rule: the function cannot be called with symbols: IndexError: only integers, slices (`:`),"
        " ellipsis (`...`), None and long or byte Variables are valid indices (got Index); it may"
        " use integers, + - *, // and % by a constant, abs, comparisons, and & | ~ between"
        " comparisons; the data of arrays go into documents(), lengths() or dense()",
    ),
    "jagged": (
        lambda: attention(Q, jagged(), Q),
        TypeError,
        "k must be a strided tensor, got a nested one: pass k.to_padded_tensor(0.0), with"
        " mask=tilefold.lengths(k.offsets().diff()) for the lengths of keys",
    ),
    "jagged, composed": (
        lambda: attention(jagged(), Q, Q, impl="composed"),
        TypeError,
        "q must be a strided tensor, got a nested one: pass q.to_padded_tensor(0.0), with"
        " mask=tilefold.lengths(q.offsets().diff()) for the lengths of keys",
    ),
    "nested": (
        lambda: attention(Q, Q, nested()),
        TypeError,
        "v must be one tensor, got a nested one: pass v.contiguous().to_padded_tensor(0.0), with"
        " mask=tilefold.lengths(n) for the lengths n of keys",
    ),
    "another device": (
        lambda: check(q=Q, k=OnGpu()),  # type: ignore[arg-type]  # no GPU here
        ValueError,
        "k is on cuda:0 and others are on cpu: pass k.to('cpu'), or the others on cuda:0",
    ),
    "rank": (
        lambda: attention(Q[0], Q, Q),
        ValueError,
        "q must have four axes, (batch, heads, sequence, dim) in layout bhnd, got shape (2, 3, 4)",
    ),
    "dim": (
        lambda: attention(Q, Q[..., :3], Q),
        ValueError,
        "the dim of k must be 4 as in q, got 3: q is (1, 2, 3, 4) and k (1, 2, 3, 3) in"
        " layout bhnd",
    ),
    "layout": (
        lambda: attention(Q, Q, Q, layout="nbhd"),
        ValueError,
        "layout must be 'bhnd', 'bnhd' or 'bhdn', got 'nbhd'",
    ),
    "shape of lse": (
        lambda: attention_backward(Q, Q, Q, Q, Q, Q),
        ValueError,
        "lse must have shape (1, 2, 3) to go with q, k and v, got (1, 2, 3, 4)",
    ),
    "mask": (
        lambda: attention(Q, Q, Q, mask=torch.ones(3, 3)),  # type: ignore[arg-type]  # the point
        TypeError,
        "mask must be a rule such as tilefold.causal(), got tensor([[1., 1., 1.], [1., 1., 1.],"
        " [1., 1., 1.]]); wrap an array of bool as tilefold.dense(array)",
    ),
}


def jagged() -> Tensor:
    """Two sequences, of 3 and of 5."""
    parts = [torch.arange(float(length * 8)).reshape(length, 2, 4) for length in (3, 5)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)


def nested() -> Tensor:
    parts = [torch.ones(2, length, 4) for length in (3, 5)]
    return torch.nested.nested_tensor(parts, layout=torch.strided)


class OnGpu:
    device = torch.device("cuda:0")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:.*nested tensors? .*prototype:UserWarning")
@pytest.mark.feature("T15")
@pytest.mark.parametrize("case", ERRORS)
def test_message(case: str) -> None:
    call, kind, message = ERRORS[case]
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        call()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_the_advice_on_nested_tensors_works() -> None:
    given = jagged()
    padded, lengths = given.to_padded_tensor(0.0), given.offsets().diff()
    o = attention(padded, padded, padded, mask=tilefold.lengths(lengths))
    for number, part in enumerate(given.unbind()):
        alone = part[None]
        want = attention(alone, alone, alone)[0]
        torch.testing.assert_close(o[number, :, : part.shape[1]], want)
    assert nested().contiguous().to_padded_tensor(0.0).shape == (2, 2, 5, 4)


class Watching(TorchFunctionMode):
    """A mode that sees operations, so that calls take the operators."""

    def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(*args, **(kwargs or {}))


@pytest.mark.feature("T10")
@pytest.mark.parametrize(
    "how", ["eager", pytest.param("compiled", marks=pytest.mark.slow), "operator"]
)
def test_gradients_at_large_scores(how: str) -> None:
    """Autograd keeps what rounding takes from lse: 1e8 + ln 4 is 1e8 in float32."""

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, scale=1.0).sum()

    run = torch.compile(loss, fullgraph=True, backend="aot_eager") if how == "compiled" else loss
    for score in (1e2, 1e4, 1e8, 3e37):
        q, k = torch.ones(1, 1, 1, 1), torch.full((1, 1, 4, 1), score)
        inputs = [q, k, torch.arange(4.0).reshape(k.shape)]
        for tensor in inputs:
            tensor.requires_grad_()
        with Watching() if how == "operator" else nullcontext():
            _, dk, dv = torch.autograd.grad(run(*inputs), inputs)
        torch.testing.assert_close(dv, torch.full_like(dv, 0.25), rtol=1e-6, atol=0)
        torch.testing.assert_close(dk.ravel(), (torch.arange(4.0) - 1.5) / 4, rtol=1e-6, atol=0)
