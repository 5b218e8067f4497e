"""Calls of products and of softmax on the arrays of a machine.

    arrays -> Product or Rows -> spec -> kernel, which the machine compiles once per source
                             -> sizes: lengths and strides

A spec knows types, the axis whose elements are neighbours in memory, and the blocks for the GPU's
family.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from tilefold.backends.matmul import MOST_AXES, Codes, described, folded
from tilefold.backends.metal import gated
from tilefold.backends.metal.dispatch import Machine, check_written, kernel, strides_of
from tilefold.backends.metal.families import MetalFamily, family
from tilefold.backends.metal.kernels.matmul2d import Matmul2d
from tilefold.backends.metal.matmul import gemm as products
from tilefold.backends.metal.matmul import rows
from tilefold.backends.metal.matmul import tiles as tiling
from tilefold.backends.metal.matmul.rows import SoftmaxSpec
from tilefold.backends.metal.matmul.spec import DTYPES, GemmBlocks, GemmSpec, multiplied
from tilefold.backends.metal.matmul.tiles import TileSpec
from tilefold.backends.metal.runtime import Mps, gpu
from tilefold.backends.protocols import Array
from tilefold.problems.matmul import Accepted, Axes, Operand, Product, Rows

ACCEPTED = Accepted(DTYPES, empty=True, most=MOST_AXES)
"""The arrays that products take."""

ROWS = Accepted(DTYPES, empty=False)
"""The arrays that the kernel of a softmax takes."""

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
    bias_axis: str | None = None,
    activation: str | None = None,
    gate: Array | None = None,
    out: Array | None = None,
    dtype: str | None = None,
    blocks: GemmBlocks | Matmul2d | None = None,
    cores: int = LARGE_GPU_CORES,
    machine: Machine | None = None,
) -> Array:
    """The matrix product C = activation(alpha op(A) op(B) + bias + beta C), in batches.

    With a gate G it is activation(alpha op(A) op(B) + bias) * (alpha op(A) op(G)), as the first
    half of a SwiGLU layer, in one pass over A.

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
            float32, float16 or bfloat16 each, in any strides. Axes of a batch come first, and
            broadcast as in NumPy. What does not lie as two of them is walked by the host.
        c: (..., m, n). Without `out` it is overwritten and returned; None makes an array. With
            `out` it is only read, where beta is not 0, and broadcasts.
        alpha, beta: numbers; c is read only where beta is not 0
        transpose_a, transpose_b: whether op transposes the last two axes
        bias: (n,), (..., 1, n) or (..., m, 1). It is added as it is, not times alpha, and before
            the activation.
        bias_axis: None; or "column" for a bias (..., n), or "row" for a bias (..., m)
        activation: None, "relu", "gelu" (by the distribution function), "gelu_tanh", "silu",
            "sigmoid" or "tanh"
        gate: G, of the shape and type of b, transposed with it; beta is then 0
        out: (..., m, n), the array of the result. It shares no memory with any other.
        dtype: float32, float16 or bfloat16, the type of the result; None is that of out, of c, or
            of a and b, or float32 if these differ. Bias and a c beside out have it, or are float32.
        blocks: of the kernel; None takes the table's blocks for the GPU's family. A `Matmul2d` is a
            tile of Metal 4's tensor operations; its transposes follow from a and b.
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
    given = {"a": a, "b": b, "c": c, "bias": bias, "gate": gate, "out": out}
    arrays = {name: array for name, array in given.items() if array is not None}
    machine.check(**arrays)
    operands = {
        name: operand(name, array, 1 if name == "bias" else 2) for name, array in arrays.items()
    }
    product = described(
        operands,
        operands.pop("out", None),
        alpha=alpha,
        beta=beta,
        transpose_a=transpose_a,
        transpose_b=transpose_b,
        bias_axis=bias_axis,
        activation=activation,
        dtype=dtype,
    )
    name, given_result = ("c", c) if out is None else ("out", out)
    result = result_of(name, given_result, product.shape, product.dtype, a)
    arrays.pop("out", None)
    run(product, arrays, result, machine, blocks=blocks, cores=cores)
    return result


