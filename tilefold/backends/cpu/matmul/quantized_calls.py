"""Products with quantised matrices on the processor: planned once for sizes, run on addresses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.cpu import claims, runtime
from tilefold.backends.cpu.device import Device
from tilefold.backends.cpu.kernel import double_bits, noted
from tilefold.backends.cpu.matmul import (
    quantized_blocks,
    quantized_digits,
    quantized_fours,
    quantized_integers,
)
from tilefold.backends.cpu.matmul.arguments import QUANTIZED, ROUNDING
from tilefold.backends.cpu.matmul.calls import OPERANDS
from tilefold.backends.cpu.matmul.quantized import AHEAD_BYTES
from tilefold.backends.cpu.matmul.spec import QuantizedSpec, RoundingSpec, lanes_of
from tilefold.backends.cpu.matmul.widen import STEPS, WORDS
from tilefold.backends.cpu.native import Memory, Step, Words, words
from tilefold.backends.cpu.records import Recorded
from tilefold.common.first_use import undisturbed
from tilefold.common.single_flight import once

_FEW = {
    **dict.fromkeys(("amx", "avx512"), (1, 2, 4, 8)),
    "avx2": (1, 2, 3, 4),
    "sse2": (1, 2, 4),
    "neon": (1, 2, 4, 8),
}
"""Rows of register tiles of two vectors, for which kernels of few rows are made. 6 rows as twice 3
took 0.76 of the time that they took as twice 4 by int4, and 0.86 of it where they are rounded
(2048 x 2048, AMD Zen 3).
"""

_MANY = {
    **dict.fromkeys(("amx", "avx512"), (14, 12, 10, 8)),
    **dict.fromkeys(("avx2", "sse2"), (6, 4)),
    "neon": (12, 8),
}
"""Rows of register tiles where rows share a widened panel, the largest first."""

_SHARED_FROM = 17
"""From so many rows on they share a widened panel. With 2048 x 512, on one thread of a busy Xeon:
int4 140 GFLOP/s at 16 rows without, 139 at 24 rows with it; palette6 102 and 128.
"""

_PALETTE_SHARED_FROM = 5
"""The same for palettes on AVX2, where looking up takes longer: 8 rows took 0.7 of the time."""

_ROUNDED_SHARED_FROM = 9
"""The same where rows are rounded, on x86 without AVX512-VNNI: 8 rows took 7 % longer with a shared
panel (2048 x 2048, AMD Zen 3).
"""

_DIGITS_FROM = 1024
"""From so many columns on one row is split into digits on AVX2. Each worker splits it, which takes
0.5 ns an input and as long as 45 columns win: 1024 x 128 took 1.05 of the time, 384 x 1536 0.85.
"""

_ALONE_BYTES = 2**16
"""Smaller matrices run on one thread: 5 us of reading. It is not tuned."""

_CLAIM_BYTES = 2**15
"""A worker takes panels of so many bytes at a time, if there are enough. It is not tuned."""

_BLOCK_ROWS = 112
"""Rows of an item at most. It is not tuned."""


class Sizes(NamedTuple):
    """All of a call but its addresses; strides count elements."""

    scheme: str
    m: int
    n: int
    k: int
    group_size: int
    scales: str | None
    out: str
    out_m: int
    out_n: int
    bias: str | None
    bias_n: int
    activation: str | None
    dynamic: bool = False


class Matrix(NamedTuple):
    """Where the arrays of a quantised matrix lie; 0 where there is none."""

    codes: int
    scales: int
    zeros: int
    table: int


def _shared_from(scheme: str, dynamic: bool, device: Device) -> int:
    """The fewest rows that share a widened panel."""
    if dynamic and device.isa != "neon" and not device.has("avx512vnni"):
        return _ROUNDED_SHARED_FROM
    return _PALETTE_SHARED_FROM if (scheme, device.isa) == ("palette6", "avx2") else _SHARED_FROM


def _rows_of(m: int, shared: bool, device: Device) -> int:
    """Rows of register tiles."""
    if shared:  # those that leave the fewest rows of the last tile empty
        return min(_MANY[device.isa], key=lambda rows: -(-m // rows) * rows)
    options = _FEW[device.isa]
    tiles = -(-m // options[-1])
    return next(rows for rows in options if rows * tiles >= m)


def _inputs(scheme: str, k: int) -> int:
    """The inputs of a panel: k, up to whole blocks of codes in words."""
    step = STEPS[scheme] if scheme in WORDS else 1
    return -(-k // step) * step


@once(most=512)
def kernel(spec: QuantizedSpec | RoundingSpec, device: Device) -> runtime.Loaded:
    """The kernel of a spec, compiled for the device unless the disk cache has it."""
    return undisturbed(lambda: noted(spec, device, lambda: (source(spec), 0)))[0]


def source(spec: QuantizedSpec | RoundingSpec) -> str:
    """The LLVM source of a kernel."""
    if isinstance(spec, RoundingSpec):
        return quantized_integers.emit_rounding(spec)
    if spec.fours:
        return quantized_fours.emit(spec)
    if spec.digits:
        return quantized_digits.emit(spec)
    return quantized_integers.emit(spec) if spec.integers else quantized_blocks.emit(spec)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A product prepared for its sizes; only addresses are missing.

    Operands are those of `calls.OPERANDS`, of which x is a. Rows of x lie one after another, or in
    tiles of `tile_rows`; of `inputs` numbers each, of which those after k are 0.
    """

    recorded: Recorded
    k: int
    inputs: int
    tile_rows: int | None

    @property
    def reads_rows(self) -> bool:
        """True if kernels read contiguous rows of float32 where they lie."""
        return self.tile_rows is None and self.inputs == self.k

    def arranged(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Rows of float32 as kernels read them.

        Many rows become tiles (tiles, inputs, rows), in which the rows of an input lie side by
        side.
        """
        if self.reads_rows:
            return np.require(x, requirements=["C", "A"])
        (m, k), rows = x.shape, self.tile_rows
        if rows is None:
            lines = np.zeros((m, self.inputs), np.float32)
            lines[:, :k] = x
            return lines
        whole, rest = divmod(m, rows)
        tiles = np.zeros((whole + bool(rest), self.inputs, rows), np.float32)
        tiles[:whole, :k] = x[: whole * rows].reshape(whole, rows, k).swapaxes(1, 2)
        if rest:
            tiles[whole, :k, :rest] = x[whole * rows :].T
        return tiles

    def run(self, x: int, out: int, bias: int = 0) -> None:
        """Compute the product of rows as `arranged` makes them. All arrays are kept alive."""
        self.recorded.run(x, 0, 0, bias, 0, out)


def spec_of(sizes: Sizes, device: Device) -> QuantizedSpec:
    """The kernel of a call."""
    shared = sizes.m >= _shared_from(sizes.scheme, sizes.dynamic, device)
    rows, lanes = _rows_of(sizes.m, shared, device), lanes_of(device, "float32")
    vnni = sizes.dynamic and device.has("avx512vnni")
    fours = sizes.dynamic and device.isa == "avx2"
    pairs = sizes.dynamic and device.isa in ("sse2", "avx512", "amx") and not vnni
    return QuantizedSpec(
        sizes.scheme,
        rows,
        _vectors(sizes, rows, device) if not shared else 2,
        lanes,
        sizes.scales,
        sizes.out,
        device.converts_float16,
        device.isa in ("amx", "avx512"),
        sizes.scheme in WORDS or sizes.group_size % STEPS[sizes.scheme] == 0,
        shared,
        sizes.dynamic,
        vnni,
        pairs,
        fours,
        sizes.bias,
        sizes.activation,
        digits=_by_digits(sizes, device),
    )


def _by_digits(sizes: Sizes, device: Device) -> bool:
    """True if a row is split into digits."""
    fours = sizes.scheme in ("int4", "int4_symmetric")
    return fours and device.isa == "avx2" and sizes.m == 1 and sizes.n >= _DIGITS_FROM


def _vectors(sizes: Sizes, rows: int, device: Device) -> int:
    """Vectors of a register tile for few rows: the whole panel where 8 sums are enough for it.

    Codes of 4 bits have sums for several places of a word, so two vectors have 8 (AMD Zen 3).
    """
    if device.isa != "avx2":
        return 2
    if sizes.scheme == "palette6":
        return 1
    return 4 if rows <= 2 and sizes.scheme in ("int8", "float8_e4m3") else 2


class Blocks(NamedTuple):
    """How a product is divided: panels of columns by blocks of `block_m` rows are its items."""

    panels: int
    panel_bytes: int
    inputs: int
    row_blocks: int
    block_m: int
    scratch_bytes: int

    @classmethod
    def of(cls, sizes: Sizes, spec: QuantizedSpec) -> Blocks:
        """The blocks of a call. No axis may be empty."""
        inputs = _inputs(sizes.scheme, sizes.k)
        row_blocks = -(-sizes.m // _BLOCK_ROWS)
        block_m = -(-sizes.m // (row_blocks * spec.rows)) * spec.rows
        scratch = 4 * spec.width * (quantized_blocks.depth(spec) + block_m) if spec.shared else 0
        if sizes.dynamic:
            words = quantized_integers.depth(spec) // spec.per_word
            scratch = 4 * spec.width * (words + block_m)
        if spec.digits:
            groups = sizes.k // sizes.group_size
            scratch = 4 * quantized_digits.words_of_row(groups, inputs // groups)
        panel_bytes = inputs * spec.width * spec.bits // 8
        return cls(-(-sizes.n // spec.width), panel_bytes, inputs, row_blocks, block_m, scratch)

    @property
    def items(self) -> int:
        """Work items."""
        return self.panels * self.row_blocks


def prepare(sizes: Sizes, matrix: Matrix, device: Device, workers: int) -> Prepared:
    """Plan a product with a matrix and load its kernel. No axis may be empty."""
    spec = spec_of(sizes, device)
    made = Blocks.of(sizes, spec)
    memory = Memory(8 * len(QUANTIZED), 8 * len(ROUNDING))
    where = {name: (OPERANDS.index(name), 0) for name in ("bias", "out")}
    where["x"] = OPERANDS.index("a"), 0
    steps = []
    if sizes.dynamic:
        step, rounded = _rounding(sizes, spec, where["x"], device, memory)
        steps.append(step)
        where |= rounded
    if made.scratch_bytes:
        where["workspace"] = -1, memory.bytes
    places = words([(QUANTIZED.index(name), *place) for name, place in where.items()])
    template = _words(sizes, matrix, made, workers)
    steps.append(Step(kernel(spec, device), made.items, template, places))
    alone = made.panels * made.panel_bytes * sizes.m < _ALONE_BYTES
    recorded = Recorded.of(steps, memory.bytes, made.scratch_bytes, alone=alone)
    rows = spec.rows if spec.shared and not sizes.dynamic else None
    return Prepared(recorded, sizes.k, made.inputs, rows)


def _rounding(
    sizes: Sizes, spec: QuantizedSpec, x: tuple[int, int], device: Device, memory: Memory
) -> tuple[Step, dict[str, tuple[int, int]]]:
    """What rounds rows of x, and where its results lie: tiles of rows, and scales of rows."""
    tiles, tile_bytes = -(-sizes.m // spec.rows), 4 * spec.rows * sizes.k // spec.per_word
    of_row = quantized_integers.REST + sizes.k // 2 if spec.fours else 1
    rounded = -1, memory.reserve(tiles * tile_bytes)
    scales = -1, memory.reserve(4 * sizes.m * of_row)
    values = {"items": tiles, "m": sizes.m, "k": sizes.k}
    template = words([values.get(name, 0) for name in ROUNDING])
    where = {"x": x, "words": rounded, "x_scales": scales}
    places = words([(ROUNDING.index(name), *place) for name, place in where.items()])
    loaded = kernel(RoundingSpec(spec.rows, spec.lanes, spec.per_word, spec.fours), device)
    return Step(loaded, tiles, template, places), {"x": rounded, "x_scales": scales}


def _words(sizes: Sizes, matrix: Matrix, made: Blocks, workers: int) -> Words:
    """The argument block of a product without the addresses of a call."""
    groups = sizes.k // sizes.group_size
    values = {
        "items": made.items,
        "items_per_claim": claims.items_per_claim(
            _CLAIM_BYTES / made.panel_bytes, made.items, workers
        ),
        "row_blocks": made.row_blocks,
        "block_m": made.block_m,
        "panel_bytes": made.panel_bytes,
        "inputs": made.inputs,
        "x_m": made.inputs,
        "workspace_bytes": made.scratch_bytes,
        "groups": groups,
        "groups_ahead": min(groups, max(1, 2 * AHEAD_BYTES * groups // made.panel_bytes)),
        "alpha": double_bits(1.0),
    }
    values |= matrix._asdict()
    values |= {name: number for name, number in sizes._asdict().items() if name in _NUMBERS}
    if sizes.group_size == sizes.k:
        values["group_size"] = made.inputs
    return words([values.get(name, 0) for name in QUANTIZED])


_NUMBERS = ("m", "n", "group_size", "out_m", "out_n", "bias_n")
