"""A store that keeps the most recently used values for later calls, within limits of its size."""

from __future__ import annotations

import itertools
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

    The newest value always stays. There is no lock: each step is one operation of a dictionary,
    which Python does as a whole. So any number of threads may use the store, a signal handler or a
    finaliser may use it amid a method that it interrupts, and a forked child meets nothing locked.
    Two threads that drop values at the same time may drop some too many.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._large = False  # whether there ever was a value that takes more than its share
        self._entries: dict[Hashable, _Entry[T]] = {}
        self._clock = itertools.count()

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
        self._entries[key] = _Entry(value, size, next(self._clock))
        self._trim(size)
        return value

    def setdefault(self, key: Hashable, value: T, size: int) -> T:
        """Keep a value unless there is one under the key; return the one that is there."""
        kept = self._entries.setdefault(key, _Entry(value, size, next(self._clock)))
        self._trim(size)
        return kept.value

    def discard(self, key: Hashable, value: T) -> None:
        """Remove this value if it is the one under the key."""
        found = self._entries.get(key)
        if found is not None and found.value is value:
            self._entries.pop(key, None)

    def keys(self) -> list[Hashable]:
        """The keys of all values, from the least to the most recently used."""
        entries = [*self._entries.items()]
        return [key for key, _ in sorted(entries, key=lambda entry: entry[1].used)]

    def clear(self) -> None:
        """Remove all values."""
        self._entries.clear()

    def _trim(self, size: int) -> None:
        """Keep the limits after a value of this size came."""
        self._large = self._large or size * self._most > self._most_bytes
        if len(self._entries) > self._most or (self._large and self._total() > self._most_bytes):
            self._drop()

    def _total(self) -> int:
        """The bytes of data that all values hold."""
        return sum([entry.size for entry in [*self._entries.values()]])

    def _drop(self) -> None:
        """Drop the least recently used values until the rest is within the limits, with a margin.

        To sort them takes 30 us, so an eighth of them goes at once: a loop whose every call is new
        pays that every 16th time.
        """
        oldest = self.keys()[:-1]
        total, most = self._total(), self._most
        if len(self._entries) > most:
            most -= most // 8
        for key in oldest:
            if len(self._entries) <= most and total <= self._most_bytes:
                break
            dropped = self._entries.pop(key, None)
            total -= dropped.size if dropped else 0
