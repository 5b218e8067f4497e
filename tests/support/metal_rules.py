"""A stand-in for `torch.mps.compile_shader` on a machine without Metal: its rules, and results.

The rules are PyTorch's rules for arguments: sources in ASCII, plain Python numbers and lists,
tensors on the device, at most 31 buffers, at most 4 KiB in a list, and grids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from tilefold.backends.metal import emulate

MOST_BUFFERS = 31
MOST_LIST_BYTES = 4096
MOST_THREADS = 1024


@dataclass
class Compiler:
    """A stand-in for `compile_shader`; `texts` holds compiled sources, `calls` the kernels run."""

    device: str = "cpu"
    check: str = "fast"
    texts: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    def __call__(self, source: str) -> Library:
        source.encode("ascii")
        self.texts.append(source)
        return Library(self, emulate.compile_shader(source, check=self.check))


@dataclass
class Library:
    compiler: Compiler
    inner: Any

    def __getattr__(self, name: str) -> Kernel:
        return Kernel(self.compiler, name, getattr(self.inner, name))


@dataclass
class Kernel:
    compiler: Compiler
    name: str
    inner: Any

    def __call__(self, *args: Any, threads: Any = None, group_size: Any = None) -> None:
        assert len(args) <= MOST_BUFFERS, f"{len(args)} buffers"
        for position, value in enumerate(args):
            check(f"argument {position} of {self.name}", value, self.compiler.device)
        for grid in (threads, group_size):
            assert type(grid) is tuple and 0 < len(grid) <= 3, grid
            assert all(type(number) is int and number > 0 for number in grid), grid
        assert len(threads) == len(group_size)
        assert math.prod(group_size) <= MOST_THREADS
        self.compiler.calls.append(self.name)
        self.inner(*args, threads=threads, group_size=group_size)


def check(name: str, value: Any, device: str) -> None:
    """Raise AssertionError for an argument that torch would refuse or bind to nothing."""
    if isinstance(value, torch.Tensor):
        assert value.device.type == device, f"{name} is on {value.device}"
        assert value.dtype != torch.float64, f"{name} is float64, which MPS does not have"
        assert value.numel(), f"{name} has no memory to bind"
        return
    if isinstance(value, (list, tuple)):
        kinds = {type(item) for item in value}
        assert len(kinds) == 1 and kinds <= {int, float}, f"{name} holds {kinds or 'nothing'}"
        size = 8 if kinds == {int} else 4
        assert size * len(value) <= MOST_LIST_BYTES, f"{name} has {len(value)} numbers"
        return
    assert type(value) in (int, float), f"{name} is a {type(value)}"
