"""DTensors: each process computes its part of the batch and of the heads by a call of its own.

A rule or score that asks for the batch or the head counts from the first of the part, so results
are those of the whole. Parts along other axes are gathered first, and so are heads that do not
divide evenly. Autograd goes through the calls, and gradients lie as the tensors do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilefold.backends.extra import Extra
from tilefold.backends.protocols import spoken
from tilefold.masks.parts import part
from tilefold.problems.request import LAYOUTS, Request
from tilefold.scores.parts import part_of_score
from tilefold.scores.score import Sizes


def in_parts(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """True if one of the tensors is a DTensor; a compiler sees operators, which take none."""
    plain = type(q) is Tensor and type(k) is Tensor and type(v) is Tensor
    if plain or torch.compiler.is_compiling():
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(x, module.DTensor) for x in (q, k, v))


class _Split(NamedTuple):
    """How the axes of a mesh divide batch and heads, and where the part of this process begins."""

    mesh: Any
    axes: tuple[str, ...]
    """For each axis of the mesh "b", "h", or "" where every process has the same."""

    b0: int
    heads: slice

    def placements(self, b: int | None, h: int | None, summed: bool = False) -> list[Any]:
        """The placements of a tensor whose axes for batch and heads are `b` and `h`, if any.

        `summed`: of a gradient, to which all processes add that have an equal part.
        """
        from torch.distributed.tensor import Partial, Replicate, Shard

        found = []
        for name in self.axes:
            place = {"b": b, "h": h, "": None}[name]
            whole = Partial() if name and summed else Replicate()
            found.append(whole if place is None else Shard(place))
        return found


def attention(
    call: Callable[..., tuple[Tensor, ...]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    request: Request,
    extra: Extra,
    further: tuple[str, ...],
) -> tuple[Tensor, ...]:
    """`call` of the parts of this process; its results are DTensors too."""
    from torch.distributed.tensor import DTensor

    _check(q, k, v, request)
    axes = LAYOUTS[request.layout]
    split = _split(q, k, axes)
    batch, heads, len_q = (q.shape[axis] for axis in axes[:3])
    sizes = Sizes(batch, heads, len_q, k.shape[axes[2]])
    rows = split.placements(axes[0], axes[1])
    given = [x.redistribute(split.mesh, rows).to_local() for x in (q, k, v)]  # type: ignore[attr-defined]
    arrays = [_local(name, x, split) for name, x in zip(*extra, strict=True)]
    mask = part(request.mask, sizes, split.b0, split.heads.start)
    score = request.score and part_of_score(request.score, sizes, split.b0, split.heads.start)
    own = request.changed(mask=mask, score=score)
    o, *rest = call(*given, own, Extra(extra.names, tuple(arrays)), further)
    sums = split.placements(0, 1)
    return (
        DTensor.from_local(o, split.mesh, rows, run_check=False),
        *[DTensor.from_local(x, split.mesh, sums, run_check=False) for x in rest],
    )


def refuse_backward() -> None:
    """Raises NotImplementedError."""
    raise NotImplementedError(
        "attention_backward of DTensors is not implemented: call attention, which is differentiable"
    )


def _check(q: Tensor, k: Tensor, v: Tensor, request: Request) -> None:
    """Raises unless all are DTensors of one mesh, of which kernels can compute parts."""
    from torch.distributed.tensor import DTensor

    if request.dropout:
        raise NotImplementedError(
            "dropout of DTensors is not implemented: put attention in local_map of"
            " torch.distributed.tensor.experimental, with another seed in each process"
        )
    given = {"q": q, "k": k, "v": v}
    for name, x in given.items():
        if not isinstance(x, DTensor):
            raise TypeError(
                f"{name} must be a DTensor as the others are, got {type(x).__name__}: pass it"
                " through distribute_tensor"
            )
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 axes, got shape {tuple(x.shape)}")
    if not all(x.device_mesh == q.device_mesh for x in (k, v)):  # type: ignore[attr-defined]
        raise ValueError("q, k and v must be DTensors of one mesh")


def _split(q: Any, k: Any, axes: tuple[int, ...]) -> _Split:
    """The batch and the heads as q lies, where they divide evenly."""
    from torch.distributed.tensor import Shard

    mesh, place = q.device_mesh, q.device_mesh.get_coordinate()
    left = {"b": [q.shape[axes[0]]], "h": [q.shape[axes[1]], k.shape[axes[1]]]}
    begin = {"b": 0, "h": 0}
    names = []
    for number, placement in enumerate(q.placements):
        parts, name = mesh.size(number), ""
        if type(placement) is Shard:
            name = {axes[0]: "b", axes[1]: "h"}.get(placement.dim % 4, "")
        if name and any(size % parts for size in left[name]):
            name = ""
        if name:
            left[name] = [size // parts for size in left[name]]
            begin[name] += place[number] * left[name][0]
        names.append(name)
    heads = slice(begin["h"], begin["h"] + left["h"][0])
    return _Split(mesh, tuple(names), begin["b"], heads)


def _local(name: str, x: Any, split: _Split) -> Any:
    """What the process has of an array beside q, k and v: its sinks, and others whole."""
    from torch.distributed.tensor import DTensor

    heads = 0 if name == "sinks" else None
    if isinstance(x, DTensor):
        lies = split.placements(None, heads)
        gradient = split.placements(None, heads, summed=True)
        return x.redistribute(split.mesh, lies).to_local(grad_placements=gradient)
    if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            f"{spoken(name)} must be a DTensor as q is, since it wants a gradient: pass it through"
            " distribute_tensor"
        )
    return x if heads is None else x[split.heads]
