"""A machine for Metal kernels that records its requests, and the operands of small calls."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold import metal
from tilefold.backends.metal.dispatch import Emulated, Machine, MachineCache

Array = NDArray[Any]


@dataclass(eq=False)
class Recorder(Machine):
    """A machine that records its requests and computes nothing."""

    family: str = "apple9"
    kept: MachineCache = field(default_factory=MachineCache)
    texts: list[str] = field(default_factory=list)
    copied: list[Array] = field(default_factory=list)
    launched: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    gate: threading.Event | None = None
    begun: threading.Event = field(default_factory=threading.Event)
    error: str = ""
    pipeline_error: str = ""

    def compile(self, text: str) -> Any:
        self.texts.append(text)
        self.begun.set()
        assert self.gate is None or self.gate.wait(30)
        if self.error:
            raise SyntaxError(self.error)
        return _Library(self)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        return np.empty(shape, dtype)

    def upload(self, array: Array) -> Array:
        self.copied.append(array)
        return array

    check = Emulated.check


@dataclass
class _Library:
    machine: Recorder

    def __getattr__(self, name: str) -> Callable[..., None]:
        if self.machine.pipeline_error:
            raise RuntimeError(self.machine.pipeline_error)
        return lambda *args, **grid: self.machine.launched.append((name, args, grid))


def operands(len_q: int = 21, len_k: int = 35, dtype: str = "float32") -> list[Array]:
    drawn = np.random.default_rng(0)
    shapes = (1, 4, len_q, 12), (1, 2, len_k, 12), (1, 2, len_k, 9)
    return [drawn.standard_normal(shape).astype(dtype) for shape in shapes]


def forward(machine: Any, *given: Any, **options: Any) -> tuple[Array, Array]:
    return metal.attention(*given, machine=machine, **options)
