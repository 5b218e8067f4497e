"""`tilefold bench`: this machine, against the peers that are installed, turn by turn."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tilefold import bench, parse
from tilefold.backends.cpu import peak, threads
from tilefold.bench import Row
from tilefold.choice import multiplier
from tilefold.circumstances import circumstances
from tilefold.commands import specification, terminal
from tilefold.device import host
from tilefold.files import write_atomically
from tilefold.mask import Rule
from tilefold.peers import PEERS
from tilefold.problem import ITEM_BYTES
from tilefold.roofline import Rates
from tilefold.spec import Multiplier
from tilefold.workload import OPERATIONS, PASSES, Case

SHAPES = ("1,8,2048,64", "1,8,2048,128")
MASKS = ("full()", "causal()")


def register(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "bench",
        help="measure this machine, with the peers that are installed",
        description="Measure tilefold and other implementations turn by turn in one process."
        " Options with several values measure every combination.",
        epilog=terminal.EXIT_CODES,
    )
    parser.set_defaults(main=main)
    parser.add_argument("--shape", nargs="+", default=SHAPES, metavar=specification.SHAPE)
    specification.add_sizes(parser)
    specification.add_precision(parser)
    parser.add_argument("--dtype", nargs="+", choices=tuple(ITEM_BYTES), default=["float32"])
    parser.add_argument("--mask", nargs="+", default=MASKS, metavar="RULE")
    parser.add_argument("--operation", nargs="+", choices=tuple(PASSES), default=list(OPERATIONS))
    parser.add_argument("--threads", nargs="+", type=int, help="default: 1, and as many as cores")
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=tuple(PEERS),
        help="default: torch, if it is installed; --peers alone for none",
    )
    parser.add_argument("--sweep", action="store_true", help="measure other block sizes too")
    parser.add_argument("--seconds", type=float, default=2.0, help="per combination (default 2)")
    parser.add_argument("--save", metavar="FOLDER", help="write JSON, CSV and a PNG plot there")
    parser.add_argument("--name", default="attention", help="of the saved files")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def main(options: argparse.Namespace) -> int:
    """Measure every combination and show the table."""
    if not options.seconds > 0:
        raise ValueError(f"--seconds must be more than 0, not {options.seconds}")
    peers = _peers(options.peers)
    cases = _cases(options)
    found: list[list[Row]] = []
    with terminal.progress() as bar:
        task = bar.add_task("Measuring", total=len(cases))
        for case in cases:
            bar.update(task, description=_label(case))
            seconds, sweep = options.seconds, options.sweep
            found.append(bench.measure(case, peers, seconds=seconds, sweep=sweep))
            bar.advance(task)
    rates = _rates(cases)
    document = _document(found, rates)
    if options.save:
        _save(Path(options.save), options.name, document, found, peers)
    if options.json:
        terminal.print_json(document)
    else:
        _show(found, peers, rates)
        if options.sweep:
            _show_sweep(found)
        if options.save:
            terminal.out().print(f"written to {options.save}/{options.name}.json, .csv and .png")
    return 0


def _peers(wanted: Sequence[str] | None) -> list[str]:
    if wanted is None:
        return ["torch"] if PEERS["torch"].missing is None else []
    for name in wanted:
        if missing := PEERS[name].missing:
            raise ModuleNotFoundError(f"the peer {name} is not installed: pip install {missing}")
    return list(wanted)


def _cases(options: argparse.Namespace) -> list[Case]:
    masks: list[Rule] = [parse.parse(text) for text in options.mask]
    workers = options.threads or sorted({1, threads.get_num_threads()})
    cases = []
    for dtype in options.dtype:
        for number in workers:
            for operation in options.operation:
                for text in options.shape:
                    for mask in masks:
                        problem = specification.problem(options, text, mask, dtype)
                        cases.append(Case(problem, operation, number))
    return cases


def _label(case: Case) -> str:
    return f"{case.operation} {case.shape} {case.problem.mask}"


def _kind(case: Case) -> str:
    return specification.kind(case.problem.dtype, case.problem.precision)


Measured = dict[tuple[str, int, Multiplier], Rates]


def _rates(cases: Sequence[Case]) -> Measured:
    """What the machine can do at most, measured in the same minute as the rest."""
    wanted = {_rated(case) for case in cases}
    return {rated: peak.rates(host(), *rated, again=True) for rated in wanted}


def _rated(case: Case) -> tuple[str, int, Multiplier]:
    """What the rates of a case depend on: type, threads and what multiplies."""
    return case.problem.dtype, case.threads, multiplier(case.problem, host(), case.operation)


def _share(row: Row, rates: Measured) -> tuple[float, str]:
    """The share of the roofline that a row reaches, and what binds."""
    known = rates[_rated(row.case)]
    least, binding = row.case.least_seconds(row.pairs, known)
    return least / row.median, binding


def _show(found: list[list[Row]], peers: Sequence[str], rates: Measured) -> None:
    dtypes = sorted({_kind(rows[0].case) for rows in found})
    columns = ["", ">thr", ">tilefold", ">GFLOP/s", ">bound"]
    for peer in peers:
        columns += [f">{peer}", ">ratio"]
    lines = []
    for rows in found:
        own = rows[0]
        share, _ = _share(own, rates)
        label = _label(own.case) + (f" {_kind(own.case)}" if len(dtypes) > 1 else "")
        line = [
            label,
            str(own.case.threads),
            terminal.seconds(own.median),
            f"{own.gflops:,.0f}",
            f"{share:.0%}",
        ]
        for row in rows[1 : 1 + len(peers)]:
            if row.reason:
                line += ["cannot", ""]
            else:
                line += [terminal.seconds(row.median), f"{row.median / own.median:.2f}"]
        lines.append(line)
    title = f"{host().name}, {host().isa}, {' and '.join(dtypes)}"
    console = terminal.out()
    console.print(terminal.table(title, columns, lines))
    console.print("medians; bound: share of the measured roofline reached; ratio: peer / tilefold")
    for reason in dict.fromkeys(row.reason for rows in found for row in rows if row.reason):
        console.print(f"cannot: {terminal.escape(reason)}")


def _show_sweep(found: list[list[Row]]) -> None:
    """Per case, the medians of every register tile (down) and block (across)."""
    console = terminal.out()
    for rows in found:
        times = {row.name: row.median for row in rows if " by " in row.name}
        best = min(times.values())
        tiles = list(dict.fromkeys(name.partition(" by ")[0] for name in times))
        blocks = list(dict.fromkeys(name.partition(" by ")[2] for name in times))
        lines = []
        for tile in tiles:
            cells = [times[f"{tile} by {block}"] for block in blocks]
            marked = [terminal.seconds(t) + (" *" if t == best else "  ") for t in cells]
            lines.append([tile, *marked])
        title = f"{_label(rows[0].case)}, {rows[0].case.threads} threads: rows x vectors, by rows"
        console.print()
        console.print(terminal.table(title, ["", *(f">{block}" for block in blocks)], lines))
    console.print("traversed rows per block across; * the fastest")


def _document(found: list[list[Row]], rates: Measured) -> dict[str, Any]:
    rows = []
    for group in found:
        for row in group:
            share, binding = (None, None) if row.reason else _share(row, rates)
            rows.append(row.record(group[0]) | {"share_of_bound": share, "binding": binding})
    return {
        **circumstances(),
        "threads_of": threads.describe(),
        "rows": rows,
    }


def _save(
    folder: Path, name: str, document: dict[str, Any], found: list[list[Row]], peers: Sequence[str]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(document["rows"][0]))
    writer.writeheader()
    writer.writerows(document["rows"])
    write_atomically(folder / f"{name}.json", (json.dumps(document, indent=1) + "\n").encode())
    write_atomically(folder / f"{name}.csv", text.getvalue().encode())
    write_atomically(folder / f"{name}.png", _plot(document, found, peers))


def _plot(document: dict[str, Any], found: list[list[Row]], peers: Sequence[str]) -> bytes:
    """Bars: operations per second of each implementation in each case."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError("--save draws a plot: pip install 'tilefold[bench]'") from None
    names = ["tilefold", *peers]
    colours = ["#0b6e99", "#c9c5bd", "#e3a857", "#8aa399", "#b5838d", "#7d8597", "#d4c2a8", "#444"]
    figure = Figure(figsize=(8, 1.2 + 0.24 * len(found) * len(names)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(names)
    for number, (name, colour) in enumerate(zip(names, colours, strict=False)):
        at = [index + number * height for index in range(len(found))]
        speeds = [0 if rows[number].reason else rows[number].gflops for rows in found]
        bars = axes.barh(at, speeds, height * 0.92, label=name, color=colour)
        labels = [f"{speed:.0f}" if speed else "cannot" for speed in speeds]
        axes.bar_label(bars, labels, padding=3, fontsize=8)
    many_dtypes = len({rows[0].case.problem.dtype for rows in found}) > 1
    labels = []
    for rows in found:
        case = rows[0].case
        dtype = f" {case.problem.dtype}" if many_dtypes else ""
        labels.append(f"{_label(case)}{dtype}, {case.threads} thr")
    axes.set_yticks([index + 0.4 - height / 2 for index in range(len(found))], labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("GFLOP/s over visible pairs (median; more is better)", fontsize=9)
    machine = document["machine"]
    axes.set_title(f"{machine['name']}, {machine['isa']}", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08, y=0.02)
    figure.legend(loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    return image.getvalue()
