"""The argument block of a kernel: a line of 64-bit words, named once for the writer and the caller.

A kernel is `void f(void *arguments)`, the shape of function that every thread runtime calls. All
words are constant during a call but the two counters from which workers pull their work. Where keys
are split, a counter for each head follows: how many of its splits are done.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

from tilefold.backends.cpu.spec import KernelSpec
from tilefold.masks.skeleton import Skeleton

if TYPE_CHECKING:
    from tilefold.backends.cpu.kernels.ir import Body, Value

WORK = (
    "next_item",  # counter: the next entry of the work list
    "next_worker",  # counter: the next free part of the workspace
    "items",
    "items_per_claim",  # entries that a worker takes at a time
    "order",  # address of int64 block rows, heaviest first
    "order_length",
    "rows",  # address of int64 offsets into runs, one per block row, and the end
    "runs",  # address of (first, last, masked) int64
    "row_b",  # block rows of the plan per batch entry, 0 where all are alike
    "row_h",
    "item_rows",  # items per head: its block rows, or in the fused backward its owners
    "block_rows",  # or the parts of dQ that a worker makes in turn
    "owners",  # address of int64 (first row, last row, first query, last query, part)
    "workspace",
    "workspace_bytes",
    "heads",  # heads on the parallel side
    "group",  # query heads per key head
    "heads_per_item",  # key heads per item of the decode kernel
    "len_q",
    "len_k",
    "power",  # bits of a double, as `rest`: see `factors`
    "rest",
)

COUNTERS = ("next_item", "next_worker")

DROPOUT = (
    "seed",  # address of the seed, an int64
    "keep_from",  # the least word of a kept pair
    "keep_factor",  # bits of a double
)
"""The last words where pairs fall out: see `tilefold.problems.dropout`."""

PER_ROW = ("lse", "lse_low", "dlse", "max", "mass", "statistics")
"""Operands with one element per query or key, or several rows of these."""

PER_HEAD = ("sinks", "dsinks")
"""Operands with several elements per query head."""

OF_QUERY = ("m", "r", "delta")
"""What the kernel "delta" leaves of the queries of a head: the rows of its operand "statistics".

They are one operand, since each buffer costs a call 2 microseconds.
"""

COMPUTED = (*PER_ROW, *PER_HEAD, *OF_QUERY, "dq_parts")
"""Operands in the type of the sums, whatever the type of the others."""


CHUNK = 2**14
"""Elements that a worker of the kernel "sum_inputs" takes at a time."""

_MOST = {"float32": 100, "float64": 800}
"""The largest exponent of `power`: it leaves room for large elements of the operand."""


def factors(scale: float, computed: str) -> tuple[float, float]:
    """The scale as power * rest: a signed power of two, and a factor in [1, 2).

    Where the scale is extreme for the type that is computed in, rest takes what power cannot.

    >>> factors(-0.75, "float32"), factors(2.0**103, "float32"), factors(0.0, "float32")
    ((-0.5, 1.5), (1.2676506002282294e+30, 8.0), (0.0, 1.0))
    """
    if not scale:
        return scale, 1.0
    most = _MOST[computed]
    exponent = max(-most, min(math.frexp(scale)[1] - 1, most))
    return math.copysign(math.ldexp(1.0, exponent), scale), math.ldexp(abs(scale), -exponent)


@lru_cache(maxsize=256)
def names(spec: KernelSpec) -> tuple[str, ...]:
    """The words of a kernel's argument block, in order.

    An operand `x` is its address `x` and its strides in elements, such as `x_b x_h x_s x_d`. A
    target is its address, its strides and its sizes.
    """
    words = list(WORK)
    for operand in spec.arguments:
        words += [operand, *(f"{operand}_{axis}" for axis in axes(operand))]
    for skeleton in skeletons(spec):
        words += [parameter.name for parameter in skeleton.parameters]
        for slot in skeleton.slots:
            words += [slot.name, *slot.strides]
    for number, target in enumerate(spec.targets):
        words += [f"target{number}"]
        words += [f"target{number}_{axis}" for axis in range(target.rank)]
        words += [f"target{number}_size{axis}" for axis in range(target.rank)]
    return (*words, *(DROPOUT if spec.dropout else ()))


def skeletons(spec: KernelSpec) -> tuple[Skeleton, ...]:
    """The skeletons of the mask and of a modified score."""
    return (spec.mask,) if spec.score is None else (spec.mask, spec.score)


def axes(operand: str) -> str:
    """The axes of an operand, of which each has a stride."""
    if operand in PER_HEAD:
        return "hn"
    return "bhs" if operand in PER_ROW else "bhsd"


class Arguments:
    """The argument block as the body of a kernel reads it: every word once, on entry."""

    def __init__(self, body: Body, spec: KernelSpec, block: Value) -> None:
        self._body = body
        self._block = block
        self._position = {name: index for index, name in enumerate(names(spec))}
        self._values: dict[str, Value] = {}
        addresses = {*spec.arguments, "order", "rows", "runs", "owners", "workspace"}
        addresses |= {slot.name for skeleton in skeletons(spec) for slot in skeleton.slots}
        addresses.add("seed")
        addresses |= {f"target{number}" for number in range(len(spec.targets))}
        for name in names(spec):
            if name not in COUNTERS:
                type_ = "ptr" if name in addresses else "i64"
                self._values[name] = body.load(self.address(name), type_, name)
        for name in OF_QUERY if "statistics" in self._values else ():
            self._values[f"{name}_s"] = self._values["statistics_s"]

    def address(self, name: str) -> Value:
        """Where a word lies, for the counters."""
        return self._body.offset(self._block, "i64", self._position[name], f"{name}.at")

    def counter(self, index: Value) -> Value:
        """The address of one of the counters of a head, which follow the named words."""
        place = self._body.add(index, len(self._position))
        return self._body.offset(self._block, "i64", place, "counter")

    def __getitem__(self, name: str) -> Value:
        return self._values[name]

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def rows_of(self, name: str, scalar: str, b: Value, h: Value) -> Value:
        """The address of the first element of an operand's (batch, head)."""
        body = self._body
        operand = "statistics" if name in OF_QUERY else name
        index = body.add(body.mul(b, self[f"{operand}_b"]), body.mul(h, self[f"{operand}_h"]))
        if name in OF_QUERY:
            index = body.add(index, body.mul(self["len_q"], OF_QUERY.index(name)))
        return body.offset(self[operand], scalar, index, f"{name}.head")
