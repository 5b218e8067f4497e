"""Random masks for property tests: sizes, a rule that fits them, and its meaning pair by pair.

A case has its own definition, `sees(b, h, q, k)` for every pair, in plain Python integers and
independent of the package. So a test can compare any fold of the rule with the definition.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tilefold.masks import data_rules, position_rules
from tilefold.masks.rule import Rule

# No time limit per example: a busy machine is not a failing test.
settings.register_profile("tilefold", deadline=None)
settings.load_profile("tilefold")

Sees = Callable[[int, int, int, int], bool]
SYNCS = ("none_front", "scale_front", "scale_end")


@dataclass(frozen=True)
class Sizes:
    """The sizes of a problem; the grids are None for 1-D sequences."""

    batch: int
    heads: int
    len_q: int
    len_k: int
    grid_q: tuple[int, int] | None = None
    grid_k: tuple[int, int] | None = None


@dataclass(frozen=True)
class Case:
    """A rule, sizes that it fits, and its definition."""

    rule: Rule
    sizes: Sizes
    sees: Sees

    def dense(self) -> NDArray[np.bool_]:
        """The definition as an array (batch, heads, len_q, len_k)."""
        s = self.sizes
        shape = (s.batch, s.heads, s.len_q, s.len_k)
        return np.array([self.sees(*index) for index in np.ndindex(shape)], bool).reshape(shape)


def coordinate(
    size_q: int, size_k: int, sync: str
) -> tuple[Callable[[int], int], Callable[[int], int]]:
    """The coordinates of query and key along one dimension."""
    longest = max(size_q, size_k)
    step_q, step_k = longest // size_q, longest // size_k
    if sync == "none_front":
        return (lambda i: i), (lambda j: j)
    if sync == "none_end":
        return (lambda i: i + size_k - size_q), (lambda j: j)
    if sync == "scale_front":
        return (lambda i: i * step_q), (lambda j: j * step_k)
    return (lambda i: (i + 1) * step_q - 1), (lambda j: (j + 1) * step_k - 1)


def places(sizes: Sizes, sync: str) -> tuple[Callable[[int], Any], Callable[[int], Any]]:
    """The coordinates of query and key as tuples, one integer per dimension."""
    if sizes.grid_q is None or sizes.grid_k is None:
        place_q, place_k = coordinate(sizes.len_q, sizes.len_k, sync)
        return (lambda q: (place_q(q),)), (lambda k: (place_k(k),))
    rows = coordinate(sizes.grid_q[0], sizes.grid_k[0], sync)
    columns = coordinate(sizes.grid_q[1], sizes.grid_k[1], sync)
    width_q, width_k = sizes.grid_q[1], sizes.grid_k[1]
    return (
        lambda q: (rows[0](q // width_q), columns[0](q % width_q)),
        lambda k: (rows[1](k // width_k), columns[1](k % width_k)),
    )


def sees_causal(sizes: Sizes, sync: str) -> Sees:
    place_q, place_k = places(sizes, sync)
    return lambda b, h, q, k: place_q(q) >= place_k(k)  # tuples compare in raster order


def sees_local(sizes: Sizes, sync: str, window: int, stride: int, causal: bool) -> Sees:
    place_q, place_k = places(sizes, sync)
    ordered = sees_causal(sizes, sync)

    def sees(b: int, h: int, q: int, k: int) -> bool:
        apart = [abs(x - y) for x, y in zip(place_q(q), place_k(k), strict=True)]
        near = all(d % stride == 0 and d // stride < window for d in apart)
        return near and (not causal or ordered(b, h, q, k))

    return sees


@st.composite
def all_sizes(draw: st.DrawFn, longest: int = 24) -> Sizes:
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    if draw(st.booleans()):
        length = st.integers(1, longest)
        return Sizes(batch, heads, draw(length), draw(length))
    side = st.integers(1, max(1, int(longest**0.5) + 1))
    grid_q, grid_k = draw(st.tuples(side, side)), draw(st.tuples(side, side))
    return Sizes(batch, heads, grid_q[0] * grid_q[1], grid_k[0] * grid_k[1], grid_q, grid_k)


@st.composite
def _positions(draw: st.DrawFn, sizes: Sizes) -> tuple[Rule, Sees]:
    """causal and local, with every way to align or synchronise."""
    grids = {}
    if sizes.grid_q is not None:
        if draw(st.booleans()):
            grids = {"grid_q": sizes.grid_q, "grid_k": sizes.grid_k}
        else:
            sizes = Sizes(sizes.batch, sizes.heads, sizes.len_q, sizes.len_k)
    way = draw(st.sampled_from(("end", "start", *SYNCS)))
    given = {"sync": way} if way in SYNCS else {"align": way}
    sync = {"end": "none_end", "start": "none_front"}.get(way, way)
    if draw(st.booleans()):
        return position_rules.causal(**given, **grids), sees_causal(sizes, sync)
    window, stride = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    ordered = draw(st.booleans())
    rule = position_rules.local(window, stride, causal=ordered, **given, **grids)
    return rule, sees_local(sizes, sync, window, stride, ordered)


@st.composite
def _plain(draw: st.DrawFn, sizes: Sizes) -> tuple[Rule, Sees]:
    """full, prefix, chunked, and lengths with one integer."""
    number = draw(st.integers(0, sizes.len_k + 2))
    match draw(st.sampled_from(("full", "prefix", "chunked", "lengths"))):
        case "full":
            return position_rules.full(), lambda b, h, q, k: True
        case "prefix":
            return position_rules.prefix(number), lambda b, h, q, k: k < number
        case "chunked":
            size = number + 1
            return position_rules.chunked(size), lambda b, h, q, k: q // size == k // size
    return _lengths(draw, sizes, min(number, sizes.len_k))


def _lengths(draw: st.DrawFn, sizes: Sizes, n_k: Any) -> tuple[Rule, Sees]:
    """lengths with padding on either side; n_k is an integer, or an array with one per entry."""
    ends, len_k = np.broadcast_to(n_k, sizes.batch), sizes.len_k
    if draw(st.booleans()):
        return data_rules.lengths(n_k), lambda b, h, q, k: bool(k < ends[b])
    left = data_rules.lengths(n_k, side="left")
    return left, lambda b, h, q, k: bool(k >= len_k - ends[b])


@st.composite
def _ended(draw: st.DrawFn, sizes: Sizes, n_k: Any) -> tuple[Rule, Sees]:
    """causal and local whose last query meets the last key of its batch entry."""
    ends = np.broadcast_to(n_k, sizes.batch)

    def apart(b: int, q: int, k: int) -> int:
        return int(ends[b]) - 1 - (sizes.len_q - 1 - q) - k

    if draw(st.booleans()):
        return position_rules.causal(lengths=n_k), lambda b, h, q, k: apart(b, q, k) >= 0
    window, stride = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    ordered = draw(st.booleans())

    def sees(b: int, h: int, q: int, k: int) -> bool:
        steps, rest = divmod(abs(apart(b, q, k)), stride)
        return rest == 0 and steps < window and (not ordered or apart(b, q, k) >= 0)

    return position_rules.local(window, stride, causal=ordered, lengths=n_k), sees


@st.composite
def _data(draw: st.DrawFn, sizes: Sizes) -> tuple[Rule, Sees]:
    """documents, lengths, coordinates that end at lengths, and dense."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    match draw(st.sampled_from(("documents", "lengths", "ended", "dense"))):
        case "documents":
            sides = []
            for length in (sizes.len_q, sizes.len_k):
                shape = (sizes.batch, length) if draw(st.booleans()) else (length,)
                ids = random.integers(-2, 3, shape)
                sides.append(np.sort(ids) if draw(st.booleans()) else ids)
            whole = [np.broadcast_to(ids, (sizes.batch, ids.shape[-1])) for ids in sides]
            if draw(st.booleans()):
                return (
                    data_rules.documents(*sides),
                    lambda b, h, q, k: bool(whole[0][b, q] == whole[1][b, k]),
                )

            def later(side: int, b: int, i: int) -> int:
                ids = whole[side][b]
                return int((ids[i + 1 :] == ids[i]).sum())

            return (
                data_rules.documents(*sides, causal=True),
                lambda b, h, q, k: bool(
                    whole[0][b, q] == whole[1][b, k] and later(0, b, q) <= later(1, b, k)
                ),
            )
        case "lengths" | "ended" as kind:
            n_k: Any = random.integers(0, sizes.len_k + 1, sizes.batch)
            if draw(st.booleans()):
                n_k = int(n_k[0])
            if kind == "ended":
                return draw(_ended(sizes, n_k))
            return _lengths(draw, sizes, n_k)
    shape = (sizes.batch, sizes.heads, sizes.len_q, sizes.len_k)
    given = tuple(size if draw(st.booleans()) else 1 for size in shape)
    given = given[draw(st.integers(0, 3)) :]
    array = random.random(given) < draw(st.sampled_from((0.02, 0.5, 0.98)))
    return data_rules.dense(array), lambda b, h, q, k: bool(
        np.broadcast_to(array, shape)[b, h, q, k]
    )


