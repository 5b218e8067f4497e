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

from tilefold.frontends.torch.autocast import exact
from tilefold.frontends.torch.derivatives.tiles import Kind, Tile
from tilefold.frontends.torch.derivatives.walk import Slices, Walk


def tile_sum(tile: Tile, walk: Walk, *given: Tensor) -> tuple[Tensor, ...]:
    """The sums of all results of a function over the tiles of a walk.

    Rows of queries are (copies, batch, key heads, group, len_q, width), rows of keys are
    (copies, batch, key heads, 1, len_k, width), and other arrays are (copies, ...). One copy stands
    for any number of equal ones. All are of one type, float32 or float64, but for seeds.
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
    @exact
    def forward(tile: Tile, walk: Walk, *given: Tensor) -> tuple[Tensor, ...]:
        first, copies = given[0], max([x.shape[0] for x in given])
        shapes: dict[Kind, Sequence[int]] = {
            kind: x.shape[1:] for x, kind in zip(given, tile.given, strict=True)
        }
        widths = tile.widths([x.shape[-1] for x in given])
        sums = [
            first.new_zeros(copies, *shapes[kind][:-1], width)
            if isinstance(kind, str)
            else first.new_zeros(copies, *shapes[kind])
            for kind, width in zip(tile.made, widths, strict=True)
        ]
        for step in walk.steps(copies, first.device):
            rows = {"q": step.queries, "k": step.keys}
            pairs = walk.pairs(step, first.device, indexed=tile.indexed)
            parts = [
                _part(x, step.heads, rows[kind]).flatten(0, 2).flatten(1, 2)
                if isinstance(kind, str)
                else kind.read(x, pairs)
                for x, kind in zip(given, tile.given, strict=True)
            ]
            for total, kind, result in zip(sums, tile.made, tile.run(parts, pairs), strict=True):
                if isinstance(kind, str):
                    part = _part(total, step.heads, rows[kind])
                    part.add_(result.view(part.shape))
                else:
                    kind.add(total, result, pairs)
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
        return (
            None,
            None,
            *[
                next(found).sum_to_size(x.shape) if each else None
                for x, each in zip(given, wanted, strict=True)
            ],
        )

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
        entries = [
            x[None] if dim is None else x.movedim(dim, 0)
            for x, dim in zip(given, in_dims[2:], strict=True)
        ]
        copies = max([x.shape[1] for x in entries])
        folded = [
            x[0]
            if dim is None and x.shape[1] == 1 <= size
            else x.expand(size, copies, *x.shape[2:]).flatten(0, 1)
            for x, dim in zip(entries, in_dims[2:], strict=True)
        ]
        sums = tile_sum(tile, walk, *folded)
        return tuple([x.reshape(size, copies, *x.shape[1:]) for x in sums]), (0,) * len(sums)


def _part(x: Tensor, heads: Slices, rows: slice) -> Tensor:
    """Some rows of some heads."""
    if x.shape[0] == 1:
        copies = heads[0].stop - heads[0].start
        return x[:, heads[1], heads[2], :, rows].expand(copies, *[-1] * (x.dim() - 1))
    return x[heads[0], heads[1], heads[2], :, rows]
