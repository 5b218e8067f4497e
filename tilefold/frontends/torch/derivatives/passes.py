"""The passes of attention as functions of a tile, with the derivatives that are written by hand.

All further ones follow from `Pulled` and `Pushed`. With S = F(scale Q K^T, E), where F is a
modified score and E are entries of arrays, and P = exp(S - shift), where shift is lse, which counts
as an argument; Z is 1 without dropout:

    Gradients  dS = P (Z dO V^T + minus), G = dS dF/ds, with minus = -delta:
               scale G K, scale G^T Q, (Z P)^T dO, dS dF/dE
    Tangents   X = dF/ds scale (tQ K^T + Q tK^T) + dF/dE tE:
               (Z P X) V + (Z P) tV, rowsum(P X)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from tilefold.frontends.torch.derivatives.arguments import Entries, Kept
from tilefold.frontends.torch.derivatives.modified import Curves, Modification
from tilefold.frontends.torch.derivatives.tiles import Flags, Kinds, Pulled, Tile, chosen
from tilefold.frontends.torch.derivatives.walk import Pairs
from tilefold.problems.dropout import factor


class Weights(NamedTuple):
    """P of a tile, dropout's factor Z, and the derivatives of F: None stands for 1."""

    p: Tensor
    z: Tensor | None
    slope: Tensor | None
    slopes: tuple[Tensor, ...]
    curves: Curves | None

    @property
    def kept(self) -> Tensor:
        """Z P."""
        return self.p if self.z is None else self.p * self.z

    def along(self, x: Tensor, entries: Sequence[Tensor | None]) -> Tensor:
        """The change of F where scores and entries change so."""
        x = x if self.slope is None else x * self.slope
        for entry, slope in zip(entries, self.slopes, strict=False):
            x = x if entry is None else x + slope * entry
        return x


@dataclass(frozen=True, eq=False)
class Softmax:
    """How weights are made of scores; its arguments follow those of every function.

    They are what pairs read of arrays, and the pairs that dropout keeps.
    """

    scale: float
    score: Modification | None = None
    chance: float = 0.0

    @cached_property
    def entries(self) -> tuple[Entries, ...]:
        """The arguments that a modified score reads."""
        return tuple([Entries(lookup) for lookup in self.score.lookups]) if self.score else ()

    @cached_property
    def given(self) -> Kinds:
        """The kinds of all arguments."""
        return (*self.entries, Kept(self.chance)) if self.chance else self.entries

    @property
    def plain(self) -> bool:
        """True where scores are not modified, and no weight is dropped."""
        return self.score is None and not self.chance

    def weights(
        self,
        scaled: Tensor,
        shift: Tensor,
        k: Tensor,
        pairs: Pairs,
        given: Sequence[Tensor],
        curved: bool = False,
    ) -> Weights:
        """The weights, 0 for hidden pairs. A row that sees nothing has a shift of +inf.

        `curved`: with the second derivatives of a modified score.
        """
        s, hidden = scaled @ k.mT, pairs.hidden
        slope: Tensor | None = None
        slopes: tuple[Tensor, ...] = ()
        curves: Curves | None = None
        if self.score is not None:
            read = [*given[: len(self.entries)]]
            if self.score.hides:
                with torch.no_grad():
                    unseen = self.score.value(s, pairs.indices, read) == -torch.inf
                hidden = unseen if hidden is None else hidden | unseen
                read = [entry.masked_fill(entry == -torch.inf, 0) for entry in read]
            indices = pairs.indices
            if hidden is not None:
                indices = self.score.visible(indices, hidden)
            if curved:
                curves = self.score.curves(s, indices, read)
            s, slope, slopes = self.score.both(s, indices, read)
        s = s - shift
        s = s if hidden is None else s.masked_fill(hidden, -torch.inf)
        z = given[-1].to(s.dtype) * factor(self.chance) if self.chance else None
        return Weights(s.exp(), z, slope, slopes, curves)


@dataclass(frozen=True)
class Gradients(Tile):
    """The backward pass of attention: gradients of q, k and v, and of the wanted entries."""

    softmax: Softmax
    wanted: Flags = ()

    @property
    def given(self) -> Kinds:
        """These are q, shift, k, v, do and minus; and those of `Softmax`."""
        return "q", "q", "k", "k", "q", "q", *self.softmax.given

    @property
    def made(self) -> Kinds:
        """Those of q, k and v, and of wanted entries."""
        return "q", "k", "k", *chosen(self.softmax.entries, self.wanted)

    @property
    def indexed(self) -> bool:
        """True unless scores are plain."""
        return not self.softmax.plain

    def widths(self, given: Sequence[int]) -> list[int]:
        """Those of q, k and v."""
        return [given[0], given[2], given[3], *[0] * sum(self.wanted)]

    def run(self, given: Sequence[Tensor], pairs: Pairs) -> list[Tensor]:
        """The gradients of a tile."""
        q, shift, k, v, do, minus, *more = given
        scaled = q * self.softmax.scale
        found = self.softmax.weights(scaled, shift, k, pairs, more)
        dp = do @ v.mT
        dp = dp if found.z is None else dp * found.z
        ds = found.p * (dp + minus)
        entries = [
            (ds * slope).sum_to_size(entry.shape)
            for entry, slope, wanted in zip(more, found.slopes, self.wanted, strict=False)
            if wanted
        ]
        ds = ds if found.slope is None else ds * found.slope
        return [self.softmax.scale * (ds @ k), ds.mT @ scaled, found.kept.mT @ do, *entries]

    def pulled(self, slopes: Flags, wanted: Flags) -> Tile:
        """The gradients with respect to the wanted arguments, from those of some results."""
        whole = all((*slopes, *wanted[:6]))
        return Second(self, slopes, wanted) if whole else Pulled(self, slopes, wanted)


