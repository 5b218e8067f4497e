"""Few queries against many keys: the kernel with the head dimension in the lanes, and its merge."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import RULES, Sizes
from compare import assert_near, assert_same, dense
from emulated import MISSING, PACKAGES, emulated
from guarded import SIDES, guarded
from kept import kept_plans
from operands import Array, buffer, inputs
from paths import finding
from trial import LAYOUTS, Trial, numbers, problem, run

import tilefold
from tilefold import causal, local
from tilefold.backends import calls
from tilefold.backends.cpu import dispatch
from tilefold.backends.cpu.device import Device, host
from tilefold.backends.cpu.heuristics import DEFAULT, Heuristics
from tilefold.backends.cpu.plan import plan
from tilefold.backends.cpu.splits import KeySplitter
from tilefold.problems.attention import Problem, shapes_qkv
from tilefold.problems.request import LAYOUTS as LAYOUTS_OF_CALLS

# Results --------------------------------------------------------------------------------------

TRIALS = [
    ("full", (1, 300), (64, 64), (8, 8), "bhnd"),
    ("full", (3, 203), (40, 77), (4, 1), "bnhd"),
    ("causal", (2, 271), (1, 2), (4, 2), "bhdn"),
    ("window-and-prefix", (7, 290), (80, 40), (2, 2), "padded bhnd"),
    ("documents-of-batch", (5, 71), (16, 5), (4, 2), "backwards"),
    ("lengths-of-batch", (1, 333), (199, 13), (2, 1), "padded bhdn"),
    ("dense-all", (4, 260), (2, 300), (4, 2), "no unit stride"),
    ("heads-differ", (6, 260), (128, 16), (4, 2), "shared heads"),
    ("every-third", (1, 90), (512, 3), (3, 1), "bhnd"),
    ("nothing", (2, 64), (5, 7), (2, 2), "bhnd"),
]
"""Rule, lengths, dims, heads, layout: as different from each other as they can be."""


SMALL_SPLITS = Heuristics(decode_tile=32, least_split_seconds=1e-12, fixed_split_seconds=1e-12)
"""Splits of one tile, and tiles of 32 keys, however few keys there are."""


def on(cut: bool) -> dict[str, Any]:
    """Where a plan is made: with the keys cut into many splits, or into none."""
    if cut:
        return {"device": replace(host(), cores=8), "heuristics": SMALL_SPLITS}
    return {"device": replace(host(), cores=1)}


@pytest.mark.slow
@pytest.mark.feature("M01", "T08", "T10")
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("number", range(len(TRIALS)))
def test_results_of_heads_together(number: int, cut: bool) -> None:
    """Where heads lie side by side, here wherever they lie, and decoding costs nothing."""
    usual = SMALL_SPLITS if cut else Heuristics()
    free = replace(usual, decode_product=0, decode_sum=0, exponential=0)
    options = {**on(False), "heuristics": free}  # one core: more would want more items
    this = trial(number, "float32")
    first = plan(this.problem, operation="forward", form="interleaved", **options).launches[0]
    by_head = TRIALS[number][0] in ("dense-all", "heads-differ")
    assert first.heads_per_item == (1 if by_head else this.problem.heads_kv)
    run(this, numbers(this), "forward", "interleaved", **options)


@pytest.mark.feature("T02", "T08")
def test_decode_reads_heads_together_that_lie_side_by_side() -> None:
    sizes = problem(1, 300, 16, batch=1, heads=(4, 4))
    calls.calls.clear()  # a call of another test may keep a plan that the planner has forgotten
    calls._newest.clear()
    made = []
    for layout in LAYOUTS_OF_CALLS:
        q, k, v = (np.zeros(shape, np.float32) for shape in shapes_qkv(sizes, layout))
        tilefold.attention(q, k, v, layout=layout)
        made.append(kept_plans()[-1])
    auto, interleaved = (plan(sizes, host(), "forward", form) for form in ("auto", "interleaved"))
    assert made == [auto, interleaved, auto] and auto != interleaved
    assert KeySplitter(sizes, cores=4, lanes=16).heads_per_item == 4
    many = KeySplitter(problem(5, 300, 16, heads=(64, 32)), cores=4, lanes=16)
    assert many.heads_per_item == 8, "of at most 128 rows"


def trial(number: int, dtype: str) -> Trial:
    rule, (len_q, len_k), (dim, dim_v), heads, layout = TRIALS[number]
    mask = RULES[rule](Sizes(2, heads[0], len_q, len_k))
    sizes = problem(len_q, len_k, dim, mask, dtype, dim_v=dim_v, batch=2, heads=heads)
    return Trial(sizes, layout, poisoned=number % 2 == 1)


def kernels(
    sizes: Problem, device: Device, form: str = "auto", heuristics: Heuristics = DEFAULT
) -> list[str]:
    made = plan(sizes, device, "forward", form, heuristics=heuristics)
    return [launch.spec.kernel for launch in made.launches]


@pytest.mark.feature("M01", "M16", "T02", "T09", "T10")
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "number", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, len(TRIALS)))]
)
def test_results(number: int, dtype: str) -> None:
    this = trial(number, dtype)
    whole = replace(DEFAULT, most_fixed_splits=1)
    assert kernels(this.problem, host(), "decode", whole) == ["decode"]
    run(this, numbers(this), "forward", "decode", heuristics=whole)


@pytest.mark.slow
@pytest.mark.feature("M01", "M16", "T08", "T10")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("number", range(len(TRIALS)))
def test_results_of_splits(number: int, dtype: str) -> None:
    this = trial(number, dtype)
    parts = ["decode_part"] if TRIALS[number][0] != "nothing" else ["decode"]
    assert kernels(this.problem, form="decode", **on(True)) == parts
    run(this, numbers(this), "forward", "decode", **on(True))


@pytest.mark.slow
@pytest.mark.feature("T01")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("memory", ["packed", "transposed"])
def test_half_types(dtype: str, cut: bool, memory: str) -> None:
    """As exact as one rounding of the result in float64 allows, and float32 sums beside it."""
    bits = {"float16": 11, "bfloat16": 8}[dtype]
    for heads, len_q, dims in (((2, 2), 1, (64, 64)), ((4, 1), 3, (77, 19)), ((2, 2), 1, (13, 7))):
        mask = causal() & local(150)
        sizes = Problem(2, *heads, len_q, 203, *dims, dtype, 0.2, mask)
        wide = replace(sizes, dtype="float32")
        operands = inputs(wide, "bhnd", "packed")
        stored = {name: half(operands[name], dtype, memory) for name in ("q", "k", "v")}
        exact = {name: array.astype(np.float64) for name, array in stored.items()}
        want = dense({**exact, "do": operands["do"]}, mask, 0.2)
        got = {
            "o": half(np.zeros(want["o"].shape), dtype),
            "lse": np.zeros(want["lse"].shape, "f4"),
        }
        made = plan(sizes, operation="forward", form="decode", **on(cut))
        assert made.launches[0].splits > 1 if cut else made.launches[0].splits == 1
        buffers = {name: buffer(array) for name, array in {**stored, **got}.items()}
        dispatch.run(made, buffers)
        assert_near("lse", got["lse"], want["lse"], 2e-6 * abs(want["lse"]).max())
        allowed = 2.0**-bits * abs(want["o"]) + 1e-6
        assert_near("o", got["o"].astype(np.float64), want["o"], allowed)


def half(array: Array, dtype: str, memory: str = "packed") -> Array:
    """An array in a half type, and perhaps with its axes the other way round in memory."""
    kind = np.dtype(dtype if dtype == "float16" else pytest.importorskip("ml_dtypes").bfloat16)
    stored = array.astype(kind)
    return stored if memory == "packed" else stored.transpose().copy().transpose()


# Threads, memory, machines --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.feature("T08")
@pytest.mark.parametrize("number", [0, 3, 5, 7])
def test_the_same_bits_on_any_number_of_threads(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_ALONE_FLOPS", 0)
    this = trial(number, "float32")
    given = numbers(this)
    before = tilefold.get_num_threads()
    try:
        found = []
        for count in (1, 2, 4, 3, 1):
            tilefold.set_num_threads(count)
            found.append(run(this, given, "forward", "decode", **on(True)))
    finally:
        tilefold.set_num_threads(before)
    for again in found[1:]:
        for name, array in again.items():
            assert_same(name, array, found[0][name])


@pytest.mark.feature("T08")
def test_the_number_of_threads_changes_no_plan() -> None:
    sizes = problem(1, 300000, 64)
    before = tilefold.get_num_threads()
    counts = []
    for threads in (1, 7):
        tilefold.set_num_threads(threads)
        counts.append([launch.items for launch in plan(sizes, host(), "forward").launches])
    tilefold.set_num_threads(before)
    assert counts[0] == counts[1]


def child(code: str) -> list[str]:
    """What a new interpreter prints that has imported this file. It must come to its end."""
    done = subprocess.run(
        [sys.executable, "-c", f"from test_decode import *\n{code}"],
        capture_output=True,
        text=True,
        timeout=300,
        env=finding(__file__),
    )
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1:]} {done.stderr}"
    return done.stdout.splitlines()


def touch(*dtypes: str) -> None:
    """Every trial, whole and in splits, every array flush with a page that no one may touch."""
    for number in range(len(TRIALS)):
        this = trial(number, dtypes[number % len(dtypes)])
        given = numbers(this)
        for split, side in itertools.product((False, True), SIDES):
            print(this, split, f"page {side}", flush=True)
            with guarded(side) as memory:
                run(this, given, "forward", "decode", memory, **on(split))


@pytest.mark.slow
@pytest.mark.feature("M01", "M16", "T15")
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no mprotect")
@pytest.mark.parametrize("dtypes", [("float32",), ("float64",), ("float16", "bfloat16")])
def test_nothing_outside_of_the_arrays_is_touched(dtypes: tuple[str, ...]) -> None:
    assert len(child(f"touch{dtypes!r}")) == 4 * len(TRIALS)


def lengths_around_vectors() -> Iterator[Trial]:
    for n in range(1, 70):
        layout, dim = list(LAYOUTS)[n % len(LAYOUTS)], n % 35
        yield Trial(problem(1 + n % 4, n, 1 + dim, causal(), dim_v=1 + dim % 19), layout)


def touch_every_length() -> None:
    alone = replace(host(), cores=1)
    for this in lengths_around_vectors():
        given = numbers(this)
        for side in SIDES:
            print(this, f"page {side}", flush=True)
            with guarded(side) as memory:
                run(this, given, "forward", "decode", memory, alone)


@pytest.mark.slow
@pytest.mark.feature("M06", "M16")
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no mprotect")
def test_every_length_and_dim_around_a_vector() -> None:
    assert len(child("touch_every_length()")) == 2 * 69


@pytest.mark.slow
@pytest.mark.feature("T01")
@pytest.mark.parametrize("isa", ["avx512", "avx2", "sse2"])
def test_results_at_every_level(isa: str) -> None:
    try:
        lowered = host().lowered(isa)
    except ValueError as error:
        pytest.skip(f"this machine has no {isa}: {error}")
    for number in range(len(TRIALS)):
        this = trial(number, ("float32", "float64")[number % 2])
        given = numbers(this)
        run(this, given, "forward", "decode", device=replace(lowered, cores=1))
    device = replace(lowered, cores=8)
    this = trial(3, "float32")
    run(this, numbers(this), "forward", "decode", device=device, heuristics=SMALL_SPLITS)


@pytest.mark.slow
@pytest.mark.feature("T01")
@pytest.mark.skipif(
    bool(MISSING) and os.environ.get("CI") != "true",
    reason=f"{' and '.join(MISSING)} not found; Debian has them in {PACKAGES}",
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_results_on_arm(dtype: str, tmp_path: Path) -> None:
    small = replace(host(), cores=8)
    features = "+neon,+fp-armv8"
    device = replace(small, isa="neon", triple="aarch64-linux-gnu", features=features)
    with emulated(tmp_path) as memory:
        for number in (0, 1, 5, 7):
            this = trial(number, dtype)
            given = numbers(this)
            for memory.side in SIDES:
                run(this, given, "forward", "decode", memory, device, SMALL_SPLITS)
