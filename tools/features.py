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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "features.md"

ROWS = {
    "M01": "Forward without the score matrix; o and lse agree with the dense float64 definition",
    "M02": "Batch and heads are a loop over the single-head problem, as far as results go",
    "M03": "Every kernel is written and compiled on the first call; nothing is prebuilt",
    "M04": "Backward in two passes: no atomics, bit-identical runs, one number of scratch per row",
    "M05": "Each output tile has one owner, however dQ, dK and dV are split over queries and keys",
    "M06": "Any head dimension, odd ones and those beyond the registers included",
    "M07": "Block sizes come from a table one can ask and override; results do not depend on it",
    "M10": "A count of instructions per pass, and lower bounds on a device from measured rates",
    "M11": "A matrix product of its own: any shape, transposes, mixed types, strides, accumulation",
    "M12": "A suite of quick tests that ends within seconds",
    "M13": "The text of a kernel is one file, which an app can take as it stands",
    "M14": "An edited generator takes effect at once; a broken one shows the line at fault",
    "M15": "Tiles that a mask hides are not computed, whatever the rule",
    "M16": "Lengths of queries and keys are independent; operands may lie transposed",
    "A03": "One call for each operation, types as options; unknown ones are refused by name",
    "A05": "What stays the same in a kernel is in its text, and another text is another kernel",
    "A06": "What an implementation cannot do raises with the reason; none stands in for another",
    "A07": "A list of calls is prepared first and launched in one go; results are those of each",
    "A10": "Kernels compile in the background ahead of their calls, which wait for what they need",
    "T01": "float64, float32, bfloat16 and float16, both passes, each within its tolerance",
    "T02": "Sequences of one or two dimensions, channel-first layouts, values of another dimension",
    "T03": "The mask that hides nothing",
    "T04": "Causal masks in 1-D and in the raster order of 2-D",
    "T05": "Local windows with a stride, causal or not",
    "T06": "Queries and keys of different sizes share coordinates in three ways, per dimension",
    "T07": "Rules cost no memory: hidden tiles are skipped, in 2-D mid-row too",
    "T08": "Work is spread over batch, heads and sequence",
    "T09": "Gradients of q, k and v; rows that see nothing have gradient zero",
    "T10": "The log-sum-exp of every row on request",
    "T11": "Channel-first example: local window, 8 heads, 1024 queries against 2048 keys",
    "T12": "Every public function documents its arguments, shapes and errors",
    "T13": "An ordinary package: a wheel, a plain install and an editable one",
    "T15": "Bad input raises one line that names the argument; it never ends the process",
    "S01": "A ladder of matrix products from naive to fast, a file for each rung, each checked",
    "S02": "A ladder of softmax kernels from naive to fast, a file for each rung, all the same",
    "S03": "One benchmark prints the ladders, with what this device did and nobody else's figures",
    "S04": "A plain dense computation serves as the baseline",
    "S05": "A readable reference in plain NumPy, with gradients",
    "S06": "Tests for pytest, and benchmarks that are one command each",
    "S07": "Kernels keep their names, by which a profiler finds each of them",
    "S08": "A sweep over block sizes",
    "S09": "How long a kernel takes to compile, and to come from the cache",
    "S10": "Flash attention and transposed products in Triton, tested part by part",
    "J01": "The same result from two products and a softmax",
    "J02": "The same result from the framework's own fused attention",
    "J03": "Attention in kernels made of 8x8 fragments, as text for Apple GPUs",
    "J04": "A typed 8x8 fragment: load and store with an origin, fill, product, sum, transposed",
    "J05": "A typed description of Metal 4's matmul2d: sizes, transposes, precision, mode",
    "J06": "Its table of types: every pair as an integer or float64 product, others refused",
    "J07": "Its operands are views of device or threadgroup memory, of any rank, and their slices",
    "J08": "A product is a sum over steps of K, however many, the last one partial",
    "J09": "A product of matrices made of tiles of 64 x 64, within 3e-7 of float64",
    "J10": "Attention of a square head is one kernel, launched once",
    "J11": "Results of products stay in registers, and so does what follows element by element",
    "J12": "The product and its number of simdgroups are in the text; another number is refused",
    "J13": "What is not there is shown with the reason",
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
        if not target.exists():
            raise SystemExit(done.stdout + done.stderr)
        table: dict[str, list[str]] = json.loads(target.read_text(encoding="utf-8"))
    return table


def render(shown: dict[str, list[str]]) -> str:
    """The page's Markdown."""
    lines = [
        "# Features",
        "",
        "What tilefold promises, and the tests that show it; written by `tools/features.py`.",
        "",
        "| | promise | shown by |",
        "|---|---|---|",
    ]
    for row, words in ROWS.items():
        tests = "<br>".join(f"`{test.removeprefix('tests/')}`" for test in shown.get(row, []))
        lines.append(f"| {row} | {words} | {tests or 'no test yet'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
