"""The kernel of a product as a value: types, blocks, and what is done to the result.

A spec has forgotten lengths, strides and scalars, so one kernel serves them all.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilefold.backends.matmul import Codes, addends, results
from tilefold.backends.metal.kernels.storage import Storage, storage
from tilefold.backends.metal.spec import SIDE, SIMD
from tilefold.common.check import choice
from tilefold.problems.matmul import ACTIVATIONS, BIAS_AXES

DTYPES = ("float32", "float16", "bfloat16")
"""Types of the arrays that Metal's kernels read and write."""

BANKS = ("padding", "swizzle")
"""Ways in which rows of a block in threadgroup memory avoid the same banks."""

BANK_BYTES = 128
"""Bytes after which the banks of threadgroup memory begin anew: 32 of 4 bytes. Apple does not
publish it; it is a guess from other GPUs."""

_PAD_BYTES = 16
"""Bytes added to each row of a stage, so that the rows of a column lie in several memory banks, as
in MLX."""


@dataclass(frozen=True)
class GemmBlocks:
    """Elements of a block of C, and of the contraction at a time; how many simdgroups share it.

    `banks` says how the rows of a block in threadgroup memory come to lie in several memory banks:
    "padding" lengthens each row by 16 bytes, "swizzle" exchanges groups of 8 elements in it, for
    which its length must be a multiple of 16. Results are equal. Neither was measured here.

    >>> GemmBlocks(48, 48, 24, split=(2, 2)).threads
    128
    """

    m: int
    n: int
    k: int
    split: tuple[int, int]
    banks: str = "padding"

    def __post_init__(self) -> None:
        choice("banks", self.banks, BANKS)
        steps = {"m": SIDE * self.split[0], "n": SIDE * self.split[1], "k": SIDE}
        for name, step in steps.items():
            value = getattr(self, name)
            if min(value, step) < 1 or value % step:
                raise ValueError(f"{name} must be a multiple of {step}, got {value}")

    @property
    def threads(self) -> int:
        """Threads of a threadgroup."""
        return SIMD * self.split[0] * self.split[1]

    def __str__(self) -> str:
        return f"{self.m} x {self.n} x {self.k}"


@dataclass(frozen=True)
class GemmSpec:
    """All that changes the source of a product: types, blocks and what is done to the result.

    `a`, `b` and `c` are types. `transpose_a`: the rows of op(A) lie side by side in memory, not its
    columns; `transpose_b` alike. `staged`: operands pass through threadgroup memory. `bfloat`: the
    GPU multiplies bfloat16 itself. `unit`: what lies side by side is one element apart in A and B,
    whatever their leading dimensions. `bias_type`: the type of the bias if it is not that of the
    result. `old`: the type of C if it lies beside the result. `gate`: a third factor G is read as B
    is, and the result is activation(A B) (A G). `codes`: B is quantised, and its weights are
    computed in float32, which `b` then is.
    """

    a: str
    b: str
    c: str
    blocks: GemmBlocks
    staged: bool
    bfloat: bool
    unit: bool = True
    transpose_a: bool = False
    transpose_b: bool = False
    bias: str | None = None
    activation: str | None = None
    bias_type: str | None = None
    old: str | None = None
    gate: bool = False
    codes: Codes | None = None

    def __post_init__(self) -> None:
        for name in ("a", "b"):
            choice(f"the type of {name}", getattr(self, name), DTYPES)
        choice("the type of c", self.c, results(self.a, self.b))
        choice("bias", self.bias, (None, *BIAS_AXES))
        for name in ("bias_type", "old"):
            choice(name, getattr(self, name), (None, *addends(self.c)))
        choice("activation", self.activation, ACTIVATIONS)
        if self.codes and (self.gate or self.transpose_b or self.b != "float32"):
            raise ValueError("codes have no gate, lie in rows, and are multiplied as float32")
        for name, value, most in (
            ("threads", self.blocks.threads, 1024),
            ("threadgroup memory in bytes", self.threadgroup_bytes, 32768),
        ):
            if value > most:
                raise ValueError(
                    f"{name} must be at most {most}, and blocks {self.blocks} take {value}"
                )
        if self.blocks.banks == "swizzle" and not self.staged:
            raise ValueError("banks must be 'padding' where operands pass no threadgroup memory")
        for _, length in self.stages:
            if self.blocks.banks == "swizzle" and length % (2 * SIDE):
                raise ValueError(
                    f"banks='swizzle' needs rows of 16 elements or multiples, and blocks"
                    f" {self.blocks} have rows of {length}"
                )

    @property
    def multiplied(self) -> str:
        """The type that fragments of A and B have."""
        return multiplied(self.a, self.b, self.bfloat)

    @property
    def operand(self) -> Storage:
        """The storage of the elements that are multiplied."""
        return storage(self.multiplied, self.bfloat)

    @property
    def stages(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows of the stages of A and of B, and the elements from one to the next."""
        padded = self.blocks.banks == "padding"
        pad = _PAD_BYTES // self.operand.compute_bytes if padded else 0
        blocks = self.blocks
        a = (blocks.k, blocks.m) if self.transpose_a else (blocks.m, blocks.k)
        b = (blocks.n, blocks.k) if self.transpose_b else (blocks.k, blocks.n)
        return (a[0], a[1] + pad), (b[0], b[1] + pad)

    @property
    def threadgroup_bytes(self) -> int:
        """Bytes of threadgroup memory."""
        size, (a, b) = self.operand.compute_bytes, self.stages
        stages = (a, b, b) if self.gate else (a, b)
        return sum(rows * stride for rows, stride in stages) * size if self.staged else 0

    def exchanged(self, row: str, place: str, length: int) -> str:
        """The place in a row of a stage that has an element, as an expression.

        Groups of 8 change places by an exclusive or with the row, as far as the row is a multiple
        of a power of two. Rows that fill the banks only together are exchanged alike.
        """
        if self.blocks.banks == "padding":
            return place
        together = max(1, BANK_BYTES // (length * self.operand.compute_bytes))
        groups = min(length & -length, BANK_BYTES // self.operand.compute_bytes) // SIDE
        of = f"({row})" if " " in row else row
        turn = f"{of} / {together} % {groups}" if together > 1 else f"{of} % {groups}"
        return f"(({place}) ^ {SIDE} * ({turn}))"

    @property
    def fragments(self) -> tuple[int, int]:
        """Rows and columns of fragments that a simdgroup makes."""
        blocks = self.blocks
        return blocks.m // SIDE // blocks.split[0], blocks.n // SIDE // blocks.split[1]


def multiplied(a: str, b: str, bfloat: bool) -> str:
    """The type that fragments of A and B have: float32 where the two types differ.

    >>> multiplied("bfloat16", "bfloat16", bfloat=False)
    'float32'
    """
    return "float32" if a != b or storage(a, bfloat).converts else a
