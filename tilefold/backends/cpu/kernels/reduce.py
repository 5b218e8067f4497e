"""Sums of parts that owners left, in their order: of dQ, and of gradients of a score's arrays."""

from __future__ import annotations

from tilefold.backends.cpu.kernels import work
from tilefold.backends.cpu.kernels.arguments import CHUNK
from tilefold.backends.cpu.kernels.block import Block, emit
from tilefold.backends.cpu.kernels.ir import Body, Value, vector
from tilefold.backends.cpu.kernels.storage import storage_in
from tilefold.backends.cpu.partitions import COLUMNS, PART
from tilefold.backends.cpu.spec import KernelSpec


def reduce_dq(spec: KernelSpec) -> str:
    """The source of the kernel that adds the parts up."""
    title = """
for each block of queries:                               one owner
    dQ^T <- 0
    for each part that holds these queries, in order: dQ^T += part^T
    dQ <- dQ^T"""
    return emit(spec, title.strip(), _write_sum)


def _write_sum(block: Block) -> None:
    body, spec, shape, one = block.body, block.spec, block.shape, block.scalar(1.0)
    total = block.region("dq")
    block.zero("dq", spec.dim)
    with (
        work.runs(body, block.arguments, block.b, block.h, block.row) as (_, first, last),
        body.loop("owner", first, last) as owner,
    ):
        skipped = of_owner(block, owner, PART)
        part = block.pack("dq_parts", spec.dim, one, skipped=skipped)
        with body.loop("d", 0, spec.dim) as d:
            for j in range(shape.vectors):
                old = body.load(block.at(total, d, j), shape.vector)
                more = body.load(block.at(part, d, j), shape.vector)
                body.store(body.binary("fadd", old, more), block.at(total, d, j))
    block.unpack("dq", total, spec.dim, one)


def of_owner(block: Block, owner: Value, column: int) -> Value:
    """Return one column of the plan's table of owners, for one owner."""
    body = block.body
    place = body.add(body.mul(owner, COLUMNS), column)
    return body.load(body.offset(block.arguments["owners"], "i64", place), "i64")


def sum_inputs(spec: KernelSpec) -> str:
    """The source of the kernel that adds parts of an array up, in double; without parts it is 0."""
    title = """
for each chunk of an array:                              one owner
    total <- 0
    for each part, in order: total += part
    array <- total"""
    return emit(spec, title.strip(), _write_array)


def _write_array(block: Block) -> None:
    body, spec, arguments = block.body, block.spec, block.arguments
    elements = arguments["target0_size0"]
    first = body.mul(block.row, CHUNK)
    last = body.minimum(body.add(first, CHUNK), elements)
    whole = body.sub(last, body.binary("urem", body.sub(last, first), spec.lanes))
    with body.loop("vector", first, whole, spec.lanes) as at:
        _sum_at(block, at, spec.lanes)
    with body.loop("element", whole, last) as at:
        _sum_at(block, at, 1)


def _sum_at(block: Block, at: Value, lanes: int) -> None:
    """Some neighbours of the array."""
    body, spec, arguments = block.body, block.spec, block.arguments
    result, *parts = [storage_in(target.dtype, "double") for target in spec.targets]
    total = body.variable(vector(lanes, "double"), body.constant(0.0, vector(lanes, "double")))
    for part in parts:
        with body.loop("part", 0, arguments["target1_size0"]) as number:
            index = body.add(body.mul(number, arguments["target1_0"]), at)
            more = part.load(body, part.at(body, arguments["target1"], index), lanes)
            body.write(total, body.binary("fadd", body.read(total), more))
    result.store(body, body.read(total), result.at(body, arguments["target0"], at))


def summed(body: Body, value: Value) -> Value:
    """The sum over the lanes of a vector, halves first."""
    while value.lanes > 2:
        half = value.lanes // 2
        low, high = (body.shuffle(value, value, range(start, start + half)) for start in (0, half))
        value = body.binary("fadd", low, high, "sum")
    return body.binary("fadd", body.lane(value, 0), body.lane(value, 1), "sum")
