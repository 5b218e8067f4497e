"""The options that describe a product of matrices without data: sizes, types, what is fused."""

from __future__ import annotations

import argparse
from typing import Any

from tilefold.measuring.products import OPERATIONS, ProductCase
from tilefold.problems.matmul import ACTIVATIONS
from tilefold.products.schemes import SCHEMES

SIZE = "MxNxK"
USUAL_SIZE = "1024x1024x1024"

OPTIONS = {
    "size": OPERATIONS,
    "activation": OPERATIONS,
    "transpose_a": ("gemm",),
    "transpose_b": ("gemm",),
    "gate": ("gemm",),
    "scheme": ("qgemm",),
    "group_size": ("qgemm",),
    "dynamic": ("qgemm",),
}
"""Options of products, and the operations that take them."""


def add(parser: argparse.ArgumentParser, **size: Any) -> None:
    """Add the options of products; `size` says how the sizes are given."""
    group = parser.add_argument_group("products", "--operation gemm, and qgemm, take:")
    text = f"A is M x K, and B is K x N (default {USUAL_SIZE})"
    group.add_argument("--size", metavar=SIZE, help=text, **size)
    group.add_argument("--transpose-a", action="store_true", help="A lies as K x M")
    group.add_argument("--transpose-b", action="store_true", help="B lies as N x K")
    known = [name for name in ACTIVATIONS if name]
    group.add_argument("--activation", choices=known, help="applied to the result")
    group.add_argument("--gate", action="store_true", help="a second B, whose product multiplies")
    group.add_argument("--scheme", choices=tuple(SCHEMES), help="of the quantised B of qgemm")
    group.add_argument("--group-size", type=int, help="inputs that share a scale")
    group.add_argument("--dynamic", action="store_true", help="round rows of A to 8 bits")


def check(options: argparse.Namespace, operation: str, others: tuple[str, ...]) -> None:
    """Raises ValueError for options of attention, and for those of the other product.

    `others` are the options that only attention has.
    """
    for name in others:
        if _given(options, name):
            raise ValueError(f"{shown(name)} goes with attention, not with --operation {operation}")
    for name, operations in OPTIONS.items():
        if _given(options, name) and operation not in operations:
            raise ValueError(f"{shown(name)} goes with --operation {operations[0]}")
    if operation == "qgemm" and options.scheme is None:
        raise ValueError(f"--operation qgemm needs --scheme: {', '.join(SCHEMES)}")


def check_attention(options: argparse.Namespace) -> None:
    """Raises ValueError for options of products beside an operation of attention."""
    for name, operations in OPTIONS.items():
        if _given(options, name):
            raise ValueError(f"{shown(name)} goes with --operation {' or '.join(operations)}")
    if "int8" in options.dtype:
        raise ValueError("--dtype int8 goes with --operation gemm")


def case(options: argparse.Namespace, operation: str, size: str, dtype: str, threads: int) -> Any:
    """The product that the options describe. Raises ValueError."""
    m, n, k = sizes(size)
    named = {name: getattr(options, name) for name in OPTIONS if name != "size"}
    return ProductCase(operation, m, n, k, dtype, threads, **named)


def sizes(text: str) -> tuple[int, int, int]:
    """The sizes m, n, k of a text.

    >>> sizes("1024x512x64")
    (1024, 512, 64)
    >>> sizes("1024x512")
    Traceback (most recent call last):
    ValueError: a size is three integers from 1 on such as 1024x1024x1024 (MxNxK), not '1024x512'
    """
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(
            f"a size is three integers from 1 on such as {USUAL_SIZE} ({SIZE}), not {text!r}"
        )
    m, n, k = map(int, parts)
    return m, n, k


def _given(options: argparse.Namespace, name: str) -> bool:
    """True if an option has another value than its default."""
    value = getattr(options, name, None)
    return bool(value != options.usual(name))


def shown(name: str) -> str:
    """An option as it is written."""
    return f"--{name.replace('_', '-')}"
