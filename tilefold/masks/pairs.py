"""How an expression depends on the query and the key of a pair.

Kernels compute what is the same along a diagonal (where query and key move together, as in ALiBi
and T5) once for each diagonal of a tile, and read entries [.., q, k] of an array a tile at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilefold.masks.expression import (
    Binary,
    Constant,
    Expression,
    Index,
    Integer,
    Parameter,
    Real,
    RealLookup,
    ScoreValue,
    Several,
    Unary,
    names,
)
from tilefold.masks.graph import ordered


def diagonals(expression: Expression) -> list[Expression]:
    """The largest parts that are the same for all pairs of a diagonal, and worth keeping.

    >>> q, k, s = Index("q"), Index("k"), ScoreValue()
    >>> diagonals(s * (0.5 * abs(k - q)) + q)
    [(0.5 * abs((k - q)))]
    """
    steps: dict[int, int | None] = {}
    found: dict[int, Expression] = {}
    for node, children in ordered(expression):
        step = steps[id(node)] = _step(node, [steps[id(child)] for child in children])
        if step is None or not _is_kept(node):
            for child in children:
                if steps[id(child)] == 0 and _is_kept(child):
                    found[id(child)] = child
    return list(found.values())


def _is_kept(node: Expression) -> bool:
    """True for real numbers, and integers that are read from a table."""
    if not isinstance(node, Real | Integer) or not names(node) >= {"q", "k"}:
        return False
    return isinstance(node, Real) or any(hasattr(part, "table") for part, _ in ordered(node))


def _step(node: Expression, below: Sequence[int | None]) -> int | None:
    """By how much a node changes where both query and key move by one; None if that differs."""
    if isinstance(node, Index):
        return int(node.name in ("q", "k"))
    if isinstance(node, ScoreValue | Several) or None in below:
        return None
    steps = [step for step in below if step is not None]
    if isinstance(node, Binary) and node.operator in ("+", "-"):
        return steps[0] + steps[1] if node.operator == "+" else steps[0] - steps[1]
    if isinstance(node, Unary) and node.operator == "-":
        return -steps[0]
    if isinstance(node, Constant | Parameter):
        return 0
    return None if any(steps) else 0


def kept_apart(reads: Sequence[Sequence[Expression]]) -> frozenset[str]:
    """The indices that keep the entries of their values apart: alone on an axis of every look-up.

    >>> q, k, h = Index("q"), Index("k"), Index("h")
    >>> sorted(kept_apart([[h, q], [h, k]]))
    ['h']
    """
    columns = [set(map(_plain, column)) for column in zip(*reads, strict=True)]
    return frozenset({name for column in columns if len(column) == 1 for name in column if name})


def _plain(node: Expression) -> str:
    """The name of an index; "" for other nodes."""
    return node.name if isinstance(node, Index) else ""


def is_dense(indices: Sequence[Expression]) -> bool:
    """True for [.., q, k] in any order, where the other indices are the same for all pairs.

    >>> q, k, h = Index("q"), Index("k"), Index("h")
    >>> is_dense([h, q, k]), is_dense([h, q + 1, k])
    (True, False)
    """
    plain = [x.name for x in indices if isinstance(x, Index) and x.name in ("q", "k")]
    others = [x for x in indices if not (isinstance(x, Index) and x.name in ("q", "k"))]
    return sorted(plain) == ["k", "q"] and not any(names(x) & {"q", "k"} for x in others)


def dense_lookups(expression: Expression) -> list[RealLookup]:
    """The look-ups [.., q, k] of floats in an expression."""
    nodes = [node for node, _ in ordered(expression)]
    return [node for node in nodes if isinstance(node, RealLookup) and is_dense(node.indices)]