@dataclass(frozen=True)
class Tangents(Tile):
    """The forward mode of attention: the derivatives of sums of values, and of lse.

    `moved`: whether q, k, v and each entry move.
    """

    softmax: Softmax
    moved: Flags

    @property
    def given(self) -> Kinds:
        """These are q, shift, k and v; those of `Softmax`; and what moves."""
        moves = chosen(("q", "k", "k", *self.softmax.entries), self.moved)
        return "q", "q", "k", "k", *self.softmax.given, *moves

    @property
    def made(self) -> Kinds:
        """Rows of queries."""
        return "q", "q"

    @property
    def indexed(self) -> bool:
        """True unless scores are plain."""
        return not self.softmax.plain

    def widths(self, given: Sequence[int]) -> list[int]:
        """That of v, and 1."""
        return [given[3], 1]

    def run(self, given: Sequence[Tensor], pairs: Pairs) -> list[Tensor]:
        """The derivatives of a tile."""
        q, shift, k, v, *more = given
        last = 4 + len(self.softmax.given)
        moves = iter(given[last:])
        tq, tk, tv, *entries = [next(moves) if each else None for each in self.moved]
        scaled = q * self.softmax.scale
        found = self.softmax.weights(scaled, shift, k, pairs, more[: last - 4])
        x = torch.zeros_like(found.p)
        for product in (
            None if tq is None else self.softmax.scale * tq @ k.mT,
            None if tk is None else scaled @ tk.mT,
        ):
            x = x if product is None else x + product
        px = found.p * found.along(x, entries)
        o = (px if found.z is None else px * found.z) @ v
        return [o if tv is None else o + found.kept @ tv, px.sum(-1, keepdim=True)]


@dataclass(frozen=True)
class Second(Pulled):
    """The gradients of `Gradients`, from those of its results (gQ, gK, gV, gE), written by hand.

    Autograd within the tile computes some products twice. With it, forward, backward and second
    pass of causal attention (8, 2048, 64) took 0.48 s on two cores of a Xeon, and 0.32 s with this,
    where scores are plain. F' and F'' stand for all derivatives of F, those by E too:

        X = scale (gQ K^T + Q gK^T),  U = F' (X, gE),  A = Z dO V^T + minus
        W = P (U A + Z dO gV^T),  T = W dF/ds + P A F''(X, gE)
        scale (T K + G gK), -rowsum(W), scale (T^T Q + G^T gQ), (Z P U)^T dO,
        (Z P U) V + (Z P) gV, rowsum(P U), W dF/dE + P A F''(X, gE)
    """

    def run(self, given: Sequence[Tensor], pairs: Pairs) -> list[Tensor]:
        """The gradients. Those that are differentiated again are made by autograd."""
        if torch.is_grad_enabled():
            return super().run(given, pairs)
        assert isinstance(self.inner, Gradients)
        softmax, count = self.inner.softmax, len(self.wanted)
        q, shift, k, v, do, minus, *more = given[:count]
        gq, gk, gv, *own = given[count:]
        left = iter(own)
        moves = [next(left) if each else None for each in self.inner.wanted]
        scaled, gq = softmax.scale * q, softmax.scale * gq
        found = softmax.weights(scaled, shift, k, pairs, more, curved=True)
        x = (gq @ k.mT).baddbmm_(scaled, gk.mT)
        u = found.along(x, moves)
        pu = u * found.p if u is x and found.curves else u.mul_(found.p)
        a, y = do @ v.mT, do @ gv.mT
        zpu, zp = pu, found.p
        if found.z is not None:
            a, y, zpu, zp = (each * found.z for each in (a, y, zpu, zp))
        a = a.add_(minus)
        ds = found.p * a
        w = a.mul_(pu).add_(y.mul_(found.p))
        t, g = w, ds
        if found.slope is not None:
            t, g = w * found.slope, ds * found.slope
        entries: list[Tensor] = []
        if found.curves is not None:
            t = _added(t, ds, found.curves.of_score(x, moves))
            entries = [
                _added(w * slope, ds, found.curves.of_entry(number, x, moves)).sum_to_size(
                    more[number].shape
                )
                for number, slope in enumerate(found.slopes)
                if self.wanted[6 + number]
            ]
        return [
            softmax.scale * (t @ k).baddbmm_(g, gk),
            -w.sum(-1, keepdim=True),
            (t.mT @ scaled).baddbmm_(g.mT, gq),
            zpu.mT @ do,
            (zpu @ v).baddbmm_(zp, gv),
            pu.sum(-1, keepdim=True),
            *entries,
        ]


def _added(total: Tensor, factor: Tensor, change: Tensor | None) -> Tensor:
    return total if change is None else total + factor * change