Formula = Callable[[Any, Any, Any, Any], Any]


@st.composite
def _numbers(draw: st.DrawFn, depth: int) -> Formula:
    """Integer functions of the indices, which take Python's integers and symbols."""
    kind = draw(st.sampled_from(("index", "constant", "binary", "divide", "abs", "negate")))
    if depth == 0 or kind == "index":
        which = draw(st.integers(0, 3))
        return lambda *indices: indices[which]
    if kind == "constant":
        value = draw(st.integers(-9, 9))
        return lambda *indices: value
    left = draw(_numbers(depth - 1))
    if kind == "abs":
        return lambda *indices: abs(left(*indices))
    if kind == "negate":
        return lambda *indices: -left(*indices)
    if kind == "divide":
        apply = draw(st.sampled_from((operator.floordiv, operator.mod)))
        divisor = draw(st.integers(1, 7))
        return lambda *indices: apply(left(*indices), divisor)
    join = draw(st.sampled_from((operator.add, operator.sub, operator.mul)))
    right = draw(_numbers(depth - 1))
    return lambda *indices: join(left(*indices), right(*indices))


@st.composite
def _truths(draw: st.DrawFn, depth: int) -> Formula:
    kind = draw(st.sampled_from(("compare", "&", "|", "~")))
    if depth == 0 or kind == "compare":
        names = (operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne)
        compare = draw(st.sampled_from(names))
        first, second = draw(_numbers(2)), draw(_numbers(2))
        return lambda *indices: _truth(compare(first(*indices), second(*indices)))
    left = draw(_truths(depth - 1))
    if kind == "~":
        return lambda *indices: ~left(*indices)
    join = operator.and_ if kind == "&" else operator.or_
    right = draw(_truths(depth - 1))
    return lambda *indices: join(left(*indices), right(*indices))


