"""The operators of attention and of its gradients: "text" says which operation they compute.

There is one forward operator for each layout, since a shape function sees no attribute but types.
The gradient of one is the operator of the backward pass, on what the forward pass was given and
wrote.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import tensorflow as tf

from tilefold.backends.protocols import Pass
from tilefold.frontends.operation import Operation
from tilefold.frontends.tensorflow.pairs import statistics
from tilefold.frontends.tensorflow.passes import gradients
from tilefold.frontends.tensorflow.registering import END, Operator, Part, functions, register
from tilefold.frontends.tensorflow.second import second_gradients
from tilefold.frontends.tensorflow.states import Array, Ready
from tilefold.problems.request import Request

Tensor = Any

_Q, _K, _V = range(3)

_O: dict[str, tuple[Part, ...]] = {
    "bhnd": ((_Q, 0, 3), (_V, 3, 4)),
    "bnhd": ((_Q, 0, 3), (_V, 3, 4)),
    "bhdn": ((_Q, 0, 2), (_V, 2, 3), (_Q, 3, 4)),
}
"""The shape of o, by the layout."""

_LSE: dict[str, tuple[Part, ...]] = {
    "bhnd": ((_Q, 0, 3),),
    "bnhd": ((_Q, 0, 1), (_Q, 2, 3), (_Q, 1, 2)),
    "bhdn": ((_Q, 0, 2), (_Q, 3, 4)),
}
"""The shape of lse and the like."""

TYPES = "T: {float, double, half, bfloat16}", "S: {float, double}", "count: int >= 1"
"""The types of q, k, v and o, and of lse and the like, and the number of the latter."""

BACKWARD_NAME = "TilefoldAttentionGradV1"


def _read(text: str) -> Callable[[Sequence[Array]], Ready]:
    if text == _HELD:
        return lambda given: _ready(_at(given[-1][0][0]), given[:-1])
    operation = Operation.read(text)
    return lambda given: _ready(operation, given)


def _ready(operation: Operation, given: Sequence[Array]) -> Ready:
    call = operation.native(given)
    return Ready(call.address, operation.results(given), len(given), call)


def _forward(layout: str) -> Operator:
    return Operator(
        f"TilefoldAttention{layout.capitalize()}V1",
        (*TYPES, "E: list(type) >= 0"),
        ("q: T", "k: T", "v: T", "extra: E"),
        ("o: T", "statistics: count * S"),
        (_O[layout], _LSE[layout]),
        _read,
    )


FORWARD = {layout: _forward(layout) for layout in _O}

BACKWARD = Operator(
    BACKWARD_NAME,
    (*TYPES, "E: list(type) >= 0", "G: list(type) >= 0"),
    ("do: T", "q: T", "k: T", "v: T", "o: T", "statistics: count * S", "extra: E"),
    ("dq: T", "dk: T", "dv: T", "more: G"),
    (((1, 0, END),), ((2, 0, END),), ((3, 0, END),), None),
    _read,
)


def attention(wanted: Pass, request: Request, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The results of a forward pass, which is differentiable with respect to floats."""
    q, k, v, *extra = given
    run = registered()[request.layout]
    text, held = _named(wanted, request)
    count, kind = len(wanted.results) - 1, statistics(q)
    o, more = run(q=q, k=k, v=v, extra=extra + held, count=count, S=kind, text=text)
    return (o, *more)


