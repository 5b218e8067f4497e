"""Softmax, rung 1: a program for each row, which it reads three times, 128 numbers at a time.

    for each block x of the row: m = max(m, x)
    for each block x of the row: total = total + exp(x - m)
    for each block x of the row: p = exp(x - m) / total

The definition, safe for large numbers. Each of the 128 threads of a program keeps a maximum and a
sum of its own; they are joined once at the end of a walk.

Why it is slow: softmax does next to no arithmetic, so the time is that of moving numbers. This
moves 4 (three reads and a write) where 2 would do. It also has little under way: a thread waits for
4 bytes, uses them, and asks for the next 4.

Prediction (not measured): a third to a half of the device's bandwidth where rows are short enough
to be found in the cache again, a quarter to a third where they are not.

`do_not_specialize` keeps Triton from finding out that rows begin at multiples of 16 bytes, with
which it would move 16 bytes at a time by itself: that is rung 4.
"""

import torch
import triton
import triton.language as tl

BLOCK = 128
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite: -inf - -inf would be NaN


@triton.jit(do_not_specialize=["width"])
def softmax_1_naive(x, p, width, BLOCK: tl.constexpr):
    """The row of this program."""
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    m = tl.full([BLOCK], LOWEST, tl.float32)
    for first in range(0, width, BLOCK):
        inside = first + column < width
        m = tl.maximum(m, tl.load(x + row + first + column, mask=inside, other=float("-inf")))
    top = tl.max(m, 0)
    parts = tl.full([BLOCK], 0.0, tl.float32)
    for first in range(0, width, BLOCK):
        inside = first + column < width
        value = tl.load(x + row + first + column, mask=inside, other=float("-inf"))
        parts += tl.exp(value - top)
    total = tl.sum(parts, 0)
    for first in range(0, width, BLOCK):
        inside = first + column < width
        value = tl.load(x + row + first + column, mask=inside, other=0.0)
        tl.store(p + row + first + column, tl.exp(value - top) / total, mask=inside)


def softmax(x: torch.Tensor) -> torch.Tensor:
    """The softmax of every row of a contiguous float32 matrix."""
    p = torch.empty_like(x)
    softmax_1_naive[(len(x),)](x, p, x.shape[1], BLOCK=BLOCK, num_warps=4)
    return p
