"""The kernels of Metal: rows in `KERNELS`, three block sizes, and operands in registers.

As on the CPU a spec decides the whole source of a kernel, and forgets the lengths. The axes have
the names of Metal FlashAttention (Turner 2024): the `parallel` axis is split over threadgroups and
their simdgroups, 8 rows each; the `traverse` axis is walked inside a threadgroup; `head` is the
head dimension, which is walked too where it is larger than its block.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilefold.masks.expression import RealConstant, Slot
from tilefold.masks.skeleton import Skeleton
from tilefold.planning.entries import Entry
from tilefold.planning.kernels import (
    ATTEND,
    DIFFERENCES,
    KEY_GRADIENTS,
    OPERANDS,
    QUERY_GRADIENT,
    KernelRow,
    table,
)
from tilefold.problems.attention import ITEM_BYTES

SIMD = 32
"""Threads of a simdgroup, on every Apple GPU."""

SIDE = 8
"""Rows and columns of a fragment, the only matrix that simdgroups multiply."""

TENSOR_ROWS = 16
"""Rows of the parallel axis that a simdgroup multiplies with tensor operations."""

SUMS = ("o", "dq", "dk", "dv")
"""Operands that are sums over the traversed axis: float32 wherever they are kept."""


@dataclass(frozen=True)
class Blocks:
    """Elements of a block along each axis; 8 rows of `parallel` for each simdgroup.

    >>> print(Blocks(32, 64, 16))
    32 x 64 x 16
    """

    parallel: int
    traverse: int
    head: int

    def __post_init__(self) -> None:
        for name, value in self.__dict__.items():
            if value < SIDE or value % SIDE:
                raise ValueError(f"{name} must be a multiple of {SIDE} from {SIDE}, got {value}")

    def __str__(self) -> str:
        return f"{self.parallel} x {self.traverse} x {self.head}"


@dataclass(frozen=True, eq=False, kw_only=True)
class MetalKernelRow(KernelRow):
    """One kernel of Apple GPUs; threadgroups share `parallel`.

    `resident` names the operands along the parallel axis that may be kept in registers; each other
    one is read, or read and written, for every tile. They leave the registers in the order of
    `leaving`. `untuned` are the blocks and the operands in registers of a kernel without a table.
    A kernel has those of `may_read` and `may_write` where the call asks for them. `sizes` are
    integers that the kernel takes beside those of all. `computed` is what it computes of a modified
    score: see `Scored`.
    """

    resident: tuple[str, ...] = ()
    leaving: tuple[str, ...] = ()
    untuned: tuple[Blocks, tuple[str, ...]] | None = None
    may_read: tuple[str, ...] = ()
    may_write: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    computed: str = "value"

    @property
    def optional(self) -> tuple[str, ...]:
        """All operands that the kernel has where the call asks for them."""
        return (*self.may_read, *self.may_write)

    @property
    def sums(self) -> tuple[str, ...]:
        """Results that are summed over the traversed axis, in registers or spilled to memory."""
        return tuple(name for name in self.writes if name in self.resident)


KERNELS = table(
    (
        MetalKernelRow(
            name="forward",
            parallel="q",
            reads=("q", "k", "v"),
            writes=("o", "lse"),
            score_tiles=1,
            contractions=ATTEND,
            emitter="forward.emit",
            resident=("q", "o"),
            leaving=("q", "o"),
            may_read=("sinks",),
            may_write=("max",),
        ),
        # One simdgroup to a threadgroup, so that few rows of many heads and splits are spread over
        # the cores.
        MetalKernelRow(
            name="decode",
            parallel="q",
            reads=("q", "k", "v"),
            writes=("part_o", "part_m", "part_l"),
            score_tiles=1,
            contractions=ATTEND,
            emitter="decode.emit",
            resident=("q", "o"),
            leaving=("q", "o"),
            untuned=(Blocks(8, 32, 32), ("q", "o")),
        ),
        MetalKernelRow(
            name="merge",
            parallel="q",
            reads=("part_o", "part_m", "part_l"),
            writes=("o", "lse"),
            emitter="decode.emit_merge",
            untuned=(Blocks(8, 8, 8), ()),
            may_read=("sinks",),
            may_write=("max",),
        ),
        MetalKernelRow(
            name="backward_dq",
            parallel="q",
            reads=("q", "k", "v", "o", "do", "lse"),
            writes=("delta", "dq"),
            score_tiles=2,
            contractions=QUERY_GRADIENT,
            emitter="backward.emit_dq",
            resident=("q", "do", "dq"),
            leaving=("do", "q", "dq"),
            may_read=("dlse",),
            computed="slope",
        ),
        MetalKernelRow(
            name="backward_dkv",
            parallel="k",
            reads=("q", "k", "v", "do", "lse", "delta"),
            writes=("dk", "dv"),
            score_tiles=2,
            contractions=KEY_GRADIENTS,
            emitter="backward.emit_dkv",
            resident=("k", "v", "dv", "dk"),
            leaving=("k", "v", "dk", "dv"),
            computed="slope",
        ),
        MetalKernelRow(
            name="backward_sinks",
            parallel="q",
            reads=("sinks", "lse", "delta"),
            writes=("dsinks",),
            emitter="sinks.emit",
            untuned=(Blocks(8, 8, 8), ()),
            sizes=("batch",),
        ),
        # One simdgroup to a threadgroup: it alone adds to its part.
        MetalKernelRow(
            name="backward_inputs",
            parallel="q",
            reads=("q", "k", "v", "do", "lse", "delta"),
            writes=("input_parts",),
            score_tiles=2,
            contractions=DIFFERENCES,
            emitter="inputs.emit",
            resident=("q", "do"),
            leaving=("do", "q"),
            untuned=(Blocks(8, 32, 32), ("q", "do")),
            sizes=("shared", "part_size", "block_rows"),
            computed="entries",
        ),
    )
)
"""All kernels of Apple GPUs by name: adding one takes a row here and its emitter."""


@dataclass(frozen=True)
class MetalSpec:
    """All that changes a kernel's source, and nothing else: no lengths, batch, heads or mask data.

    `cached` names the operands that stay in registers. With `staged` the traversed operands always
    pass through threadgroup memory, else only tiles at an edge do. `bfloat`: the GPU multiplies
    bfloat16 itself, else such elements are widened by their bits. `unit`: the elements of a row lie
    side by side in every operand. `wide`: offsets inside a tile may pass 31 bits. `vector`, 1, 2 or
    4: elements of a row that are moved at once, and that divide each row. These three follow from
    where the arrays lie, which a plan does not know. `tensor_ops`: multiplies by Metal 4's tensor
    operations, not by fragments. `negative`: the scale is negative, which a maximum of scores must
    know. `dropout`: pairs fall out, by the seed that the call brings. `extra` are the operands that
    the call has and others leave out: see `MetalKernelRow.may_read`. `natural`: scores are
    modified, so they are on the natural scale. `score` is what a kernel that visits pairs computes
    of them, whose value -inf `hides` a pair; `entries` are those of its values that say how a score
    changes with an entry of an array, where the kernel sums that up.
    """

    kernel: str
    dtype: str
    dim: int
    dim_v: int
    blocks: Blocks
    cached: tuple[str, ...]
    staged: bool
    bfloat: bool
    mask: Skeleton
    index_bits: int
    unit: bool = True
    wide: bool = False
    vector: int = 1
    tensor_ops: bool = False
    negative: bool = False
    dropout: bool = False
    extra: tuple[str, ...] = ()
    natural: bool = False
    score: Skeleton | None = None
    hides: bool = False
    entries: tuple[Entry, ...] = ()

    def __post_init__(self) -> None:
        assert self.kernel in KERNELS, self.kernel
        assert set(self.cached) <= set(self.row.resident), self.cached
        assert set(self.extra) <= set(self.row.optional), self.extra

    @property
    def row(self) -> MetalKernelRow:
        """The row of the kernel's name."""
        return KERNELS[self.kernel]

    @property
    def operands(self) -> tuple[str, ...]:
        """All operands of the kernel, in the order of its arguments."""
        return (*self.row.operands, *self.extra)

    @property
    def skeletons(self) -> tuple[Skeleton, ...]:
        """What is asked of a pair: the mask and the modified score."""
        return (self.mask, self.score) if self.score else (self.mask,)

    @property
    def inputs(self) -> tuple[Slot, ...]:
        """The places of the arrays that the score reads and that come with each call."""
        slots = self.score.slots if self.score else ()
        return tuple([slot for slot in slots if slot.dtype in ITEM_BYTES])

    @property
    def slope_varies(self) -> bool:
        """True where the kernel multiplies by the derivative of the score."""
        if self.score is None or self.row.computed != "slope":
            return False
        slope = self.score.expression.parts[1]
        return not (isinstance(slope, RealConstant) and slope.value == 1)

    @property
    def simdgroups(self) -> int:
        """Simdgroups of a threadgroup."""
        return self.blocks.parallel // (TENSOR_ROWS if self.tensor_ops else SIDE)

    @property
    def threads(self) -> int:
        """Threads of a threadgroup."""
        return SIMD * self.simdgroups

    @property
    def entry(self) -> str:
        """The kernel's name in the source: stable, so that an app can take the source."""
        return f"tilefold_{self.kernel}"

    def width(self, operand: str) -> int:
        """Elements in a row of an operand. Raises ValueError for one whose rows no field counts."""
        row = OPERANDS.get(operand)
        if row is None or row.width is None:
            raise ValueError(f"{operand} has no rows of dim or dim_v elements")
        return self.dim_v if row.width == "dim_v" else self.dim


def whole(dim: int) -> int:
    """A dimension rounded up to whole fragments."""
    return -(-dim // SIDE) * SIDE
