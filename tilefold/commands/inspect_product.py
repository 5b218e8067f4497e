"""The plan and the kernels of a product on this machine, as `tilefold inspect` shows them."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from typing import Any

from tilefold.backends.cpu import peak, runtime, threads
from tilefold.backends.cpu.device import Device, host
from tilefold.backends.cpu.matmul import calls, quantized_blocks, quantized_calls, tuned
from tilefold.backends.cpu.matmul import quantized_integers as integers
from tilefold.backends.cpu.matmul.few_rows_plan import FewRowsPlan
from tilefold.backends.cpu.matmul.plan import GemmPlan, Plan
from tilefold.backends.cpu.matmul.spec import RoundingSpec
from tilefold.backends.cpu.tuned import TunedBlocks
from tilefold.commands import product_options, product_source, terminal
from tilefold.measuring.products import ProductCase, rated

ATTENTION = (
    *("shape", "len_k", "heads_kv", "dim_v", "precision", "mask", "score", "sinks", "dropout"),
    "form",
)
"""Options that only attention has."""

_MEASURED = (("flops", "FLOP"), ("bytes", "B"))

_UNITS = {
    "fma": "multiply-adds of {sums}",
    "dot": "pairs of bfloat16 (AVX512-BF16), summed in float32",
    "madd": "pairs of integers of 16 bits",
    "vnni": "fours of integers of 8 bits (AVX512-VNNI)",
    "amx": "tiles of bfloat16 (AMX), summed in float32",
    "amx8": "tiles of integers of 8 bits (AMX)",
}


def main(options: argparse.Namespace) -> int:
    """Show the plan of a product, or the source or assembly of one of its kernels."""
    product_options.check(options, options.operation, ATTENTION)
    size = options.size or product_options.USUAL_SIZE
    workers = threads.get_num_threads()
    case = product_options.case(options, options.operation, size, options.dtype, workers)
    if options.backend != "cpu":
        print(product_source.source(options, case), end="")
        return 0
    device = host().lowered(options.isa) if options.isa else host()
    start = time.perf_counter()
    described = _gemm(case, device) if case.operation == "gemm" else _qgemm(case, device)
    planned = time.perf_counter() - start
    specs = described.pop("specs")
    if options.kernel not in (None, *specs):
        raise ValueError(f"--kernel must be one of {', '.join(specs)}, not {options.kernel!r}")
    shown = options.kernel or next(iter(specs))
    if options.text or options.asm:
        emit = calls.source if case.operation == "gemm" else quantized_calls.source
        text = emit(specs[shown])
        print(text if options.text else runtime.assembly(text, device), end="")
        return 0
    dtype, multiplier = rated(next(iter(specs.values())))
    rates = peak.rates(device, dtype, workers, multiplier)
    least = case.bounds(rates)
    document = {
        "problem": asdict(case) | {"flops": case.flops, "bytes": case.bytes},
        "device": {"name": device.name, "isa": device.isa, "workers": workers},
        "plan_seconds": planned,
        "rates": asdict(rates),
        "plan": described,
        "kernels": {name: asdict(spec) for name, spec in specs.items()},
        "bounds": asdict(least) | {"seconds": least.seconds, "binding": least.binding},
    }
    if options.json:
        terminal.print_json(document)
    else:
        _show(case, document)
    return 0


def _gemm(case: ProductCase, device: Device) -> dict[str, Any]:
    """A plan as facts in words, its numbers, and the kernels by name, the product's first."""
    made = case.plan(device)
    few = isinstance(made, FewRowsPlan)
    numbers = {
        "turned": made.turned,
        "form": made.spec.form if isinstance(made, FewRowsPlan) else "panels",
        "block_m": made.block_m,
        "block_n": made.block_n,
        "block_k": made.block_k,
        "row_blocks": made.row_blocks,
        "column_blocks": made.column_blocks,
        "chunks": made.chunks,
        "chunk_k": made.chunk_k,
        "items": made.items,
        "scratch_bytes_per_worker": made.workspace_bytes,
    }
    specs: dict[str, Any] = {made.spec.kernel: made.spec}
    record = None
    if isinstance(made, GemmPlan):
        record = tuned.find(made.product, made.spec.unit, device)
        specs |= {"pack_b": made.spec.packing} if made.packs else {}
    facts = _few_rows(made) if few else _panels(made, device)
    work = f"{made.items:,} items: {made.row_blocks:,} x {_many(made.column_blocks, 'block')}"
    if made.chunks > 1:
        work += f" x {made.chunks} chunks of {made.chunk_k} terms, added in order"
    facts["work"] = work
    facts["scratch"] = f"{terminal.size(made.workspace_bytes)} per worker"
    if made.turned:
        facts["turned"] = "the transposed product is computed: rows here are columns of the result"
    if not few:
        facts["tuned"] = _tuned(record, case)
    choice = {"source": "tuned" if record else "table", "tuned": record and asdict(record)}
    return {"facts": facts, **numbers, "choice": choice, "specs": specs}


