"""The sum of a function of a tile over all tiles, differentiable any number of times.

The derivative of a sum is the sum of the derivative, so this one operation is closed: its backward
pass, its forward mode and its vectorised form are the same operation of other functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tilefold.frontends.derivatives.tiles import Tile
from tilefold.frontends.derivatives.walk import Slices, Walk


def tile_sum(tile: Tile, walk: Walk, *given: Tensor) -> tuple[Tensor, ...]:
    """The sums of all results of a function over the tiles of a walk.

    Rows of queries are (copies, batch, key heads, group, len_q, width), and rows of keys are
    (copies, batch, key heads, 1, len_k, width). All are of one type, float32 or float64.
    """
    apply: Any = _TileSum.apply
    sums: tuple[Tensor, ...] = apply(tile, walk, *given)
    return sums


def nested(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """The `jvp` of a function of autograd, from its context, what it saved, and the tangents.

    PyTorch 2.13 calls it with forward mode switched off. So the tangents of an outer
    `torch.func.jvp` would be lost without a word: jacfwd(jacfwd(f)) would be 0. Switched on, what
    was saved still carries the tangents of this `jvp`, and they are taken off.
    """

    @functools.wraps(jvp)
    def visible(ctx: Any, *tangents: Tensor | None) -> Any:
        primal: Any = forward_ad.unpack_dual
        inside: Any = forward_ad._set_fwd_grad_enabled
        with inside(torch._C._are_functorch_transforms_active()):
            saved = [x if x is None else primal(x).primal for x in ctx.saved_tensors]
            return jvp(ctx, saved, *tangents)

    return visible


class _TileSum(torch.autograd.Function):
    @staticmethod
    def forward(tile: Tile, walk: Walk, *given: Tensor) -> tuple[Tensor, ...]:
        first = given[0]
        shapes = {"q": (walk.group, walk.len_q), "k": (1, walk.len_k)}
        sums = [
            first.new_zeros(*first.shape[:3], *shapes[kind], width)
            for kind, width in zip(
                tile.made, tile.widths([x.shape[-1] for x in given]), strict=True
            )
        ]
        for step in walk.steps(first.shape[0], first.device):
            rows = {"q": step.queries, "k": step.keys}
            pairs = walk.pairs(step, first.device, indexed=tile.indexed)
            parts = [
                _part(x, step.heads, rows[kind]).flatten(0, 2).flatten(1, 2)
                for x, kind in zip(given, tile.given, strict=True)
            ]
            for total, kind, result in zip(sums, tile.made, tile.run(parts, pairs), strict=True):
                part = _part(total, step.heads, rows[kind])
                part.add_(result.view(part.shape))
        return tuple(sums)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.tile, ctx.walk, *given = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given)
        ctx.save_for_forward(*given)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = tuple(ctx.needs_input_grad[2:])
        there = tuple([slope is not None for slope in slopes])
        given = ctx.saved_tensors
        if not any(there) or not any(wanted):
            return (None,) * (2 + len(given))
        tile = ctx.tile.pulled(there, wanted)
        seen = [slope for slope in slopes if slope is not None]
        found = iter(tile_sum(tile, ctx.walk, *given, *seen))
        return (None, None, *[next(found) if each else None for each in wanted])

    @staticmethod
    @nested
    def jvp(ctx: Any, saved: Sequence[Tensor], *tangents: Tensor | None) -> tuple[Tensor, ...]:
        moves = tangents[2:]
        tile = ctx.tile.pushed(tuple([move is not None for move in moves]))
        seen = [move for move in moves if move is not None]
        return tile_sum(tile, ctx.walk, *saved, *seen)

    @staticmethod
    def vmap(info: Any, in_dims: Any, tile: Tile, walk: Walk, *given: Tensor) -> Any:
        size = info.batch_size
        folded = [
            (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
            for x, dim in zip(given, in_dims[2:], strict=True)
        ]
        sums = tile_sum(tile, walk, *folded)
        return tuple([x.reshape(size, -1, *x.shape[1:]) for x in sums]), (0,) * len(sums)


def _part(x: Tensor, heads: Slices, rows: slice) -> Tensor:
    return x[heads[0], heads[1], heads[2], :, rows]
