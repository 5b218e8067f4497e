"""Drawings of scores: heat maps of attention weights, in a terminal, as SVG, and as PNG.

Without data the score of every pair is 0 before the modification. So a picture shows what the
modification and the mask do, and nothing else. A colour is a weight as a share of the largest
weight of its query, since the weights of a query get smaller the more keys it sees. PNG is written
here too: it has no letters, and its title stands in the file as text.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from tilefold.common.check import shown, whole
from tilefold.common.files import write_atomically
from tilefold.masks import picture as masks
from tilefold.masks.evaluate import exact, exact_real
from tilefold.masks.position_rules import full
from tilefold.masks.rule import Rule, sized
from tilefold.scores.score import Score, Sizes, as_score

LEVELS = 32
"""Colours of weights, from 0 to the largest weight of a query."""
HIDDEN = LEVELS
"""The level of a hidden pair, after those of weights."""
_SCALE = ("#fdf6d8", "#9fd3a6", "#2f8f83", "#173f5f")
_HIDDEN_COLOUR = masks.MARKS[0].colour
_GLYPHS, _ASCII = "░▒▓█·", "-+*#."
_PIXELS = 480  # of the longer side of a PNG


@dataclass(frozen=True, eq=False)
class HeatMap:
    """Weights ready to be drawn; `print` shows them, and rich shows them in colour.

    `levels` holds a number below `LEVELS` for each cell, or `HIDDEN`. A cell is `step` queries high
    and `step` keys wide; it shows its largest weight.
    """

    title: str
    levels: NDArray[np.uint8]
    step: int

    def __str__(self) -> str:
        return "\n".join(self._line(row, _GLYPHS) for row in self.levels)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        glyphs = _ASCII if options.ascii_only else _GLYPHS
        yield Text(self.title, style="bold")
        for row in self.levels:
            line = Text(no_wrap=True)
            for level, letter in zip(row, self._line(row, glyphs, wide=False), strict=True):
                line.append(letter * self._width, style=COLOURS[level])
            yield line
        yield Text(self.summary, style="dim")
        legend = Text()
        for share, letter in zip(("0", "1/4", "1/2", "3/4"), glyphs, strict=False):
            legend.append(f"{letter * 2} from {share}  ")
        legend.append(f"{glyphs[-1] * 2} hidden")
        yield legend

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the picture to a file that ends in .svg or .png. Raises ValueError for others."""
        save(self, path)

    @property
    def summary(self) -> str:
        """What a cell means, as a line."""
        of = "weight" if self.step == 1 else f"largest weight of {self.step} x {self.step} pairs"
        return f"queries down, keys right; {of} / largest of the query"

    @property
    def _width(self) -> int:
        return 2 if self.levels.shape[1] <= masks.WIDE else 1

    def _line(self, row: NDArray[np.uint8], glyphs: str, wide: bool = True) -> str:
        width = self._width if wide else 1
        return "".join(glyphs[4 if x == HIDDEN else 4 * x // LEVELS] * width for x in row)


def picture(
    mask: Rule | None = None,
    len_q: int = 16,
    len_k: int | None = None,
    *,
    score: Score | Sequence[Score] | None = None,
    **options: Any,
) -> HeatMap | masks.Picture:
    """A picture of a mask, or of the weights that a score gives: print it, or save it.

    >>> from tilefold import alibi, causal
    >>> print(picture(causal(), 4, block_q=2, block_k=2))
    ▓▓░░····
    ▓▓▓▓····
    ████▓▓░░
    ████▓▓▓▓
    >>> print(picture(causal(), 4, score=alibi(), heads=8, h=0))
    ██······
    ▓▓██····
    ▒▒▓▓██··
    ░░▒▒▓▓██

    Arguments:
        mask: the rule that says which key a query sees; None means `full()`
        len_q, len_k: numbers of queries and keys; without len_k as many keys as queries
        score: what becomes of the scores, which are 0 before: one modification or several in
            order. The picture is then a heat map
        options: batch, heads, b and h are the sizes, and the plane to draw. A mask also takes
            block_q and block_k, the size of a tile, and a score the `scores` before it, (len_q,
            len_k)

    Returns:
        what shows itself in a terminal, with a method `save(path)` for .svg and .png

    Raises TypeError or ValueError for bad arguments.
    """
    rule = full() if mask is None else mask
    if not isinstance(rule, Rule):
        hint = "pass a score as score=" if isinstance(rule, Score) else "wrap a function by rule()"
        raise TypeError(f"mask must be a rule such as tilefold.causal(), got {shown(rule)}; {hint}")
    keys = len_q if len_k is None else len_k
    if score is None:
        return masks.draw(rule, len_q, keys, **options)
    return draw(score, len_q, keys, rule, **options)


def draw(
    score: Score | Sequence[Score],
    len_q: int,
    len_k: int,
    mask: Rule | None = None,
    *,
    scores: ArrayLike | None = None,
    batch: int = 1,
    heads: int = 1,
    b: int = 0,
    h: int = 0,
    most: int = masks.MOST,
) -> HeatMap:
    """A heat map of the weights of len_q queries and len_k keys: softmax of modified scores.

    >>> from tilefold import alibi, causal
    >>> print(draw(alibi(), 4, 4, causal(), heads=8, h=0))
    ██······
    ▓▓██····
    ▒▒▓▓██··
    ░░▒▒▓▓██

    Arguments:
        score: what becomes of the scores: one modification or several in order
        mask: the rule that says which key a query sees; None means `full()`
        scores: the scores before the modification, (len_q, len_k) or what broadcasts to it; None
            means that all are 0
        batch, heads, b, h: the sizes, and the plane to draw
        most: cells per side; more queries or keys share cells, which show their largest weight

    Raises TypeError or ValueError for bad arguments, and whatever the score and the mask raise.
    """
    for name, size in (("len_q", len_q), ("len_k", len_k), ("most", most)):
        whole(name, size, 1)
    for name, index, outer, size in (("b", b, "batch", batch), ("h", h, "heads", heads)):
        if not 0 <= index < size:
            raise ValueError(f"{name} must be one of the {outer}={size}, from 0 on, got {index}")
    modified, rule = as_score(score), full() if mask is None else mask
    if modified is None:
        raise ValueError("a heat map needs a score, got None")
    before = np.asarray(0 if scores is None else scores, np.float64)
    try:
        given = np.broadcast_to(before, (len_q, len_k))
    except ValueError:
        raise ValueError(
            f"scores must broadcast to ({len_q}, {len_k}), got shape {before.shape}"
        ) from None
    visible = sized(rule, len_q, len_k, batch, heads).expression
    expression = modified.expression(Sizes(batch, heads, len_q, len_k))
    step = -(-max(len_q, len_k) // most)
    rows = []
    keys = np.arange(len_k)
    for first in range(0, len_q, step):  # so memory grows with the number of keys only
        at: dict[str, Any] = {"b": b, "h": h, "k": keys}
        at["q"] = np.arange(first, min(first + step, len_q))[:, None]
        s = exact_real(expression, given[first : first + step], **at)
        shares = _shares(np.where(exact(visible, **at), s, -np.inf))
        edges = np.arange(0, len_k, step)
        rows.append(np.maximum.reduceat(shares.max(0), edges))
    shares = np.array(rows)
    levels = np.minimum(shares * LEVELS, LEVELS - 1).astype(np.uint8)
    levels[shares < 0] = HIDDEN
    title = f"{modified!r}, {len_q} x {len_k}"
    if rule != full():
        title = f"{modified!r}, {rule!r}, {len_q} x {len_k}"
    return HeatMap(title, levels, step)


def _shares(s: NDArray[np.float64]) -> NDArray[np.float64]:
    """The weights of scores by the largest one of each row; -1 for a hidden pair.

    A row with NaN or +inf among its scores has no weights: they are drawn as 0.
    """
    largest = s.max(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        weights = np.nan_to_num(np.exp(s - largest), nan=0.0)
    return np.where(s == -np.inf, -1.0, weights)


def save(drawn: HeatMap, path: str | os.PathLike[str]) -> None:
    """Write a heat map to a file that ends in .svg or .png. Raises ValueError for other endings."""
    place = Path(path)
    written = {".svg": lambda: svg(drawn).encode(), ".png": lambda: png(drawn)}
    if place.suffix.lower() not in written:
        raise ValueError(f"the file of a picture must end in .svg or .png, got {str(path)!r}")
    place.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(place, written[place.suffix.lower()]())


def svg(picture: HeatMap) -> str:
    """The picture as a document of scalable vector graphics: one path for each colour."""
    sheet = masks.Sheet.of(picture.title, picture.summary, picture.levels.shape)
    parts = [*sheet.opening, f'<g {sheet.cells} shape-rendering="crispEdges">']
    paths: dict[int, list[str]] = {}
    for y, row in enumerate(picture.levels):
        for level, first, last in masks.stretches(row):
            paths.setdefault(level, []).append(f"M{first} {y}h{last - first}v1H{first}z")
    for level, path in sorted(paths.items()):
        parts.append(f'<path fill="{COLOURS[level]}" d="{"".join(path)}"/>')
    parts.append("</g>")
    x, y = masks.LEFT, sheet.legend
    for level in range(0, LEVELS, 4):
        parts.append(f'<rect x="{x}" y="{y}" width="16" height="12" fill="{COLOURS[level]}"/>')
        x += 16
    parts.append(f'<text x="{x + 6}" y="{y + 10}">from 0 to the largest weight</text>')
    parts.append(f'<rect x="{x + 190}" y="{y}" width="12" height="12" fill="{_HIDDEN_COLOUR}"/>')
    parts.append(f'<text x="{x + 208}" y="{y + 10}">hidden</text>')
    return "\n".join([*parts, "</svg>", ""])


def png(picture: HeatMap) -> bytes:
    """The cells as a PNG; the title is its text `Title`."""
    scale = max(1, _PIXELS // max(picture.levels.shape))
    return image(picture.levels.repeat(scale, 0).repeat(scale, 1), COLOURS, picture.title)


def image(pixels: NDArray[np.uint8], colours: Sequence[str], title: str) -> bytes:
    """Pixels as a PNG whose palette is `colours`, each such as #ffffff."""
    height, width = pixels.shape
    # Each line begins with the number of its filter: 0, none.
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels], axis=1)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", b"".join(bytes.fromhex(colour[1:]) for colour in colours)),
        (b"tEXt", b"Title\0" + title.encode("latin-1", "replace")),
        (b"IDAT", zlib.compress(lines.tobytes(), 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def _colours() -> tuple[str, ...]:
    """A colour for each level, between the colours of the scale, and that of hidden pairs."""
    stops = np.array([list(bytes.fromhex(colour[1:])) for colour in _SCALE], float)
    at = np.linspace(0, len(stops) - 1, LEVELS)
    mixed = [np.interp(at, np.arange(len(stops)), stops[:, channel]) for channel in range(3)]
    made = ["#" + bytes(round(x) for x in colour).hex() for colour in zip(*mixed, strict=True)]
    return (*made, _HIDDEN_COLOUR)


COLOURS = _colours()
