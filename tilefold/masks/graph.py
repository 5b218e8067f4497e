"""Graphs of nodes, walked without recursion: each node once, after the nodes that it is made of.

Expressions and joined rules are such graphs. A node may be a part of many others, so a graph of n
nodes may have 2^n of them when it is written out as a tree, and it may be n levels deep. Whatever
is no `Node` is a leaf, which stands for itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import Any

WRITTEN_OUT = 1000
"""The largest tree, in nodes, whose text repeats what occurs twice; it fills about two pages."""

LEVELS = 60
"""The deepest text without names. Python reads 200 levels of parentheses, `parse` 150 levels."""

FEW = 100
"""The largest tree, in nodes, that is walked without a look at what it shares: in half the time."""

SHALLOW = 8
"""The most levels of joined rules that are compared by recursion, in half the time."""

INLINE = 8
"""The longest shared part, in characters, that is repeated in a text with names."""


class Node:
    """A value made of other ones; a frozen dataclass."""

    @property
    def children(self) -> tuple[Any, ...]:
        """The nodes and leaves that this node is made of."""
        return ()

    @property
    def label(self) -> tuple[Any, ...]:
        """All that a node is beside its class and its children."""
        return ()

    @classmethod
    def made(cls, label: tuple[Any, ...], children: tuple[Any, ...]) -> Any:
        """The node with this label and these children."""
        return cls(*label, *children)

    def spelled(self, below: tuple[str, ...]) -> str:
        """The node as text, given the texts of its children: a name stands for a child."""
        return f"{type(self).__name__}({', '.join([*map(repr, self.label), *below])})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies are made from rows: neither `pickle` nor `deepcopy` walks down the graph."""
        return restored, (_rows(self),)


Ordered = Sequence[tuple[Any, tuple[Any, ...]]]
"""Nodes of a graph with their children, each after its children, from left to right."""


def ordered(root: Any, known: Container[int] = ()) -> Ordered:
    """The nodes of a graph and the leaves; the order of a whole graph is kept with its root.

    `known` has the `id` of nodes that are left out with all that only they are made of.
    """
    if known or not isinstance(root, Node):
        return _walk(root, known)
    fields = vars(root)
    kept = fields.get("_below")
    if kept is None:  # without the root, which would keep itself
        kept = fields["_below"] = tuple(_walk(root)[:-1])
    return (*kept, (root, root.children))


def _walk(root: Any, known: Container[int] = ()) -> Ordered:
    # Most graphs are small trees: all places of the tree, then the first place of each node.
    places: list[tuple[Any, tuple[Any, ...]]] = []
    pending = [root]
    while pending and len(places) < FEW:
        node = pending.pop()
        children = node.children if isinstance(node, Node) and id(node) not in known else ()
        places.append((node, children))
        pending.extend(children)
    if pending:
        return _walk_once(root, known)
    places.reverse()
    first = {id(place[0]): place for place in places}
    return (
        [place for key, place in first.items() if key not in known] if known else [*first.values()]
    )


def _walk_once(root: Any, known: Container[int]) -> Ordered:
    order: list[tuple[Any, tuple[Any, ...]]] = []
    seen: set[int] = set()
    stack: list[tuple[Any, tuple[Any, ...] | None]] = [(root, None)]
    while stack:
        node, children = stack.pop()
        if children is not None:
            order.append((node, children))
        elif id(node) not in seen:
            seen.add(id(node))
            children = node.children if isinstance(node, Node) else ()
            stack.append((node, children))
            for child in reversed(children):
                if id(child) not in seen and id(child) not in known:
                    stack.append((child, None))
    return order


def same(one: Any, other: Any) -> bool:
    """True for graphs that are the same tree, whatever they share.

    Nodes that were met at one place are taken for equal from then on, so each pair of them joins
    two classes of nodes (Hopcroft and Karp, "A Linear Algorithm for Testing Equivalence of Finite
    Automata", 1971).
    """
    classes: dict[int, int] = {}
    pairs = [(one, other)]
    while pairs:
        left, right = pairs.pop()
        if not isinstance(left, Node):
            if left != right:
                return False
            continue
        if type(left) is not type(right) or left.label != right.label:
            return False
        first, second = _class_of(left, classes), _class_of(right, classes)
        if first != second:
            classes[second] = first
            below, beside = left.children, right.children
            if len(below) != len(beside):
                return False
            pairs.extend(
                [pair for pair in zip(below, beside, strict=True) if pair[0] is not pair[1]]
            )
    return True


