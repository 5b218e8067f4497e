"""Heat maps of weights: in text, as SVG and as PNG."""

from __future__ import annotations

import doctest
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from paths import ROOT

import tilefold
from tilefold import alibi, causal, picture, score, softcap
from tilefold.scores import picture as module
from tilefold.scores.picture import COLOURS, HIDDEN, LEVELS, draw


def test_the_examples_of_the_documentation_are_true() -> None:
    failed, tried = doctest.testmod(module)
    assert (failed, tried > 0) == (0, True)


@pytest.mark.slow
def test_the_examples_of_the_page_on_scores_are_true() -> None:
    page = (ROOT / "docs" / "scores.md").read_text(encoding="utf-8")
    code = "\n".join("" if line.startswith("```") else line for line in page.splitlines())
    examples = doctest.DocTestParser().get_doctest(code, {}, "scores.md", "docs/scores.md", 0)
    failed, tried = doctest.DocTestRunner().run(examples)
    assert (failed, tried >= 28) == (0, True)


def test_a_colour_is_the_weight_by_the_largest_of_its_query() -> None:
    drawn = draw([softcap(2), alibi()], 5, 7, causal(), heads=8, h=1, scores=np.arange(7))
    q, k = np.ogrid[:5, :7]
    s = 2 * np.tanh(k / 2) - 0.25 * abs(q + 2 - k)
    weights = np.where(k <= q + 2, np.exp(s), 0)
    shares = weights / weights.max(1, keepdims=True)
    expected = np.minimum(np.floor(shares * LEVELS), LEVELS - 1)
    expected[weights == 0] = HIDDEN
    np.testing.assert_array_equal(drawn.levels, expected)


def test_what_a_score_hides_is_hidden_and_nan_is_seen() -> None:
    made = score(lambda s, q, k: tilefold.where(q == k, -np.inf, s))
    assert str(draw(made, 3, 3)).splitlines() == ["··████", "██··██", "████··"]
    for number in (np.nan, np.inf):
        row = np.array([[0.0], [number], [0.0]])
        assert str(draw(tilefold.bias(row), 3, 3)).splitlines() == ["██████", "░░░░░░", "██████"]


def test_a_cell_of_a_long_picture_shows_its_largest_weight() -> None:
    diagonal = score(lambda s, q, k: tilefold.where(q == k, 9.0, -abs(q - k) * 1.0))
    drawn = draw(diagonal, 2000, 2000, causal(), most=50)
    assert (drawn.step, drawn.levels.shape) == (40, (50, 50))
    assert (drawn.levels.diagonal() == LEVELS - 1).all()
    assert (drawn.levels[np.triu_indices(50, 1)] == HIDDEN).all()


def test_svg_holds_every_cell() -> None:
    drawn = picture(causal(), 20, 24, score=alibi(), heads=8, h=2)
    space = "{http://www.w3.org/2000/svg}"
    root = ElementTree.fromstring(module.svg(drawn))
    found = np.full(drawn.levels.shape, -1)
    for path in root.iter(f"{space}path"):
        for part in path.attrib["d"].split("z")[:-1]:
            first, rest = part[1:].split(" ")
            row, width = rest.partition("v")[0].split("h")
            found[int(row), int(first) : int(first) + int(width)] = COLOURS.index(
                path.attrib["fill"]
            )
    np.testing.assert_array_equal(found, drawn.levels)
    assert "alibi(), causal(), 20 x 24" in [text.text for text in root.iter(f"{space}text")]


def test_png_holds_every_cell(tmp_path: Path) -> None:
    drawn = picture(causal(), 20, 24, score=alibi(), heads=8, h=2)
    drawn.save(tmp_path / "deep" / "w.PNG")
    data = (tmp_path / "deep" / "w.PNG").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = {}, 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size]) == (
            zlib.crc32(kind + body),
        )
        chunks[kind], at = body, at + 12 + size
    width, height, bits, palette = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (width, height, bits, palette) == (480, 400, 8, 3)
    pixels = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    np.testing.assert_array_equal(pixels[::20, 1::20], drawn.levels)
    assert chunks[b"PLTE"][-3:].hex() == COLOURS[HIDDEN][1:]
    assert chunks[b"tEXt"] == b"Title\0alibi(), causal(), 20 x 24"


@pytest.mark.feature("T15")
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: draw(alibi(), 0, 4), "len_q must be an integer >= 1, got 0"),
        (lambda: draw(alibi(), 4, 4, h=1), "h must be one of the heads=1, from 0 on, got 1"),
        (lambda: draw(alibi(), 4, 4, scores=[1, 2]), "scores must broadcast to (4, 4), got shape"),
        (lambda: draw([], 4, 4), "a heat map needs a score, got None"),
        (lambda: picture(None, 4, score=alibi()).save("w.gif"), ".svg or .png, got 'w.gif'"),
    ],
)  # fmt: skip
def test_bad_arguments_raise_one_line(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        wrong()
    assert message in str(caught.value)
