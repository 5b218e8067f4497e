"""The mask and the modified score of a Triton kernel: a function for each.

    @triton.jit
    def visible(b, h, q, k, p0, ..., t0, t0_0, ...):

    @triton.jit
    def modified(s, b, h, q, k, p1, ..., t1, t1_0, ...):

`visible` says which queries may see which keys. `modified` gives what a kernel computes of the
natural scores `s` of a tile: the new scores, and what `Scored` says beside them. `q` and `k` are
columns and rows of indices, `b` and `h` numbers; so whatever depends on one index alone is computed
for one row or one column. Parameters and the strides of tables are arguments, so rules and scores
that differ only in these share a kernel. The indices must lie inside the problem, as the tables do.

Values of `modified` that do not depend on `s` may have one row or one column; the scores are a
whole tile. Functions are Triton's own, but tanh: Triton has none. There it is a quotient of
polynomials (Lambert's continued fraction, cut where 1e-17 is left) up to 1/2, where
(1 - e^-2x) / (1 + e^-2x) would lose digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from tilefold.backends.triton.kernels.text import Text
from tilefold.masks.expression import Expression, ScoreValue, Several, Slot, Truth
from tilefold.masks.graph import ordered
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
    Reals,
    Source,
    Term,
    infix,
)
from tilefold.masks.skeleton import Skeleton

_INFIX = {
    "+": Infix("+", ADD),
    "-": Infix("-", ADD),
    "*": Infix("*", MULTIPLY),
    "/": Infix("/", MULTIPLY),
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
    "minimum": Form("tl.minimum({}, {})", LOOSEST, CALL),
    "maximum": Form("tl.maximum({}, {})", LOOSEST, CALL),
}
_NAN = "propagate_nan=tl.PropagateNan.ALL"
_REAL_FORMS = {
    "-": Form("-{}", CALL, UNARY),
    "abs": Form("tl.abs({})", LOOSEST, CALL),
    "exp": Form("tl.exp({})", LOOSEST, CALL),
    "log": Form("tl.log({})", LOOSEST, CALL),
    "tanh": Form("tanh({})", LOOSEST, CALL, helper="tanh"),
    "sigmoid": Form("tl.sigmoid({})", LOOSEST, CALL),
    "sqrt": Form("tl.sqrt({})", LOOSEST, CALL),
    "minimum": Form(f"tl.minimum({{}}, {{}}, {_NAN})", LOOSEST, CALL),
    "maximum": Form(f"tl.maximum({{}}, {{}}, {_NAN})", LOOSEST, CALL),
    "where": Form("tl.where({}, {}, {})", LOOSEST, CALL),
    "from_integer": Form("tl.cast({}, tl.KIND)", LOOSEST, CALL),
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
    "tanh": """\
def tanh(x):
    size = tl.abs(x)
    z = x * x
    far = tl.exp(-2 * size)
    near = size < 0.5
    above = tl.where(near, size * (((z + 378) * z + 17325) * z + 135135), 1 - far)
    below = tl.where(near, ((28 * z + 3150) * z + 62370) * z + 135135, 1 + far)
    return tl.where(x < 0, -above / below, above / below)
""",
}
"""Python's `//` and `%` by a positive number, for a left side that may be negative, and functions
that Triton has not."""


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
    _function(text, "visible", [*"bhqk"], skeleton, index_bits, source, [], source.truth, jit)
    return str(text)


def modified_call(skeleton: Skeleton, *, s: str, b: str, h: str, q: str, k: str) -> str:
    """The call of `modified`."""
    return f"modified({', '.join([s, b, h, q, k, *arguments(skeleton)])})"


def modified(
    skeleton: Skeleton, index_bits: int, statistics: str, written: str, wanted: Sequence[int]
) -> str:
    """The function `modified` and its helpers, but those that stand in what is `written` already.

    `statistics` is the type that it computes in, `wanted` the numbers of the values that it gives.
    """
    parts = [skeleton.expression.parts[number] for number in wanted]
    dialect = _dialect(wide=index_bits == 64, real=statistics)
    source = infix(Several(tuple(parts)), dialect)
    text = Text()
    for name, helper in sorted(source.helpers.items()):
        if f"def {name}(" not in written:
            text(f"@triton.jit\n{helper}\n")
    reals = [one.name for one in skeleton.parameters if one.dtype == "real"]
    opening = [
        f"{name} = tl.cast({name}, tl.int64).to(tl.float64, bitcast=True)"
        for name in (reals if statistics == "float64" else ())
    ]
    values = [*source.values]
    if not _reads_score(parts[0]):
        values[0] = f"tl.broadcast_to(tl.cast({values[0]}, tl.{statistics}), s.shape)"
    value = values[0] if len(values) == 1 else f"({', '.join(values)})"
    given = ["s", *"bhqk"]
    _function(text, "modified", given, skeleton, index_bits, source, opening, value)
    return str(text)


def _function(
    text: Text,
    name: str,
    given: Sequence[str],
    skeleton: Skeleton,
    index_bits: int,
    source: Source,
    opening: Sequence[str],
    value: str,
    jit: str = "triton.jit",
) -> None:
    text(f"@{jit}")
    text.listed(f"def {name}(", [*given, *arguments(skeleton)], "):")
    body = [f"{index} = {index}.to(tl.int64)" for index in "bhqk"] if index_bits == 64 else []
    text(*(f"    {line}" for line in [*body, *opening, *source.lines, f"return {value}"]))


def _reads_score(expression: Expression) -> bool:
    return any(isinstance(node, ScoreValue) for node, _ in ordered(expression))


def _dialect(wide: bool, real: str = "float32") -> Dialect:
    """The dialect for 64-bit integers (wide) or 32-bit ones, and real numbers of a type."""

    def read(slot: Slot, indices: tuple[Term, ...]) -> str:
        # A dense mask of 65536 x 65536 has more entries than 31 bits count.
        cast = ".to(tl.int64)" if slot.rank > 1 and not wide else ""
        steps = [
            f"{index.beside(CALL if cast else MULTIPLY)}{cast} * {stride}"
            for index, stride in zip(indices, slot.strides, strict=True)
        ]
        entry = f"tl.load({' + '.join([slot.name, *steps])})"
        if slot.dtype not in ("int32", "bool"):
            return f"{entry}.to(tl.{real})"
        return f"{entry}.to(tl.int64)" if wide and slot.dtype == "int32" else entry

    def literal(value: float) -> str:
        number = f'float("{value}")' if math.isinf(value) else str(value)
        # A float alone would be of float32, and so would be what is computed of it.
        return number if real == "float32" else f"tl.full([], {number}, tl.{real})"

    forms = dict(_REAL_FORMS)
    cast = forms["from_integer"]
    forms["from_integer"] = replace(cast, template=cast.template.replace("KIND", real))
    return Dialect(
        infix=_INFIX,
        forms=_FORMS,
        false=Term("(q < 0) & (k < 0)", LOGICAL, kind="truth"),
        true=Term("(q >= 0) & (k >= 0)", LOGICAL, kind="truth"),
        number="{} = {}",
        truth="{} = {}",
        joined=ADD,  # in Python `&` and `|` bind more tightly than comparisons
        helpers=_HELPERS,
        read=read,
        reals=Reals(_INFIX, forms, literal, "{} = {}"),
    )
