"""Calls of products and of softmax on the tensors of a machine.

    tensors -> Product or Rows -> spec -> kernel, whose source is written and loaded once
                               -> sizes: lengths and strides

A spec knows types and the blocks for the GPU's architecture. An axis may have length 0: a sum over
none is 0.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tilefold.backends.matmul import Codes, described, folded
from tilefold.backends.triton.architectures import Architecture, architecture
from tilefold.backends.triton.machine import ALIGNED, Machine, ResourceError
from tilefold.backends.triton.matmul import codes as widening
from tilefold.backends.triton.matmul import gemm as products
from tilefold.backends.triton.matmul import rows
from tilefold.backends.triton.matmul.gemm import GemmBlocks, GemmSpec
from tilefold.backends.triton.matmul.operands import ROWS, movable, operand, wide
from tilefold.backends.triton.matmul.rows import SoftmaxBlocks, SoftmaxSpec
from tilefold.backends.triton.matmul.tables import block_sizes, halved
from tilefold.backends.triton.module import launch_options
from tilefold.backends.triton.runtime import gpu
from tilefold.backends.triton.spec import BY_PRECISION
from tilefold.common.check import choice
from tilefold.problems.matmul import Axes, Product, Rows, multiplied
from tilefold.problems.request import PRECISIONS

if TYPE_CHECKING:
    from torch import Tensor


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
    bias_axis: str | None = None,
    activation: str | None = None,
    gate: Tensor | None = None,
    out: Tensor | None = None,
    dtype: str | None = None,
    precision: str = "highest",
    blocks: GemmBlocks | None = None,
    machine: Machine | None = None,
) -> Tensor:
    """The matrix product C = activation(alpha op(A) op(B) + bias + beta C), in batches.

        a, b = torch.ones(2, 3, device="cuda").half(), torch.ones(4, 3, device="cuda").half()
        gemm(a, b, transpose_b=True, dtype="float32")  # 2 x 4, all of it 3

    With a gate G it is activation(alpha op(A) op(B) + bias) * (alpha op(A) op(G)), as the first
    half of a SwiGLU layer, in one pass over A.

    Arguments:
        a: (..., m, k), or (..., k, m) with `transpose_a`
        b: (..., k, n), or (..., n, k) with `transpose_b`
            float32, float16 or bfloat16 each, or float64 both, in any strides. Axes of a batch come
            first, and broadcast as in NumPy. What does not lie as two of them is walked by the
            host.
        c: (..., m, n). Without `out` it is overwritten and returned; None makes a tensor. With
            `out` it is only read, where beta is not 0, and broadcasts.
        alpha, beta: numbers; c is read only where beta is not 0
        transpose_a, transpose_b: whether op transposes the last two axes
        bias: (n,), (..., 1, n) or (..., m, 1). It is added as it is, not times alpha, and before
            the activation.
        bias_axis: None; or "column" for a bias (..., n), or "row" for a bias (..., m)
        activation: None, "relu", "gelu" (by the distribution function), "gelu_tanh", "silu",
            "sigmoid" or "tanh"
        gate: G, of the shape and type of b, transposed with it; beta is then 0
        out: (..., m, n), the tensor of the result. It shares no memory with any other.
        dtype: float32, float16 or bfloat16, the type of the result (float64 of float64); None is
            that of out, of c, or of a and b, or float32 if these differ. Bias and a c beside out
            have it, or are float32.
        precision: of products in float32, in which types that differ are multiplied too: "highest",
            "high" (three of TF32) or "medium" (TF32, which has all bits of the half types)
        blocks: of the kernel; None takes the table's blocks for the GPU's architecture
        machine: what runs it; None is the GPU where a is

    Returns:
        The result. It carries no gradient. Sums are made in float32, of float64 in float64.

    Raises:
        TypeError: what is no tensor of the machine, or types that no kernel reads
        ValueError: shapes that do not fit together, or options that are not allowed
        NotImplementedError: there is no GPU here
        ResourceError: `blocks` need more shared memory than the GPU has
    """
    machine = machine or gpu_of("a", a)
    given = {"a": a, "b": b, "c": c, "bias": bias, "gate": gate, "out": out}
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    machine.check(**tensors)
    operands = {
        name: operand(name, each, 1 if name == "bias" else 2) for name, each in tensors.items()
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
    result = c if out is None else out
    result = machine.empty(product.shape, product.dtype) if result is None else result
    tensors.pop("out", None)
    run(product, tensors, result, machine, precision=precision, blocks=blocks)
    return result


def run(
    product: Product,
    tensors: Mapping[str, Tensor],
    out: Tensor,
    machine: Machine,
    *,
    precision: str = "highest",
    blocks: GemmBlocks | None = None,
    codes: Codes | None = None,
) -> None:
    """Launch a described product on its tensors by name; C may be the tensor of the result.

    With `codes`, B is quantised: `tensors` has "codes", and "scales", "zeros" or "table", and
    `blocks` are given.
    """
    choice("precision", precision, PRECISIONS)
    device, where = architecture(machine.architecture), folded(product, operand("out", out, 2))
    besides, product = tensors.get("c") is not out and product.beta != 0, where.product
    cores = machine.multiprocessors
    plain = spec_of(product, device, precision, blocks, besides, cores)
    if codes:
        how = widening.products(codes, plain.a, plain.products)
        plain = replace(plain, codes=codes, products=how if device.kind == "cuda" else "ieee")
    m, n, k, blocks = product.m, product.n, product.k, plain.blocks
    programs = product.matrices * _parts(m, blocks.m) * _parts(n, blocks.n)
    options = launch_options(device.kind, plain.multiplied, blocks.warps, blocks.stages)
    numbers = (product.alpha,) if plain.gate else (product.alpha, product.beta)
    scalars = [_scalar(number, plain.sums) for number in numbers]
    results = [where.out, *([product.c.axes] if product.c and besides else [])]
    names = [
        *(["codes", *codes.besides] if codes else []),
        *(["bias"] if product.bias else []),
        *(["c"] if besides else []),
        "out",
    ]
    for found in where.places({**tensors, "out": out}):
        factors = [(found["a"], product.a.axes)]
        factors += [] if codes else [(found["b"], product.b.axes)]
        factors += [(found["gate"], product.gate.axes)] if product.gate else []
        aligned = all(tensor.data_ptr() % ALIGNED == 0 for tensor, _ in factors)
        spec = placed(plain, device, [axes for _, axes in factors], results, aligned)
        operands, (left, *right) = _operands(spec, factors)
        operands += [found[name] for name in names]
        sizes = [m, n, k, product.batch[1], *left, *(size for each in right[:1] for size in each)]
        sizes += [*where.out.sizes, *(size for each in right[1:] for size in each)]
        sizes += product.bias_strides
        sizes += [size for each in results[1:] for size in each.sizes]
        function = machine.function(products.emit(spec), products.ENTRY)
        _launch(machine, function, programs, (*operands, *sizes, *scalars), blocks, options)


def spec_of(
    product: Product,
    device: Architecture,
    precision: str,
    blocks: GemmBlocks | None,
    besides: bool,
    multiprocessors: int = 132,
) -> GemmSpec:
    """The kernel of a product on a device, with the table's blocks where none are given.

    `besides`: C lies beside the result, and is read.
    """
    bias, gate = product.bias, product.gate is not None
    meeting = multiplied(product.a.dtype, product.b.dtype)
    how = _how(device, meeting, precision)
    if blocks is None:
        blocks = block_sizes(
            device.name,
            meeting,
            product.m,
            product.n,
            product.matrices,
            products=how,
            multiprocessors=multiprocessors,
        )
        blocks = halved(blocks) if gate else blocks
    return GemmSpec(
        a=product.a.dtype,
        b=product.b.dtype,
        c=product.dtype,
        blocks=blocks,
        bias=product.bias_axis,
        activation=product.activation,
        products=how,
        bias_type=bias.dtype if bias and bias.dtype != product.dtype else None,
        old=product.c.dtype if product.c and besides else None,
        gate=gate,
    )


def softmax(
    x: Tensor,
    p: Tensor | None = None,
    *,
    return_lse: bool = False,
    blocks: SoftmaxBlocks | None = None,
    machine: Machine | None = None,
) -> Any:
    """The softmax of x along its last axis, safe for elements of any size.

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
    machine = machine or gpu_of("x", x)
    tensors = {"x": x} if p is None else {"x": x, "p": p}
    machine.check(**tensors)
    called = Rows.of({name: operand(name, tensor, 1, ROWS) for name, tensor in tensors.items()})
    kind, axes, shape = called.x.dtype, called.x.axes, called.x.shape
    p = machine.empty(shape, kind) if p is None else p
    result, blocks = operand("p", p, 1).axes, blocks or SoftmaxBlocks.of(called.width)
    spec = SoftmaxSpec(
        dtype=kind,
        blocks=blocks,
        online=called.width > blocks.columns,
        lse=return_lse,
        wide=any(wide(each, blocks.rows, blocks.columns) for each in (axes, result)),
    )
    lse = [machine.empty(shape[:-1], spec.statistics)] if return_lse else []
    sizes = [called.count, called.width, called.heads, *axes.sizes, *result.sizes]
    programs = called.batch * called.heads * _parts(called.count, blocks.rows)
    function = machine.function(rows.emit(spec), rows.ENTRY)
    device = architecture(machine.architecture)
    options = launch_options(device.kind, kind, blocks.warps, rows.STAGES)
    _launch(machine, function, programs, (x, p, *lse, *sizes), blocks, options)
    return (p, *lse) if return_lse else p


