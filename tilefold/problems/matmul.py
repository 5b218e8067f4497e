"""Matrix products and softmax of rows, without their arrays: shapes, types, options, checks.

    C = activation(alpha op(A) op(B) + bias + beta C)          a Product
    C = activation(alpha op(A) op(B) + bias) (alpha op(A) op(G))    one with a gate G
    P = softmax of every row of X                              Rows

A backend says which arrays its kernels take (`Accepted`), makes an `Operand` of each array, and
gets one frozen description in return. All errors of a call are raised in these steps. Leading axes
are a batch. They broadcast as in NumPy, by strides of 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tilefold.common.check import choice

BIAS_AXES = ("column", "row")
"""The axis of a bias: one element for each column of C, as in a linear layer, or for each row."""

ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh")
"""The names of functions that are applied to each element of a result; None changes nothing.

"gelu" is x times the normal distribution function of x, and "gelu_tanh" Hendrycks and Gimpel's
formula for it (2016). "silu" is x times "sigmoid".
"""

_LEAST_AXES = 4
"""Shorter shapes get axes of length 1 in front."""

INTEGERS = ("int8", "uint8")
"""Types whose products are summed in int32."""


class Axes(NamedTuple):
    """Lengths and strides of an array of four axes; a stride is 0 where its length is 1."""

    lengths: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def batch(self) -> tuple[int, ...]:
        """Lengths of the axes of the batch."""
        return self.lengths[:-2]

    @property
    def sizes(self) -> list[int]:
        """Strides in a kernel's order: rows, columns, then the batch from the innermost axis."""
        *batch, row, column = self.strides
        return [row, column, *reversed(batch)]

    @property
    def transposed(self) -> bool:
        """True if neighbours in a column lie nearer to each other in memory than in a row."""
        (*_, rows, columns), (*_, down, across) = self
        if across == 1 or rows == 1:
            return False
        return down == 1 or columns == 1 or abs(down) < abs(across)

    @property
    def unit(self) -> bool:
        """True if the nearest elements are adjacent in memory."""
        return self.strides[-2 if self.transposed else -1] in (0, 1)

    @property
    def broadcast(self) -> bool:
        """True if several elements share one place in memory, so that none may be written."""
        shared = (
            step == 0 < length - 1 for length, step in zip(self.lengths, self.strides, strict=True)
        )
        return 0 not in self.lengths and any(shared)

    def turned(self) -> Axes:
        """The transposed matrices."""
        return Axes(*((*batch, n, m) for *batch, m, n in self))

    def padded(self, rank: int) -> Axes:
        """The same with axes of length 1 in front."""
        front = rank - len(self.lengths)
        return Axes((1,) * front + self.lengths, (0,) * front + self.strides)


class Operand(NamedTuple):
    """An array of a call without its elements: its type, its own shape, its four axes."""

    dtype: str
    shape: tuple[int, ...]
    axes: Axes

    def turned(self) -> Operand:
        """The transposed matrices."""
        return self._replace(axes=self.axes.turned())

    def padded(self, rank: int) -> Operand:
        """The same with axes of length 1 in front, which its shape has not."""
        return self._replace(axes=self.axes.padded(rank))


@dataclass(frozen=True)
class Accepted:
    """The arrays that the kernels of a backend take.

    `dtypes` are the names of allowed types. `empty` is True if axes of length 0 are allowed.
    `longest` is the largest length of an axis; None means no limit. `most` axes are allowed.
    """

    dtypes: tuple[str, ...]
    empty: bool
    longest: int | None = None
    most: int = 4

    def operand(
        self, name: str, dtype: str, shape: Sequence[int], strides: Sequence[int], least: int
    ) -> Operand:
        """The operand of an array of at least `least` axes, padded in front with axes of length 1.

        Raises TypeError for a type and ValueError for lengths that no kernel takes.
        """
        if dtype not in self.dtypes:
            raise TypeError(f"{name} must be one of {', '.join(self.dtypes)}, got {dtype}")
        lengths = tuple(int(length) for length in shape)
        count = len(lengths)
        if not least <= count <= self.most or not self._allows(lengths):
            limits = [] if self.empty else ["none of length 0"]
            limits += [] if self.longest is None else [f"none longer than {self.longest}"]
            allowed = ", ".join([f"{name} must have {least} to {self.most} axes", *limits])
            raise ValueError(f"{allowed}, got {lengths}")
        steps = (0 if length == 1 else step for length, step in zip(lengths, strides, strict=True))
        front = max(0, _LEAST_AXES - count)
        return Operand(dtype, lengths, Axes((1,) * front + lengths, (0,) * front + tuple(steps)))

    def _allows(self, lengths: tuple[int, ...]) -> bool:
        long = self.longest is not None and max(lengths) > self.longest
        return not long and (self.empty or 0 not in lengths)


