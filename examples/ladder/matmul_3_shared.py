"""C = A B, rung 3: the same as rung 2 with shared memory written down. In Gluon, needs a GPU.

    sums = 0
    for each 64 of the contraction:
        tiles of A and B: memory -> registers -> shared memory
        sums = sums + A B, operands from shared memory

What changes: nothing that the tensor cores see; what `tl.dot` hid is now in the text.

- `A_LOADED`, `B_LOADED`: which thread loads which 8 neighbours (16 bytes).
- `SHARED`: rows of a tile lie in shared memory in an order that a swizzle mixes, so that the 8 rows
  that a matrix instruction reads together come from different banks.
- `SUMS`: which thread holds which numbers of C, in pieces of 16 x 8 as `mma.sync` makes them;
  `LEFT` and `RIGHT`: how its operands have to lie in registers.

The barriers between writing shared memory and reading it are still set by the compiler.

Prediction (not measured): 0.5 to 1.2 times rung 2. It is the same work; on Hopper and Blackwell
`tl.dot` has larger instructions (wgmma, tcgen05) that read shared memory by themselves, and wins.
This rung is for reading.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

GPU = (8, 0)  # the least compute capability; there is no interpreter for Gluon
M, N, K = 128, 128, 64

A_LOADED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
B_LOADED = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0]))
SHARED = gl.constexpr(gl.SwizzledSharedLayout(vec=8, per_phase=1, max_phase=8, order=[1, 0]))
SUMS = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 2], [16, 8]))
LEFT = gl.constexpr(gl.DotOperandLayout(0, SUMS, 2))
RIGHT = gl.constexpr(gl.DotOperandLayout(1, SUMS, 2))


@gluon.jit
def matmul_3_shared(a, b, c, m, n, k, M: gl.constexpr, N: gl.constexpr, K: gl.constexpr):
    """The tile of C of this program; A is m x k and B k x n."""
    tiles = gl.cdiv(n, N)
    top, left_edge = gl.program_id(0) // tiles * M, gl.program_id(0) % tiles * N
    row = top + gl.arange(0, M, gl.SliceLayout(1, A_LOADED))
    inner_a = gl.arange(0, K, gl.SliceLayout(0, A_LOADED))
    inner_b = gl.arange(0, K, gl.SliceLayout(1, B_LOADED))
    column = left_edge + gl.arange(0, N, gl.SliceLayout(0, B_LOADED))
    a_tile = a + row[:, None] * k + inner_a[None, :]
    b_tile = b + inner_b[:, None] * n + column[None, :]
    a_shared = gl.allocate_shared_memory(gl.float16, [M, K], SHARED)
    b_shared = gl.allocate_shared_memory(gl.float16, [K, N], SHARED)
    sums = gl.full([M, N], 0.0, gl.float32, SUMS)
    for first in range(0, k, K):
        in_a = (row < m)[:, None] & (inner_a < k - first)[None, :]
        in_b = (inner_b < k - first)[:, None] & (column < n)[None, :]
        a_shared.store(gl.load(a_tile, mask=in_a, other=0.0))
        b_shared.store(gl.load(b_tile, mask=in_b, other=0.0))
        sums = mma_v2(a_shared.load(LEFT), b_shared.load(RIGHT), sums)
        a_tile += K
        b_tile += K * n
    row_c = top + gl.arange(0, M, gl.SliceLayout(1, SUMS))
    column_c = left_edge + gl.arange(0, N, gl.SliceLayout(0, SUMS))
    inside = (row_c < m)[:, None] & (column_c < n)[None, :]
    gl.store(c + row_c[:, None] * n + column_c[None, :], sums.to(gl.float16), mask=inside)


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product of two contiguous float16 matrices of fewer than 2^31 numbers each."""
    (m, k), n = a.shape, b.shape[1]
    c = torch.empty(m, n, dtype=a.dtype, device=a.device)
    tiles = triton.cdiv(m, M) * triton.cdiv(n, N)
    matmul_3_shared[(tiles,)](a, b, c, m, n, k, M=M, N=N, K=K, num_warps=8)
    return c
