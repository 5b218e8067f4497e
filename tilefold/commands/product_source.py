"""Sources of products for GPUs, as `tilefold inspect --operation gemm --backend metal` prints them.

Each source is a complete file, for contiguous arrays. Its first lines say how to launch it.
"""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import replace

from tilefold.backends.matmul import Codes, described
from tilefold.backends.metal.families import family
from tilefold.backends.metal.matmul import calls as metal
from tilefold.backends.metal.matmul import gemm as metal_gemm
from tilefold.backends.triton.architectures import ARCHITECTURES
from tilefold.backends.triton.matmul import calls as triton
from tilefold.backends.triton.matmul import codes as triton_codes
from tilefold.backends.triton.matmul import gemm as triton_gemm
from tilefold.backends.triton.matmul import operands as triton_operands
from tilefold.backends.triton.matmul.tables import quantized_blocks
from tilefold.common.check import choice
from tilefold.measuring.products import ProductCase
from tilefold.problems.matmul import Axes, Operand, Product

RESULT = "The result has the type of A."


def source(options: argparse.Namespace, case: ProductCase) -> str:
    """The source of a product on a GPU. Raises ValueError for what GPUs have no kernel of."""
    for option in ("isa", "asm", "json", "kernel", "dynamic"):  # --text says what is shown anyway
        if getattr(options, option):
            raise ValueError(f"--{option} goes with --backend cpu for products")
    known = {"metal": metal.ACCEPTED, "triton": triton_operands.ACCEPTED}[options.backend].dtypes
    choice(f"--dtype of products on {options.backend}", case.dtype, known)
    if options.backend == "metal":
        return _metal(options.family or "apple9", case)
    return _triton(options.architecture or "sm_90", case)


def _metal(name: str, case: ProductCase) -> str:
    limits, codes = family(name), _codes(case)
    product, out = _product(case, "float32" if codes else case.dtype)
    spec = metal.spec_of(product, limits, None, metal.LARGE_GPU_CORES, False)
    spec = replace(spec, codes=codes) if codes else spec
    blocks = spec.blocks
    across, down = -(-product.n // blocks.n), -(-product.m // blocks.m)
    sizes = metal.sizes_of(product, out, across, False)
    numbers = [f"{name}={size}" for name, size in zip(metal_gemm.SIZES, sizes, strict=True)]
    facts = [
        f"{metal_gemm.ENTRY}: {case.label}, for GPUs of {limits.name} ({limits.chips}).",
        f"Threadgroups have {blocks.threads} threads, for blocks of {blocks}; for these sizes there"
        f" are {across * down} x 1 x 1.",
        f"The buffer `sizes` holds, as 64-bit integers: {', '.join(numbers)}.",
        RESULT,
    ]
    return _commented("//", facts) + metal_gemm.emit(spec)


def _triton(name: str, case: ProductCase) -> str:
    device, codes = ARCHITECTURES[name], _codes(case)
    kind = triton_codes.multiplied(codes, case.dtype) if codes else case.dtype
    product, out = _product(case, kind)
    blocks = quantized_blocks(codes, case.m) if codes else None
    spec = triton.spec_of(product, device, "highest", blocks, False)
    if codes:
        how = triton_codes.products(codes, spec.a, spec.products)
        spec = replace(spec, codes=codes, products=how if device.kind == "cuda" else "ieee")
    factors = [product.a.axes, *([] if codes else [product.b.axes])]
    factors += [product.gate.axes] if product.gate else []
    spec = triton.placed(spec, device, factors, [out], True)
    programs = -(-product.n // spec.blocks.n) * -(-product.m // spec.blocks.m)
    facts = [
        f"{triton_gemm.ENTRY}: {case.label}, for {device.name} ({device.chips}).",
        f"Launched with num_warps={spec.blocks.warps} and num_stages={spec.blocks.stages}; for"
        f" these sizes there are {programs} programs, on a GPU of 132 multiprocessors.",
        f"Arguments: {', '.join(triton_gemm.names(spec))}. Strides count elements. Arrays begin at"
        " multiples of 16 bytes.",
        RESULT,
    ]
    return _commented("#", facts) + triton_gemm.emit(spec)


def _codes(case: ProductCase) -> Codes | None:
    """The codes of the B of a qgemm."""
    if case.scheme is None:
        return None
    group = None if case.group == case.k else case.group
    return Codes(case.scheme, group, case.sizes.scales)


def _product(case: ProductCase, kind: str) -> tuple[Product, Axes]:
    """The product of contiguous arrays, with a B of a type, and the axes of its result."""
    m, n, k = case.m, case.n, case.k
    b = _operand(kind, *((n, k) if case.transpose_b else (k, n)))
    a = _operand(case.dtype, *((k, m) if case.transpose_a else (m, k)))
    operands = {"a": a, "b": b} | ({"gate": b} if case.gate else {})
    product = described(
        operands,
        None,
        dtype=case.dtype,
        alpha=1.0,
        beta=0.0,
        transpose_a=case.transpose_a,
        transpose_b=case.transpose_b,
        bias_axis=None,
        activation=case.activation,
    )
    return product, _operand(case.dtype, m, n).axes


def _operand(dtype: str, rows: int, columns: int) -> Operand:
    """A contiguous matrix; strides are 0 along axes of one element."""
    strides = (0, 0, columns if rows > 1 else 0, 1 if columns > 1 else 0)
    return Operand(dtype, (rows, columns), Axes((1, 1, rows, columns), strides))


def _commented(sign: str, facts: list[str]) -> str:
    lines = [line for fact in facts for line in textwrap.wrap(fact, 97)]
    return "".join(f"{sign} {line}\n" for line in lines) + f"{sign}\n"
