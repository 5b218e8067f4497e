"""Write docs/features.md: each promised feature in our words, and the tests that show it.

The tests say which feature they show with `@pytest.mark.feature("T05")`; this script asks pytest
to collect them.
`--check` writes nothing and fails when the page is out of date or a feature has no test.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "features.md"

ROWS = {
    "M01": "Forward never holds the score matrix; o and lse agree with dense attention in float64",
    "M02": "Batch and heads give the same results as a loop over single heads",
    "M03": "Every kernel is written and compiled at its first call; nothing is prebuilt",
    "M04": "Backward has no atomics, repeats bit for bit, and keeps one number of scratch per row",
    "M05": "Each tile of a result has one owner, however dQ, dK and dV divide queries and keys",
    "M06": "Any head dimension works: odd ones, and ones that do not fit the registers",
    "M07": "Block sizes come from a table to read and override; results do not depend on them",
    "M10": "Instructions of each pass are counted, with lower bounds of time from measured rates",
    "M11": "A matrix product: any shape, transposes, mixed types, strides, accumulation",
    "M12": "A suite of quick tests ends within seconds",
    "M13": "The source of a kernel is one file that an app can take as it is",
    "M14": "An edited generator takes effect at once; a broken one shows the line with the fault",
    "M15": "Tiles that a mask hides are not computed, whatever the rule",
    "M16": "Numbers of queries and keys are independent; operands may be transposed in memory",
    "A02": "qgemm: products with quantised matrices, types of input and result as options",
    "A03": "One call for each operation, types as options; unknown options are refused by name",
    "A01": "Products by the names and arguments of BLAS, and as one call for arrays of any strides",
    "A05": "What is constant in a kernel is in its source, and another source is another kernel",
    "A06": "What an implementation cannot do raises with the reason; no other one steps in",
    "A07": "A list of calls is prepared first, then launched at once; results are those of each",
    "A09": "Types are mixed in one call, without a pass: float16 times float32 into bfloat16",
    "A10": "Kernels compile in the background; a call waits for the kernels that it needs",
    "A12": "Batches that broadcast; bias by columns or rows and activations inside of the product",
    "A11": "A layer of attention is products, attention, and a product with its activation",
    "A14": "6-bit palettes: 64 float16 numbers, found or given, and packed indices",
    "A16": "What other programs build on has names that stay: functions, operators, entries",
    "T01": "float64, float32, bfloat16 and float16 in both passes, each within its tolerance",
    "T02": "Sequences of one or two dimensions, channel-first layouts, values of another width",
    "T03": "The mask that hides nothing",
    "T04": "Causal masks of sequences and of images in raster order",
    "T05": "Local windows with a stride, causal or not",
    "T06": "Queries and keys of different sizes share coordinates in three ways, per dimension",
    "T07": "Rules need no memory: hidden tiles are skipped, inside the row of an image too",
    "T08": "Work is divided over batch, heads and sequence",
    "T09": "Gradients of q, k and v; rows that see nothing have zero gradients",
    "T10": "The log-sum-exp and the largest score of every row are returned on request",
    "T11": "A channel-first example: local window, 8 heads, 1024 queries and 2048 keys",
    "T12": "Every public function documents its arguments, shapes and errors",
    "T13": "An ordinary package: a wheel, a plain install and an editable install",
    "T14": "Rows in shared memory avoid the same banks by padding or swizzling: equal results",
    "T15": "Bad input raises one line that names the argument; it never ends the process",
    "S01": "A ladder of matrix products from naive to fast: one file per rung, each checked",
    "S02": "A ladder of softmax kernels from naive to fast: one file per rung, all the same",
    "S03": "One benchmark prints the ladders with what this device did, and no other figures",
    "S04": "A plain dense computation is the baseline",
    "S05": "A readable reference in plain NumPy, with gradients",
    "S06": "Tests for pytest, and benchmarks of one command each",
    "S07": "Kernels keep their names, so that a profiler finds each of them",
    "S08": "A sweep over block sizes",
    "S09": "The time to compile a kernel, and to read it from the cache",
    "S10": "Flash attention and transposed products in Triton, tested part by part",
    "J01": "The same result as two products and a softmax",
    "J02": "The same result as the framework's own fused attention, with additive masks too",
    "J03": "Attention in kernels of 8x8 fragments, as source for Apple GPUs",
    "J04": "A typed 8x8 fragment: load and store with an origin, fill, product, sum, transpose",
    "J05": "A typed description of Metal 4's matmul2d: sizes, transposes, precision, mode",
    "J06": "Its table of types: each pair as an integer or float64 product, others refused",
    "J07": "Its operands are views of device or threadgroup memory, of any rank, and slices",
    "J08": "A product is a sum over any number of steps of K; the last step may be partial",
    "J09": "A matrix product of 64 x 64 tiles, within 3e-7 of float64",
    "J10": "Attention of a square head is one kernel, launched once",
    "J11": "Results of products stay in registers, and so do element-wise operations after them",
    "J12": "The product and its number of simdgroups are in the source; another number is refused",
    "J13": "What is missing on a machine is named with the reason",
}  # fmt: skip


def main() -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail when the page is out of date")
    check = parser.parse_args().check
    shown = collect()
    page = render(shown)
    missing = sorted(ROWS.keys() - shown.keys())
    if check and missing:
        print(f"no test shows {', '.join(missing)}", file=sys.stderr)
        return 1
    if check and (not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page):
        print("docs/features.md is out of date: python tools/features.py", file=sys.stderr)
        return 1
    if not check:
        PAGE.write_text(page, encoding="utf-8")
    return 0


def collect() -> dict[str, list[str]]:
    """Feature -> ids of the tests that show it."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "features.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "--collect-only",
            "-qq",
            "-p",
            "no:cacheprovider",
        ]
        done = subprocess.run(
            [*command, f"--features-to={target}"], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode or not target.exists():
            raise SystemExit(done.stdout + done.stderr)
        table: dict[str, list[str]] = json.loads(target.read_text(encoding="utf-8"))
    return table


def render(shown: dict[str, list[str]]) -> str:
    """The page's Markdown: a line for each feature, then the tests of each, folded."""
    lines = [
        "# Features",
        "",
        "What tilefold promises, and the suites of tests that show it. The tests themselves are",
        "listed below the table. `tools/features.py` writes this page.",
        "",
        "| | promise | shown by |",
        "|---|---|---|",
    ]
    for row, words in ROWS.items():
        lines.append(f"| {row} | {words} | {suites(shown.get(row, [])) or 'no test yet'} |")
    lines += ["", "## Tests of each feature", ""]
    for row in ROWS:
        tests = [test.removeprefix("tests/") for test in shown.get(row, [])]
        lines += [f"<details><summary>{row}: {counted(len(tests), 'test')}</summary><ul>"]
        lines += [f"<li><code>{test}</code></li>" for test in tests]
        lines += ["</ul></details>", ""]
    return "\n".join(lines).rstrip() + "\n"


def suites(tests: Sequence[str]) -> str:
    """The suites of tests in words: "conformance (cpu, metal), reference (problems)"."""
    folders: dict[str, list[str]] = {}
    for test in tests:
        path = Path(test.partition("::")[0])
        suite = path.stem.removeprefix("test_").replace("_", " ")
        found = folders.setdefault(suite, [])
        if path.parent.name not in found:
            found.append(path.parent.name)
    return ", ".join(
        suite if suite in found else f"{suite} ({', '.join(found)})"
        for suite, found in folders.items()
    )


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 test", "2 tests"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


if __name__ == "__main__":
    sys.exit(main())
