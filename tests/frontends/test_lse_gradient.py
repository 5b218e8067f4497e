"""A gradient through lse is computed or refused, and never lost without a word."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tilefold
from tilefold import attention, merge
from tilefold.frontends import operators
from tilefold.problems.request import Request

Results = tuple[Tensor, Tensor]
REFUSED = r"^the gradient of lse is not implemented by impl='kernel'"
MASK = tilefold.lengths([0, 4])


def tensors() -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 2)
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def direct(*inputs: Tensor) -> Results:
    results: Results = attention(*inputs, mask=MASK, return_lse=True)
    return results


def operator(*inputs: Tensor) -> Results:
    o, lse, _ = operators.attention(*inputs, Request(MASK))
    return o, lse


def seen(lse: Tensor) -> Tensor:
    """lse with 0 in place of -inf: a query of the first batch entry sees no key."""
    return lse.masked_fill(lse.isinf(), 0)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "lse alone": lambda o, lse: seen(lse).pow(2).sum(),
    "a term beside o": lambda o, lse: o.sum() + 1e-3 * seen(lse).sum(),
    "lse that weighs o": lambda o, lse: (o * seen(lse).sigmoid()[..., None]).sum(),
    "NaN": lambda o, lse: o.sum() + torch.nan * lse.sum(),
}


@pytest.mark.feature("T10", "T15")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("call", [direct, operator])
def test_a_gradient_of_lse_is_refused(call: Callable[..., Results], loss: str) -> None:
    inputs = tensors()
    value = LOSSES[loss](*call(*inputs))
    with pytest.raises(NotImplementedError, match=REFUSED):
        value.backward()
    assert all(tensor.grad is None for tensor in inputs)


@pytest.mark.parametrize("call", [direct, operator])
def test_lse_without_a_gradient_changes_none(call: Callable[..., Results]) -> None:
    inputs = tensors()
    want = torch.autograd.grad(call(*inputs)[0].sum(), inputs)
    o, lse = call(*inputs)
    assert lse.requires_grad
    unused = o.sum() + 0 * seen(lse).sum() + (o * lse.isfinite()[..., None]).mul(0).sum()
    for loss in (o.sum() + lse.detach()[1].sum(), unused):
        found = torch.autograd.grad(loss, inputs, retain_graph=True)
        for got, expected in zip(found, want, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
    with torch.no_grad():
        assert not call(*inputs)[1].requires_grad


@pytest.mark.slow
@pytest.mark.feature("T10")
def test_compiled_functions_refuse_it_too() -> None:
    compiled = torch.compile(direct, fullgraph=True, backend="aot_eager")
    inputs = tensors()
    o, _ = compiled(*inputs)  # lse leaves the graph: its gradient is a tensor of zeros
    got = torch.autograd.grad(o.sum(), inputs)
    want = torch.autograd.grad(direct(*inputs)[0].sum(), inputs)
    for gradient, expected in zip(got, want, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0)
    with pytest.raises(NotImplementedError, match=REFUSED):
        seen(compiled(*inputs)[1]).sum().backward()

    def inside(*inputs: Tensor) -> Tensor:
        o, lse = direct(*inputs)
        return o.sum() + seen(lse).sum()

    with pytest.raises(NotImplementedError, match=REFUSED):
        torch.compile(inside, fullgraph=True, backend="aot_eager")(*inputs).backward()


@pytest.mark.feature("T10")
@pytest.mark.parametrize("impl", ["composed", "native"])
def test_the_implementations_of_torch_compute_it(impl: str) -> None:
    def both(*inputs: Tensor) -> Results:
        o, lse = attention(*inputs, mask=MASK, scale=0.3, return_lse=True, impl=impl)
        return o, seen(lse)

    q, k, v = (tensor[:, :2, :4] for tensor in tensors())
    assert torch.autograd.gradcheck(both, (q, k, v))


@pytest.mark.slow
@pytest.mark.feature("T10")
def test_merge_passes_gradients_on() -> None:
    """To parts that can use them; the lse of a kernel refuses its part."""
    q, k, v = tensors()

    def merged(impl: str, *inputs: Tensor) -> Results:
        q, k, v = inputs
        parts: list[Any] = []
        for keys in (slice(0, 2), slice(2, 6)):
            mask = MASK if keys.start else tilefold.full()
            given = q, k[:, :, keys], v[:, :, keys]
            parts += attention(*given, mask=mask, return_lse=True, impl=impl)
        return merge(*parts)

    assert torch.autograd.gradcheck(lambda *inputs: merged("composed", *inputs), (q, k, v))
    with pytest.raises(NotImplementedError, match=REFUSED):
        merged("kernel", q, k, v)[0].sum().backward()
    unseen = [attention(q, k, v, mask=~tilefold.full(), return_lse=True, impl="composed")] * 2
    o, lse = merge(*unseen[0], *unseen[1])
    (dq,) = torch.autograd.grad(o.sum() + seen(lse).sum(), q)
    assert (dq == 0).all()


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
