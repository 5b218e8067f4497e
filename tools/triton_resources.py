"""Write into docs/triton.md what the compiler says of Triton kernels: registers, spills, memory.

Kernels are compiled ahead of time, for which no GPU is needed, but Triton and some minutes; what it
said is kept, with the hash of each text, in benchmarks/results/triton_resources.json. `--check`
compiles nothing: it fails when a text is another one now, or when the page does not say what the
file does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from tilefold import causal
from tilefold.backends.matmul import Codes
from tilefold.backends.triton.ahead import Compiled, Spec, emit, reports
from tilefold.backends.triton.architectures import architecture
from tilefold.backends.triton.launch import Launch
from tilefold.backends.triton.matmul import tables
from tilefold.backends.triton.matmul.codes import multiplied
from tilefold.backends.triton.matmul.gemm import GemmSpec
from tilefold.backends.triton.plan import plan
from tilefold.problems.attention import Problem

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "triton.md"
KEPT = ROOT / "benchmarks" / "results" / "triton_resources.json"
BEGIN = "<!-- RESOURCES BEGIN: written by tools/triton_resources.py -->"
END = "<!-- RESOURCES END -->"
WIDTH = 118
WORKERS = 3

NAMES = {
    "forward": "forward",
    "backward_dq": "dQ",
    "backward_dkv": "dK/dV",
    "backward": "fused backward",
    "decode": "decode",
    "delta": "delta",
    "merge": "merge",
    "reduce_dq": "sum of dQ",
    "gemm": "product",
    "gated": "product and its gate, silu",
    "int4": "product with int4, groups of 128",
    "palette6": "product with a palette",
}
FORMS = {
    "forward": ("forward", "tiled"),
    "backward_dq": ("backward", "split"),
    "backward_dkv": ("backward", "split"),
    "backward": ("backward", "fused"),
    "decode": ("forward", "decode"),
    "delta": ("backward", "fused"),
    "merge": ("forward", "decode"),
    "reduce_dq": ("backward", "fused"),
}
"""The operation of a plan and the form that has a kernel."""


PRODUCTS = ("gemm", "gated", "int4", "palette6")
"""Kernels of products; their `dim` is the number of rows."""


class Case(NamedTuple):
    """A kernel of the table; `precision` is how float32 is multiplied.

    Without `aligned`, operands lie so that no descriptor can be made of them.
    """

    architecture: str
    operation: str
    dtype: str
    dim: int
    precision: str = "highest"
    aligned: bool = True


Row = dict[str, Any]


def cases() -> Iterator[Case]:
    """All rows: what is trained and decoded with half types, and less of the others."""
    for name in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942"):
        for operation in ("forward", "backward_dq", "backward_dkv", "backward", "decode"):
            for dim in (64, 128):
                yield Case(name, operation, "bfloat16", dim)
        for operation in ("forward", "backward_dkv"):
            for dim in (80, 256, 512):
                yield Case(name, operation, "bfloat16", dim)
        for operation in ("delta", "merge", "reduce_dq"):
            yield Case(name, operation, "bfloat16", 128)
        yield Case(name, "backward_dq", "float16", 80)
        yield Case(name, "decode", "float16", 256)
        if name != "gfx942":
            for operation in ("forward", "backward_dkv"):
                yield Case(name, operation, "float16", 128, aligned=False)
        kinds = [("float32", "highest")]
        if name != "gfx942":
            kinds += [("float32", "high"), ("float32", "medium")]
        kinds.append(("float64", "highest"))
        for dtype, precision in kinds:
            for operation in ("forward", "backward_dkv"):
                for dim in (64, 512) if precision == "highest" else (64,):
                    yield Case(name, operation, dtype, dim, precision)
            if precision == "highest":
                yield Case(name, "backward_dq", dtype, 64)
            if precision == "high":
                yield Case(name, "forward", dtype, 128, precision)
        for operation in PRODUCTS:
            yield Case(name, operation, "float16", 4096)
        for operation in ("int4", "palette6"):
            yield Case(name, operation, "float16", 1)
        yield Case(name, "gemm", "float32", 4096)


def launch_of(case: Case) -> Launch:
    """The launch of a plan that has the kernel of a case: long sequences, a causal mask."""
    operation, form = FORMS[case.operation]
    queries = 1 if form == "decode" else 4096
    shapes = (1, 8, queries, case.dim), (1, 4, 4096, case.dim)
    problem = Problem.of(
        *shapes,
        dtype=case.dtype,
        mask=causal(),
        precision=case.precision,  # type: ignore[arg-type]
    )
    found = plan(problem, case.architecture, operation, form=form).launches
    return next(launch for launch in found if launch.spec.kernel == case.operation)


def product_of(case: Case) -> GemmSpec:
    """The kernel of a product with many columns, of matrices that lie in rows."""
    device, kind = architecture(case.architecture), case.dtype
    codes = {"int4": Codes("int4", 128, "float16"), "palette6": Codes("palette6")}
    if held := codes.get(case.operation):
        blocks = tables.quantized_blocks(held, case.dim)
        return GemmSpec(kind, multiplied(held, kind), kind, blocks, bias="column", codes=held)
    blocks = tables.block_sizes(case.architecture, kind, case.dim, 4096)
    gate = case.operation == "gated"
    return GemmSpec(
        *(kind, kind, kind),
        blocks=tables.halved(blocks) if gate else blocks,
        activation="silu" if gate else None,
        descriptors=device.asynchronous and kind == "float16",
        gate=gate,
    )


def spec_of(case: Case) -> Spec:
    """The kernel of a case as it runs."""
    if case.operation in PRODUCTS:
        return product_of(case)
    launch = launch_of(case)
    return replace(launch.spec, descriptors=launch.choice.descriptors and case.aligned)


def identity(spec: Spec) -> tuple[str, str]:
    """The hash of a kernel's text, and its blocks: warps and stages stand in no text."""
    return hashlib.sha256(emit(spec).encode()).hexdigest(), str(spec.blocks)


