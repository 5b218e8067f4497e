"""Constants of the planner of Triton's GPUs, as a value: none of them is tuned.

Results depend on them by rounding only. A test that asks what follows from other values gives them
to a `Planner`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Heuristics:
    """The constants by which a plan is chosen."""

    few_queries: int = 16
    """Most queries that "auto" decodes: blocks of the tiled kernel would be mostly empty."""

    packed_queries: int = 64
    """Most queries that "auto" decodes where heads share keys: the queries of a group fill blocks
    together, where the queries of one head would leave half of a block of 128 rows empty, or
    more."""

    many_keys: int = 512
    """Least keys that "auto" decodes."""

    keys_per_split: int = 256
    """Least keys that a program of the decode kernel visits."""

    enough_programs: int = 264
    """Programs for which keys are split and the fused form deals out blocks, no finer: two for each
    of the 132 multiprocessors of an H100. This follows from the batch, so it holds where bits may
    ("machine"); the three constants below hold where they may not ("anywhere")."""

    fixed_keys: int = 512
    """Keys that a program of the decode kernel visits: four tiles, enough to have copies under way
    where the batch fills the GPU, and 16 splits of 8192 keys where it does not."""

    fixed_splits: int = 64
    """Most splits of the keys that a block of queries meets: they are merged one after another."""

    fixed_owners: int = 8
    """Owners of each key head in the fused form: each has a float32 dQ of its own."""

    part_elements: int = 2**20
    """Elements of all parts of the gradient of an array that a score reads, where there are more
    parts than `fixed_parts`. It is not tuned."""

    fixed_parts: int = 4
    """Parts of the gradient of a large array that several heads or batch entries share."""

    most_decode_rows: int = 64
    """Most rows of a block of the decode kernel."""

    most_padding: float = 1.4
    """Most columns of Hopper's kernel over the columns of the head: it pads a head of 80 to 128,
    which the plain kernel cuts into 64 and 16. Published kernels of the two kinds differ by 1.4 to
    1.6 in speed (FlashAttention-3 and Triton's, H100, dim 128); ours were not timed."""

    most_row_elements: int = 4096
    """Most elements of a block of a kernel that visits no tiles."""

    most_warps: int = 16
    """Most warps of a program, where fewer have too few registers for its sums."""


DEFAULT = Heuristics()
"""The constants that calls are planned with."""