def backward(wanted: Pass, request: Request, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The results of a backward pass."""
    do, q, k, v, o, *rest = given
    count = 2 if "lse_low" in wanted.given else 1
    text, held = _named(wanted, request)
    asked = [name.removeprefix("d") for name in wanted.results[3:]]
    named = dict(zip(wanted.given, given, strict=True))
    *found, more = registered()[BACKWARD_NAME](
        do=do,
        q=q,
        k=k,
        v=v,
        o=o,
        statistics=rest[:count],
        extra=rest[count:] + held,
        G=[named[name].dtype for name in asked],
        text=text,
    )
    for name, gradient in zip(asked, more, strict=True):
        gradient.set_shape(named[name].shape)
    return (*found, *more)


def _named(wanted: Pass, request: Request) -> tuple[str, list[Tensor]]:
    """The attribute "text" of a call, and the input that goes with it in an eager call."""
    if not tf.executing_eagerly():
        return _operation(wanted, request).text, []
    check_synchronous()
    return _HELD, [_number(wanted, request)]


def check_synchronous() -> None:
    """Raises NotImplementedError where TensorFlow runs eager calls asynchronously."""
    if tf.executing_eagerly() and not tf.config.experimental.get_synchronous_execution():
        raise NotImplementedError(
            "TensorFlow runs eager calls asynchronously, and a call here may ask Python meanwhile:"
            " call tf.config.experimental.set_synchronous_execution(True)"
        )


_HELD = "held"
"""The text of eager calls. TensorFlow keeps a kernel for each value of an attribute, and for ever.

So the operation of an eager call, whose mask may be new each time, is no attribute: it stands in
`_held`, and the last input tells where, by its shape: (number, 0). An asynchronous call could run
after its tensor is gone, so such calls are refused.
"""

_held: dict[int, Any] = vars(tf).setdefault("_tilefold_operations", {})
_numbers: Iterator[int] = vars(tf).setdefault("_tilefold_numbers", itertools.count(1))
"""They stand in TensorFlow: two copies of tilefold share its operators, so they share these too."""


@lru_cache(maxsize=64)
def _number(wanted: Pass, request: Request) -> Tensor:
    """The tensor that stands for an operation, which is held as long as the tensor is.

    A tape keeps the inputs of the calls that it has recorded.
    """
    number = next(_numbers)
    tensor = tf.constant(np.empty((number, 0), np.bool_))
    _held[number] = _operation(wanted, request)
    weakref.finalize(tensor, _held.pop, number, None)
    return tensor


def _at(number: int) -> Operation:
    """The operation with a number, perhaps of another copy of tilefold."""
    found = _held[number]
    return found if isinstance(found, Operation) else Operation.read(found.text)


@lru_cache(maxsize=64)
def _operation(wanted: Pass, request: Request) -> Operation:
    """The operation, whose text is made once."""
    return Operation(wanted, request)


def _opened(op: Any) -> tuple[Operation, Sequence[Tensor]]:
    """The operation of an operator that TensorFlow has recorded, and what it is given."""
    text = op.get_attr("text").decode()
    if text == _HELD:
        return _at(op.inputs[-1].shape[0]), op.inputs[:-1]
    return Operation.read(text), op.inputs


@lru_cache(maxsize=1)
def registered() -> dict[str, Callable[..., Any]]:
    """The operators' Python functions, by the layout, and that of the backward pass."""
    every = (*FORWARD.values(), BACKWARD)
    gradients = {operator.name: _gradient for operator in FORWARD.values()}
    register(every, {**gradients, BACKWARD_NAME: _second_gradient})
    made = functions([operator.name for operator in every])
    return dict(zip((*FORWARD, BACKWARD_NAME), made, strict=True))


def _gradient(op: Any, *slopes: Tensor) -> list[Tensor | None]:
    """The gradients of a forward operator's inputs; `slopes` are those of its outputs."""
    operation, given = _opened(op)
    wanted, request = operation.wanted, operation.request
    asked = partial(is_wanted, op)
    found = gradients(backward, wanted, request, given, op.outputs, slopes, asked)
    return found + [None] * (len(op.inputs) - len(given))


def is_wanted(op: Any, place: int) -> bool:
    """False where nothing asks for the gradient of an input, as far as TensorFlow tells."""
    skipped = getattr(op, "skip_input_indices", None)  # of a tape that watches single operators
    if skipped is not None:
        return place not in skipped
    tensor = op.inputs[place]
    return not tf.is_symbolic_tensor(tensor) or tensor.op.type != "StopGradient"


def _second_gradient(op: Any, *slopes: Tensor) -> list[Tensor | None]:
    """The gradients of the backward operator's inputs."""
    operation, given = _opened(op)
    found = second_gradients(operation.wanted, operation.request, given, slopes)
    return found + [None] * (len(op.inputs) - len(given))
