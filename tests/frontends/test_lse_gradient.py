"""Gradients through lse: from the same backward pass, in every frontend and way of calling."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import tilefold
from tilefold import attention, attention_backward, merge
from tilefold.problems import reference

Results = tuple[Tensor, Tensor]
MASK = tilefold.lengths([0, 4])


class Watching(TorchFunctionMode):
    """A mode that sees operations, so that calls take the operators."""

    def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(*args, **(kwargs or {}))


def tensors() -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 2)
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def both(*inputs: Tensor, impl: str = "kernel") -> Results:
    results: Results = attention(*inputs, mask=MASK, scale=0.3, return_lse=True, impl=impl)
    return results


def seen(lse: Tensor) -> Tensor:
    """lse with 0 in place of -inf: a query of the first batch entry sees no key."""
    return lse.masked_fill(lse.isinf(), 0)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "lse alone": lambda o, lse: seen(lse).pow(2).sum(),
    "a broadcast term beside o": lambda o, lse: o.sum() + lse[1].sum(),
    "lse that weighs o": lambda o, lse: (o * seen(lse).sigmoid()[..., None]).sum(),
}


@pytest.mark.feature("T10")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("mode", [nullcontext, Watching])
def test_gradients_are_those_of_torch(mode: Callable[[], Any], loss: str) -> None:
    inputs = tensors()
    with mode():
        got = torch.autograd.grad(LOSSES[loss](*both(*inputs)), inputs)
    composed = LOSSES[loss](*both(*inputs, impl="composed"))
    want = torch.autograd.grad(composed, inputs, materialize_grads=True)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.slow
@pytest.mark.feature("T10")
@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_the_gradient_of_arrays_is_that_of_the_reference(dtype: str) -> None:
    """In any strides, in calls with many block rows; where no key is seen it does not matter."""
    rng = np.random.default_rng(0)
    shapes = (2, 4, 37, 16), (2, 2, 45, 16), (2, 2, 45, 8), (2, 4, 37, 8)
    q, k, v, do = (rng.normal(size=shape).astype(dtype) for shape in shapes)
    o, lse = attention(q, k, v, mask=MASK, return_lse=True)
    dlse = np.moveaxis(rng.normal(size=(2, 37, 4)), 1, 2).astype(lse.dtype)
    dlse[0] = np.nan
    got = attention_backward(do, q, k, v, o, lse, mask=MASK, dlse=dlse)
    exact = reference.attention(q, k, v, mask=MASK)
    want = reference.attention_backward(do, q, k, v, *exact, mask=MASK, dlse=dlse)
    tolerance = {"float64": 1e-13, "float16": 1e-2}[dtype]
    for found, expected in zip(got, want, strict=True):
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_lse_without_a_gradient_changes_none() -> None:
    inputs = tensors()
    want = torch.autograd.grad(both(*inputs)[0].sum(), inputs)
    o, lse = both(*inputs)
    for loss in (o.sum() + lse.detach()[1].sum(), o.sum() + 0 * seen(lse).sum()):
        found = torch.autograd.grad(loss, inputs, retain_graph=True)
        torch.testing.assert_close(found, want, rtol=0, atol=0)
    with torch.no_grad():
        assert not both(*inputs)[1].requires_grad


@pytest.mark.slow
@pytest.mark.feature("T10")
def test_compiled_functions_compute_it_too() -> None:
    def loss(*inputs: Tensor) -> Tensor:
        o, lse = both(*inputs)
        return o.sum() + seen(lse).pow(2).sum()

    inputs = tensors()
    want = torch.autograd.grad(loss(*inputs), inputs)
    inside = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(inside(*inputs), inputs), want)
    o, lse = torch.compile(both, fullgraph=True, backend="aot_eager")(*inputs)
    outside = o.sum() + seen(lse).pow(2).sum()
    torch.testing.assert_close(torch.autograd.grad(outside, inputs), want)


@pytest.mark.slow
@pytest.mark.feature("T10")
def test_merge_is_differentiable_end_to_end() -> None:
    def merged(*inputs: Tensor) -> Results:
        q, k, v = inputs
        parts: list[Tensor] = []
        for keys in (slice(0, 2), slice(2, 6)):
            mask = MASK if keys.start else tilefold.full()
            parts += attention(q, k[:, :, keys], v[:, :, keys], mask=mask, return_lse=True)
        o, lse = merge(*parts)
        return o, lse

    assert torch.autograd.gradcheck(merged, tensors())
    q, k, v = tensors()
    unseen = [attention(q, k, v, mask=~tilefold.full(), return_lse=True)] * 2
    o, lse = merge(*unseen[0], *unseen[1])
    (dq,) = torch.autograd.grad(o.sum() + seen(lse).sum(), q)
    assert (dq == 0).all()


@pytest.mark.feature("T15")
def test_a_gradient_of_another_shape_or_type_is_refused() -> None:
    q, k, v = (tensor.detach() for tensor in tensors())
    o, lse = both(q, k, v)
    for given, said in (
        (lse[0], "dlse must have shape (2, 4, 5) to go with q, k and v, got (4, 5)"),
        (lse.float(), "dlse must be of float64 where q is float64, got float32"),
    ):
        for convert in (lambda x: x, Tensor.numpy):
            every = [convert(x) for x in (o, q, k, v, o, lse)]
            with pytest.raises((TypeError, ValueError), match=f"^{re.escape(said)}$"):
                attention_backward(*every, dlse=convert(given), mask=MASK)


@pytest.mark.feature("T15")
@pytest.mark.parametrize("impl", ["kernel", "composed", "native"])
def test_a_scale_that_wants_a_gradient_is_refused(impl: str) -> None:
    q, k, v = tensors()
    scale = torch.tensor(0.5, requires_grad=True)
    said = "scale wants a gradient, and it has none: multiply q by it and pass scale=1.0, or pass"
    with pytest.raises(NotImplementedError, match=f"^{re.escape(said)} scale.item()"):
        attention(q, k, v, scale=scale, impl=impl)
    with pytest.raises(NotImplementedError, match=f"^{re.escape(said)}"):
        tilefold.attention_backward(q, q, k, v, q, q[..., 0], scale=scale)
    want = attention(q, k, v, scale=0.5, impl=impl)
    assert torch.equal(attention(q, k, v, scale=scale.detach(), impl=impl), want)
    with torch.no_grad():
        assert torch.equal(attention(q, k, v, scale=scale, impl=impl), want)
