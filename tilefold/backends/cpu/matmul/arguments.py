"""The argument block of a kernel of products: 64-bit words, named once for kernels and callers."""

from __future__ import annotations

from tilefold.backends.cpu.kernels.ir import Body, Value
from tilefold.backends.cpu.matmul.spec import (
    FewRowsSpec,
    GemmSpec,
    PackSpec,
    QuantizedSpec,
    RoundingSpec,
)

COUNTERS = ("next_item", "next_worker")

PACK = (
    *COUNTERS,
    "items",
    "array",  # address of B
    "offsets",  # address of int64: where each matrix of the batch begins, in elements
    "lane_stride",  # from column to column, in elements
    "c_stride",  # from input to input
    "n",
    "k",
    "groups",  # items of a matrix
    "panels",  # address of the result
    "panel_bytes",
    "matrix_bytes",
)

GEMM = (
    *COUNTERS,
    "items",
    "items_per_claim",
    "m",
    "n",
    "k",
    "block_m",  # rows of an item: a multiple of those of a register tile
    "block_n",  # columns of an item: a multiple of a panel's
    "block_k",  # elements of the contraction at a time: a multiple of what one step takes
    "row_blocks",
    "column_blocks",
    "offsets",  # address of int64 [batch][6]: where a, b, out, c, bias, gate begin
    "a",
    "a_m",
    "a_k",
    "b",  # the array, or its panels
    "b_k",
    "b_n",
    "gate",
    "gate_k",
    "gate_n",
    "panel_bytes",
    "out",
    "out_m",
    "out_n",
    "c",
    "c_m",
    "c_n",
    "bias",
    "bias_m",
    "bias_n",
    "alpha",  # bits of a double
    "beta",
    "ahead",  # bytes of the next panel of B that a step asks for
    "tiles_m",  # tiles of sums that scratch has for each panel of B; 0 where one serves all
    "workspace",
    "workspace_bytes",
    "a_bytes",  # a worker's scratch for panels of A, then of B, of the gate, then sums
    "b_bytes",
    "sums_bytes",
    "chunks",  # parts of the contraction, of which each is an item
    "chunk_k",
    "parts",  # address of the sums of all chunks
    "finished",  # address of int64: chunks that are done, of each block of each matrix
)

QUANTIZED = (
    *COUNTERS,
    "items",
    "items_per_claim",
    "m",
    "n",
    "row_blocks",
    "block_m",  # rows of an item
    "inputs",  # k, up to whole blocks of codes in words
    "workspace",  # of many rows: each worker's block of a panel, and sums
    "workspace_bytes",
    "x",  # address of float32: `quantized_calls.Prepared`
    "x_m",
    "x_scales",  # of rows that were rounded
    "codes",
    "panel_bytes",
    "scales",
    "zeros",
    "groups",
    "groups_ahead",  # how much earlier than its use a group's scales are asked for
    "group_size",
    "table",  # address of 64 float16
    "out",
    "out_m",
    "out_n",
    "bias",
    "bias_m",
    "bias_n",
    "alpha",
    "beta",
)

ROUNDING = (*COUNTERS, "items", "m", "k", "x", "words", "x_scales")

OFFSETS = ("a", "b", "out", "c", "bias", "gate")

_ADDRESSES = {"array", "offsets", "panels", "a", "b", "gate", "out", "c", "bias", "workspace"} | {
    *("parts", "finished", "x", "codes", "scales", "zeros", "table", "words", "x_scales"),
}


Spec = GemmSpec | PackSpec | QuantizedSpec | RoundingSpec | FewRowsSpec


def names(spec: Spec) -> tuple[str, ...]:
    """The words of a kernel's argument block, in order."""
    if isinstance(spec, QuantizedSpec):
        return QUANTIZED
    if isinstance(spec, RoundingSpec):
        return ROUNDING
    return PACK if isinstance(spec, PackSpec) else GEMM


class Arguments:
    """The argument block as a body reads it: each word once, where it is first asked for."""

    def __init__(self, body: Body, spec: Spec, block: Value) -> None:
        self._body, self._block = body, block
        self._position = {name: index for index, name in enumerate(names(spec))}
        self._values = {
            name: body.load(self.address(name), "ptr" if name in _ADDRESSES else "i64", name)
            for name in self._position
            if name not in COUNTERS
        }

    def address(self, name: str) -> Value:
        """Where a word lies, for the counters."""
        return self._body.offset(self._block, "i64", self._position[name], f"{name}.at")

    def __getitem__(self, name: str) -> Value:
        return self._values[name]
