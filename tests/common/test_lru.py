"""What is kept for the next call: the newest values, within a number and a number of bytes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import pytest

from tilefold.common.lru import LruCache


def kept(recent: LruCache[str], keys: str) -> str:
    """Which keys are still held; asking makes them the newest."""
    return "".join(key for key in keys if recent.get(key) is not None)


def test_what_was_put_comes_back() -> None:
    recent: LruCache[str] = LruCache(most=2, most_bytes=100)
    assert recent.get("a") is None
    assert recent.put("a", "x", 1) == "x"
    assert recent.get("a") == "x"
    recent.put("a", "y", 1)
    assert recent.get("a") == "y"
    recent.clear()
    assert recent.get("a") is None


def test_the_one_that_was_used_longest_ago_goes_first() -> None:
    recent: LruCache[str] = LruCache(most=3, most_bytes=100)
    for key in "abc":
        recent.put(key, key, 1)
    assert recent.get("a") == "a"
    recent.put("d", "d", 1)
    assert kept(recent, "abcd") == "acd"
    recent.put("c", "c", 1)
    recent.put("e", "e", 1)
    assert kept(recent, "acde") == "cde"


def test_bytes_count_and_the_newest_stays() -> None:
    recent: LruCache[str] = LruCache(most=9, most_bytes=10)
    for key, size in (("a", 4), ("b", 4), ("c", 4)):
        recent.put(key, key, size)
    assert kept(recent, "abc") == "bc"
    recent.put("d", "d", 1000)
    assert kept(recent, "abcd") == "d"
    recent.put("d", "d", 4)  # in place of the large one
    recent.put("e", "e", 6)
    assert kept(recent, "de") == "de"


class Interrupting(int):
    """A size whose product, amid `put`, runs a function once, as a signal handler would."""

    handler: Callable[[], None] = staticmethod(lambda: None)

    def __mul__(self, other: int) -> int:
        handler, self.handler = self.handler, lambda: None
        handler()
        return int(self) * other


def test_a_signal_handler_may_use_the_store_that_it_interrupts() -> None:
    recent: LruCache[str] = LruCache(most=2, most_bytes=100)
    nested: list[str | None] = []

    def handler() -> None:
        nested.append(recent.get("a"))
        recent.put("c", "y", 1)

    size = Interrupting(1)
    size.handler = handler
    recent.put("a", "x", 1)
    recent.put("b", "x", size)
    assert nested == ["x"] and len(recent) == 2


def test_a_handler_may_wait_for_a_thread_that_uses_the_store() -> None:
    recent: LruCache[str] = LruCache(most=2, most_bytes=100)
    size = Interrupting(1)
    other = threading.Thread(target=recent.put, args=("b", "y", 1), daemon=True)

    def handler() -> None:
        other.start()
        other.join(20)

    size.handler = handler
    recent.put("a", "x", size)
    assert not other.is_alive() and kept(recent, "ab") == "ab"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_amid_a_put_leaves_the_child_a_store() -> None:
    recent: LruCache[str] = LruCache(most=2, most_bytes=100)
    size, begun, go = Interrupting(1), threading.Event(), threading.Event()
    # What the handler returns is not read.
    size.handler = lambda: (begun.set(), go.wait(30))  # type: ignore[assignment, return-value]
    other = threading.Thread(target=recent.put, args=("a", "x", size))
    other.start()
    assert begun.wait(30)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        recent.put("b", "y", 1)
        os._exit(17 if kept(recent, "ab") == "ab" else 1)
    go.set()
    other.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17


def test_a_value_that_is_there_stays_and_only_this_one_is_discarded() -> None:
    recent: LruCache[str] = LruCache(most=2, most_bytes=100)
    assert recent.setdefault("a", "x", 1) == "x"
    assert recent.setdefault("a", "y", 1) == "x"
    recent.discard("a", "y")
    assert recent.get("a") == "x"
    recent.discard("a", "x")
    assert recent.get("a") is None
    for key in "abc":
        recent.setdefault(key, key, 1)
    assert kept(recent, "abc") == "bc"
