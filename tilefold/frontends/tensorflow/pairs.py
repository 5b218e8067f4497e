"""Attention of all pairs at once, in TensorFlow's own operations: scores, mask, softmax, products.

Its memory grows with the product of the lengths, and its derivatives of any order are TensorFlow's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tilefold.backends.arrays import described
from tilefold.backends.arrays.described import Described
from tilefold.backends.calls import check_extra
from tilefold.frontends.tensorflow.dropped import factors
from tilefold.masks.expression import AnyTable, Expression, Interpretation, evaluate
from tilefold.masks.hiding import may_hide
from tilefold.masks.tables import Given, Input, Table
from tilefold.planning.masked import MaskedProblem
from tilefold.problems.attention import STATISTICS, Problem, describe
from tilefold.problems.request import LAYOUTS, Request

Tensor = Any


def statistics(tensor: Tensor) -> tf.DType:
    """The type of lse where a tensor is q."""
    return tf.as_dtype(STATISTICS[tensor.dtype.name])


def whole(request: Request, named: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """o, lse and the largest scores; `named` are q, k, v and the extra tensors.

    A query that sees no key has o = 0, lse = -inf and gradients 0.
    """
    axes, q = LAYOUTS[request.layout], named["q"]
    turned = {name: tf.cast(tf.transpose(named[name], axes), statistics(q)) for name in "qkv"}
    o, lse, largest = of_rows(problem_of(request, named), {**named, **turned}, 0)
    return tf.cast(tf.transpose(o, axes), q.dtype), lse, largest


def of_rows(
    problem: Problem, named: Mapping[str, Tensor], start: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`whole` for the queries of a problem from `start` on, as many as q has.

    q, k and v have canonical axes, and the type of lse, as the results have.
    """
    q, k, v = (named[name] for name in "qkv")
    rows = (problem.batch, problem.heads_q, q.shape[2])
    places = np.ogrid[tuple(map(slice, (*rows, problem.len_k)))]
    indices = {name: tf.constant(x, tf.int64) for name, x in zip("bhqk", places, strict=True)}
    indices["q"] += tf.cast(start, tf.int64)
    grouped = tf.reshape(q, (problem.batch, problem.heads_kv, -1, problem.dim))
    products = tf.matmul(grouped, k, transpose_b=True)
    s = problem.scale * tf.reshape(products, (*rows, problem.len_k))
    s = _masked(problem, s, indices, named)
    largest = tf.reduce_max(tf.stop_gradient(s), axis=3)
    if problem.sinks:
        sinks = tf.broadcast_to(named["sinks"][:, None], (*rows, problem.sinks))
        s = tf.concat((s, sinks), axis=3)
    top = tf.stop_gradient(tf.reduce_max(s, axis=3, keepdims=True))
    shift = tf.where(tf.math.is_inf(top) & (top < 0), tf.zeros_like(top), top)
    p = tf.exp(s - shift)
    total = tf.reduce_sum(p, axis=3, keepdims=True)
    nothing = total == 0
    total = tf.where(nothing, tf.ones_like(total), total)
    lse = tf.where(nothing, tf.constant(-math.inf, s.dtype), shift + tf.math.log(total))[..., 0]
    p = (p / total)[..., : problem.len_k]
    if problem.dropout:
        p *= factors(named["seed"], problem.dropout, indices, p)
    p = tf.reshape(p, (problem.batch, problem.heads_kv, -1, problem.len_k))
    return tf.reshape(tf.matmul(p, v), (*rows, problem.dim_v)), lse, largest


def problem_of(request: Request, named: Mapping[str, Tensor]) -> Problem:
    """The problem of tensors. Raises as `tilefold.attention`, and NotImplementedError."""
    for name, tensor in named.items():
        if not tensor.shape.is_fully_defined():
            raise NotImplementedError(
                "attention of all pairs at once asks for shapes that are known while a function is"
                f" traced: {name} has {tensor.shape}; use impl='kernel'"
            )
    every = {name: Described(tuple(x.shape), x.dtype.name) for name, x in named.items()}
    dtype = described.common_dtype({name: every[name] for name in "qkv"})
    q, k, v = (every[name].shape for name in "qkv")
    problem = describe(q, k, v, dtype, request)
    check_extra(described, {name: every[name] for name in every if name not in "qkv"}, problem)
    return problem