@dataclass(frozen=True)
class Product:
    """One call of a product: `a` is op(A), m x k, and `b` and `gate` are op(B) and op(G), k x n.

    `dtype` and `shape` belong to the result, and `sums` is the type of the sums. `batch` is the
    common shape of the leading axes after broadcasting. `c` is what beta multiplies. `bias` has the
    axes of the result, of which one of the last two is 1; `bias_axis` says which one is not.
    """

    a: Operand
    b: Operand
    dtype: str
    shape: tuple[int, ...]
    batch: tuple[int, ...]
    bias: Operand | None
    bias_axis: str | None
    activation: str | None
    alpha: float
    beta: float
    c: Operand | None = None
    gate: Operand | None = None

    @classmethod
    def of(
        cls,
        operands: Mapping[str, Operand],
        *,
        alpha: float,
        beta: float,
        transpose_a: bool,
        transpose_b: bool,
        bias_axis: str | None,
        activation: str | None,
        dtype: str,
        biases: Sequence[str],
    ) -> Product:
        """The description of a call from its operands: "a", "b", and of "c", "bias", "gate" some.

        `dtype` is the type of the result, and `biases` are types that a bias may have. `bias_axis`:
        None finds it in the shape, (n,), (..., 1, n) or (..., m, 1); with a name a bias is (..., n)
        or (..., m). Raises ValueError, or TypeError for a type.
        """
        choice("bias_axis", bias_axis, (None, *BIAS_AXES))
        choice("activation", activation, ACTIVATIONS)
        rank = max(len(each.axes.lengths) for each in operands.values())
        given = {name: each.padded(rank) for name, each in operands.items()}
        a, b, c, bias, gate = (given.get(name) for name in ("a", "b", "c", "bias", "gate"))
        assert a is not None and b is not None
        if beta and c is None:
            raise ValueError(f"beta is {beta}, so c must be given")
        axes = max(len(a.shape), len(b.shape))
        a, b = a.turned() if transpose_a else a, b.turned() if transpose_b else b
        (*_, m, k), (*_, inner, n) = a.axes.lengths, b.axes.lengths
        if inner != k:
            raise ValueError(
                f"op(a) is {m} x {k} and op(b) {inner} x {n}: the inner two must be equal"
            )
        batch = _common(a.axes.batch, b.axes.batch)
        if batch is None:
            one, two = a.shape[:-2], b.shape[:-2]
            raise ValueError(f"the batches of a and b must broadcast, got {one} and {two}")
        if gate is not None:
            gate = gate.turned() if transpose_b else gate
            if (gate.dtype, gate.axes.lengths) != (b.dtype, b.axes.lengths):
                raise ValueError(
                    f"gate must be {b.dtype} of shape {b.shape} as b is, got {gate.dtype} of shape"
                    f" {gate.shape}"
                )
            if beta:
                raise ValueError(f"beta must be 0 with a gate, got {beta}")
        shape = (*batch, m, n)[-axes:] if axes <= len(batch) + 2 else (*batch, m, n)
        if bias is not None:
            if bias.dtype not in biases:
                known = " or ".join(biases)
                raise TypeError(f"bias must be {known} as the result is, got {bias.dtype}")
            bias, bias_axis = _bias(bias, bias_axis, batch, m, n)
        return cls(
            *(a, b, dtype, shape, batch, bias, bias_axis if bias else None, activation),
            *(alpha, beta, c, gate),
        )

    @property
    def m(self) -> int:
        """The number of rows of the result."""
        return self.a.axes.lengths[-2]

    @property
    def n(self) -> int:
        """The number of columns of the result."""
        return self.b.axes.lengths[-1]

    @property
    def k(self) -> int:
        """The number of terms of each sum."""
        return self.a.axes.lengths[-1]

    @property
    def sums(self) -> str:
        """The type of the sums."""
        return sums(self.a.dtype, self.b.dtype)

    @property
    def matrices(self) -> int:
        """The number of matrices of the result."""
        return math.prod(self.batch)

    @property
    def bias_strides(self) -> list[int]:
        """Strides of the bias: its elements, then the batch from the innermost axis."""
        if self.bias is None:
            return []
        *outer, down, across = self.bias.axes.strides
        return [down if self.bias_axis == "row" else across, *reversed(outer)]


