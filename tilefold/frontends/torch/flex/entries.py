"""Entries of tensors at symbols, and tables of what PyTorch computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tilefold.frontends.torch.flex.symbols import (
    FREE,
    INT32,
    Symbol,
    Tracing,
    Unexpressed,
    constants,
    replayed,
    root_of,
)
from tilefold.masks.expression import (
    Constant,
    Expression,
    Lookup,
    RealConstant,
    RealLookup,
    Truth,
    TruthLookup,
)

MOST_VALUES = 2**22
"""The largest table that is computed: of relative positions it serves 2 million tokens."""


def number(tracing: Tracing, value: Any) -> Symbol:
    """A number, a truth or a tensor of one element as a symbol; a symbol as it is."""
    if isinstance(value, Symbol):
        return value
    if isinstance(value, Tensor) and not value.ndim:
        return entry(tracing, value, ())
    kind, bounds, node = "real", INT32, RealConstant  # type: Any, Any, Any
    if isinstance(value, (bool, torch.SymBool)):
        kind, node = "bool", Truth
    elif isinstance(value, (int, torch.SymInt)):
        kind, bounds, node = "int", (value, value), Constant
    elif not isinstance(value, (float, torch.SymFloat)):
        value = _refused(value)
    return Symbol(tracing, kind, lambda: node(value), bounds, FREE, lambda _: torch.tensor(value))


def _refused(value: Any) -> float:
    """The value of another number. Raises NotImplementedError for tensors that are no scalars."""
    if isinstance(value, (Tensor, Row)):
        shape = value.shape if isinstance(value, Tensor) else value.tensor.shape
        raise NotImplementedError(
            "flex_attention: a modification computes with scalars, got a part of a tensor of shape"
            f" {tuple(shape)}; index all of its axes"
        )
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"flex_attention: a modification computes with numbers, got {type(value).__name__}"
        ) from None


def computed(name: str, function: Callable[..., Any], given: Sequence[Any]) -> Symbol:
    """The symbol of an operation that the language has not: a table of what PyTorch computes.

    Raises NotImplementedError where it depends on more than one integer.
    """
    tracing, root = next(x for x in given if isinstance(x, Symbol)).tracing, root_of(given)
    if root is None or isinstance(root, str):
        raise Unexpressed(
            f"flex_attention: {name} of a score, or of several indices, is not in the language of"
            " kernels, which has + - * /, abs, exp, log, tanh, sigmoid, sqrt, minimum, maximum,"
            " where, comparisons, and entries of tensors"
        )

    def again(values: Any) -> Any:
        return function(*replayed(given, values))

    dtype = again(torch.zeros(1, dtype=torch.int64)).dtype
    kind, bounds = kind_of(dtype), INT32
    if kind == "int" and tracing.known:
        bounds = bounds_of(again(values_of(root)).clamp(*INT32))
    return Symbol(tracing, kind, lambda: _tabulated(tracing, root, again), bounds, root, again)


def kind_of(dtype: torch.dtype) -> str:
    """The kind of a symbol of a type."""
    if dtype == torch.bool:
        return "bool"
    if dtype.is_complex:
        raise NotImplementedError("flex_attention: a modification computes with no complex numbers")
    return "real" if dtype.is_floating_point else "int"


def bounds_of(tensor: Tensor) -> tuple[int, int]:
    """The least and the largest of some integers. Raises ValueError unless they fit 32 bits."""
    if not tensor.numel():
        return 0, 0
    values = tensor.detach().cpu().numpy()  # PyTorch's own minimum takes no uint16 and larger
    low, high = int(values.min()), int(values.max())
    if low < INT32[0] or high > INT32[1]:
        raise ValueError(
            f"flex_attention: integers of a tensor must fit 32 bits, got {low} to {high}; number"
            " them by torch.unique(x, return_inverse=True)"
        )
    return low, high


def values_of(root: Symbol) -> Tensor:
    """All values of an integer. Raises NotImplementedError where these are too many."""
    root.low, root.high = constants((root.low, root.high))
    if root.high - root.low >= MOST_VALUES:
        raise Unexpressed(
            f"flex_attention: an operation that the language of kernels has not needs a table of"
            f" {root.high - root.low + 1} values; at most {MOST_VALUES} are made"
        )
    return torch.arange(root.low, root.high + 1)


def _tabulated(tracing: Tracing, root: Symbol, again: Callable[[Any], Any]) -> Any:
    entries = again(values_of(root))
    if not entries.is_floating_point() and entries.dtype != torch.bool:
        entries = entries.clamp(*INT32)  # infinity as an integer, where it is not chosen
    return _node(tracing, entries, (root.node - root.low,))


def _node(tracing: Tracing, tensor: Tensor, at: tuple[Any, ...]) -> Any:
    """The node that reads a tensor."""
    if tensor.is_floating_point():
        return RealLookup(tracing.input(tensor), at)
    kind = TruthLookup if tensor.dtype == torch.bool else Lookup
    return kind(tracing.table(tensor), at)


def read(tensor: Any, index: Any) -> Any:
    """`tensor[index]`, where symbols are among the indices."""
    indices = index if isinstance(index, tuple) else (index,)
    tracing = next(x for x in indices if isinstance(x, Symbol)).tracing
    if indices[0] is Ellipsis:
        indices = (slice(None),) * (tensor.ndim - len(indices) + 1) + indices[1:]
    if len(indices) > tensor.ndim:
        raise IndexError(
            f"flex_attention: {len(indices)} indices for a tensor of {tensor.ndim} axes"
        )
    found = []
    for x in indices:
        value = x.item() if isinstance(x, Tensor) and tracing.known else x
        if isinstance(value, Tensor):
            value = entry(tracing, value, ())
        if not isinstance(value, (Symbol, int)) or getattr(value, "kind", "int") != "int":
            raise NotImplementedError(
                "flex_attention: beside an index of a pair each axis takes an integer, got"
                f" {type(value).__name__}"
            )
        found.append(value)
    return Row(tensor, tuple(found)) if len(found) < tensor.ndim else entry(tracing, tensor, found)


def entry(tracing: Tracing, tensor: Tensor, indices: Sequence[Any]) -> Symbol:
    """The entry of a tensor at an index for each of its axes.

    An index that is read from a table is composed with the tensor. So gradients, and programs of
    compilers, go through PyTorch's own indexing.

    Raises IndexError where an index may lie outside.
    """
    kind, bounds = kind_of(tensor.dtype), INT32
    if tracing.known and not indices and (kind != "real" or _is_infinite(tensor)):
        return number(tracing, tensor.item())
    if kind != "real" and tracing.known:
        bounds = bounds_of(tensor) if kind == "int" else (0, 1)

    def make() -> Any:
        at, rows = [], tensor if indices else tensor.reshape(1)
        for axis, index in enumerate(indices):
            rows, node = _placed(rows, axis, index)
            at.append(node)
        return _node(tracing, rows, tuple(at) or (Constant(0),))

    def again(values: Any) -> Any:
        found = tensor[tuple(replayed(indices, values))] if indices else tensor
        return found.long() if kind == "int" else found  # kernels do not compute with 8 or 16 bits

    return Symbol(tracing, kind, make, bounds, root_of(indices), again)


def _is_infinite(tensor: Tensor) -> bool:
    """True for an infinite constant: tiles that it hides are skipped, as those of a float are."""
    return not tensor.requires_grad and type(tensor) is Tensor and bool(tensor.isinf())


def _placed(tensor: Tensor, axis: int, index: Any) -> tuple[Tensor, Any]:
    """The tensor and the node that read the entries at an index, which may be negative."""
    size = tensor.shape[axis]
    if not isinstance(index, Symbol):
        return tensor, Constant(index + size if index < 0 else index)
    root, known = index.root, index.tracing.known
    if isinstance(root, str):  # the same number for all pairs
        return tensor, index.node + size if index.low == index.high < 0 else index.node
    own = root is index
    if not known and (own or root.high - root.low >= MOST_VALUES) and _reads(index.node):
        return tensor, index.node  # entries are not known, and checked when the graph runs
    if index.low >= 0 and index.high < size and (own or not _reads(index.node)):
        return tensor, index.node
    entries = index.again(values_of(root))
    low, high = index.low, index.high
    if not own:
        low, high = bounds_of(entries) if known else (0, 0)
    if low < -size or high >= size:
        raise IndexError(
            f"flex_attention: the indices {low} to {high} may be asked of axis {axis} of a tensor"
            f" of shape {tuple(tensor.shape)}; keep them inside by torch.clamp"
        )
    entries = torch.where(entries < 0, entries + size, entries)
    return tensor.index_select(axis, entries), root.node - root.low


def _reads(node: Expression) -> bool:
    """True for an integer that is read from a table."""
    return isinstance(node, Lookup) or any(_reads(child) for child in node.children)


class Row:
    """A tensor of whose axes only the first ones are indexed."""

    def __init__(self, tensor: Tensor, indices: tuple[Any, ...]) -> None:
        self.tensor, self.indices = tensor, indices

    def __getitem__(self, index: Any) -> Any:
        """An entry, or a smaller part."""
        more = index if isinstance(index, tuple) else (index,)
        return read(self.tensor, self.indices + more)

    def entries(self) -> list[Any]:
        """All entries of a vector. Raises NotImplementedError for more axes."""
        if self.tensor.ndim != len(self.indices) + 1:
            raise NotImplementedError("flex_attention: index all axes of a tensor, or all but one")
        return [self[place] for place in range(self.tensor.shape[-1])]

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, given: Any = (), options: Any = None
    ) -> Any:
        """What a function of PyTorch makes of vectors."""
        return Symbol.applied(function, given, options or {})
