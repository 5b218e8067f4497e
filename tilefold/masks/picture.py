"""Drawings of masks: in a terminal, as SVG, and as PNG.

A picture shows what the planner does, not only what the rule says: tiles that it skips, tiles that
it computes without masking, and tiles in between, with their visible and hidden pairs. Long
sequences are drawn one mark per tile. SVG is written here; PNG is left to matplotlib, an extra,
because letters in an image need fonts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from tilefold.common.check import whole
from tilefold.masks.evaluate import exact
from tilefold.masks.rule import Rule, sized
from tilefold.masks.runs import FULL, PARTIAL, SKIP, Counts, runs

MOST = 72  # marks per side: what fits a terminal of 80 columns
WIDE = 36  # up to this many columns a mark is two letters wide, so that it looks square
TILES = 4  # tiles per side when a short picture's block sizes are not given


@dataclass(frozen=True)
class Mark:
    """One kind of mark: its name, letters, and colours in a terminal and in an image."""

    name: str
    glyph: str
    ascii: str
    style: str
    colour: str


MARKS = (
    Mark("skipped", "·", ".", "dim", "#ececec"),
    Mark("partial, hidden", "░", "-", "yellow dim", "#f7e2b5"),
    Mark("partial, visible", "▓", "+", "yellow", "#dd9a1f"),
    Mark("full", "█", "#", "green", "#23785b"),
)
_SKIPPED, _HIDDEN, _VISIBLE, _FULL = range(4)


@dataclass(frozen=True, eq=False)
class Picture:
    """A mask ready to be drawn; `print` shows it, and rich shows it in colour.

    `marks` holds an index into MARKS per pair (detailed) or per tile.
    """

    title: str
    marks: NDArray[np.int8]
    detailed: bool
    block_q: int
    block_k: int
    counts: Counts

    def __str__(self) -> str:
        return "\n".join(self._line(row, [mark.glyph for mark in MARKS]) for row in self.marks)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        glyphs = [mark.ascii if options.ascii_only else mark.glyph for mark in MARKS]
        yield Text(self.title, style="bold")
        for row in self.marks:
            line = Text(no_wrap=True)
            for kind, first, last in stretches(row):
                line.append(self._line(row[first:last], glyphs), style=MARKS[kind].style)
            yield line
        yield Text(self.summary, style="dim")
        legend = Text()
        for kind, name in self.legend:
            legend.append(glyphs[kind] * 2, style=MARKS[kind].style)
            legend.append(f" {name}  ")
        yield legend

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the picture to a file: see `save`."""
        save(self, path)

    @property
    def summary(self) -> str:
        """The number of tiles of each kind, as a line."""
        skip, full, partial = self.counts
        tiles = f"tiles of {self.block_q} x {self.block_k}"
        return f"queries down, keys right; {tiles}: {full} full, {partial} partial, {skip} skipped"

    @property
    def legend(self) -> list[tuple[int, str]]:
        """The kinds of marks in use, with their names."""
        if self.detailed:
            return [(kind, mark.name) for kind, mark in enumerate(MARKS)]
        return [(_SKIPPED, "skipped"), (_VISIBLE, "partial"), (_FULL, "full")]

    def _line(self, row: NDArray[np.int8], glyphs: list[str]) -> str:
        width = 2 if self.marks.shape[1] <= WIDE else 1
        return "".join(glyphs[kind] * width for kind in row)


