"""Machines of Triton's kernels: a GPU (`runtime`), or Triton's interpreter (`interpreter`)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from tilefold.backends import protocols
from tilefold.common.lru import LruCache

if TYPE_CHECKING:
    from torch import Tensor

ALIGNED = 16
"""Bytes: where a tile that a descriptor moves begins, and each of its rows."""


class ResourceError(RuntimeError):
    """A kernel needs more shared memory or registers than the GPU has; nothing was launched."""


class MachineCache:
    """The cache of a machine: the data of the newest plans."""

    def __init__(self) -> None:
        self.data: LruCache[dict[str, Tensor]] = LruCache(most=128, most_bytes=256 * 2**20)


class Machine(protocols.Machine):
    """A machine that runs Triton kernels."""

    architecture: str
    """The name of the architecture whose tables and limits plans follow: see `architectures`."""
    multiprocessors: int
    """The number of programs that run at the same time, if each fills a multiprocessor."""
    kept: MachineCache
    """The cache of copied data."""

    backend = "triton"
    aligned = 1
    reads_dlse = True

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the machine for people."""

    @property
    @abstractmethod
    def gluon(self) -> bool:
        """True if the machine takes kernels in Gluon."""

    @abstractmethod
    def active(self) -> AbstractContextManager[Any]:
        """A context in which launches go to this machine."""

    @abstractmethod
    def function(self, text: str, entry: str) -> Any:
        """The kernel of a source: `function[(programs,)](*arguments, num_warps=, num_stages=)`."""

    @abstractmethod
    def upload(self, array: NDArray[Any]) -> Tensor:
        """A copy of an array where kernels can read it."""

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """A contiguous tensor whose elements are not set."""

    @abstractmethod
    def launched(self, tensors: Sequence[Tensor]) -> None:
        """Keep memory alive until streams have read it.

        It is called after launches with the machine-owned tensors that they read.
        """

    def alignment(self, arrays: Mapping[str, Tensor]) -> int:
        """1 if every tensor begins at a multiple of 16 bytes, as descriptors ask, else 0."""
        return int(is_aligned16(arrays))


def is_aligned16(operands: Mapping[str, Tensor]) -> bool:
    """True if every operand begins at a multiple of 16 bytes, as tensor descriptors ask."""
    return all(
        tensor.data_ptr() % ALIGNED == 0
        for name, tensor in operands.items()
        if not protocols.is_extra(name.removeprefix("d"))
    )
