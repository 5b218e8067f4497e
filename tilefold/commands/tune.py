"""`tilefold tune`: find the fastest block sizes for given shapes, and keep them for the planner.

Measure candidates turn by turn with the blocks of the built-in table, on random data. The winners
go to a file beside the kernel cache, and every later call reads it. Results change by rounding
only. `--device cuda` tunes the Triton kernels of a GPU.
"""

from __future__ import annotations

import argparse
from typing import Any

from tilefold.backends.cpu.matmul.tuned import STORE as PRODUCTS
from tilefold.backends.cpu.tables import Blocks
from tilefold.backends.cpu.tuned import STORE
from tilefold.backends.triton.tuned import STORE as GPU_STORE
from tilefold.commands import product_options, specification, terminal, tune_table
from tilefold.common.tuned_store import TunedStore
from tilefold.masks import parse
from tilefold.measuring import tuning
from tilefold.measuring.environment import environment
from tilefold.measuring.products import OPERATIONS as PRODUCT_OPERATIONS
from tilefold.measuring.tuning import Tuned
from tilefold.measuring.workload import OPERATIONS, Case
from tilefold.problems.attention import ITEM_BYTES

SECONDS = {"cpu": 6.0, "cuda": 60.0}
"""The default of `--seconds`, the time for each kernel, by device."""


def register(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "tune",
        help="find the fastest block sizes for your shapes, and keep them",
        description=__doc__.partition("\n\n")[2],
        epilog=terminal.EXIT_CODES,
    )
    parser.set_defaults(main=main, usual=parser.get_default)
    parser.add_argument("--shape", nargs="+", default=["1,8,2048,64"], metavar=specification.SHAPE)
    specification.add_sizes(parser)
    specification.add_precision(parser)
    parser.add_argument("--dtype", nargs="+", choices=(*ITEM_BYTES, "int8"), default=["float32"])
    parser.add_argument("--mask", nargs="+", default=["full()"], metavar="RULE")
    parser.add_argument(
        "--operation",
        nargs="+",
        choices=(*OPERATIONS, *PRODUCT_OPERATIONS),
        default=list(OPERATIONS),
    )
    product_options.add(parser, nargs="+")
    parser.add_argument("--form", choices=("auto", "fused", "split"), default="auto")
    parser.add_argument(
        "--threads",
        type=int,
        help="default 1, which other programs disturb least; the winners serve any number",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: this machine's first GPU"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help="seconds per kernel (default: 6 without compiling; on a GPU 60, compiling included)",
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--dry-run", action="store_true", help="measure, but keep nothing")
    group.add_argument(
        "--forget",
        action="store_true",
        help="remove all kept winners of the device, or of gemm, then stop",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def main(options: argparse.Namespace) -> int:
    """Measure candidates, keep the winners and show them; or forget all kept winners.

    With `--operation gemm` these are the winners of products.
    """
    on_gpu = options.device == "cuda"
    if on_gpu and options.threads is not None:
        raise ValueError("--threads goes with --device cpu")
    products = _products(options)
    if options.form != "auto" and not products and "backward" not in options.operation:
        raise ValueError(f"--form {options.form} goes with --operation backward")
    stores: dict[str, TunedStore[Any, Any]] = {"cuda": GPU_STORE, "cpu": STORE, "gemm": PRODUCTS}
    if options.forget:
        return _forget(stores["gemm" if products else options.device], options.json)
    if options.seconds is None:
        options.seconds = SECONDS[options.device]
    if not options.seconds > 0:
        raise ValueError(f"--seconds must be more than 0, not {options.seconds}")
    if products:
        from tilefold.commands import tune_product

        return tune_product.main(options)
    product_options.check_attention(options)
    if on_gpu:
        from tilefold.commands import tune_gpu

        return tune_gpu.main(options)
    if options.threads is None:
        options.threads = 1
    if not options.dry_run:
        STORE.check()
    found = _measure(_cases(options), options.seconds, options.form)
    if not options.dry_run:
        tuning.keep(found)
    document = _document(found, stored=not options.dry_run)
    if options.json:
        terminal.print_json(document)
    else:
        tune_table.show(document, _title, {"block_traverse": "traversed"})
    return 0


def _products(options: argparse.Namespace) -> bool:
    """True for products of matrices. Raises ValueError for those without blocks to choose."""
    chosen = [name for name in options.operation if name in PRODUCT_OPERATIONS]
    if not chosen:
        return False
    if len(options.operation) > 1:
        raise ValueError(f"--operation {chosen[0]} stands alone")
    if chosen == ["qgemm"]:
        raise ValueError(
            "--operation qgemm is not tuned: its blocks follow from the scheme and the sizes"
        )
    return True


def _forget(kept: TunedStore[Any, Any], as_json: bool) -> int:
    """Remove the file of a store, and say how many winners it had."""
    count = kept.forget()
    if as_json:
        terminal.print_json({"path": str(kept.path), "forgotten": count})
    else:
        terminal.out().print(f"{count} winners forgotten", soft_wrap=True)
    return 0


def _cases(options: argparse.Namespace) -> list[Case]:
    return [
        Case(
            specification.problem(options, text, parse.parse(mask), dtype),
            operation,
            options.threads,
        )
        for dtype in options.dtype
        for operation in options.operation
        for text in options.shape
        for mask in options.mask
    ]


def _measure(cases: list[Case], seconds: float, form: str) -> list[Tuned]:
    found: list[Tuned] = []
    with terminal.progress() as bar:
        total = tuning.STAGES * sum(len(tuning.passes(case, form)) for case in cases)
        task = bar.add_task("", total=total, completed=-1)

        def note(text: str) -> None:
            bar.update(task, description=text, advance=1)

        for case in cases:
            found += tuning.tune(case, seconds=seconds, form=form, note=note)
    return found


def _document(found: list[Tuned], stored: bool) -> dict[str, Any]:
    return {
        **environment(),
        "path": str(STORE.path) if stored else None,
        "kernels": [_describe(tuned) for tuned in found],
    }


def _describe(tuned: Tuned) -> dict[str, Any]:
    case, key, measured = tuned.case, tuned.key, tuned.measured
    return {
        "kernel": key.kernel,
        "shape": case.shape,
        "dtype": key.dtype,
        "precision": case.problem.precision,
        "unit": key.unit,
        "mask": str(case.problem.mask),
        "threads": case.threads,
        **tune_table.trials(measured, _sizes),
    }


def _sizes(blocks: Blocks) -> dict[str, int]:
    return {
        "rows": blocks.tile.rows,
        "vectors": blocks.tile.vectors,
        "block_traverse": blocks.block_traverse,
    }


def _title(tuned: dict[str, Any]) -> str:
    kind = specification.kind(tuned["dtype"], tuned["precision"])
    return f"{tuned['kernel']} {tuned['shape']} {kind} {tuned['mask']}"
