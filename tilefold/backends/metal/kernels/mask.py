"""The mask and the modified score of a Metal kernel: a function for each.

    static inline bool visible(const int b, const int h, const int q, const int k,
                               constant long* sizes, device const int* t0, ...)
    static inline float modified(const float s, const int b, ...)

`visible` says whether a query may see a key, `modified` makes a score of the scaled product. Where
a kernel needs more than the score, `modified` gives a struct: see `values`. Parameters and the
strides of tables stand in the kernel's list of sizes, so rules and scores that differ only in these
share a kernel; a real parameter stands there by its 32 bits. The indices must lie inside the
problem, as the tables do: a kernel asks first whether they do (`k < len_k && visible(...)`), or
takes the last ones that do (`min(k, len_k - 1)`).

Functions of real numbers are Metal's own. Only tanh is always the precise one: the fast one is
infinity over infinity, by the specification's table (8.3), for arguments that exp cannot take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from tilefold.backends.metal.kernels.arguments import TABLES, element
from tilefold.backends.metal.kernels.storage import storage
from tilefold.backends.metal.spec import MetalSpec
from tilefold.masks.expression import Several, Slot, Truth
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
    Reals,
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
    "/": Infix("/", MULTIPLY),
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
    "minimum": Form("min({}, {})", LOOSEST, CALL),
    "maximum": Form("max({}, {})", LOOSEST, CALL),
}
_REAL_FORMS = {
    "-": Form("-{}", ATOM, UNARY),
    "abs": Form("fabs({})", LOOSEST, CALL),
    "exp": Form("exp({})", LOOSEST, CALL),
    "log": Form("log({})", LOOSEST, CALL),
    "tanh": Form("precise::tanh({})", LOOSEST, CALL),
    "sigmoid": Form("sigmoid({})", LOOSEST, CALL, helper="sigmoid"),
    "sqrt": Form("sqrt({})", LOOSEST, CALL),
    "minimum": Form("smaller({}, {})", LOOSEST, CALL, helper="smaller"),
    "maximum": Form("larger({}, {})", LOOSEST, CALL, helper="larger"),
    "where": Form("{} ? {} : {}", LOGICAL, LOOSEST),
    "from_integer": Form("float({})", LOOSEST, CALL),
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
    "sigmoid": """\
static inline float sigmoid(const float x) {{
    return 1.0f / (1.0f + exp(-x));
}}
""",
    "smaller": """\
static inline float smaller(const float x, const float y) {{
    return x < y || x != x ? x : y;
}}
""",
    "larger": """\
static inline float larger(const float x, const float y) {{
    return x > y || x != x ? x : y;
}}
""",
}
"""Python's `//` and `%` by a positive number, for a left side that may be negative; a function that
Metal has not; minimum and maximum that keep a NaN, which Metal's do not."""

HIDES = """\
// -inf hides a pair. By its bits: fast mathematics take no number for infinite.
static inline bool hides(const float score) {
    return as_type<uint>(score) == 0xff800000u;
}
"""
"""The function that kernels call whose score may hide pairs."""


def tables(skeleton: Skeleton, bfloat: bool = False) -> tuple[str, ...]:
    """The parameters through which a function is given the tables of a rule or a score."""
    return tuple(f"device const {element(slot, bfloat)}* {slot.name}" for slot in skeleton.slots)


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
    integer = _integer(index_bits)
    source = infix(skeleton.expression, _dialect(integer, position, False))
    given = [f"const {integer} {name}" for name in "bhqk"]
    lines = [*_numbers(skeleton, integer, position), *source.lines, f"return {source.truth};"]
    function = _function("bool visible", given, tables(skeleton), lines)
    return "\n".join([*source.helpers.values(), function])


def values(spec: MetalSpec) -> dict[str, int]:
    """The numbers of the values that `modified` gives, by their names.

    They are the score; its `slope`, where that is not 1 everywhere; of each entry that the kernel
    adds to, `slope_0`, ..., and its indices, `at_0_0`, ...
    """
    found = {"score": 0}
    if spec.slope_varies:
        found["slope"] = 1
    for number, (first, rank) in enumerate(spec.entries):
        found[f"slope_{number}"] = first
        found |= {f"at_{number}_{axis}": first + 1 + axis for axis in range(rank)}
    return found


def modified_call(skeleton: Skeleton, *, s: str, b: str, h: str, q: str, k: str) -> str:
    """The call of `modified`."""
    given = [s, b, h, q, k, "sizes", *(slot.name for slot in skeleton.slots)]
    return f"modified({', '.join(given)})"


def modified(
    skeleton: Skeleton,
    wanted: Mapping[str, int],
    index_bits: int,
    bfloat: bool,
    position: Position,
    written: str = "",
) -> str:
    """The function `modified` and its helpers, without those that are `written` already.

    It gives the score alone, or a struct `Modified` of the `values` that are wanted.
    """
    integer, kind = _integer(index_bits), "float"
    parts = tuple([skeleton.expression.parts[number] for number in wanted.values()])
    source = infix(Several(parts), _dialect(integer, position, bfloat))
    value = source.values[0]
    new = [helper for helper in source.helpers.values() if helper not in written]
    if len(wanted) > 1:
        kind, value = "Modified", f"{{{', '.join(source.values)}}}"
        fields = [f"    {integer if name.startswith('at') else 'float'} {name};" for name in wanted]
        new.append("\n".join(["struct Modified {", *fields, "};\n"]))
    given = ["const float s", *(f"const {integer} {name}" for name in "bhqk")]
    lines = [*_numbers(skeleton, integer, position), *source.lines, f"return {value};"]
    function = _function(f"{kind} modified", given, tables(skeleton, bfloat), lines)
    return "\n".join([*new, function])


def _integer(index_bits: int) -> str:
    return "int" if index_bits == 32 else "long"


def _numbers(skeleton: Skeleton, integer: str, position: Position) -> list[str]:
    """The parameters of a skeleton, read from the list of sizes."""
    numbers = []
    for parameter in skeleton.parameters:
        word = f"sizes[{position(parameter.name)}]"
        if parameter.dtype == "real":
            numbers.append(f"const float {parameter.name} = as_type<float>(uint({word}));")
        else:
            word = word if integer == "long" else f"{integer}({word})"
            numbers.append(f"const {integer} {parameter.name} = {word};")
    return numbers


def _function(head: str, given: Sequence[str], tables: Sequence[str], lines: Sequence[str]) -> str:
    """A function: what it is given of a pair in one row, then sizes and tables, three in each."""
    rest = ["constant long* sizes", *tables]
    rows = [given, *(rest[n : n + 3] for n in range(0, len(rest), 3))]
    opening = f"static inline {head}("
    lines = [
        opening + f",\n{' ' * len(opening)}".join(map(", ".join, rows)) + ") {",
        *(f"    {line}" for line in lines),
        "}\n",
    ]
    return "\n".join(lines)


def _dialect(integer: str, position: Position, bfloat: bool) -> Dialect:
    def read(slot: Slot, indices: tuple[Term, ...]) -> str:
        steps = [
            f"{index.beside(MULTIPLY)} * sizes[{position(stride)}]"
            for index, stride in zip(indices, slot.strides, strict=True)
        ]
        entry = f"{slot.name}[{' + '.join(steps) or '0'}]"
        return entry if slot.dtype in TABLES else storage(slot.dtype, bfloat).read(entry, "float")

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
        reals=Reals(_INFIX, _REAL_FORMS, _literal, "const float {} = {};"),
    )


def _literal(value: float) -> str:
    return f"{'-' if value < 0 else ''}INFINITY" if math.isinf(value) else f"{value}f"
