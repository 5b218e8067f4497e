"""How long the stages of a kernel take: ticks of a clock, summed by worker, in kernels that count.

    begin(stage):  now <- clock;  spent[current] += now - since;  since <- now;  current <- stage

A kernel whose spec names no clock has none of this in its source.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tilefold.backends.cpu.kernels.arguments import Arguments
from tilefold.backends.cpu.kernels.ir import Body, Value
from tilefold.backends.cpu.spec import STAGES, KernelSpec

TICKS = "ticks"
"""The operand to which workers add what they spent: int64, (workers, stages)."""


@contextmanager
def counted(body: Body, spec: KernelSpec, arguments: Arguments, worker: Value) -> Iterator[None]:
    """The work of a worker; its stages are counted if the spec names a clock."""
    if not spec.clock:
        yield
        return
    stages = Stages(body, spec.clock)
    body.stage = stages.begin
    yield
    stages.add(body.offset(arguments[TICKS], "i64", body.mul(worker, len(STAGES)), "line"))


class Stages:
    """The clock of one worker, whose first stage is the first of `STAGES`."""

    def __init__(self, body: Body, clock: str) -> None:
        self._body, self._clock = body, clock
        self._since = body.variable("i64", read_clock(body, clock), "since")
        self._current = body.variable("i64", Value("0", "i64"), "stage")
        spent = body.variable(f"[{len(STAGES)} x i64]", None, "spent")
        self._spent = Value(spent.address, "ptr")
        for number in range(len(STAGES)):
            body.store(Value("0", "i64"), body.offset(self._spent, "i64", number))

    def begin(self, name: str) -> None:
        """What was done since the last call is of the stage before; now this one begins."""
        body, now = self._body, read_clock(self._body, self._clock)
        place = body.offset(self._spent, "i64", body.read(self._current, "stage"))
        passed = body.sub(now, body.read(self._since), "passed")
        body.store(body.add(body.load(place, "i64", "spent"), passed), place)
        body.write(self._since, now)
        body.write(self._current, Value(str(STAGES.index(name)), "i64"))

    def add(self, line: Value) -> None:
        """The end of the worker: its sums are added to its line of the operand."""
        body = self._body
        self.begin(STAGES[0])
        for number in range(len(STAGES)):
            target = body.offset(line, "i64", number)
            spent = body.load(body.offset(self._spent, "i64", number), "i64", "spent")
            body.store(body.add(body.load(target, "i64"), spent), target)


def read_clock(body: Body, clock: str) -> Value:
    """The ticks of a clock: "rdtsc" of x86, or a register of ARM, "cntvct_el0"."""
    if clock == "rdtsc":
        return body.call("llvm.readcyclecounter", "i64", [], "now")
    register = Value(f'!{{!"{clock}"}}', "metadata")
    return body.call("llvm.read_volatile_register.i64", "i64", [register], "now")
