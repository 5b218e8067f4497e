"""The kernels of Triton: rows in `KERNELS`, block sizes, warps and pipeline stages.

As in the other backends a spec decides the whole source of a kernel, and forgets the lengths.
The `parallel` axis is split over programs (thread blocks), the `traverse` axis is walked inside of
one. Tensors of Triton have sides that are powers of two, so the head dimension is cut into *pieces*
that are: 80 is 64 and 16, and 199 is 128, 64 and 16, of which the last 9 columns are padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tilefold.masks.expression import RealConstant
from tilefold.masks.skeleton import Skeleton
from tilefold.masks.tables import Slot
from tilefold.planning.entries import Entry
from tilefold.planning.kernels import (
    ALL_GRADIENTS,
    ATTEND,
    DIFFERENCES,
    KEY_GRADIENTS,
    OPERANDS,
    QUERY_GRADIENT,
    KernelRow,
    table,
)
from tilefold.problems.attention import ITEM_BYTES

LEAST = 16
"""The least side of a product: every matrix unit of the known GPUs takes 16."""

MOST_DIM = 512
"""The widest head: beyond it a block of 16 rows of sums no longer fits the registers."""

WIDEST_EXACT = 32
"""The widest piece of float32 that is multiplied exactly: by multiply-adds of single lanes, for
which Triton loads whole rows of a piece into the registers of a thread. By the compiler, on an A100
with dim 128 and blocks of 64 x 16 (4 warps), the forward pass spilled 2801 registers of a thread
for each tile where a piece was the whole head, and none with pieces of 32."""

WIDEST_STREAMED = 64
"""The widest piece of operands that are streamed: two of them, of 16 rows of float64, take 16 KiB
of shared memory, so that every head fits every GPU."""

FLOAT32_MODES = ("ieee", "tf32x3", "tf32")
"""How float32 is multiplied, by Triton's names: exactly, in three products, in one."""

