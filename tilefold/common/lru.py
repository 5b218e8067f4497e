"""Values that are kept for the next call that needs the same ones: the newest, within bounds."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class LruCache(Generic[T]):
    """The values that were put or asked for last, up to a number of them and of bytes.

    The newest one always stays. Any number of threads may use it; a forked child may go on with it.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._held: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._lock = threading.Lock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._unlock)

    def get(self, key: Hashable) -> T | None:
        """The value of a key, or None."""
        with self._lock:
            found = self._held.get(key)
            if found is None:
                return None
            self._held.move_to_end(key)
            return found[0]

    def put(self, key: Hashable, value: T, size: int) -> T:
        """Keep a value, which holds `size` bytes of data, and return it."""
        with self._lock:
            self._held[key] = value, size
            self._held.move_to_end(key)
            total = sum(size for _, size in self._held.values())
            while len(self._held) > 1 and (
                len(self._held) > self._most or total > self._most_bytes
            ):
                _, (_, oldest) = self._held.popitem(last=False)
                total -= oldest
        return value

    def clear(self) -> None:
        """Keep nothing."""
        with self._lock:
            self._held.clear()

    def _unlock(self) -> None:
        """In a forked child: whoever held the lock at the fork is not there to release it."""
        self._lock = threading.Lock()
