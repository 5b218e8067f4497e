"""The arguments of a kernel in their order: what the source declares and what a launch gives.

Arrays come first, then what the rule reads, then integers (lengths, strides) and the scale.
Strides are the arguments for which Triton may compile anew: it asks whether they are 1 or multiples
of 16, which decides how much a thread moves at once. All other integers serve every value alike.
The scale of float64 is given as an integer of the same bits: Triton passes float32 alone.
"""

from __future__ import annotations

from tilefold.backends.launching import AXES
from tilefold.backends.triton.kernels import dropout, mask
from tilefold.backends.triton.kernels.text import ELEMENTS
from tilefold.backends.triton.spec import TritonSpec
from tilefold.planning.kernels import STRIDED

RUNS = ("order", "run_rows", "runs")
"""Which tiles are visited, in 32-bit integers: `order` gives the block row of a program; runs
`run_rows[2 i]` to `run_rows[2 i + 1]` of block row i are of whole tiles without a mask, and the
runs from there to `run_rows[2 i + 2]` of the others. A run is (first, last)."""

SIZES = (
    "len_q",
    "len_k",
    "heads",
    "group",
    "row_b",
    "row_h",
    "block_rows",
    "splits",
    "parts_stride",
)
"""Integers of every kernel: `heads` on the parallel side, `group` query heads to a key head,
`row_b` and `row_h` block rows from one plane of the runs to the next (0 where all are alike),
`block_rows` of one head, `splits` parts that another kernel joins, and `parts_stride` rows, of 64
bits, from one part of dq to the next."""


def arrays(spec: TritonSpec) -> dict[str, str]:
    """The arrays of a kernel that are pointers, with the names of their types."""
    found = {}
    for name in spec.row.operands:
        found[name] = spec.dtype if name in STRIDED else spec.statistics
    if "seed" in spec.operands:
        found["seed"] = "int64"
    if spec.row.visits:
        found |= dict.fromkeys(RUNS, "int32")
    return found


def rule(spec: TritonSpec) -> tuple[str, ...]:
    """The arguments that the rule reads: parameters, tables and their strides."""
    return mask.arguments(spec.mask) if spec.row.visits else ()


def strides(spec: TritonSpec) -> tuple[str, ...]:
    """The strides of the operands, in elements."""
    given = (name for name in spec.row.operands if name in STRIDED)
    return tuple(f"{name}_{axis}" for name in given for axis in AXES)


def names(spec: TritonSpec) -> tuple[str, ...]:
    """All arguments in their order."""
    last = dropout.ARGUMENTS if spec.dropout else ()
    return (*arrays(spec), *rule(spec), *SIZES, *strides(spec), "scale", *last)


def alike(spec: TritonSpec) -> tuple[str, ...]:
    """Arguments for whose values no kernel is compiled anew."""
    numbers = tuple(name for name in rule(spec) if name.startswith("p"))
    last = dropout.ARGUMENTS if spec.dropout else ()
    return (*numbers, *SIZES, "scale", *last)


def wide_tables(spec: TritonSpec) -> bool:
    """True if tables of bytes are given as 32-bit integers.

    Weights that follow from bytes are laid out for a product as bytes would be, and Triton 3.6 and
    3.7 end there with an assertion where they are float64 ("fp64 don't support largeK MMA").
    """
    return spec.dtype == "float64"


def signature(spec: TritonSpec) -> dict[str, str]:
    """The types of all arguments as Triton writes them, for compilation ahead of time."""
    found = {name: f"*{ELEMENTS[dtype]}" for name, dtype in arrays(spec).items()}
    wide = wide_tables(spec)
    types = {
        slot.name: "*i32" if wide or slot.dtype == "int32" else "*u8" for slot in spec.mask.slots
    }
    numbers = {"int": "i64" if spec.index_bits == 64 else "i32"}
    types |= {parameter.name: numbers[parameter.dtype] for parameter in spec.mask.parameters}
    for name in rule(spec):
        found[name] = types.get(name, "i32")
    found |= dict.fromkeys(SIZES, "i32") | {"parts_stride": "i64"}
    found |= dict.fromkeys(strides(spec), "i64" if spec.wide else "i32")
    number = "i64" if spec.dtype == "float64" else "fp32"
    found |= {"scale": number}
    return found | ({"keep_from": "i32", "keep_factor": number} if spec.dropout else {})
