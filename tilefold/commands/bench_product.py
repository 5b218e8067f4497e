"""Products measured beside the installed peers, as `tilefold bench --operation gemm` shows them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tilefold.backends.cpu import threads
from tilefold.backends.cpu.device import host
from tilefold.commands import product_options, terminal
from tilefold.commands.saved import Chart, save
from tilefold.measuring import product_timing
from tilefold.measuring.environment import environment
from tilefold.measuring.product_timing import PEERS, ProductRow
from tilefold.measuring.products import ProductCase, rated
from tilefold.measuring.roofline_share import RooflineShares, percent

ATTENTION = (
    *("shape", "len_k", "heads_kv", "dim_v", "precision", "mask", "score"),
    *("impl", "device", "sweep"),
)
"""Options that only attention has."""

Share = tuple[float | None, str]


def main(options: argparse.Namespace) -> int:
    """Measure every combination and show the table."""
    (operation,) = options.operation
    product_options.check(options, operation, ATTENTION)
    names, cases = _names(options, operation), _cases(options, operation)
    found: list[list[ProductRow]] = []
    with terminal.progress() as bar:
        task = bar.add_task("Measuring", total=len(cases))
        for case in cases:
            bar.update(task, description=case.label)
            found.append(product_timing.measure(case, names, seconds=options.seconds))
            bar.advance(task)
    machine = RooflineShares()
    shares = [_share(machine, rows[0]) for rows in found]
    document = {
        **environment(),
        "threads_of": threads.describe(),
        "device": "cpu",
        "rows": [
            row.record(rows[0])
            | {"share_of_bound": share if row is rows[0] else None}
            | {"binding": binding if row is rows[0] else None}
            for rows, (share, binding) in zip(found, shares, strict=True)
            for row in rows
        ],
    }
    if options.save:
        name = options.name or operation
        save(Path(options.save), name, document, _chart(found, ["tilefold", *names]))
    if options.json:
        terminal.print_json(document)
        return 0
    _show(found, shares)
    if options.save:
        terminal.out().print(f"written to {options.save}/{name}.json, .csv and .png")
    return 0


def _names(options: argparse.Namespace, operation: str) -> list[str]:
    """The peers: those that are asked for, else all that are installed."""
    known = PEERS[operation]
    if options.peers is None:
        return [name for name in known if not product_timing.unusable(name)]
    for name in options.peers:
        if name not in known:
            allowed = " or ".join(known)
            raise ValueError(f"--peers of --operation {operation} are {allowed}, not {name}")
    return list(dict.fromkeys(options.peers))


def _cases(options: argparse.Namespace, operation: str) -> list[ProductCase]:
    return [
        product_options.case(options, operation, size, dtype, number)
        for dtype in options.dtype
        for number in options.threads or sorted({1, threads.get_num_threads()})
        for size in options.size or [product_options.USUAL_SIZE]
    ]


def _share(machine: RooflineShares, own: ProductRow) -> Share:
    """The share of the roofline that tilefold's row reaches, and the bound that binds."""
    case = own.case
    dtype, multiplier = rated(case.spec(host()))

    def least(rates: Any) -> tuple[float, str]:
        bounds = case.bounds(rates)
        return bounds.seconds, bounds.binding

    return machine.reached((dtype, case.threads, multiplier), least, own.median)


def _show(found: list[list[ProductRow]], shares: list[Share]) -> None:
    lines = []
    for rows, (share, binding) in zip(found, shares, strict=True):
        own = rows[0]
        label = [own.case.label.removeprefix(f"{own.case.operation} "), str(own.case.threads)]
        for row in rows:
            line = [*label, row.name, "cannot", "", "", "", ""]
            if not row.reason:
                line[3:6] = [
                    terminal.seconds(row.median),
                    terminal.digits(row.gflops),
                    terminal.digits(row.gb_per_second),
                ]
                line[6] = f"{row.median / own.median:.2f}"
                line[7] = percent(share, binding) if row is own else ""
            lines.append(line)
            label = ["", ""]
    columns = ["", ">thr", "", ">median", ">GFLOP/s", ">GB/s", ">ratio", "bound"]
    title = f"{found[0][0].case.operation} on {host().name}, {host().isa}"
    console = terminal.out()
    console.print(terminal.table(title, columns, lines))
    console.print("medians; ratio: each / tilefold; bound: share of the measured roofline reached")
    if any(share is None for share, _ in shares):
        console.print("-: faster than the bound: the operands stay in a cache, or rates were low")
    for reason in dict.fromkeys(row.reason for rows in found for row in rows if row.reason):
        console.print(f"cannot: {terminal.escape(reason)}")


def _chart(found: list[list[ProductRow]], names: list[str]) -> Chart:
    labels = [f"{rows[0].case.label}, {rows[0].case.threads} thr" for rows in found]
    speeds = {
        name: [0.0 if rows[number].reason else rows[number].gflops for rows in found]
        for number, name in enumerate(names)
    }
    return Chart(labels, speeds, "GFLOP/s (median; more is better)")
