"""`tilefold inspect --profile`: the stages of a call, beside what they take at least."""

from __future__ import annotations

from typing import Any

from tilefold.backends.cpu.device import Device
from tilefold.commands import terminal
from tilefold.measuring.stages import Profile

BAR = 24
"""Letters of the longest bar."""


def document(found: Profile, device: Device) -> dict[str, Any]:
    """A profile as plain values."""
    return {
        "device": {"name": device.name, "isa": device.isa, "workers": found.case.threads},
        "operation": found.case.operation,
        "shape": found.case.shape,
        "mask": str(found.case.problem.mask),
        "seconds": found.seconds,
        "seconds_without_counting": found.plain,
        "stages": dict(found.stages) | {"waiting": found.waiting},
        "least": dict(found.bounds),
    }


def show(found: Profile, device: Device) -> None:
    """A line for each stage that takes time: its share, its bar, its bound and their ratio."""
    stages = {**found.stages, "waiting": found.waiting}
    longest = max(stages.values())
    rows = []
    for name, seconds in stages.items():
        if seconds < 1e-3 * found.seconds:
            continue
        least = found.bounds.get(name)
        rows.append(
            [
                name,
                terminal.seconds(seconds),
                f"{seconds / found.seconds:.1%}",
                terminal.seconds(least) if least else "",
                f"{least / seconds:.0%}" if least else "",
                "█" * round(BAR * seconds / longest),
            ]
        )
    case = found.case
    title = f"{case.operation} {case.shape} {case.rule}, {device.isa}, threads: {case.threads}"
    columns = ["", ">time", ">share", ">least", ">reached", ""]
    console = terminal.out()
    console.print(terminal.table(title, columns, rows))
    console.print(
        f"a call takes {terminal.seconds(found.plain)}; counting adds {found.cost:.1%}; times are"
        " the mean of the threads; least: products and exponentials at the measured rates"
    )
