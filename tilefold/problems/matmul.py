"""Matrix products and softmax of rows, without their arrays: shapes, types, options, checks.

    C = activation(alpha op(A) op(B) + bias + beta C)          a Product
    P = softmax of every row of X                              Rows

A backend says which arrays its kernels take (`Accepted`), makes an `Operand` of each array, and
gets one frozen description in return. All errors of a call are raised in these steps. Leading axes
are a batch, at most two of them. They broadcast as in NumPy, by strides of 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tilefold.common.check import choice

BIAS_AXES = ("column", "row")
"""The axis of a bias: one element for each column of C, as in a linear layer, or for each row."""

ACTIVATIONS = (None, "relu", "gelu", "silu", "tanh")
"""The names of functions that are applied to each element of a result; None changes nothing."""

_MOST_AXES = 4


class Axes(NamedTuple):
    """Lengths and strides of an array of four axes; a stride is 0 where its length is 1."""

    lengths: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def batch(self) -> tuple[int, ...]:
        """Lengths of the two axes of the batch."""
        return self.lengths[:2]

    @property
    def sizes(self) -> list[int]:
        """Strides in a kernel's order: rows, columns, then the batch from the innermost axis."""
        b, h, row, column = self.strides
        return [row, column, h, b]

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
        return self.strides[2 if self.transposed else 3] in (0, 1)

    @property
    def broadcast(self) -> bool:
        """True if several elements share one place in memory, so that none may be written."""
        shared = (
            step == 0 < length - 1 for length, step in zip(self.lengths, self.strides, strict=True)
        )
        return 0 not in self.lengths and any(shared)

    def turned(self) -> Axes:
        """The transposed matrices."""
        return Axes(*((b, h, n, m) for b, h, m, n in self))


class Operand(NamedTuple):
    """An array of a call without its elements: its type, its own shape, its four axes."""

    dtype: str
    shape: tuple[int, ...]
    axes: Axes

    def turned(self) -> Operand:
        """The transposed matrices."""
        return self._replace(axes=self.axes.turned())


@dataclass(frozen=True)
class Accepted:
    """The arrays that the kernels of a backend take.

    `dtypes` are the names of allowed types. `empty` is True if axes of length 0 are allowed.
    `longest` is the largest length of an axis; None means no limit.
    """

    dtypes: tuple[str, ...]
    empty: bool
    longest: int | None = None

    def operand(
        self, name: str, dtype: str, shape: Sequence[int], strides: Sequence[int], least: int
    ) -> Operand:
        """The operand of an array of `least` to 4 axes, padded in front with axes of length 1.

        Raises TypeError for a type and ValueError for lengths that no kernel takes.
        """
        if dtype not in self.dtypes:
            raise TypeError(f"{name} must be one of {', '.join(self.dtypes)}, got {dtype}")
        lengths = tuple(int(length) for length in shape)
        count = len(lengths)
        if not least <= count <= _MOST_AXES or not self._allows(lengths):
            limits = [] if self.empty else ["none of length 0"]
            limits += [] if self.longest is None else [f"none longer than {self.longest}"]
            allowed = ", ".join([f"{name} must have {least} to {_MOST_AXES} axes", *limits])
            raise ValueError(f"{allowed}, got {lengths}")
        steps = (0 if length == 1 else step for length, step in zip(lengths, strides, strict=True))
        front = _MOST_AXES - count
        return Operand(dtype, lengths, Axes((1,) * front + lengths, (0,) * front + tuple(steps)))

    def _allows(self, lengths: tuple[int, ...]) -> bool:
        long = self.longest is not None and max(lengths) > self.longest
        return not long and (self.empty or 0 not in lengths)


