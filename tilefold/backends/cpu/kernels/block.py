"""One block of the parallel axis: where it is, its part of scratch, its operands, its mask.

Forward and dQ put queries in the lanes and traverse keys; dK/dV puts keys in the lanes and
traverses queries. A `Block` says which, so that the passes read alike.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from tilefold.backends.cpu.kernels import (
    ahead,
    amx,
    claims,
    dropout,
    entries,
    microkernel,
    pack,
    stages,
    work,
)
from tilefold.backends.cpu.kernels.ahead import TileOf, TileScoreText
from tilefold.backends.cpu.kernels.arguments import COMPUTED, OF_QUERY, Arguments
from tilefold.backends.cpu.kernels.ir import Body, Module, Operand, Value
from tilefold.backends.cpu.kernels.mask import MaskText, Place, ScoreText
from tilefold.backends.cpu.kernels.scale import scale
from tilefold.backends.cpu.kernels.storage import SCALARS, Storage, storage
from tilefold.backends.cpu.kernels.tile import Matrix, Tile, padded
from tilefold.backends.cpu.spec import KernelSpec


def regions(spec: KernelSpec) -> dict[str, int]:
    """Scratch of one worker: elements of each region, in order. Every region is whole vectors."""
    width = spec.block_parallel
    tile = padded(spec.block_traverse, spec.rows) * width
    unit = 1 if spec.multiplier.unit != "amx" else 32
    dim, dim_v = padded(spec.dim, unit) * width, padded(spec.dim_v, unit) * width
    rows_of_k = width * spec.whole(spec.dim)
    pair = {"p": tile, "ds": tile}
    by_query = {"q": dim, "do": dim_v, "dq": dim, "m": width, "r": width, "delta": width} | pair
    by_key = {"k": dim, "v": dim_v, "dk": dim, "dv": dim_v} | pair
    found = {
        "forward": {"q": dim, "o": dim_v, "p": tile},
        "delta": {"o": dim_v, "do": dim_v}
        | dict.fromkeys(("lse", "lse_low", *spec.more, *OF_QUERY), width),
        "backward_dq": by_query,
        "backward_dkv": by_key,
        "backward": by_key | {"k_rows": rows_of_k},
        "key_mass": {"k": dim, "p": tile, "mass": width},
        "sink_gradients": dict.fromkeys(OF_QUERY, width),
        "backward_inputs": by_query,
        "reduce_dq": {"dq_parts": dim, "dq": dim},
        "sum_inputs": {},
    }[spec.kernel]
    if spec.kernel == "backward_inputs":
        found = found | entries.regions(spec, tile)
    if spec.row.visits:
        found = found | ahead.regions(spec, tile)
    if spec.dropout and spec.row.visits:
        found["keep"] = _factors_of_dropout(spec)
    if spec.multiplier.unit != "fma":
        return found | _pair_regions(spec)
    if storage(spec.dtype, spec.native_half).converts:
        return found | _near_regions(spec)
    return found


def _factors_of_dropout(spec: KernelSpec) -> int:
    """Elements of the factors of a tile, which is read in whole register tiles."""
    rows = padded(spec.block_traverse, max(spec.rows, spec.multiplier.step))
    step = dropout.stride(spec.block_parallel, spec.lanes, SCALARS[spec.dtype])
    return dropout.rows(rows) * step


def _pair_regions(spec: KernelSpec) -> dict[str, int]:
    """32-bit words: right sides and weights as pairs, lines of left sides, staging between them."""
    width, traversed = spec.block_parallel, spec.block_traverse
    unit = spec.multiplier.step
    rows = padded(traversed, unit)

    def right(dim: int) -> int:
        return spec.multiplier.parts * padded(dim, unit) // 2 * width

    def left(dim: int) -> int:
        return spec.multiplier.parts * rows * padded(dim, width) // 2

    def columns(dim: int) -> int:
        lines = spec.multiplier.parts * padded(dim, unit) * padded(traversed, width) // 2
        return max(lines, rows // 2 * padded(dim, 16))

    dim, dim_v = spec.dim, spec.dim_v
    staging = {"staging": max(padded(dim, unit), padded(dim_v, unit), rows) * width}
    if spec.kernel == "key_mass":
        return {"k": right(dim)} | staging | {"left": left(dim)}
    if spec.kernel == "forward":
        own = {"q": right(dim), "p_pairs": right(traversed)}
        return own | staging | {"left": left(dim), "left_columns": columns(dim_v)}
    lines = {"left": left(dim), "left_columns": columns(dim), "left_v": left(dim_v)}
    if spec.kernel in ("backward_dq", "backward_inputs"):
        own = {"q": right(dim), "do": right(dim_v), "ds_pairs": right(traversed)}
        return own | staging | lines
    own = {"k": right(dim), "v": right(dim_v)}
    weights = {"p_pairs": right(traversed), "ds_pairs": right(traversed)}
    found = own | weights | staging | lines | {"left_v_columns": columns(dim_v)}
    if spec.kernel == "backward":
        words = spec.multiplier.parts * width // 2
        found |= {"ds_lines": words * rows, "k_words": words * spec.whole(dim)}
    return found


def _near_regions(spec: KernelSpec) -> dict[str, int]:
    """Places for a tile's widened rows: of keys or queries, of values or dO; forward shares one."""

    def size(dim: int) -> int:
        traversed, lanes = spec.block_traverse, spec.lanes
        as_rows, turned = (
            padded(dim, lanes) * traversed,
            padded(traversed, lanes) * dim,
        )
        return padded(max(as_rows, turned), lanes)

    if not spec.row.visits:
        return {}
    if spec.kernel == "key_mass":
        return {"left": size(spec.dim)}
    if spec.kernel == "forward":
        return {"left": max(size(spec.dim), size(spec.dim_v))}
    return {"left": size(spec.dim), "left_v": size(spec.dim_v)}


