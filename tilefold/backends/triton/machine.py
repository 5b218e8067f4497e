"""What runs Triton's kernels: a GPU (`runtime`), or Triton's interpreter (`interpreter`)."""

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
    """What a machine holds for the next call: the data of the newest plans."""

    def __init__(self) -> None:
        self.data: LruCache[dict[str, Tensor]] = LruCache(most=128, most_bytes=256 * 2**20)


class Machine(protocols.Machine):
    """What runs kernels."""

    architecture: str
    """The name of the architecture whose tables and limits plans follow: see `architectures`."""
    multiprocessors: int
    """How many programs run at the same time, if each takes all that one has."""
    kept: MachineCache
    """What is held for the next call."""

    backend = "triton"
    aligned = 1

    @property
    @abstractmethod
    def name(self) -> str:
        """What people call it."""

    @property
    @abstractmethod
    def gluon(self) -> bool:
        """True where it takes kernels in Gluon."""

    @abstractmethod
    def active(self) -> AbstractContextManager[Any]:
        """While it is open, launches go to this machine."""

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
        """Called after launches with the machine-owned tensors they read, so that their memory
        outlives the stream."""

    def alignment(self, arrays: Mapping[str, Tensor]) -> int:
        """1 where every tensor begins where a descriptor may, else 0."""
        return int(is_aligned16(arrays))


def is_aligned16(operands: Mapping[str, Tensor]) -> bool:
    """True where every operand begins where a descriptor may."""
    return all(tensor.data_ptr() % ALIGNED == 0 for tensor in operands.values())