def run(
    product: Product,
    arrays: Mapping[str, Array],
    out: Array,
    machine: Machine,
    *,
    blocks: GemmBlocks | Matmul2d | None = None,
    cores: int = LARGE_GPU_CORES,
    codes: Codes | None = None,
) -> None:
    """Launch a described product on its arrays by name; C may be the array of the result.

    With `codes`, B is quantised: `arrays` has "codes", and "scales", "zeros" or "table".
    """
    where = folded(product, operand("out", out, 2))
    product, besides = where.product, arrays.get("c") is not out and product.beta != 0
    if 0 in (product.matrices, product.m, product.n):
        return
    if isinstance(blocks, Matmul2d):
        run_kernel, threads = _by_tiles(product, blocks, machine, besides, codes)
    else:
        spec = spec_of(product, family(machine.family), blocks, cores, besides)
        spec = replace(spec, codes=codes) if codes else spec
        run_kernel, blocks = kernel(machine, spec, products.emit, products.ENTRY), spec.blocks
        threads = blocks.threads
    tiles = _parts(product.n, blocks.n)
    sizes = sizes_of(product, where.out, tiles, besides)
    names = ["a", *(["codes", *codes.besides] if codes else ["b"])]
    names += [name for name in ("gate", "bias") if name in arrays]
    names += ["c", "out"] if besides else ["out"]
    scalars = [product.alpha] if product.gate else [product.alpha, product.beta]
    groups = tiles * _parts(product.m, blocks.m)
    for found in where.places({**arrays, "out": out}):
        run_kernel(
            *[_present(found[name]) for name in names],
            sizes,
            *map(float, scalars),
            threads=(groups * threads, product.batch[1], product.batch[0]),
            group_size=(threads, 1, 1),
        )


def sizes_of(product: Product, out: Axes, tiles: int, besides: bool) -> list[int]:
    """The integers of a launch, in the order of `gemm.SIZES`."""
    none = Axes((), (0, 0, 0, 0))
    sizes = [product.m, product.n, product.k, tiles]
    for axes in (product.a.axes, product.b.axes, out):
        sizes += axes.sizes
    sizes += product.bias_strides or [0, 0, 0]
    sizes += (product.gate.axes if product.gate else none).sizes
    sizes += (product.c.axes if product.c and besides else none).sizes
    return sizes


def _by_tiles(
    product: Product, tile: Matmul2d, machine: Machine, besides: bool, codes: Codes | None
) -> tuple[Callable[..., None], int]:
    """The kernel of a product by tensor operations, and its threads in a group."""
    if codes:
        raise NotImplementedError("tiles are views of numbers, not of codes: pass GemmBlocks")
    real = isinstance(machine, Mps) and machine.device.type == "mps"
    if real and (reason := gated.missing()):
        raise NotImplementedError(reason)
    spec = TileSpec.of(product, tile, besides)
    return kernel(machine, spec, tiling.emit, tiling.ENTRY), spec.threads


def _present(array: Array) -> Array:
    """The array, or one of an element in place of an empty one, which no kernel then reads."""
    if 0 not in array.shape:
        return array
    return np.empty(1, array.dtype) if isinstance(array, np.ndarray) else array.new_empty(1)


def spec_of(
    product: Product, limits: MetalFamily, blocks: GemmBlocks | None, cores: int, besides: bool
) -> GemmSpec:
    """The kernel of a product on a family of GPUs, with the table's blocks where none are given.

    `besides`: C lies beside the result, and is read.
    """
    left, right, bias, gate = product.a, product.b, product.bias, product.gate
    alike = gate is None or (gate.axes.unit and gate.axes.transposed == right.axes.transposed)
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
        unit=left.axes.unit and right.axes.unit and alike,
        transpose_a=left.axes.transposed,
        transpose_b=right.axes.transposed,
        bias=product.bias_axis,
        activation=product.activation,
        bias_type=bias.dtype if bias and bias.dtype != product.dtype else None,
        old=product.c.dtype if product.c and besides else None,
        gate=gate is not None,
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
    called = Rows.of({name: operand(name, array, 1, ROWS) for name, array in arrays.items()})
    shape, kind = called.x.shape, called.x.dtype
    p = result_of("p", p, shape, kind, x)
    spec = SoftmaxSpec(
        dtype=kind,
        rows=1 if called.width > rows.WIDE else rows.SIMDGROUPS,
        bfloat=family(machine.family).bfloat,
        lse=return_lse,
    )
    result = operand("p", p, 1)
    lse = [result_of("lse", None, shape[:-1], "float32", x)] if return_lse else []
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


def operand(name: str, array: Array, least: int, accepted: Accepted = ACCEPTED) -> Operand:
    """An array of a call. Raises TypeError or ValueError for one that no kernel takes."""
    dtype = str(array.dtype).removeprefix("torch.")
    return accepted.operand(name, dtype, array.shape, strides_of(name, array), least)


def result_of(
    name: str, given: Array | None, shape: tuple[int, ...], dtype: str, like: Array
) -> Any:
    """The array that a kernel writes: the given one, or a new one, a tensor as `like`."""
    if given is not None:
        if 0 not in given.shape:  # NumPy gives strides of 0 to empty arrays
            check_written(name, given)
        return given
    if isinstance(like, np.ndarray):
        return np.empty(shape, dtype)
    return like.new_empty(shape, dtype=getattr(sys.modules["torch"], dtype))