@dataclass(frozen=True)
class Rows:
    """One call of a softmax: `batch` x `heads` matrices of `count` rows of `width` elements."""

    x: Operand

    @classmethod
    def of(cls, operands: Mapping[str, Operand]) -> Rows:
        """The description of a call from its operands: "x" and, if given, "p"."""
        x, p = operands["x"], operands.get("p")
        if p is not None:
            check_result("p", p, x.shape, x.dtype)
        return cls(x)

    @property
    def batch(self) -> int:
        """Length of the outer axis of the batch."""
        return self.x.axes.lengths[0]

    @property
    def heads(self) -> int:
        """Length of the inner axis of the batch."""
        return self.x.axes.lengths[1]

    @property
    def count(self) -> int:
        """Rows of each matrix."""
        return self.x.axes.lengths[2]

    @property
    def width(self) -> int:
        """Elements of a row."""
        return self.x.axes.lengths[3]


def multiplied(a: str, b: str) -> str:
    """The type in which elements of two types are multiplied: float32 if the two differ.

    >>> multiplied("bfloat16", "bfloat16"), multiplied("bfloat16", "float16")
    ('bfloat16', 'float32')
    """
    return a if a == b else "float32"


def common_type(a: str, b: str) -> str:
    """The type of a product that asks for none: the type that holds both, and int32 of integers.

    >>> common_type("float16", "float16"), common_type("float16", "bfloat16")
    ('float16', 'float32')
    >>> common_type("float32", "float64"), common_type("uint8", "int8")
    ('float64', 'int32')
    >>> common_type("int8", "float16")
    'float16'
    """
    if (a in INTEGERS) != (b in INTEGERS):
        return b if a in INTEGERS else a
    return a if a == b and a not in INTEGERS else sums(a, b)


def sums(a: str, b: str) -> str:
    """The type in which products of two types are summed.

    >>> sums("bfloat16", "bfloat16"), sums("float32", "float64"), sums("int8", "int8")
    ('float32', 'float64', 'int32')
    """
    if a in INTEGERS and b in INTEGERS:
        return "int32"
    return "float64" if "float64" in (a, b) else "float32"


def check_result(name: str, given: Operand, shape: tuple[int, ...], dtype: str) -> None:
    """Raises ValueError unless an array can hold a result of this shape and type."""
    if given.shape != shape or given.dtype != dtype:
        raise ValueError(
            f"{name} must be {dtype} of shape {shape}, got {given.dtype} of shape {given.shape}"
        )
    if given.axes.broadcast:
        raise ValueError(f"{name} is written, so no axis of it may be broadcast")


def _common(batch: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...] | None:
    """The common batch of two arrays, where an axis of length 1 broadcasts; None if there is none.

    >>> _common((1, 2), (3, 1)), _common((1, 2), (1, 3))
    ((3, 2), None)
    """
    if any(one != two and 1 not in (one, two) for one, two in zip(batch, other, strict=True)):
        return None
    return tuple(two if one == 1 else one for one, two in zip(batch, other, strict=True))


def _bias(
    bias: Operand, axis: str | None, batch: tuple[int, ...], m: int, n: int
) -> tuple[Operand, str]:
    """A bias with the axes of the result, and the axis along which it differs."""
    *_, down, across = bias.axes.lengths
    length = m if axis == "row" else n
    if axis is None:  # (n,), (..., 1, n) or (..., m, 1)
        axis = "row" if (down, across) == (m, 1) and (m, n) != (1, 1) else "column"
        fits = (down, across) == ((m, 1) if axis == "row" else (1, n))
        if not fits:
            raise ValueError(f"bias must be ({n},) or ({m}, 1), got {bias.shape}")
    else:
        if across != length or bias.axes.lengths[0] != 1:
            raise ValueError(f"bias must be (..., {length}), got {bias.shape}")
        lengths, strides = bias.axes  # the axis before the last one is a batch's: (..., 1, n)
        lengths, strides = (*lengths[1:-1], 1, lengths[-1]), (*strides[1:-1], 0, strides[-1])
        bias = bias._replace(axes=Axes(lengths, strides))
        bias = bias.turned() if axis == "row" else bias
    if _common(batch, bias.axes.batch) != batch:
        raise ValueError(f"the batch of bias must broadcast to {batch}, got {bias.axes.batch}")
    return bias, axis
