"""Few queries against many keys: the split keys and their merge, on every backend."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from backends import Setting
from cases import Case
from compare import assert_near, assert_same, dense, tolerances
from operands import Array, inputs

import tilefold
from tilefold import Rule, causal, full, lengths
from tilefold.backends.cpu.device import host
from tilefold.backends.cpu.heuristics import Heuristics
from tilefold.problems.attention import Problem

# Tracing Python's operations doubles the time of these tests.
pytestmark = [pytest.mark.slow, pytest.mark.no_cover]

AGREEING = [
    *(
        (Setting("metal", dtype, family), case)
        for family, dtype, case in [
            ("apple9", "float32", Case((1, 700), 64, "full", "bhnd", "gqa")),
            ("apple7", "float16", Case((3, 530), 40, "causal", "bnhd", "mqa", "padded")),
            ("apple9", "bfloat16", Case((8, 520), 80, "documents-of-batch", "bhdn", "gqa")),
            (
                *("apple7", "bfloat16"),
                Case((2, 515), 128, "lengths-of-batch", "bhnd", "mha", dim_v="wider"),
            ),
            ("apple7", "float32", Case((5, 600), 13, "heads-differ", "bnhd", "gqa", "reversed")),
            ("apple9", "float32", Case((2, 513), 300, "window-and-prefix", dim_v="narrower")),
            ("apple9", "float16", Case((1, 800), 3, "nothing", heads="mqa")),
        ]
    ),
    *(
        (Setting("triton", dtype, "sm_90"), Case(shape, dim, rule, "bhnd", heads, "packed"))
        for shape, heads, rule, dim, dtype in [
            ((1, 700), "gqa", "causal", 64, "float16"),
            ((5, 600), "gqa", "causal", 64, "bfloat16"),
            ((3, 513), "mqa", "lengths-of-batch", 40, "float32"),
            ((2, 900), "mha", "local", 80, "float64"),
            ((16, 530), "mqa", "dense-queries", 16, "float32"),
            ((48, 600), "gqa", "prefix-or-causal", 24, "float16"),
            ((2, 600), "gqa", "causal", 300, "float64"),
        ]
    ),
]
"""Setting and case, as different from each other as they can be; Metal's last two page O and see
nothing. `tests/cpu/test_decode.py` has the CPU's, which lie in memory as oddly as they can."""


@pytest.mark.feature("M01", "M06", "M15", "M16")
@pytest.mark.parametrize(("setting", "case"), AGREEING, ids=str)
def test_decode_agrees_with_reference(setting: Setting, case: Case) -> None:
    """Keys are split among programs, and the queries of a key head share what is read: packed,
    they fill blocks that one head would not.
    """
    problem = case.problem(setting.dtype)
    launches = setting.launches(problem)
    assert [launch.spec.kernel for launch in launches] == ["decode", "merge"]
    if setting.backend == "triton" and case.rule != "local":  # one program reads a window
        assert launches[0].splits > 1
    operands = inputs(problem, case.layout, case.memory)
    want = dense(operands, problem.mask, problem.scale)
    tolerance = tolerances(problem, operands, want, host_pairs=False)
    for name, array in setting.forward(problem, operands).items():
        assert_near(name, array, want[name], tolerance[name])


@dataclass(frozen=True)
class Decoder:
    """A setting that decodes whatever it is given, with its keys whole or cut into splits."""

    setting: Setting
    cut: bool

    def __str__(self) -> str:
        return f"{self.setting}-{'cut' if self.cut else 'whole'}"

    @property
    def options(self) -> dict[str, Any]:
        """Options of the plan; on the CPU splits of one tile, and tiles of 32 keys."""
        if self.setting.backend != "cpu":
            return {"form": "decode"}
        device = replace(host(), cores=8 if self.cut else 1)
        small = Heuristics(decode_tile=32, least_split_seconds=1e-12)
        heuristics = {"heuristics": small} if self.cut else {}
        return {"form": "decode", "device": device, **heuristics}

    def problem(self, mask: Rule, **changes: Any) -> Problem:
        """Grouped queries, two sequences, dims that leave a rest in every vector."""
        sizes = {"batch": 2, "heads_q": 4, "heads_kv": 2, "len_q": 3, "len_k": self.len_k}
        sizes |= {"dim": 5, "dim_v": 7}
        given = {"dtype": self.setting.dtype, "scale": 0.5, "mask": mask}
        return Problem(**{**sizes, **given, **changes})

    @property
    def len_k(self) -> int:
        """Several splits: a GPU does not make them as small."""
        return 150 if self.setting.backend == "cpu" else 600

    def results(self, problem: Problem, operands: dict[str, Array]) -> dict[str, Array]:
        """Both results of decoding: o and lse."""
        launches = self.setting.launches(problem, **self.options)
        assert launches[0].spec.kernel in ("decode", "decode_part")
        return self.setting.forward(problem, operands, **self.options)


