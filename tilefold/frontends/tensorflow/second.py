"""Second derivatives: the gradients of a backward pass, in TensorFlow's own operations.

The rows of queries are independent, so they are computed block by block, one after the other:

    for each block of queries
        dq, dk, dv, ...  = gradients of sum(do * o) + sum(dlse * lse), by a tape
        its part of the gradients of sum(dq * slope of dq) + sum(dk * slope of dk) + ..., by a tape
        parts of rows are joined; parts of keys, values and arrays are added

Memory grows with the block, of which a row has all keys, and not with the product of the lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from tilefold.backends.protocols import Pass
from tilefold.frontends.tensorflow.pairs import of_rows, problem_of, statistics
from tilefold.problems.attention import Problem
from tilefold.problems.request import LAYOUTS, Request

Tensor = Any
Named = Mapping[str, Tensor]

SCORES = 2**22
"""Scores of a block: 16 MiB in float32, of which about 20 arrays live at once. It is not tuned."""

_ROWS = ("q", "do", "dlse")
"""What has a row for each query. o, lse and lse_low are functions of the others."""

_NOT_FORWARD = ("do", "o", "lse", "lse_low", "dlse")
"""What a backward pass is given that its forward pass was not given."""


def second_gradients(
    wanted: Pass, request: Request, given: Sequence[Tensor], slopes: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients of what a backward pass is given; `slopes` are those of its results.

    o, lse and lse_low have none of their own.
    """
    named = dict(zip(wanted.given, given, strict=True))
    results = [name.removeprefix("d") for name in wanted.results]
    known = {name: x for name, x in named.items() if name not in _NOT_FORWARD}
    problem, kind = problem_of(request, known), statistics(named["q"])

    def turned(name: str, x: Tensor) -> Tensor:
        """A tensor with canonical axes, in the type of lse."""
        plain = name in ("q", "k", "v", "do")
        return tf.cast(tf.transpose(x, LAYOUTS[request.layout]) if plain else x, kind)

    arrays = [name for name in named if name.startswith(("input", "sinks"))]
    leaves = [name for name in named if name in (*"kv", *_ROWS, *arrays)]
    every = {name: turned(name, x) if name in leaves else x for name, x in named.items()}
    along = {name: turned(name, x) for name, x in zip(results, slopes, strict=True)}

    def block(start: Any, length: int) -> list[Tensor]:
        return _block(problem, every, along, leaves, start, length)

    found = dict(zip(leaves, _joined(problem, leaves, block), strict=True))
    back = {name: tf.cast(turned(name, x), named[name].dtype) for name, x in found.items()}
    return [back.get(name) for name in wanted.given]


def _block(
    problem: Problem, every: Named, along: Named, leaves: Sequence[str], start: Any, length: int
) -> list[Tensor]:
    """The part of some queries in the gradients of the leaves."""

    def rows(name: str, x: Tensor) -> Tensor:
        if name not in _ROWS:
            return x
        begin = [0, 0, start] + [0] * (len(x.shape) - 3)
        return tf.slice(x, begin, [*x.shape[:2], length, *x.shape[3:]])

    parts = {name: rows(name, x) for name, x in every.items()}
    first = [parts[name] for name in along]
    with tf.GradientTape() as outer:
        outer.watch([parts[name] for name in leaves])
        with tf.GradientTape() as inner:
            inner.watch(first)
            o, lse, _ = of_rows(problem, parts, start)
            loss = tf.reduce_sum(o * parts["do"])
            if "dlse" in parts:
                seen = tf.where(tf.math.is_inf(lse), tf.zeros_like(lse), lse)
                loss += tf.reduce_sum(seen * parts["dlse"])
        gradients = inner.gradient(loss, first, unconnected_gradients="zero")
        total = tf.add_n(
            [
                tf.reduce_sum(gradient * rows(name, along[name]))
                for name, gradient in zip(along, gradients, strict=True)
            ]
        )
    found: list[Tensor] = outer.gradient(
        total, [parts[name] for name in leaves], unconnected_gradients="zero"
    )
    return found


def _joined(
    problem: Problem, leaves: Sequence[str], block: Callable[[Any, int], list[Tensor]]
) -> list[Tensor]:
    """The gradients of the leaves, of all blocks one after the other."""
    width = problem.batch * problem.heads_q * max(1, problem.len_k)
    length = max(16, SCORES // width)
    count, rest = divmod(problem.len_q, length)
    last = block(count * length, rest) if rest or not count else None
    if not count:
        assert last is not None
        return last

    def step(number: Tensor, found: list[Any]) -> tuple[Tensor, list[Any]]:
        parts = block(number * length, length)
        return number + 1, [
            old.write(number, part) if name in _ROWS else old + part
            for name, old, part in zip(leaves, found, parts, strict=True)
        ]

    first = block(0, length)
    begun = [
        tf.TensorArray(part.dtype, count, element_shape=part.shape).write(0, part)
        if name in _ROWS
        else part
        for name, part in zip(leaves, first, strict=True)
    ]
    _, found = tf.while_loop(
        lambda number, _: number < count, step, (tf.constant(1), begun), parallel_iterations=1
    )
    results = []
    for place, name in enumerate(leaves):
        if name in _ROWS:
            joined = tf.concat(tf.unstack(found[place].stack(), count), axis=2)
            results.append(joined if last is None else tf.concat((joined, last[place]), axis=2))
        else:
            results.append(found[place] if last is None else found[place] + last[place])
    return results
