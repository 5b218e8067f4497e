"""Second derivatives and forward mode of torch tensors, checked by differences and by torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_leaves

import tilefold
from tilefold import alibi, attention, causal, lengths, local, prefix, rule, softcap
from tilefold.frontends.torch.derivatives.passes import Gradients, Second, Softmax
from tilefold.frontends.torch.derivatives.tiles import Pulled
from tilefold.frontends.torch.derivatives.walk import Pairs
from tilefold.problems.request import LAYOUTS

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def leaves(layout: str = "bhnd", batch: int = 1) -> list[Tensor]:
    """q with two heads for each of k and v, whose head is narrower."""
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, 4, 5, 3), (batch, 2, 6, 3), (batch, 2, 6, 2)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        .permute(LAYOUTS[layout])
        .requires_grad_()
        for shape in shapes
    ]


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": causal(), "layout": "bnhd"},
    "window": {"mask": causal() & local(2), "layout": "bhdn", "scale": -0.7},
    "heads": {"mask": rule(lambda h, q, k: (q + k) % 3 == h % 3)},
    "softcap": {"score": softcap(2.0)},
    "scores": {"score": [softcap(3.0), alibi()], "mask": causal()},
}


@pytest.mark.slow
@pytest.mark.feature("T05")
@pytest.mark.parametrize("name", CALLS)
def test_first_and_second_derivatives_in_every_mode_are_those_of_differences(name: str) -> None:
    options = CALLS[name]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attention(q, k, v, return_lse=True, **options)

    given = leaves(options.get("layout", "bhnd"))
    fast = {"fast_mode": True}
    assert torch.autograd.gradcheck(function, given, check_forward_ad=True, **fast)
    assert torch.autograd.gradgradcheck(function, given, check_fwd_over_rev=True, **fast)


@pytest.mark.slow
def test_rows_that_see_no_key_have_second_derivatives_of_0() -> None:
    q, k, v = leaves()

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made: Tensor = attention(q, k, v, mask=prefix(3) & rule(lambda q: q > 1))
        return made

    assert torch.autograd.gradgradcheck(function, (q, k, v), fast_mode=True)
    (dq,) = torch.autograd.grad(function(q, k, v).sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(dq.square().sum(), q)
    assert second[:, :, 2:].any() and not second[:, :, :2].any()


def _squares(function: Any) -> Any:
    """The sum of the squares of the gradients of a sum of squares."""

    def total(*given: Tensor) -> Tensor:
        found = grad(lambda *inner: function(*inner).square().sum(), (0, 1, 2))(*given)
        return torch.stack([x.square().sum() for x in found]).sum()

    return total


WAYS: dict[str, Callable[[Any], Any]] = {
    "jacfwd": jacfwd,
    "jacrev": jacrev,
    "hessian": hessian,
    "forward twice": lambda f: jacfwd(jacfwd(f)),
    "backward twice": lambda f: jacrev(jacrev(lambda *given: f(*given)[:, :1, :2, 0])),
    "vmap": lambda f: vmap(f, in_dims=(0, None, 2)),
    "vmap of grad": lambda f: vmap(grad(lambda *given: f(*given).square().sum(), (0, 1, 2))),
    "backward three times": lambda f: grad(_squares(_squares(f)), (0, 1, 2)),
    "jvp in vmap": lambda f: vmap(lambda *given: jvp(f, given, given)),
}


@pytest.mark.slow
@pytest.mark.feature("T05")
@pytest.mark.parametrize("way", WAYS)
def test_transforms_give_what_they_give_of_torchs_own_attention(way: str) -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))

    given = [x.detach() for x in leaves()]
    if way.startswith("vmap of") or way.endswith("vmap"):
        given = [torch.stack([x, -x, 2 * x]) for x in given]
    if way == "vmap":
        given[1], given[2] = given[1][0], given[2].movedim(0, 2)
    found, expected = (tree_leaves(WAYS[way](f)(*given)) for f in (attention, plain))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_a_rule_that_asks_for_the_batch_counts_within_one_in_vmap() -> None:
    q, k, v = (torch.stack([x, -x, 2 * x]).detach() for x in leaves(batch=2))
    mask = lengths([2, 5])
    found = vmap(lambda *given: attention(*given, mask=mask))(q, k, v)
    for entry, *given in zip(found, q, k, v, strict=True):
        assert torch.equal(entry, attention(*given, mask=mask))


@pytest.mark.slow
def test_second_derivatives_over_several_tiles_are_those_of_torch() -> None:
    shape = (1, 2, 600, 16)
    q, k, v, do = (torch.randn(shape, dtype=torch.float64) for _ in range(4))
    hidden = torch.from_numpy(~(causal() & local(300)).to_dense(600, 600))

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made: Tensor = attention(q, k, v, mask=causal() & local(300))
        return made

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / 4).masked_fill(hidden, -torch.inf).softmax(-1) @ v

    found, expected = (_second(f, (q, k, v), do) for f in (ours, dense))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-11, atol=1e-12)
    assert all(map(torch.equal, found, _second(ours, (q, k, v), do)))


def test_the_second_derivative_by_hand_is_what_autograd_makes_of_a_tile() -> None:
    kinds = ["q", "q", "k", "k", "q", "q", "q", "k", "k"]
    widths = 3, 1, 3, 2, 2, 1, 3, 3, 2
    given = [
        torch.randn(2, 4 if kind == "q" else 5, width, dtype=torch.float64)
        for kind, width in zip(kinds, widths, strict=True)
    ]
    tile = Gradients(Softmax(0.7)).pulled((True,) * 3, (True,) * 6)
    assert type(tile) is Second
    hidden = torch.ones(1, 4, 5).triu(2).bool()
    pairs = Pairs(hidden, {})
    with torch.no_grad():
        found = tile.run(given, pairs)
        expected = Pulled(tile.inner, tile.slopes, tile.wanted).run(given, pairs)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def _second(function: Any, given: tuple[Tensor, ...], do: Tensor) -> tuple[Tensor, ...]:
    given = tuple([x.clone().requires_grad_() for x in given])
    first = torch.autograd.grad(function(*given), given, do, create_graph=True)
    second: tuple[Tensor, ...] = torch.autograd.grad(first, given, [x.detach() for x in first])
    return second


@pytest.mark.slow
def test_merged_parts_have_second_derivatives() -> None:
    q, k, v = leaves()

    def parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = attention(q, k[:, :, :2], v[:, :, :2], return_lse=True)
        second = attention(q, k[:, :, 2:], v[:, :, 2:], return_lse=True)
        merged: Tensor = tilefold.merge(*first, *second)[0]
        return merged

    assert torch.autograd.gradgradcheck(parts, (q, k, v), fast_mode=True)
