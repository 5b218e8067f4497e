"""Trials of modified scores and sinks, for tests of processors: forms of kernels, memory, types.

The scores are rows of the one table of variants, whose arrays lie in memory with gaps.
"""

from __future__ import annotations

from cases import RULES, Sizes
from trial import Trial, problem
from variants import score_of

NAMES = (
    "softcap",
    "alibi of one's own slopes",
    "full bias",
    "bias of keys",
    "several in order",
    "score that hides",
    "all functions",
)

SHAPES = [
    ("full", (113, 203), (40, 40), "bhnd"),
    ("full", (3, 300), (3, 2), "padded bhdn"),
    ("window-and-prefix", (150, 140), (64, 64), "bnhd"),
    ("documents-of-batch", (37, 71), (16, 5), "backwards"),
    ("dense-all", (70, 9), (2, 77), "no unit stride"),
    ("heads-differ", (41, 260), (128, 16), "padded bhnd"),
    ("full", (1, 9000), (16, 16), "bhnd"),
]
"""Tiled, decoded and split kernels; masks of all kinds, and all kinds of memory."""

DTYPES = ("float16", "float32", "bfloat16", "float64")


def trials(every: int = 1) -> list[Trial]:
    """A variant in each shape; types take turns, and every second one has sinks.

    Or every few of these trials.
    """
    found = []
    for number, (name, shape) in enumerate(zip(NAMES, SHAPES, strict=True)):
        rule, (len_q, len_k), (dim, dim_v), layout = shape
        sizes = Sizes(2, 2, len_q, len_k)
        score, mask = score_of(name, sizes), RULES[rule](sizes)
        more = {"dim_v": dim_v, "batch": 2, "score": score, "sinks": number % 2 * 2}
        made = problem(len_q, len_k, dim, mask, DTYPES[number % len(DTYPES)], **more)
        found.append(Trial(made, layout, poisoned=number % 2 == 0, score=score))
    return found[::every]


def short(trial: Trial) -> str:
    """A name of a trial: its type, lengths and score."""
    p = trial.problem
    return f"{p.dtype}-{p.len_q}x{p.len_k}-{str(p.score).partition('(')[0]}"
