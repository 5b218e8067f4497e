"""A prepared call serves every later call that differs in data alone, and no other."""

from __future__ import annotations

import ctypes
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from compare import assert_near
from kept import kept_plans
from numpy.typing import NDArray

import tilefold
from tilefold import Rule, attention, attention_backward
from tilefold.backends import calls
from tilefold.backends.cpu import dispatch, threads
from tilefold.backends.cpu.device import host
from tilefold.backends.cpu.kernel import kernel
from tilefold.problems import reference
from tilefold.problems.attention import Problem
from tilefold.problems.request import PRECISIONS

Array = NDArray[Any]


def inputs(seed: int = 0, shape: tuple[int, ...] = (2, 3, 70, 8)) -> tuple[Array, ...]:
    q, k, v = np.random.default_rng(seed).normal(size=(3, *shape))
    return q, k, v


def check(arrays: tuple[Array, ...], **options: Any) -> None:
    """Raises unless a call and its gradients are what the reference says."""
    o, lse = attention(*arrays, return_lse=True, **options)
    want = reference.attention(*arrays, **options)
    assert_near("o", o, want[0], 1e-12)
    assert_near("lse", lse, want[1], 1e-12)
    do = np.cos(o)
    gradients = attention_backward(do, *arrays, o, lse, **options)
    slopes = reference.attention_backward(do, *arrays, *want, **options)
    for name, got, slope in zip(("dq", "dk", "dv"), gradients, slopes, strict=True):
        assert_near(name, got, slope, 1e-11)


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations that are prepared during a test, which begins with none."""
    seen: list[str] = []
    real = dispatch.prepare

    def prepare(plan: Any, *rest: Any) -> dispatch.Call:
        seen.append(plan.operation)
        return real(plan, *rest)

    calls.calls.clear()
    monkeypatch.setattr(dispatch, "prepare", prepare)
    return seen


def test_other_data_in_other_places_is_the_same_call(prepared: list[str]) -> None:
    for seed in range(3):
        check(inputs(seed), mask=tilefold.causal())
    arrays = inputs(3)
    check(arrays, mask=tilefold.causal())
    arrays[0][...] = arrays[1]  # other data in the same place
    check(arrays, mask=tilefold.causal())
    assert prepared == ["forward", "backward"]


def test_a_call_without_pairs_is_kept_too() -> None:
    q, nothing = np.zeros((1, 2, 3, 8), np.float32), np.zeros((1, 2, 0, 8), np.float32)
    calls.calls.clear()
    for _ in range(2):
        assert not attention(q, nothing, nothing).any()
        assert len(calls.calls) == 1
    assert attention(nothing, q, q).shape == (1, 2, 0, 8)
    assert len(calls.calls) == 2


def test_other_strides_are_another_call(prepared: list[str]) -> None:
    q, k, v = inputs()
    turned = np.ascontiguousarray(q.swapaxes(1, 2)).swapaxes(1, 2)
    for arrays in ((q, k, v), (turned, k, v), (q, turned, v), (q, k, turned), (q[::-1], k, v)):
        check(arrays)
    assert prepared.count("forward") == 5


def rules() -> list[Rule]:
    return [
        tilefold.documents(np.arange(70) // 9),
        tilefold.documents(np.arange(70) // 11),
        tilefold.lengths([70, 3]),
        tilefold.lengths([50, 40]),
        tilefold.dense(np.tri(70, 70, 5, dtype=bool)),
        tilefold.dense(np.tri(70, 70, -5, dtype=bool)),
        tilefold.causal() & tilefold.local(8),
        tilefold.causal() & tilefold.local(9),
    ]


@pytest.mark.slow
def test_masks_of_other_data_are_other_calls(prepared: list[str]) -> None:
    arrays = inputs()
    for _ in range(2):
        for mask in rules():  # made anew: equal masks, not the same
            check(arrays, mask=mask)
    assert prepared.count("forward") == len(rules())


def test_scale_and_type_and_lengths_are_part_of_a_call(prepared: list[str]) -> None:
    q, k, v = inputs()
    for scale in (None, 0.5, 0.25):
        check((q, k, v), scale=scale)
    check((q, k[:, :, :50], v[:, :, :50]))
    attention(*(array.astype(np.float32) for array in (q, k, v)))
    assert prepared.count("forward") == 5


@pytest.mark.slow
def test_precision_is_part_of_a_call_of_float32_alone(prepared: list[str]) -> None:
    for dtype in (np.float32, np.float64):
        q, k, v = (array.astype(dtype) for array in inputs())
        for _ in range(2):
            for precision in PRECISIONS:
                o, lse = attention(q, k, v, precision=precision, return_lse=True)
                attention_backward(o, q, k, v, o, lse, precision=precision)
    expected = [*PRECISIONS, *["highest"] * 3]
    seen = [made.problem.precision for made in kept_plans()]
    assert seen == [precision for precision in expected for _ in range(2)]
    assert prepared == ["forward", "backward"] * 6


def test_a_problem_of_another_type_has_no_precision_to_choose() -> None:
    def made(dtype: str, precision: str) -> Problem:
        return Problem(1, 1, 1, 2, 2, 4, 4, dtype, 0.5, tilefold.full(), precision)

    assert made("float32", "high") != made("float32", "highest")
    with pytest.raises(ValueError, match=r"^precision must be"):
        made("float64", "high")


def test_the_number_of_threads_may_change_between_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = threads.run

    def run(address: int, arguments: int, workers: int) -> None:
        seen.append(workers)
        real(address, arguments, workers)

    arrays = inputs(shape=(2, 3, 200, 40))
    before = threads.get_num_threads()
    monkeypatch.setattr(threads, "run", run)
    try:
        for number in (1, 3, 2):
            threads.set_num_threads(number)
            attention(*arrays)
    finally:
        threads.set_num_threads(before)
    assert seen == [1, 3, 2]


@pytest.mark.slow
def test_another_instruction_set_is_another_call(
    prepared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = inputs()
    check(arrays)
    levels = [isa for isa in ("avx2", "sse2") if isa != host().isa]
    for isa in levels:
        try:
            host().lowered(isa)
        except ValueError:
            continue
        monkeypatch.setenv("TILEFOLD_CPU_ISA", isa)
        check(arrays)
        assert kept_plans()[-1].device.isa == isa
        break
    monkeypatch.delenv("TILEFOLD_CPU_ISA", raising=False)
    check(arrays)


def test_a_call_keeps_its_code(prepared: list[str]) -> None:
    arrays = inputs()
    expected = attention(*arrays)
    kernel.cache_clear()
    gc.collect()
    assert np.array_equal(attention(*arrays), expected)
    assert prepared == ["forward"]


def test_one_call_from_several_threads_at_once(prepared: list[str]) -> None:
    """They share what was prepared, and nothing of what is running."""
    expected = [attention(*inputs(seed)) for seed in range(6)]
    meeting = threading.Barrier(6)

    def attend(seed: int) -> bool:
        arrays = inputs(seed)
        meeting.wait(timeout=20)
        return all(np.array_equal(attention(*arrays), expected[seed]) for _ in range(100))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(attend, range(6)))
    assert prepared == ["forward"]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_call_within_a_call_of_the_same_thread(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler or finaliser may call before the outer kernel begins.

    Or after the caller's own part of it has ended, while other threads are still inside.
    """
    small, large = inputs(1, (1, 1, 30, 4)), inputs(2, (1, 2, 900, 256))
    expected = attention(*small), attention(*large)
    real, pointers, inner = threads.run, [], []

    def handler() -> None:
        inner.append(attention(*large))
        inner.append(attention(*small))
        gc.collect()

    def run(address: int, arguments: int, workers: int) -> None:
        words = (ctypes.c_int64 * (dispatch.WORKSPACE + 1)).from_address(arguments)
        pointers.append(words[dispatch.WORKSPACE])
        if len(pointers) == 1 and when == "before":
            handler()
        real(address, arguments, workers)
        if len(pointers) == 1 and when == "after":
            handler()

    monkeypatch.setattr(threads, "run", run)
    outer = attention(*small)
    assert np.array_equal(outer, expected[0])
    assert np.array_equal(inner[0], expected[1])
    assert np.array_equal(inner[1], expected[0])
    assert pointers[0] not in pointers[1:], "scratch of the outer call"


def test_a_wrong_layout_is_refused_after_a_right_one() -> None:
    class Text(str):
        """Equal to a layout, with the same hash."""

    arrays = inputs()
    attention(*arrays, layout="bhnd")
    for layout in (Text("bhnd"), ["bhnd"]):
        with pytest.raises(ValueError, match=r"^layout must be"):
            attention(*arrays, layout=layout)  # type: ignore[arg-type]  # the point
