"""Calls of products and of softmax on the arrays of a machine.

    arrays -> Product or Rows -> spec -> kernel, which the machine compiles once per source
                             -> sizes: lengths and strides

A spec knows types, the axis whose elements are neighbours in memory, and the blocks for the GPU's
family.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np

from tilefold.backends.metal.dispatch import Machine, check_written, kernel, strides_of
from tilefold.backends.metal.families import MetalFamily, family
from tilefold.backends.metal.matmul import gemm as products
from tilefold.backends.metal.matmul import rows
from tilefold.backends.metal.matmul.rows import SoftmaxSpec
from tilefold.backends.metal.matmul.spec import DTYPES, GemmBlocks, GemmSpec, multiplied
from tilefold.backends.metal.runtime import gpu
from tilefold.backends.protocols import Array
from tilefold.common.check import choice
from tilefold.problems.matmul import BIAS_AXES, Accepted, Operand, Product, Rows, check_result

ACCEPTED = Accepted(DTYPES, empty=False)
"""The arrays that kernels of products and of softmax take."""

LARGE_GPU_CORES = 32
"""Cores that are assumed where nobody says how many there are: as many as M1 Max has."""


class Row(NamedTuple):
    """Blocks of large products, and of products with at most `groups_per_core` groups per core."""

    large: GemmBlocks
    small: GemmBlocks
    groups_per_core: int


_ONE = GemmBlocks(32, 32, 8, split=(1, 1))
_FOUR = GemmBlocks(32, 32, 32, split=(2, 2))

TABLE = {
    (True, "float32"): Row(GemmBlocks(48, 48, 24, split=(2, 2)), _FOUR, 6),
    (True, "float16"): Row(GemmBlocks(48, 48, 32, split=(2, 2)), _FOUR, 9),
    (False, "float32"): Row(_ONE, _ONE, 0),
    (False, "float16"): Row(_ONE, _ONE, 0),
}
"""Blocks by (staged, float32 or a half type is multiplied), as in Metal FlashAttention at commit
8671cdd, tuned there on M1 Max and M4. Nobody measured them with this source.
"""


def block_sizes(
    staged: bool, multiplied: str, m: int, n: int, batch: int = 1, cores: int = LARGE_GPU_CORES
) -> GemmBlocks:
    """The table's blocks for a product m x n on a GPU with `cores` cores.

    >>> print(block_sizes(True, "float16", 4096, 4096))
    48 x 48 x 32
    >>> print(block_sizes(True, "float16", 256, 256))
    32 x 32 x 32
    """
    row = TABLE[staged, "float32" if multiplied == "float32" else "float16"]
    groups = batch * _parts(m, row.large.m) * _parts(n, row.large.n)
    return row.small if groups <= row.groups_per_core * cores else row.large


def gemm(
    a: Array,
    b: Array,
    c: Array | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    transpose_a: bool = False,
    transpose_b: bool = False,
    bias: Array | None = None,
    bias_axis: str = "column",
    activation: str | None = None,
    dtype: str | None = None,
    blocks: GemmBlocks | None = None,
    cores: int = LARGE_GPU_CORES,
    machine: Machine | None = None,
) -> Array:
    """The matrix product C = activation(alpha op(A) op(B) + bias + beta C), in batches.

    >>> import numpy as np
    >>> import tilefold
    >>> machine = tilefold.metal.emulated()  # on a Mac: nothing, and tensors on "mps"
    >>> a, b = np.ones((2, 3), "float16"), np.ones((4, 3), "float16")
    >>> tilefold.metal.gemm(a, b, transpose_b=True, dtype="float32", machine=machine)
    array([[3., 3., 3., 3.],
           [3., 3., 3., 3.]], dtype=float32)

    sgemm, hgemm and their mixtures are this one function: the arrays have the types.

    Arguments:
        a: (..., m, k), or (..., k, m) with `transpose_a`
        b: (..., k, n), or (..., n, k) with `transpose_b`
            float32, float16 or bfloat16 each, in any strides. At most two axes of a batch come
            first, and broadcast as in NumPy.
        c: (..., m, n), float32 or of the type of a or b: is overwritten and returned; None makes
            an array. It shares no memory with a, b and bias.
        alpha, beta: numbers; c is read only where beta is not 0
        transpose_a, transpose_b: whether op transposes the last two axes
        bias: (..., n) by columns or (..., m) by rows, of the type of the result. It is added as it
            is, not times alpha, and before the activation.
        bias_axis: "column" or "row"
        activation: None, "relu", "gelu" (by the distribution function), "silu" or "tanh"
        dtype: the type of the result; None is that of c, or of a and b, or float32 if these differ
        blocks: of the kernel; None takes the table's blocks for the GPU's family
        cores: of the GPU, which the table asks for
        machine: what runs it; None is the GPU of this Mac

    Returns:
        The result, a tensor where `a` is one. It carries no gradient. Sums are made in float32.

    Raises:
        TypeError: arrays or types that the machine's kernels do not read
        ValueError: shapes that do not fit together, or options that are not allowed
        NotImplementedError: there is no Metal here
    """
    machine = machine or gpu()
    arrays = {"a": a, "b": b, "c": c, "bias": bias}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    machine.check(**arrays)
    choice("bias_axis", bias_axis, BIAS_AXES)
    product = Product.of(
        {name: _operand(name, array, 1 if name == "bias" else 2) for name, array in arrays.items()},
        alpha=alpha,
        beta=beta,
        transpose_a=transpose_a,
        transpose_b=transpose_b,
        bias_axis=bias_axis,
        activation=activation,
        dtype=dtype,
    )
    if product.c is not None:
        check_result("c", product.c, product.shape, product.dtype)
    spec = _spec(product, family(machine.family), blocks, cores)
    c = _result("c", c, product.shape, product.dtype, a)
    left, right, blocks = product.a.axes, product.b.axes, spec.blocks
    tiles = _parts(product.n, blocks.n)
    sizes = [product.m, product.n, product.k, tiles]
    for axes in (left, right, _operand("c", c, 2).axes):
        sizes += axes.sizes
    operands = [a, b] if bias is None else [a, b, bias]
    sizes += product.bias_strides
    groups = tiles * _parts(product.m, blocks.m)
    kernel(machine, spec, products.emit, "tilefold_gemm")(
        *operands,
        c,
        sizes,
        float(alpha),
        float(beta),
        threads=(groups * blocks.threads, product.batch[1], product.batch[0]),
        group_size=(blocks.threads, 1, 1),
    )
    return c


def _spec(product: Product, limits: MetalFamily, blocks: GemmBlocks | None, cores: int) -> GemmSpec:
    """The kernel of a product on a family of GPUs, with the table's blocks where none are given."""
    left, right = product.a, product.b
    if blocks is None:
        meeting = multiplied(left.dtype, right.dtype, limits.bfloat)
        blocks = block_sizes(limits.staged, meeting, product.m, product.n, product.matrices, cores)
    return GemmSpec(
        a=left.dtype,
        b=right.dtype,
        c=product.dtype,
        blocks=blocks,
        staged=limits.staged,
        bfloat=limits.bfloat,
        unit=left.axes.unit and right.axes.unit,
        transpose_a=left.axes.transposed,
        transpose_b=right.axes.transposed,
        bias=product.bias_axis,
        activation=product.activation,
    )