def draw(
    rule: Rule,
    len_q: int,
    len_k: int,
    block_q: int | None = None,
    block_k: int | None = None,
    *,
    batch: int = 1,
    heads: int = 1,
    b: int = 0,
    h: int = 0,
    most: int = MOST,
) -> Picture:
    """A picture of a rule between len_q queries and len_k keys, cut into tiles.

    >>> from tilefold import causal
    >>> print(draw(causal(), 4, 4, 2, 2))
    ▓▓░░····
    ▓▓▓▓····
    ████▓▓░░
    ████▓▓▓▓

    Arguments:
        block_q, block_k: the size of a tile; where absent, one that gives a readable picture.
        batch, heads, b, h: for rules that depend on them, the sizes and the plane to draw.
        most: marks per side; lengths up to it are drawn pair by pair, longer ones tile by tile.

    Raises ValueError for an empty mask, for more tiles than `most`, and whatever the rule raises.
    """
    for name, size in (("len_q", len_q), ("len_k", len_k)):
        whole(name, size, 1)
    for name, index, outer, size in (("b", b, "batch", batch), ("h", h, "heads", heads)):
        if not 0 <= index < size:
            raise ValueError(f"{name} must be one of the {outer}={size}, from 0 on, got {index}")
    detailed = max(len_q, len_k) <= most
    readable = _readable(max(len_q, len_k), detailed, most)
    block_q = _block("block_q", readable if block_q is None else block_q, len_q, most)
    block_k = _block("block_k", readable if block_k is None else block_k, len_k, most)
    expression = sized(rule, len_q, len_k, batch, heads).expression
    found = runs(
        expression,
        parallel="q",
        batch=batch,
        heads=heads,
        len_parallel=len_q,
        len_traverse=len_k,
        block_parallel=block_q,
        block_traverse=block_k,
    )
    plane = min(b, found.planes_b - 1) * found.planes_h + min(h, found.planes_h - 1)
    tiles = np.zeros((found.block_rows, -(-len_k // block_k)), np.int8)
    for row in range(found.block_rows):
        start = plane * found.block_rows + row
        for first, last, masked in found.runs[found.rows[start] : found.rows[start + 1]]:
            tiles[row, first // block_k : -(-last // block_k)] = PARTIAL if masked else FULL
    skip, partial, full = (int((tiles == kind).sum()) for kind in (SKIP, PARTIAL, FULL))
    marks = np.choose(tiles, (_SKIPPED, _VISIBLE, _FULL)).astype(np.int8)
    if detailed:
        marks = marks.repeat(block_q, 0)[:len_q].repeat(block_k, 1)[:, :len_k]
        q, k = np.ogrid[:len_q, :len_k]
        marks[(marks == _VISIBLE) & ~exact(expression, b=b, h=h, q=q, k=k)] = _HIDDEN
    return Picture(
        f"{rule!r}, {len_q} x {len_k}",
        marks,
        detailed,
        block_q,
        block_k,
        Counts(skip, full, partial),
    )


def _readable(length: int, detailed: bool, most: int) -> int:
    """A block size that leaves a few tiles, or at most the marks that fit."""
    if detailed:
        return -(-length // TILES)
    return 1 << (-(-length // most) - 1).bit_length()


def _block(name: str, block: int, length: int, most: int) -> int:
    whole(name, block, 1)
    tiles = -(-length // block)
    if tiles > most:
        raise ValueError(
            f"{name} must be at least {-(-length // most)} for a picture of {length} positions, "
            f"got {block}: that is {tiles} tiles, and at most {most} are drawn"
        )
    return block


def save(picture: Picture, path: str | os.PathLike[str]) -> None:
    """Write a picture to a file that ends in .svg or .png.

    Raises ValueError for other endings, and ImportError for .png without matplotlib.
    """
    place = Path(path)
    write = {".svg": _write_svg, ".png": _write_png}.get(place.suffix.lower())
    if write is None:
        raise ValueError(f"the file of a picture must end in .svg or .png, got {str(path)!r}")
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f".{place.name}.{os.getpid()}{place.suffix}")
    try:
        write(picture, partial)
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)


LEFT, TOP = 16, 44
"""Where the cells of an SVG begin."""


class Sheet(NamedTuple):
    """An SVG around its cells: the lines before them, how they are moved, and the legend's place.

    `legend` is the distance of the legend from the top.
    """

    opening: tuple[str, ...]
    cells: str
    legend: int

    @staticmethod
    def of(title: str, summary: str, shape: tuple[int, ...]) -> Sheet:
        """The sheet of a picture with so many rows and columns of cells."""
        rows, columns = shape
        cell = max(4, min(24, 576 // max(rows, columns)))
        letters = max(8 * len(title), 7 * len(summary), 420)  # their widths, at most
        width = max(columns * cell, letters) + 2 * LEFT
        height = rows * cell + TOP + 48
        opening = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            f'<text x="{LEFT}" y="20" font-size="14">{escape(title)}</text>',
            f'<text x="{LEFT}" y="37">{escape(summary)}</text>',
        )
        return Sheet(opening, f'transform="translate({LEFT} {TOP}) scale({cell})"', height - 30)


def svg(picture: Picture) -> str:
    """The picture as a document of scalable vector graphics."""
    sheet = Sheet.of(picture.title, picture.summary, picture.marks.shape)
    parts = [*sheet.opening, f"<g {sheet.cells}>"]
    for y, row in enumerate(picture.marks):
        for kind, first, last in stretches(row):
            parts.append(
                f'<rect x="{first}" y="{y}" width="{last - first}" height="1" '
                f'fill="{MARKS[kind].colour}"/>'
            )
    parts.append(f'<path d="{_borders(picture)}" stroke="#ffffff" stroke-width="0.08"/></g>')
    x, y = LEFT, sheet.legend
    for kind, name in picture.legend:
        parts.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{MARKS[kind].colour}"/>')
        parts.append(f'<text x="{x + 17}" y="{y + 10}">{name}</text>')
        x += 30 + 7 * len(name)
    return "\n".join([*parts, "</svg>", ""])


def _write_svg(picture: Picture, place: Path) -> None:
    place.write_text(svg(picture), encoding="utf-8")


def _write_png(picture: Picture, place: Path) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise ImportError(
            "a picture in PNG needs matplotlib: pip install 'tilefold[bench]', "
            "or save it as .svg, which needs nothing"
        ) from None
    rows, columns = picture.marks.shape
    ratio = min(max(rows / columns, 0.2), 3)  # long strips are stretched, others keep squares
    figure = Figure(figsize=(6, 1.4 + 5 * ratio), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    colours = ListedColormap([mark.colour for mark in MARKS])
    axes.imshow(picture.marks, cmap=colours, vmin=0, vmax=len(MARKS) - 1)
    axes.set_aspect(ratio * columns / rows)
    down, right = _steps(picture)
    axes.hlines(np.arange(down, rows, down) - 0.5, -0.5, columns - 0.5, colors="white", lw=0.8)
    axes.vlines(np.arange(right, columns, right) - 0.5, -0.5, rows - 0.5, colors="white", lw=0.8)
    axes.set(xticks=[], yticks=[], xlabel=picture.summary, title=picture.title)
    patches = [Patch(color=MARKS[kind].colour, label=name) for kind, name in picture.legend]
    figure.legend(handles=patches, loc="outside lower center", ncols=4)
    figure.savefig(place)


def _steps(picture: Picture) -> tuple[int, int]:
    """The number of marks per tile, down and right."""
    return (picture.block_q, picture.block_k) if picture.detailed else (1, 1)


def _borders(picture: Picture) -> str:
    """The lines between tiles as the path of an SVG."""
    rows, columns = picture.marks.shape
    down, right = _steps(picture)
    lines = [f"M0 {y}H{columns}" for y in range(down, rows, down)]
    return "".join(lines + [f"M{x} 0V{rows}" for x in range(right, columns, right)])


def stretches(row: NDArray[np.int8]) -> Iterator[tuple[int, int, int]]:
    """The stretches of equal marks in a row: (kind, first, one past the last)."""
    edges = np.flatnonzero(np.diff(row)) + 1
    for first, last in zip((0, *edges), (*edges, len(row)), strict=True):
        yield int(row[first]), int(first), int(last)
