"""Calls of products with quantised matrices."""

from __future__ import annotations

from tilefold.backends.matmul import Codes, Quantized, placed, weighted
from tilefold.backends.metal.dispatch import Machine
from tilefold.backends.metal.matmul.calls import LARGE_GPU_CORES, operand, result_of, run
from tilefold.backends.metal.matmul.spec import GemmBlocks
from tilefold.backends.metal.runtime import gpu
from tilefold.backends.protocols import Array


def qgemm(
    x: Array,
    w: Quantized,
    *,
    bias: Array | None = None,
    activation: str | None = None,
    out: Array | None = None,
    dtype: str | None = None,
    blocks: GemmBlocks | None = None,
    cores: int = LARGE_GPU_CORES,
    machine: Machine | None = None,
) -> Array:
    """The product activation(x w + bias) with a quantised matrix, whose weights stay in codes.

    >>> import numpy as np
    >>> import tilefold
    >>> machine = tilefold.metal.emulated()  # on a Mac: nothing, and tensors on "mps"
    >>> w = tilefold.quantize(np.eye(32, dtype="float32"), "int8")
    >>> x = np.arange(32, dtype="float32")[None]
    >>> bool(np.allclose(tilefold.metal.qgemm(x, w, machine=machine), x))
    True

    Weights are computed in float32 while a tile of w is read, and multiplied in float32: a result
    is as exact as that of the weights that `w.dequantize()` gives.

    Arguments:
        x: (..., k), float32, float16 or bfloat16, with at least two axes, in any strides
        w: k x n, from `tilefold.quantize`. Its arrays are copied to the GPU once.
        bias: (n,), or as that of `gemm`
        activation: as that of `gemm`
        out: (..., n), the array of the result
        dtype: float32, float16 or bfloat16; None is the type of out, or of x
        blocks, cores, machine: as those of `gemm`

    Returns:
        The result, (..., n), a tensor where x is one, without gradients. Sums are float32.

    Raises:
        TypeError, ValueError, NotImplementedError: as `gemm` does
    """
    machine = machine or gpu()
    given = {"x": x, "bias": bias, "out": out}
    arrays = {name: array for name, array in given.items() if array is not None}
    machine.check(**arrays)
    operands = {
        name: operand(name, each, 1 if name == "bias" else 2) for name, each in arrays.items()
    }
    codes = Codes.of(w)
    product = weighted(
        w, "float32", operands, operands.pop("out", None), dtype=dtype, activation=activation
    )
    result = result_of("out", out, product.shape, product.dtype, x)
    named = {"a": x, **placed(machine, w)} | ({} if bias is None else {"bias": bias})
    run(product, named, result, machine, blocks=blocks, cores=cores, codes=codes)
    return result
