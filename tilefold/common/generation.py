"""The generation of what planners choose by: a part of every key of a plan.

Tuned block sizes, and how far results are to be the same bits, can change while a process runs. A
cache of plans, or of calls prepared from plans, has `number` in its keys, so entries of an older
generation are never found again.
"""

from __future__ import annotations

import ctypes

number = 0
"""The number of such changes in this process; only `advance` writes it."""

word = ctypes.c_int64(number)
"""The same number in memory, where compiled code reads it."""


def advance() -> None:
    """Begin a new generation: called after a change."""
    global number
    number += 1
    word.value = number
