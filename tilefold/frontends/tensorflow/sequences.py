"""Attention between sequences of one or two dimensions, with any batch axes, channels first.

The arrays are (batch..., channels, sequence...). Contiguous arrays of this order are arrays of
layout "bhdn": the last batch axis is the heads, the others are the batch, and a sequence of two
dimensions is flattened row by row. So operators take the arrays as they are. Rule and shapes meet
when the call is prepared: sizes may be unknown while a function is traced.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import tensorflow as tf

from tilefold.backends.protocols import BACKWARD_LOW, FORWARD_LOW, Pass
from tilefold.common.check import choice, flag, whole
from tilefold.frontends.operation import Operation
from tilefold.frontends.tensorflow import tensors
from tilefold.frontends.tensorflow.operators import check_synchronous
from tilefold.frontends.tensorflow.pairs import statistics
from tilefold.frontends.tensorflow.registering import END, Operator, Part, functions, register
from tilefold.frontends.tensorflow.states import Array, Ready
from tilefold.masks.coordinates import SYNCS
from tilefold.masks.position_rules import Rule, causal, full, local
from tilefold.problems.request import Request

Tensor = Any
Shape = tuple[int, ...]
Sizes = Sequence[int | None]

DTYPES = ("float16", "float32", "float64")

_LARGEST = 2**31 - 1
"""Sizes and windows are integers of 32 bits."""


@dataclass(frozen=True)
class Between:
    """What a call computes: the number of sequence axes, and which key a query sees.

    `kind` is "full", "causal" or "local". The first two ignore `window` and what follows it, and
    "full" also ignores `sync`. Raises ValueError or TypeError for values that are not allowed.
    """

    axes: int
    kind: str
    sync: str
    window: int = 1
    log2_stride: int = 0
    causal: bool = False
    largest: bool = False
    """Whether the largest scores are a result."""

    def __post_init__(self) -> None:
        choice("sync_mode", self.sync, SYNCS)
        for field, name, value, least in (
            ("window", "window_size", self.window, 1),
            ("log2_stride", "log2_stride_size", self.log2_stride, 0),
        ):
            object.__setattr__(self, field, whole(name, value, least))
        object.__setattr__(self, "causal", flag("is_causal", self.causal))
        object.__setattr__(self, "largest", flag("returning_l_m", self.largest))
        if self.log2_stride > 30 or self.window << self.log2_stride > _LARGEST:
            raise ValueError(
                "window_size * 2**log2_stride_size must be below 2**31, got window_size="
                f"{self.window} and log2_stride_size={self.log2_stride}"
            )

    @property
    def text(self) -> str:
        """The value in one line of JSON."""
        return json.dumps({"tilefold_sequences": 1, **asdict(self)})

    def mask(self, sizes_q: Shape, sizes_k: Shape) -> Rule:
        """The rule for sequences of these sizes."""
        if self.kind == "full":
            return full()
        place: dict[str, Any] = {"sync": self.sync}
        if self.axes == 2:
            place |= {"grid_q": sizes_q, "grid_k": sizes_k}
        if self.kind == "causal":
            return causal(**place)
        return local(self.window, 2**self.log2_stride, causal=self.causal, **place)

    def check(self, q: Sizes | None, k: Sizes | None, v: Sizes | None) -> None:
        """Raises ValueError unless the shapes fit together, as far as they are known."""
        shapes = {name: it for name, it in (("Q", q), ("K", k), ("V", v)) if it is not None}
        for name, shape in shapes.items():
            if len(shape) < self.axes + 2:
                raise ValueError(
                    f"{name} must be (batch..., channels, {_AXES[self.axes]}) with a batch axis, so"
                    f" it has at least {self.axes + 2} axes, got shape {_shown(shape)}"
                )
        if len({len(shape) for shape in shapes.values()}) > 1:
            raise ValueError(f"Q, K and V must have the same number of axes, got {_all(shapes)}")
        first, end = -1 - self.axes, None
        for left, right, part, what in (
            ("Q", "K", slice(0, first), "batch axes"),
            ("Q", "V", slice(0, first), "batch axes"),
            ("Q", "K", slice(first, first + 1), "channels"),
            ("K", "V", slice(first + 1, end), _AXES[self.axes]),
        ):
            if left in shapes and right in shapes:
                pairs = zip(shapes[left][part], shapes[right][part], strict=True)
                if any(None not in pair and pair[0] != pair[1] for pair in pairs):
                    raise ValueError(
                        f"{left} and {right} must have the same {what}, got {_all(shapes)}"
                    )
        for name, shape in shapes.items():
            if 0 in shape[first:]:
                raise ValueError(f"{name} has an axis of length 0, got shape {_shown(shape)}")

    def operation(self, wanted: Pass, q: Shape, k: Shape) -> Operation:
        """A pass between sequences of these shapes."""
        mask = self.mask(q[-self.axes :], k[-self.axes :])
        return Operation(wanted, Request(mask, layout="bhdn"))

    def flat(self, shape: Shape) -> Shape:
        """The shape in layout "bhdn"."""
        batch, channels = shape[: -1 - self.axes], shape[-1 - self.axes]
        return math.prod(batch[:-1]), batch[-1], channels, math.prod(shape[-self.axes :])

    def flat_rows(self, shape: Shape) -> Shape:
        """The shape of a number for each query, in layout "bhdn"."""
        batch, heads, _, rows = self.flat((*shape[: -self.axes], 1, *shape[-self.axes :]))
        return batch, heads, rows


_AXES = {1: "sequence", 2: "height, width"}


def _shown(shape: Sizes) -> str:
    return f"({', '.join('?' if size is None else str(size) for size in shape)})"


def _all(shapes: dict[str, Sizes]) -> str:
    return ", ".join(f"{name} {_shown(shape)}" for name, shape in shapes.items())


def read(text: str) -> Between:
    """The value of a text. Raises ValueError for a text that `Between.text` did not make."""
    try:
        values = json.loads(text)
        version = values.pop("tilefold_sequences")
    except (ValueError, KeyError, AttributeError):
        raise ValueError("this is no text of attention between sequences") from None
    if version != 1:
        raise ValueError(f"the operation was written in format {version}; this one reads format 1")
    return Between(**values)


def _read_forward(text: str) -> Callable[[Sequence[Array]], Ready]:
    between = read(text)
    wanted = FORWARD_LOW.plus(results=("max",) * between.largest)

    def prepare(given: Sequence[Array]) -> Ready:
        (q, dtype), (k, _), (v, _) = given
        between.check(q, k, v)
        every = [(between.flat(shape), dtype) for shape, _ in given]
        operation = between.operation(wanted, q, k)
        call, results = operation.native(every), operation.results(every)
        rows = q[: -1 - between.axes], q[-between.axes :]
        o = rows[0] + (v[-1 - between.axes],) + rows[1]
        shapes = [o, *[rows[0] + rows[1]] * (len(results) - 1)]
        kinds = [kind for _, kind in results]
        return Ready(call.address, [*zip(shapes, kinds, strict=True)], 3, call)

    return prepare


def _read_backward(text: str) -> Callable[[Sequence[Array]], Ready]:
    between = read(text)

    def prepare(given: Sequence[Array]) -> Ready:
        _, (q, dtype), (k, _), (v, _), *_ = given
        between.check(q, k, v)
        every = [(between.flat(shape), kind) for shape, kind in given[:5]]
        every += [(between.flat_rows(shape), kind) for shape, kind in given[5:]]
        call = between.operation(BACKWARD_LOW, q, k).native(every)
        return Ready(call.address, [(q, dtype), (k, dtype), (v, dtype)], len(every), call)

    return prepare


_TYPES = "T: {half, float, double}", "S: {float, double}", "count: int >= 1"


def _forward(axes: int) -> Operator:
    batch: Part = (0, 0, -1 - axes)
    sequence: Part = (0, -axes, END)
    return Operator(
        f"TilefoldSequence{axes}dV1",
        _TYPES,
        ("q: T", "k: T", "v: T"),
        ("o: T", "statistics: count * S"),
        ((batch, (2, -1 - axes, -axes), sequence), (batch, sequence)),
        _read_forward,
    )


FORWARD = {axes: _forward(axes) for axes in (1, 2)}

BACKWARD = Operator(
    "TilefoldSequenceGradV1",
    _TYPES,
    ("do: T", "q: T", "k: T", "v: T", "o: T", "statistics: count * S"),
    ("dq: T", "dk: T", "dv: T"),
    (((1, 0, END),), ((2, 0, END),), ((3, 0, END),)),
    _read_backward,
)


@lru_cache(maxsize=1)
def registered() -> dict[int, Callable[..., Any]]:
    """The operators' Python functions by the number of axes; 0 is that of the backward pass."""
    every = (*FORWARD.values(), BACKWARD)
    gradients = {operator.name: _gradient for operator in FORWARD.values()}
    register(every, {**gradients, BACKWARD.name: _no_second_gradient})
    made = functions([operator.name for operator in every])
    return dict(zip((*FORWARD, 0), made, strict=True))


