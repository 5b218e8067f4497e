"""Write what was measured into the pages: README.md and docs/performance.md, between their marks.

Every figure of those blocks comes from benchmarks/results/*.json, which `make bench` and the other
scripts of benchmarks/ write. `--check` writes nothing and fails when a page says something else.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tilefold.commands import terminal
from tilefold.measuring.baselines import BASELINES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = RESULTS / "comparison.png"
BEGIN = "<!-- RESULTS BEGIN: written by tools/results.py from benchmarks/results/*.json -->"
END = "<!-- RESULTS END -->"
WIDTH = 118

sys.path.append(str(ROOT / "benchmarks"))  # rows know how they are shown

import comparison  # noqa: E402
import figures  # noqa: E402
import models  # noqa: E402

Document = dict[str, Any]


def main() -> int:
    """Write the blocks, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail when a page is out of date")
    check = parser.parse_args().check
    for name, block in blocks().items():
        page = ROOT / name
        before = page.read_text(encoding="utf-8")
        after = replaced(before, block)
        if check and before != after:
            print(f"{name} is out of date: python tools/results.py", file=sys.stderr)
            return 1
        if not check:
            page.write_text(after, encoding="utf-8")
    if not check and PICTURE.exists():
        shutil.copyfile(PICTURE, ROOT / "docs" / "images" / PICTURE.name)
    return 0


def blocks() -> dict[str, str]:
    """What stands between the marks of each page."""
    short = best(every("comparison"))
    long = [*matrix(load("cpu")), "", *promises()]
    for document in every("figures"):
        long += ["", f"### Figures, {machine(document)}", "", *floors(document)]
    for document in every("models"):
        long += ["", f"### Shapes of models, {machine(document)}", "", *shapes(document)]
    for number, document in enumerate(every("comparison")):
        long += ["", f"### Other implementations, {machine(document)}", "", *others(document)]
        if number == 0:
            long += ["", "![Operations per second of all implementations](images/comparison.png)"]
    return {"README.md": "\n".join(short), "docs/performance.md": "\n".join(long)}


