"""Products of matrices as the kernels of GPUs take them: their types, and two axes of a batch.

Neighbouring axes of a batch become one axis where every array steps through both alike. If more
than two are left, the host walks the outer ones, and launches a kernel at each place.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

from tilefold.common.check import choice
from tilefold.problems.matmul import Axes, Operand, Product, check_result, common_type

MOST_AXES = 32
"""Axes that an array may have; NumPy before 2.0 has no more."""

FLOATS = ("float32", "float16", "bfloat16")
"""Types of results whose sums are float32."""


SCHEMES = ("int8", "int4", "int4_symmetric", "palette6", "float8_e4m3")
"""Schemes of quantised matrices; `tilefold.products.schemes` says how their codes lie."""

SCALES = ("float32", "float16")
"""Types of their scales."""

STEP = 16
"""Groups of inputs are multiples of it."""

PANEL = 32
"""Columns of a panel of codes."""


def results(a: str, b: str) -> tuple[str, ...]:
    """The types that a product of two types may have.

    >>> results("float16", "float32"), results("float64", "float64")
    (('float32', 'float16', 'bfloat16'), ('float64',))
    """
    return ("float64",) if "float64" in (a, b) else FLOATS


def addends(dtype: str) -> tuple[str, ...]:
    """The types that bias and C may have beside a result of a type: its own, and that of sums.

    >>> addends("float16"), addends("float32")
    (('float16', 'float32'), ('float32',))
    """
    return tuple(dict.fromkeys((dtype, "float64" if dtype == "float64" else "float32")))


def described(
    operands: Mapping[str, Operand], out: Operand | None, *, dtype: str | None, **options: Any
) -> Product:
    """The description of a call whose result lies in `out`; without it, in "c" if that is there.

    `options` are the other arguments of `Product.of`. Raises ValueError or TypeError.
    """
    if out is not None and dtype not in (None, out.dtype):
        raise ValueError(f"dtype must be {out.dtype} as out is, got {dtype}")
    kind = dtype if out is None else out.dtype
    a, b, c = operands["a"].dtype, operands["b"].dtype, operands.get("c")
    kind = kind or (common_type(a, b) if c is None else c.dtype)
    choice("the type of c", kind, results(a, b))
    product = Product.of(operands, dtype=kind, biases=addends(kind), **options)
    c = product.c
    if out is None:
        if c is not None:
            check_result("c", c, product.shape, product.dtype)
        return product
    check_result("out", out, product.shape, product.dtype)
    if c is not None:
        allowed, wanted = addends(product.dtype), (*product.batch, product.m, product.n)
        if c.dtype not in allowed:
            raise TypeError(f"c must be {' or '.join(allowed)} beside this out, got {c.dtype}")
        if any(own not in (1, full) for own, full in zip(c.axes.lengths, wanted, strict=True)):
            raise ValueError(f"c must broadcast to {product.shape}, got {c.shape}")
    return product


class Folded(NamedTuple):
    """A product with two axes of a batch, the axes of its result, and what the host walks.

    `outer` has the lengths of the batch's axes in front that became no axis of a kernel.
    """

    product: Product
    out: Axes
    outer: tuple[int, ...]
    leads: Mapping[str, int]
    """How many axes of a batch each array has."""
    axes: int
    """How many axes the batch had."""

    def places(self, arrays: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The arrays at each place of the outer axes."""
        for place in itertools.product(*map(range, self.outer)):
            yield {name: self._part(name, array, place) for name, array in arrays.items()}

    def _part(self, name: str, array: Any, place: tuple[int, ...]) -> Any:
        if name not in self.leads:  # codes have no batch
            return array
        own = place[self.axes - self.leads[name] :]  # an array may have fewer axes
        lengths = array.shape[: len(own)]
        at = tuple([step if n > 1 else 0 for step, n in zip(own, lengths, strict=True)])
        return array[at] if at else array


def folded(product: Product, out: Operand) -> Folded:
    """A product, and the array of its result, with two axes of a batch."""
    given = {name: getattr(product, name) for name in ("a", "b", "c", "bias", "gate")}
    operands: dict[str, Operand] = {name: each for name, each in given.items() if each is not None}
    batch = product.batch
    operands["out"] = out.padded(len(batch) + 2)
    leads = {name: _lead(name, each) for name, each in operands.items()}
    if len(batch) == 2:
        return Folded(product, operands["out"].axes, (), leads, 2)
    groups = _groups(batch, [each.axes.strides[:-2] for each in operands.values()])
    *others, one, two = groups
    outer = batch[: max((group[-1] for group in others), default=-1) + 1]
    placed = {
        name: each._replace(axes=_joined(each.axes, one, two)) for name, each in operands.items()
    }
    result = placed.pop("out").axes
    lengths = tuple([math.prod(batch[n] for n in group) for group in (one, two)])
    fields: dict[str, Any] = {"batch": lengths, **placed}
    return Folded(replace(product, **fields), result, outer, leads, len(batch))


