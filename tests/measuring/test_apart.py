"""Implementations timed in processes of their own, warm and cold."""

from __future__ import annotations

import math
import os
import signal

import pytest

from tilefold.masks import parse
from tilefold.measuring.apart import ROUNDS, Apart, during
from tilefold.measuring.workload import BOTH, Case
from tilefold.problems.attention import Problem

SMALL = Problem(
    batch=1,
    heads_q=2,
    heads_kv=2,
    len_q=33,
    len_k=33,
    dim=16,
    dim_v=16,
    dtype="float32",
    scale=0.25,
    mask=parse.parse("causal() & rule(lambda h, q, k: (q + h) % 3 == 0)"),
)


@pytest.mark.slow
@pytest.mark.feature("S08")
def test_each_works_in_its_own_process_and_one_that_dies_is_named() -> None:
    with Apart(["tilefold", "numpy"]) as apart:
        for operation in ("forward", "backward"):
            own, other = apart.measure(Case(SMALL, operation), seconds=0)
            assert (own.name, other.name) == ("tilefold", "numpy")
            for row in (own, other):
                assert row.reason is None
                assert len(row.seconds) == 1
                assert len(row.cold) == ROUNDS
                assert 0 < row.median < 10
            record = other.record(own)
            assert record["median_seconds"] == other.median
            assert record["cold_median_seconds"] == other.cold_median
        own, other = apart.measure(Case(SMALL, BOTH), seconds=0)
        assert other.reason == "the reference has no call for both passes"
        assert own.median > 0
        assert math.isnan(other.median)
        assert other.record(own)["median_seconds"] is None

        pid = apart.processes["numpy"].pid
        assert pid
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="the process of numpy ended with -9"):
            apart.measure(Case(SMALL), seconds=0)


def test_what_is_timed_runs_for_its_seconds_and_at_least_so_often() -> None:
    numbers = iter(range(1000000))
    assert during(0, lambda: float(next(numbers)), least=3) == [0, 1, 2]
    assert len(during(0.01, lambda: float(next(numbers)))) > 3
