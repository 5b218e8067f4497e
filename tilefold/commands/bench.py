"""`tilefold bench`: tilefold on this machine beside the installed peers, turn by turn."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tilefold.backends.cpu import threads
from tilefold.backends.cpu.device import host
from tilefold.commands import bench_product, product_options, specification, terminal
from tilefold.commands.saved import Chart, save
from tilefold.implementations import NAMES
from tilefold.masks import parse
from tilefold.masks.position_rules import Rule
from tilefold.measuring import timing
from tilefold.measuring.apart import Apart
from tilefold.measuring.baselines import BASELINES
from tilefold.measuring.environment import environment
from tilefold.measuring.product_timing import PEERS
from tilefold.measuring.products import OPERATIONS as PRODUCTS
from tilefold.measuring.roofline_share import RooflineShares, percent
from tilefold.measuring.timing import Row
from tilefold.measuring.workload import OPERATIONS, PASSES, Case
from tilefold.problems.attention import ITEM_BYTES

SHAPES = ("1,8,2048,64", "1,8,2048,128")
MASKS = ("full()", "causal()")


def register(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "bench",
        help="measure tilefold on this machine, beside the peers that are installed",
        description="Measure tilefold and its peers, other libraries that compute attention or"
        " products of matrices. In attention each is in a process of its own, and they take turns:"
        " warm, the same call again and again, and cold, after other memory was read. Options with"
        " several values measure every combination.",
        epilog=terminal.EXIT_CODES,
    )
    parser.set_defaults(main=main, usual=parser.get_default)
    parser.add_argument("--shape", nargs="+", default=SHAPES, metavar=specification.SHAPE)
    specification.add_sizes(parser)
    specification.add_precision(parser)
    parser.add_argument("--dtype", nargs="+", choices=(*ITEM_BYTES, "int8"), default=["float32"])
    parser.add_argument("--mask", nargs="+", default=MASKS, metavar="RULE")
    specification.add_score(parser)
    parser.add_argument(
        "--operation", nargs="+", choices=(*PASSES, *PRODUCTS), default=list(OPERATIONS)
    )
    product_options.add(parser, nargs="+")
    parser.add_argument(
        "--threads", nargs="+", type=int, help="default: 1, and the number of cores"
    )
    beside = parser.add_mutually_exclusive_group()
    beside.add_argument(
        "--peers",
        nargs="*",
        choices=tuple(dict.fromkeys((*BASELINES, *PEERS["gemm"], *PEERS["qgemm"]))),
        help="other libraries to measure (default: torch, if installed, and for products all that"
        " are, and weights of float16; --peers alone: none)",
    )
    beside.add_argument(
        "--impl",
        nargs="+",
        choices=NAMES,
        help="measure implementations of attention(impl=...) on torch tensors in place of peers",
    )
    parser.add_argument(
        "--device", help="the device of --impl by torch's name (default: a GPU, if there is one)"
    )
    parser.add_argument("--sweep", action="store_true", help="measure other block sizes too")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="seconds per combination (default 2)"
    )
    parser.add_argument(
        "--save", metavar="FOLDER", help="write JSON, CSV and a PNG plot to this folder"
    )
    parser.add_argument("--name", help="the name of the saved files (default: attention, or gemm)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def main(options: argparse.Namespace) -> int:
    """Measure every combination and show the table."""
    if not options.seconds > 0:
        raise ValueError(f"--seconds must be more than 0, not {options.seconds}")
    if chosen := [name for name in options.operation if name in PRODUCTS]:
        if len(options.operation) > 1:
            raise ValueError(f"--operation {chosen[0]} stands alone")
        return bench_product.main(options)
    product_options.check_attention(options)
    device, names = _device(options), _names(options)
    cases = _cases(options, device)
    found: list[list[Row]] = []
    with terminal.progress() as bar, _measurer(options, device, names) as measure:
        task = bar.add_task("Measuring", total=len(cases))
        for case in cases:
            bar.update(task, description=_label(case))
            found.append(measure(case, seconds=options.seconds))
            bar.advance(task)
    shares = _shares(found, device)
    document = _document(found, shares, device)
    if options.save:
        name = options.name or "attention"
        save(Path(options.save), name, document, _chart(found, names))
    if options.json:
        terminal.print_json(document)
    else:
        if device:
            _show_implementations(found, device)
        else:
            _show(found, names[1:], shares)
        if options.sweep:
            _show_sweep(found)
        if options.save:
            terminal.out().print(f"written to {options.save}/{name}.json, .csv and .png")
    return 0


@contextmanager
def _measurer(
    options: argparse.Namespace, device: str | None, names: Sequence[str]
) -> Iterator[Callable[..., list[Row]]]:
    """What measures a case: peers in processes of their own, all else in this one."""
    if device:
        yield partial(timing.measure_implementations, names=names, device=device)
    elif options.sweep:
        yield partial(timing.measure, names=names[1:], sweep=True)
    else:
        with Apart(names) as apart:
            yield apart.measure


def _names(options: argparse.Namespace) -> list[str]:
    """The names of the measured implementations; the others are compared with the first."""
    if options.impl:
        first = "kernel" if "kernel" in options.impl else options.impl[0]
        return list(dict.fromkeys([first, *options.impl]))
    if options.peers is None:
        reason = BASELINES["torch"].unusable
        if reason and not reason.endswith("not installed"):
            terminal.notes().print(terminal.escape(f"without the peer torch: {reason}"))
        return ["tilefold"] if reason else ["tilefold", "torch"]
    for name in options.peers:
        if name not in BASELINES:
            raise ValueError(f"--peers {name} goes with --operation qgemm")
        if reason := BASELINES[name].unusable:
            raise ImportError(f"the peer {name} cannot be measured: {reason}")
    return ["tilefold", *options.peers]


def _device(options: argparse.Namespace) -> str | None:
    """The device on which implementations are measured; None if peers are measured."""
    if not options.impl:
        if options.device:
            raise ValueError("--device says where --impl runs; peers run on the CPU")
        return None
    if options.sweep:
        raise ValueError("--sweep goes with peers, not with --impl")
    if reason := BASELINES["torch"].unusable:
        raise ImportError(f"--impl measures torch tensors, and {reason}")
    from tilefold.implementations.torch import devices

    there = devices()
    if options.device not in (None, *there):
        raise ValueError(f"--device must be {' or '.join(there)} here, not {options.device}")
    return options.device or there[-1]


def _cases(options: argparse.Namespace, device: str | None) -> list[Case]:
    masks: list[Rule] = [parse.parse(text) for text in options.mask]
    score = specification.score(options)
    every = threads.get_num_threads()
    workers = options.threads or (sorted({1, every}) if device in (None, "cpu") else [every])
    workers = [threads.checked(number) for number in workers]
    cases = []
    for dtype in options.dtype:
        for number in workers:
            for operation in options.operation:
                for text in options.shape:
                    for mask in masks:
                        problem = specification.problem(options, text, mask, dtype, score)
                        cases.append(Case(problem, operation, number, score))
    return cases


def _label(case: Case) -> str:
    return f"{case.operation} {case.shape} {case.rule}"


def _kind(case: Case) -> str:
    return specification.kind(case.problem.dtype, case.problem.precision)


Shares = dict[tuple[Case, str], tuple[float | None, str | None]]
"""The share of the roofline and the bound that binds, by case and name of the implementation."""


def _shares(found: list[list[Row]], device: str | None) -> Shares:
    """The shares of all rows, at rates that are measured within the same minutes."""
    machine = RooflineShares()
    return {
        (row.case, row.name): (None, None)
        if device or row.reason
        else machine.of(row.case, row.median, row.pairs)
        for rows in found
        for row in rows
    }


def _show(found: list[list[Row]], peers: Sequence[str], shares: Shares) -> None:
    dtypes = sorted({_kind(rows[0].case) for rows in found})
    columns = ["", ">thr", ">tilefold", ">GFLOP/s", ">bound"]
    for peer in peers:
        columns += [f">{peer}", ">ratio"]
    lines = []
    for rows in found:
        own = rows[0]
        share, _ = shares[own.case, own.name]
        label = _label(own.case) + (f" {_kind(own.case)}" if len(dtypes) > 1 else "")
        line = [
            label,
            str(own.case.threads),
            terminal.seconds(own.median),
            f"{own.gflops:,.0f}",
            percent(share),
        ]
        for row in rows[1 : 1 + len(peers)]:
            if row.reason:
                line += ["cannot", ""]
            else:
                line += [terminal.seconds(row.median), f"{row.median / own.median:.2f}"]
        lines.append(line)
        if own.cold:
            lines.append(_cold(rows[: 1 + len(peers)]))
    title = f"{host().name}, {host().isa}, {' and '.join(dtypes)}"
    console = terminal.out()
    console.print(terminal.table(title, columns, lines))
    console.print("medians; bound: share of the measured roofline reached; ratio: peer / tilefold")
    if any(rows[0].cold for rows in found):
        console.print("cold: other memory was read before each call, and the threads slept")
    if any(shares[rows[0].case, rows[0].name][0] is None for rows in found):
        console.print("-: faster than the bound, so the bound says nothing here")
    _show_reasons(found)


def _cold(rows: Sequence[Row]) -> list[str]:
    """The line of the cold calls of a case."""
    own = rows[0]
    line = ["  cold", "", terminal.seconds(own.cold_median), "", ""]
    for row in rows[1:]:
        if row.reason:
            line += ["", ""]
        else:
            line += [terminal.seconds(row.cold_median), f"{row.cold_median / own.cold_median:.2f}"]
    return line


def _show_implementations(found: list[list[Row]], device: str) -> None:
    """Show a line for each case and implementation, compared with the first of the case."""
    lines = []
    for rows in found:
        case, first = rows[0].case, rows[0]
        label = [f"{_label(case)} {_kind(case)}", str(case.threads)]
        for row in rows:
            line = [*label, row.name, "cannot", "", ""]
            if not row.reason:
                ratio = "" if first.reason else f"{row.median / first.median:.2f}"
                line[3:] = [terminal.seconds(row.median), f"{row.gflops:,.0f}", ratio]
            lines.append(line)
            label = ["", ""]
    columns = ["", ">thr", "", ">median", ">GFLOP/s", ">ratio"]
    console = terminal.out()
    console.print(terminal.table(f"{host().name}, tensors on {device}", columns, lines))
    console.print(f"ratio: each / {found[0][0].name}")
    _show_reasons(found)


def _show_reasons(found: list[list[Row]]) -> None:
    for reason in dict.fromkeys(row.reason for rows in found for row in rows if row.reason):
        terminal.out().print(f"cannot: {terminal.escape(reason)}")


def _show_sweep(found: list[list[Row]]) -> None:
    """Show for each case the medians of every register tile (down) and block (across)."""
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


def _document(found: list[list[Row]], shares: Shares, device: str | None) -> dict[str, Any]:
    rows = []
    for group in found:
        for row in group:
            share, binding = shares[row.case, row.name]
            rows.append(row.record(group[0]) | {"share_of_bound": share, "binding": binding})
    return {
        **environment(),
        "threads_of": threads.describe(),
        "device": device or "cpu",
        "rows": rows,
    }


def _chart(found: list[list[Row]], names: Sequence[str]) -> Chart:
    """Operations per second of each implementation in each case."""
    many_dtypes = len({rows[0].case.problem.dtype for rows in found}) > 1
    labels = []
    for rows in found:
        case = rows[0].case
        dtype = f" {case.problem.dtype}" if many_dtypes else ""
        labels.append(f"{_label(case)}{dtype}, {case.threads} thr")
    speeds = {
        name: [0.0 if rows[number].reason else rows[number].gflops for rows in found]
        for number, name in enumerate(names)
    }
    return Chart(labels, speeds, "GFLOP/s over visible pairs (median; more is better)")
