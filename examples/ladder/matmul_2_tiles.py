"""C = A B, rung 2: tiles of 128 x 64 and 64 x 128 are multiplied by the tensor cores.

    sums = 0
    for each 64 of the contraction:
        sums = sums + (tile of A) (tile of B)      tl.dot

What changes: `tl.dot`. A program makes 128 x 128 numbers of C, and each number that it loads is
used 128 times. The multiply-adds are those of the tensor cores: float16 times float16, summed in
float32. Tiles pass through shared memory, where all warps find them; Triton arranges that.

Why it should gain: a tensor core does some 16 times the multiply-adds of the float32 units in a
cycle. And a quarter as many bytes are loaded for each of them: the side of a tile is 128, not 32.

Prediction (not measured): 30 to 100 times rung 1, 15 to 35 % of the tensor cores' peak. With
`num_stages=1` nothing is loaded while they multiply, and they wait while it is.
"""

import torch
import triton
import triton.language as tl

M, N, K = 128, 128, 64


@triton.jit
def matmul_2_tiles(a, b, c, m, n, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """The tile of C of this program; A is m x k and B k x n."""
    tiles = tl.cdiv(n, N)
    row = tl.program_id(0) // tiles * M + tl.arange(0, M)
    column = tl.program_id(0) % tiles * N + tl.arange(0, N)
    inner = tl.arange(0, K)
    a_tile = a + row[:, None] * k + inner[None, :]
    b_tile = b + inner[:, None] * n + column[None, :]
    sums = tl.full([M, N], 0.0, tl.float32)
    for first in tl.range(0, k, K):
        in_a = (row < m)[:, None] & (inner < k - first)[None, :]
        in_b = (inner < k - first)[:, None] & (column < n)[None, :]
        left = tl.load(a_tile, mask=in_a, other=0.0)
        right = tl.load(b_tile, mask=in_b, other=0.0)
        sums = tl.dot(left, right, sums)
        a_tile += K
        b_tile += K * n
    inside = (row < m)[:, None] & (column < n)[None, :]
    tl.store(c + row[:, None] * n + column[None, :], sums.to(tl.float16), mask=inside)


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product of two contiguous float16 matrices of fewer than 2^31 numbers each."""
    (m, k), n = a.shape, b.shape[1]
    c = torch.empty(m, n, dtype=a.dtype, device=a.device)
    tiles = triton.cdiv(m, M) * triton.cdiv(n, N)
    matmul_2_tiles[(tiles,)](a, b, c, m, n, k, M=M, N=N, K=K, num_warps=8, num_stages=1)
    return c
