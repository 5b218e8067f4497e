"""The kernels of processors: their rows in `KERNELS`, their multipliers, and their sizes.

A spec decides the whole source of a kernel, and forgets the lengths: one kernel serves many
problems.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tilefold.masks.skeleton import Skeleton
from tilefold.planning.kernels import (
    ALL_GRADIENTS,
    ATTEND,
    DIFFERENCES,
    KEY_GRADIENTS,
    QUERY_GRADIENT,
    SCORES,
    KernelRow,
    table,
)


@dataclass(frozen=True, eq=False, kw_only=True)
class CpuKernelRow(KernelRow):
    """One kernel of processors; `parallel` is the axis that is vectorised.

    A `by_query` kernel keeps one query in a row, and vectorises the head dimension instead.
    `optional` names operands that a call may leave out: then their address is 0. Those that it
    `may_take` are known to its source only where a call has them. `computed` says what is computed
    of a modified score, where it is not what follows from `score_tiles`. Items of an `owned` kernel
    are of all heads together: see `backends.cpu.inputs`.
    """

    by_query: bool = False
    optional: tuple[str, ...] = ()
    may_take: tuple[str, ...] = ()
    computed: str = ""
    owned: bool = False

    @property
    def arguments(self) -> tuple[str, ...]:
        """All operands in the order of the argument block."""
        return (*self.operands, *self.optional)

    @property
    def scored(self) -> str:
        """What the kernel computes of a modified score: see `planning.masked.Scored`."""
        return self.computed or ("", "value", "slope")[self.score_tiles]

    @property
    def tiled(self) -> bool:
        """True where pairs are visited in blocks of the parallel axis."""
        return self.visits and not self.by_query


KERNELS = table(
    (
        CpuKernelRow(
            name="forward",
            parallel="q",
            reads=("q", "k", "v"),
            writes=("o", "lse"),
            optional=("lse_low",),
            may_take=("max", "sinks", "ticks"),
            score_tiles=1,
            contractions=ATTEND,
            emitter="forward.forward",
        ),
        CpuKernelRow(
            name="decode",
            parallel="q",
            reads=("q", "k", "v"),
            writes=("o", "lse"),
            optional=("lse_low",),
            may_take=("max", "sinks", "ticks"),
            score_tiles=1,
            contractions=ATTEND,
            emitter="decode.decode",
            by_query=True,
        ),
        CpuKernelRow(
            name="decode_part",
            parallel="q",
            reads=("q", "k", "v"),
            writes=("part", "o", "lse"),
            optional=("lse_low",),
            may_take=("max", "sinks", "ticks"),
            score_tiles=1,
            contractions=ATTEND,
            emitter="decode.decode",
            by_query=True,
        ),
        CpuKernelRow(
            name="key_mass",
            parallel="k",
            reads=("q", "k", "lse"),
            writes=("mass",),
            score_tiles=1,
            contractions=SCORES,
            emitter="mass.mass",
        ),
        CpuKernelRow(
            name="delta",
            parallel="q",
            reads=("o", "do", "lse"),
            writes=("statistics",),
            optional=("lse_low",),
            may_take=("dlse",),
            emitter="backward.delta",
        ),
        CpuKernelRow(
            name="sink_gradients",
            parallel="q",
            reads=("statistics",),
            writes=(),
            may_take=("sinks", "dsinks"),
            emitter="sinks.gradients",
        ),
        CpuKernelRow(
            name="backward_dq",
            parallel="q",
            reads=("q", "k", "v", "do", "statistics"),
            writes=("dq",),
            may_take=("ticks",),
            score_tiles=2,
            contractions=QUERY_GRADIENT,
            emitter="backward.dq",
        ),
        CpuKernelRow(
            name="backward_dkv",
            parallel="k",
            reads=("q", "k", "v", "do", "statistics"),
            writes=("dk", "dv"),
            may_take=("ticks",),
            score_tiles=2,
            contractions=KEY_GRADIENTS,
            emitter="backward.dkv",
        ),
        CpuKernelRow(
            name="backward",
            parallel="k",
            reads=("q", "k", "v", "do", "statistics"),
            writes=("dq_parts", "dk", "dv"),
            may_take=("ticks",),
            score_tiles=2,
            contractions=ALL_GRADIENTS,
            emitter="fused.fused",
        ),
        CpuKernelRow(
            name="reduce_dq",
            parallel="q",
            reads=("dq_parts",),
            writes=("dq",),
            emitter="reduce.reduce_dq",
        ),
        CpuKernelRow(
            name="backward_inputs",
            parallel="q",
            reads=("q", "k", "v", "do", "statistics"),
            writes=(),
            score_tiles=2,
            contractions=DIFFERENCES,
            emitter="inputs.inputs",
            computed="entries",
            owned=True,
        ),
        CpuKernelRow(
            name="sum_inputs",
            parallel="q",
            reads=(),
            writes=(),
            emitter="reduce.sum_inputs",
            owned=True,
        ),
    )
)
"""All kernels of processors by name: adding one takes a row here and its emitter."""


STAGES = ("claims", "packing", "scores", "edges", "softmax", "slopes", "products", "results")
"""The stages of a kernel that counts: an item is taken; operands are brought into the kernel's
order; scores of whole tiles, and of tiles with a mask; weights and their sums; dP and dS; products
with weights or dS; results are written."""


class Multiplier(NamedTuple):
    """Multiplier: "fma" single elements, "dot" pairs of bfloat16, "amx" tiles of such pairs.

    With pairs every operand is a sum of `parts` bfloat16 arrays. Rates are also measured of what
    multiplies integers in products: see `matmul.spec.Unit`.
    """

    unit: str
    parts: int = 1

    @property
    def step(self) -> int:
        """Terms of a sum in one instruction: operands are padded to a multiple."""
        return {"fma": 1, "dot": 2, "amx": 32}[self.unit]

    @property
    def terms(self) -> int:
        """Products of parts in one product: all pairs of parts but the two low ones."""
        return self.parts * (self.parts + 1) // 2


FMA = Multiplier("fma")


class Target(NamedTuple):
    """Memory to which gradients of an array are added: its type, and its number of axes.

    The first axis of a target of "backward_inputs" is of parts, the others are of the array.
    """

    dtype: str
    rank: int


class Entry(NamedTuple):
    """A look-up in an array: the number of the target of its gradient, and how that is summed.

    The ways are "stored" and "added" (entries [.., q, k]), "sums" (the key does not matter), "keys"
    (the query does not matter), "slots" (few entries) and "scattered": see `kernels.inputs`.
    """

    target: int
    way: str


@dataclass(frozen=True)
class KernelSpec:
    """All that changes a kernel's source, and nothing else: no lengths, batch, heads or mask data.

    The register tile is `rows` broadcast rows by `vectors` vectors of `lanes` elements. The
    parallel axis is vectorised, `block_parallel` elements at a time; the traversed axis is walked
    `block_traverse` rows at a time. In a kernel that works by query, `rows` is how many queries a
    worker holds at most. `native_half`: the machine converts float16 itself. `in_turn`: a worker of
    the fused backward makes all parts of dQ of a head, one after the other. `score` is what the
    kernel computes of a modified score (see `planning.masked.Scored`), and `hides` tells that it
    may hide pairs. Where scores are modified they are `natural` in all kernels: see `scale`.
    `dropout`: pairs fall out, by the seed that the call brings.
    `more` names operands beside those of the row, of calls that have them: then the kernel reads
    or writes them, and else its source knows nothing of them. `sinks` is the number of sinks of
    each head, in a kernel that reads them.
    `entries` and `targets` are of the kernels that sum gradients of the arrays of a score. `clock`
    is what a kernel reads that counts the ticks of its stages: see `kernels.stages`.
    """

    kernel: str
    dtype: str
    dim: int
    dim_v: int
    lanes: int
    vectors: int
    rows: int
    block_traverse: int
    mask: Skeleton
    index_bits: int
    native_half: bool = False
    multiplier: Multiplier = FMA
    in_turn: bool = False
    score: Skeleton | None = None
    hides: bool = False
    natural: bool = False
    dropout: bool = False
    more: tuple[str, ...] = ()
    sinks: int = 0
    entries: tuple[Entry, ...] = ()
    targets: tuple[Target, ...] = ()
    clock: str = ""

    @property
    def arguments(self) -> tuple[str, ...]:
        """All operands in the order of the argument block."""
        return (*self.row.arguments, *self.more)

    @property
    def row(self) -> CpuKernelRow:
        """The row of the kernel's name."""
        return KERNELS[self.kernel]

    @property
    def block_parallel(self) -> int:
        """Rows of the parallel axis in one block."""
        return self.lanes * self.vectors

    @property
    def state_width(self) -> int:
        """Elements that "decode_part" leaves of one query: O in whole vectors, m and l."""
        return self.whole(self.dim_v) + 2 * self.lanes

    def whole(self, dim: int) -> int:
        """A dimension rounded up to whole vectors."""
        return -(-dim // self.lanes) * self.lanes
