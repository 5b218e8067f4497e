"""Many at once: batched gradients, and `vmap` whose axis joins the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian, jacobian
from torch.utils._pytree import tree_leaves

import tilefold
from tilefold import attention, causal
from tilefold.frontends.torch import tensors

RANDOM = torch.Generator().manual_seed(0)


def randoms(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64, generator=RANDOM) for shape in shapes]


X, BIAS, SINKS = GIVEN = randoms((1, 2, 3, 2), (2, 3, 3), (2, 2))


def plain(x: Tensor, bias: Tensor, sinks: Tensor) -> Tensor:
    made: Tensor = attention(x, x[:, :1], x[:, 1:], mask=causal())
    return made


def everything(x: Tensor, bias: Tensor, sinks: Tensor) -> Tensor:
    score = [tilefold.bias(bias), tilefold.softcap(2.0)]
    options: dict[str, Any] = {"score": score, "sinks": sinks, "dropout": 0.3, "seed": 1}
    o, lse = attention(x, x, x, mask=causal(), return_lse=True, **options)
    made: Tensor = o * lse[..., None]
    return made


def squares(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *given: function(*given).square().sum()


WAYS: dict[str, Callable[..., Any]] = {
    "jacobian": lambda f, many: jacobian(f, tuple(GIVEN), vectorize=many),
    "jacobian forward": lambda f, many: jacobian(
        f,
        tuple(GIVEN),
        vectorize=many,
        strategy="forward-mode" if many else "reverse-mode",
    ),
    "hessian": lambda f, many: hessian(squares(f), tuple(GIVEN), vectorize=many),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*jit.script")  # torch's own, in its forward mode
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("function", [plain, everything])
def test_vectorised_derivatives_are_those_of_a_loop(
    function: Callable[..., Tensor], way: str
) -> None:
    found, want = (tree_leaves(WAYS[way](function, many)) for many in (True, False))
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.feature("T09")
@pytest.mark.slow
def test_gradients_of_many_losses_come_from_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    q = X.clone().requires_grad_()
    bias = BIAS.clone().requires_grad_()
    o = attention(q, q, q, score=tilefold.bias(bias))
    many = torch.stack([o.detach(), -o.detach(), 2 * o.detach()])
    passes = counted(monkeypatch)
    found = torch.autograd.grad([o], [q, bias], [many], is_grads_batched=True, retain_graph=True)
    assert passes == ["dq dk dv dinput0"]
    for number, gradient in enumerate(many):
        want = torch.autograd.grad([o], [q, bias], gradient, retain_graph=True)
        for one, other in zip(found, want, strict=True):
            torch.testing.assert_close(one[number], other, rtol=1e-12, atol=1e-13)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The results of the passes that run from now on, each as one text."""
    seen: list[str] = []
    real = tensors.run

    def run(wanted: Any, *rest: Any) -> Any:
        seen.append(" ".join(wanted.results))
        return real(wanted, *rest)

    monkeypatch.setattr(tensors, "run", run)
    return seen


@pytest.mark.parametrize("own", [True, False], ids=["arrays of each entry", "shared arrays"])
@pytest.mark.slow
def test_vmap_of_a_gradient_is_two_calls(monkeypatch: pytest.MonkeyPatch, own: bool) -> None:
    """Arrays and rules that ask for the batch are those of the entry."""
    q, bias = randoms((3, 2, 2, 4, 2), (3, 2, 1, 4, 4))
    if not own:
        bias = bias[0]
    sinks, mask = SINKS, tilefold.lengths([2, 4])

    def function(q: Tensor, bias: Tensor, sinks: Tensor) -> Tensor:
        score = [tilefold.bias(bias), tilefold.softcap(2.0)]
        made: Tensor = attention(q, q, q, mask=mask, score=score, sinks=sinks).square().sum()
        return made

    gradient = torch.func.grad(function, (0, 1, 2))
    want = [gradient(q[n], bias[n] if own else bias, sinks) for n in range(3)]
    passes = counted(monkeypatch)
    found = torch.func.vmap(gradient, in_dims=(0, 0 if own else None, None))(q, bias, sinks)
    assert len(passes) == 2
    for number in range(3):
        for one, other in zip(found, want[number], strict=True):
            torch.testing.assert_close(one[number], other, rtol=1e-12, atol=1e-13)


def test_the_old_vmap_of_a_forward_pass_is_refused() -> None:
    from torch._vmap_internals import _vmap

    with pytest.raises(NotImplementedError, match=r"no memory.* use torch\.func\.vmap"):
        _vmap(lambda q: attention(q, q, q))(X[None])