def _lead(name: str, operand: Operand) -> int:
    """The number of axes of a batch; a bias by the name of its axis has only one axis beside."""
    shape = operand.shape
    beside = name == "bias" and operand.axes.lengths[-len(shape) :] != shape
    return max(0, len(shape) - (1 if beside else 2))


def _groups(batch: Sequence[int], strides: Sequence[Sequence[int]]) -> list[list[int]]:
    """The axes of a batch in groups that are one axis in every array, at least two of them."""
    groups: list[list[int]] = []
    for n in reversed([n for n, length in enumerate(batch) if length != 1]):
        near = groups[0][0] if groups else None
        if near is not None and all(each[n] == each[near] * batch[near] for each in strides):
            groups[0].insert(0, n)
        else:
            groups.insert(0, [n])
    return [*([] for _ in range(2 - len(groups))), *groups]


def _joined(axes: Axes, *groups: Sequence[int]) -> Axes:
    """The axes with each group as one axis."""
    lengths, strides = [], []
    for group in groups:
        own = math.prod(axes.lengths[n] for n in group)
        lengths.append(own)
        strides.append(axes.strides[group[-1]] if own != 1 else 0)
    return Axes((*lengths, *axes.lengths[-2:]), (*strides, *axes.strides[-2:]))


class Quantized(Protocol):
    """A matrix of k inputs and n outputs in codes, as `tilefold.quantize` makes it."""

    @property
    def scheme(self) -> str:
        """The name of its scheme."""

    @property
    def shape(self) -> tuple[int, int]:
        """k and n."""

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""

    @property
    def arrays(self) -> Mapping[str, Any]:
        """Its arrays by name: codes, and of scales, zeros and table some."""


@dataclass(frozen=True)
class Codes:
    """All of a quantised B that changes a source: scheme, inputs of a group, type of its scales.

    `group` is None where all inputs of an output share a scale, `scales` where there are none.
    """

    scheme: str
    group: int | None = None
    scales: str | None = None

    def __post_init__(self) -> None:
        choice("scheme", self.scheme, SCHEMES)
        choice("scales", self.scales, (None,) if self.scheme == "palette6" else SCALES)
        if self.group is not None and (self.group < STEP or self.group % STEP):
            raise ValueError(f"group must be a multiple of {STEP}, got {self.group}")

    @classmethod
    def of(cls, w: Quantized) -> Codes:
        """The codes of a matrix. Raises TypeError for what is not quantised."""
        if not hasattr(w, "group_size"):
            raise TypeError(f"w must be made by tilefold.quantize, got {type(w).__name__}")
        scales = w.arrays.get("scales")
        kind = None if scales is None else str(scales.dtype).removeprefix("torch.")
        return cls(w.scheme, None if w.group_size == w.shape[0] else w.group_size, kind)

    @property
    def besides(self) -> dict[str, str]:
        """The arrays beside the codes, and their types."""
        if self.scales is None:
            return {"table": "float16"}
        names = ("scales", "zeros") if self.scheme == "int4" else ("scales",)
        return dict.fromkeys(names, self.scales)


def weighted(
    w: Quantized,
    kind: str,
    operands: Mapping[str, Operand],
    out: Operand | None,
    *,
    dtype: str | None,
    activation: str | None,
) -> Product:
    """The description of x w, where the codes of w are multiplied as a type.

    `operands` has "x", and "bias" where there is one.
    """
    k, n = w.shape
    x = operands["x"]
    if x.shape[-1] != k:
        raise ValueError(f"x must be (..., {k}) for a w of {k} x {n}, got {x.shape}")
    b = Operand(kind, (k, n), Axes((1, 1, k, n), (0, 0, n, 1)))
    named = {("a" if name == "x" else name): each for name, each in operands.items()}
    return described(
        {**named, "b": b},
        out,
        dtype=dtype or (x.dtype if out is None else None),
        alpha=1.0,
        beta=0.0,
        transpose_a=False,
        transpose_b=False,
        bias_axis=None,
        activation=activation,
    )


_PLACED: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[str, Any]]] = WeakKeyDictionary()


def placed(machine: Any, w: Quantized) -> dict[str, Any]:
    """The arrays of a matrix where kernels of a machine read them; they are copied there once.

    Words are signed there: the frameworks know little of unsigned ones.
    """
    found = _PLACED.setdefault(w, WeakKeyDictionary())
    if machine not in found:
        found[machine] = {
            name: machine.upload(array.view("int32") if array.dtype == "uint32" else array)
            for name, array in w.arrays.items()
        }
    return found[machine]


def hold(machine: Any, w: Quantized, arrays: Mapping[str, Any]) -> None:
    """Say that the arrays of a matrix already lie where kernels of a machine read them."""
    _PLACED.setdefault(w, WeakKeyDictionary())[machine] = dict(arrays)