_LONGEST = 256
"""The longest side of a tile that a descriptor moves at once."""

Placed = tuple["Tensor", Axes]
"""A matrix that is multiplied: its tensor, and its rows and columns as they multiply."""


def placed(
    spec: GemmSpec,
    device: Architecture,
    factors: Sequence[Axes],
    results: Sequence[Axes],
    aligned: bool,
) -> GemmSpec:
    """The spec for matrices that lie like this: A, B and, with a gate, G; `aligned` to 16 bytes.

    Tiles are moved whole only where products read them from shared memory as they come, as in
    attention (`resources.tma`).
    """
    sides = spec.blocks
    near = [movable(axes, 2) for axes in factors]
    half = spec.multiplied in ("float16", "bfloat16")
    fits = max(sides.m, sides.n, sides.k) <= _LONGEST
    alike = all(near) and len(set(near[1:])) == 1
    whole = device.descriptors and device.asynchronous and not spec.codes
    if whole and half and aligned and fits and alike:
        turned = [each == "column" for each in near]
        spec = replace(spec, descriptors=True, transpose_a=turned[0], transpose_b=turned[1])
    reach = [(axes, sides.m, sides.n) for axes in results]
    if not spec.descriptors:
        reach.append((factors[0], sides.m, sides.k))
        reach += [(axes, sides.k, sides.n) for axes in factors[1:]]
    return replace(spec, wide=any(wide(*each) for each in reach))


