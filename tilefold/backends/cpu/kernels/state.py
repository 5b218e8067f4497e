"""The shared part of decoding and its merge: a frame for a work item, the state of a query.

The state of a query is a row of whole vectors: O along d, then m in all lanes, then l as a sum per
lane. It lies in a worker's scratch, or where keys are split in the array "part", which the merge
reads: then scratch has one more, for the sum. The sign of l says whether the query saw a key: the
weight of a forbidden pair is -0.0, sums of it are -0.0 too, and no weight of a visible pair is.
"""

from __future__ import annotations

from collections.abc import Callable

from tilefold.backends.cpu.kernels import claims, dropout, pack, sinks, stages, work
from tilefold.backends.cpu.kernels.arguments import Arguments
from tilefold.backends.cpu.kernels.ir import Body, Module, Operand, Value
from tilefold.backends.cpu.kernels.microkernel import Shape
from tilefold.backends.cpu.kernels.scale import scale
from tilefold.backends.cpu.kernels.storage import SCALARS, Storage, storage
from tilefold.backends.cpu.kernels.tile import Tile, padded
from tilefold.backends.cpu.spec import KernelSpec

VALUES = 32
"""Values that every row adds before the next: they stay in the first cache meanwhile."""


def regions(spec: KernelSpec) -> dict[str, int]:
    """Scratch of one worker: elements of each region, in order. Every region is whole vectors."""
    dim, dim_v = spec.whole(spec.dim), spec.whole(spec.dim_v)
    states = spec.rows if spec.kernel == "decode" else 1
    found = {
        "q": spec.rows * dim,
        "k": spec.lanes * dim,
        "v": VALUES * dim_v,
        "p": spec.rows * spec.block_traverse,
        "state": states * spec.state_width,
    }
    if spec.dropout:
        line = dropout.line_of(spec.lanes, SCALARS[spec.dtype])
        found["keep"] = padded(dropout.rows(spec.block_traverse), 2 * line)
    return found


def emit(spec: KernelSpec, title: str, write: Callable[[Frame], None]) -> str:
    """A module with one kernel named after the pass: `write` runs once per work item."""
    scalar = SCALARS[spec.dtype]
    module = Module(title, spec.lanes * (32 if scalar == "float" else 64))
    argument = Value("%arguments", "ptr")
    with module.function(spec.kernel, [argument]) as body:
        arguments = Arguments(body, spec, argument)
        worker = claims.number_of_worker(body, arguments)
        scratch = claims.scratch_of_worker(body, arguments, worker)
        counted = stages.counted(body, spec, arguments, worker)
        with counted, work.items(body, arguments) as item:
            write(Frame(body, spec, arguments, scratch, item))
    return module.text()


