"""The files of `tilefold bench --save`: all rows as JSON and as CSV, and a plot of the speeds."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilefold.common.files import write_atomically

_COLOURS = ("#0b6e99", "#c9c5bd", "#e3a857", "#8aa399", "#b5838d", "#7d8597", "#d4c2a8", "#444")


@dataclass(frozen=True)
class Chart:
    """Bars: the speed of each implementation in each of the cases, 0 where it cannot."""

    labels: Sequence[str]
    speeds: Mapping[str, Sequence[float]]
    axis: str


def save(folder: Path, name: str, document: dict[str, Any], chart: Chart) -> None:
    """Write all three files of a document with "rows" and "machine"."""
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(document["rows"][0]))
    writer.writeheader()
    writer.writerows(document["rows"])
    write_atomically(folder / f"{name}.json", (json.dumps(document, indent=1) + "\n").encode())
    write_atomically(folder / f"{name}.csv", text.getvalue().encode())
    write_atomically(folder / f"{name}.png", _plot(document["machine"], chart))


def _plot(machine: dict[str, Any], chart: Chart) -> bytes:
    """A PNG of bars."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError("--save draws a plot: pip install 'tilefold[bench]'") from None
    cases, names = len(chart.labels), len(chart.speeds)
    figure = Figure(figsize=(8, 1.2 + 0.24 * cases * names), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / names
    bars = zip(chart.speeds.items(), _COLOURS, strict=False)
    for number, ((name, speeds), colour) in enumerate(bars):
        at = [index + number * height for index in range(cases)]
        drawn = axes.barh(at, speeds, height * 0.92, label=name, color=colour)
        labels = [f"{speed:.0f}" if speed else "cannot" for speed in speeds]
        axes.bar_label(drawn, labels, padding=3, fontsize=8)
    ticks = [index + 0.4 - height / 2 for index in range(cases)]
    axes.set_yticks(ticks, chart.labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(chart.axis, fontsize=9)
    axes.set_title(f"{machine['name']}, {machine['isa']}", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08, y=0.02)
    figure.legend(loc="outside lower center", ncols=names, frameon=False, fontsize=9)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    return image.getvalue()