BY_PRECISION = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}
"""By `precision`: TF32 has 11 significant bits, of which three products make more than 16."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TritonKernelRow(KernelRow):
    """One kernel of GPUs by Triton; programs share `parallel`.

    `preloaded` names the operands along the parallel axis that are loaded once, `sums` the results
    that a kernel that visits pairs adds up in registers. A kernel has the operands of `optional`
    where the call asks for them. `computed` is what it computes of a modified score: see `Scored`.
    """

    preloaded: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    computed: str = "value"


KERNELS = table(
    (
        TritonKernelRow(
            name="forward",
            parallel="q",
            reads=("q", "k", "v"),
            writes=("o", "lse"),
            score_tiles=1,
            contractions=ATTEND,
            emitter="forward.emit",
            preloaded=("q",),
            sums=("o",),
            optional=("sinks", "max"),
        ),
        TritonKernelRow(
            name="decode",
            parallel="q",
            reads=("q", "k", "v"),
            writes=("part_o", "part_m", "part_l"),
            score_tiles=1,
            contractions=ATTEND,
            emitter="decode.emit",
            preloaded=("q",),
            sums=("o",),
        ),
        TritonKernelRow(
            name="merge",
            parallel="q",
            reads=("part_o", "part_m", "part_l"),
            writes=("o", "lse"),
            emitter="decode.emit_merge",
            optional=("sinks", "max"),
        ),
        TritonKernelRow(
            name="backward_dq",
            parallel="q",
            reads=("q", "k", "v", "o", "do", "lse"),
            writes=("delta", "dq"),
            score_tiles=2,
            contractions=QUERY_GRADIENT,
            emitter="backward.emit_dq",
            preloaded=("q", "do"),
            sums=("dq",),
            optional=("dlse",),
            computed="slope",
        ),
        TritonKernelRow(
            name="backward_dkv",
            parallel="k",
            reads=("q", "k", "v", "do", "lse", "delta"),
            writes=("dk", "dv"),
            score_tiles=2,
            contractions=KEY_GRADIENTS,
            emitter="backward.emit_dkv",
            preloaded=("k", "v"),
            sums=("dk", "dv"),
            computed="slope",
        ),
        TritonKernelRow(
            name="delta",
            parallel="q",
            reads=("o", "do"),
            writes=("delta",),
            emitter="backward.emit_delta",
            optional=("dlse",),
        ),
        TritonKernelRow(
            name="backward",
            parallel="k",
            reads=("q", "k", "v", "do", "lse", "delta"),
            writes=("dk", "dv", "dq_parts"),
            score_tiles=2,
            contractions=ALL_GRADIENTS,
            emitter="fused.emit",
            preloaded=("k", "v"),
            sums=("dk", "dv"),
            computed="slope",
        ),
        TritonKernelRow(
            name="reduce_dq",
            parallel="q",
            reads=("dq_parts",),
            writes=("dq",),
            emitter="fused.emit_reduce",
        ),
        TritonKernelRow(
            name="backward_inputs",
            parallel="q",
            reads=("q", "k", "v", "do", "lse", "delta"),
            writes=("input_parts",),
            score_tiles=2,
            contractions=DIFFERENCES,
            emitter="inputs.emit",
            preloaded=("q", "do"),
            computed="entries",
        ),
    )
)
"""All kernels of Triton by name: adding one takes a row here and its emitter."""


class Piece(NamedTuple):
    """Columns `first` to `first + width` of a head; columns from `stop` on are padding."""

    first: int
    width: int
    stop: int

    @property
    def padded(self) -> bool:
        """True if some columns are padding."""
        return self.stop < self.first + self.width


@dataclass(frozen=True)
class Blocks:
    """Rows of a block along each axis, and the warps and pipeline stages that work on it.

    The operands along the parallel axis are loaded once and held, and tiles of the others come
    whole, unless they are `streamed`: then all come piece by piece for every product, which costs
    reads of the cache and saves the shared memory that they would occupy.

    >>> print(Blocks(128, 64, 8, 3))
    128 x 64, 8 warps, 3 stages
    >>> print(Blocks(32, 32, 4, 2, streamed=True))
    32 x 32, 4 warps, 2 stages, streamed
    """

    parallel: int
    traverse: int
    warps: int
    stages: int
    streamed: bool = False

    def __post_init__(self) -> None:
        for name in ("parallel", "traverse"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < LEAST or value & (value - 1):
                raise ValueError(f"{name} must be a power of two from {LEAST}, got {value}")
        if self.warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"warps must be 1, 2, 4, 8 or 16, got {self.warps}")
        if not 1 <= self.stages <= 8:
            raise ValueError(f"stages must be from 1 to 8, got {self.stages}")
        if not isinstance(self.streamed, bool):
            raise ValueError(f"streamed must be True or False, got {self.streamed!r}")

    def __str__(self) -> str:
        streamed = ", streamed" if self.streamed else ""
        sides = f"{self.parallel} x {self.traverse}"
        return f"{sides}, {self.warps} warps, {self.stages} stages{streamed}"


@dataclass(frozen=True)
class TritonSpec:
    """All that changes a kernel's source, and nothing else: no lengths, batch, heads or mask data.

    `float32_mode` is how float32 is multiplied. `negative`: the scale is below 0, and queries are
    negated. `wide`: offsets inside a tile may pass 31 bits. `descriptors`: tiles are moved by
    tensor descriptors (the TMA unit of Hopper and newer). The last two follow from where the arrays
    lie, which a plan does not know.
    `gluon`: written in Gluon for Hopper, by `hopper`. `dropout`: pairs fall out, by the seed that
    the call brings. `score` is what the kernel computes of a modified score, whose value -inf
    `hides` pairs; `entries` are those of its values that say how a score changes with an entry of
    an array, where the kernel sums that up. `extra` are operands that the call has and others leave
    out: see `TritonKernelRow.optional`.
    """

    kernel: str
    dtype: str
    dim: int
    dim_v: int
    blocks: Blocks
    mask: Skeleton
    index_bits: int
    float32_mode: str = "ieee"
    negative: bool = False
    wide: bool = False
    descriptors: bool = False
    gluon: bool = False
    dropout: bool = False
    score: Skeleton | None = None
    hides: bool = False
    entries: tuple[Entry, ...] = ()
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.kernel in KERNELS, self.kernel
        assert self.float32_mode in FLOAT32_MODES, self.float32_mode

    @property
    def row(self) -> TritonKernelRow:
        """The row of the kernel's name."""
        return KERNELS[self.kernel]

    @property
    def operands(self) -> tuple[str, ...]:
        """The arrays that a launch is given, in the order of the arguments."""
        seed = ("seed",) if self.dropout and self.row.visits else ()
        return (*self.row.operands, *self.extra, *seed, *(slot.name for slot in self.inputs))

    @property
    def inputs(self) -> tuple[Slot, ...]:
        """The places of arrays that the score reads and that come with each call."""
        if self.score is None or not self.row.visits:
            return ()
        return tuple([slot for slot in self.score.slots if slot.dtype in ITEM_BYTES])

    @property
    def values(self) -> tuple[int, ...]:
        """The numbers of the values of the score that the kernel computes."""
        if self.entries:
            return (0, *(each.value + i for each in self.entries for i in range(each.rank + 1)))
        return (0, 1) if self.slope_varies else (0,)

    @property
    def slope_varies(self) -> bool:
        """True where the kernel multiplies by the derivative of the score."""
        if self.score is None or self.row.computed != "slope":
            return False
        slope = self.score.expression.parts[1]
        return not (isinstance(slope, RealConstant) and slope.value == 1)

    @property
    def parallel(self) -> str:
        """The axis that is split over programs, "q" or "k"."""
        return self.row.parallel

    @property
    def entry(self) -> str:
        """The kernel's name in the source: stable, so that a profiler can ask for it."""
        return f"tilefold_{self.kernel}{'_hopper' if self.gluon else ''}"

    @property
    def preloaded(self) -> bool:
        """True if operands are not streamed: see `Blocks`."""
        return not self.blocks.streamed

    @property
    def statistics(self) -> str:
        """The type of sums, lse and all that is not an operand."""
        return "float64" if self.dtype == "float64" else "float32"

    def width(self, operand: str) -> int:
        """Elements in a row of an operand."""
        return self.dim_v if OPERANDS[operand].width == "dim_v" else self.dim

    def pieces(self, operand: str) -> tuple[Piece, ...]:
        """The columns of an operand, piece by piece."""
        exact = self.dtype == "float32" and self.float32_mode == "ieee"
        return pieces(self.width(operand), widest(exact, self.blocks.streamed))


def widest(exact: bool, streamed: bool) -> int:
    """Columns of the widest piece; `exact` is float32 that is multiplied exactly."""
    if exact:
        return WIDEST_EXACT
    return WIDEST_STREAMED if streamed else MOST_DIM


def pieces(dim: int, widest: int = MOST_DIM) -> tuple[Piece, ...]:
    """The columns of a head in pieces whose widths are powers of two from 16, the widest first.

    >>> pieces(80)
    (Piece(first=0, width=64, stop=64), Piece(first=64, width=16, stop=80))
    >>> [piece.width for piece in pieces(199)], pieces(3)
    ([128, 64, 16], (Piece(first=0, width=16, stop=3),))
    """
    left, first, found = -(-dim // LEAST) * LEAST, 0, []
    while left:
        width = min(1 << (left.bit_length() - 1), widest)
        found.append(Piece(first, width, min(first + width, dim)))
        first, left = first + width, left - width
    return tuple(found)


def power_of_two(number: int) -> int:
    """The least power of two that is not below a number.

    >>> power_of_two(1), power_of_two(17)
    (1, 32)
    """
    return 1 << max(0, number - 1).bit_length()