def main() -> int:
    """Compile and write, or check."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail when something is out of date")
    if not parser.parse_args().check:
        kept = compile_all(json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else [])
        KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), block(kept)), encoding="utf-8")
        return 0
    reasons = stale(json.loads(KEPT.read_text(encoding="utf-8")), PAGE.read_text(encoding="utf-8"))
    for reason in reasons:
        print(f"{reason}: python tools/triton_resources.py", file=sys.stderr)
    return int(bool(reasons))


def stale(kept: list[Row], page: str) -> list[str]:
    """What is out of date, in words."""
    known = {Case(*row["case"]): (row["text"], row["blocks"]) for row in kept}
    found = [
        f"the kernel of {' '.join(map(str, case))} is another one"
        for case in cases()
        if known.get(case) != identity(spec_of(case))
    ]
    if replaced(page, block(kept)) != page:
        found.append(f"{PAGE.name} is out of date")
    return found


def compile_all(kept: list[Row]) -> list[Row]:
    """The reports of all cases; a kernel that was compiled is not compiled again."""
    known = {(*Case(*row["case"]), row["text"], row["blocks"]): row for row in kept}
    every = [(case, spec_of(case)) for case in cases()]
    keys = [(*case, *identity(spec)) for case, spec in every]
    waiting = [pair for pair, key in zip(every, keys, strict=True) if key not in known]
    tasks = [(spec, case.architecture) for case, spec in waiting]
    for (case, spec), report in zip(waiting, reports(tasks, workers=WORKERS), strict=True):
        text, blocks = identity(spec)
        known[(*case, text, blocks)] = {
            "case": case,
            "text": text,
            "blocks": blocks,
            "descriptors": spec.descriptors,
            **{name: value for name, value in asdict(report).items() if name != "architecture"},
        }
    return [known[key] for key in keys]


def report_of(row: Row) -> Compiled:
    """The report of a row that was kept."""
    names = Compiled.__dataclass_fields__.keys() & row.keys()
    return Compiled(architecture=row["case"][0], **{name: row[name] for name in names})


def replaced(page: str, text: str) -> str:
    """A page with another block. Raises ValueError where it has no marks."""
    pattern = re.compile(r"<!-- RESOURCES BEGIN.*?-->\n.*?<!-- RESOURCES END -->", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise ValueError(f"{PAGE.name} has one block of resources, between its marks")
    return pattern.sub(lambda _: f"{BEGIN}\n{text}\n{END}", page)


WORDS = """
**Reports of a compiler, not measurements.** Each kernel was compiled ahead of time by Triton
{triton}, for long sequences, a causal mask and aligned operands, with the blocks that a plan takes.
Nothing was run on a GPU for this table, and it says nothing about time. *Registers* are the 32-bit
registers of a thread. There are 255 on NVIDIA's GPUs and 512 on AMD's, and compilers often take all
of them. *Spills* are loads and stores of spilled registers in the loop over tiles, for one tile of
a thread. One column counts the loop over whole tiles, which is the hot loop. The other counts the
loop over tiles at an edge of the mask. A third walk runs only if NaN, infinities or scores beyond
2^24 were found. It
spills more, and is not counted. A product has one loop, and its number of rows stands for D.
*Copies* says how traversed tiles come to shared memory: "tma" by tensor descriptors, "cp.async" by
asynchronous copies, else through registers.
"""


def block(kept: list[Row]) -> str:
    """What stands between the marks."""
    words = WORDS.format(triton=kept[0]["triton"])
    head = ["GPU", "type", "kernel", "D", "blocks", "registers", "spills: whole", "edge"]
    head += ["shared memory", "multiplies by", "copies"]
    lines = [
        textwrap.fill(" ".join(words.split()), WIDTH),
        "",
        f"| {' | '.join(head)} |",
        f"|---|---|---|--:|---|{'--:|' * 4}---|---|",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(cells(row))} |" for row in kept)])


def cells(row: Row) -> list[str]:
    """A row of the table."""
    case, report = Case(*row["case"]), report_of(row)
    kinds = {"highest": "", "high": ", 3 TF32", "medium": ", TF32"}
    dtype = case.dtype + (kinds[case.precision] if case.dtype == "float32" else "")
    dtype += "" if case.aligned else ", not aligned"
    walks = ("body", "") if case.operation in PRODUCTS else ("whole", "edge")
    spills = [str(report.spills.get(walk, "-")) for walk in walks]
    return [
        f"{case.architecture} ({architecture(case.architecture).chips})",
        dtype,
        NAMES[case.operation],
        str(case.dim),
        row["blocks"],
        str(report.registers),
        *spills,
        f"{report.shared_bytes / 1024:.0f} KiB",
        multiplier(report.instructions, case.operation),
        copies(report.instructions),
    ]


def multiplier(counts: Mapping[str, int], operation: str) -> str:
    """The instruction that multiplies tiles."""
    if operation in ("delta", "merge", "reduce_dq"):
        return "-"
    units = [name for name in ("wgmma", "tcgen05.mma", "mma.sync", "mfma") if name in counts]
    return " and ".join(units) or "fma"


def copies(counts: Mapping[str, int]) -> str:
    """How tiles come to shared memory."""
    return "tma" if "bulk copies" in counts else "cp.async" if "cp.async" in counts else "-"


if __name__ == "__main__":
    sys.exit(main())
