"""Products and softmax on the tensors of a machine: the kernels that stand alone.

A call becomes a spec (types, blocks for the GPU's architecture) and a list of sizes; the text of a
spec is written and loaded once. Leading axes are a batch, two at most, and broadcast as in NumPy,
by strides of 0. An axis may have length 0: a sum over none is 0.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from tilefold.backends.triton import gemm as products
from tilefold.backends.triton import rows
from tilefold.backends.triton.architectures import Architecture, architecture
from tilefold.backends.triton.dispatch import Machine, ResourceError
from tilefold.backends.triton.gemm import BIASES, DTYPES, GemmBlocks, GemmSpec, multiplied
from tilefold.backends.triton.rows import SoftmaxBlocks, SoftmaxSpec
from tilefold.backends.triton.runtime import gpu
from tilefold.check import choice
from tilefold.problem import LIMIT, PRECISIONS

if TYPE_CHECKING:
    from torch import Tensor


class Row(NamedTuple):
    """Blocks for large products, and for those of which a GPU would be partly idle."""

    large: GemmBlocks
    small: GemmBlocks


_HALF = GemmBlocks(64, 64, 64, warps=4, stages=3)
_TF32 = GemmBlocks(64, 64, 32, warps=4, stages=3)
_IEEE = Row(GemmBlocks(64, 64, 16, warps=8, stages=2), GemmBlocks(32, 32, 16, warps=4, stages=2))
_FLOAT64 = Row(GemmBlocks(64, 64, 16, warps=4, stages=3), GemmBlocks(32, 32, 16, warps=4, stages=3))

TABLE = {
    ("sm_80", "half"): Row(GemmBlocks(128, 128, 32, warps=4, stages=4), _HALF),
    ("sm_90", "half"): Row(GemmBlocks(128, 256, 64, warps=8, stages=3), _HALF),
    ("sm_100", "half"): Row(GemmBlocks(128, 256, 64, warps=8, stages=3), _HALF),
    ("sm_120", "half"): Row(GemmBlocks(128, 128, 32, warps=4, stages=3), _HALF),
    ("gfx942", "half"): Row(GemmBlocks(128, 128, 32, warps=4, stages=2), _HALF),
    ("sm_80", "tf32"): Row(GemmBlocks(128, 128, 32, warps=8, stages=3), _TF32),
    ("sm_90", "tf32"): Row(GemmBlocks(128, 128, 32, warps=8, stages=4), _TF32),
    ("sm_100", "tf32"): Row(GemmBlocks(128, 128, 32, warps=8, stages=4), _TF32),
    ("sm_120", "tf32"): Row(GemmBlocks(128, 64, 32, warps=8, stages=3), _TF32),
    ("sm_100", "float64"): _FLOAT64._replace(large=GemmBlocks(32, 64, 16, warps=4, stages=3)),
}
"""Blocks by (table of the architecture, what is multiplied): "half" types, float32 as "tf32", or
float64, of which Triton 3.7 compiles no block of 64 rows for sm_100. Others are alike everywhere.
Chosen so that operands fit shared memory and sums the registers: Triton 3.7.1 spills none in the
loops of sm_80, 90, 100 and 120, but for 8 words of float64 in the small blocks of sm_90. Nobody has
measured them."""

_PRODUCTS = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}
"""How float32 is multiplied by `precision`; where there is no TF32, exactly."""


def block_sizes(
    name: str,
    multiplied: str,
    m: int,
    n: int,
    batch: int = 1,
    *,
    products: str = "ieee",
    multiprocessors: int = 132,
) -> GemmBlocks:
    """The table's blocks for products m x n on an architecture, smaller where some would be idle.

    >>> print(block_sizes("sm_90", "bfloat16", 4096, 4096))
    128 x 256 x 64, 8 warps, 3 stages
    >>> print(block_sizes("sm_90", "bfloat16", 256, 256))
    64 x 64 x 64, 4 warps, 3 stages
    """
    exact = multiplied == "float32" and products == "ieee"
    kind = {"float32": "tf32", "float64": "float64"}.get(multiplied, "half")
    alike = _FLOAT64 if kind == "float64" else _IEEE
    row = alike if exact else TABLE.get((architecture(name).table, kind), alike)
    programs = batch * _parts(m, row.large.m) * _parts(n, row.large.n)
    return row.small if programs < multiprocessors else row.large


class Axes(NamedTuple):
    """Lengths and strides of a tensor of four axes; a stride is 0 where its length is 1."""

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

    def turned(self) -> Axes:
        """The transposed matrices."""
        return Axes(*((b, h, n, m) for b, h, m, n in self))

    def wide(self, rows: int, columns: int) -> bool:
        """Whether offsets inside so many rows and columns may pass 31 bits."""
        return rows * self.strides[2] + columns * self.strides[3] >= 2**31


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    transpose_a: bool = False,
    transpose_b: bool = False,
    bias: Tensor | None = None,
    bias_axis: str = "column",
    activation: str | None = None,
    dtype: str | None = None,
    precision: str = "highest",
    blocks: GemmBlocks | None = None,
    machine: Machine | None = None,
) -> Tensor:
    """The matrix product C = activation(alpha op(A) op(B) + bias + beta C), in batches.

        a, b = torch.ones(2, 3, device="cuda").half(), torch.ones(4, 3, device="cuda").half()
        gemm(a, b, transpose_b=True, dtype="float32")  # 2 x 4, all of it 3

    Arguments:
        a: (..., m, k), or (..., k, m) with `transpose_a`
        b: (..., k, n), or (..., n, k) with `transpose_b`
            float32, float16 or bfloat16 each, or float64 both, in any strides. At most two axes of
            a batch come first, and broadcast as in NumPy.
        c: (..., m, n), float32 or of the type of a or b: is overwritten and returned; None makes
            a tensor. It shares no memory with a, b and bias.
        alpha, beta: numbers; c is read only where beta is not 0
        transpose_a, transpose_b: whether op transposes the last two axes
        bias: (..., n) by columns or (..., m) by rows, of the type of the result. It is added as it
            is, not times alpha, and before the activation.
        bias_axis: "column" or "row"
        activation: None, "relu", "gelu" (by the distribution function), "silu" or "tanh"
        dtype: the type of the result; None is that of c, or of a and b, or float32 if these differ
        precision: of products in float32, in which types that differ are multiplied too: "highest",
            "high" (three of TF32) or "medium" (TF32, which has all bits of the half types)
        blocks: of the kernel; None takes those of the table for the GPU's architecture
        machine: what runs it; None is the GPU where a is

    Returns:
        The result. It carries no gradient. Sums are made in float32, of float64 in float64.

    Raises:
        TypeError: what is no tensor of the machine, or types that no kernel reads
        ValueError: shapes that do not fit together, or options that are not allowed
        NotImplementedError: there is no GPU here, or it does not multiply float64
        ResourceError: `blocks` need more shared memory than the GPU has
    """
    machine = machine or _gpu_of("a", a)
    given = {"a": a, "b": b, "c": c, "bias": bias}
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    machine.check(**tensors)
    choice("bias_axis", bias_axis, BIASES[1:])
    choice("precision", precision, PRECISIONS)
    types = {name: _dtype(name, tensor) for name, tensor in tensors.items()}
    left = _axes("a", a, 2).turned() if transpose_a else _axes("a", a, 2)
    right = _axes("b", b, 2).turned() if transpose_b else _axes("b", b, 2)
    (*_, m, k), (*_, inner, n) = left.lengths, right.lengths
    if inner != k:
        raise ValueError(f"op(a) is {m} x {k} and op(b) {inner} x {n}: the inner two must be equal")
    batch = _common("b", left.batch, right.batch)
    shape = (*batch, m, n)[-max(a.ndim, b.ndim) :]
    device, meeting = architecture(machine.architecture), multiplied(types["a"], types["b"])
    how = _how(device, meeting, precision)
    if blocks is None:
        blocks = block_sizes(
            device.name,
            meeting,
            m,
            n,
            batch[0] * batch[1],
            products=how,
            multiprocessors=machine.multiprocessors,
        )
    spec = GemmSpec(
        a=types["a"],
        b=types["b"],
        c=dtype or types.get("c") or meeting,
        blocks=blocks,
        bias=None if bias is None else bias_axis,
        activation=activation,
        products=how,
    )
    if beta and c is None:
        raise ValueError(f"beta is {beta}, so c must be given")
    c = _result("c", c, shape, spec.c, machine)
    result = _axes("c", c, 2)
    steps = []
    if bias is not None:
        length = n if bias_axis == "column" else m
        steps = _bias_steps(bias, types["bias"], spec.c, (*batch, length))
    reach = (left, blocks.m, blocks.k), (right, blocks.k, blocks.n), (result, blocks.m, blocks.n)
    spec = replace(spec, wide=any(axes.wide(*block) for axes, *block in reach))
    function = machine.function(products.emit(spec), products.ENTRY)
    operands = [a, b, c] if bias is None else [a, b, bias, c]
    sizes = [m, n, k, batch[1], *left.sizes, *right.sizes, *result.sizes, *steps]
    scalars = [_scalar(number, spec.sums) for number in (alpha, beta)]
    programs = batch[0] * batch[1] * _parts(m, blocks.m) * _parts(n, blocks.n)
    _launch(machine, function, programs, (*operands, *sizes, *scalars), blocks, blocks.stages)
    return c


def softmax(
    x: Tensor,
    p: Tensor | None = None,
    *,
    return_lse: bool = False,
    blocks: SoftmaxBlocks | None = None,
    machine: Machine | None = None,
) -> Any:
    """The softmax of x along its last axis, safe for numbers of any size.

        softmax(torch.zeros(1, 4, device="cuda"))  # 1 x 4, all of it 0.25

    Arguments:
        x: (..., width), float32, float16, bfloat16 or float64, 1 to 4 axes in any strides
        p: of the shape and type of x: is overwritten and returned, and may be x itself; None makes
            a tensor
        return_lse: also return the log-sum-exp of each row
        blocks: of the kernel; None takes those for the width. Rows that are wider are walked.
        machine: what runs it; None is the GPU where x is

    Returns:
        p: of the shape and type of x, without gradients
        lse: with return_lse, (...), float32 (float64 of float64), natural logarithm

    A row of -inf alone gives p = 0 and lse = -inf, as a query that sees no key; one that holds NaN
    or +inf gives NaN. Both are made in the type of lse.

    Raises:
        TypeError: what is no tensor of the machine, or types that no kernel reads
        ValueError: axes that are too many, or a p of another shape or type
        NotImplementedError: there is no GPU here
    """
    machine = machine or _gpu_of("x", x)
    machine.check(**({"x": x} if p is None else {"x": x, "p": p}))
    kind, axes, shape = _dtype("x", x), _axes("x", x, 1), tuple(x.shape)
    batch, heads, count, width = axes.lengths
    p = _result("p", p, shape, kind, machine)
    result, blocks = _axes("p", p, 1), blocks or SoftmaxBlocks.of(width)
    spec = SoftmaxSpec(
        dtype=kind,
        blocks=blocks,
        online=width > blocks.columns,
        lse=return_lse,
        wide=any(each.wide(blocks.rows, blocks.columns) for each in (axes, result)),
    )
    lse = [machine.empty(shape[:-1], spec.statistics)] if return_lse else []
    sizes = [count, width, heads, *axes.sizes, *result.sizes]
    programs = batch * heads * _parts(count, blocks.rows)
    function = machine.function(rows.emit(spec), rows.ENTRY)
    _launch(machine, function, programs, (x, p, *lse, *sizes), blocks, rows.STAGES)
    return (p, *lse) if return_lse else p


def _launch(
    machine: Machine,
    function: Any,
    programs: int,
    given: tuple[Any, ...],
    blocks: GemmBlocks | SoftmaxBlocks,
    stages: int,
) -> None:
    """Launch a kernel, unless nothing is to be written."""
    if programs >= 2**31:
        raise ValueError(f"a grid has at most {2**31 - 1} programs, and this would take {programs}")
    if not programs:
        return
    with machine.active():
        try:
            function[(programs,)](*given, num_warps=blocks.warps, num_stages=stages)
        except Exception as error:
            if type(error).__name__ != "OutOfResources":
                raise
            raise ResourceError(
                f"blocks of {blocks} do not fit this GPU: {error}; choose smaller ones (blocks=)"
            ) from error


def _gpu_of(name: str, tensor: Any) -> Machine:
    """The GPU where a tensor is."""
    if not hasattr(getattr(tensor, "device", None), "type"):
        raise TypeError(f"{name} must be a tensor, got a {type(tensor).__name__}")
    place = tensor.device
    if place.type != "cuda":
        raise ValueError(f"{name} must be on a GPU that torch calls cuda, got {place}")
    return gpu(place.index)


def _how(device: Architecture, meeting: str, precision: str) -> str:
    """How numbers of a type are multiplied on a device."""
    if meeting == "float64" and not device.float64:
        raise NotImplementedError(
            f"Triton does not multiply float64 on {device.name}: convert a and b to float32"
        )
    exact = meeting != "float32" or device.kind != "cuda"
    return "ieee" if exact else _PRODUCTS[precision]


def _parts(length: int, block: int) -> int:
    """How many blocks cover a length."""
    return -(-length // block)


def _scalar(number: float, sums: str) -> float | int:
    """A number as kernels take it: beside float64 by its bits."""
    if sums == "float32":
        return float(number)
    bits: int = struct.unpack("<q", struct.pack("<d", float(number)))[0]
    return bits


def _dtype(name: str, tensor: Tensor) -> str:
    """The name of a tensor's type. Raises TypeError for one that kernels do not take."""
    found = str(tensor.dtype).removeprefix("torch.")
    if found not in DTYPES:
        raise TypeError(f"{name} must be one of {', '.join(DTYPES)}, got {found}")
    return found


