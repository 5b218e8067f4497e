"""The one table of variants of attention: modified scores, sinks, dropout, and masks with them.

Beside each variant stands what it is in plain NumPy, in float64: a second definition, which uses no
part of the languages of masks and scores. A new variant is a row of `VARIANTS`; all backends, the
trials of processors and the page of scores take it from there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  # NumPy knows the name "bfloat16" from it
import numpy as np
from cases import Sizes
from numpy.typing import NDArray

import tilefold
from tilefold import Rule, causal, chunked, full, lengths, local
from tilefold.scores.score import Score, as_score

Array = NDArray[Any]
Normal = Callable[..., Array]
"""(*shape, dtype=) -> normal random numbers, with gaps between them in memory."""


class Pairs(NamedTuple):
    """The indices of all pairs, four arrays that broadcast, and the sizes."""

    b: Array
    h: Array
    q: Array
    k: Array
    sizes: Sizes

    @property
    def distance(self) -> Array:
        """The place of the key less that of the query, counted from the end of both."""
        found: Array = self.k - self.q - (self.sizes.len_k - self.sizes.len_q)
        return found


def unchanged(s: Array, at: Pairs, *_: Array) -> Array:
    """Scores that nothing modifies."""
    return s


class Variant(NamedTuple):
    """What a call asks for, and the same by formulas.

    `arrays` makes the arrays that `score` and `formula` take, in order of appearance. `grid` wants
    lengths that are the product of two, and `few` few queries, as in decoding.
    """

    score: Callable[..., Any] | None = None
    formula: Callable[..., Array] = unchanged
    arrays: Callable[[Sizes, Normal], tuple[Array, ...]] = lambda n, normal: ()
    mask: Rule = full()
    visible: Callable[[Pairs], Any] = lambda at: True
    sinks: int = 0
    dropout: float = 0.0
    grid: bool = False
    few: bool = False


def _past(at: Pairs) -> Array:
    return at.distance <= 0


def _buckets(at: Pairs) -> Array:
    """T5's buckets of both directions: 8 of 16 are for single distances, the others grow to 128."""
    size = np.abs(at.distance)
    grown = 8 + np.floor(np.log(np.maximum(size, 1) / 8) / np.log(128 / 8) * 8)
    return np.where(size < 8, size, np.minimum(grown, 15)).astype(int) + 16 * (at.distance > 0)


def _window(n: Sizes) -> tuple[int, int]:
    """Height and width of a window, as `lengths_of` makes them."""
    return n.len_q // 5, 5


def _swin(s: Array, at: Pairs, table: Array) -> Array:
    height, width = _window(at.sizes)
    row, column = at.q // width - at.k // width, at.q % width - at.k % width
    return s + table[at.h, row + height - 1, column + width - 1]


def _hiding(n: Sizes, normal: Normal) -> tuple[Array, ...]:
    """A bias that hides some keys of all queries, and all of one query."""
    array = normal(n.heads, n.len_q, n.len_k)
    array[..., 5:11] = -np.inf
    array[..., 2, :] = -np.inf
    return (array,)


