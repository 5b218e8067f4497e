"""Calls of products with quantised matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tilefold.backends.matmul import FLOATS, Codes, Quantized, placed, weighted
from tilefold.backends.triton.machine import Machine
from tilefold.backends.triton.matmul import codes as widening
from tilefold.backends.triton.matmul.calls import gpu_of, run
from tilefold.backends.triton.matmul.gemm import GemmBlocks
from tilefold.backends.triton.matmul.operands import operand
from tilefold.backends.triton.matmul.tables import quantized_blocks
from tilefold.common.check import choice

if TYPE_CHECKING:
    from torch import Tensor


def qgemm(
    x: Tensor,
    w: Quantized,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    out: Tensor | None = None,
    dtype: str | None = None,
    precision: str = "highest",
    blocks: GemmBlocks | None = None,
    machine: Machine | None = None,
) -> Tensor:
    """The product activation(x w + bias) with a quantised matrix, whose weights stay in codes.

        w = tilefold.quantize(weights, "int4", group_size=128)
        qgemm(x, w, activation="silu")  # x is on a GPU; the codes are copied there once

    Codes are widened in registers while a tile of w is read. They are multiplied in the type of x,
    which holds them as they are. Numbers of a palette are float16: beside bfloat16 they are
    multiplied in TF32, which holds both as they are, and beside float32 in float32. Scales multiply
    sums in float32. So a result is as exact as that of the weights that `w.dequantize()` gives.

    Arguments:
        x: (..., k), float32, float16 or bfloat16, with at least two axes, in any strides
        w: k x n, from `tilefold.quantize`
        bias: (n,), or as that of `gemm`
        activation: as that of `gemm`
        out: (..., n), the tensor of the result
        dtype: float32, float16 or bfloat16; None is the type of out, or of x
        precision, blocks, machine: as those of `gemm`

    Returns:
        The result, (..., n), without gradients. Sums are float32.

    Raises:
        TypeError, ValueError, NotImplementedError, ResourceError: as `gemm` does
    """
    machine = machine or gpu_of("x", x)
    given = {"x": x, "bias": bias, "out": out}
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    machine.check(**tensors)
    operands = {
        name: operand(name, each, 1 if name == "bias" else 2) for name, each in tensors.items()
    }
    choice("the type of x", operands["x"].dtype, FLOATS)
    codes = Codes.of(w)
    kind = widening.multiplied(codes, operands["x"].dtype)
    product = weighted(
        w, kind, operands, operands.pop("out", None), dtype=dtype, activation=activation
    )
    result = machine.empty(product.shape, product.dtype) if out is None else out
    named = {"a": x, **placed(machine, w)} | ({} if bias is None else {"bias": bias})
    blocks = blocks or quantized_blocks(codes, product.m)
    run(product, named, result, machine, precision=precision, blocks=blocks, codes=codes)
    return result