def _tuned(record: TunedBlocks[Any] | None, case: ProductCase) -> str:
    """What `tilefold tune` found, or how to ask it."""
    if record is None:
        return f"nothing here; to measure: tilefold tune --operation {_options(case)}"
    best = record.best.seconds
    slower, worst = (each.seconds / best - 1 for each in (record.table, record.worst))
    return (
        f"by tilefold tune, the best of {record.candidates} candidates on {record.date[:10]};"
        f" the table's row takes {slower:.1%} longer, the worst, {record.worst.blocks}, {worst:.1%}"
    )


def _options(case: ProductCase) -> str:
    words = [case.operation, "--size", case.size, "--dtype", case.dtype]
    flags = ("transpose_a", "transpose_b", "gate")
    return " ".join([*words, *(product_options.shown(x) for x in flags if getattr(case, x))])


def _few_rows(made: Plan) -> dict[str, str]:
    assert isinstance(made, FewRowsPlan)
    spec = made.spec
    lie = {
        "wide": "several long rows of B are walked at once",
        "deep": "several columns of B, whose inputs are neighbours, are walked at once",
    }
    return {
        "way": f"few rows: B is read once, where it lies; {lie[spec.form]}",
        "unit": f"{_UNITS['fma'].format(sums=spec.sums)}, vectors of {spec.lanes}",
        "rows": f"{spec.rows}, all: they are copied to scratch as {spec.sums}",
        "columns": f"{spec.columns:,} of {made.product.n:,}",
        "terms": f"{made.chunk_k:,} of {made.product.k:,}",
        "packed": "nothing",
    }


def _panels(made: Plan, device: Device) -> dict[str, str]:
    assert not isinstance(made, FewRowsPlan)
    spec, product = made.spec, made.product
    item = spec.step_bytes / spec.unit.depth
    panel = made.block_k * spec.width * item
    block = made.block_m * made.block_k * item
    near, far = (terminal.size(size or 0) for size in (device.l1_bytes, device.l2_bytes))
    every = terminal.size(product.matrices * made.panels * made.panel_bytes * (1 + spec.gate))
    b = f"B by all workers before the product, {every}" if made.packs else "B's part by each item"
    tile = f"{spec.rows} x {spec.vectors} vectors of {spec.lanes}"
    return {
        "way": "panels: A and B are packed in the order in which register tiles read them",
        "unit": _UNITS[spec.unit.name].format(sums=spec.sums),
        "registers": f"{tile}: {spec.rows} rows by {spec.width} columns",
        "rows": f"{made.block_m:,} of {product.m:,}; A's block of {terminal.size(block)} is for the"
        f" second cache of {far}",
        "columns": f"{made.block_n:,} of {product.n:,}; A's block is packed once for them",
        "terms": f"{made.block_k:,} of {product.k:,}; B's panel of {terminal.size(panel)} "
        + ("is for" if panel <= (device.l1_bytes or 0) else "streams through")
        + f" the first cache of {near}",
        "packed": f"A's block by each item; {b}",
        "sums": "whole tiles are summed in the result"
        if spec.direct
        else "made in scratch, and finished into the result",
    }