def _axes(name: str, tensor: Tensor, least: int) -> Axes:
    """A tensor with axes of length 1 put before its own, four in all."""
    lengths = tuple(tensor.shape)
    if not least <= len(lengths) <= 4 or max(lengths) > LIMIT:
        raise ValueError(
            f"{name} must have {least} to 4 axes, none longer than {LIMIT}, got {lengths}"
        )
    steps = (
        0 if length == 1 else step for length, step in zip(lengths, tensor.stride(), strict=True)
    )
    front = 4 - len(lengths)
    return Axes((1,) * front + lengths, (0,) * front + tuple(steps))


def _common(name: str, batch: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    """The batch of two tensors, where an axis of length 1 serves any length."""
    for one, two in zip(batch, other, strict=True):
        if one != two and 1 not in (one, two):
            raise ValueError(f"the batch of {name} must be {batch} or 1 along an axis, got {other}")
    return tuple(two if one == 1 else one for one, two in zip(batch, other, strict=True))


def _bias_steps(bias: Tensor, dtype: str, result: str, shape: tuple[int, ...]) -> list[int]:
    """Strides of a bias: from number to number, then those of the batch from inside."""
    if dtype != result:
        raise TypeError(f"bias must be {result} as the result is, got {dtype}")
    (first, b, h, length), (_, step_b, step_h, step) = _axes("bias", bias, 1)
    if length != shape[2] or first != 1:
        raise ValueError(f"bias must be (..., {shape[2]}), got {tuple(bias.shape)}")
    if _common("bias", shape[:2], (b, h)) != shape[:2]:
        raise ValueError(f"the batch of bias must be {shape[:2]}, got {(b, h)}")
    return [step, step_h, step_b]


def _result(
    name: str, given: Tensor | None, shape: tuple[int, ...], dtype: str, machine: Machine
) -> Tensor:
    """The tensor that a kernel writes: the given one, checked, or a new one."""
    if given is None:
        return machine.empty(shape, dtype)
    if tuple(given.shape) != shape or _dtype(name, given) != dtype:
        raise ValueError(
            f"{name} must be {dtype} of shape {shape}, got {_dtype(name, given)} of shape "
            f"{tuple(given.shape)}"
        )
    steps = zip(*_axes(name, given, 1), strict=True)
    if given.numel() and any(step == 0 < length - 1 for length, step in steps):
        raise ValueError(f"{name} is written, so no axis of it may be broadcast")
    return given
