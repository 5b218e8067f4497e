"""Matrices that stay, such as weights: packed once, in the order in which products read them."""

from __future__ import annotations

from typing import Any, NoReturn

from tilefold.backends.cpu.matmul import calls as kernels
from tilefold.common.check import choice
from tilefold.products.places import Form
from tilefold.products.plans import FACTORS, factor


class PackedMatrix:
    """A matrix (k, n) for the right side of products, made by `tilefold.pack`.

    It holds a copy in memory of its own, which never changes. Its `form` says how; `address` is
    that of its panels.
    """

    __slots__ = ("address", "dtype", "form", "nbytes", "panels", "shape")

    def __init__(self, dtype: str, shape: tuple[int, int], panels: kernels.Panels | None) -> None:
        self.dtype, self.shape, self.panels = dtype, shape, panels
        self.form = Form(dtype, shape, (shape[1], 1), panels.spec if panels else None)
        self.address = panels.address if panels else 0
        self.nbytes = panels.memory.size if panels else 0

    def __repr__(self) -> str:
        k, n = self.shape
        return f"PackedMatrix({k} x {n}, {self.dtype}, {self.nbytes} bytes)"

    def __deepcopy__(self, memo: Any) -> PackedMatrix:
        return self  # it never changes

    def __reduce__(self) -> NoReturn:
        raise TypeError("a packed matrix is for one machine: keep the matrix, and pack it anew")


def packed(form: Form, address: int, transpose: bool, a: str | None = None) -> PackedMatrix:
    """A packed copy of a matrix at an address, for an `a` of a type; None is its own."""
    choice("a_dtype", a, (None, *FACTORS))
    if len(form.shape) != 2:
        raise ValueError(f"w must have 2 axes, got shape {form.shape}")
    operand = factor("w", form)
    operand = operand.turned() if transpose else operand
    k, n = operand.axes.lengths[-2:]
    panels = kernels.pack(operand, address, a or form.dtype) if k and n else None
    return PackedMatrix(form.dtype, (k, n), panels)