def replaced(page: str, block: str) -> str:
    """A page with another block. Raises ValueError where it has no marks."""
    pattern = re.compile(r"<!-- RESULTS BEGIN.*?-->\n.*?<!-- RESULTS END -->", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise ValueError("a page has one block of results, between its marks")
    return pattern.sub(lambda _: f"{BEGIN}\n{block}\n{END}", page)


def wrapped(text: str) -> str:
    """Prose in lines."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def load(name: str) -> Document:
    """A file of results."""
    document: Document = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return document


def matrix(document: Document) -> list[str]:
    """tilefold against torch, by number of threads."""
    rows = {}
    for row in document["rows"]:
        case = (row["operation"], row["shape"], row["mask"], row["dtype"])
        rows.setdefault(case, {})[row["threads"], row["name"]] = row
    numbers = sorted({row["threads"] for row in document["rows"]})
    columns = [
        column
        for number in numbers
        for column in ("1 thread" if number == 1 else f"{number} threads", "torch", "ratio")
    ]
    lines = []
    for (operation, shape, mask, _), cells in rows.items():
        line = [f"{operation}, {' x '.join(shape.split(','))}, `{mask}`"]
        for number in numbers:
            own, other = cells[number, "tilefold"], cells[number, "torch"]
            line += [terminal.seconds(each["median_seconds"]) for each in (own, other)]
            line.append(f"**{other['tilefold_speedup']:.2f}**")
        lines.append(line)
    types = " and ".join(sorted({row["dtype"] for row in document["rows"]}))
    return [
        wrapped(
            "tilefold and `scaled_dot_product_attention` of PyTorch"
            f" {document['versions']['torch']} on {machine(document)}. Each figure is the median of"
            f" rounds taken turn by turn in one process on random data ({when(document)}):"
        ),
        "",
        *table([f"{types}, batch x heads x length x dim", *columns], lines),
    ]


def every(name: str) -> list[Document]:
    """The files of one benchmark, one for each machine: name.json first, then name_*.json."""
    paths = [RESULTS / f"{name}.json", *sorted(RESULTS.glob(f"{name}_*.json"))]
    return [load(path.stem) for path in paths if path.exists()]


def best(documents: Sequence[Document]) -> list[str]:
    """tilefold against the fastest peer of each case, with the machine and day of each row."""
    lines = []
    for document in documents:
        found = document["machine"]
        for case in comparison.cases(document["rows"]):
            rows = [row for row in document["rows"] if comparison.label(row) == case]
            own = next(row for row in rows if row["name"] == "tilefold")
            peers = [row for row in rows if row is not own and row["median_seconds"]]
            if own["threads"] != found["cores"] or not peers:
                continue
            peer = min(peers, key=lambda row: row["median_seconds"])
            lines.append(
                [
                    case.rpartition(",")[0],
                    f"{found['name']} ({found['isa']}), {own['threads']}",
                    document["date"][:10],
                    terminal.seconds(own["median_seconds"]),
                    f"{terminal.seconds(peer['median_seconds'])} {peer['name']}",
                    f"**{peer['median_seconds'] / own['median_seconds']:.2f}**",
                ]
            )
    shape = " x ".join(documents[0]["rows"][0]["shape"].split(","))
    return [
        wrapped(
            f"Attention of {shape} (batch x heads x length x dim) on all cores. Each row is the"
            " median of rounds taken turn by turn in one process on random data. The best peer is"
            " the fastest of PyTorch, FlexAttention, ONNX Runtime, OpenVINO, JAX and Keras that can"
            " compute the case."
        ),
        "",
        *table(["case", "machine, cores", "date", ">tilefold", ">best peer", ">ratio"], lines),
    ]


def promises() -> list[str]:
    """Memory, planning and compiling, each from its own file."""
    memory, planning, compiling = load("memory"), load("plan_speed"), load("compile_speed")
    extra = {name: max(0, each["extra_mib"]) for name, each in memory["passes"].items()}
    million = [row for row in planning["rows"] if row["mask"] == planning["promise"].split(":")[0]]
    kernels = [row for row in compiling["rows"] if "compile_s" in row]
    shape = " x ".join(map(str, memory["shape"]))
    text = (
        f"Beyond inputs and outputs, a problem of {shape} takes {extra['forward']:.1f} MiB forward"
        f" and {extra['backward']:.1f} MiB backward. Its scores alone would take"
        f" {memory['score_matrix_mib'] / 1024:.0f} GiB. To plan a window of 4096 over"
        f" {million[0]['length']:,} tokens takes"
        f" {max(row['milliseconds'] for row in million):.0f} ms and"
        f" {max(row['peak_mib'] for row in million):.0f} MiB. A kernel compiles in at most"
        f" {max(row['compile_s'] for row in kernels):.2f} s and comes from the disk cache in"
        f" {1e3 * max(row['cached_s'] for row in kernels):.1f} ms."
    )
    return [wrapped(text)]


def floors(document: Document) -> list[str]:
    """The table of figures, with verdicts."""
    found = [figures.Result.of(row) for row in document["rows"]]
    reached = sum(result.verdict == "reached" for result in found)
    judged = sum(result.reason is None for result in found)
    text = (
        f"Each row is a figure with a floor, which tilefold should reach. On {machine(document)},"
        f" {when(document)}, {reached} of the {judged} figures that could be judged reach their"
        f" floor; {len(found) - judged} could not be judged. The value is the peer's median time"
        " divided by tilefold's, taken turn by turn, and cold the same for cold calls. For"
        " decoding, the value is the rate at which keys and values are read, as a share of the"
        " rate at which the same number of bytes is read in the same rounds. The roofline follows"
        " from rates that were measured in the same run. `(8)` after a shape: heads of keys."
    )
    flex = [result for result in found if result.figure.peer == "flex" and result.notes]
    notes = [f"- {line}" for line in figures.reasons(found)]
    notes += [
        f"- FlexAttention, {result.figure.dtype}: {result.notes['peer_prepare_seconds']:.1f} s for"
        f" the block mask and {result.notes['peer_first_call_seconds']:.1f} s for the first call,"
        " which compiles, are not included in its time."
        for result in flex
    ]
    rows = table(figures.COLUMNS, [figures.cells(result) for result in found])
    return [wrapped(text), "", *rows, "", *notes]


def shapes(document: Document) -> list[str]:
    """Attention at the shapes of models."""
    text = (
        "Attention alone at the shapes of real models, float32, on all cores, beside the fastest of"
        f" PyTorch, ONNX Runtime and OpenVINO ({when(document)}; `benchmarks/models.py`). Warm is a"
        " loop over one call, cold a call after other memory was read."
    )
    rows = [models.cells(row) for row in document["rows"]]
    return [wrapped(text), "", *table(models.COLUMNS, rows)]


def others(document: Document) -> list[str]:
    """All implementations at one shape: a table, what some cannot do, the picture."""
    rows = document["rows"]
    names = list(dict.fromkeys(row["name"] for row in rows))
    lines = []
    for case in comparison.cases(rows):
        cells = {row["name"]: row for row in rows if comparison.label(row) == case}
        lines.append([case, *(comparison.cell(cells[name]) for name in names)])
    modules = dict.fromkeys(module for name in names[1:] for module in BASELINES[name].modules)
    known = document["versions"]
    versions = [f"{module} {known[module]}" for module in modules if module in known]
    reasons = dict.fromkeys(row["reason"] for row in rows if row["reason"])
    text = (
        f"The problem is {rows[0]['shape']} on {machine(document)}, {when(document)}. Each figure"
        " is the median of rounds taken turn by turn. Each number of threads has a process of its"
        f" own, bound to the same number of cores. Versions: {', '.join(versions)}."
    )
    return [
        wrapped(text),
        "",
        *table(["", *(f">{name}" for name in names)], lines),
        "",
        *(f"- `-`: {reason}" for reason in reasons),
    ]


def machine(document: Document) -> str:
    """Where it was measured."""
    found = document["machine"]
    return f"{found['name']} ({found['isa']}, {found['cores']} cores)"


def when(document: Document) -> str:
    """When it was measured, and of which commit."""
    return f"{document['date'][:10]}, commit `{document['commit']}`"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown; columns named `>...` are aligned to the right."""
    rules = ["---:" if column.startswith(">") else "---" for column in columns]
    heads = [column.removeprefix(">") for column in columns]
    return [f"| {' | '.join(cells)} |" for cells in (heads, rules, *rows)]


if __name__ == "__main__":
    sys.exit(main())
