"""The picture of a document: TFLOP/s over the length, a panel for each pass, mask and head dim."""

from __future__ import annotations

import io
from typing import Any

from gpu_parts.section import Row

PASSES = ("forward", "backward")
MASKS = {"full": "full()", "causal": "causal()"}
STYLES: dict[str, tuple[str, str, str]] = {
    "tilefold hopper": ("#0b6e99", "-", "o"),
    "tilefold tiled": ("#4aa3c7", "-", "s"),
    "tilefold split": ("#0b6e99", "-", "o"),
    "tilefold fused": ("#4aa3c7", "-", "s"),
    "torch cuDNN": ("#c7473a", "--", "^"),
    "torch flash": ("#e3a857", "--", "v"),
    "torch efficient": ("#b5838d", "--", "D"),
    "torch flex": ("#8a6d3b", "--", "P"),
    "Triton plain": ("#7d8597", ":", "x"),
}
"""Colour, line and mark of an implementation; others are grey."""

OTHER = ("#a7a29a", ":", ".")


def dtypes(document: Row) -> list[str]:
    """The types that there are rows of, in their order."""
    return list(dict.fromkeys(row["dtype"] for _, row in _rows(document)))


def draw(document: Row, dtype: str) -> bytes:
    """The rows of one type, as PNG. Raises ValueError where there is none."""
    from matplotlib.figure import Figure

    rows = [(name, row) for name, row in _rows(document) if row["dtype"] == dtype]
    if not rows:
        raise ValueError(f"the document has no times of {dtype}")
    dims = sorted({row["dim"] for _, row in rows})
    lines = [(p, m) for p in PASSES for m in MASKS if _of(rows, p, MASKS[m])]
    lengths = sorted({row["len_q"] for _, row in rows})
    figure = Figure(figsize=(3.9 * len(dims) + 0.6, 2.6 * len(lines) + 0.9), layout="constrained")
    panels = figure.subplots(len(lines), len(dims), squeeze=False, sharex=True, sharey="row")
    handles: dict[str, Any] = {}
    for across, (operation, mask) in zip(panels, lines, strict=True):
        for axes, dim in zip(across, dims, strict=True):
            here = [row for row in _of(rows, operation, MASKS[mask]) if row["dim"] == dim]
            handles |= _panel(axes, here)
            axes.set_title(f"{operation}, {mask}, D = {dim}", fontsize=9, loc="left")
            axes.set_xscale("log", base=2)
            axes.set_xticks(lengths, [_short(length) for length in lengths], fontsize=8)
            axes.tick_params(axis="y", labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        across[0].set_ylabel("TFLOP/s", fontsize=8)
        across[0].set_ylim(bottom=0)
    for axes in panels[-1]:
        axes.set_xlabel("length", fontsize=8)
    ordered = [*(n for n in STYLES if n in handles), *(n for n in handles if n not in STYLES)]
    figure.legend(
        [handles[name] for name in ordered],
        ordered,
        loc="outside lower center",
        ncols=min(5, len(ordered)),
        frameon=False,
        fontsize=8,
    )
    figure.suptitle(_title(document, dtype), fontsize=10, x=0.01, ha="left")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()


def _panel(axes: Any, rows: list[Row]) -> dict[str, Any]:
    """The curves of a panel, with their quartiles as bands; their handles by name."""
    handles = {}
    names = dict.fromkeys(name for row in rows for name in row["implementations"])
    for name in names:
        points = []
        for row in sorted(rows, key=lambda row: row["len_q"]):
            found = row["implementations"].get(name, {})
            if found.get("tflops"):
                count = row["flops"] / 1e12
                slow, fast = count / found["high_seconds"], count / found["low_seconds"]
                points.append((row["len_q"], found["tflops"], slow, fast))
        if points:
            colour, style, mark = STYLES.get(name, OTHER)
            at, speed, slow, fast = zip(*points, strict=True)
            (handles[name],) = axes.plot(
                at, speed, style, color=colour, marker=mark, markersize=4, linewidth=1.4
            )
            axes.fill_between(at, slow, fast, color=colour, alpha=0.15, linewidth=0)
    return handles


def _rows(document: Row) -> list[tuple[str, Row]]:
    """Pass and row of everything that has times over lengths."""
    return [
        (name, row)
        for name in PASSES
        for row in document["sections"].get(name, {}).get("rows", [])
        if "implementations" in row
    ]


def _of(rows: list[tuple[str, Row]], operation: str, mask: str) -> list[Row]:
    return [row for name, row in rows if name == operation and row["mask"] == mask]


def _short(length: int) -> str:
    """A length as a label: 512, 1k, 16k."""
    return f"{length // 1024}k" if length >= 1024 and length % 1024 == 0 else str(length)


def _title(document: Row, dtype: str) -> str:
    row = next(row for _, row in _rows(document) if row["dtype"] == dtype)
    tokens, width = row["batch"] * row["len_q"], row["heads"] * row["dim"]
    versions = document["versions"]
    kept = ", ".join(f"{n} {versions[n]}" for n in ("torch", "triton", "cuda") if n in versions)
    words = f"{document['device']['name']}, {dtype}, batch x length {tokens}, heads x D {width}"
    return f"{words}\n{kept}; {document['date'][:10]}, commit {document['commit']}"
