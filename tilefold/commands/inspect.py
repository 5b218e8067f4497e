"""`tilefold inspect`: the plan and the kernels of a specification, without any data.

Show the plan, the tiles that it visits, the lower bounds on this machine, and one kernel as LLVM
source or as assembly. With `--backend metal` or `--backend triton`, print the source of one GPU
kernel, on any machine, for use in an app: `tilefold inspect --shape 1,8,2048,64 --backend metal >
forward.metal`. Its entry is called tilefold_ and the name of the kernel, such as tilefold_forward.
The first lines of the source say how to launch it.

Products of matrices are shown in the same way: `tilefold inspect --operation gemm
--size 1024x1024x1024`, or `--operation qgemm --scheme int4 --group-size 128`.

With `--profile` the operation runs on random arrays, and a table shows where its time goes.
"""

from __future__ import annotations

import argparse
import shlex
import time
from dataclasses import asdict
from itertools import chain
from typing import Any

from tilefold import triton
from tilefold.backends.cpu import choice, kernel, peak, plan, runtime, threads, tuned
from tilefold.backends.cpu.device import host
from tilefold.backends.cpu.launches import Launch
from tilefold.backends.cpu.plan import CpuPlan
from tilefold.backends.cpu.spec import KERNELS
from tilefold.backends.cpu.tuned import TunedBlocks
from tilefold.commands import (
    inspect_product,
    inspect_stages,
    kernel_source,
    product_options,
    specification,
    terminal,
)
from tilefold.common import settings
from tilefold.masks import parse
from tilefold.measuring.products import OPERATIONS as PRODUCTS
from tilefold.measuring.stages import profile
from tilefold.measuring.workload import Case
from tilefold.planning import roofline
from tilefold.planning.plan import OPERATIONS


def register(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "inspect",
        help="the plan, the bounds, the source and the assembly of any specification",
        description=__doc__.partition("\n\n")[2],
        epilog=terminal.EXIT_CODES,
    )
    parser.set_defaults(main=main, usual=parser.get_default)
    parser.add_argument("--shape", default="1,8,2048,64", metavar=specification.SHAPE)
    specification.add_sizes(parser)
    specification.add_precision(parser)
    specification.add_dtype(parser, "int8")
    parser.add_argument("--mask", default="full()", metavar="RULE")
    specification.add_score(parser)
    specification.add_sinks_and_dropout(parser)
    parser.add_argument("--operation", choices=(*OPERATIONS, *PRODUCTS), default="forward")
    parser.add_argument(
        "--form", choices=tuple(dict.fromkeys(chain(*plan.FORMS.values()))), default="auto"
    )
    product_options.add(parser)
    parser.add_argument("--isa", help="a narrower instruction set of this machine, such as avx2")
    parser.add_argument(
        "--kernel",
        help="which kernel of the plan --text, --asm and --backend show; for Metal also tensorops,"
        " the forward pass of Metal 4",
    )
    parser.add_argument("--backend", choices=("cpu", "metal", "triton"), default="cpu")
    parser.add_argument(
        "--architecture",
        choices=tuple(triton.ARCHITECTURES),
        help="the GPU that a Triton kernel is written for: sm_80 is an A100, sm_90 an H100 or H200,"
        " which is the default, sm_100 a B200, gfx942 an MI300",
    )
    parser.add_argument(
        "--family",
        choices=settings.METAL_FAMILIES,
        help="the Apple GPUs that a Metal kernel is written for: apple7 are A14 and M1, apple8 A15"
        " and M2, apple9 A17, M3 and M4, which is the default, apple10 A19 and M5, which tensorops"
        " needs",
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--text", action="store_true", help="print the kernel's LLVM source")
    shown.add_argument("--asm", action="store_true", help="print the kernel's assembly")
    shown.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="run the operation, on all threads, with kernels that count the time of their stages",
    )


