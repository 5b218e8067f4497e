"""Products and softmax on the arrays of a machine: the kernels that stand alone.

A call becomes a spec (types, which axis lies side by side, blocks for the GPU's family) and a list
of sizes; the machine compiles each text once. Leading axes are a batch, two at most, and broadcast
as in NumPy, by strides of 0.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np

from tilefold.backends.metal.dispatch import Machine, check_written, kernel, strides_of
from tilefold.backends.metal.families import family
from tilefold.backends.metal.matmul import gemm as products
from tilefold.backends.metal.matmul import rows
from tilefold.backends.metal.matmul.gemm import DTYPES, GemmBlocks, GemmSpec
from tilefold.backends.metal.matmul.rows import SoftmaxSpec
from tilefold.backends.metal.runtime import gpu
from tilefold.backends.protocols import Array

LARGE_GPU_CORES = 32
"""Cores that are assumed where nobody says how many there are: those of M1 Max."""


class Row(NamedTuple):
    """Blocks for large products, and those where so many threadgroups for a core, or less, are."""

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
"""Blocks by (staged, float32 or a half type is multiplied): those of Metal FlashAttention at commit
8671cdd, tuned there on M1 Max and M4. Nobody measured them with this text.
"""


def block_sizes(
    staged: bool, multiplied: str, m: int, n: int, batch: int = 1, cores: int = LARGE_GPU_CORES
) -> GemmBlocks:
    """The table's blocks for a product m x n on a GPU of so many cores.

    >>> print(block_sizes(True, "float16", 4096, 4096))
    48 x 48 x 32
    >>> print(block_sizes(True, "float16", 256, 256))
    32 x 32 x 32
    """
    row = TABLE[staged, "float32" if multiplied == "float32" else "float16"]
    groups = batch * _parts(m, row.large.m) * _parts(n, row.large.n)
    return row.small if groups <= row.groups_per_core * cores else row.large


class Axes(NamedTuple):
    """Lengths and strides of an array of four axes; a stride is 0 where its length is 1."""

    lengths: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def batch(self) -> tuple[int, ...]:
        """Lengths of the two axes of the batch."""
        return self.lengths[:2]

    @property
    def sizes(self) -> list[int]:
        """Strides in the order of a kernel's list: rows and columns, then the batch from inside."""
        b, h, row, column = self.strides
        return [row, column, h, b]

    @property
    def transposed(self) -> bool:
        """Whether the numbers of a column lie nearer to each other than those of a row."""
        (*_, rows, columns), (*_, down, across) = self
        if across == 1 or rows == 1:
            return False
        return down == 1 or columns == 1 or abs(down) < abs(across)

    @property
    def unit(self) -> bool:
        """Whether what lies nearest is one element apart."""
        return self.strides[2 if self.transposed else 3] in (0, 1)

    def turned(self) -> Axes:
        """The transposed matrices."""
        return Axes(*((b, h, n, m) for b, h, m, n in self))


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

    sgemm, hgemm and their mixtures are this one function, the types those of its arrays.

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
        blocks: of the kernel; None takes those of the table for the GPU's family
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
    types = {name: _dtype(name, array) for name, array in arrays.items()}
    left = _axes("a", a, 2).turned() if transpose_a else _axes("a", a, 2)
    right = _axes("b", b, 2).turned() if transpose_b else _axes("b", b, 2)
    (*_, m, k), (*_, inner, n) = left.lengths, right.lengths
    if inner != k:
        raise ValueError(f"op(a) is {m} x {k} and op(b) {inner} x {n}: the inner two must be equal")
    batch = _common("b", left.batch, right.batch)
    kind = dtype or types.get("c") or (types["a"] if types["a"] == types["b"] else "float32")
    shape = (*batch, m, n)[-max(a.ndim, b.ndim) :]
    limits = family(machine.family)
    if blocks is None:
        meeting = products.multiplied(types["a"], types["b"], limits.bfloat)
        blocks = block_sizes(limits.staged, meeting, m, n, batch[0] * batch[1], cores)
    spec = GemmSpec(
        a=types["a"],
        b=types["b"],
        c=kind,
        blocks=blocks,
        staged=limits.staged,
        bfloat=limits.bfloat,
        unit=left.unit and right.unit,
        transpose_a=left.transposed,
        transpose_b=right.transposed,
        bias=None if bias is None else bias_axis,
        activation=activation,
    )
    if beta and c is None:
        raise ValueError(f"beta is {beta}, so c must be given")
    c = _result("c", c, shape, kind, a)
    tiles = _parts(n, blocks.n)
    sizes = [m, n, k, tiles]
    for axes in (left, right, _axes("c", c, 2)):
        sizes += axes.sizes
    operands = [a, b]
    if bias is not None:
        operands.append(bias)
        sizes += _bias_sizes(bias, types["bias"], kind, (*batch, n if bias_axis == "column" else m))
    kernel(machine, spec, products.emit, "tilefold_gemm")(
        *operands,
        c,
        sizes,
        float(alpha),
        float(beta),
        threads=(tiles * _parts(m, blocks.m) * blocks.threads, batch[1], batch[0]),
        group_size=(blocks.threads, 1, 1),
    )
    return c