def _truth(value: Any) -> Any:
    return np.bool_(value) if isinstance(value, bool) else value


@st.composite
def traced(draw: st.DrawFn) -> tuple[Rule, Sees]:
    """A user's own rule with a random body."""
    formula = draw(_truths(2))
    return (
        position_rules.rule(lambda b, h, q, k: formula(b, h, q, k)),
        lambda b, h, q, k: bool(formula(b, h, q, k)),
    )


@st.composite
def _composed(draw: st.DrawFn, sizes: Sizes, depth: int, data: bool) -> tuple[Rule, Sees]:
    kind = draw(st.sampled_from(("leaf", "&", "|", "~"))) if depth else "leaf"
    if kind == "leaf":
        leaves = [_positions(sizes), _positions(sizes), _plain(sizes), traced()]
        return draw(st.one_of(*leaves, *([_data(sizes)] if data else [])))
    rule, sees = draw(_composed(sizes, depth - 1, data))
    if kind == "~":
        return ~rule, lambda b, h, q, k: not sees(b, h, q, k)
    other, sees_other = draw(_composed(sizes, depth - 1, data))
    if kind == "&":
        return rule & other, lambda b, h, q, k: sees(b, h, q, k) and sees_other(b, h, q, k)
    return rule | other, lambda b, h, q, k: sees(b, h, q, k) or sees_other(b, h, q, k)


@st.composite
def cases(draw: st.DrawFn, longest: int = 24, depth: int = 2, data: bool = True) -> Case:
    """Random compositions of all rules, on 1-D and 2-D sequences; with arrays only if `data`."""
    sizes = draw(all_sizes(longest))
    rule, sees = draw(_composed(sizes, depth, data))
    return Case(rule, sizes, sees)