def _own(coarse: Array, cycle: Array) -> Any:
    """It reads an array twice, at places that depend on several indices, and whole numbers."""
    entries, steps = tilefold.table(coarse), tilefold.table(STEPS)

    def function(s: Any, q: Any, k: Any, b: Any, h: Any) -> Any:
        near = s * tilefold.table(cycle)[(q * 2 + k) % 7] + steps[k % 5] * 0.1
        return tilefold.where((q + k) % 5 == 0, near, s + entries[b, q // 4, k // 4])

    return [tilefold.score(lambda s, h, q: s + entries[0, 0, q // 4] * h), tilefold.score(function)]


def _own_formula(s: Array, at: Pairs, coarse: Array, cycle: Array) -> Array:
    s = s + coarse[0, 0, at.q // 4] * at.h
    near = s * cycle[(at.q * 2 + at.k) % 7] + STEPS[at.k % 5] * 0.1
    return np.where((at.q + at.k) % 5 == 0, near, s + coarse[at.b, at.q // 4, at.k // 4])


STEPS = np.array([3, -1, 4, 1, -5], np.int32)


def _hides(s: Any, q: Any, k: Any, b: Any, h: Any) -> Any:
    """Every third pair is hidden, and all pairs of every fifth query."""
    gone = ((q + k) % 3 == 0) | (q % 5 == 4)
    return tilefold.where(gone, float("-inf"), s * tilefold.sigmoid(s) + 0.1 * h)


def _hides_formula(s: Array, at: Pairs) -> Array:
    gone = ((at.q + at.k) % 3 == 0) | (at.q % 5 == 4)
    return np.where(gone, -np.inf, s / (1 + np.exp(-s)) + 0.1 * at.h)


def _functions(s: Any, q: Any, k: Any, b: Any, h: Any) -> Any:
    """All functions of the language."""
    near = tilefold.minimum(tilefold.exp(-abs(s)), tilefold.sqrt(1 + s * s) / 2)
    return tilefold.maximum(near - tilefold.log(2 + s * s), s / (1.5 + b))


def _functions_formula(s: Array, at: Pairs) -> Array:
    near = np.minimum(np.exp(-np.abs(s)), np.sqrt(1 + s * s) / 2)
    return np.maximum(near - np.log(2 + s * s), s / (1.5 + at.b))


VARIANTS = {
    "softcap": Variant(
        lambda: tilefold.softcap(1.5),
        lambda s, at: 1.5 * np.tanh(s / 1.5),
        mask=causal(),
        visible=_past,
    ),
    "alibi": Variant(
        lambda: tilefold.alibi(),
        lambda s, at: s - 2.0 ** (-8 * (at.h + 1) / at.sizes.heads) * np.abs(at.distance),
        few=True,
    ),
    "alibi of one's own slopes": Variant(
        lambda slopes: tilefold.alibi(slopes),
        lambda s, at, slopes: s - slopes[at.b, at.h] * np.abs(at.distance),
        lambda n, normal: (np.abs(normal(n.batch, n.heads)),),
        mask=local(9),
        visible=lambda at: np.abs(at.distance) < 9,
    ),
    "full bias": Variant(
        lambda array: tilefold.bias(array),
        lambda s, at, array: s + array[at.b, at.h, at.q, at.k],
        lambda n, normal: (normal(n.batch, n.heads, n.len_q, n.len_k),),
        mask=causal(),
        visible=_past,
    ),
    "bias of keys": Variant(
        lambda keys: tilefold.bias(keys),
        lambda s, at, keys: s + keys[at.b, 0, 0, at.k],
        lambda n, normal: (normal(n.batch, 1, 1, n.len_k, dtype="float16"),),
    ),
    "bias that hides": Variant(
        lambda array: tilefold.bias(array),
        lambda s, at, array: s + array[at.h, at.q, at.k],
        _hiding,
        sinks=1,
    ),
    "temperature": Variant(
        lambda: tilefold.temperature(0.7),
        lambda s, at: s / 0.7,
        mask=lengths(11),
        visible=lambda at: at.k < 11,
    ),
    "learned temperature": Variant(
        lambda rows: tilefold.temperature(rows),
        lambda s, at, rows: s / rows[at.h, at.q, 0],
        lambda n, normal: (1 + normal(n.heads, n.len_q, 1) ** 2,),
    ),
    "relative bias": Variant(
        lambda table: tilefold.relative_bias(table),
        lambda s, at, table: s + table[at.h, _buckets(at)],
        lambda n, normal: (normal(n.heads, 32),),
    ),
    "distance bias": Variant(
        lambda table: tilefold.distance_bias(table),
        lambda s, at, table: s + table[0, np.clip(at.distance, -2000, 2000) + 2000],
        lambda n, normal: (normal(1, 4001),),
        mask=causal() | chunked(8),
        visible=lambda at: _past(at) | (at.q // 8 == at.k // 8),
    ),
    "window bias": Variant(
        lambda table: tilefold.window_bias(table),
        _swin,
        lambda n, normal: (normal(n.heads, 2 * _window(n)[0] - 1, 2 * _window(n)[1] - 1),),
        grid=True,
    ),
    "score of one's own": Variant(
        _own,
        _own_formula,
        lambda n, normal: (normal(n.batch, n.len_q // 4 + 1, n.len_k // 4 + 1), normal(7)),
        mask=causal(),
        visible=_past,
    ),
    "score that hides": Variant(lambda: tilefold.score(_hides), _hides_formula),
    "all functions": Variant(lambda: tilefold.score(_functions), _functions_formula),
    "several in order": Variant(
        lambda heat, rows: [
            tilefold.temperature(heat),
            tilefold.bias(rows),
            tilefold.softcap(2.0),
        ],
        lambda s, at, heat, rows: 2 * np.tanh((s / heat[at.h, 0, 0] + rows[at.q, 0]) / 2),
        lambda n, normal: (
            np.exp(normal(n.heads, 1, 1, dtype="bfloat16")),
            normal(n.len_q, 1, dtype="bfloat16"),
        ),
    ),
    "sinks": Variant(
        mask=causal() & local(9) & tilefold.rule(lambda q, k: q % 7 != 3),
        visible=lambda at: _past(at) & (at.distance > -9) & (at.q % 7 != 3),
        sinks=2,
    ),
    "dropout": Variant(mask=causal(), visible=_past, dropout=0.3),
    "all together": Variant(
        lambda slopes, array: [
            tilefold.softcap(3.0),
            tilefold.alibi(slopes),
            tilefold.bias(array),
        ],
        lambda s, at, slopes, array: (
            3 * np.tanh(s / 3)
            - slopes[at.h] * np.abs(at.distance)
            + array[at.h, at.q, at.k]
        ),
        lambda n, normal: (normal(n.heads), normal(n.heads, n.len_q, n.len_k)),
        mask=causal() & local(13),
        visible=lambda at: _past(at) & (at.distance > -13),
        sinks=1,
        dropout=0.3,
    ),
}  # fmt: skip


def lengths_of(variant: Variant, len_q: int, len_k: int) -> tuple[int, int]:
    """The lengths of a variant where others have these."""
    if variant.grid:
        return len_q // 5 * 5, len_q // 5 * 5
    return (3 if variant.few else len_q), len_k


def arrays_of(variant: Variant, sizes: Sizes) -> tuple[Array, ...]:
    """The arrays of a variant at these sizes: every second element of others."""
    random = np.random.default_rng([sizes.len_q, sizes.len_k])

    def normal(*shape: int, dtype: str = "float32") -> Array:
        return random.normal(size=(*shape[:-1], 2 * shape[-1])).astype(dtype)[..., ::2]

    return variant.arrays(sizes, normal)


def score_of(name: str, sizes: Sizes) -> Score | None:
    """The score of a variant at these sizes."""
    variant = VARIANTS[name]
    made = variant.score and variant.score(*arrays_of(variant, sizes))
    return as_score(made)


def dense(
    variant: Variant,
    given: dict[str, Array],
    arrays: tuple[Array, ...],
    scale: float,
    keep: Array | None,
) -> dict[str, Array]:
    """o, lse and max by the formulas; `given` has q, k, v and perhaps sinks, all in float64.

    `keep` are the factors of dropout.
    """
    q, k, v = (given[name] for name in ("q", "k", "v"))
    k, v = (array.repeat(q.shape[1] // k.shape[1], axis=1) for array in (k, v))
    s = scale * q @ k.swapaxes(2, 3)
    at = Pairs(*np.ogrid[tuple(map(slice, s.shape))], Sizes(*s.shape))
    s = np.where(variant.visible(at), variant.formula(s, at, *arrays), -np.inf)
    sunk = np.exp(given.get("sinks", np.zeros((1, 0)))).sum(axis=1)[:, None]
    with np.errstate(divide="ignore"):
        total = np.exp(s).sum(axis=3) + sunk
        lse = np.log(total)
    p = np.exp(s) / np.where(total, total, 1)[..., None]
    return {"o": (p if keep is None else p * keep) @ v, "lse": lse, "max": s.max(axis=3)}