def _operands(spec: GemmSpec, factors: Sequence[Placed]) -> tuple[list[Any], list[list[int]]]:
    """The factors as the kernel takes them, and the strides of each."""
    if not spec.descriptors:
        return [tensor for tensor, _ in factors], [axes.sizes for _, axes in factors]
    from triton.tools.tensor_descriptor import TensorDescriptor

    found, steps = [], []
    for n, ((tensor, axes), block) in enumerate(
        zip(factors, products.tiles(spec).values(), strict=True)
    ):
        lying = axes.turned() if (spec.transpose_b if n else spec.transpose_a) else axes
        strides = [step or ALIGNED for step in lying.strides[:3]]  # of one there is no next
        found.append(TensorDescriptor(tensor, list(lying.lengths), [*strides, 1], block))
        steps.append([int(length > 1) for length in lying.batch[::-1]])
    return found, steps


def _launch(
    machine: Machine,
    function: Any,
    programs: int,
    given: tuple[Any, ...],
    blocks: GemmBlocks | SoftmaxBlocks,
    options: Mapping[str, int],
) -> None:
    """Launch a kernel, unless nothing is to be written."""
    if programs >= 2**31:
        raise ValueError(f"a grid has at most {2**31 - 1} programs, and this would take {programs}")
    if not programs:
        return
    with machine.active():
        try:
            function[(programs,)](*given, **options)
        except Exception as error:
            if type(error).__name__ != "OutOfResources":
                raise
            raise ResourceError(
                f"blocks of {blocks} do not fit this GPU: {error}; choose smaller ones (blocks=)"
            ) from error


def gpu_of(name: str, tensor: Any) -> Machine:
    """The GPU where a tensor is."""
    if not hasattr(getattr(tensor, "device", None), "type"):
        raise TypeError(f"{name} must be a tensor, got a {type(tensor).__name__}")
    place = tensor.device
    if place.type != "cuda":
        raise ValueError(f"{name} must be on a GPU that torch calls cuda, got {place}")
    return gpu(place.index)


def _how(device: Architecture, meeting: str, precision: str) -> str:
    """How elements of a type are multiplied on a device."""
    exact = meeting != "float32" or device.kind != "cuda"
    return "ieee" if exact else BY_PRECISION[precision]


def _parts(length: int, block: int) -> int:
    """How many blocks cover a length."""
    return -(-length // block)


def _scalar(number: float, sums: str) -> float | int:
    """A number as kernels take it: beside float64 by its bits."""
    if sums == "float32":
        return float(number)
    bits: int = struct.unpack("<q", struct.pack("<d", float(number)))[0]
    return bits