def _qgemm(case: ProductCase, device: Device) -> dict[str, Any]:
    """The same for a quantised B."""
    sizes = case.sizes
    spec = quantized_calls.spec_of(sizes, device)
    made = quantized_calls.Blocks.of(sizes, spec)
    specs: dict[str, Any] = {spec.kernel: spec}
    if spec.integers:
        rounding = RoundingSpec(spec.rows, spec.lanes, spec.per_word, spec.fours)
        specs[rounding.kernel] = rounding
        way = "rows of A are rounded to 8 bits, and integers are summed"
        unit = "pairs of integers of 16 bits" if spec.pairs else "integers of 32 bits"
        if spec.vnni or spec.fours:
            by = "AVX512-VNNI" if spec.vnni else "pmaddubsw, rows are split"
            unit = f"fours of integers of 8 bits ({by})"
        depth = integers.depth(spec)
    else:
        way = "few rows: codes are widened in registers for each register tile"
        unit, depth = "multiply-adds of float32", sizes.k
        if spec.shared:
            depth = min(sizes.k, quantized_blocks.depth(spec))
            size = terminal.size(4 * depth * spec.width)
            way = f"many rows: they share a panel widened into scratch, {size} for the first cache"
    bits = 8 * case.b_bytes / (case.n * case.k)
    groups = case.k // case.group
    shared = f"{groups:,} groups of {case.group:,}" if groups > 1 else "one scale for an output"
    blocks = _many(made.row_blocks, "block")
    shared = shared if sizes.scales else "a table of 64 numbers"
    facts = {
        "way": way,
        "unit": unit,
        "registers": f"{spec.rows} x {spec.vectors} vectors of {spec.lanes}",
        "rows": f"{made.block_m:,} of {case.m:,}",
        "columns": f"{spec.width} of {case.n:,}: a panel of {terminal.size(made.panel_bytes)}",
        "terms": f"{min(depth, case.k):,} of {case.k:,}; {shared}",
        "matrix": f"{terminal.size(case.b_bytes)}, {bits:.2f} bits per weight",
        "work": f"{made.items:,} items: {made.panels:,} panels x {blocks} of rows",
        "scratch": f"{terminal.size(made.scratch_bytes)} per worker"
        if made.scratch_bytes
        else "none",
    }
    numbers = made._asdict() | {"items": made.items, "block_k": depth, "groups": groups}
    return {"facts": facts, **numbers, "bits_per_weight": bits, "specs": specs}


def _many(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _show(case: ProductCase, document: dict[str, Any]) -> None:
    console, facts = terminal.out(), terminal.facts()
    device, rates, least = (document[name] for name in ("device", "rates", "bounds"))
    facts.add_row("problem", case.label)
    work = f"{case.flops / 1e9:,.3g} GFLOP, {terminal.size(case.bytes)} of operands and result"
    facts.add_row("", work)
    facts.add_row("device", f"{device['name']}, {device['isa']}, {device['workers']} threads")
    measured = [terminal.rate(rates[f"{name}_per_second"], unit) for name, unit in _MEASURED]
    facts.add_row("measured", ", ".join(measured))
    when = f"{rates['measured'].replace('T', ' ')[:16]} UTC"
    facts.add_row("", f"{when}, the median run {rates['spread']:.0%} above the fastest")
    facts.add_row("planned in", terminal.seconds(document["plan_seconds"]))
    console.print(facts)
    console.print()
    facts = terminal.facts()
    facts.add_row("kernels", f"[bold]{', '.join(document['kernels'])}[/]")
    for name, text in document["plan"]["facts"].items():
        facts.add_row(name, terminal.escape(text))
    console.print(facts)
    console.print()
    row = [
        case.operation,
        terminal.seconds(least["arithmetic_seconds"]),
        terminal.seconds(least["bytes_seconds"]),
        f"{terminal.seconds(least['seconds'])} ({least['binding']})",
    ]
    title = "No faster than, at the measured rates"
    console.print(terminal.table(title, ["", ">arithmetic", ">bytes", ">bound"], [row]))
