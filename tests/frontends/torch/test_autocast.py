"""Autocast gives the types that torch's own attention gives."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import tilefold
from tilefold import attention, attention_backward

KINDS = torch.float32, torch.bfloat16, torch.float16, torch.float64
X = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(0))


def outcome(function: Any, given: list[Tensor]) -> Any:
    """The type of a result, or the class of the error."""
    try:
        return function(*given).dtype
    except (RuntimeError, TypeError):
        return "refused"


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_types_are_those_of_sdpa(lower: torch.dtype) -> None:
    for kinds in itertools.product(KINDS, repeat=3):
        given = [X.to(kind) for kind in kinds]
        with torch.autocast("cpu", dtype=lower):
            assert outcome(attention, given) == outcome(sdpa, given), kinds
            with torch.autocast("cpu", enabled=False):
                assert outcome(attention, given) == outcome(sdpa, given), kinds
        assert outcome(attention, given) == outcome(sdpa, given), kinds


@pytest.mark.slow
def test_values_and_gradients_are_those_of_sdpa() -> None:
    """Gradients have the types of the inputs, whether the backward pass is inside or not."""
    found = []
    for function in (attention, sdpa):
        for inside in (True, False):
            q, k, v = [(X * n).to(kind).requires_grad_() for n, kind in enumerate(KINDS[:3], 1)]
            with torch.autocast("cpu"):
                o = function(q, k, v).square().sum()
                if inside:
                    o.backward()
            if not inside:
                o.backward()
            assert [x.grad.dtype for x in (q, k, v)] == [*KINDS[:3]]
            found.append([o, q.grad, k.grad, v.grad])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=3e-2, atol=3e-2)


@pytest.mark.slow
def test_arrays_keep_their_type_and_lse_stays_exact() -> None:
    bias, sinks = torch.randn(2, 4, 4, requires_grad=True), torch.randn(2, dtype=torch.float64)
    with torch.autocast("cpu"):
        o, lse = attention(X, X, X, score=tilefold.bias(bias), sinks=sinks, return_lse=True)
        o.float().sum().backward()
    assert (o.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    x = X.bfloat16()
    want = attention(x, x, x, score=tilefold.bias(bias), sinks=sinks)
    assert torch.equal(o, want)


@pytest.mark.parametrize("impl", ["kernel", "composed", "native"])
def test_all_implementations_see_what_autocast_casts(impl: str) -> None:
    with torch.autocast("cpu"):
        o, lse = attention(X, X.bfloat16(), X, impl=impl, return_lse=True)
    x = X.bfloat16()
    want, sums = attention(x, x, x, impl=impl, return_lse=True)
    torch.testing.assert_close(o, want, rtol=0, atol=0)
    torch.testing.assert_close(lse, sums, rtol=0, atol=0)


@pytest.mark.slow
def test_the_backward_pass_alone() -> None:
    given = X, 2 * X, X, X
    with torch.autocast("cpu"):
        o, lse = attention(*given[1:], return_lse=True)
        found = attention_backward(*given, o, lse)
    assert [x.dtype for x in found] == [torch.float32] * 3
    want = attention_backward(*[x.bfloat16() for x in (*given, o)], lse)
    for one, other in zip(found, want, strict=True):
        assert torch.equal(one, other.float())


def test_merged_parts_keep_their_types() -> None:
    with torch.autocast("cpu"):
        parts = [attention(X, x, x, return_lse=True) for x in (X[:, :, :2], X[:, :, 2:])]
        o, lse = tilefold.merge(*parts[0], *parts[1])
    assert (o.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.slow
def test_second_derivatives_do_not_lose_digits() -> None:
    """Their products are torch's own, which autocast would round."""
    q = X.clone().requires_grad_()

    def second(o: Tensor) -> Tensor:
        (dq,) = torch.autograd.grad(o, q, X, create_graph=True)
        found: Tensor = torch.autograd.grad(dq, q, X)[0]
        return found

    one, other = attention(q, q, q), attention(q, q, q)
    want = second(one)
    with torch.autocast("cpu"):
        found = second(other)
    assert torch.equal(found, want)


@pytest.mark.slow
def test_compiled_functions_follow_the_region_that_they_run_in() -> None:
    compiled = torch.compile(lambda q, v: attention(q, q, v), backend="eager", fullgraph=True)
    assert compiled(X, X).dtype == torch.float32
    with torch.autocast("cpu"):
        assert compiled(X, X.bfloat16()).dtype == torch.bfloat16
    assert compiled(X, X).dtype == torch.float32