def emit(spec: KernelSpec, title: str, write: Callable[[Block], None]) -> str:
    """A module with one kernel named after the pass: `write` runs once per work item."""
    scalar = SCALARS[spec.dtype]
    shape = microkernel.Shape(
        spec.rows, spec.vectors, spec.lanes, scalar, spec.multiplier.unit == "dot"
    )
    module = Module(title, spec.lanes * (32 if scalar == "float" else 64))
    argument = Value("%arguments", "ptr")
    with module.function(spec.kernel, [argument]) as body:
        arguments = Arguments(body, spec, argument)
        worker = claims.number_of_worker(body, arguments)
        scratch = claims.scratch_of_worker(body, arguments, worker)
        tiles = amx.configured(body) if spec.multiplier.unit == "amx" else nullcontext()
        counted = stages.counted(body, spec, arguments, worker)
        with tiles, counted, work.items(body, arguments) as item:
            write(Block(body, spec, shape, arguments, scratch, item))
    return module.text()


class Block:
    """The frame in which one work item is written."""

    def __init__(
        self,
        body: Body,
        spec: KernelSpec,
        shape: microkernel.Shape,
        arguments: Arguments,
        scratch: Value,
        item: work.Item,
    ) -> None:
        self.body, self.spec, self.shape, self.arguments = body, spec, shape, arguments
        self.parallel = spec.row.parallel
        self.b, self.h, self.row = item.b, item.h, item.row
        self._scratch = scratch
        self.scale = scale(body, arguments, shape.lanes, shape.scalar, natural=spec.natural)
        self.rate = self.scale.rate()
        self._begin()

    def _begin(self) -> None:
        body = self.body
        self.length = self.arguments[f"len_{self.parallel}"]
        self.first = body.mul(self.row, self.shape.width, "first")
        left = body.sub(self.length, self.first)
        self.valid = body.minimum(left, self.shape.width, "valid")

    def at_row(self, row: Value) -> None:
        """Move to another block row of the same item."""
        self.row = row
        self._begin()

    def scalar(self, number: float) -> Value:
        """A constant of the kernel's type."""
        return self.body.constant(number, self.shape.scalar)

    def splat(self, number: float) -> Value:
        """A constant in every lane."""
        return self.body.constant(number, self.shape.vector)

    def region(self, name: str) -> Value:
        """The address of a region of this worker's scratch."""
        sizes = regions(self.spec)
        names = [*sizes]
        offset = sum(sizes[before] for before in names[: names.index(name)])
        return self.body.offset(self._scratch, self.shape.scalar, offset, f"{name}.scratch")

    @property
    def beyond(self) -> Value:
        """The address after all regions, where scratch follows whose size the plan knows."""
        size = sum(regions(self.spec).values())
        return self.body.offset(self._scratch, self.shape.scalar, size, "beyond")

    def at(self, scratch: Value, row: Operand, column: int) -> Value:
        """The address of one vector in a scratch matrix as wide as the block."""
        return self.shape.at(self.body, scratch, row, column, self.shape.width)

    def zero(self, name: str, rows: int) -> None:
        """Fill the first rows of a region with zeros."""
        region, zero = self.region(name), self.splat(0.0)
        with self.body.loop("d", 0, rows) as d:
            for j in range(self.shape.vectors):
                self.body.store(zero, self.at(region, d, j))

    def matrix(self, name: str, h: Value) -> Matrix:
        """An operand of the traversed side, for one head."""
        found = self.storage(name)
        head = self.arguments.rows_of(name, found.stored, self.b, h)
        return Matrix(head, self.arguments[f"{name}_s"], self.arguments[f"{name}_d"], found)

    def storage(self, name: str) -> Storage:
        """The storage of an operand."""
        own = storage(self.spec.dtype, self.spec.native_half)
        return own.computed if name in COMPUTED else own

    def near(self, tile: Tile, rows: Matrix, region: str, dim: int) -> Matrix:
        """A tile's rows as elements to compute with, in a region where they have to be widened."""
        if not rows.storage.converts:
            return rows
        return tile.near(rows, self.region(region), self.spec.block_traverse, dim)

    def pack(
        self, name: str, dim: int, factor: Value, into: str | None = None, skipped: Operand = 0
    ) -> Value:
        """Bring the block's rows of an operand, turned and multiplied, to a region (its own).

        They lie `skipped` rows further on in its head than the block says.
        """
        region = self.region(into or name)
        place = [*self._place(name, skipped), Value(str(dim), "i64"), factor]
        self.body.invoke(
            pack.pack(self.body.module, self.shape, self.storage(name)), [region, *place]
        )
        return region

    def unpack(self, name: str, region: Value, dim: int, factor: Value) -> None:
        """Write a region, multiplied, to the block's rows of an operand."""
        place = [*self._place(name), Value(str(dim), "i64"), factor]
        function = pack.unpack(self.body.module, self.shape, self.storage(name))
        self.body.invoke(function, [region, *place])

    def unpack_gradient(self, name: str, region: Value, dim: int) -> None:
        """`unpack` a region times the scale: by both factors, since one may exceed the type."""
        power = self.body.splat(self.scale.power, self.shape.lanes, "power")
        with self.body.loop("d", 0, dim) as d:
            for j in range(self.shape.vectors):
                place = self.at(region, d, j)
                total = self.body.load(place, self.shape.vector)
                self.body.store(self.body.binary("fmul", total, power), place)
        self.unpack(name, region, dim, self.scale.rest)

    def _place(self, name: str, skipped: Operand = 0) -> list[Value]:
        body, arguments = self.body, self.arguments
        found = self.storage(name)
        head = arguments.rows_of(name, found.stored, self.b, self.h)
        stride = arguments[f"{name}_s"]
        first = body.add(self.first, skipped)
        start = found.at(body, head, body.mul(first, stride))
        d_stride = arguments[f"{name}_d"] if f"{name}_d" in arguments else Value("0", "i64")
        return [start, stride, d_stride, self.valid]

    def existing_lanes(self) -> list[Value]:
        """A truth per lane of each vector: its parallel index exists."""
        body, lanes = self.body, self.shape.lanes
        valid = body.splat(body.cast("trunc", self.valid, "i32"), lanes, "valid")
        found = []
        for j in range(self.shape.vectors):
            steps = ", ".join(f"i32 {j * lanes + lane}" for lane in range(lanes))
            found.append(body.compare("slt", Value(f"<{steps}>", valid.type), valid, "exists"))
        return found

    def factors(self, tile: Tile, h: Value) -> dropout.Factors | None:
        """Make the factors of dropout of a tile, for query head `h`; None where there are none."""
        if not self.spec.dropout:
            return None
        return dropout.of_tile(
            self.body,
            self.shape,
            self.arguments,
            self.region("keep"),
            parallel=self.parallel,
            block=self.first,
            first=tile.first,
            count=tile.count,
            h=h,
            b=self.b,
        )

    def mask(self, h: Value) -> MaskText:
        """The rule on this block, for query head `h`."""
        return MaskText(self.place(h))

    def score(self, h: Value, tile: Tile) -> ScoreText | None:
        """The modified score of a tile, for query head `h`; None where it is the product."""
        if self.spec.score is None:
            return None
        return TileScoreText(self.place(h), self.scale.rest, self.tile_of(tile))

    def tile_of(self, tile: Tile) -> TileOf:
        """Where a tile of this block is."""
        return TileOf(self.shape, tile.first, tile.count, self.valid, self.region)

    def place(self, h: Value) -> Place:
        """Where the pairs of this block and of query head `h` are."""
        return Place(
            self.body,
            self.spec,
            self.arguments,
            parallel=self.parallel,
            block=self.first,
            length=self.length,
            b=self.b,
            h=h,
        )