def main(options: argparse.Namespace) -> int:
    """Show the plan or the kernel that the options ask for."""
    for option, backend in (("architecture", "triton"), ("family", "metal")):
        if getattr(options, option) and options.backend != backend:
            raise ValueError(f"--{option} goes with --backend {backend}, not {options.backend}")
    if options.profile and (
        options.operation in PRODUCTS or options.backend != "cpu" or options.text or options.asm
    ):
        raise ValueError("--profile goes with attention on processors, and with --json")
    if options.operation in PRODUCTS:
        return inspect_product.main(options)
    product_options.check_attention(options)
    mask = parse.parse(options.mask)
    score = specification.score(options)
    problem = specification.problem(options, options.shape, mask, options.dtype, score)
    if options.backend != "cpu":
        print(kernel_source.source(options, problem), end="")
        return 0
    if options.form not in plan.FORMS[options.operation]:  # GPU backends check theirs themselves
        allowed = ", ".join(plan.FORMS[options.operation])
        raise ValueError(
            f"--form of --operation {options.operation} must be one of {allowed}, not"
            f" {options.form!r}"
        )
    device = host().lowered(options.isa) if options.isa else host()
    if options.profile:
        case = Case(problem, options.operation, threads.get_num_threads())
        found = profile(case, device, form=options.form)
        if options.json:
            terminal.print_json(inspect_stages.document(found, device))
        else:
            inspect_stages.show(found, device)
        return 0
    start = time.perf_counter()
    made = plan.plan(problem, device, options.operation, options.form)
    planned = time.perf_counter() - start
    if options.text or options.asm:
        text = kernel.emit(_pick(made, options.kernel).spec)
        print(text if options.text else runtime.assembly(text, device), end="")
        return 0
    picked = [_pick(made, options.kernel)] if options.kernel else made.launches
    products = choice.Chooser(problem, device).products
    rates = peak.rates(device, problem.dtype, threads.get_num_threads(), products)
    document = {
        "problem": _problem(made),
        "device": {"name": device.name, "isa": device.isa, "workers": rates.workers},
        "plan_seconds": planned,
        "rates": dict(rates.__dict__),
        "kernels": [_describe(made, launch, rates) for launch in picked],
    }
    if options.json:
        terminal.print_json(document)
    else:
        _show(document)
    return 0


def _pick(made: CpuPlan, name: str | None) -> Launch:
    """A launch by the name of its kernel; without a name, the launch with the most work."""
    launches = {launch.spec.kernel: launch for launch in made.launches}
    return launches[kernel_source.named(launches, name)]


def _problem(made: CpuPlan) -> dict[str, Any]:
    problem = made.problem
    values = {name: value for name, value in problem.__dict__.items() if name != "mask"}
    score = None if problem.score is None else str(problem.score)
    return values | {
        "mask": str(problem.mask),
        "score": score,
        "computed_scores": [skeleton.shown for skeleton in made.scores],
        "operation": made.operation,
    }


def _describe(made: CpuPlan, launch: Launch, rates: roofline.Rates) -> dict[str, Any]:
    spec, runs, problem = launch.spec, launch.runs, made.problem
    parallel = spec.row.parallel
    masked = runs.runs[:, 2]
    pairs = roofline.computed_pairs(problem, parallel, runs, launch.block_parallel, launch.splits)
    pairs = round(pairs * launch.share)
    described: dict[str, Any] = {
        "kernel": spec.kernel,
        "parallel": parallel,
        "work_items": launch.items,
        "block_parallel": launch.block_parallel,
        "block_traverse": spec.block_traverse,
        "register_tile": [spec.rows, spec.vectors, spec.lanes],
        "index_bits": spec.index_bits,
        "scratch_bytes_per_worker": kernel.workspace_bytes(spec) + launch.scratch_bytes,
        "block_rows": launch.block_rows,
        "splits": launch.splits,
        "full_runs": int((masked == 0).sum()),
        "masked_runs": int((masked == 1).sum()),
        "first_runs": [
            [[int(x) for x in run] for run in runs.runs[runs.rows[row] : runs.rows[row + 1]]]
            for row in range(min(3, len(runs.rows) - 1))
        ],
        "computed_pairs": pairs,
        "computed_share": pairs / problem.pairs if problem.pairs else 0.0,
        "mask_expression": spec.mask.text,
    }
    if spec.row.visits:
        if spec.row.tiled:  # other kernels have no tile to choose
            described["choice"] = _choice(made, launch)
        least = roofline.bounds(problem, spec.row, pairs, rates)
        described["instructions"] = roofline.instruction_count(
            spec.row, pairs, problem.dim, problem.dim_v
        )
        described["bounds"] = dict(least.__dict__) | {
            "seconds": least.seconds,
            "binding": least.binding,
        }
    return described


