"""Keys that grow: a plan made from that of another number of keys is the plan of its own."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from trial import problem

import tilefold
from tilefold import Rule, alibi, causal, full, local, relative_bias, softcap, temperature
from tilefold.backends import calls
from tilefold.backends.cpu import growth
from tilefold.backends.cpu.device import Device
from tilefold.backends.cpu.plan import CpuPlan, plan
from tilefold.masks.symbols import Real
from tilefold.problems.attention import Problem
from tilefold.scores.score import Score, Sizes, as_score

DEVICE = Device("cpu", "any", "avx512", "", "", cores=4)


SCORES = [alibi(), softcap(30.0), relative_bias(np.ones((8, 16), np.float32)).form.score]


def steps(
    mask: Rule, lengths: range, len_q: int = 1, score: Score | list[Score] | None = None
) -> list[Problem]:
    alone = problem(len_q, 1, 64, mask, heads=(8, 2))
    return [replace(alone, len_k=n, score=as_score(score)) for n in lengths]


def assert_same(found: CpuPlan, made: CpuPlan) -> None:
    (own,), (other,) = found.launches, made.launches
    for each in fields(own):
        if each.name == "runs":
            np.testing.assert_array_equal(own.runs.rows, other.runs.rows)
            np.testing.assert_array_equal(own.runs.runs, other.runs.runs)
        else:
            np.testing.assert_array_equal(getattr(own, each.name), getattr(other, each.name))
    for name in ("problem", "operation", "parameters", "tables", "buffers", "device", "scores"):
        assert getattr(found, name) == getattr(made, name), name


@pytest.mark.slow
@pytest.mark.feature("T08", "M07")
@pytest.mark.parametrize(
    ("mask", "len_q", "form", "score"),
    [
        (full(), 1, "interleaved", None),
        (causal(), 1, "auto", SCORES),
        (full(), 5, "auto", alibi()),
    ],
)
def test_a_grown_plan_is_the_plan_of_its_own_length(
    mask: Rule, len_q: int, form: str, score: Any
) -> None:
    first, *more = steps(mask, range(1, 9000, 53), len_q, score)
    made, anew = plan(first, DEVICE, "forward", form), 0
    for each in more:
        own = plan(each, DEVICE, "forward", form)
        found = growth.with_keys(made, each)
        if found:
            assert_same(found, own)
        else:  # the keys are split into one part more
            assert own.launches[0].block_rows != made.launches[0].block_rows
            anew += 1
        made = found or own
    assert anew < len(more) / 2


def test_what_hides_keys_or_has_many_queries_is_planned_from_the_beginning() -> None:
    for mask, len_q in ((causal(), 2), (local(3), 1), (causal("start"), 1), (full(), 200)):
        first, second = steps(mask, range(900, 902), len_q)
        assert growth.with_keys(plan(first, DEVICE, "forward"), second) is None
    first, second = steps(full(), range(900, 902))
    assert growth.with_keys(plan(first, DEVICE, "forward", scope="machine"), second) is None


def test_a_score_with_another_skeleton_is_planned_from_the_beginning() -> None:
    class Grows(Score):
        def bind(self, s: Real, sizes: Sizes) -> Real:
            return s * 0.5 if sizes.len_k == 900 else -s

        def __repr__(self) -> str:
            return "grows"

    first, second = (replace(each, score=Grows()) for each in steps(full(), range(900, 902)))
    assert growth.with_keys(plan(first, DEVICE, "forward"), second) is None


@pytest.mark.feature("T08")
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("bhnd", {}),
        ("bnhd", {}),
        (
            "bnhd",
            {"sinks": np.arange(4.0), "score": [temperature(np.full((4, 1, 1), 2.0)), *SCORES[:2]]},
        ),
    ],
)
def test_a_loop_with_a_growing_cache_gives_what_each_call_gives_alone(
    layout: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    turn = (0, 1, 2, 3) if layout == "bhnd" else (0, 2, 1, 3)
    q = rng.standard_normal((1, 4, 1, 16), np.float32).transpose(turn)
    k, v = rng.standard_normal((2, 1, 2, 640, 16), np.float32).transpose(0, *(1 + t for t in turn))
    begun: list[object] = []
    beginning = calls._call
    monkeypatch.setattr(calls, "_call", lambda *given: begun.append(0) or beginning(*given))

    def attention(n: int) -> NDArray[np.float32]:
        cut = (slice(None),) * (2 if layout == "bhnd" else 1) + (slice(n),)
        return tilefold.attention(q, k[cut], v[cut], mask=causal(), layout=layout, **options)

    lengths = (301, 302, 1, 2, 640, 300)
    calls.calls.clear()
    calls._newest.clear()
    grown = [attention(n) for n in lengths]
    assert len(begun) == 1
    for n, o in zip(lengths, grown, strict=True):
        calls.calls.clear()
        calls._newest.clear()
        np.testing.assert_array_equal(o, attention(n))
    assert len(begun) == 1 + len(lengths)


def test_keys_that_do_not_fit_are_named_in_a_loop_too() -> None:
    q, k = np.ones((1, 4, 1, 16), np.float32), np.ones((1, 2, 30, 16), np.float32)
    tilefold.attention(q, k, k)
    with pytest.raises(ValueError, match="the sequence of v must be 31 as in k"):
        tilefold.attention(q, np.ones((1, 2, 31, 16), np.float32), k)
    with pytest.raises(TypeError, match="k must be of float32 as q is, got float64"):
        tilefold.attention(q, np.ones((1, 2, 32, 16)), np.ones((1, 2, 32, 16)))
    empty = tilefold.attention(q, k[:, :, :0], k[:, :, :0])
    assert not empty.any()
    calls.calls.clear()
