"""The one table of cases of attention, for tests and benchmarks.

A case has shapes, heads, dims, a rule, a layout and a placement in memory, and its id names them.
`CASES` covers every value of every axis, and every pair of values of the axes in `PAIRS`: the full
product would be millions.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tilefold import Rule, causal, chunked, dense, documents, full, lengths, local, prefix, rule
from tilefold.problems.attention import Problem, default_scale

SHAPES = [
    *[(1, 1), (3, 3), (64, 32), (113, 203), (128, 217), (239, 1), (799, 3), (1, 799)],
    *[(108, 256), (384, 256), (1023, 1024), (1024, 1023)],
]
DIMS = [1, 2, 3, 16, 40, 64, 77, 80, 95, 128, 199, 256, 384, 512]
HEADS = {"mha": (2, 2), "gqa": (4, 2), "mqa": (3, 1)}
DIM_V = {
    "same": lambda dim: dim,
    "wider": lambda dim: dim + 13,
    "narrower": lambda dim: -(-dim // 2),
}
LAYOUTS = ["bhnd", "bnhd", "bhdn"]
MEMORY = ["packed", "padded", "reversed", "step2", "broadcast", "transposed", "misaligned"]
SCALES = [None, 0.3, 1.0, -0.5]
SYNCS = ["none_front", "scale_front", "scale_end"]


@dataclass(frozen=True)
class Sizes:
    """The sizes that a rule may depend on."""

    batch: int
    heads: int
    len_q: int
    len_k: int

    @property
    def grids(self) -> dict[str, tuple[int, int]]:
        """The two lengths as 2-D sequences, as square as their factors allow."""
        return {"grid_q": grid(self.len_q), "grid_k": grid(self.len_k)}

    def random(self) -> np.random.Generator:
        """A random generator for data of a rule; it is the same for the same sizes."""
        return np.random.default_rng([self.batch, self.heads, self.len_q, self.len_k])


def grid(length: int) -> tuple[int, int]:
    """(height, width) with width >= height.

    >>> grid(203), grid(384), grid(1023)
    ((7, 29), (16, 24), (31, 33))
    """
    height = next(n for n in range(math.isqrt(length), 0, -1) if length % n == 0)
    return height, length // height


def _documents(sizes: Sizes, causal: bool = False) -> Rule:
    """Documents, of which some have no key and some have no query."""
    ids_q = sizes.random().integers(0, 5, sizes.len_q)
    ids_k = sizes.random().integers(1, 6, sizes.len_k)
    return documents(np.sort(ids_q), np.sort(ids_k), causal)


def _ends(sizes: Sizes) -> list[int]:
    """Lengths of the entries of a batch."""
    return [sizes.len_k * 2 // 3, sizes.len_k, 0][: sizes.batch]


def _documents_of_batch(sizes: Sizes) -> Rule:
    ids = [sizes.random().integers(0, 3, (sizes.batch, n)) for n in (sizes.len_q, sizes.len_k)]
    return documents(*ids)


def _dense(*axes: str) -> Callable[[Sizes], Rule]:
    def make(sizes: Sizes) -> Rule:
        names = {"b": sizes.batch, "h": sizes.heads, "q": sizes.len_q, "k": sizes.len_k}
        return dense(sizes.random().random([names.get(axis, 1) for axis in axes]) < 0.6)

    return make


RULES: dict[str, Callable[[Sizes], Rule]] = {
    "full": lambda _: full(),
    "causal": lambda _: causal(),
    "causal-start": lambda _: causal("start"),
    **{f"causal-{sync}": lambda _, sync=sync: causal(sync=sync) for sync in SYNCS},
    "causal-2d": lambda n: causal(**n.grids),
    "causal-2d-start": lambda n: causal("start", **n.grids),
    **{f"causal-2d-{sync}": lambda n, sync=sync: causal(sync=sync, **n.grids) for sync in SYNCS},
    "local": lambda _: local(20),
    "local-1": lambda _: local(1),
    "local-start-stride": lambda _: local(9, stride=4, align="start"),
    "local-causal": lambda _: local(33, causal=True),
    **{f"local-{sync}": lambda _, sync=sync: local(7, 2, sync=sync) for sync in SYNCS},
    "local-2d": lambda n: local(3, **n.grids),
    **{f"local-2d-{sync}": lambda n, sync=sync: local(3, sync=sync, **n.grids) for sync in SYNCS},
    **{
        f"local-2d-causal-{sync}": lambda n, sync=sync: local(
            2, 2, causal=True, sync=sync, **n.grids
        )
        for sync in SYNCS
    },
    "prefix": lambda _: prefix(5),
    "prefix-or-causal": lambda _: causal() | prefix(17),
    "documents": _documents,
    "documents-of-batch": _documents_of_batch,
    "documents-causal": lambda n: _documents(n, causal=True),
    "lengths": lambda n: lengths(n.len_k - n.len_k // 3),
    "lengths-of-batch": lambda n: lengths(_ends(n)),
    "lengths-left-of-batch": lambda n: lengths(_ends(n), side="left"),
    "causal-lengths-of-batch": lambda n: causal(lengths=_ends(n)) & local(30, lengths=_ends(n)),
    "chunked": lambda _: chunked(24),
    "dense": _dense("q", "k"),
    "dense-keys": _dense("b", "1", "1", "k"),
    "dense-queries": _dense("h", "q", "1"),
    "dense-all": _dense("b", "h", "q", "k"),
    "every-third": lambda _: rule(lambda q, k: (q - k) % 3 == 0),
    "past-32-bits": lambda _: rule(lambda q, k: (q * 10**8 - k * 10**9) % 7 < 4),
    "heads-differ": lambda _: rule(lambda b, h, q, k: abs(q - k) < 8 * (h + 1) + b),
    "nothing": lambda _: ~full(),
    "window-and-prefix": lambda _: causal() & (local(25) | prefix(4)),
    "other-documents": lambda n: ~_documents(n) & causal("start"),
    "later-in-chunk": lambda n: ~causal("start") & (chunked(40) | lengths(n.len_k // 4)),
    **{
        f"random-{seed}": lambda n, seed=seed: random_rule(random.Random(seed), n)
        for seed in range(8)
    },
}
"""All rules in every sync mode and dimension, and compositions of them, by name."""


def random_rule(draw: random.Random, sizes: Sizes, depth: int = 2) -> Rule:
    """A random composition of rules. `draw` is a seeded generator, or hypothesis's generator."""
    kind = draw.randrange(5) if depth else 0
    if kind <= 1:
        return _random_leaf(draw, sizes)
    if kind == 2:
        return ~random_rule(draw, sizes, depth - 1)
    left, right = (random_rule(draw, sizes, depth - 1) for _ in range(2))
    return left & right if kind == 3 else left | right


