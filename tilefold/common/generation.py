"""The generation of this machine's tuned block sizes: a part of every key of a plan.

Tuned block sizes can change while a process runs. A cache of plans, or of calls prepared from
plans, has `number` in its keys, so entries of an older generation are never found again.
"""

from __future__ import annotations

number = 0
"""The number of changes of tuned block sizes in this process; only `advance` writes it."""


def advance() -> None:
    """Begin a new generation: called after tuned block sizes were replaced."""
    global number
    number += 1
