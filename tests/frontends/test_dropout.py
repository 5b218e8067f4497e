"""Dropout in calls: seeds of NumPy and of torch, derivatives, compiled functions, bad input."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from operands import Array

from tilefold import attention, attention_backward, causal, compile_async, dropout_mask
from tilefold.problems import dropout, reference
from tilefold.problems.attention import Problem

pytestmark = pytest.mark.slow  # kernels are compiled

P = 0.25
GIVEN = np.random.default_rng(0).normal(size=(4, 2, 2, 21, 8))
OPTIONS: dict[str, Any] = {"mask": causal(), "dropout": P}


def tensors(gradient: bool = True) -> list[torch.Tensor]:
    """q, k and v."""
    return [torch.tensor(array, requires_grad=gradient) for array in GIVEN[:3]]


def expected(seed: int) -> tuple[Array, ...]:
    """o, lse, dq, dk and dv by the definition."""
    *qkv, do = GIVEN
    options = {"mask": causal(), "keep": dropout.factors(seed, P, 2, 2, 21, 21)}
    o, lse = reference.attention(*qkv, **options)
    return o, lse, *reference.attention_backward(do, *qkv, o, lse, **options)


def test_arrays_and_tensors_drop_the_pairs_of_the_definition() -> None:
    *qkv, do = GIVEN
    o, lse = attention(*qkv, **OPTIONS, seed=-3, return_lse=True)
    gradients = attention_backward(do, *qkv, o, lse, **OPTIONS, seed=-3)
    given = tensors()
    of_torch = attention(*given, **OPTIONS, seed=2**64 - 3)
    of_torch.backward(torch.tensor(do))
    for found, want in zip((o, lse, *gradients), expected(-3), strict=True):
        assert np.allclose(found, want, rtol=0, atol=1e-12)
    assert (of_torch.detach().numpy() == o).all()
    for tensor, gradient in zip(given, gradients, strict=True):
        assert np.allclose(tensor.grad, gradient, rtol=0, atol=1e-12)
    with torch.no_grad():
        again = attention_backward(
            *(torch.tensor(array) for array in (do, *qkv, o, lse)), **OPTIONS, seed=-3
        )
    assert all((a.numpy() == b).all() for a, b in zip(again, gradients, strict=True))


def test_without_a_chance_it_is_the_call_without() -> None:
    plain = attention(*GIVEN[:3])
    assert (attention(*GIVEN[:3], dropout=0) == plain).all()
    assert (attention(*GIVEN[:3], dropout=0.0, seed=7) == plain).all()
    assert (attention(*tensors(), dropout=0 * P).detach().numpy() == plain).all()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_torch_draws_a_seed_that_manual_seed_repeats(compiled: bool) -> None:
    call: Any = functools.partial(attention, **OPTIONS)
    if compiled:
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for start in (1, 1, 2):
        torch.manual_seed(start)
        given = tensors()
        several = [call(*given) for _ in range(2)]
        several[1].backward(torch.tensor(GIVEN[3]))
        results.append([each.detach() for each in several] + [tensor.grad for tensor in given])
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert not torch.equal(results[0][0], results[0][1])
    assert not torch.equal(results[0][0], results[2][0])


@pytest.mark.slow
def test_a_compiled_function_takes_a_seed_that_changes() -> None:
    def plain(q: Any, k: Any, v: Any, seed: int) -> Any:
        return attention(q, k, v, **OPTIONS, seed=seed)

    call = torch.compile(plain, fullgraph=True, backend="aot_eager")
    for seed in (5, 6, 2**40):
        found = call(*tensors(False), seed).numpy()
        assert np.allclose(found, expected(seed)[0], rtol=0, atol=1e-12)


@pytest.mark.slow
def test_gradients_are_those_of_finite_differences() -> None:
    short = [tensor.detach()[:, :, :7].requires_grad_() for tensor in tensors()]
    call = functools.partial(attention, **OPTIONS, seed=11)
    assert torch.autograd.gradcheck(call, short)


def test_one_plan_serves_every_seed() -> None:
    from tilefold.backends import calls

    attention(*GIVEN[:3], **OPTIONS, seed=0)
    before = len(calls.calls)
    found = [attention(*GIVEN[:3], **OPTIONS, seed=seed) for seed in (1, 2)]
    assert len(calls.calls) == before
    assert not (found[0] == found[1]).all()


def test_kernels_of_a_problem_with_dropout_compile_ahead() -> None:
    shape = GIVEN[0].shape
    (made,) = compile_async([Problem.of(shape, dtype="float64", mask=causal(), dropout=P)])
    made.result()


def test_the_mask_of_a_region_repeats_a_result() -> None:
    q, k, v = GIVEN[:3]
    kept = dropout_mask(9, P, batch=2, heads=2, rows=21, columns=21)
    scores = q @ k.swapaxes(2, 3) / np.sqrt(8)
    weights = np.exp(scores) / np.exp(scores).sum(axis=3, keepdims=True)
    o = (kept / (1 - P) * weights) @ v
    assert np.allclose(attention(q, k, v, dropout=P, seed=9), o, rtol=0, atol=1e-12)


CHANCE = r"^dropout must be a number in \[0, 1\), got "
SEED = r"^seed must be an integer "


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"dropout": 1}, ValueError, CHANCE + "1.0$"),
        ({"dropout": -0.5}, ValueError, CHANCE + "-0.5$"),
        ({"dropout": float("nan")}, ValueError, CHANCE + "nan$"),
        ({"dropout": None}, TypeError, CHANCE + "None$"),
        ({"dropout": "0.1"}, TypeError, CHANCE + "'0.1'$"),
        ({"dropout": True}, TypeError, CHANCE + "True$"),
        ({"dropout": torch.tensor(0.5)}, TypeError, CHANCE + r"tensor\(0.5000\)$"),
        ({"dropout": 0.1, "seed": 0.5}, TypeError, SEED + "from .*, got 0.5$"),
        ({"dropout": 0.1, "seed": 2**64}, ValueError, SEED + "from .*, got 18446744073709551616$"),
        ({"dropout": 0.1}, ValueError, SEED + "where dropout is above 0, got None: "),
    ],
    ids=str,
)
def test_bad_input_is_named(wrong: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        attention(*GIVEN[:3], **wrong)
    if "seed" in wrong or wrong["dropout"] != 0.1:  # torch draws a seed
        with pytest.raises(kind, match=message):
            attention(*tensors(), **wrong)


def test_the_backward_pass_needs_the_seed() -> None:
    *qkv, do = GIVEN
    for make in (np.asarray, torch.tensor):
        given = [make(array) for array in (do, *qkv, do, do[..., 0])]
        with pytest.raises(ValueError, match=r"^seed must be the one that was given to attention"):
            attention_backward(*given, dropout=0.1)