def random_graph(draw: random.Random, steps: int = 16) -> Callable[..., Any]:
    """A random truth over b, h, q, k whose parts are shared; it takes symbols and integers.

    Each step computes with what the steps before it made, so parts occur many times.
    """
    plan = [
        (draw.randrange(9), draw.random(), draw.random(), draw.randint(2, 7)) for _ in range(steps)
    ]

    def graph(b: Any, h: Any, q: Any, k: Any) -> Any:
        numbers, truths = [b, h, q, k, q - k], [q >= k]
        for kind, first, second, n in plan:
            x, y = (numbers[-1 - int(at**2 * len(numbers))] for at in (first, second))
            s, t = (truths[-1 - int(at**2 * len(truths))] for at in (first, second))
            match kind:
                case 0 | 1:
                    numbers.append(x + y)
                case 2:
                    numbers.append(x - y * n)
                case 3:
                    numbers.append(x * (y % n))
                case 4:
                    numbers.append(x // n if first < second else abs(x) % (n + 4))
                case 5 | 6:
                    truths.append(x % (3 * n) < y % (4 * n) if first < second else x != y)
                case 7:
                    truths.append(s & (t | (x > y)))
                case _:
                    truths.append((not s if isinstance(s, bool) else ~s) | (x % n == 1))
        return truths[-1] | ((numbers[-1] - numbers[-2]) % 5 == 0)

    return graph


def _random_leaf(draw: random.Random, sizes: Sizes) -> Rule:
    longest = max(sizes.len_q, sizes.len_k)
    place = draw.choice(
        [
            {},
            {"align": "start"},
            {"sync": draw.choice(SYNCS)},
            sizes.grids,
            {"sync": draw.choice(SYNCS), **sizes.grids},
        ]
    )
    a, b, n = draw.randint(-2, 2), draw.randint(-2, 2), draw.randint(1, 9)
    data = np.random.default_rng(draw.randrange(1000))
    leaves: list[Callable[[], Rule]] = [
        lambda: causal(**place),
        lambda: local(
            draw.randint(1, longest + 1),
            draw.choice([1, 1, 2, 4]),
            causal=draw.random() < 0.5,
            **place,
        ),
        lambda: prefix(draw.randint(0, sizes.len_k)),
        lambda: chunked(draw.randint(1, longest)),
        lambda: lengths(draw.randint(0, sizes.len_k)),
        lambda: lengths(
            data.integers(0, sizes.len_k + 1, sizes.batch), draw.choice(["right", "left"])
        ),
        lambda: documents(
            data.integers(0, n, sizes.len_q), np.sort(data.integers(0, n, sizes.len_k))
        ),
        lambda: documents(
            *(data.integers(0, n, (sizes.batch, length)) for length in (sizes.len_q, sizes.len_k))
        ),
        lambda: dense(
            data.random(
                [
                    draw.choice([1, size])
                    for size in (sizes.batch, sizes.heads, sizes.len_q, sizes.len_k)
                ]
            )
            < 0.5
        ),
        lambda: rule(lambda q, k: (a * q + b * k) % n < max(1, n // 2)),
        lambda: rule(lambda b, h, q, k: abs(q // n - k + h) <= b + n),
    ]
    return draw.choice(leaves)()


@dataclass(frozen=True)
class Case:
    """One call: its sizes, the name of its rule in `RULES`, and the arrays' layout and memory."""

    shape: tuple[int, int] = (64, 32)
    dim: int = 16
    rule: str = "full"
    layout: str = "bhnd"
    heads: str = "mha"
    memory: str = "packed"
    dim_v: str = "same"
    scale: float | None = None

    def __str__(self) -> str:
        scale = "" if self.scale is None else f"-scale{self.scale}"
        width = "" if self.dim_v == "same" else f"v{DIM_V[self.dim_v](self.dim)}"
        lengths = "x".join(map(str, self.shape))
        start = f"{lengths}-d{self.dim}{width}-{self.heads}-{self.rule}"
        return f"{start}-{self.layout}-{self.memory}{scale}"

    @property
    def sizes(self) -> Sizes:
        """The sizes of the case; long sequences have a batch of one, to save time."""
        batch = 2 if math.prod(self.shape) < 60000 else 1
        return Sizes(batch, HEADS[self.heads][0], *self.shape)

    def mask(self) -> Rule:
        """The rule at these sizes."""
        return RULES[self.rule](self.sizes)

    def problem(self, dtype: str) -> Problem:
        """The case as a problem, which tilefold's planner takes."""
        sizes = self.sizes
        return Problem(
            batch=sizes.batch,
            heads_q=sizes.heads,
            heads_kv=HEADS[self.heads][1],
            len_q=sizes.len_q,
            len_k=sizes.len_k,
            dim=self.dim,
            dim_v=DIM_V[self.dim_v](self.dim),
            dtype=dtype,
            scale=default_scale(self.dim) if self.scale is None else self.scale,
            mask=self.mask(),
        )


AXES: dict[str, list[object]] = {
    "shape": list(SHAPES),
    "dim": list(DIMS),
    "rule": list(RULES),
    "layout": list(LAYOUTS),
    "heads": list(HEADS),
    "memory": list(MEMORY),
    "dim_v": list(DIM_V),
    "scale": list(SCALES),
}
"""The axes of a `Case` and their values."""

PAIRS = [
    *[("shape", "layout"), ("shape", "heads"), ("dim", "layout"), ("dim", "heads")],
    *[("dim", "dim_v"), ("layout", "memory"), ("heads", "memory"), ("layout", "dim_v")],
]
"""Axes that meet in kernel sources or in their loops: all pairs of their values are tested."""

Setting = tuple[str, object]


LARGE = [(128, 217), (108, 256), (384, 256)]
"""Shapes of many tiles, which factor into 2-D grids of different sizes and not by whole ratios."""


def cover(
    axes: Mapping[str, list[Any]] = AXES,
    pairs: Sequence[tuple[str, str]] = PAIRS,
    large: Sequence[tuple[int, int]] = LARGE,
) -> Iterator[Case]:
    """A few cases with every value of each axis, all `pairs`, and each rule on a large shape."""
    draw = random.Random(0)
    wanted: set[frozenset[Setting]] = {
        frozenset([("rule", name), ("shape", large[i % len(large)])])
        for i, name in enumerate(axes["rule"])
    }
    for group in [*((axis,) for axis in axes), *pairs]:
        values = [[(axis, value) for value in axes[axis]] for axis in group]
        wanted |= {frozenset(settings) for settings in itertools.product(*values)}
    while wanted:
        seed = min(wanted, key=lambda group: (-len(group), sorted(map(repr, group))))
        candidates = [
            {axis: draw.choice(values) for axis, values in axes.items()} | dict(seed)
            for _ in range(100)
        ]
        scored = []
        for candidate in candidates:
            settings = frozenset(candidate.items())
            scored.append(({group for group in wanted if group <= settings}, candidate))
        met, best = max(scored, key=lambda pair: len(pair[0]))
        wanted -= met
        yield replace(Case(), **best)


CASES = list(cover())
"""The table of cases."""
