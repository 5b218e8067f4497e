"""GPUs of NVIDIA and AMD as machines, and their calls: see `protocols.Backend`.

Also attention and its gradients as functions of a machine, which `tilefold.triton` shows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tilefold.backends import calls
from tilefold.backends.extra import beside, sinks_as_given
from tilefold.backends.protocols import BACKWARD, FORWARD, PASSES, Pass, Placement
from tilefold.backends.triton import dispatch, runtime
from tilefold.backends.triton.machine import Machine as TritonMachine
from tilefold.backends.triton.plan import plan
from tilefold.backends.triton.runtime import missing
from tilefold.masks.position_rules import Rule
from tilefold.problems.attention import Problem
from tilefold.problems.request import Request

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["admit", "attention", "attention_backward", "machine", "missing", "prepare"]


def machine(index: int = 0) -> runtime.Gpu:
    """The GPU that torch calls "cuda:<index>". Raises NotImplementedError where it cannot serve."""
    return runtime.gpu(index)


def admit(problem: Problem) -> Problem:
    """The problem itself: all types are computed."""
    return problem


def prepare(
    machine: TritonMachine, problem: Problem, wanted: Pass, placement: Placement
) -> dispatch.Call:
    """Plan a problem and have its kernels written; Triton compiles each at its first launch."""
    usual = PASSES[wanted.operation].operands
    given = ("sinks", "seed", "input")
    extra = [name for name in wanted.operands if name not in usual and not name.startswith(given)]
    made = plan(problem, machine.architecture, wanted.operation, extra=tuple(extra))
    aligned16 = bool(placement.alignment)
    return dispatch.prepare(made, machine, placement.strides, aligned16, placement.axes)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Rule | None = None,
    scale: float | None = None,
    score: Any = None,
    sinks: Any = None,
    dropout: float = 0.0,
    seed: int | None = None,
    layout: str = "bhnd",
    precision: str = "highest",
    machine: TritonMachine | None = None,
) -> tuple[Tensor, Tensor]:
    """o and lse, as `tilefold.attention(..., return_lse=True)`, on a machine of one's choice.

    Without a machine it is the GPU where q lies; `tilefold.triton.interpreted()` is Triton's
    interpreter, for tensors on the CPU. The tensors carry no gradient. Dropout needs a seed. Arrays
    of NumPy in `score` are copied to the device.

    Raises NotImplementedError where no kernel can run, and what `tilefold.attention` raises.
    """
    request = Request(mask, scale, layout, precision)
    o, lse = _run(machine, FORWARD, (q, k, v), request, score, sinks, dropout, seed)
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
    score: Any = None,
    sinks: Any = None,
    dropout: float = 0.0,
    seed: int | None = None,
    layout: str = "bhnd",
    precision: str = "highest",
    machine: TritonMachine | None = None,
) -> tuple[Tensor, ...]:
    """dq, dk and dv, as `tilefold.attention_backward`, on a machine; see `attention`.

    After these come the gradients of the tensors of `score` in their order, and of `sinks`.
    """
    request, given = Request(mask, scale, layout, precision), (do, q, k, v, o, lse)
    return _run(machine, BACKWARD, given, request, score, sinks, dropout, seed)


def _run(
    machine: TritonMachine | None,
    wanted: Pass,
    given: tuple[Tensor, ...],
    request: Request,
    score: Any,
    sinks: Any,
    dropout: Any,
    seed: Any,
) -> tuple[Tensor, ...]:
    """The results of a pass, on the GPU where q lies unless another machine is given."""
    from torch import Tensor

    from tilefold.backends.arrays import torch

    named = dict(zip(wanted.given, given, strict=True))
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got a {type(tensor).__name__}")
    q = named["q"]
    on = machine or runtime.gpu(q.device.index if q.is_cuda else 0)
    request, extra = beside(q, request, score, sinks, dropout, seed)
    wanted = wanted.plus(extra.names, extra.gradients if wanted is BACKWARD else ())
    more = [
        array if isinstance(array, Tensor) else torch.tensor_of(np.asarray(array)).to(q.device)
        for array in extra.arrays
    ]
    detached = tuple([tensor.detach() for tensor in (*given, *more)])
    return sinks_as_given(sinks, wanted, calls.run(on, torch, wanted, detached, request))
