"""Attention and its gradients on a machine: tensors are checked, and bound to a plan's kernels.

A call is prepared once for the shapes, strides, types and alignment of its tensors. What it does
again is little: it makes the results and launches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tilefold.backends.triton.dispatch import Call, is_aligned16, prepare
from tilefold.backends.triton.machine import Machine
from tilefold.backends.triton.plan import plan
from tilefold.common import generation
from tilefold.masks.position_rules import Rule
from tilefold.problems.attention import (
    LAYOUTS,
    STATISTICS,
    Problem,
    Shape,
    as_rule,
    as_scale,
    check_layout,
    check_lse,
    check_precision,
    check_shape,
    common_dtype,
    contiguous,
    describe,
    shape_lse,
    shape_o,
    shapes_qkv,
)

if TYPE_CHECKING:
    from torch import Tensor

RESULTS = {"forward": ("o", "lse"), "backward": ("dq", "dk", "dv")}
"""What an operation writes."""

_EMPTY = {"o": 0.0, "lse": float("-inf"), "dq": 0.0, "dk": 0.0, "dv": 0.0}
"""The results where no query meets a key."""


@dataclass(frozen=True, eq=False)
class Known:
    """What follows from a call's inputs, found once; without a `call` no query meets a key."""

    problem: Problem
    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...]
    call: Call | None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Rule | None = None,
    scale: float | None = None,
    layout: str = "bhnd",
    precision: str = "highest",
    machine: Machine | None = None,
) -> tuple[Tensor, Tensor]:
    """o and lse, as `tilefold.attention(..., return_lse=True)`, on a machine of one's choice.

    Without a machine it is the GPU where q lies; `tilefold.triton.interpreted()` is Triton's
    interpreter, for tensors on the CPU. The tensors carry no gradient.

    Raises NotImplementedError where no kernel can run, and what `tilefold.attention` raises.
    """
    rest = as_rule(mask), as_scale(scale), layout, precision
    check_layout(layout)
    check_precision(precision)
    o, lse = forward(machine or _gpu(q), q.detach(), k.detach(), v.detach(), *rest)
    return o, lse


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    *,
    mask: Rule | None = None,
    scale: float | None = None,
    layout: str = "bhnd",
    precision: str = "highest",
    machine: Machine | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, as `tilefold.attention_backward`, on a machine; see `attention`."""
    rest = as_rule(mask), as_scale(scale), layout, precision
    check_layout(layout)
    check_precision(precision)
    do, q, k, v, o, lse = (tensor.detach() for tensor in (do, q, k, v, o, lse))
    dq, dk, dv = backward(machine or _gpu(q), do, q, k, v, o, lse, *rest)
    return dq, dk, dv


def _gpu(q: Tensor) -> Machine:
    from tilefold.backends.triton import runtime

    index = q.device.index if q.is_cuda else 0
    return runtime.gpu(index)


def forward(
    machine: Machine,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Rule,
    scale: float | None,
    layout: str,
    precision: str,
) -> tuple[Tensor, ...]:
    """o and lse."""
    return _run(machine, "forward", {"q": q, "k": k, "v": v}, mask, scale, layout, precision)


def backward(
    machine: Machine,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mask: Rule,
    scale: float | None,
    layout: str,
    precision: str,
) -> tuple[Tensor, ...]:
    """dq, dk and dv."""
    given = {"q": q, "k": k, "v": v, "o": o, "do": do, "lse": lse.contiguous()}
    return _run(machine, "backward", given, mask, scale, layout, precision)


def ready(machine: Machine, problem: Problem, operation: str, layout: str) -> None:
    """Plan a problem of contiguous tensors and compile its kernels; see `compile_async`."""
    q, k, v = shapes_qkv(problem, layout)
    o, lse = shape_o(problem, layout), shape_lse(problem)
    shapes = {"q": q, "k": k, "v": v, "o": o, "lse": lse}
    if operation == "backward":
        shapes |= {"do": o, "dq": q, "dk": k, "dv": v}
    if not problem.empty:
        strides = {name: contiguous(shape) for name, shape in shapes.items()}
        _prepare(machine, problem, operation, layout, strides, aligned16=True).compile()


def _run(
    machine: Machine,
    operation: str,
    given: dict[str, Tensor],
    mask: Rule,
    scale: float | None,
    layout: str,
    precision: str,
) -> tuple[Tensor, ...]:
    machine.check(**given)
    aligned16 = is_aligned16(given)
    forms = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in given.values()]
    rest = mask, scale, layout, precision
    key = (operation, generation.number, *rest, aligned16, *forms)
    known = machine.kept.calls.get(key)
    if known is None:
        known = _know(machine, operation, given, mask, scale, layout, precision, aligned16)
        size = known.call.plan.data_bytes if known.call else 0
        known = machine.kept.calls.put(key, known, size)
    made = {
        name: machine.empty(shape, dtype)
        for name, shape, dtype in zip(RESULTS[operation], known.shapes, known.dtypes, strict=True)
    }
    if known.call is None:
        for name, tensor in made.items():
            tensor.fill_(_EMPTY[name])
    else:
        axes = LAYOUTS[layout]
        operands = {**given, **made}
        with machine.active():
            known.call.run(
                {
                    name: tensor if name == "lse" else tensor.permute(axes)
                    for name, tensor in operands.items()
                }
            )
    return tuple(made.values())


def _know(
    machine: Machine,
    operation: str,
    given: Mapping[str, Tensor],
    mask: Rule,
    scale: float | None,
    layout: str,
    precision: str,
    aligned16: bool,
) -> Known:
    """Checks the inputs, and prepares the call unless it is empty."""
    names = {name: str(x.dtype).removeprefix("torch.") for name, x in given.items()}
    dtype = common_dtype({name: kind for name, kind in names.items() if name != "lse"})
    q, k, v = (tuple(given[name].shape) for name in ("q", "k", "v"))
    problem = describe(q, k, v, dtype, scale, mask, layout, precision)
    shapes: tuple[Shape, ...] = shape_o(problem, layout), shape_lse(problem)
    dtypes: tuple[str, ...] = dtype, STATISTICS[dtype]
    if operation == "backward":
        check_lse(names["lse"], dtype)
        for name, shape in zip(("do", "o", "lse"), (shapes[0], *shapes), strict=True):
            check_shape(name, tuple(given[name].shape), shape)
        shapes, dtypes = shapes_qkv(problem, layout), (dtype,) * 3
    if problem.empty:
        return Known(problem, shapes, dtypes, None)
    strides = {name: tuple(tensor.stride()) for name, tensor in given.items()}
    strides |= {
        name: contiguous(shape) for name, shape in zip(RESULTS[operation], shapes, strict=True)
    }
    return Known(
        problem, shapes, dtypes, _prepare(machine, problem, operation, layout, strides, aligned16)
    )


def _prepare(
    machine: Machine,
    problem: Problem,
    operation: str,
    layout: str,
    strides: Mapping[str, tuple[int, ...]],
    aligned16: bool,
) -> Call:
    axes = LAYOUTS[layout]
    canonical = {
        name: found if name == "lse" else tuple([found[axis] for axis in axes])
        for name, found in strides.items()
    }
    return prepare(plan(problem, machine.architecture, operation), machine, canonical, aligned16)
