"""The mask of a Triton kernel: one function that says which queries may see which keys.

    @triton.jit
    def visible(b, h, q, k, p0, ..., t0, t0_0, ...):

`q` and `k` are columns and rows of indices, `b` and `h` numbers; so whatever depends on one index
alone is computed for one row or one column. The parameters of the rule and the strides of its
tables are arguments, so rules that differ only in these share a kernel. The indices must lie inside
the problem, as the tables do.
"""

from __future__ import annotations

from tilefold.backends.triton.kernels.text import Text
from tilefold.masks.expression import Skeleton, Slot, Truth
from tilefold.masks.infix import (
    ADD,
    CALL,
    EQUAL,
    LESS,
    LOGICAL,
    LOOSEST,
    MULTIPLY,
    UNARY,
    Dialect,
    Form,
    Infix,
    Term,
    infix,
)

_INFIX = {
    "+": Infix("+", ADD),
    "-": Infix("-", ADD),
    "*": Infix("*", MULTIPLY),
    "//": Infix("//", MULTIPLY, floor="floor_divide"),
    "%": Infix("%", MULTIPLY, floor="floor_remainder"),
    **{operator: Infix(operator, LESS) for operator in ("<", "<=", ">", ">=")},
    **{operator: Infix(operator, EQUAL) for operator in ("==", "!=")},
    "&": Infix("&", LOGICAL, names_left=True),
    "|": Infix("|", LOGICAL, names_left=True),
}
_FORMS = {
    "-": Form("-{}", CALL, UNARY),
    "abs": Form("absolute({})", LOOSEST, CALL, natural=True, helper="absolute"),
    "~": Form("({}) == 0", LOOSEST, EQUAL),
}
_HELPERS = {
    "floor_divide": """\
def floor_divide(x, y):
    return x // y - tl.where(x % y < 0, 1, 0)
""",
    "floor_remainder": """\
def floor_remainder(x, y):
    return x % y + tl.where(x % y < 0, y, 0)
""",
    "absolute": """\
def absolute(x):
    return tl.where(x < 0, -x, x)
""",
}
"""Python's `//` and `%` by a positive number, for a left side that may be negative, and `abs`."""


def masks(skeleton: Skeleton) -> bool:
    """True unless the mask is the same everywhere."""
    return not isinstance(skeleton.expression, Truth)


def arguments(skeleton: Skeleton) -> tuple[str, ...]:
    """Arguments of `visible`, and of a kernel, beside the indices: parameters, tables, strides."""
    found = [parameter.name for parameter in skeleton.parameters]
    for slot in skeleton.slots:
        found += [slot.name, *slot.strides]
    return tuple(found)


def call(skeleton: Skeleton, *, b: str, h: str, q: str, k: str) -> str:
    """The call of `visible`."""
    return f"visible({', '.join([b, h, q, k, *arguments(skeleton)])})"


def visible(skeleton: Skeleton, index_bits: int, jit: str = "triton.jit") -> str:
    """The function `visible` and its helpers; empty where the mask is the same everywhere.

    `jit` is the decorator of its language; Gluon's functions may only call functions of Gluon.
    """
    if not masks(skeleton):
        return ""
    source = infix(skeleton.expression, _dialect(wide=index_bits == 64))
    text = Text()
    text(*(f"@{jit}\n{helper}\n" for _, helper in sorted(source.helpers.items())))
    text(f"@{jit}")
    text.listed("def visible(", ["b", "h", "q", "k", *arguments(skeleton)], "):")
    body = [f"{name} = {name}.to(tl.int64)" for name in "bhqk"] if index_bits == 64 else []
    text(*(f"    {line}" for line in [*body, *source.lines, f"return {source.truth}"]))
    return str(text)


def _dialect(wide: bool) -> Dialect:
    """The dialect for 64-bit integers (wide) or 32-bit ones."""

    def read(slot: Slot, indices: tuple[Term, ...]) -> str:
        # A dense mask of 65536 x 65536 has more entries than 31 bits count.
        cast = ".to(tl.int64)" if slot.rank > 1 and not wide else ""
        steps = [
            f"{index.beside(CALL if cast else MULTIPLY)}{cast} * {stride}"
            for index, stride in zip(indices, slot.strides, strict=True)
        ]
        entry = f"tl.load({' + '.join([slot.name, *steps])})"
        return f"{entry}.to(tl.int64)" if wide and slot.dtype == "int32" else entry

    return Dialect(
        infix=_INFIX,
        forms=_FORMS,
        false=Term("(q < 0) & (k < 0)", LOGICAL),
        true=Term("(q >= 0) & (k >= 0)", LOGICAL),
        number="{} = {}",
        truth="{} = {}",
        joined=ADD,  # in Python `&` and `|` bind more tightly than comparisons
        helpers=_HELPERS,
        read=read,
    )