def _choice(made: CpuPlan, launch: Launch) -> dict[str, Any]:
    """The origin of the blocks, and the measured cost of other blocks, if it was measured."""
    problem, device, spec = made.problem, made.device, launch.spec
    chooser = choice.Chooser(problem, device)
    table = chooser.table_blocks(spec.kernel)
    record = tuned.find(device, chooser.key(spec.kernel), table)
    family = chooser.family(spec.kernel)
    row = family.row(table.tile)
    assert row is not None, table
    return {
        "source": "tuned" if record else "table",
        "family": device.isa
        if spec.multiplier.unit == "fma"
        else f"{device.isa}, {spec.multiplier.unit}",
        "table": str(table),
        "table_measured": f"{row.measured}: {family.measured}" if row.measured else None,
        "tuned": tuned_record(record) if record else None,
        "tune": None if record else _tune_command(made),
    }


def tuned_record(record: TunedBlocks[Any]) -> dict[str, Any]:
    """The record of tuned blocks, and the relative cost of the table's and of the worst blocks."""
    best = record.best.seconds
    return asdict(record) | {
        "cost_of_table": record.table.seconds / best - 1,
        "cost_of_worst": record.worst.seconds / best - 1,
        "table_blocks": str(record.table.blocks),
        "worst_blocks": str(record.worst.blocks),
    }


def _tune_command(made: CpuPlan) -> str:
    """The command that measures the blocks of this specification."""
    problem = made.problem
    shape = (problem.batch, problem.heads_q, problem.len_q, problem.dim)
    words = ["tilefold", "tune", "--shape", ",".join(map(str, shape))]
    for option, value, usual in (
        ("--len-k", problem.len_k, problem.len_q),
        ("--heads-kv", problem.heads_kv, problem.heads_q),
        ("--dim-v", problem.dim_v, problem.dim),
        ("--dtype", problem.dtype, "float32"),
        ("--precision", problem.precision, "highest"),
        ("--mask", problem.mask, "full()"),
    ):
        if str(value) != str(usual):
            words += [option, str(value)]
    words += ["--operation", made.operation]
    lowered = (
        [] if made.device.isa == host().isa else [f"{settings.CPU_ISA.name}={made.device.isa}"]
    )
    return " ".join([*lowered, shlex.join(words)])


def _show(document: dict[str, Any]) -> None:
    console = terminal.out()
    problem, device, rates = (document[name] for name in ("problem", "device", "rates"))
    sizes = ", ".join(
        f"{name} {problem[name]}"
        for name in ("batch", "heads_q", "heads_kv", "len_q", "len_k", "dim", "dim_v")
    )
    facts = terminal.facts()
    kind = specification.kind(problem["dtype"], problem["precision"])
    facts.add_row("problem", f"{problem['operation']}, {kind}, {sizes}")
    facts.add_row("mask", terminal.escape(problem["mask"]))
    if problem["score"] is not None:
        facts.add_row("score", terminal.escape(problem["score"]))
        for text in problem["computed_scores"]:
            facts.add_row("  computed", terminal.escape(text))
    for name in ("sinks", "dropout"):
        if problem[name]:
            facts.add_row(name, f"{problem[name]:g}")
    facts.add_row("device", f"{device['name']}, {device['isa']}, {device['workers']} threads")
    measured = (
        terminal.rate(rates["flops_per_second"], "FLOP"),
        terminal.rate(rates["exponentials_per_second"], "exp"),
        terminal.rate(rates["bytes_per_second"], "B"),
    )
    facts.add_row("measured", ", ".join(measured))
    if rates["measured"]:
        when = f"{rates['measured'].replace('T', ' ')[:16]} UTC"
        facts.add_row("", f"{when}, the median run {rates['spread']:.0%} above the fastest")
    facts.add_row("planned in", terminal.seconds(document["plan_seconds"]))
    console.print(facts)
    for described in document["kernels"]:
        console.print()
        console.print(_kernel_facts(described))
    if bounded := [k for k in document["kernels"] if "bounds" in k]:
        console.print()
        console.print(_bounds_table(bounded))


