"""The frontends by the class of their arrays: one row for each framework.

A framework is looked up among the modules that the program has already imported, as einops does, so
tilefold never imports an unused framework. NumPy views arrays of frameworks outside of the table;
those that name their library get results of its kind.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from tilefold.common.first_use import imported


@dataclass(frozen=True, eq=False)
class Row:
    """A framework: its array classes, the noun for one array, and the import of its frontend."""

    kinds: tuple[str, ...]
    noun: str
    frontend: Callable[[], ModuleType]


@imported
def _first(framework: str) -> None:
    """Import a frontend; `torch.compile`, which traces its callers, can keep None as a constant."""
    import_module(f"tilefold.frontends.{framework}")


def _numpy() -> ModuleType:
    _first("numpy")
    from tilefold.frontends import numpy

    return numpy


def _torch() -> ModuleType:
    _first("torch.calls")
    from tilefold.frontends.torch import calls

    return calls


def _standard() -> ModuleType:
    _first("standard")
    from tilefold.frontends import standard

    return standard


def _tensorflow() -> ModuleType:
    _first("tensorflow.tensors")
    from tilefold.frontends.tensorflow import tensors

    return tensors


def _jax() -> ModuleType:
    _first("jax.calls")
    from tilefold.frontends.jax import calls

    return calls


FRONTENDS = {
    "torch": Row(("Tensor",), "torch tensor", _torch),
    "jax": Row(("Array",), "jax array", _jax),
    "tensorflow": Row(("Tensor", "Variable"), "TensorFlow tensor", _tensorflow),
}
"""The frameworks by the names of their modules."""

_known: dict[type, ModuleType] = {}
"""The frontends of plain array types met before: a look-up is faster than asking torch again."""


def find(**arrays: Any) -> ModuleType:
    """The frontend of all arguments. Raises TypeError if they belong to different frameworks."""
    kinds = {*map(type, arrays.values())}
    kind = kinds.pop()
    if not kinds and kind in _known:
        return _known[kind]
    found = _of_classes(arrays)
    if kind in found.PLAIN:
        _known[kind] = found
    return found


def _of_classes(arrays: dict[str, Any]) -> ModuleType:
    """The frontend of arrays by the table."""
    for framework, row in FRONTENDS.items():
        module = sys.modules.get(framework)
        its = tuple([getattr(module, kind, ()) for kind in row.kinds])
        names = [name for name, array in arrays.items() if isinstance(array, its)]
        if 0 < len(names) < len(arrays):
            other = next(name for name in arrays if name not in names)
            raise TypeError(
                f"{other} must be a {row.noun} as {names[0]} is, got {type(arrays[other]).__name__}"
            )
        if names:
            return row.frontend()
    numpy = _numpy()
    from tilefold.frontends.foreign import namespaces

    return _standard() if namespaces(**arrays) else numpy
