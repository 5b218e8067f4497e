"""Shared memory and registers of a kernel, estimated from its blocks at plan time.

Triton keeps in shared memory the operands that are held, the traversed tiles that are under way,
and tiles that must change hands between threads on their way from one product to the next. The
rules below were fitted to what the compiler reported (Triton 3.7.1, some 600 kernels), and are
meant never to say less: `tests/triton/test_ahead.py` asks.
"""

from __future__ import annotations

from tilefold.backends.triton.architectures import Architecture
from tilefold.backends.triton.spec import KERNELS, Blocks, pieces, power_of_two, widest
from tilefold.planning.kernels import OPERANDS
from tilefold.problems.attention import ITEM_BYTES

TENSOR_COLUMNS = 512
"""Columns of Blackwell's tensor memory, of 128 rows of 32 bits."""

_SLACK = 512
"""Bytes of barriers and of sums over rows."""


def kind(dtype: str, float32_mode: str) -> str:
    """The kind of type that decides how tiles are multiplied: a column of the tables."""
    if dtype == "float32":
        return "float32" if float32_mode == "ieee" else "tf32"
    return dtype if dtype == "float64" else "half"


def asynchronous(device: Architecture, kind: str, blocks: Blocks) -> bool:
    """True if products read both operands from shared memory, as Hopper's and Blackwell's units do.

    They take 64 rows at least; fewer are multiplied as on an A100.
    """
    return device.asynchronous and kind in ("half", "tf32") and blocks.parallel >= 64


def tma(device: Architecture, kernel: str, kind: str, blocks: Blocks) -> bool:
    """True if tiles should be moved by descriptors, where operands lie so that they can be.

    Only where products read them from shared memory as they come: else they pass through registers,
    and by the compiler (H100, dim 64, 64 x 32, 4 warps) dK/dV in exact float32 spills 4943
    registers of a thread for each tile instead of 202, in three products of TF32 358 instead of
    41.
    """
    tiled = KERNELS[kernel].visits and kernel != "decode" and not blocks.streamed
    return device.descriptors and tiled and kind == "half" and asynchronous(device, kind, blocks)


def shared_bytes(
    device: Architecture,
    kernel: str,
    dtype: str,
    dim: int,
    dim_v: int,
    float32_mode: str,
    blocks: Blocks,
) -> int:
    """Bytes of shared memory that a program takes: an estimate from above."""
    statistic = item_of_statistics(dtype)
    parallel, traverse = blocks.parallel, blocks.traverse
    row = KERNELS[kernel]
    if not row.visits:
        return 2 * parallel * statistic
    of_kind, item = kind(dtype, float32_mode), ITEM_BYTES[dtype]
    own, other = padded(dim), padded(dim_v)
    tile = traverse * (own + other) * item
    scores = parallel * traverse * item
    if blocks.streamed:  # a piece of each axis, as many as are under way, and tiles of scores
        piece = widest(of_kind == "float32", True) * item
        pairs = blocks.stages if device.asynchronous else max(1, blocks.stages - 1)
        turned = scores * row.score_tiles
        if kernel == "backward":  # ds once more, and a piece of the keys
            turned += scores + parallel * piece
        return (parallel + traverse) * piece * pairs + turned + _SLACK
    if device.kind == "hip":  # operands are held in registers, and change hands one at a time
        piece = min(power_of_two(max(own, other)), widest(of_kind == "float32", False))
        other_side = traverse * piece * statistic if kernel == "backward" else 0
        if blocks.stages == 1:
            return max(max(parallel, traverse) * piece * item, scores, other_side) + _SLACK
        tma = max(scores * row.score_tiles, other_side)
        return max(parallel * piece * item, tile * (blocks.stages - 1) + tma) + _SLACK
    held = parallel * (own + (other if len(row.preloaded) == 2 else 0)) * item
    turned = min(scores, tile) * (2 * row.score_tiles if of_kind == "float64" else 1)
    if float32_mode == "tf32x3":  # each element that is held becomes a sum of two
        turned = held + 2 * scores
    unpipelined = held + tile + turned
    if asynchronous(device, of_kind, blocks):
        taken = held + tile * blocks.stages
        if of_kind == "tf32":  # operands of which a unit cannot read the columns
            taken += scores + (held if len(row.preloaded) == 2 or float32_mode == "tf32x3" else 0)
        if device.tensor_memory:  # operands of two products once more, the other way round
            several = len(pieces(dim)) > 1
            again = {
                "forward": 16384,
                "backward_dq": tile if several else tile // 2,
            }
            taken += again.get(kernel, tile + scores)
    else:
        taken = held + tile * max(1, blocks.stages - 1) + turned
    if row.parallel == "k":
        taken += 2 * traverse * statistic * blocks.stages  # lse and delta
        unpipelined += traverse * own * item  # at an edge, queries once more, as they are
    if kernel == "backward":  # ds is turned round, and what is added to dq changes hands
        taken += scores * 3 // 2 + traverse * own * (item + statistic)
        if device.asynchronous and traverse < 64:  # keys once more, for another unit
            taken += 2 * parallel * own * item
    taken = max(taken, unpipelined)
    return taken + _SLACK


def registers(
    device: Architecture,
    kernel: str,
    dtype: str,
    dim: int,
    dim_v: int,
    float32_mode: str,
    blocks: Blocks,
) -> int:
    """32-bit registers of a thread that sums and scores take; all else comes on top."""
    row = KERNELS[kernel]
    if not row.visits:
        return 0
    parallel, traverse = blocks.parallel, blocks.traverse
    widths = {"dim": padded(dim), "dim_v": padded(dim_v)}
    columns = sum(widths[str(OPERANDS[name].width)] for name in row.sums)
    elements = parallel * columns + row.score_tiles * parallel * traverse
    threads = blocks.warps * device.warp
    return -(-elements * item_of_statistics(dtype) // (4 * threads))


def tensor_columns(kernel: str, dim: int, dim_v: int, float32_mode: str, blocks: Blocks) -> int:
    """Columns of tensor memory on Blackwell: scores by pieces of a head, sums, and what is turned.

    Exact for 128 rows of half types where kernels were compiled; else an estimate.
    """
    parallel, traverse = blocks.parallel, blocks.traverse
    products_of_scores = len(pieces(dim)) + (
        len(pieces(dim_v)) if len(KERNELS[kernel].preloaded) == 2 else 0
    )
    columns = {"forward": dim_v, "backward_dq": dim}.get(kernel, dim + dim_v)
    both = KERNELS[kernel].parallel == "k"
    taken = products_of_scores * traverse + padded(columns) + traverse * (2 if both else 1) // 2
    if kernel == "backward":
        taken += padded(dim)
    taken = taken // 2 if parallel == 64 else taken
    return taken * 2 if float32_mode == "tf32x3" else taken


def room(device: Architecture, kind: str, blocks: Blocks) -> int:
    """32-bit registers that a thread has for sums and scores, tensor memory included."""
    threads = blocks.warps * device.warp
    most = min(device.thread_registers, device.registers // threads)
    if device.tensor_memory and asynchronous(device, kind, blocks):
        return most + TENSOR_COLUMNS * 128 // threads
    return most


def item_of_statistics(dtype: str) -> int:
    """Bytes of a sum."""
    return 8 if dtype == "float64" else 4


def padded(dim: int) -> int:
    """Columns of a head with the padding of its last piece."""
    last = pieces(dim)[-1]
    return last.first + last.width
