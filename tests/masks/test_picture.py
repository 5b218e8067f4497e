"""Pictures of masks: in text, in a terminal, as SVG and as PNG."""

from __future__ import annotations

import builtins
import doctest
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from paths import ROOT
from rich.console import Console

from tilefold import causal, documents, full, lengths, local, prefix, rule
from tilefold.masks import picture
from tilefold.masks.picture import MARKS, draw, save, svg

PAGES = ROOT / "docs"


def test_the_examples_of_the_documentation_are_true() -> None:
    failed, tried = doctest.testmod(picture)
    assert (failed, tried > 0) == (0, True)


@pytest.mark.parametrize(
    ("name", "least"), [("masks.md", 14), ("mask_rules.md", 26), ("mask_traps.md", 14)]
)
def test_the_pictures_of_the_pages_on_masks_are_true(name: str, least: int) -> None:
    page = (PAGES / name).read_text(encoding="utf-8")
    code = "\n".join("" if line.startswith("```") else line for line in page.splitlines())
    examples = doctest.DocTestParser().get_doctest(code, {}, name, f"docs/{name}", 0)
    failed, tried = doctest.DocTestRunner().run(examples)
    assert (failed, tried >= least) == (0, True)


def shown(drawn: Any, **given: Any) -> str:
    """What a terminal of 80 columns shows, without colours unless asked."""
    out = io.StringIO()
    console = Console(file=out, width=80, **given)
    console.print(drawn)
    return out.getvalue()


@pytest.mark.feature("T07", "M15")
def test_full_partial_and_skipped_tiles_are_told_apart() -> None:
    assert str(draw(causal() & local(6), 12, 12, 3, 3)).splitlines() == [
        "▓▓░░░░··················",
        "▓▓▓▓░░··················",
        "▓▓▓▓▓▓··················",
        "██████▓▓░░░░············",
        "██████▓▓▓▓░░············",
        "██████▓▓▓▓▓▓············",
        "░░▓▓▓▓██████▓▓░░░░······",
        "░░░░▓▓██████▓▓▓▓░░······",
        "░░░░░░██████▓▓▓▓▓▓······",
        "······░░▓▓▓▓██████▓▓░░░░",
        "······░░░░▓▓██████▓▓▓▓░░",
        "······░░░░░░██████▓▓▓▓▓▓",
    ]


def test_long_masks_are_drawn_tile_by_tile() -> None:
    drawn = draw(causal(), 4096, 8192)
    assert not drawn.detailed
    assert (drawn.block_q, drawn.block_k) == (128, 128)
    lines = str(drawn).splitlines()
    assert len(lines) == 32
    assert lines[0] == "█" * 32 + "▓" + "·" * 31
    assert lines[31] == "█" * 63 + "▓"
    assert drawn.counts == causal().blocks(4096, 8192, 128, 128)
    assert set(str(draw(full(), 10**6, 10**6))) == {"█", "\n"}


def test_a_terminal_shows_title_counts_and_legend() -> None:
    lines = shown(draw(causal(), 8, 8, 4, 4)).splitlines()
    assert lines[0] == "causal(), 8 x 8"
    assert lines[1] == "▓▓░░░░░░········"
    assert lines[9] == "queries down, keys right; tiles of 4 x 4: 1 full, 2 partial, 1 skipped"
    assert lines[10].rstrip() == "·· skipped  ░░ partial, hidden  ▓▓ partial, visible  ██ full"
    coloured = shown(draw(causal(), 8, 8, 4, 4), force_terminal=True, color_system="standard")
    assert "\x1b[33m▓▓" in coloured


def test_a_terminal_without_unicode_shows_letters() -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(file=out, width=80).print(draw(causal(), 8, 8, 4, 4))
    out.flush()
    lines = out.buffer.getvalue().decode("ascii").splitlines()  # type: ignore[attr-defined]  # BytesIO
    assert lines[1] == "++------........"
    assert lines[8] == "########++++++++"


@pytest.mark.parametrize("b", [0, 1])
def test_one_plane_is_drawn(b: int) -> None:
    made = lengths([1, 3]) & rule(lambda h, k: k >= h)
    drawn = draw(made, 1, 4, 1, 1, batch=2, heads=2, b=b, h=1)
    assert str(drawn) == ("········", "··████··")[b]


def test_tails_and_tiles_of_two_sizes() -> None:
    assert str(draw(prefix(3), 3, 5, 2, 2)).splitlines() == ["████▓▓░░··"] * 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: draw(causal(), 0, 4), "len_q must be an integer >= 1, got 0"),
        (lambda: draw(causal(), 4, 4, block_k=0), "block_k must be an integer >= 1, got 0"),
        (
            lambda: draw(causal(), 4096, 4096, 16, 64),
            "block_q must be at least 57 for a picture of 4096 positions, got 16: "
            "that is 256 tiles, and at most 72 are drawn",
        ),
        (lambda: draw(lengths([1, 2]), 4, 4), "n_k is for a batch of 2, but batch is 1"),
        (lambda: draw(causal(), 4, 4, heads=2, h=2), "h must be one of the heads=2, from 0"),
        (lambda: draw(documents([1]), 4, 4), "ids_q has 1 entries, but len_q is 4"),
        (lambda: save(draw(causal(), 4, 4), "mask.gif"), ".svg or .png, got 'mask.gif'"),
        (lambda: save(draw(causal(), 4, 4), "mask"), "must end in .svg or .png, got 'mask'"),
    ],
)  # fmt: skip
def test_bad_arguments_raise_one_line(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        wrong()
    assert message in str(caught.value)


@pytest.mark.parametrize(("len_q", "len_k"), [(12, 20), (3, 60), (4096, 4096)])
def test_svg_holds_every_mark(len_q: int, len_k: int) -> None:
    drawn = draw(causal() & local(300), len_q, len_k)
    root = ElementTree.fromstring(svg(drawn))
    space = "{http://www.w3.org/2000/svg}"
    group = root.find(f"{space}g")
    assert group is not None
    rows, columns = drawn.marks.shape
    colours = [[""] * columns for _ in range(rows)]
    for mark in group.iter(f"{space}rect"):
        x, y, width = (int(mark.attrib[name]) for name in ("x", "y", "width"))
        colours[y][x : x + width] = [mark.attrib["fill"]] * width
    assert colours == [[MARKS[kind].colour for kind in row] for row in drawn.marks]
    texts = [text.text for text in root.iter(f"{space}text")]
    assert f"causal() & local(300), {len_q} x {len_k}" in texts
    assert drawn.summary in texts


def test_pictures_are_saved(tmp_path: Path) -> None:
    drawn = draw(causal(), 8, 8)
    save(drawn, tmp_path / "deep" / "mask.SVG")
    assert (tmp_path / "deep" / "mask.SVG").read_text(encoding="utf-8") == svg(drawn)
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["mask.SVG"]


@pytest.mark.slow
def test_png_shows_the_colours(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    save(draw(causal(), 8, 8), tmp_path / "mask.png")
    pixels = image.imread(tmp_path / "mask.png")
    sample = (255 * pixels[::5, ::5, :3]).round().astype(int)
    seen = {tuple(pixel) for pixel in sample.reshape(-1, 3).tolist()}
    for mark in MARKS:
        assert tuple(int(mark.colour[at : at + 2], 16) for at in (1, 3, 5)) in seen


def test_png_without_matplotlib_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = builtins.__import__

    def refuse(name: str, *rest: Any, **given: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *rest, **given)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'tilefold\[bench\]', or save it as .svg"):
        save(draw(causal(), 8, 8), tmp_path / "mask.png")
    assert not list(tmp_path.iterdir())
