"""What is kept for the next call: the newest values, within a number and a number of bytes."""

from __future__ import annotations

import threading

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


def test_a_finaliser_may_use_the_store_that_it_interrupts() -> None:
    class Interrupted(int):
        """A size that is asked for while the store is locked."""

        def __mul__(self, other: int) -> int:
            if not nested:
                nested.append(recent.get("a"))
                recent.put("c", "y", 1)
            return int(self) * other

    nested: list[str | None] = []
    recent: LruCache[str] = LruCache(most=2, most_bytes=100)
    recent.put("a", "x", 1)
    worker = threading.Thread(target=recent.put, args=("b", "x", Interrupted(1)), daemon=True)
    worker.start()
    worker.join(20)
    assert not worker.is_alive()
    assert nested == ["x"] and len(recent) == 2