def _kernel_facts(described: dict[str, Any]) -> Any:
    rows, vectors, lanes = described["register_tile"]
    parallel = "queries" if described["parallel"] == "q" else "keys"
    traversed = "keys" if described["parallel"] == "q" else "queries"
    facts = terminal.facts()
    facts.add_row("kernel", f"[bold]{described['kernel']}[/]")
    kind = "splits of keys" if KERNELS[described["kernel"]].by_query else "block rows"
    facts.add_row(
        "work", f"{described['work_items']:,} items in {described['block_rows']:,} {kind}"
    )
    if KERNELS[described["kernel"]].visits:
        blocks = (
            f"{described['block_parallel']} {parallel} x {described['block_traverse']} {traversed}"
        )
        if "choice" in described:
            facts.add_row("blocks", f"{blocks}; registers {rows} x {vectors} vectors of {lanes}")
            _add_choice(facts, described["choice"])
        else:
            facts.add_row("blocks", f"{blocks}, {lanes} at a time")
        scratch = terminal.size(described["scratch_bytes_per_worker"])
        facts.add_row("scratch", f"{scratch} per worker")
        share = f"{described['computed_share']:.1%} of all pairs are computed"
        counts = f"{described['full_runs']:,} full and {described['masked_runs']:,} masked runs"
        facts.add_row("runs", f"{counts}; {share}")
        for row, runs in enumerate(described["first_runs"]):
            spans = [f"{a}:{b}{' masked' if m else ''}" for a, b, m in runs[:4]]
            more = ", ..." if len(runs) > 4 else ""
            facts.add_row(f"  row {row}", ", ".join(spans) + more if spans else "nothing")
        facts.add_row("mask text", terminal.escape(described["mask_expression"]))
    return facts


def _add_choice(facts: Any, choice: dict[str, Any]) -> None:
    table = f"{choice['family']} {choice['table']}"
    tuned = choice["tuned"]
    if tuned is None:
        facts.add_row("chosen by", f"the table's row, {table}")
        measured = choice["table_measured"] or "never: there was no such machine"
        facts.add_row("measured", measured)
        facts.add_row("tuned", f"nothing here; to measure: {terminal.escape(choice['tune'])}")
        return
    of = f"{tuned['candidates']} candidates on {tuned['date'][:10]}"
    facts.add_row("chosen by", f"tilefold tune, the best of {of}, shape {tuned['shape']}")
    facts.add_row("table's row", table)
    row = f"the table's row takes {tuned['cost_of_table']:.1%} longer"
    worst = f"the worst, {tuned['worst_blocks']}, {tuned['cost_of_worst']:.1%}"
    facts.add_row("if wrong", f"{row}; {worst}")


def _bounds_table(kernels: list[dict[str, Any]]) -> Any:
    rows = []
    for described in kernels:
        least = described["bounds"]
        rows.append(
            [
                described["kernel"],
                terminal.seconds(least["arithmetic_seconds"]),
                terminal.seconds(least["exponential_seconds"]),
                terminal.seconds(least["bytes_seconds"]),
                f"{terminal.seconds(least['seconds'])} ({least['binding']})",
            ]
        )
    title = "No faster than, at the measured rates"
    return terminal.table(title, ["", ">arithmetic", ">exponentials", ">bytes", ">bound"], rows)
