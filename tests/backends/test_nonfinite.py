"""NaN, infinities and the ends of the number range: they go where IEEE arithmetic sends them.

A pair that the rule forbids passes nothing on, whatever it holds; a visible pair follows the dense
definition. "Unchanged" means bit for bit where a setting is exact, else near: see `Setting.exact`.
On Apple GPUs this holds where kernels are compiled without fast mathematics, as
`torch.mps.compile_shader` does; what must hold with them is written by bits. In Triton's
interpreter `careful` is what runs on a GPU too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from backends import Setting, on_cpu, quantity
from compare import assert_near, assert_same, dense
from operands import Array, inputs

import tilefold
from tilefold import Rule, causal, documents, full, lengths, local
from tilefold.backends.triton.spec import Blocks
from tilefold.problems.attention import ITEM_BYTES, STATISTICS, Problem

# Tracing Python's operations doubles the time of these tests.
pytestmark = pytest.mark.no_cover

CPU = [on_cpu(dtype) for dtype in ITEM_BYTES]
METAL = [Setting("metal", "float32", "apple7"), Setting("metal", "float16", "apple9")]
STREAMED = Blocks(32, 16, 2, 1, streamed=True)
TRITON = [
    Setting("triton", "float32", "sm_90", ("split",)),
    Setting("triton", "float32", "sm_80", ("fused",)),
    Setting("triton", "bfloat16", "sm_80", ("split",)),
    Setting("triton", "float32", "sm_80", ("split",), STREAMED),
    Setting("triton", "bfloat16", "sm_80", ("fused",), STREAMED),
]
BOTH_FORMS = Setting("triton", "float32", "sm_90", ("split", "fused"))

BAD = (math.nan, math.inf, -math.inf)
LEN_Q, LEN_K = 45, 150
"""Several tiles of 32 keys and, in the lanes, whole vectors and a rest."""

on_every_cpu_type = pytest.mark.parametrize("setting", CPU, ids=str)


def pairs_on_cpu(values: Sequence[Any]) -> list[Any]:
    """A setting and a value: each value in two types, a wide and a half one, which take turns.

    Kernels of float64 differ from those of float32 by their lanes and their exponential, and the
    half types by how numbers are read and written, whatever the rule.
    """
    wide, half = CPU[:2], CPU[2:]
    return [
        (of_type[number % 2], value)
        for number, value in enumerate(values)
        for of_type in (wide, half)
    ]


def problem(
    mask: Rule, setting: Setting, scale: float = 0.5, lens: tuple[int, int] | None = None
) -> Problem:
    """Two sequences, grouped queries, and a dim that leaves a rest in every vector.

    One sequence of fewer keys and heads in Triton's interpreter, which takes its time.
    """
    batch, heads_kv, len_k = (1, 1, 60) if setting.backend == "triton" else (2, 2, LEN_K)
    len_q, len_k = lens or (LEN_Q, len_k)
    return Problem(
        batch=batch, heads_q=2 * heads_kv, heads_kv=heads_kv, len_q=len_q, len_k=len_k, dim=5,
        dim_v=7, dtype=setting.dtype, scale=scale, mask=mask,
    )  # fmt: skip


def assert_as_defined(setting: Setting, sizes: Problem, operands: dict[str, Array]) -> None:
    """All results are NaN and infinite where the dense definition is, and near it elsewhere."""
    with np.errstate(all="ignore"):
        want = dense(operands, sizes.mask, sizes.scale)
    for name, got in setting.results(sizes, operands).items():
        expected = want[quantity(name)]
        largest = abs(expected[np.isfinite(expected)]).max(initial=1)
        assert_near(name, got, expected, setting.tolerance * largest)


def assert_unchanged(setting: Setting, name: str, got: Array, clean: Array) -> None:
    """The same bits, or near them where the setting is not exact."""
    if setting.exact:
        assert_same(name, got, clean)
    else:
        largest = abs(clean[np.isfinite(clean)]).max(initial=1)
        assert_near(name, got, clean, setting.tolerance * largest)


def of(results: dict[str, Array], *names: str) -> dict[str, Array]:
    """The results that are one of these quantities, in every form."""
    return {name: array for name, array in results.items() if quantity(name) in names}


DEFINED = {
    "causal": lambda len_k: causal(),
    "documents": lambda len_k: documents(
        np.repeat([0, 1, 2], 15), np.repeat([0, 1, 4], len_k // 3)
    ),
}
"""The first leaves padding at the end of tiles, the second also rows that see no key."""


def trials() -> list[Any]:
    """Setting, rule and value: all on the CPU, fewer on GPUs, where infinities take turns."""
    every = [(rule, bad) for rule in DEFINED for bad in BAD]
    infinite = itertools.cycle([("causal", -math.inf), ("documents", math.inf)])
    settings = [(CPU[0], every)]
    for one, last in zip([*METAL, *TRITON], infinite):  # noqa: B905  # the second has no end
        settings.append((one, [*((rule, math.nan) for rule in DEFINED), last]))
    return [
        pytest.param(setting, *pair, id=f"{setting}-{pair[0]}-{pair[1]}")
        for setting, pairs in settings
        for pair in pairs
    ]


@pytest.mark.slow
@pytest.mark.feature("M01", "T09")
@pytest.mark.parametrize(("setting", "rule", "bad"), trials())
def test_results_are_as_defined(setting: Setting, rule: str, bad: float) -> None:
    len_k = problem(full(), setting).len_k
    sizes = problem(DEFINED[rule](len_k), setting)
    last, some = slice(len_k - len_k // 5, len_k), slice(20, 25)
    for places in ({"k": last, "v": last}, {"q": some}, {"do": some}):
        operands = {name: array.copy() for name, array in inputs(sizes, "bhnd", "packed").items()}
        for name, place in places.items():
            operands[name][:, :, place] = bad
        assert_as_defined(setting, sizes, operands)


@pytest.mark.slow
@pytest.mark.feature("M01", "T09")
@pytest.mark.parametrize(("setting", "mask"), pairs_on_cpu([full(), causal(), local(20)]), ids=str)
def test_a_bad_query_reaches_no_other(mask: Rule, setting: Setting) -> None:
    sizes = problem(mask, setting)
    operands = inputs(sizes, "bhnd", "packed")
    clean = setting.results(sizes, operands)
    row = 17
    operands["q"][1, 2, row, 3] = math.nan
    got = setting.results(sizes, operands)
    others = np.ones((2, 4, LEN_Q), bool)
    others[1, 2, row] = False
    for name, array in of(got, "o", "lse", "dq").items():
        assert_unchanged(setting, name, array[others], clean[name][others])
        assert np.isnan(array[1, 2, row]).all(), name
    apart = np.ones((2, 2, LEN_K), bool)
    apart[1, 1] = ~mask.to_dense(LEN_Q, LEN_K)[row]
    for name, array in of(got, "dk", "dv").items():
        assert_unchanged(setting, name, array[apart], clean[name][apart])
        assert np.isnan(array[~apart]).all(), name
    assert_as_defined(setting, sizes, operands)


UNSEEN: dict[str, tuple[Rule, Array]] = {
    "padding": (lengths([100, 33]), np.arange(LEN_K) >= np.array([[100], [33]])),
    "orphan documents": (
        documents(np.arange(LEN_Q) // 20, np.arange(LEN_K) // 20),
        np.tile(np.arange(LEN_K) >= 60, (2, 1)),
    ),
    "the future": (causal("start"), np.tile(np.arange(LEN_K) >= LEN_Q, (2, 1))),
    "outside of all windows": (
        local(9, align="start") & lengths([LEN_K, 21]),
        np.arange(LEN_K) >= np.array([[LEN_Q + 8], [21]]),
    ),
    "everything": (~full(), np.ones((2, LEN_K), bool)),
}
"""Rules, and which keys of which batch entry no query sees."""

UNSEEN_TRIALS = [
    *pairs_on_cpu([*UNSEEN]),
    *((setting, "the future") for setting in METAL),
    *((replace(BOTH_FORMS, forms=(form,)), "the future") for form in BOTH_FORMS.forms),
]


@pytest.mark.slow
@pytest.mark.feature("M01", "M15", "T07", "T09")
@pytest.mark.parametrize(("setting", "name"), UNSEEN_TRIALS, ids=str)
def test_keys_that_no_query_sees_change_nothing(setting: Setting, name: str) -> None:
    """Tiles at an edge hold them beside keys that are seen."""
    mask, unseen = UNSEEN[name]
    sizes = problem(mask, setting)
    unseen = unseen[: sizes.batch, : sizes.len_k]
    visible = mask.to_dense(LEN_Q, sizes.len_k, sizes.batch, sizes.heads_q)
    visible = np.broadcast_to(visible, (sizes.batch, sizes.heads_q, LEN_Q, sizes.len_k))
    np.testing.assert_array_equal(unseen, ~visible.any(axis=(1, 2)))
    operands = inputs(sizes, "bhnd", "packed")
    clean = setting.results(sizes, operands)
    for value in BAD if setting.backend == "cpu" else BAD[:1]:
        for held in ("k", "v"):
            operands[held].transpose(0, 2, 1, 3)[unseen] = value
        got = setting.results(sizes, operands)
        for result, array in got.items():
            assert_unchanged(setting, f"{result} with {value}", array, clean[result])
    for result, array in of(got, "dk", "dv").items():
        assert not array.transpose(0, 2, 1, 3)[unseen].any(), result


@pytest.mark.slow
@pytest.mark.feature("M01", "T09")
@on_every_cpu_type
@pytest.mark.parametrize("held", ["k", "v"])
@pytest.mark.parametrize("value", BAD)
def test_a_bad_key_reaches_exactly_those_who_see_it(
    value: float, held: str, setting: Setting
) -> None:
    mask = tilefold.dense(np.random.default_rng(3).random((LEN_Q, LEN_K)) < 0.4)
    sizes = problem(mask, setting)
    operands = inputs(sizes, "bhnd", "packed")
    clean = setting.results(sizes, operands)
    operands[held][1, 0, 70, 2] = value
    got = setting.results(sizes, operands)
    apart = np.ones((2, 4, LEN_Q), bool)
    apart[1, :2, mask.to_dense(LEN_Q, LEN_K)[:, 70]] = False
    for name, array in of(got, "o", "lse", "dq").items():
        assert_unchanged(setting, name, array[apart], clean[name][apart])
    if held == "v" or math.isnan(value):
        assert not np.isfinite(got["o"][~apart]).all(axis=1).any()
    assert_as_defined(setting, sizes, operands)


@pytest.mark.slow
@pytest.mark.feature("M01", "T09")
@on_every_cpu_type
def test_rows_that_see_nothing_are_zero_whatever_they_hold(setting: Setting) -> None:
    lens = (LEN_K, 40)
    sizes = problem(causal(), setting, lens=lens)
    operands = inputs(sizes, "bhnd", "packed")
    clean = setting.results(sizes, operands)
    empty = LEN_K - 40
    for value in BAD:
        operands["q"][:, :, :empty] = operands["do"][:, :, :empty] = value
        got = setting.results(sizes, operands)
        for name, array in got.items():
            assert_unchanged(setting, f"{name} with {value}", array, clean[name])
    assert not got["o"][:, :, :empty].any() and (got["lse"][:, :, :empty] == -math.inf).all()
    for name, array in of(got, "dq").items():
        assert not array[:, :, :empty].any(), name


@pytest.mark.slow
@pytest.mark.feature("M01", "T09")
@pytest.mark.parametrize(
    "setting",
    [
        CPU[0],
        METAL[0],
        *(replace(BOTH_FORMS, forms=(form,)) for form in BOTH_FORMS.forms),
    ],
    ids=str,
)
def test_queries_that_see_nothing_give_zero(setting: Setting) -> None:
    sizes = problem(~full(), setting)
    got = setting.results(sizes, inputs(sizes, "bhnd", "packed"))
    assert (got["o"] == 0).all() and np.isneginf(got["lse"]).all()
    for name, array in of(got, "dq", "dk", "dv").items():
        assert_same(name, array, np.zeros_like(array))


@pytest.mark.slow
@pytest.mark.feature("T09", "T10")
@pytest.mark.parametrize(
    ("setting", "mask"), pairs_on_cpu([full(), causal(), lengths([20, 70])]), ids=str
)
def test_scores_of_minus_infinity_alone_have_no_mean(mask: Rule, setting: Setting) -> None:
    """A visible score of -inf is not a forbidden one: 0 / 0 is NaN, so lse = -inf says: empty."""
    sizes = problem(mask, setting, scale=1.0)
    operands = inputs(sizes, "bhnd", "packed")
    operands["q"][...] = abs(operands["q"])
    operands["k"][0] = -math.inf
    operands["k"][1, :, :30] = -math.inf
    results = setting.forward(sizes, operands)
    assert np.isnan(results["o"][0]).all() and np.isnan(results["lse"][0]).all()
    assert np.isfinite(results["o"][1, :, LEN_Q - 1]).all()
    assert_as_defined(setting, sizes, operands)


@pytest.mark.slow
@pytest.mark.feature("T10")
@on_every_cpu_type
def test_scores_past_the_largest_number_are_infinite(setting: Setting) -> None:
    sizes = problem(causal(), setting, scale=1.0)
    operands = inputs(sizes, "bhnd", "packed")
    big = math.sqrt(float(ml_dtypes.finfo(setting.dtype).max)) * 2
    operands["q"][0, 1, 7] = operands["k"][0, 0, 90] = big
    operands["q"][1, 3, 9] = -big
    operands["k"][1, 1, 5] = big
    want = dense(operands, sizes.mask, 1.0, STATISTICS[setting.dtype])
    assert (
        np.isnan(want["o"][0, 1, 7]).all() == (setting.dtype != "float16")
        and np.isfinite(want["o"][1, 3, 9]).all()
    )
    got = setting.results(sizes, operands)
    for name in ("o", "lse"):
        assert_near(name, got[name], want[name], setting.tolerance * big)
    for name, array in of(got, "dq", "dk", "dv").items():
        np.testing.assert_array_equal(np.isnan(array), np.isnan(want[quantity(name)]))


@pytest.mark.slow
@pytest.mark.feature("T09", "T10")
@on_every_cpu_type
@pytest.mark.parametrize("size", [1e2, 1e4, 1e8, 1e30])
def test_huge_scores_choose_one_key(size: float, setting: Setting) -> None:
    """Far apart, the largest score takes all: o is its v, whatever the size; nothing overflows."""
    size = min(size, float(ml_dtypes.finfo(setting.dtype).max))
    sizes = problem(causal("start"), setting, scale=1.0, lens=(40, 40))
    operands = inputs(sizes, "bhnd", "packed")
    operands["q"][...] = 0
    operands["k"][...] = 0
    operands["q"][..., 0] = size
    operands["k"][..., 0] = np.arange(1, 41)
    results = setting.forward(sizes, operands)
    values = np.repeat(operands["v"], 2, axis=1)
    assert_near("o", results["o"], values, setting.tolerance)
    want = np.broadcast_to(size * np.arange(1, 41), (2, 4, 40))
    assert_near("lse", results["lse"], want, setting.tolerance * want)
    bound = abs(operands["do"]).sum(axis=2).max()
    for name, dv in of(setting.gradients(sizes, {**operands, **results}), "dv").items():
        assert (abs(dv) <= 2 * bound).all(), f"{name}: no weight is above 1"


@pytest.mark.slow
@pytest.mark.feature("T01")
@on_every_cpu_type
def test_numbers_too_small_to_be_normal(setting: Setting) -> None:
    sizes = problem(causal(), setting)
    operands = inputs(sizes, "bhnd", "packed")
    limits = ml_dtypes.finfo(setting.dtype)
    tiny, least = limits.tiny, limits.smallest_subnormal
    operands["v"] *= 8 * tiny
    operands["do"][...] = 0
    operands["k"][:, :, ::3] *= tiny
    operands["q"][:, :, ::4] = -0.0
    want = dense(operands, sizes.mask, sizes.scale)
    got = setting.results(sizes, operands)
    # Sums of bfloat16 products are 0 below the smallest normal number, on AMX each partial one.
    tolerance = setting.tolerance * tiny + LEN_K * least
    tolerance += 4 * tiny if setting.dtype == "bfloat16" else 0
    assert_near("o", got["o"], want["o"], tolerance)
    assert_near("lse", got["lse"], want["lse"], 10 * setting.tolerance)
    for name, array in of(got, "dq", "dk", "dv").items():
        assert not array.any(), name


@pytest.mark.slow
@pytest.mark.feature("T10")
@on_every_cpu_type
def test_weights_far_below_the_largest_vanish(setting: Setting) -> None:
    """Gaps between scores from 0 to past the smallest exponent, the largest first or last."""
    sizes = problem(full(), setting, scale=1.0)
    operands = inputs(sizes, "bhnd", "packed")
    operands["q"][...] = 0
    operands["q"][..., 0] = np.linspace(-12, 12, LEN_Q)
    operands["k"][..., 0] = np.linspace(-70, 70, LEN_K)
    want = dense(operands, sizes.mask, 1.0)
    results = setting.forward(sizes, operands)
    assert np.isfinite(results["o"]).all()
    assert_near("o", results["o"], want["o"], 300 * setting.tolerance)
    assert_near("lse", results["lse"], want["lse"], setting.tolerance * 900)
    assert_as_defined(setting, sizes, {**operands, "do": np.zeros_like(operands["do"])})


@pytest.mark.slow
@pytest.mark.feature("T09")
@on_every_cpu_type
@pytest.mark.parametrize("value", BAD)
def test_a_bad_gradient_reaches_its_query_and_its_keys(value: float, setting: Setting) -> None:
    sizes = problem(causal(), setting)
    operands = inputs(sizes, "bhnd", "packed")
    operands["do"][1, 0, 21, 4] = value
    assert_as_defined(setting, sizes, operands)