def _class_of(node: Any, classes: Mapping[int, int]) -> int:
    number = id(node)
    while number in classes:
        number = classes[number]
    return number


def hashed(root: Any) -> int:
    """A hash that is equal for graphs that are the same tree, whatever they share."""
    hashes: dict[int, int] = {}
    for node, children in ordered(root):
        below = [hashes[id(child)] for child in children]
        whole = (type(node), node.label, *below) if isinstance(node, Node) else node
        hashes[id(node)] = hash(whole)
    return hashes[id(root)]


def keep_hash(root: Any) -> None:
    """Keep the hash and the level of a joined rule, and of all that it is made of, as fields."""
    stack = [root]
    while stack:
        node, level = stack[-1], 1
        parts = node.children
        waiting = [part for part in parts if part._level < 0]
        if waiting:
            stack.extend(waiting)
            continue
        for part in parts:
            level = max(level, part._level + 1)
        fields = vars(stack.pop())
        fields["_hash"] = hash((type(node), node.label, parts))
        fields["_level"] = level


def restored(rows: tuple[Any, ...]) -> Any:
    """The graph of these rows."""
    nodes: list[Any] = []
    for row in rows:
        if isinstance(row, tuple):
            kind, label, numbers = row
            row = kind.made(label, tuple(nodes[number] for number in numbers))
        nodes.append(row)
    return nodes[-1]


def _rows(root: Any) -> tuple[Any, ...]:
    """The rows that `restored` makes a graph of that shares what this one shares."""
    rows: list[Any] = []
    numbers: dict[int, int] = {}
    for node, children in ordered(root):
        row = node
        if isinstance(node, Node):
            row = type(node), node.label, tuple([numbers[id(child)] for child in children])
        numbers[id(node)] = len(rows)
        rows.append(row)
    return tuple(rows)


def spell(root: Any) -> str:
    """A graph as text whose length grows with the nodes of the graph; Python can read it again.

    A graph that is a small tree is written out. In others, parts that occur twice and parts at
    every 60th level come first, with names: `(x0 := (q + q), x1 := (x0 + x0), (x1 >= k))[-1]`.
    """
    order = ordered(root)
    short = _written_out(order) if len(order) <= LEVELS else ""
    return short or _with_names(order)


def _written_out(order: Ordered) -> str:
    """The text without names; "" where it has more than `WRITTEN_OUT` characters."""
    texts: dict[int, str] = {}
    text = ""
    for node, children in order:
        texts[id(node)] = text = _spelled(node, children, texts)
        if len(text) > WRITTEN_OUT:
            return ""
    return text


def _with_names(order: Ordered) -> str:
    root = order[-1][0]
    parents = Counter(id(child) for _, children in order for child in children)
    size: dict[int, int] = {}
    for node, children in order:
        size[id(node)] = 1 + sum([size[id(child)] for child in children])
    shares = size[id(root)] > WRITTEN_OUT
    texts: dict[int, str] = {}
    levels: dict[int, int] = {}
    named: list[str] = []
    for node, children in order:
        text = _spelled(node, children, texts)
        level = 1 + max([levels[id(child)] for child in children], default=0)
        twice = shares and parents[id(node)] > 1 and len(text) > INLINE
        if node is not root and (twice or level > LEVELS):
            name = f"x{len(named)}"
            named.append(f"{name} := {text}")
            text, level = name, 0
        texts[id(node)], levels[id(node)] = text, level
    whole = texts[id(root)]
    return f"({', '.join([*named, whole])})[-1]" if named else whole


def _spelled(node: Any, children: tuple[Any, ...], texts: Mapping[int, str]) -> str:
    if not isinstance(node, Node):
        return repr(node)
    return node.spelled(tuple([texts[id(child)] for child in children]) if children else ())