@dataclass(frozen=True)
class Product:
    """One call of a product: `a` is op(A), m x k, and `b` is op(B), k x n.

    `dtype` and `shape` belong to the result. `batch` is the common shape of the leading axes of A
    and B after broadcasting. `bias` and `bias_axis` are both None or both given.
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

    @classmethod
    def of(
        cls,
        operands: Mapping[str, Operand],
        *,
        alpha: float,
        beta: float,
        transpose_a: bool,
        transpose_b: bool,
        bias_axis: str,
        activation: str | None,
        dtype: str | None,
    ) -> Product:
        """The description of a call from its operands: "a", "b" and, if given, "c" and "bias".

        `dtype` is the type of the result. None means the type of c; without c, the common type of
        a and b, or float32 if they differ. Raises ValueError, or TypeError for a bias whose type
        is not the type of the result.
        """
        choice("bias_axis", bias_axis, BIAS_AXES)
        choice("activation", activation, ACTIVATIONS)
        a, b, c, bias = (operands.get(name) for name in ("a", "b", "c", "bias"))
        assert a is not None and b is not None
        kind = dtype or (c.dtype if c is not None else multiplied(a.dtype, b.dtype))
        choice("the type of c", kind, result_types(a.dtype, b.dtype))
        if beta and c is None:
            raise ValueError(f"beta is {beta}, so c must be given")
        axes = max(len(a.shape), len(b.shape))
        a, b = a.turned() if transpose_a else a, b.turned() if transpose_b else b
        (*_, m, k), (*_, inner, n) = a.axes.lengths, b.axes.lengths
        if inner != k:
            raise ValueError(
                f"op(a) is {m} x {k} and op(b) {inner} x {n}: the inner two must be equal"
            )
        batch = _common("b", a.axes.batch, b.axes.batch)
        shape = (*batch, m, n)[-axes:]
        if c is not None:
            check_result("c", c, shape, kind)
        if bias is not None:
            _check_bias(bias, kind, batch, n if bias_axis == "column" else m)
        given = None if bias is None else bias_axis
        return cls(a, b, kind, shape, batch, bias, given, activation, alpha, beta)

    @property
    def m(self) -> int:
        """The number of rows of the result."""
        return self.a.axes.lengths[2]

    @property
    def n(self) -> int:
        """The number of columns of the result."""
        return self.b.axes.lengths[3]

    @property
    def k(self) -> int:
        """The number of terms of each sum."""
        return self.a.axes.lengths[3]

    @property
    def matrices(self) -> int:
        """The number of matrices of the result, the product of both batch axes."""
        return self.batch[0] * self.batch[1]

    @property
    def bias_strides(self) -> list[int]:
        """Strides of the bias: its elements, then the batch from the innermost axis."""
        return [] if self.bias is None else list(self.bias.axes.strides[:0:-1])


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


def result_types(a: str, b: str) -> tuple[str, ...]:
    """The types that a product of two types may have: float32 or one of the two.

    The product of float64 arrays is always float64.

    >>> result_types("float16", "float16"), result_types("float64", "float64")
    (('float32', 'float16'), ('float64',))
    """
    least = () if a == "float64" else ("float32",)
    return tuple(dict.fromkeys((*least, a, b)))


def check_result(name: str, given: Operand, shape: tuple[int, ...], dtype: str) -> None:
    """Raises ValueError unless an array can hold a result of this shape and type."""
    if given.shape != shape or given.dtype != dtype:
        raise ValueError(
            f"{name} must be {dtype} of shape {shape}, got {given.dtype} of shape {given.shape}"
        )
    if given.axes.broadcast:
        raise ValueError(f"{name} is written, so no axis of it may be broadcast")


def _common(name: str, batch: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    """The common batch of two arrays, where an axis of length 1 broadcasts to any length."""
    for one, two in zip(batch, other, strict=True):
        if one != two and 1 not in (one, two):
            raise ValueError(f"the batch of {name} must be {batch} or 1 along an axis, got {other}")
    return tuple(two if one == 1 else one for one, two in zip(batch, other, strict=True))


def _check_bias(bias: Operand, dtype: str, batch: tuple[int, ...], length: int) -> None:
    """Raises unless a bias has the type, the length and the batch of the result."""
    if bias.dtype != dtype:
        raise TypeError(f"bias must be {dtype} as the result is, got {bias.dtype}")
    first, *outer, found = bias.axes.lengths
    if found != length or first != 1:
        raise ValueError(f"bias must be (..., {length}), got {bias.shape}")
    if _common("bias", batch, tuple(outer)) != batch:
        raise ValueError(f"the batch of bias must be {batch}, got {tuple(outer)}")