def _masked(
    problem: Problem, s: Tensor, indices: Mapping[str, Tensor], named: Mapping[str, Tensor]
) -> Tensor:
    """The modified scores, -inf for hidden pairs."""
    bound = MaskedProblem.of(problem)
    visible = tf.broadcast_to(_value(bound.expression, indices, named), s.shape)
    if bound.score is not None:
        s = tf.broadcast_to(_value(bound.score, indices, named, s), s.shape)
        if may_hide(bound.score):
            visible &= s != tf.constant(-math.inf, s.dtype)
    return tf.where(visible, s, tf.constant(-math.inf, s.dtype))


def _value(
    expression: Expression,
    indices: Mapping[str, Tensor],
    named: Mapping[str, Tensor],
    s: Tensor | None = None,
) -> Tensor:
    """The value of a mask or, of scores `s`, of a modified score."""
    return evaluate(expression, _Tensors(indices, named, s))


class _Tensors(Interpretation[Any]):
    """The value of a node is a tensor; all of them broadcast."""

    def __init__(
        self, indices: Mapping[str, Tensor], named: Mapping[str, Tensor], s: Tensor | None
    ) -> None:
        self._indices, self._named, self._s = indices, named, s

    @property
    def _kind(self) -> tf.DType:
        assert self._s is not None
        return self._s.dtype

    def index(self, name: str) -> Any:
        return self._indices[name]

    def constant(self, value: int) -> Any:
        return tf.constant(value, tf.int64)

    def truth(self, value: bool) -> Any:
        return tf.constant(value)

    def lookup(self, table: AnyTable, indices: tuple[Any, ...]) -> Any:
        if isinstance(table, (Given, Input)):
            array = self._named[table.name]
        else:
            assert isinstance(table, Table)
            array = tf.constant(table.array)
        if indices:
            shape = functools.reduce(tf.broadcast_static_shape, [x.shape for x in indices])
            array = tf.gather_nd(array, tf.stack([tf.broadcast_to(x, shape) for x in indices], -1))
        if table.dtype == "bool":
            return array
        return tf.cast(array, tf.int64 if table.dtype == "int32" else self._kind)

    def unary(self, operator: str, operand: Any) -> Any:
        return abs(operand) if operator == "abs" else -operand

    def binary(self, operator: str, left: Any, right: Any) -> Any:
        return _OPERATORS[operator](left, right)

    def compare(self, operator: str, left: Any, right: Any) -> Any:
        return _COMPARE[operator](left, right)

    def logic(self, operator: str, operands: Sequence[Any]) -> Any:
        if operator == "~":
            return tf.logical_not(operands[0])
        join = tf.logical_and if operator == "&" else tf.logical_or
        return functools.reduce(join, operands)

    def score(self) -> Any:
        return self._s

    def real(self, value: float) -> Any:
        return tf.constant(value, self._kind)

    def from_integer(self, operand: Any) -> Any:
        return tf.cast(operand, self._kind)

    def real_unary(self, operator: str, operand: Any) -> Any:
        return _FUNCTIONS[operator](operand)

    def real_binary(self, operator: str, left: Any, right: Any) -> Any:
        return _OPERATORS[operator](left, right)

    def where(self, truth: Any, then: Any, otherwise: Any) -> Any:
        return tf.where(truth, then, otherwise)


_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": tf.add,
    "-": tf.subtract,
    "*": tf.multiply,
    "/": tf.divide,
    "//": tf.math.floordiv,
    "%": tf.math.floormod,
    "minimum": tf.minimum,
    "maximum": tf.maximum,
}
_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "-": tf.negative,
    "abs": tf.abs,
    "exp": tf.exp,
    "log": tf.math.log,
    "tanh": tf.tanh,
    "sigmoid": tf.sigmoid,
    "sqrt": tf.sqrt,
}
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "<": tf.less,
    "<=": tf.less_equal,
    ">": tf.greater,
    ">=": tf.greater_equal,
    "==": tf.equal,
    "!=": tf.not_equal,
}
