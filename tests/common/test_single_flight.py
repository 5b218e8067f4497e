"""Values that are made once: who asks meanwhile waits, errors are shared and forgotten."""

from __future__ import annotations

import doctest
import itertools
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from interrupts import interrupted_at

from tilefold.common import single_flight
from tilefold.common.single_flight import SingleFlight


class Slow:
    """Makes a value when it is allowed to, and counts how often."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.go = threading.Event()
        self.made = 0

    def __call__(self) -> int:
        self.made += 1
        self.begun.set()
        assert self.go.wait(30)
        return self.made


@pytest.mark.feature("A10")
def test_whoever_asks_meanwhile_waits_for_the_one_that_is_being_made() -> None:
    values: SingleFlight[int] = SingleFlight(most=2)
    slow = Slow()
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(values.get, "key", slow)
        assert slow.begun.wait(30)
        others = [pool.submit(values.get, "key", slow) for _ in range(3)]
        assert values.get("another", lambda: 7) == 7, "other keys do not wait"
        assert not any(future.done() for future in others)
        slow.go.set()
        assert [future.result(30) for future in (first, *others)] == [1] * 4
    assert slow.made == 1


def test_an_error_goes_to_all_who_wait_and_the_next_tries_again() -> None:
    values: SingleFlight[int] = SingleFlight(most=2)
    slow = Slow()

    def fail() -> int:
        slow()
        raise ZeroDivisionError("no")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(values.get, "key", fail)
        assert slow.begun.wait(30)
        second = pool.submit(values.get, "key", fail)
        slow.go.set()
        for future in (first, second):
            with pytest.raises(ZeroDivisionError):
                future.result(30)
    assert values.get("key", lambda: 5) == 5


def test_who_waits_for_an_interrupted_one_makes_it() -> None:
    values: SingleFlight[int] = SingleFlight(most=2)
    slow = Slow()

    def interrupted() -> int:
        slow()
        raise KeyboardInterrupt

    def run() -> None:
        with pytest.raises(KeyboardInterrupt):
            values.get("key", interrupted)

    thread = threading.Thread(target=run)
    thread.start()
    assert slow.begun.wait(30)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(values.get, "key", lambda: 3)
        slow.go.set()
        assert other.result(30) == 3
    thread.join()


def test_a_finaliser_that_asks_amid_the_making_does_not_wait_for_itself() -> None:
    values: SingleFlight[int] = SingleFlight(most=2)
    assert values.get("key", lambda: values.get("key", lambda: 1) + 1) == 2
    assert values.get("key", lambda: 0) == 2


def test_an_interrupt_at_any_line_leaves_nobody_waiting() -> None:
    """The interrupt comes at the first line of `get` and its callees, at the second, and so on."""

    for line in itertools.count(1):
        values: SingleFlight[int] = SingleFlight(most=2)
        with interrupted_at(line, single_flight.__file__) as interrupted:
            assert values.get("key", lambda: 1) == 1
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(values.get, "key", lambda: 1).result(30) == 1
        if not interrupted:
            break
    assert line > 10


def test_two_threads_whose_handlers_want_what_the_other_makes_both_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(single_flight, "PATIENCE", 0.05)
    values: SingleFlight[str] = SingleFlight(most=2)
    both = threading.Barrier(2)

    def make(own: str, other: str) -> str:
        both.wait(30)
        return own + values.get(other, lambda: f"a second {other}")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(values.get, "a", lambda: make("a", "b"))
        second = pool.submit(values.get, "b", lambda: make("b", "a"))
        made = {first.result(30), second.result(30)}
    assert any("second" in value for value in made)


def test_the_newest_are_kept() -> None:
    values: SingleFlight[int] = SingleFlight(most=2)
    for number in (1, 2, 1, 3):
        assert values.get(number, lambda: 0) == 0
    assert [values.get(number, lambda: 9) for number in (3, 1, 2)] == [0, 0, 9]
    values.clear()
    assert values.get(3, lambda: 4) == 4


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork"
)
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_its_parents_threads() -> None:
    values: SingleFlight[int] = SingleFlight(most=2)
    slow = Slow()
    thread = threading.Thread(target=values.get, args=("key", slow))
    thread.start()
    assert slow.begun.wait(30)
    child = multiprocessing.get_context("fork").Process(target=values.get, args=("key", int))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    slow.go.set()
    thread.join()


def test_examples() -> None:
    outcome = doctest.testmod(single_flight, raise_on_error=False)
    assert outcome.attempted and not outcome.failed
