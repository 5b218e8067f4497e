"""`tilefold doctor`: the hardware and software of this machine, and a short self-test."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

import tilefold
from tilefold import api
from tilefold.backends.cpu import threads
from tilefold.backends.cpu import tuned as winners
from tilefold.backends.cpu.device import amx, host
from tilefold.backends.cpu.matmul import tuned as products
from tilefold.commands import terminal
from tilefold.common import array_files, disk_cache, settings
from tilefold.common.check import one_line
from tilefold.masks import parse
from tilefold.measuring import agreement
from tilefold.measuring.agreement import Agreement
from tilefold.problems import reference
from tilefold.problems.attention import STATISTICS

# (batch, heads_q, heads_kv, len_q, len_k, dim, dim_v) and mask: tails, grouped queries, and rows
# that see nothing.
CASES = (
    ((1, 2, 2, 64, 64, 64, 64), "full()"),
    ((2, 4, 2, 113, 203, 40, 24), "causal()"),
    ((1, 2, 1, 130, 130, 77, 77), "local(9) | chunked(50)"),
    ((1, 1, 1, 70, 50, 3, 5), "causal(sync='scale_end')"),
)
TOLERANCES = {"float32": 1e-4, "float64": 1e-12, "float16": 4e-3, "bfloat16": 3e-2}
"""The largest allowed error by type, relative to the largest element of the exact result."""

SELF_TEST = [(case, dtype) for dtype in ("float32", "float64") for case in CASES] + [
    (case, dtype) for dtype in ("float16", "bfloat16") for case in CASES[:2]
]
"""The cases and types of the self-test; bfloat16 runs only if ml_dtypes is installed."""


def register(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "doctor",
        help="what this machine has, what works, and a self-test",
        description="Show the hardware and software of this machine, say what works, and test it in"
        " a few seconds.",
        epilog=terminal.EXIT_CODES,
    )
    parser.set_defaults(main=main)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    group = parser.add_argument_group("Apple GPUs")
    group.add_argument(
        "--metal", action="store_true", help="test all Metal kernels, then time them on the GPU"
    )
    group.add_argument(
        "--emulate", action="store_true", help="with --metal: test a few in the emulator, on Linux"
    )
    group.add_argument("--save", metavar="FILE", help="with --metal: write a JSON document to FILE")


@dataclass(frozen=True)
class Check:
    """One result of the self-test; `error` is relative, and `problem` describes a failure."""

    case: str
    error: float
    passed: bool
    seconds: float
    problem: str = ""


def main(options: argparse.Namespace) -> int:
    """Run the tests and show the results; exit code 1 if a test fails."""
    if options.metal:
        from tilefold.commands import metal

        return metal.main(options)
    if options.emulate or options.save:
        raise ValueError("--emulate and --save go with --metal")
    known = {dtype for dtype in TOLERANCES if dtype != "bfloat16" or _version("ml_dtypes")}
    checks = [check for case, dtype in SELF_TEST if dtype in known for check in _test(*case, dtype)]
    agreed = agreement.check()
    document = _document(checks, agreed)
    if options.json:
        terminal.print_json(document)
    else:
        _show(document, checks)
        _show_agreements(agreed)
    failed = [check for check in checks if not check.passed]
    if failed:
        raise terminal.Failure(f"{len(failed)} of {len(checks)} self-tests failed")
    if wrong := [each.implementation for each in agreed if not _right(each)]:
        raise terminal.Failure(f"wrong or broken: implementation {', '.join(dict.fromkeys(wrong))}")
    return 0


def _right(each: Agreement) -> bool:
    """True if an implementation agrees with the definition or is merely missing."""
    if each.error is None:
        return not each.broken
    return each.error < TOLERANCES[agreement.PROBLEM.dtype]


def _test(sizes: tuple[int, ...], mask: str, dtype: str) -> list[Check]:
    """Compare forward and backward of one case with the dense float64 definition."""
    batch, heads_q, heads_kv, len_q, len_k, dim, dim_v = sizes
    rule, rng = parse.parse(mask), np.random.default_rng(0)
    q, k, v, do = (
        rng.standard_normal(shape).astype(array_files.element_type(dtype))
        for shape in (
            (batch, heads_q, len_q, dim),
            (batch, heads_kv, len_k, dim),
            (batch, heads_kv, len_k, dim_v),
            (batch, heads_q, len_q, dim_v),
        )
    )
    wanted = reference.attention(q, k, v, mask=rule)
    gradients = reference.attention_backward(do, q, k, v, *wanted, mask=rule)
    name = f"{dtype} {len_q}x{len_k} d{dim}/{dim_v} {mask}"

    def check(operation: str, call: Any, expected: Any) -> Check:
        start = time.perf_counter()
        try:
            found = call()
        except Exception as raised:  # the doctor reports every error
            text = f"{type(raised).__name__}: {one_line(raised)}"
            return Check(f"{operation} {name}", np.inf, False, time.perf_counter() - start, text)
        seconds = time.perf_counter() - start
        error = max(map(agreement.error, found, expected))
        return Check(f"{operation} {name}", error, error < TOLERANCES[dtype], seconds)

    o, lse = wanted
    inputs = (do, q, k, v, o.astype(q.dtype), lse.astype(STATISTICS[dtype]))
    return [
        check("forward", lambda: api.attention(q, k, v, mask=rule, return_lse=True), wanted),
        check("backward", lambda: api.attention_backward(*inputs, mask=rule), gradients),
    ]


def _document(checks: list[Check], agreed: list[Agreement]) -> dict[str, Any]:
    device, kept = host(), disk_cache.default()
    stores: list[Any] = [winners.STORE, products.STORE]
    works = all(check.passed for check in checks)
    reason = next((check.problem or check.case for check in checks if not check.passed), None)
    backends: dict[str, Any] = {"cpu": {"works": works, "reason": reason}}
    backends |= {name: _triton(name, agreed) for name in ("nvidia", "amd")}
    backends["apple"] = _apple(agreed)
    return {
        "versions": {"tilefold": tilefold.__version__, "python": platform.python_version()}
        | {name: _version(name) for name in ("numpy", "llvmlite", "ml_dtypes", "torch")},
        "system": platform.platform(),
        "device": {
            "name": device.name,
            "isa": device.isa,
            "triple": device.triple,
            "features": device.features.split(","),
            "amx": amx(),
            "cores": device.cores,
            "l1_bytes": device.l1_bytes,
            "l2_bytes": device.l2_bytes,
            "l3_bytes": device.l3_bytes,
        },
        "threads": {"count": threads.get_num_threads(), "of": threads.describe()},
        "cache": {
            "directory": str(kept.directory),
            "bytes": kept.size(),
            "kernels": kept.count(),
            "problem": kept.problem(),
        },
        "tuned": {
            "winners": sum(len(winners.here(device, store)) for store in stores),
            "problem": "; ".join(filter(None, (store.load().problem for store in stores))) or None,
        },
        "settings": {
            setting.name: None if setting.get() == setting.default else str(setting.get())
            for setting in settings.ALL
        },
        "backends": backends,
        "implementations": [
            {
                "name": each.implementation,
                "arrays": each.arrays,
                "error": each.error if each.error is not None and np.isfinite(each.error) else None,
                "passed": each.error is not None and _right(each),
                "reason": each.reason,
            }
            for each in agreed
        ],
        "self_test": [
            {**check.__dict__, "error": check.error if np.isfinite(check.error) else None}
            for check in checks
        ],
    }


def _apple(agreed: list[Agreement]) -> dict[str, Any]:
    """Say whether Metal kernels work, from the results on tensors on the GPU."""
    from tilefold.backends.metal import runtime

    if reason := runtime.missing():
        return {"works": False, "reason": reason}
    return _kernels("tensors on mps", agreed)


def _triton(vendor: str, agreed: list[Agreement]) -> dict[str, Any]:
    """Say whether Triton kernels work on "nvidia" or "amd" GPUs; torch is built for one of them."""
    from tilefold.backends.triton import runtime

    if reason := runtime.missing():
        return {"works": False, "reason": reason}
    import torch

    built = "amd" if torch.version.hip else "nvidia"
    if vendor != built:
        return {"works": False, "reason": f"this PyTorch is built for GPUs of {built.upper()}"}
    try:
        runtime.architecture_of(torch.cuda.current_device())
    except NotImplementedError as error:
        return {"works": False, "reason": str(error)}
    return _kernels("tensors on cuda", agreed)


def _kernels(kind: str, agreed: list[Agreement]) -> dict[str, Any]:
    """Say whether kernels gave the right results on arrays of a kind."""
    own = next(each for each in agreed if (each.implementation, each.arrays) == ("kernel", kind))
    works = own.error is not None and _right(own)
    return {"works": works, "reason": None if works else own.reason or "results are wrong"}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _show(document: dict[str, Any], checks: list[Check]) -> None:
    console = terminal.out()
    device, kept = document["device"], document["cache"]
    facts = terminal.facts()
    versions = [f"{name} {version}" for name, version in document["versions"].items() if version]
    facts.add_row("versions", ", ".join(versions))
    facts.add_row("system", document["system"])
    facts.add_row("device", f"{device['name']}, {device['isa']}, {device['cores']} cores")
    sizes = [terminal.size(device[f"l{level}_bytes"]) for level in (1, 2, 3)]
    facts.add_row(
        "caches", " ".join(f"L{n} {size}," for n, size in enumerate(sizes, 1)).rstrip(",")
    )
    facts.add_row("features", " ".join(name.lstrip("+") for name in device["features"]))
    facts.add_row("AMX", device["amx"])
    facts.add_row("threads", f"{document['threads']['count']} of {document['threads']['of']}")
    held = f"{kept['kernels']} kernels, {terminal.size(kept['bytes'])}"
    facts.add_row("cache", f"{kept['directory']} ({kept['problem'] or held})")
    tuned = document["tuned"]
    count = f"{tuned['winners']} winners for this machine (see `tilefold tune`)"
    facts.add_row("tuned", "; ".join(filter(None, (count, tuned["problem"]))))
    for name, text in document["settings"].items():
        if text:
            facts.add_row("setting", f"{name}={text}")
    for name, backend in document["backends"].items():
        sign = "[green]works[/]" if backend["works"] else f"[dim]absent: {backend['reason']}[/]"
        if name == "cpu" and not backend["works"]:
            sign = f"[red]fails: {terminal.escape(backend['reason'])}[/]"
        facts.add_row(name, sign)
    console.print(facts)
    console.print()
    rows = [
        [
            terminal.escape(check.case),
            "[green]passed[/]" if check.passed else "[red]FAILED[/]",
            f"{check.error:.0e}",
            terminal.seconds(check.seconds),
        ]
        for check in checks
    ]
    title = "Self-test against dense float64"
    console.print(terminal.table(title, ["", "", ">error", ">time"], rows))


def _show_agreements(agreed: list[Agreement]) -> None:
    """Show implementations (down) by kinds of arrays (across), and reasons for missing results."""
    console = terminal.out()
    kinds = list(dict.fromkeys(each.arrays for each in agreed))
    lines: dict[str, list[str]] = {}
    for each in agreed:
        cell = "[dim]absent[/]" if each.error is None else f"{each.error:.0e}"
        if not _right(each):
            cell = "[red]FAILED[/]" if each.error is None else f"[red]{cell} FAILED[/]"
        lines.setdefault(each.implementation, [each.implementation]).append(cell)
    problem = agreement.PROBLEM
    console.print()
    columns = ["", *(f">{kind}" for kind in kinds)]
    title = f"Implementations against dense float64: largest errors, {problem.mask}"
    console.print(terminal.table(title, columns, list(lines.values())))
    console.print(f"largest difference between two: {agreement.largest_difference(agreed):.0e}")
    for each in agreed:
        if each.reason:
            name = f"{each.implementation}, {each.arrays}: {each.reason}"
            console.print(terminal.escape(name))
