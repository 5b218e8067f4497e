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

SINKS = ("sinks_count", "sinks_h", "sinks_n")
"""The number of sinks of each head, and the strides of their array."""

PARTS = ("part_size", "shared")
"""The elements of a part of the gradient of an array, and the units that share their entries."""


def arrays(spec: TritonSpec) -> dict[str, str]:
    """The arrays of a kernel that are pointers, with the names of their types."""
    found = {}
    for name in spec.row.operands:
        found[name] = spec.dtype if name in STRIDED else spec.statistics
    found |= dict.fromkeys(spec.extra, spec.statistics)
    if "seed" in spec.operands:
        found["seed"] = "int64"
    found |= {slot.name: slot.dtype for slot in spec.inputs}
    if spec.row.visits:
        found |= dict.fromkeys(RUNS, "int32")
    return found


def rule(spec: TritonSpec) -> tuple[str, ...]:
    """The arguments that the rule and the score read: parameters, tables and strides.

    The arrays that come with each call are not among them.
    """
    if not spec.row.visits:
        return ()
    given = {slot.name for slot in spec.inputs}
    score = mask.arguments(spec.score) if spec.score else ()
    return (*mask.arguments(spec.mask), *(name for name in score if name not in given))


def last(spec: TritonSpec) -> tuple[str, ...]:
    """Arguments that few kernels have."""
    found: tuple[str, ...] = dropout.ARGUMENTS if spec.dropout else ()
    if "sinks" in spec.extra:
        found += SINKS
    if spec.entries:
        found += (*PARTS, *entry_strides(spec))
    return found


def entry_strides(spec: TritonSpec) -> tuple[str, ...]:
    """The strides of a part, which is contiguous."""
    return tuple([f"part_{axis}" for axis in range(spec.entries[0].rank)])


def strides(spec: TritonSpec) -> tuple[str, ...]:
    """The strides of the operands, in elements."""
    given = (name for name in spec.row.operands if name in STRIDED)
    return tuple(f"{name}_{axis}" for name in given for axis in AXES)


def names(spec: TritonSpec) -> tuple[str, ...]:
    """All arguments in their order."""
    return (*arrays(spec), *rule(spec), *SIZES, *strides(spec), "scale", *last(spec))


def alike(spec: TritonSpec) -> tuple[str, ...]:
    """Arguments for whose values no kernel is compiled anew."""
    numbers = tuple(name for name in rule(spec) if name.startswith("p"))
    return (*numbers, *SIZES, "scale", *last(spec))


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
    skeletons = [spec.mask, *([spec.score] if spec.score else [])]
    slots = [slot for skeleton in skeletons for slot in skeleton.slots]
    types = {slot.name: "*i32" if wide or slot.dtype == "int32" else "*u8" for slot in slots}
    number = "i64" if spec.dtype == "float64" else "fp32"
    numbers = {"int": "i64" if spec.index_bits == 64 else "i32", "real": number}
    types |= {one.name: numbers[one.dtype] for skeleton in skeletons for one in skeleton.parameters}
    for name in rule(spec):
        found[name] = types.get(name, "i32")
    found |= dict.fromkeys(SIZES, "i32") | {"parts_stride": "i64"}
    found |= dict.fromkeys(strides(spec), "i64" if spec.wide else "i32")
    found |= {"scale": number} | dict.fromkeys(last(spec), "i32")
    found |= {"keep_from": "i32", "keep_factor": number} if spec.dropout else {}
    return found | ({"part_size": "i64"} if spec.entries else {})