class Frame:
    """One work item: its place, scratch, and the state of its rows."""

    def __init__(
        self, body: Body, spec: KernelSpec, arguments: Arguments, scratch: Value, item: work.Item
    ) -> None:
        self.body, self.spec, self.arguments, self.item = body, spec, arguments, item
        self.shape = Shape(1, 1, spec.lanes, SCALARS[spec.dtype])
        self.storage = storage(spec.dtype, spec.native_half)
        self.vector = self.shape.vector
        self.lowest = body.constant(float("-inf"), self.vector)
        self.zero = body.constant(0.0, self.vector)
        self.nothing = body.constant(-0.0, self.vector)
        none = Value("0", "i64")
        self.marks = Tile(body, self.shape, none, none)
        self._scratch = scratch
        self.scale = scale(body, arguments, spec.lanes, self.shape.scalar, natural=spec.natural)
        self.rate = self.scale.rate()

    def region(self, name: str) -> Value:
        """The address of a region of this worker's scratch."""
        sizes = regions(self.spec)
        before = [*sizes].index(name)
        return self.at(self._scratch, sum([*sizes.values()][:before]), f"{name}.scratch")

    def at(self, base: Value, index: Operand, hint: str = "p") -> Value:
        """The address of an element."""
        return self.body.offset(base, self.shape.scalar, index, hint)

    def load(self, address: Value, hint: str = "x") -> Value:
        """One vector."""
        return self.body.load(address, self.vector, hint)

    def maximum_place(self, state: Value) -> Value:
        """Where the state of a row, which begins with O, keeps m, in all lanes."""
        return self.at(state, self.spec.whole(self.spec.dim_v), "m.at")

    def sum_place(self, state: Value) -> Value:
        """Where the state of a row keeps l, a sum per lane."""
        return self.at(state, self.spec.whole(self.spec.dim_v) + self.spec.lanes, "l.at")

    def begin(self, state: Value) -> None:
        """O <- 0;  m <- -inf;  l <- -0."""
        for first in range(0, self.spec.whole(self.spec.dim_v), self.spec.lanes):
            self.body.store(self.zero, self.at(state, first))
        self.body.store(self.lowest, self.maximum_place(state))
        self.body.store(self.nothing, self.sum_place(state))

    def subtrahend(self, m: Value) -> Value:
        """The number to subtract from scores: m, but 0 while it is -inf."""
        unset = self.body.compare("oeq", m, self.lowest)
        return self.body.select(unset, self.zero, m, "m.safe")

    def across(self, value: Value, operation: Callable[[Value, Value], Value]) -> Value:
        """All lanes folded into one value, which every lane then holds."""
        half = self.spec.lanes // 2
        while half:
            turned = self.body.shuffle(value, value, [i ^ half for i in range(self.spec.lanes)])
            value = operation(value, turned)
            half //= 2
        return value

    def finish(self, state: Value, h: Value, i: Value) -> None:
        """Write o and lse of query `i` of head `h`; the state is used up."""
        body, spec, arguments = self.body, self.spec, self.arguments
        body.comment("O <- O / l;  lse <- rest m + ln l;  empty rows: 0 and -inf")
        lanes = self.load(self.sum_place(state), "l")
        total = self.across(lanes, lambda a, b: body.binary("fadd", a, b, "l"))
        empty = self.marks.marked(total, "weight")
        kept = body.constant(1.0, self.vector)
        if "max" in spec.more:
            top = self.scale.maximum(self.load(self.maximum_place(state), "m"), total)
            self._write_number(top, "max", h, i)
        if spec.sinks:
            place = self.maximum_place(state)
            own = self.load(place, "m"), total
            new, total, kept = sinks.take(body, spec, arguments, self.scale, h, *own)
            body.store(new, place)
        inverse = body.binary("fdiv", kept, total, "inverse")
        for first in range(0, spec.whole(spec.dim_v), spec.lanes):
            place = self.at(state, first)
            mean = body.binary("fmul", self.load(place, "o"), inverse, "o")
            body.store(body.select(empty, self.zero, mean), place)
        rows = arguments.rows_of("o", self.storage.stored, self.item.b, h)
        row = self.storage.at(body, rows, body.mul(i, arguments["o_s"]))
        self.move(pack.unpack, state, row, spec.dim_v, 1, "o")
        lse, low = self.scale.log_sum(self.load(self.maximum_place(state), "m"), total)
        some = body.compare("ogt", total, self.zero)
        lse = body.select(some, lse, body.constant(float("nan"), self.vector))
        if spec.sinks:
            none = body.compare("oeq", total, self.zero)
            empty = body.binary("and", empty, none, "empty")
        lse = body.select(empty, self.lowest, lse)
        self._write_number(lse, "lse", h, i)
        with body.when(body.given(arguments["lse_low"]), "low"):
            self._write_number(body.select(some, low, self.zero), "lse_low", h, i)

    def _write_number(self, value: Value, name: str, h: Value, i: Value) -> None:
        """Write what the first lane holds to the operand's element of query `i` of head `h`."""
        body, arguments = self.body, self.arguments
        number = body.result(name, self.shape.scalar, f"extractelement {value.typed}, i64 0")
        rows = arguments.rows_of(name, self.shape.scalar, self.item.b, h)
        body.store(number, self.at(rows, body.mul(i, arguments[f"{name}_s"])))

    def move(
        self,
        direction: Callable[[Module, Shape, Storage], str],
        scratch: Value,
        array: Value,
        dim: int,
        rows: Operand,
        name: str,
        factor: Value | None = None,
    ) -> None:
        """Rows of an operand to scratch, `dim` filled up to whole vectors with 0; or back.

        To `pack`, d is the axis of the lanes.
        """
        factor = factor or self.body.constant(1.0, self.shape.scalar)
        strides = [self.arguments[f"{name}_d"], self.arguments[f"{name}_s"]]
        sizes = [Value(str(dim), "i64"), self.body.operand(rows)]
        width = Shape(1, -(-dim // self.spec.lanes), self.spec.lanes, self.shape.scalar)
        function = direction(self.body.module, width, self.storage)
        self.body.invoke(function, [scratch, array, *strides, *sizes, factor])
