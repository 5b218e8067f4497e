"""A store that keeps the most recently used values for later calls, within limits of its size."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class _Entry(Generic[T]):
    """A value, its size in bytes, and the time of its last use: a count that grows."""

    __slots__ = ("size", "used", "value")

    def __init__(self, value: T, size: int, used: int) -> None:
        self.value, self.size, self.used = value, size, used


class LruCache(Generic[T]):
    """The most recently used values: at most `most` of them, of `most_bytes` bytes in all.

    The newest value always stays. Any number of threads may use the store, and so may a forked
    child. `get` takes no lock and hashes the key once, since every call begins with it. A finaliser
    or a signal handler may interrupt any method, and use the store in the same thread.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._large = False  # whether there ever was a value that takes more than its share
        self._entries: dict[Hashable, _Entry[T]] = {}
        self._clock = itertools.count()
        self._lock = threading.RLock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._unlock)

    def __len__(self) -> int:
        """The number of values that are kept."""
        return len(self._entries)

    def get(self, key: Hashable) -> T | None:
        """The value under a key, or None."""
        found = self._entries.get(key)
        if found is None:
            return None
        found.used = next(self._clock)
        return found.value

    def put(self, key: Hashable, value: T, size: int) -> T:
        """Keep a value, which holds `size` bytes of data, and return it."""
        with self._lock:
            self._entries[key] = _Entry(value, size, next(self._clock))
            self._large = self._large or size * self._most > self._most_bytes
            if len(self._entries) > self._most or (
                self._large and self._total() > self._most_bytes
            ):
                self._drop()
        return value

    def keys(self) -> list[Hashable]:
        """The keys of all values, from the least to the most recently used."""
        entries = [*self._entries.items()]
        return [key for key, _ in sorted(entries, key=lambda entry: entry[1].used)]

    def clear(self) -> None:
        """Remove all values."""
        with self._lock:
            self._entries.clear()

    def _total(self) -> int:
        """The bytes of data that all values hold."""
        return sum([entry.size for entry in [*self._entries.values()]])

    def _drop(self) -> None:
        """Drop the least recently used values until the rest is within the limits, with a margin.

        To sort them takes 30 us, so an eighth of them goes at once: a loop whose every call is new
        pays that every 16th time.
        """
        *oldest, _ = self.keys()
        total, most = self._total(), self._most
        if len(self._entries) > most:
            most -= most // 8
        for key in oldest:
            if len(self._entries) <= most and total <= self._most_bytes:
                break
            dropped = self._entries.pop(key, None)
            total -= dropped.size if dropped else 0

    def _unlock(self) -> None:
        """Replace the lock in a forked child: the thread that held it does not exist there."""
        self._lock = threading.RLock()
