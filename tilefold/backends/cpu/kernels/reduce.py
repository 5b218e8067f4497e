"""The sum of the parts of dQ that the owners of the fused backward left, in their order."""

from __future__ import annotations

from tilefold.backends.cpu.kernels import work
from tilefold.backends.cpu.kernels.block import Block, emit
from tilefold.backends.cpu.kernels.ir import Value
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
