"""Results of PyTorch over disjoint keys, joined by its operations: of `merge`, and with sinks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tilefold.problems.request import LAYOUTS


def joined(parts: Sequence[Tensor], lses: Sequence[Tensor], layout: str) -> tuple[Tensor, Tensor]:
    """o and lse of the keys of all parts, differentiable in every way.

    There may be more of `lses` than of `parts`: those belong to keys without values.
    """
    every = torch.stack([lse.expand_as(lses[0]) for lse in lses])
    unseen = every == -torch.inf
    nothing = unseen.all(0)
    top = every.detach().amax(0)  # the results do not depend on it, nor do gradients
    weights = torch.exp(every - top.masked_fill(nothing, 0))
    total = weights.sum(0).masked_fill(nothing, 1)
    lse = (top + total.log()).masked_fill(nothing, -torch.inf)
    axes = LAYOUTS[layout]
    shares = [
        share * part.permute(axes).to(lse.dtype).masked_fill(hidden, 0)
        for part, share, hidden in zip(
            parts,
            (weights / total).unsqueeze(-1).unbind(),
            unseen.unsqueeze(-1).unbind(),
            strict=False,
        )
    ]
    o = shares[0]
    for share in shares[1:]:
        o = o + share
    return o.permute(axes).to(parts[0].dtype).contiguous(), lse  # each layout is its own inverse


def with_sinks(o: Tensor, lse: Tensor, sinks: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """o and lse with sinks (heads, number), which are keys without values."""
    return joined([o], [lse, *sinks[:, None].unbind(-1)], layout)


def gradient_of_sinks(
    do: Tensor, o: Tensor, lse: Tensor, dlse: Tensor | None, sinks: Tensor, layout: str
) -> Tensor:
    """dsinks: -exp(sinks - lse) delta, summed over batch and queries."""
    kind, axes = sinks.dtype, LAYOUTS[layout]
    delta = (do.permute(axes).to(kind) * o.permute(axes).to(kind)).sum(-1)
    delta = delta if dlse is None else delta - dlse
    shift = lse.masked_fill(lse == -torch.inf, torch.inf)
    share = (sinks[:, None] - shift[..., None]).exp()
    return -(share * delta[..., None]).sum((0, 2))
