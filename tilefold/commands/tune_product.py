"""`tilefold tune --operation gemm`: the fastest register tiles and blocks of products."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from tilefold.backends.cpu.matmul.tuned import STORE
from tilefold.commands import product_options, terminal, tune_table
from tilefold.measuring import product_tuning
from tilefold.measuring.environment import environment
from tilefold.measuring.product_tuning import TunedProduct
from tilefold.measuring.products import ProductCase

ATTENTION = ("shape", "len_k", "heads_kv", "dim_v", "precision", "mask", "form", "device")
"""Options that only attention has."""


def main(options: argparse.Namespace) -> int:
    """Measure candidates, keep the winners and show them."""
    product_options.check(options, "gemm", ATTENTION)
    if not options.dry_run:
        STORE.check()
    found = _measure(_cases(options), options.seconds)
    if not options.dry_run:
        product_tuning.keep(found)
    document = {
        **environment(),
        "path": None if options.dry_run else str(STORE.path),
        "kernels": [_describe(tuned) for tuned in found],
    }
    if options.json:
        terminal.print_json(document)
    else:
        columns = {"block_m": "rows", "block_n": "columns", "block_k": "terms"}
        tune_table.show(document, lambda tuned: tuned["label"], columns)
    return 0


def _cases(options: argparse.Namespace) -> list[ProductCase]:
    return [
        product_options.case(options, "gemm", size, dtype, options.threads or 1)
        for dtype in options.dtype
        for size in options.size or [product_options.USUAL_SIZE]
    ]


def _measure(cases: list[ProductCase], seconds: float) -> list[TunedProduct]:
    found: list[TunedProduct] = []
    with terminal.progress() as bar:
        task = bar.add_task("", total=product_tuning.STAGES * len(cases), completed=-1)

        def note(text: str) -> None:
            bar.update(task, description=text, advance=1)

        for case in cases:
            found.append(product_tuning.tune(case, seconds=seconds, note=note))
    return found


def _describe(tuned: TunedProduct) -> dict[str, Any]:
    return {
        **asdict(tuned.key),
        "label": tuned.case.label,
        "threads": tuned.case.threads,
        **tune_table.trials(tuned.measured, asdict),
    }
