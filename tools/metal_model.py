"""Write into docs/metal.md what Metal kernels issue by a model, how long they are, what they take.

Counting needs the emulator with Clang, and minutes; what it counted is kept, with the hash of each
text, in benchmarks/results/metal_model.json. `--check` counts nothing: it fails when a text is
another one now, or when the page does not say what the file and the planner do.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tilefold.backends.matmul import Codes
from tilefold.backends.metal import source
from tilefold.backends.metal.dispatch import WIDEST_MOVE
from tilefold.backends.metal.families import family
from tilefold.backends.metal.matmul import gemm, rows
from tilefold.backends.metal.matmul.calls import block_sizes
from tilefold.backends.metal.matmul.rows import SoftmaxSpec
from tilefold.backends.metal.matmul.spec import GemmSpec
from tilefold.backends.metal.model import MODELLED, Model, model, text_of
from tilefold.backends.metal.plan import plan
from tilefold.problems.attention import Problem

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "metal.md"
KEPT = ROOT / "benchmarks" / "results" / "metal_model.json"
BEGIN = "<!-- MODEL BEGIN: written by tools/metal_model.py -->"
END = "<!-- MODEL END -->"
WIDTH = 118

GPUS = {"apple7": "M1, M2", "apple9": "M3 and later"}
DIMS = (64, 128)
DTYPES = ("float16", "float32")

PUBLISHED = {
    ("apple7", "float16"): {64: (89, 83, 78), 128: (87, 83, 79)},
    ("apple7", "float32"): {64: (68, 63, 62), 128: (69, 66, 64)},
    ("apple9", "float16"): {64: (97, 94, 91), 128: (93, 90, 88)},
    ("apple9", "float32"): {64: (78, 79, 77), 128: (75, 70, 69)},
}
"""Utilisation in per cent of forward, dQ and dK/dV of Metal FlashAttention at commit 8671cdd, from
the spreadsheet in its repository: M1 Max with 16384 tokens, M4 with 8192; its "mixed" precision
stands for float16."""

GROUPS = {
    "products": ("multiplies",),
    "exponentials": ("exponentials", "shuffles"),
    "elements": ("elements",),
    "memory": ("device_loads", "device_stores", "threadgroup_loads", "threadgroup_stores"),
}
"""The columns of the table, and the weighed operations in each."""

NAMES = {"forward": "forward", "backward_dq": "dQ", "backward_dkv": "dK/dV"}

Row = dict[str, Any]


def main() -> int:
    """Count and write, or check."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail when something is out of date")
    if not parser.parse_args().check:
        kept = count()
        KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), block(kept)), encoding="utf-8")
        return 0
    reasons = stale(json.loads(KEPT.read_text(encoding="utf-8")), PAGE.read_text(encoding="utf-8"))
    for reason in reasons:
        print(f"{reason}: python tools/metal_model.py", file=sys.stderr)
    return int(bool(reasons))


def stale(kept: list[Row], page: str) -> list[str]:
    """What is out of date, in words."""
    today = {key: digest(*key) for key in cases()}
    counted = {tuple(row["case"]): row["text"] for row in kept}
    found = [f"the text of {' '.join(map(str, key))} is another one"
             for key, text in today.items() if counted.get(key) != text]  # fmt: skip
    if replaced(page, block(kept)) != page:
        found.append(f"{PAGE.name} is out of date")
    return found


def cases() -> Iterator[tuple[str, str, int, str]]:
    """Family, type, head dimension and operation of each row."""
    for name in GPUS:
        for dtype in DTYPES:
            for dim in DIMS:
                for operation in MODELLED:
                    yield name, dtype, dim, operation


def digest(name: str, dtype: str, dim: int, operation: str) -> str:
    """The hash of a kernel's text."""
    return hashlib.sha256(text_of(name, operation, dtype, dim).encode()).hexdigest()


def count() -> list[Row]:
    """Run all kernels on the emulator."""
    found = []
    for name, dtype, dim, operation in cases():
        made = model(name, operation, dtype, dim)
        case = (name, dtype, dim, operation)
        row = {"case": case, "text": digest(*case), "pairs": made.pairs, "counts": made.counts}
        found.append(row)
        print(*case, f"{made.issued:.2f}", flush=True)
    return found


