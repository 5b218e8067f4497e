"""What `tilefold tune` measured on the CPU: as plain values, and as tables of a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from tilefold.commands import terminal
from tilefold.measuring import tuning
from tilefold.measuring.tuning import Measured

B = TypeVar("B")


def trials(measured: Measured[B], sizes: Callable[[B], dict[str, int]]) -> dict[str, Any]:
    """The winner, its gain and all candidates as plain values. `sizes` are those of blocks."""
    return {
        "table": str(measured.table),
        "winner": str(measured.best.blocks),
        "gain": 1 / measured.best.ratio - 1,
        "candidates": [
            {
                "blocks": str(trial.blocks),
                **sizes(trial.blocks),
                "seconds": measured.timed(trial).seconds,
                "ratio": trial.ratio,
                "rounds": trial.rounds,
                "share_faster": trial.share,
                "last_stage": trial.last,
            }
            for trial in measured.trials
        ],
    }


def show(
    document: dict[str, Any], title: Callable[[dict[str, Any]], str], sizes: Mapping[str, str]
) -> None:
    """A table for each kernel, with a column for each of some `sizes`, and where winners are."""
    console = terminal.out()
    machine = document["machine"]
    console.print(f"{machine['name']}, {machine['isa']}")
    for tuned in document["kernels"]:
        console.print()
        console.print(_candidates(tuned, title(tuned), sizes))
        console.print(_verdict(tuned))
    console.print()
    kept = f"kept in {document['path']}" if document["path"] else "nothing kept (--dry-run)"
    console.print(kept, soft_wrap=True, markup=False)


def _candidates(tuned: dict[str, Any], title: str, sizes: Mapping[str, str]) -> Any:
    marks = {tuned["table"]: "the table's row", tuned["winner"]: "winner"}
    if tuned["table"] == tuned["winner"]:
        marks[tuned["winner"]] = "winner, the table's row"
    rows = []
    for trial in tuned["candidates"]:
        rows.append(
            [
                f"{trial['rows']}x{trial['vectors']}",
                *(str(trial[name]) for name in sizes),
                terminal.seconds(trial["seconds"]),
                f"{trial['ratio']:.3f}",
                str(trial["rounds"]),
                marks.get(trial["blocks"], ""),
            ]
        )
    columns = ["tile", *(f">{name}" for name in sizes.values()), ">time", ">ratio", ">rounds", ""]
    count = f"{tuned['threads']} thread{'s' * (tuned['threads'] > 1)}"
    return terminal.table(f"{title}, {count}", columns, rows)


def _verdict(tuned: dict[str, Any]) -> str:
    if tuned["winner"] == tuned["table"]:
        return f"the table's row stays: nothing is surely {tuning.LEAST_GAIN:.0%} faster"
    return f"{tuned['winner']} is {tuned['gain']:.1%} faster than the table's row"