def _gradient(op: Any, do: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    """The gradients through o alone: l and m have none."""
    o, lse, low, *_ = op.outputs
    gradients: tuple[Tensor, ...] = registered()[0](
        do, *op.inputs, o, [lse, low], text=op.get_attr("text")
    )
    return gradients


def _no_second_gradient(op: Any, *slopes: Tensor) -> list[Tensor]:
    raise NotImplementedError(
        "gradients of attention between sequences have no gradients: use tilefold.attention where a"
        " second derivative is wanted"
    )


def attention(
    given: tuple[Any, Any, Any], largest: bool, axes: int, kind: str, sync: Any, **options: Any
) -> Any:
    """O, or (O, l, m) with `largest`. Raises tf.errors.InvalidArgumentError."""
    try:
        between = Between(axes, kind, sync, largest=largest, **options)
        q, k, v = (tf.convert_to_tensor(array) for array in given)
        _check_types(q, k, v)
        between.check(*[None if x.shape.rank is None else x.shape.as_list() for x in (q, k, v)])
    except (TypeError, ValueError) as error:
        raise tf.errors.InvalidArgumentError(None, None, str(error)) from error
    o, lse, low, *more = _run(between, q, k, v)
    if not largest:
        return o
    lse, low, top = (tf.stop_gradient(it) for it in (lse, low, *more))
    nothing = top == tf.constant(float("-inf"), top.dtype)
    m = tf.where(nothing, HIDDEN[q.dtype.name], tf.cast(top, q.dtype))
    sums = tf.exp((lse - tf.cast(m, lse.dtype)) + low)  # low: what rounding took from lse
    return o, tf.where(nothing, tf.zeros((), sums.dtype), sums), m


HIDDEN = {dtype: np.frombuffer(b"\xfa" * np.dtype(dtype).itemsize, dtype)[0] for dtype in DTYPES}
"""m of a query that sees no key: the number whose bytes are all 0xFA."""


def _check_types(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("Q", q), ("K", k), ("V", v)):
        if tensor.dtype.name not in DTYPES or tensor.dtype != q.dtype:
            allowed = " or ".join(DTYPES) if name == "Q" else f"{q.dtype.name} as Q is"
            raise TypeError(f"{name} must be of {allowed}, got {tensor.dtype.name}")


def _run(between: Between, q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
    """o, lse, lse_low, and perhaps the largest scores."""
    if tensors.takes_operators():
        check_synchronous()
        count = 3 if between.largest else 2
        run = registered()[between.axes]
        o, found = run(q, k, v, count=count, S=statistics(q), text=between.text)
        return (o, *found)
    shapes = [tuple(x.shape.as_list()) for x in (q, k, v)]
    if any(None in shape for shape in shapes):
        raise NotImplementedError(
            "here the shapes of Q, K and V must be known while the function is traced, got"
            f" {_all(dict(zip('QKV', shapes, strict=True)))}"
        )
    wanted = FORWARD_LOW.plus(results=("max",) * between.largest)
    request = between.operation(wanted, shapes[0], shapes[1]).request
    flat = [tf.reshape(x, between.flat(shape)) for x, shape in zip((q, k, v), shapes, strict=True)]
    o, *found = tensors.run(wanted, request, flat)
    rows = shapes[0][: -1 - between.axes], shapes[0][-between.axes :]
    shape_o = (*rows[0], shapes[2][-1 - between.axes], *rows[1])
    return (tf.reshape(o, shape_o), *[tf.reshape(it, rows[0] + rows[1]) for it in found])
