"""What a section of the benchmark is, and what stands around its measurements in their process.

A section is a list of jobs, the most wanted first, and a function that makes a row of each. It runs
in processes of its own (`workers`), so a kernel that hangs, or that spoils the GPU's context for
everything after it, costs one row. A measurement says which *part* of its row comes next (usually
an implementation); a part that ended its process is left out when the row is tried again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilefold.backends.triton.machine import Machine

Row = dict[str, Any]


class Avoided(Exception):
    """A part that is not run, and why: it ended a process before."""


class Lost(Exception):
    """The GPU answers this process no more."""


@dataclass(frozen=True)
class Settings:
    """What all sections are measured with. `machine` is "gpu" or "interpreter".

    The batch times the length is `tokens`, the heads times their dim are `width`. FlexAttention,
    which compiles anew for every length, is measured at those of `compiled`. `without` are forms of
    tilefold that are left out, each with the reason: see `canary`.
    """

    machine: str = "gpu"
    quick: bool = False
    tokens: int = 16384
    width: int = 2048
    dims: tuple[int, ...] = (128, 64, 256)
    lengths: tuple[int, ...] = (8192, 16384, 4096, 2048, 1024, 512)
    dtypes: tuple[str, ...] = ("bfloat16", "float16")
    compiled: tuple[int, ...] = (8192, 2048, 512)
    decoded: tuple[int, ...] = (8192, 131072)
    row_seconds: float = 0.6
    without: Mapping[str, str] = field(default_factory=dict)


INTERPRETED = Settings(
    machine="interpreter",
    tokens=64,
    width=32,
    dims=(16,),
    lengths=(64, 32),
    dtypes=("float16",),
    compiled=(),
    decoded=(600,),
    row_seconds=0.0,
)
"""Sizes for Triton's interpreter: it shows that a section works, and no speed."""


@dataclass(frozen=True)
class Stage:
    """Where kernels run: the machine of tilefold, the device as torch names it, and the forms that
    are not to run there, with reasons.
    """

    machine: Machine
    device: str
    without: Mapping[str, str] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        """Whether there are events and streams."""
        return self.device != "cpu"


def stage(settings: Settings) -> Stage:
    """The first GPU, or the interpreter. Raises NotImplementedError where it cannot serve."""
    if settings.machine == "interpreter":
        from tilefold.backends.triton.interpreter import Interpreted

        return Stage(Interpreted("sm_90"), "cpu", settings.without)
    from tilefold.backends.triton import runtime

    return Stage(runtime.gpu(0), "cuda:0", settings.without)


@dataclass
class Here:
    """What a measurement has around it: settings, the stage, and somebody to tell.

    `avoid` are parts that must not run, and why.
    """

    settings: Settings
    tell: Callable[[str], None] = lambda part: None
    avoid: Mapping[str, str] = field(default_factory=dict)
    _stage: Stage | None = None

    @property
    def stage(self) -> Stage:
        """Where kernels run, found when it is first asked for."""
        if self._stage is None:
            self._stage = stage(self.settings)
        return self._stage

    def begin(self, part: str) -> None:
        """Say which part comes next. Raises Avoided for one that ended a process before."""
        if part in self.avoid:
            raise Avoided(self.avoid[part])
        self.tell(part)

    def survive(self, error: Exception) -> str:
        """What an error says, in a line. Raises Lost where the GPU has gone with it."""
        text = said(error)
        if self._stage is not None and self._stage.on_gpu:
            import torch

            try:
                torch.cuda.synchronize()
                torch.zeros(1, device=self._stage.device).item()
            except Exception as lost:
                raise Lost(text) from lost
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
        return text

    def attempt(self, part: str, work: Callable[[], Any], reasons: dict[str, str]) -> Any:
        """The result of a part; None where it raised, and then `reasons` says why."""
        try:
            self.begin(part)
            return work()
        except Lost:
            raise
        except Exception as error:  # whatever is wrong on this machine is to be shown
            reasons[part] = self.survive(error)
            return None


@dataclass(frozen=True)
class Section:
    """A part of the benchmark; functions are those of a module, so that processes can be sent them.

    `share` is that of the time. `ready` are jobs that only compile, for several processes at once
    and ahead of the measurement: they are made by `prepare`. `workers` measure at the same time.
    A part that ended `patience` processes is left out of all other rows; `stall_seconds` without a
    word are a hang. The `first` jobs are worth more than the others of all sections.
    """

    name: str
    share: float
    jobs: Callable[[Settings], Sequence[str]]
    measure: Callable[[str, Here], Row]
    ready: Callable[[Settings], Sequence[str]] | None = None
    prepare: Callable[[str, Here], Row] | None = None
    workers: int = 1
    patience: int = 2
    stall_seconds: float = 120.0
    first: int = 0


def said(error: BaseException) -> str:
    """An error in a line."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) < 600 else text[:590] + " ..."


def processes() -> int:
    """How many processes may compile at the same time here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(12, (cores or 1) - 2))
