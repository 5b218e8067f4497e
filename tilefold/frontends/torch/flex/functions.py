"""What PyTorch's functions make of symbols, by their names.

Functions that the language has become nodes. Functions that are made of these are written so.
Other functions of one integer become tables: see `entries.computed`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilefold.frontends.torch.flex import arithmetic
from tilefold.frontends.torch.flex.arithmetic import (
    absolute,
    add,
    both,
    clamp,
    count,
    div,
    either,
    exclusive,
    floor_divide,
    fmod,
    gt,
    invert,
    maximum,
    minimum,
    mul,
    neg,
    numbers,
    real,
    remainder,
    sub,
    truth,
    where,
)
from tilefold.frontends.torch.flex.entries import Row, computed, number, read
from tilefold.frontends.torch.flex.symbols import Symbol, Unexpressed, made
from tilefold.masks.symbols import unary


def applied(function: Any, given: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """What a function of PyTorch, or a method of tensors by its name, makes of symbols.

    Raises NotImplementedError for what the language of kernels has not.
    """
    name = function if isinstance(function, str) else _NAMES.get(function, f"{function}")
    name = _SAME.get(name, name)
    meaning = _KNOWN.get(name)
    if meaning is not None:
        try:
            return meaning(*given, **options)
        except Unexpressed:
            if name not in _POINTWISE:
                raise
    if name not in _POINTWISE:
        raise NotImplementedError(
            f"flex_attention: torch's {name} is not in the language of score_mod and mask_mod"
        )
    return computed(name, lambda *values: getattr(torch, name)(*values, **options), given)


def _function(name: str) -> Callable[[Any], Symbol]:
    again = getattr(torch, name)

    def function(x: Any) -> Symbol:
        x = real(numbers(x)[0])
        return made([x], "real", lambda: unary(name, x.node), again)

    return function


_exp, _log, _tanh = _function("exp"), _function("log"), _function("tanh")
_sigmoid, _sqrt = _function("sigmoid"), _function("sqrt")


def _power(x: Any, y: Any) -> Symbol:
    """x ** y: products for small whole exponents, else exp(y log(x))."""
    if isinstance(x, Symbol) and isinstance(y, (int, float)):
        if y == 0.5:
            return _sqrt(x)
        if y == int(y) and 1 <= y <= 8:
            result = x = real(x) if isinstance(y, float) else count(x) if x.kind == "bool" else x
            for _ in range(int(y) - 1):
                result = mul(result, x)
            return result
    if isinstance(x, (int, float)) and x > 0:
        if numbers(y)[0].kind == "int" and isinstance(x, int):
            raise Unexpressed("flex_attention: an integer to the power of an index")
        return _exp(mul(y, math.log(x)))
    x, y = numbers(x, y)
    if x.kind == "int":
        raise Unexpressed("flex_attention: a power of integers takes a constant from 1 to 8")
    return _exp(mul(y, _log(x)))


def _softplus(x: Symbol, beta: float = 1.0, threshold: float = 20.0) -> Symbol:
    scaled = mul(x, beta)
    soft = div(_log(add(_exp(minimum(scaled, threshold)), 1.0)), beta)
    return where(gt(scaled, threshold), x, soft)


def _gelu(x: Symbol, approximate: str = "none") -> Symbol:
    if approximate != "tanh":
        raise NotImplementedError(
            "flex_attention: gelu needs erf, which is not in the language of kernels; use"
            ' approximate="tanh"'
        )
    inner = mul(add(x, mul(_power(x, 3), 0.044715)), math.sqrt(2 / math.pi))
    return mul(mul(x, 0.5), add(_tanh(inner), 1.0))


def _to(x: Symbol, *given: Any, **options: Any) -> Any:
    """A symbol in another type. A real number keeps all its bits in types of fewer."""
    dtype = options.get("dtype")
    for value in given:
        if isinstance(value, (torch.dtype, Tensor, Symbol)):
            dtype = value if isinstance(value, torch.dtype) else value.dtype
    if dtype is None:
        return x
    if dtype == torch.bool:
        return truth(x)
    if dtype.is_floating_point:
        return real(x)
    if x.kind == "real":
        return computed(f"a conversion to {dtype}", lambda t: t.to(dtype), [x])
    return count(x)


def _cast(dtype: torch.dtype) -> Callable[[Symbol], Any]:
    return lambda x: _to(x, dtype)


def _full(x: Symbol, value: Any, *, dtype: Any = None, **_: Any) -> Any:
    wanted = x.dtype if dtype is None else dtype
    if isinstance(value, (Symbol, Tensor)):
        return _to(number(x.tracing, value), wanted)
    plain = bool if wanted == torch.bool else float if wanted.is_floating_point else int
    return number(x.tracing, plain(value))


def _new_full(x: Symbol, size: Any, value: Any, *, dtype: Any = None, **_: Any) -> Any:
    if len(size):
        raise NotImplementedError(f"flex_attention: a scalar is wanted, got shape {tuple(size)}")
    return _full(x, value, dtype=dtype)


def _detach(x: Symbol) -> Symbol:
    if x.kind == "real":
        raise NotImplementedError("flex_attention: a part of a score cannot be detached")
    return x


def _same(x: Symbol, *_: Any, **__: Any) -> Symbol:
    return x


def _shift(x: Any, bits: Any, left: bool) -> Symbol:
    if isinstance(bits, Symbol):
        raise Unexpressed("flex_attention: a shift takes a constant number of bits")
    return mul(x, 1 << bits) if left else floor_divide(x, 1 << bits)


def _dot(x: Row, y: Row) -> Symbol:
    """The sum of products of two vectors, entry by entry, as a balanced tree."""
    if not isinstance(x, Row) or not isinstance(y, Row):
        raise NotImplementedError("flex_attention: torch.dot takes two rows of tensors")
    terms = [mul(*pair) for pair in zip(x.entries(), y.entries(), strict=True)]
    while len(terms) > 1:
        pairs = [add(*terms[at : at + 2]) for at in range(0, len(terms) - 1, 2)]
        terms = [*pairs, *terms[len(pairs) * 2 :]]
    return terms[0]


_KNOWN: dict[str, Callable[..., Any]] = {
    **{name: getattr(arithmetic, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    "add": add,
    "sub": sub,
    "rsub": lambda x, y: sub(y, x),
    "mul": mul,
    "div": div,
    "floor_divide": floor_divide,
    "remainder": remainder,
    "fmod": fmod,
    "neg": neg,
    "positive": _same,
    "abs": absolute,
    "minimum": minimum,
    "maximum": maximum,
    "clamp": clamp,
    "clamp_min": lambda x, min: maximum(x, min),
    "clamp_max": lambda x, max: minimum(x, max),
    "bitwise_and": both,
    "bitwise_or": either,
    "bitwise_xor": exclusive,
    "bitwise_not": invert,
    "bitwise_left_shift": lambda x, bits: _shift(x, bits, left=True),
    "bitwise_right_shift": lambda x, bits: _shift(x, bits, left=False),
    "logical_and": lambda x, y: both(truth(x), truth(y)),
    "logical_or": lambda x, y: either(truth(x), truth(y)),
    "logical_xor": lambda x, y: exclusive(truth(x), truth(y)),
    "logical_not": lambda x: invert(truth(x)),
    "where": where,
    "masked_fill": lambda x, condition, value: where(condition, value, x),
    "exp": _exp,
    "log": _log,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "sqrt": _sqrt,
    "exp2": lambda x: _exp(mul(x, math.log(2))),
    "log2": lambda x: mul(_log(x), 1 / math.log(2)),
    "log10": lambda x: mul(_log(x), 1 / math.log(10)),
    "rsqrt": lambda x: div(1.0, _sqrt(x)),
    "reciprocal": lambda x: div(1.0, x),
    "square": lambda x: mul(x, x),
    "pow": _power,
    "relu": lambda x, inplace=False: maximum(x, 0),
    "silu": lambda x, inplace=False: mul(x, _sigmoid(x)),
    "softplus": _softplus,
    "gelu": _gelu,
    "to": _to,
    "type_as": _to,
    "float": _cast(torch.float32),
    "double": _cast(torch.float64),
    "half": _cast(torch.float16),
    "bfloat16": _cast(torch.bfloat16),
    "int": _cast(torch.int32),
    "long": _cast(torch.int64),
    "bool": truth,
    "full_like": _full,
    "zeros_like": lambda x, **options: _full(x, 0, **options),
    "ones_like": lambda x, **options: _full(x, 1, **options),
    "new_full": _new_full,
    "new_zeros": lambda x, size, **options: _new_full(x, size, 0, **options),
    "new_ones": lambda x, size, **options: _new_full(x, size, 1, **options),
    "new_tensor": lambda x, value, **options: number(x.tracing, value),
    "detach": _detach,
    "clone": _same,
    "contiguous": _same,
    "squeeze": _same,
    "getitem": read,
    "dot": _dot,
    "dim": lambda x: 0,
    "size": lambda x: x.shape,
    "numel": lambda x: 1,
    "is_floating_point": lambda x: x.kind == "real",
}

_POINTWISE = frozenset(
    """
    floor ceil round trunc frac sin cos tan asin acos atan sinh cosh asinh acosh atanh erf erfc sign
    sgn log1p expm1 atan2 fmod remainder floor_divide div pow hypot bitwise_and bitwise_or
    bitwise_xor bitwise_left_shift bitwise_right_shift gcd lcm isnan isinf isfinite logaddexp
    """.split()  # noqa: SIM905  # a list of names
)
"""What PyTorch computes in a table for each value of an integer: functions entry by entry."""

_SAME = {
    "absolute": "abs",
    "negative": "neg",
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "min": "minimum",
    "max": "maximum",
    "fmin": "minimum",
    "fmax": "maximum",
    "clip": "clamp",
    "less": "lt",
    "less_equal": "le",
    "greater": "gt",
    "greater_equal": "ge",
    "not_equal": "ne",
    "matmul": "dot",
    "vdot": "dot",
    "inner": "dot",
}
"""Other names of functions."""

_WRITTEN = {
    "truediv": "div",
    "floordiv": "floor_divide",
    "mod": "remainder",
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
    "invert": "bitwise_not",
    "lshift": "bitwise_left_shift",
    "rshift": "bitwise_right_shift",
}
"""The functions of Python's operators that are called otherwise."""


def _names() -> dict[Any, str]:
    """The names of PyTorch's functions: a compiler that traces a call knows the function alone."""
    found = {}
    for name in (*_KNOWN, *_SAME, *_POINTWISE):
        for home in (torch, Tensor, torch.nn.functional):
            found[getattr(home, name, None)] = name
        found[getattr(Tensor, f"__{name}__", None)] = name
    for name, meaning in _WRITTEN.items():
        found[getattr(Tensor, f"__{name}__", None)] = meaning
    del found[None]
    return found


_NAMES = _names()