def softmax(
    x: Array,
    p: Array | None = None,
    *,
    return_lse: bool = False,
    machine: Machine | None = None,
) -> Any:
    """The softmax of x along its last axis, safe for numbers of any size.

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
    machine.check(**({"x": x} if p is None else {"x": x, "p": p}))
    kind = _dtype("x", x)
    axes, shape = _axes("x", x, 1), tuple(x.shape)
    batch, heads, count, width = axes.lengths
    p = _result("p", p, shape, kind, x)
    spec = SoftmaxSpec(
        dtype=kind,
        rows=1 if width > rows.WIDE else rows.SIMDGROUPS,
        bfloat=family(machine.family).bfloat,
        lse=return_lse,
    )
    lse = [_result("lse", None, shape[:-1], "float32", x)] if return_lse else []
    kernel(machine, spec, rows.emit, "tilefold_softmax")(
        x,
        p,
        *lse,
        [count, width, heads, *axes.sizes, *_axes("p", p, 1).sizes],
        threads=(_parts(count, spec.rows) * spec.threads, heads, batch),
        group_size=(spec.threads, 1, 1),
    )
    return (p, *lse) if return_lse else p


def _parts(length: int, block: int) -> int:
    """How many blocks cover a length."""
    return -(-length // block)


def _dtype(name: str, array: Array) -> str:
    """The name of an array's type. Raises TypeError for one that Metal kernels do not take."""
    found = str(array.dtype).removeprefix("torch.")
    if found not in DTYPES:
        raise TypeError(f"{name} must be one of {', '.join(DTYPES)}, got {found}")
    return found


def _axes(name: str, array: Array, least: int) -> Axes:
    """An array with axes of length 1 put before its own, four in all."""
    lengths = tuple(int(length) for length in array.shape)
    if not least <= len(lengths) <= 4 or 0 in lengths:
        raise ValueError(f"{name} must have {least} to 4 axes, none of length 0, got {lengths}")
    strides = strides_of(name, array)
    steps = (0 if length == 1 else step for length, step in zip(lengths, strides, strict=True))
    front = 4 - len(lengths)
    return Axes((1,) * front + lengths, (0,) * front + tuple(steps))


def _common(name: str, batch: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    """The batch of two arrays, where an axis of length 1 serves any length."""
    for one, two in zip(batch, other, strict=True):
        if one != two and 1 not in (one, two):
            raise ValueError(f"the batch of {name} must be {batch} or 1 along an axis, got {other}")
    return tuple(map(max, batch, other))


def _bias_sizes(bias: Array, dtype: str, result: str, shape: tuple[int, ...]) -> list[int]:
    """Strides of a bias: from number to number, then those of the batch from inside."""
    if dtype != result:
        raise TypeError(f"bias must be {result} as the result is, got {dtype}")
    axes = _axes("bias", bias, 1)
    if axes.lengths[3] != shape[2] or axes.lengths[0] != 1:
        raise ValueError(f"bias must be (..., {shape[2]}), got {tuple(bias.shape)}")
    if _common("bias", shape[:2], axes.lengths[1:3]) != shape[:2]:
        raise ValueError(f"the batch of bias must be {shape[:2]}, got {axes.lengths[1:3]}")
    return [axes.strides[3], axes.strides[2], axes.strides[1]]


def _result(name: str, given: Array | None, shape: tuple[int, ...], dtype: str, like: Array) -> Any:
    """The array that a kernel writes: the given one, checked, or a new one, a tensor as `like`."""
    if given is None:
        if isinstance(like, np.ndarray):
            return np.empty(shape, dtype)
        return like.new_empty(shape, dtype=getattr(sys.modules["torch"], dtype))
    if tuple(given.shape) != shape or _dtype(name, given) != dtype:
        raise ValueError(
            f"{name} must be {dtype} of shape {shape}, got {_dtype(name, given)} of shape "
            f"{tuple(given.shape)}"
        )
    check_written(name, given)
    return given
