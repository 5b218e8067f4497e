"""Dropout: every backend drops the pairs of the definition, forward and backward, in every form.

Values and gradients that are one-hot show weights themselves: so pairs are compared bit by bit.
"""

from __future__ import annotations

import numpy as np
import pytest
from backends import Setting, on_cpu, quantity
from compare import assert_near, dense
from operands import Array, inputs

from tilefold import causal, dropout_mask
from tilefold.problems import dropout
from tilefold.problems.attention import Problem, default_scale

P = 0.3
SEED = -0x5EED_0123_4567_89AB

SETTINGS = [
    *map(on_cpu, ("float32", "float64", "float16", "bfloat16")),
    Setting("metal", "float32", "apple9"),
    Setting("metal", "float16", "apple7"),
    Setting("triton", "float32", "sm_80", ("split", "fused")),
    Setting("triton", "bfloat16", "sm_90", ("fused",)),
]


def problem(setting: Setting, len_q: int = 35, heads_kv: int = 4) -> Problem:
    """A causal problem with dropout whose values have an element for each query and each key."""
    sizes = 2, 4, heads_kv, len_q, 61, 16, 61
    return Problem(*sizes, setting.dtype, default_scale(16), causal(), dropout=P)


def kept_of(p: Problem, seed: int = SEED) -> Array:
    """Which pairs have a weight: kept, and visible."""
    kept = dropout_mask(seed, P, batch=2, heads=4, rows=p.len_q, columns=p.len_k)
    return kept & p.mask.to_dense(p.len_q, p.len_k, 2, 4)


def one_hot(problem: Problem) -> dict[str, Array]:
    """Operands by which element d of O, and of dV, is the weight of key, and of query, d."""
    given = inputs(problem, "bhnd", "packed")
    for name in ("v", "do"):
        length, width = given[name].shape[2:]
        given[name][...] = np.eye(length, width)
    return {**given, "seed": np.array([SEED])}


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_pairs_of_the_definition_fall_out(setting: Setting) -> None:
    """By one seed and by another with the same plan: the seed is an operand."""
    p = problem(setting)
    given = one_hot(p)
    for seed in (SEED, 2**40):
        given["seed"] = np.array([seed])
        found = setting.forward(p, given)
        assert ((found["o"] > 0) == kept_of(p, seed)).all()
    for form in setting.forms:
        dv = setting.backward(p, {**given, **found}, form)["dv"]
        assert ((dv[..., : p.len_q] > 0) == kept_of(p, 2**40).swapaxes(2, 3)).all(), form


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_results_and_gradients_are_those_of_the_definition(setting: Setting) -> None:
    p = problem(setting, heads_kv=2)
    given = {**inputs(p, "bhnd", "packed"), "seed": np.array([SEED])}
    factors = dropout.factors(SEED, P, p.batch, p.heads_q, p.len_q, p.len_k)
    want = dense(given, p.mask, p.scale, keep=factors)
    assert (want["lse"] == dense(given, p.mask, p.scale)["lse"]).all()  # of all weights
    for name, array in setting.results(p, given).items():
        expected = want[quantity(name)]
        tolerance = setting.tolerance * max(1.0, abs(expected[np.isfinite(expected)]).max())
        assert_near(name, array, expected, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("setting", [on_cpu("float32"), *SETTINGS[4:]], ids=str)
def test_decoding_drops_the_same_pairs(setting: Setting) -> None:
    p = problem(setting, len_q=3, heads_kv=2)
    found = setting.forward(p, one_hot(p), form="decode")["o"]
    assert ((found > 0) == kept_of(p)).all()
