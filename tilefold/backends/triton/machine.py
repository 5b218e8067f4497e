"""What runs Triton's kernels: a GPU (`runtime`), or Triton's interpreter (`interpreter`)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from tilefold.common.lru import LruCache

if TYPE_CHECKING:
    from torch import Tensor


class ResourceError(RuntimeError):
    """A kernel needs more shared memory or registers than the GPU has; nothing was launched."""


class Machine(Protocol):
    """What runs kernels. `architecture` names the one whose tables and limits plans follow."""

    @property
    def architecture(self) -> str:
        """The name of the architecture: see `architectures`."""

    @property
    def name(self) -> str:
        """What people call it."""

    @property
    def kept(self) -> MachineCache:
        """What is held for the next call."""

    @property
    def multiprocessors(self) -> int:
        """How many programs run at the same time, if each takes all that one has."""

    @property
    def gluon(self) -> bool:
        """Whether it takes kernels in Gluon."""

    def active(self) -> AbstractContextManager[Any]:
        """While it is open, launches go to this machine."""

    def function(self, text: str, entry: str) -> Any:
        """The kernel of a text: `function[(programs,)](*arguments, num_warps=, num_stages=)`."""

    def upload(self, array: NDArray[Any]) -> Tensor:
        """A copy of an array where kernels can read it."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """A contiguous tensor whose numbers are not set."""

    def check(self, **tensors: Tensor) -> None:
        """Raises TypeError or ValueError for tensors that kernels cannot read."""

    def launched(self, tensors: Sequence[Tensor]) -> None:
        """Is told what the launches that were just made read, of what the machine holds."""


class MachineCache:
    """What a machine holds for the next call: the newest plans' data, and prepared calls."""

    def __init__(self) -> None:
        self.data: LruCache[dict[str, Tensor]] = LruCache(most=128, most_bytes=256 * 2**20)
        self.calls: LruCache[Any] = LruCache(most=128, most_bytes=256 * 2**20)