def replaced(page: str, text: str) -> str:
    """A page with another block. Raises ValueError where it has no marks."""
    pattern = re.compile(r"<!-- MODEL BEGIN.*?-->\n.*?<!-- MODEL END -->", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise ValueError(f"{PAGE.name} has one block of the model, between its marks")
    return pattern.sub(lambda _: f"{BEGIN}\n{text}\n{END}", page)


def block(kept: list[Row]) -> str:
    """What stands between the marks."""
    return "\n".join([*model_table(kept), "", *sizes_table()])


MODEL_WORDS = """
**A model, not a measurement.** The emulator counts the operations of an emitted kernel for one tile
in the middle of a long sequence without a mask. Each operation has a weight, in multiply-adds of
one lane, which follows from public measurements of an M1: 512 for a product of two fragments, 4 for
an exponential, 64 for a shuffle of a simdgroup, 1 for an access to memory, and one half for an
access to an element of a fragment, since most statements read one element and set one. The useful
operations are (2D + 5), (3D + 5) and (4D + 5) for each pair. *By the model* is the inverse of the
sum. It is the share of the peak for a core that issues one instruction after the other and never
waits. The model does not count addresses, loops and spilled registers. By a gap of the counter, it
does not count the reads of four elements at once in staged copies either, about 0.01 on M1 and M2.
It counts neighbours one by one, although a GPU may read them at once. From M3 on, several units of
a core work side by side. So a GPU may be above the model or below it.
"""

PUBLISHED_WORDS = """
The last column is the utilisation that Metal FlashAttention, in Swift, was measured to reach with
kernel sources of its own (commit 8671cdd, the spreadsheet in its repository): M1 Max with 16384
tokens, M4 with 8192, one head, and its mixed precision for float16. It copies by an asynchronous
engine that public Metal does not have. The column gives the scale, and says nothing about the
kernels here.
"""

SIZES_WORDS = """
The next table shows how long the kernel sources are, and what a thread and a threadgroup take by
plan. The register bytes count tiles alone, and the GPU's compiler decides the rest. The kernels
have no mask, and contiguous and aligned arrays. Kernels of attention move four elements at once if
they can.
"""


def wrapped(words: str) -> str:
    """Prose in lines as long as the page's."""
    return textwrap.fill(" ".join(words.split()), WIDTH)


def model_table(kept: list[Row]) -> list[str]:
    """Instructions issued for each useful one, by kind, beside the published utilisation."""
    head = ["GPU", "type", "D", "kernel", *GROUPS, "issued per useful", "by the model", "published"]
    lines = [
        wrapped(MODEL_WORDS),
        "",
        wrapped(PUBLISHED_WORDS),
        "",
        f"| {' | '.join(head)} |",
        f"|---|---|--:|---|{'--:|' * (len(GROUPS) + 3)}",
    ]
    for row in kept:
        name, dtype, dim, operation = row["case"]
        made = Model(operation, dim, row["pairs"], row["counts"])
        parts = [sum(made.shares[each] for each in group) for group in GROUPS.values()]
        published = PUBLISHED[name, dtype][dim][MODELLED.index(operation)]
        cells = [GPUS[name], dtype, str(dim), NAMES[operation]]
        cells += [f"{part:.2f}" for part in parts]
        cells += [f"{made.issued:.2f}", f"{100 / made.issued:.0f} %", f"{published} %"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def sizes_table() -> list[str]:
    """Lines of text and planned bytes of each kernel."""
    head = ["kernel", "GPU", "type", "blocks", "lines", "register bytes", "threadgroup bytes"]
    lines = [
        wrapped(SIZES_WORDS),
        "",
        f"| {' | '.join(head)} |",
        f"|---|---|---|---|{'--:|' * 3}",
    ]
    for cells in (*attention_sizes(), *own_sizes()):
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def attention_sizes() -> Iterator[tuple[Any, ...]]:
    """The rows of attention kernels."""
    for name, gpu in GPUS.items():
        for dim in DIMS:
            problem = Problem.of((1, 8, 4096, dim), dtype="float16")
            made = [plan(problem, name, each) for each in ("forward", "backward")]
            decode = Problem.of((1, 8, 1, dim), (1, 8, 4096, dim), dtype="float16")
            made.append(plan(decode, name, "forward", form="decode"))
            for launched in (one for each in made for one in each.launches):
                spec, choice = launched.spec, launched.choice
                yield (
                    f"`{spec.entry}`, D {dim}",
                    gpu,
                    "float16",
                    spec.blocks,
                    source.emit(replace(spec, vector=WIDEST_MOVE)).count("\n"),
                    choice.register_bytes,
                    choice.threadgroup_bytes,
                )


def own_sizes() -> Iterator[tuple[Any, ...]]:
    """The rows of products and softmax."""
    for name, gpu in GPUS.items():
        limits = family(name)
        blocks = block_sizes(limits.staged, "float16", 4096, 4096)
        types = ("float16", "float16", "float16")
        product = GemmSpec(*types, blocks, staged=limits.staged, bfloat=limits.bfloat)
        exact = block_sizes(limits.staged, "float32", 4096, 4096)
        codes = replace(product, b="float32", blocks=exact, codes=Codes("int4", 128, "float16"))
        for named, spec in (
            ("", product),
            (", a gate", replace(product, gate=True)),
            (", int4", codes),
        ):
            high, wide = spec.fragments
            size, factors = spec.operand.compute_bytes, 1 + spec.gate
            registers = 2 * (4 * high * wide * factors + size * (high + wide * factors))
            text = gemm.emit(spec)
            where = (spec.blocks, text.count("\n"), registers, spec.threadgroup_bytes)
            yield (f"`{gemm.ENTRY}`{named}", gpu, "float16", *where)
    for each in (rows.SIMDGROUPS, 1):
        softmax = SoftmaxSpec("float16", rows=each, bfloat=False, lse=True)
        text = rows.emit(softmax)
        memory = 0 if each > 1 else 2 * 4 * rows.SIMDGROUPS
        yield f"`{rows.ENTRY}`", "all", "float16", f"{each} rows", text.count("\n"), 8, memory


if __name__ == "__main__":
    sys.exit(main())
