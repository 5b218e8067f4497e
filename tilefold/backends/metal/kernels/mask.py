"""The mask of a Metal kernel: one function that says whether a query may see a key.

    static inline bool visible(const int b, const int h, const int q, const int k,
                               constant long* sizes, device const int* t0, ...)

The parameters of the rule and the strides of its tables stand in the kernel's list of sizes, so
rules that differ only in these share a kernel. The indices must lie inside the problem, as the
tables do: a kernel asks first whether they do (`k < len_k && visible(...)`).
"""

from __future__ import annotations

from collections.abc import Callable

from tilefold.masks.expression import Slot, Truth
from tilefold.masks.infix import (
    ADD,
    ATOM,
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
from tilefold.masks.skeleton import Skeleton

Position = Callable[[str], int]
"""Place of a number in the kernel's list of sizes, by its name in `arguments.sizes`."""

_INFIX = {
    "+": Infix("+", ADD),
    "-": Infix("-", ADD),
    "*": Infix("*", MULTIPLY),
    "//": Infix("/", MULTIPLY, floor="floor_divide"),
    "%": Infix("%", MULTIPLY, floor="floor_remainder"),
    **{operator: Infix(operator, LESS) for operator in ("<", "<=", ">", ">=")},
    **{operator: Infix(operator, EQUAL) for operator in ("==", "!=")},
    "&": Infix("&&", LOGICAL),
    "|": Infix("||", LOGICAL),
}
_FORMS = {
    "-": Form("-{}", ATOM, UNARY),
    "abs": Form("abs({})", LOOSEST, CALL, natural=True),
    "~": Form("!{}", UNARY, UNARY),
}
_HELPERS = {
    "floor_divide": """\
static inline {integer} floor_divide(const {integer} x, const {integer} y) {{
    return x / y - (x % y < 0 ? 1 : 0);
}}
""",
    "floor_remainder": """\
static inline {integer} floor_remainder(const {integer} x, const {integer} y) {{
    return x % y + (x % y < 0 ? y : 0);
}}
""",
}
"""Python's `//` and `%` by a positive number, for a left side that may be negative."""


def tables(skeleton: Skeleton) -> tuple[str, ...]:
    """The parameters through which a function is given the tables of the rule."""
    return tuple(f"device const {_element(slot)}* {slot.name}" for slot in skeleton.slots)


def call(skeleton: Skeleton, *, b: str, h: str, q: str, k: str) -> str:
    """The call of `visible`, or `true` or `false` where the mask is the same everywhere."""
    if isinstance(skeleton.expression, Truth):
        return "true" if skeleton.expression.value else "false"
    given = [b, h, q, k, "sizes", *(slot.name for slot in skeleton.slots)]
    return f"visible({', '.join(given)})"


def visible(skeleton: Skeleton, index_bits: int, position: Position) -> str:
    """The function `visible` and its helpers; empty where the mask is the same everywhere."""
    if isinstance(skeleton.expression, Truth):
        return ""
    integer = "int" if index_bits == 32 else "long"
    source = infix(skeleton.expression, _dialect(integer, position))
    numbers = []
    for parameter in skeleton.parameters:
        type_, word = {"int": integer}[parameter.dtype], f"sizes[{position(parameter.name)}]"
        value = word if type_ == "long" else f"{type_}({word})"
        numbers.append(f"const {type_} {parameter.name} = {value};")
    given = [f"const {integer} {name}" for name in "bhqk"]
    given += ["constant long* sizes", *tables(skeleton)]
    rows = [given[:4], *(given[n : n + 3] for n in range(4, len(given), 3))]
    opening = "static inline bool visible("
    lines = [
        opening + f",\n{' ' * len(opening)}".join(map(", ".join, rows)) + ") {",
        *(f"    {line}" for line in [*numbers, *source.lines, f"return {source.truth};"]),
        "}\n",
    ]
    return "\n".join([*source.helpers.values(), *lines])


def _dialect(integer: str, position: Position) -> Dialect:
    def read(slot: Slot, indices: tuple[Term, ...]) -> str:
        steps = [
            f"{index.beside(MULTIPLY)} * sizes[{position(stride)}]"
            for index, stride in zip(indices, slot.strides, strict=True)
        ]
        return f"{slot.name}[{' + '.join(steps) or '0'}]"

    return Dialect(
        infix=_INFIX,
        forms=_FORMS,
        false=Term("false"),
        true=Term("true"),
        number=f"const {integer} {{}} = {{}};",
        truth="const bool {} = {};",
        # Compilers warn of `a && b || c`, so a join inside of another one stands in parentheses.
        joined=EQUAL,
        helpers={name: source.format(integer=integer) for name, source in _HELPERS.items()},
        read=read,
    )


def _element(slot: Slot) -> str:
    return "int" if slot.dtype == "int32" else "uchar"