DECODERS = [
    *(Decoder(Setting("cpu", "float32"), cut) for cut in (False, True)),
    Decoder(Setting("metal", "float32", "apple9"), True),
    Decoder(Setting("triton", "float32", "sm_90"), True),
]
on_every_backend = pytest.mark.parametrize("decoder", DECODERS, ids=str)


def assert_unchanged(decoder: Decoder, name: str, got: Array, clean: Array) -> None:
    """The same bits on the CPU; GPUs add one value at a time in a tile that holds NaN."""
    if decoder.setting.exact:
        assert_same(name, got, clean)
    else:
        assert_near(name, got, clean, 1e-6)


@pytest.mark.feature("M01", "M15", "T07", "T09")
@pytest.mark.parametrize("held", ["k", "v"])
@on_every_backend
def test_a_bad_key_reaches_exactly_those_who_see_it(decoder: Decoder, held: str) -> None:
    len_k = decoder.len_k
    mask = tilefold.dense(np.random.default_rng(3).random((3, len_k)) < 0.4)
    sizes = decoder.problem(mask)
    operands = inputs(sizes, "bhnd", "packed")
    clean = decoder.results(sizes, operands)
    seen = mask.to_dense(3, len_k)
    some, last = np.flatnonzero(seen[0] & ~seen[1])[0], len_k - 1
    for value, key in ((math.nan, some), (math.nan, last), (math.inf, some), (-math.inf, last)):
        bad = {name: array.copy() for name, array in operands.items()}
        bad[held][1, 0, key, 2] = value
        got = decoder.results(sizes, bad)
        apart = np.ones((2, 4, 3), bool)
        apart[1, :2, seen[:, key]] = False
        with np.errstate(all="ignore"):
            want = dense(bad, mask, 0.5)
        for name in ("o", "lse"):
            words = f"{name}, {value} in {held}"
            assert_unchanged(decoder, words, got[name][apart], clean[name][apart])
            assert_near(words, got[name], want[name], 1e-5)


def unseen(name: str, len_k: int) -> tuple[Rule, Array]:
    """A rule, and which keys of which batch entry no query sees: whole splits, and part of one."""
    keys = np.arange(len_k)
    if name == "padding":
        ends = [len_k * 2 // 3, len_k * 11 // 50]
        return lengths(ends), keys >= np.array(ends)[:, None]
    if name == "the future":
        return causal("start"), np.tile(keys >= 3, (2, 1))
    return ~full(), np.ones((2, len_k), bool)


@pytest.mark.feature("M01", "M15", "T07")
@pytest.mark.parametrize("name", ["padding", "the future", "everything"])
@on_every_backend
def test_keys_that_no_query_sees_change_nothing(decoder: Decoder, name: str) -> None:
    mask, hidden = unseen(name, decoder.len_k)
    sizes = decoder.problem(mask)
    operands = inputs(sizes, "bhnd", "packed")
    clean = decoder.results(sizes, operands)
    for value in (math.nan, math.inf, -math.inf)[: 3 if decoder.setting.backend == "cpu" else 1]:
        for held in ("k", "v"):
            operands[held].transpose(0, 2, 1, 3)[hidden] = value
        for result, array in decoder.results(sizes, operands).items():
            assert_unchanged(decoder, f"{result} with {value}", array, clean[result])


@pytest.mark.feature("M01", "T09", "T10")
@on_every_backend
def test_scores_of_minus_infinity_alone_have_no_mean(decoder: Decoder) -> None:
    """An empty row is 0 and -inf; one that sees scores of -inf alone is 0 / 0. Not so if split."""
    len_k = decoder.len_k
    sizes = decoder.problem(lengths([len_k, len_k * 7 // 15, 0]), batch=3, scale=1.0)
    operands = inputs(sizes, "bhnd", "packed")
    operands["q"][...] = abs(operands["q"])
    operands["k"][0] = -math.inf
    operands["k"][1, :, : len_k * 32 // 75] = -math.inf  # whole splits
    got, want = decoder.results(sizes, operands), dense(operands, sizes.mask, 1.0)
    assert np.isnan(got["o"][0]).all() and np.isfinite(got["o"][1]).all()
    assert not got["o"][2].any() and np.isneginf(got["lse"][2]).all()
    for name in ("o", "lse"):
        assert_near(name, got[name], want[name], 1e-5)


@pytest.mark.feature("T10")
@on_every_backend
def test_huge_scores_choose_one_key(decoder: Decoder) -> None:
    len_k = decoder.len_k
    for size in (1e4, 1e8, 1e30):
        sizes = decoder.problem(full(), scale=1.0, batch=1, heads_q=2, heads_kv=1)
        operands = inputs(sizes, "bhnd", "packed")
        operands["q"][...] = operands["k"][...] = 0
        operands["q"][..., 0], operands["k"][..., 0] = size, np.arange(1, len_k + 1)
        got = decoder.results(sizes, operands)
        values = np.repeat(operands["v"][:, :, -1:], 2, axis=1)
        largest = len_k * size
        assert_near("o", got["o"], np.broadcast_to(values, got["o"].shape), 1e-6)
        assert_near("lse", got["lse"], np.full((1, 2, 3), largest), 1e-5 * largest)
