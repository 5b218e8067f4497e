"""The conformance table: every variant of attention on every backend, forward and backward.

Each cell runs the kernels of a variant, and compares all results and gradients with the reference
in float64, which folds the same tree. That the tree is the variant is shown once: against formulas
in plain NumPy and their finite differences. `support/variants.py` has the rows. Forms of kernels,
types, and levels of instructions below this processor's take turns from row to row.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from backends import TOLERANCES, Setting
from cases import Sizes
from compare import UNITS, assert_near
from operands import FORMS, Array
from paths import ROOT
from variants import VARIANTS, Variant, arrays_of, dense, lengths_of

from tilefold import attention
from tilefold.backends.arrays.torch import tensor_of
from tilefold.backends.cpu.tables import RegisterTile
from tilefold.backends.metal import spec as metal
from tilefold.backends.triton import spec as triton
from tilefold.implementations.torch import array_of
from tilefold.problems import dropout, reference
from tilefold.problems.attention import STATISTICS, Problem
from tilefold.scores.score import Score, as_score

# Tracing Python's operations doubles the time of these tests.
pytestmark = pytest.mark.no_cover

SEED, SCALE = -0x5EED_0123_4567_89AB, 0.3
SMALL, LARGE = Sizes(2, 2, 19, 21), Sizes(2, 4, 70, 150)
"""Sizes for GPUs, whose kernels are emulated with small blocks, and for processors."""


class Case(NamedTuple):
    """A variant with data in a type, and its results by the reference."""

    problem: Problem
    score: Score | None
    given: dict[str, Array]
    want: dict[str, Array]


def data(variant: Variant, sizes: Sizes, dtype: str) -> dict[str, Array]:
    """Random q, k, v, do and dlse, sinks and a seed where a variant has them."""
    random = np.random.default_rng(11)
    batch, heads, len_q, len_k = sizes.batch, sizes.heads, sizes.len_q, sizes.len_k
    shapes = {
        "q": (batch, heads, len_q, 8),
        "k": (batch, heads // 2, len_k, 8),
        "v": (batch, heads // 2, len_k, 12),
        "do": (batch, heads, len_q, 12),
    }
    found = {name: random.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    found["dlse"] = random.normal(size=(batch, heads, len_q)).astype(STATISTICS[dtype])
    if variant.sinks:
        found["sinks"] = random.normal(size=(heads, variant.sinks)).astype(STATISTICS[dtype])
        found["sinks"][1, 1:] = -np.inf
    if variant.dropout:
        found["seed"] = np.array([SEED])
    return found


def sizes_of(variant: Variant, others: Sizes) -> Sizes:
    """The sizes of a variant, where those of the others are these."""
    lengths = lengths_of(variant, others.len_q, others.len_k)
    return Sizes(others.batch, others.heads, *lengths)


def kept(variant: Variant, sizes: Sizes) -> Array | None:
    """The factors of dropout."""
    every = sizes.batch, sizes.heads, sizes.len_q, sizes.len_k
    return dropout.factors(SEED, variant.dropout, *every) if variant.dropout else None


@functools.cache
def case(name: str, others: Sizes, dtype: str) -> Case:
    """A variant in a type, with its results: o, lse, max, and a gradient for each array."""
    variant = VARIANTS[name]
    sizes = sizes_of(variant, others)
    given = data(variant, sizes, dtype)
    arrays = arrays_of(variant, sizes)
    score = as_score(variant.score and variant.score(*arrays))
    options = {"mask": variant.mask, "scale": SCALE, "score": score}
    shapes = [given[letter].shape for letter in "qkv"]
    limits = {"sinks": variant.sinks, "dropout": variant.dropout, "dtype": dtype}
    problem = Problem.of(*shapes, **options, **limits)
    sunk = {"sinks": given.get("sinks"), "keep": kept(variant, sizes)}
    o, lse = reference.attention(*(given[letter] for letter in "qkv"), **options, **sunk)
    gradients = reference.attention_backward(
        *(given[x] for x in ("do", "q", "k", "v")), o, lse, **options, **sunk, dlse=given["dlse"]
    )
    held = score.form.arrays if score else ()
    inputs = {f"input{number}": array for number, array in enumerate(held)}
    names = ["dq", "dk", "dv", *(f"d{x}" for x in inputs), *["dsinks"] * bool(variant.sinks)]
    want = dict(zip(("o", "lse", *names), (o, lse, *gradients), strict=True))
    want["max"] = reference.largest(given["q"], given["k"], variant.mask, SCALE, score)
    return Case(problem, score, {**given, **inputs}, want)


def compare(made: Case, got: Mapping[str, Array], tolerance: float) -> None:
    """Raises AssertionError unless all results are near those of the reference."""
    for name, array in got.items():
        want = made.want[name]
        allowed = tolerance + 2 * UNITS[array.dtype.name]
        largest = np.abs(want[np.isfinite(want)]).max(initial=1)
        assert_near(name, array, want, allowed * largest)


# The rows ---------------------------------------------------------------------------------------


@pytest.mark.feature("M15")
@pytest.mark.parametrize("name", VARIANTS)
def test_the_reference_is_the_formula_of_a_variant(name: str) -> None:
    """Results, and all gradients along a random direction, by central differences of a loss."""
    variant = VARIANTS[name]
    sizes = sizes_of(variant, Sizes(2, 4, 10, 17))
    keep, made = kept(variant, sizes), case(name, Sizes(2, 4, 10, 17), "float64")
    given = {name: array.astype(np.float64) for name, array in made.given.items()}
    seen = np.isfinite(made.want["lse"])

    def results(given: dict[str, Array]) -> dict[str, Array]:
        arrays = tuple([array for name, array in given.items() if name.startswith("input")])
        return dense(variant, given, arrays, SCALE, keep)

    def loss(given: dict[str, Array]) -> float:
        found = results(given)
        lse = np.where(seen, found["lse"], 0)
        return float((given["do"] * found["o"]).sum() + (given["dlse"] * lse).sum())

    for result, array in results(given).items():
        assert_near(result, array, made.want[result], 1e-12)
    random, step = np.random.default_rng(3), 1e-6
    for name in [x for x in given if f"d{x}" in made.want]:
        way = random.normal(size=given[name].shape)
        up, down = (loss({**given, name: given[name] + sign * step * way}) for sign in (1, -1))
        slope = float((made.want[f"d{name}"] * way).sum())
        assert abs((up - down) / (2 * step) - slope) <= 1e-6 * max(1, abs(slope)), name


# The columns ------------------------------------------------------------------------------------

TILE = RegisterTile(2, 1)
"""Small kernels compile in half the time; `cpu/test_scores.py` has those of the tables."""

METAL, TRITON = metal.Blocks(16, 16, 16), triton.Blocks(16, 16, 4, 1)
"""Whole tiles and tiles of an edge take turns."""


def settings(name: str) -> list[Setting]:
    """The kernels of a row: two levels of processors, and both kinds of GPUs."""

    def turn(*values: Any) -> Any:
        return values[[*VARIANTS].index(name) % len(values)]

    real, form, lower = (
        turn("float32", "float64"),
        turn(*FORMS),
        turn("avx2", "sse2", "sse2", "avx2"),
    )
    on_triton = turn(("tiled", "split"), ("tiled", "fused"), ("decode", "split"))
    on_metal, family = (turn("tiled", "decode"), "auto"), turn("apple9", "apple7", "apple7")
    return [
        *[Setting("cpu", real, isa, ("auto", form), TILE) for isa in ("", lower)],
        Setting("metal", turn("float32", "float32", "float16"), family, on_metal, METAL),
        Setting("triton", turn("float32", "float64", "float16"), "sm_80", on_triton, TRITON),
    ]


def named(name: str, setting: Setting) -> Any:
    """The parameters of a cell."""
    column = "-".join(filter(None, (setting.backend, setting.on)))
    return pytest.param(name, setting, id=f"{name}-{column}")


def cells() -> list[Any]:
    """All variants on all backends."""
    return [named(name, setting) for name in VARIANTS for setting in settings(name)]


def computed(made: Case, setting: Setting) -> dict[str, Array]:
    """All results of the kernels of both passes."""
    kind, rows = STATISTICS[setting.dtype], made.want["lse"].shape
    extra = [name for name in made.given if name.startswith(("input", "sinks", "seed"))]
    given = {name: made.given[name] for name in ("q", "k", "v", *extra)}
    results = {"o": (made.want["o"].shape, setting.dtype), "lse": (rows, kind), "max": (rows, kind)}
    forward, backward = setting.forms
    got = setting.run(made.problem, "forward", given, results, forward)
    given |= {"do": made.given["do"], "dlse": made.given["dlse"], "o": got["o"], "lse": got["lse"]}
    results = {
        f"d{name}": (array.shape, array.dtype.name)
        for name, array in made.given.items()
        if f"d{name}" in made.want
    }
    return got | setting.run(made.problem, "backward", given, results, backward)


@pytest.mark.slow
@pytest.mark.feature("M15", "J03")
@pytest.mark.parametrize(("name", "setting"), cells())
def test_kernels_compute_a_variant(name: str, setting: Setting) -> None:
    made = case(name, LARGE if setting.backend == "cpu" else SMALL, setting.dtype)
    compare(made, computed(made, setting), setting.tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("setting", settings(HIDING := "bias that hides"), ids=str)
def test_what_a_score_hides_is_not_looked_at(setting: Setting) -> None:
    """NaN in the values of keys that a bias of -inf hides from all queries."""
    made = case(HIDING, LARGE if setting.backend == "cpu" else SMALL, setting.dtype)
    values = made.given["v"].copy()
    values[:, :, 5:11] = np.nan
    poisoned = made._replace(given={**made.given, "v": values})
    compare(made, computed(poisoned, setting), setting.tolerance)


def options_of(made: Case, convert: Any) -> dict[str, Any]:
    """The options of a public call, with arrays as `convert` makes them."""
    problem = made.problem
    options = {"mask": problem.mask, "scale": SCALE, "impl": "composed"}
    options |= {"dropout": problem.dropout, "seed": SEED} if problem.dropout else {}
    return options | {"sinks": convert(made.given["sinks"])} if problem.sinks else options


@pytest.mark.parametrize("name", VARIANTS)
def test_composed_computes_a_variant(name: str) -> None:
    dtype = settings(name)[-1].dtype
    made = case(name, SMALL, dtype)
    variant = VARIANTS[name]
    arrays = [array for name, array in made.given.items() if name.startswith("input")]
    both = {"return_lse": True, "return_max": True}
    options = options_of(made, np.asarray) | {"score": made.score}
    found = attention(*(made.given[letter] for letter in "qkv"), **options, **both)
    compare(made, dict(zip(("o", "lse", "max"), found, strict=True)), TOLERANCES["cpu"][dtype])
    want_gradients = [tensor_of(made.given[x]).requires_grad_() for x in ("q", "k", "v")]
    inputs = [tensor_of(array).requires_grad_() for array in arrays]
    options = options_of(made, lambda x: tensor_of(x).requires_grad_())
    options["score"] = variant.score and variant.score(*inputs)
    o, lse, largest = attention(*want_gradients, **options, **both)
    wanted = [*want_gradients, *inputs, *([options["sinks"]] if variant.sinks else [])]
    slopes = tensor_of(made.given["do"]), tensor_of(made.given["dlse"])
    gradients = torch.autograd.grad((o, lse), wanted, slopes)
    names = [x for x in made.want if x.startswith("d")]
    got = {"o": o, "lse": lse, "max": largest} | dict(zip(names, gradients, strict=True))
    kinds = {x: np.dtype(str(tensor.dtype).removeprefix("torch.")) for x, tensor in got.items()}
    results = {x: array_of(tensor.detach(), kinds[x]) for x, tensor in got.items()}
    compare(made, results, TOLERANCES["cpu"][dtype])


# The page ---------------------------------------------------------------------------------------


def page() -> str:
    """The table as the page of scores shows it."""
    heads = ["variant", "processors", "Apple GPUs (Metal)", "other GPUs (Triton)", "composed"]
    lines = [heads, ["---"] * len(heads)]
    lines += [[name, *["both"] * 4] for name in VARIANTS]
    return "".join([f"| {' | '.join(line)} |\n" for line in lines])


def test_the_page_of_scores_shows_the_table() -> None:
    assert page() in (ROOT / "docs" / "scores.md").read_text(encoding="utf-8")
