"""Scalar tensors that stand for the score and the indices of a pair, while a function is traced.

A `Symbol` has a node of the language of rules and scores. What the language lacks, such as rounding
a logarithm, is computed by PyTorch for all values of the one integer that it depends on (`root`),
and becomes a table. So tables have PyTorch's own rounding, and gradients by its autograd.

`torch.compile` traces all of this too, with the functions that it traces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from tilefold.common.foreign_arrays import compiled_by_torch, constant_of
from tilefold.frontends.torch.observed import faked
from tilefold.masks.expression import Expression
from tilefold.masks.tables import Given, Input

INT32 = (-(2**31), 2**31 - 1)
FREE = "free"
"""The root of what depends on no index: it goes along with any other."""

Again = Callable[..., Any]
"""What an operation does, with tensors in the places of symbols."""


class Tracing:
    """What a traced function has read: tensors, by the numbers of their tables.

    `known` tells whether tensors have values, which they have not where a compiler traces.
    """

    def __init__(self) -> None:
        compiling = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        self.known = not (compiling or faked())
        self.inputs: list[Tensor] = []
        self.tables: list[Tensor] = []

    def input(self, tensor: Tensor) -> Input:
        """The table of floats that reads a tensor."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        return Input(_place(self.inputs, tensor), dtype, constants(tuple(tensor.shape)))

    def table(self, tensor: Tensor) -> Given:
        """The table of integers or truths that reads a tensor."""
        truths = tensor.dtype == torch.bool
        place = _place(self.tables, tensor)
        dtype, (low, high) = ("bool", (0, 1)) if truths else ("int32", INT32)
        return Given(tuple(tensor.shape), dtype, low, high, place, tensor)


def constants(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes as numbers; a compiler guards those that it has as symbols."""
    if not compiled_by_torch():
        return sizes
    return tuple([constant_of(size) for size in sizes])


def _place(tensors: list[Tensor], tensor: Tensor) -> int:
    for place, known in enumerate(tensors):
        if known is tensor:
            return place
    tensors.append(tensor)
    return len(tensors) - 1


class Unexpressed(NotImplementedError):
    """An operation that the language has not."""


class Symbol:
    """A scalar tensor while a function is traced.

    `kind` is "int", "bool" or "real"; `bounds` hold an integer. `root` is the one integer that
    decides the value, None where there are several, and `FREE` where there is none; `again`
    computes the value from it.
    """

    ndim = 0
    shape = torch.Size([])
    requires_grad = False
    applied: ClassVar[Callable[..., Any]]
    """What applies a function of PyTorch, given its name: `tracing` puts it here."""

    def __init__(
        self,
        tracing: Tracing,
        kind: str,
        make: Callable[[], Any],
        bounds: tuple[int, int] = INT32,
        root: Any = None,
        again: Again | None = None,
    ) -> None:
        self.tracing, self.kind, self.make = tracing, kind, make
        self.low, self.high = bounds
        self.root = self if root is None and kind == "int" else root
        self.again: Any = _itself if root is None else again
        self.kept: Any = None

    @property
    def node(self) -> Any:
        """The node of the language, made when it is first asked for."""
        if self.kept is None:
            self.kept = self.make()
        return self.kept

    @property
    def dtype(self) -> torch.dtype:
        """The type that PyTorch would give it."""
        return _DTYPES[self.kind]

    @property
    def device(self) -> torch.device:
        """The processor, whatever tensors it reads."""
        return torch.device("cpu")

    def __getattr__(self, name: str) -> Any:
        """A method of tensors."""
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"a scalar tensor of FlexAttention has no attribute {name!r}")
        return lambda *given, **options: Symbol.applied(name, (self, *given), options)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, given: Any = (), options: Any = None
    ) -> Any:
        """What a function of PyTorch makes of symbols."""
        return Symbol.applied(function, given, options or {})

    def __bool__(self) -> bool:
        raise NotImplementedError(
            "the truth of a symbol is not known while a function is traced: write torch.where, and"
            " & | ~ in place of `if`, `and`, `or`, `not`"
        )

    def __index__(self) -> int:
        raise NotImplementedError(
            "an index of a pair has no value while a function is traced: it may index tensors, and"
            " neither lists nor arrays of NumPy"
        )

    __int__ = __index__

    def __float__(self) -> float:
        raise NotImplementedError("a symbol has no value while a function is traced: .float()")

    def __hash__(self) -> int:
        return id(self)


_DTYPES = {"int": torch.int64, "bool": torch.bool, "real": torch.float32}

_OPERATORS = {
    **{name: name for name in ("add", "sub", "mul", "pow", "neg", "abs")},
    **{name: name for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    "truediv": "true_divide",
    "floordiv": "floor_divide",
    "mod": "remainder",
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
    "invert": "bitwise_not",
    "lshift": "bitwise_left_shift",
    "rshift": "bitwise_right_shift",
}
"""PyTorch's functions of Python's operators."""


def _operator(name: str) -> Callable[..., Any]:
    return lambda self, *others: Symbol.applied(name, (self, *others), {})


def _reflected(name: str) -> Callable[..., Any]:
    return lambda self, other: Symbol.applied(name, (other, self), {})


for _name, _function in _OPERATORS.items():
    setattr(Symbol, f"__{_name}__", _operator(_function))
    if _name not in ("neg", "abs", "invert", "lt", "le", "gt", "ge", "eq", "ne"):
        setattr(Symbol, f"__r{_name}__", _reflected(_function))


def _itself(values: Any) -> Any:
    return values


def made(
    given: Sequence[Symbol],
    kind: str,
    make: Callable[[], Any],
    again: Again,
    bounds: tuple[int, int] = INT32,
) -> Symbol:
    """The symbol that an operation makes of symbols; `again` does it with tensors."""
    root = root_of(given)
    return Symbol(
        given[0].tracing, kind, make, bounds, root, lambda values: again(*replayed(given, values))
    )


def root_of(given: Sequence[Any]) -> Any:
    """The one root of all symbols among values; None where they have several."""
    found: Any = FREE
    for symbol in given:
        if not isinstance(symbol, Symbol) or isinstance(symbol.root, str):
            continue
        if symbol.root is None:
            return None
        if isinstance(found, str):
            found = symbol.root
        elif found is not symbol.root and not alike(found.node, symbol.root.node):
            return None
    return found


def replayed(given: Sequence[Any], values: Any) -> list[Any]:
    """Values with tensors in the places of symbols, for a tensor of their root's values."""
    return [x.again(values) if isinstance(x, Symbol) else x for x in given]


def alike(left: Expression, right: Expression) -> bool:
    """True for the same tree."""
    if left is right:
        return True
    if type(left) is not type(right) or left.label != right.label:
        return False
    pairs = zip(left.children, right.children, strict=True)
    return all(alike(*pair) for pair in pairs)
