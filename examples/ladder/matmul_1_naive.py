"""C = A B, rung 1: a program for each tile of C, and one column of A times one row of B at a time.

    sums = 0
    for each i of the contraction:
        sums = sums + (column i of A) x (row i of B)      every number times every other

The definition in the order that suits a GPU: a program makes 32 x 32 numbers of C, so each number
that it loads is used 32 times. Products are ordinary multiply-adds in float32.

Why it is slow: tensor cores do nothing. And the numbers of a column of A lie a row apart from each
other, so that each 2-byte number costs a transaction of 32 bytes. And before each multiply-add of a
thread there are loads to wait for, with too few threads to hide them.

Prediction (not measured): 0.5 to 3 TFLOP/s on a data-centre GPU, below 1 % of what its tensor cores
do.
"""

import torch
import triton
import triton.language as tl

SIDE = 32


@triton.jit
def matmul_1_naive(a, b, c, m, n, k, SIDE: tl.constexpr):
    """The tile of C of this program; A is m x k and B k x n."""
    tiles = tl.cdiv(n, SIDE)
    row = tl.program_id(0) // tiles * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(0) % tiles * SIDE + tl.arange(0, SIDE)
    sums = tl.full([SIDE, SIDE], 0.0, tl.float32)
    for i in range(k):
        left = tl.load(a + row * k + i, mask=row < m, other=0.0).to(tl.float32)
        right = tl.load(b + i * n + column, mask=column < n, other=0.0).to(tl.float32)
        sums += left[:, None] * right[None, :]
    inside = (row < m)[:, None] & (column < n)[None, :]
    tl.store(c + row[:, None] * n + column[None, :], sums.to(tl.float16), mask=inside)


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product of two contiguous float16 matrices of fewer than 2^31 numbers each."""
    (m, k), n = a.shape, b.shape[1]
    c = torch.empty(m, n, dtype=a.dtype, device=a.device)
    tiles = triton.cdiv(m, SIDE) * triton.cdiv(n, SIDE)
    matmul_1_naive[(tiles,)](a, b, c, m, n, k, SIDE=SIDE, num_warps=4)
    return c
