"""Keys that grow: a plan made from that of another number of keys is the plan of its own."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from trial import problem

import tilefold
from tilefold import Rule, causal, full, local
from tilefold.backends.cpu import growth
from tilefold.backends.cpu.device import Device
from tilefold.backends.cpu.plan import CpuPlan, plan
from tilefold.problems.attention import Problem

DEVICE = Device("cpu", "any", "avx512", "", "", cores=4)


def steps(mask: Rule, lengths: range, len_q: int = 1) -> list[Problem]:
    return [problem(len_q, n, 64, mask, heads=(8, 2)) for n in lengths]


def assert_same(found: CpuPlan, made: CpuPlan) -> None:
    (own,), (other,) = found.launches, made.launches
    for each in fields(own):
        if each.name == "runs":
            np.testing.assert_array_equal(own.runs.rows, other.runs.rows)
            np.testing.assert_array_equal(own.runs.runs, other.runs.runs)
        else:
            np.testing.assert_array_equal(getattr(own, each.name), getattr(other, each.name))
    for name in ("problem", "operation", "parameters", "tables", "buffers", "device"):
        assert getattr(found, name) == getattr(made, name), name


@pytest.mark.feature("T08", "M07")
@pytest.mark.parametrize(("mask", "len_q"), [(full(), 1), (causal(), 1), (full(), 5)])
def test_a_grown_plan_is_the_plan_of_its_own_length(
    mask: Rule, len_q: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    growth._kept.clear()
    planned: list[Problem] = []

    def counted(*asked: Problem) -> CpuPlan:
        planned.append(asked[0])
        return plan(*asked)

    monkeypatch.setattr(growth, "plan", counted)
    asked = steps(mask, range(1, 9000, 13), len_q)
    splits = set()
    for each in asked:
        found = growth.grown(each, DEVICE, "auto")
        assert_same(found, plan(each, DEVICE, "forward"))
        splits.add(found.launches[0].block_rows)
    # Planned from the beginning only where the keys are split into one part more.
    assert len(planned) <= 2 * len(splits) < len(asked) / 4


def test_what_hides_keys_or_has_many_queries_is_planned_from_the_beginning() -> None:
    growth._kept.clear()
    for mask, len_q in ((causal(), 2), (local(3), 1), (causal("start"), 1), (full(), 200)):
        for each in steps(mask, range(900, 903), len_q):
            assert growth.grown(each, DEVICE, "auto") is plan(each, DEVICE, "forward")
    assert not len(growth._kept)


@pytest.mark.feature("T08")
def test_a_decode_loop_with_a_growing_cache_gives_what_each_call_gives_alone() -> None:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 4, 1, 16), np.float32)
    k, v = rng.standard_normal((2, 1, 2, 640, 16), np.float32)
    lengths = (1, 2, 300, 301, 302, 640)
    grown = [tilefold.attention(q, k[:, :, :n], v[:, :, :n], mask=causal()) for n in lengths]
    for n, o in zip(lengths, grown, strict=True):
        growth._kept.clear()
        own = tilefold.attention(q, k[:, :, :n].copy(), v[:, :, :n].copy())
        np.testing.assert_array_equal(o, own)
