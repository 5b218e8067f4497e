"""Checks of the elements that a kernel touches in Triton's interpreter: only its operands'."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.triton.interpreter import Interpreted

Array = NDArray[Any]


class Fault(AssertionError):
    """A kernel touched a wrong element, or did not write an element of its result."""


@contextmanager
def bounded(read: Sequence[Any], written: Sequence[Any]) -> Iterator[None]:
    """A context in which kernels read only these tensors, and write each of `written` once.

    The gaps between the elements of a view are no part of it. `written` may also be read.
    """
    from triton.runtime import interpreter

    readable = _join(addresses(tensor) for tensor in (*read, *written))
    writable = _join(addresses(tensor) for tensor in written)
    counts = np.zeros(len(writable), int)
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def create_masked_load(self: Any, places: Any, mask: Any, *rest: Any, **how: Any) -> Any:
        _find("reads", readable, places, mask)
        return load(self, places, mask, *rest, **how)

    def create_masked_store(
        self: Any, places: Any, value: Any, mask: Any, *rest: Any, **how: Any
    ) -> Any:
        np.add.at(counts, _find("writes", writable, places, mask), 1)
        return store(self, places, value, mask, *rest, **how)

    with (
        mock.patch.object(builder, "create_masked_load", create_masked_load),
        mock.patch.object(builder, "create_masked_store", create_masked_store),
    ):
        yield
    if (counts != 1).any():
        raise Fault(f"{(counts == 0).sum()} elements were not written, {(counts > 1).sum()} often")


@dataclass(frozen=True, eq=False)
class Watched(Interpreted):
    """The interpreter, which bounds kernels to their tensors by `bounded`.

    `written` names the arguments that a kernel writes. `replaced` is a part of its source, and the
    replacement.
    """

    written: tuple[str, ...] = ()
    replaced: tuple[str, str] = ("", "")

    def function(self, text: str, entry: str) -> Any:
        """The kernel of a source."""
        old, new = self.replaced
        assert old in text, f"{old!r} is not in the source"
        text = text.replace(old, new) if old else text
        return _Function(super().function(text, entry), self.written)


@dataclass(frozen=True)
class _Function:
    kernel: Any
    written: tuple[str, ...]

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*given: Any, **options: Any) -> None:
            named = dict(zip(self.kernel.arg_names, given, strict=False))
            named = {name: getattr(each, "base", each) for name, each in named.items()}
            tensors = {name: each for name, each in named.items() if hasattr(each, "data_ptr")}
            written = [tensors[name] for name in self.written if name in tensors]
            with bounded(list(tensors.values()), written):
                self.kernel[grid](*given, **options)

        return launch


def addresses(tensor: Any) -> Array:
    """The addresses of the elements of a tensor."""
    found = np.array(tensor.data_ptr(), np.int64)
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        found = found[..., None] + np.arange(length) * stride * tensor.element_size()
    return found.ravel()


def _join(parts: Iterator[Array]) -> Array:
    return np.unique(np.concatenate([np.empty(0, np.int64), *parts]))


def _find(does: str, known: Array, places: Any, mask: Any) -> Array:
    """The indices of addresses among the known addresses."""
    mask = np.broadcast_to(mask.data, places.data.shape)
    asked = places.data[mask].astype(np.int64)
    at = np.searchsorted(known, asked)
    wrong = at == len(known) if len(known) == 0 else known[at.clip(max=len(known) - 1)] != asked
    if wrong.any():
        raise Fault(f"the kernel {does} {wrong.sum()} elements outside of its operands")
    return at