def softmax(
    x: Array,
    p: Array | None = None,
    *,
    return_lse: bool = False,
    machine: Machine | None = None,
) -> Any:
    """The softmax of x along its last axis, safe for elements of any size.

    >>> import numpy as np
    >>> import tilefold
    >>> machine = tilefold.metal.emulated()  # on a Mac: nothing, and tensors on "mps"
    >>> tilefold.metal.softmax(np.zeros((1, 4), "float32"), machine=machine)
    array([[0.25, 0.25, 0.25, 0.25]], dtype=float32)

    Arguments:
        x: (..., width), float32, float16 or bfloat16, 1 to 4 axes in any strides
        p: of the shape and type of x: is overwritten and returned, and may be x itself; None makes
            an array
        return_lse: also return the log-sum-exp of each row
        machine: what runs it; None is the GPU of this Mac

    Returns:
        p: of the shape and type of x, a tensor where x is one; without gradients
        lse: with return_lse, (...), float32, natural logarithm

    A row of -inf alone gives p = 0 and lse = -inf, as a query that sees no key; one that holds NaN
    or +inf gives NaN. Both are made in float32.

    Raises:
        TypeError: arrays or types that the machine's kernels do not read
        ValueError: axes that are too many or of length 0, or a p of another shape or type
        NotImplementedError: there is no Metal here
    """
    machine = machine or gpu()
    arrays = {"x": x} if p is None else {"x": x, "p": p}
    machine.check(**arrays)
    called = Rows.of({name: _operand(name, array, 1) for name, array in arrays.items()})
    shape, kind = called.x.shape, called.x.dtype
    p = _result("p", p, shape, kind, x)
    spec = SoftmaxSpec(
        dtype=kind,
        rows=1 if called.width > rows.WIDE else rows.SIMDGROUPS,
        bfloat=family(machine.family).bfloat,
        lse=return_lse,
    )
    result = _operand("p", p, 1)
    lse = [_result("lse", None, shape[:-1], "float32", x)] if return_lse else []
    kernel(machine, spec, rows.emit, "tilefold_softmax")(
        x,
        p,
        *lse,
        [called.count, called.width, called.heads, *called.x.axes.sizes, *result.axes.sizes],
        threads=(_parts(called.count, spec.rows) * spec.threads, called.heads, called.batch),
        group_size=(spec.threads, 1, 1),
    )
    return (p, *lse) if return_lse else p


def _parts(length: int, block: int) -> int:
    """How many blocks cover a length."""
    return -(-length // block)


def _operand(name: str, array: Array, least: int) -> Operand:
    """An array of a call. Raises TypeError or ValueError for one that no kernel takes."""
    dtype = str(array.dtype).removeprefix("torch.")
    return ACCEPTED.operand(name, dtype, array.shape, strides_of(name, array), least)


def _result(name: str, given: Array | None, shape: tuple[int, ...], dtype: str, like: Array) -> Any:
    """The array that a kernel writes: the given one, or a new one, a tensor as `like`."""
    if given is not None:
        check_written(name, given)
        return given
    if isinstance(like, np.ndarray):
        return np.empty(shape, dtype)
    return like.new_empty(shape, dtype=getattr(sys.modules["torch"], dtype))
