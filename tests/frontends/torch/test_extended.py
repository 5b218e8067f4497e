"""PyTorch tensors that a score reads: gradients, operators, compiled functions, and messages."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from torch.overrides import TorchFunctionMode

import tilefold
import tilefold.frontends.torch.calls  # gives the operators their derivatives
from tilefold import attention, attention_backward
from tilefold.frontends.torch import operators
from tilefold.frontends.torch.spelled import spelled_request
from tilefold.problems import reference
from tilefold.problems.request import Request
from tilefold.scores.score import as_score

pytestmark = pytest.mark.slow  # kernels are compiled


class Watching(TorchFunctionMode):
    """A mode that sees operations, so that calls take the operators."""

    def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(*args, **(kwargs or {}))


Makes = Callable[..., Any]
CAUSAL = tilefold.causal()


def tensors() -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (2, 4, 7, 3), (2, 2, 5, 3), (2, 2, 5, 2)
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def learnable(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.rand(shape, dtype=dtype) + 0.5).requires_grad_()


def own(array: Tensor) -> Any:
    entries = tilefold.table(array)
    return tilefold.score(lambda s, h: s * entries[h] + tilefold.exp(entries[h]))


SCORES: dict[str, tuple[Makes, tuple[tuple[int, ...], ...]]] = {
    "bias of keys, and temperature": (
        lambda a, b: [tilefold.bias(a), tilefold.softcap(3.0), tilefold.temperature(b)],
        ((2, 1, 1, 5), (4, 1, 1)),
    ),
    "one array twice, and its part": (
        lambda a: [tilefold.bias(a), own(a[:, 0, 0]), tilefold.temperature(a)],
        ((4, 1, 1),),
    ),
    "slopes of alibi": (lambda a: tilefold.alibi(a), ((4,),)),
    "buckets of T5": (lambda a: tilefold.relative_bias(a, max_distance=9), ((4, 8),)),
}


def loss(*given: Tensor, make: Makes) -> Tensor:
    o, lse = attention(*given[:3], mask=CAUSAL, score=make(*given[3:]), return_lse=True)
    return o.sin().sum() + lse.masked_fill(lse.isinf(), 0).sum()


@pytest.mark.slow
@pytest.mark.feature("T09")
@pytest.mark.parametrize("case", SCORES)
def test_gradients_of_arrays_in_a_score(case: str) -> None:
    """By finite differences, and the same bits where a part of torch watches operators."""
    make, shapes = SCORES[case]
    given = [*tensors(), *(learnable(*shape) for shape in shapes)]
    assert torch.autograd.gradcheck(lambda *given: loss(*given, make=make), given)
    want = torch.autograd.grad(loss(*given, make=make), given)
    with Watching():
        got = torch.autograd.grad(loss(*given, make=make), given)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.feature("T09")
@pytest.mark.parametrize("shape", [(4,), (4, 2)])
def test_gradients_of_sinks(shape: tuple[int, ...]) -> None:
    """They are rows in the type of lse below autograd; their gradient has their shape and type."""

    def call(*given: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, array, sinks = given
        score = tilefold.bias(array)
        o, lse = attention(q, k, v, mask=CAUSAL, score=score, sinks=sinks, return_lse=True)
        return o, lse

    given = [*tensors(), learnable(5), learnable(*shape)]
    assert torch.autograd.gradcheck(call, given)
    narrow = [given[0], given[1], given[2], given[3], given[4].detach().half().requires_grad_()]
    gradient = torch.autograd.grad(call(*narrow)[0].sum(), narrow[-1])[0]
    assert (gradient.shape, gradient.dtype) == (shape, torch.float16)
    q, k, v, _, sinks = (tensor.detach() for tensor in given)
    o, lse, largest = attention(q, k, v, sinks=sinks, return_lse=True, return_max=True)
    again = attention_backward(o, q, k, v, o, lse, sinks=sinks)[-1]
    want = reference.attention_backward(
        *(x.numpy() for x in (o, q, k, v, o, lse)), sinks=sinks.reshape(4, -1).numpy()
    )[-1]
    np.testing.assert_allclose(again.numpy(), want.reshape(shape), rtol=1e-11)
    with Watching():
        watched = attention(q, k, v, sinks=sinks, return_max=True)
    assert torch.equal(watched[1], largest) and not largest.requires_grad


def test_only_wanted_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from tilefold.backends import calls

    asked: list[tuple[str, ...]] = []
    run = calls.run

    def watched(machine: Any, arrays: Any, wanted: Any, *rest: Any) -> Any:
        asked.append(wanted.results)
        return run(machine, arrays, wanted, *rest)

    monkeypatch.setattr(calls, "run", watched)
    q, k, v = tensors()
    array, other = learnable(4, 1, 1), torch.ones(5, dtype=torch.float64)
    score = [tilefold.bias(other), tilefold.bias(array), tilefold.bias(other.numpy())]
    for mode in (nullcontext, Watching):
        with mode():
            attention(q, k, v, score=score).sum().backward()
    with torch.no_grad():
        assert not attention(q, k, v, score=score).requires_grad
    assert asked[1] == asked[3] == ("dq", "dk", "dv", "dinput1")
    assert other.grad is None and array.grad is not None
    assert attention(q.detach(), k.detach(), v.detach(), score=score).requires_grad


def test_an_array_without_axes_has_a_gradient() -> None:
    q, k, v = tensors()
    array = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def run(array: torch.Tensor) -> Any:
        score = [tilefold.bias(array), tilefold.temperature(array)]
        return attention(q, k, v, score=score), tilefold.weights(q, k, score=score)

    for mode in (nullcontext, Watching):
        with mode():
            got = torch.autograd.grad([x.square().sum() for x in run(array)], array)[0]
        assert got.shape == ()
    step = 1e-6
    with torch.no_grad():
        above, below = (sum(x.square().sum() for x in run(array + t)) for t in (step, -step))
    torch.testing.assert_close(got, (above - below) / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arrays_may_have_another_type_than_q(dtype: torch.dtype) -> None:
    q, k, v = tensors()
    array = learnable(4, 7, 5, dtype=dtype)
    got = torch.autograd.grad(attention(q, k, v, score=tilefold.bias(array)).sum(), (q, array))
    wide = array.detach().double().requires_grad_()
    want = torch.autograd.grad(attention(q, k, v, score=tilefold.bias(wide)).sum(), (q, wide))
    assert got[1].dtype == dtype
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1], want[1].to(dtype))


def test_arrays_of_numpy_are_read_in_calls_of_tensors() -> None:
    given = [tensor.detach() for tensor in tensors()]
    array = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)[::-1]
    array.flags.writeable = False
    want = attention(*given, score=tilefold.bias(torch.from_numpy(array.copy())))
    assert torch.equal(attention(*given, score=tilefold.bias(array)), want)


def test_the_backward_pass_alone_returns_all_gradients_in_order() -> None:
    q, k, v = (tensor.detach() for tensor in tensors())
    first, second = learnable(5).detach(), learnable(4, 1, 1).detach()
    score = [tilefold.bias(first), tilefold.temperature(second)]
    o, lse = attention(q, k, v, score=score, return_lse=True)
    got = attention_backward(o, q, k, v, o, lse, dlse=lse, score=score)
    arrays = [x.numpy() for x in (o, q, k, v, o, lse)]
    want = reference.attention_backward(*arrays, score=score, dlse=arrays[-1])
    for found, expected in zip(got, want, strict=True):
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-11, atol=1e-12)


def test_a_form_without_arrays_takes_the_way_of_plain_calls() -> None:
    q, k, v = tensors()
    score = [tilefold.softcap(3.0), tilefold.alibi()]
    o = attention(q, k, v, score=score)
    assert type(o.grad_fn).__name__ == "_AttentionBackward"
    want = attention(*[x.detach().numpy() for x in (q, k, v)], score=score)
    np.testing.assert_array_equal(o.detach().numpy(), want)


def test_an_array_changed_between_the_passes_is_found() -> None:
    q, k, v = tensors()
    array = learnable(5)
    o = attention(q, k, v, score=tilefold.bias(array))
    with torch.no_grad():
        array.add_(1)
    with pytest.raises(RuntimeError, match=r"^one of the variables needed .* inplace operation"):
        o.sum().backward()


def test_tensors_without_data_give_shapes() -> None:
    given = [*tensors(), learnable(5), learnable(4, 2)]
    bare = [tensor.detach().to("meta").requires_grad_() for tensor in given]
    o = attention(*bare[:3], score=tilefold.bias(bare[3]), sinks=bare[4])
    o.sum().backward()
    assert o.shape == (2, 4, 7, 2)
    for tensor in bare:
        assert tensor.grad is not None and tensor.grad.shape == tensor.shape


@pytest.mark.slow
@pytest.mark.feature("T09")
def test_opcheck() -> None:
    given = tensors()
    arrays = [learnable(2, 1, 1, 5), learnable(4, 1, 1)]
    form = as_score([tilefold.bias(arrays[0]), tilefold.temperature(arrays[1])])
    assert form is not None
    asked = spelled_request(Request(CAUSAL, score=form.form.score))
    text = asked.text, asked.numbers
    torch.library.opcheck(operators.attention_extended, (*given, arrays, *text, False))
    with torch.no_grad():
        o, lse, _, _ = operators.attention_extended(*given, arrays, *text, False)
        inputs = (o, *given, o, lse, arrays, *text, [True, False], torch.ones_like(lse))
        plain = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, inputs)
    torch.library.opcheck(operators.attention_extended_backward, plain)


INSIDE: dict[str, Makes] = {
    "bias, capped": lambda a: [tilefold.bias(a), tilefold.softcap(3.0)],
    "alibi": lambda a: [tilefold.alibi(), tilefold.temperature(a[:, :1])],
    "buckets of T5": lambda a: tilefold.relative_bias(a, max_distance=9),
}
OUTSIDE: dict[str, Makes] = {
    "one of my own": lambda a: own(a),
    "no arrays": lambda a: tilefold.alibi(),
}


@pytest.mark.slow
@pytest.mark.feature("T09")
@pytest.mark.parametrize("case", [*INSIDE, *OUTSIDE])
def test_compiled_functions_read_the_arrays_of_a_score(case: str) -> None:
    """A score may be made inside, too. Other values of the arrays are read by the same graph."""
    q, k, v = tensors()
    sinks, inside = learnable(4), case in INSIDE
    array = learnable(*{"one of my own": (4,), "buckets of T5": (4, 8)}.get(case, (4, 1, 5)))
    make = (INSIDE | OUTSIDE)[case]
    made = make(array)
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    def model(q: Tensor) -> Tensor:
        o: Tensor = attention(q, k, v, score=make(array) if inside else made, sinks=sinks)
        return o.sin().sum()

    model(q)  # the first call of a program finds out which framework q is of
    compiled = torch.compile(model, fullgraph=True, backend=count)
    for _ in range(2):
        got, want = (
            torch.autograd.grad(call(q), (q, array, sinks), materialize_grads=True)
            for call in (compiled, model)
        )
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        with torch.no_grad():
            array.mul_(0.5)
    assert len(graphs) == 1


Q = torch.zeros(1, 2, 3, 4)
MESSAGES: dict[str, tuple[Callable[[], Any], str]] = {
    "another device": (
        lambda: attention(Q, Q, Q, score=tilefold.bias(torch.ones(3, device="meta"))),
        "the array 0 of score is on meta and q is on cpu: pass it .to('cpu')",
    ),
    "freed": (
        lambda: attention(Q, Q, Q, score=tilefold.bias(freed())),
        "the array 0 of score needs 12 bytes of memory, and its storage holds 0: it was freed or"
        " resized, as FSDP does with parameters; fill it again before the call",
    ),
    "sparse": (
        lambda: attention(Q, Q, Q, score=tilefold.bias(torch.ones(3).to_sparse())),
        "the array 0 of score must be a strided tensor, got torch.sparse_coo; pass its .to_dense()",
    ),
    "another type by now": (
        lambda: attention(Q, Q, Q, score=converted()),
        "the array 0 of score was float32 of shape (3,) when the score was made, and is float16"
        " of shape (3,): make the score again",
    ),
    "gradient and NumPy": (
        lambda: attention(*[Q.numpy()] * 3, score=tilefold.bias(learnable(3))),
        "the array 0 of score is a tensor that wants a gradient, and q is none: pass tensors, or"
        " array.detach()",
    ),
    "bfloat16 and NumPy": (
        lambda: attention(*[Q.numpy()] * 3, score=tilefold.bias(torch.ones(3).bfloat16())),
        "the array 0 of score must be of a type that NumPy has, got a Tensor of bfloat16; pass it"
        " as float32, or as an array of ml_dtypes.bfloat16",
    ),
    "sinks of bfloat16 and NumPy": (
        lambda: attention(*[Q.numpy()] * 3, sinks=torch.ones(2).bfloat16()),
        "sinks must be of a type that NumPy has, got a Tensor of bfloat16; pass it as float32, or"
        " as an array of ml_dtypes.bfloat16",
    ),
    "sinks elsewhere": (
        lambda: attention(Q, Q, Q, sinks=Elsewhere(np.ones(2))),
        "sinks is a Elsewhere on DLPack device 2, where only torch tensors have kernels so far;"
        " copy it to the CPU first, or make it a torch tensor (torch.from_dlpack)",
    ),
    "sinks with a mask": (
        lambda: attention(Q, Q, Q, sinks=np.ma.masked_array([1.0, 2.0], [True, False])),
        "sinks must be an array without a mask of its own, got MaskedArray; pass its data, and what"
        " to hide in attention as `mask`",
    ),
    "sinks of another shape": (
        lambda: attention(Q, Q, Q, sinks=torch.ones(3)),
        "sinks must have shape (2,) or (2, number), one row for each head of q, got 3 rows",
    ),
}


class Elsewhere:
    """An array of another framework on a GPU."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.dtype, self.shape = array.dtype, array.shape

    def __dlpack__(self) -> Any:
        raise AssertionError

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


def freed() -> Tensor:
    array = torch.ones(3)
    array.untyped_storage().resize_(0)
    return array


def converted() -> Any:
    array = torch.nn.Parameter(torch.ones(3))
    score = tilefold.bias(array)
    array.data = array.data.half()
    return score


@pytest.mark.feature("T15")
@pytest.mark.parametrize("case", MESSAGES)
def test_message(case: str) -> None:
    call, said = MESSAGES[case]
    errors = TypeError, ValueError, NotImplementedError
    with pytest.raises(errors, match=f"^{re.escape(said)}$"):
        call()
