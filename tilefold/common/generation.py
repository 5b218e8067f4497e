"""The generation of what was measured on this machine: part of every key that plans depend on.

Tuned block sizes change while a process runs. Whoever keeps plans, or calls that were prepared from
them, puts `number` into the key: what an older generation led to is then never found again.
"""

from __future__ import annotations

number = 0
"""How often tuned block sizes changed in this process; `advance` alone writes it."""


def advance() -> None:
    """Begin a new generation: called by whoever replaces tuned block sizes."""
    global number
    number += 1
