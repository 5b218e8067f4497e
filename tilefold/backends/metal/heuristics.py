"""Constants of the planner of Apple GPUs, as a value: none of them was tuned on a GPU.

Results depend on them by rounding only. A test that asks what follows from other values gives them
to a `Planner`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Heuristics:
    """The constants by which a plan is chosen."""

    few_queries: int = 8
    """Most queries that "auto" decodes: the blocks of the tiled kernel, 16 or 32 queries of one
    head, would be at least half empty, where decoding fills fragments with the queries of all heads
    of a key head."""

    keys_per_split: int = 256
    """Least keys that a threadgroup of the decode kernel visits. Its part, 8 rows of dim_v float32
    elements, is written and read: a sixteenth of the bytes of float16 keys and values."""

    many_keys: int = 512
    """Least keys that "auto" decodes: there is something to split."""

    enough_groups: int = 1024
    """Threadgroups of the decode kernel into which one key head of one batch entry is split, no
    more: 25 simdgroups for each of the 40 cores of the largest GPUs. Other entries and heads of a
    call do not count, and results do not depend on them; with many of them the parts that are
    written cost up to a sixteenth of the bytes, as `keys_per_split` says."""

    least_traverse: int = 32
    """Length to which the traverse block shrinks to keep an operand beside sums in registers: the
    shortest of the tables' rows."""

    least_spilled: int = 64
    """Length to which the traverse block shrinks to keep an input beside spilled sums: the shortest
    of those rows that spill all sums."""

    part_elements: int = 2**20
    """Elements of all parts of the gradient of an array that a score reads, where there are more
    parts than `fixed_parts`."""

    fixed_parts: int = 4
    """Parts of the gradient of a large array that several heads or batch entries share."""


DEFAULT = Heuristics()
"""The constants that calls are planned with."""
