"""The page of published variants: its code against formulas in plain NumPy, and its pictures.

The formulas know nothing of rules and scores. Each gives what is visible and what is added to the
scores, as dense arrays. Where FlexAttention can say the same, it gets the same arrays.
"""

from __future__ import annotations

import importlib.util
import math
import struct
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from paths import ROOT

pytestmark = pytest.mark.slow  # kernels are compiled

_SPEC = importlib.util.spec_from_file_location("variants", ROOT / "tools" / "variants.py")
assert _SPEC is not None
assert _SPEC.loader is not None
variants = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(variants)

Q, K = np.ogrid[:64, :64]
EVERY = np.ones((64, 64), bool)
PAST = Q >= K


class Formula(NamedTuple):
    """What is visible (64, 64), what is added (8, 64, 64), a cap, the scale, and sinks (8,)."""

    visible: Any
    added: Any = np.zeros((8, 1, 1))
    cap: float = math.inf
    scale: float = 0.25
    sinks: Any = None


def bucket(distance: int) -> int:
    """T5's bucket of key - query: 8 exact ones on each side, then 8 that grow up to 128."""
    side = 16 if distance > 0 else 0
    far = abs(distance)
    if far < 8:
        return side + far
    return side + min(15, 8 + math.floor(math.log(far / 8) / math.log(128 / 8) * 8))


def t5(known: dict[str, Any]) -> Formula:
    """Transformer models of Hugging Face have the same buckets."""
    buckets = np.array([[bucket(k - q) for k in range(64)] for q in range(64)])
    return Formula(EVERY, known["table_t5"][:, buckets], scale=1.0)


def swin(known: dict[str, Any]) -> Formula:
    """The relative position of two positions of a window, plus 7 to begin at 0."""
    rows, columns = Q // 8 - K // 8 + 7, Q % 8 - K % 8 + 7
    return Formula(EVERY, known["table_swin"][:, rows, columns])


def natten(_: dict[str, Any]) -> Formula:
    """A window of 5 x 5 pixels begins at most 3 pixels from the first row and column of 8."""
    visible = np.zeros((8, 8, 8, 8), bool)
    for row in range(8):
        for column in range(8):
            top, left = (min(max(place - 2, 0), 3) for place in (row, column))
            visible[row, column, top : top + 5, left : left + 5] = True
    return Formula(visible.reshape(64, 64))


def documents(_: dict[str, Any]) -> Formula:
    """Blocks on the diagonal."""
    visible = np.zeros((64, 64), bool)
    for first, last in ((0, 13), (13, 43), (43, 64)):
        visible[first:last, first:last] = True
    return Formula(visible & PAST)


FORMULAS: dict[str, Callable[[dict[str, Any]], Formula]] = {
    "alibi": lambda _: Formula(PAST, -(2.0 ** -np.arange(1, 9))[:, None, None] * (Q - K)),
    "softcap": lambda _: Formula(PAST & (Q - K < 16), cap=50.0),
    "t5": t5,
    "swin": swin,
    "sinks": lambda known: Formula(PAST & (Q - K < 16), sinks=known["sinks"]),
    "prefix": lambda _: Formula(PAST | (K < 20)),
    "documents": documents,
    "dilated": lambda _: Formula(np.isin(Q - K, [0, 5, 10, 15, 20, 25])),
    "longformer": lambda _: Formula((abs(Q - K) < 8) | (K < 2) | (Q < 2)),
    "natten": natten,
}


def dense(formula: Formula, q: Any, k: Any, v: Any) -> Any:
    """Attention in a few lines of NumPy, in float64."""
    s = np.einsum("bhqd,bhkd->bhqk", q, k, dtype=np.float64) * formula.scale
    if formula.cap < math.inf:
        s = formula.cap * np.tanh(s / formula.cap)
    weights = np.where(formula.visible, np.exp(s + formula.added), 0)
    total = weights.sum(-1, keepdims=True)
    if formula.sinks is not None:
        total = total + np.exp(formula.sinks)[:, None, None]
    return weights / total @ v


def code_run(name: str) -> tuple[Any, dict[str, Any]]:
    """The result of the page's own code, and its names. Scores are made large by large queries."""
    codes = variants.codes()
    known: dict[str, Any] = {}
    exec(codes[""], known)
    if name == "softcap":
        known["q"] *= 30  # so that the cap matters
    exec(codes[name], known)
    return known["o"], known


def test_the_page_has_ten_variants() -> None:
    assert [*variants.codes()] == ["", *FORMULAS]
    assert len(FORMULAS) == 10
    for code in variants.codes().values():
        assert code.count("\n") <= 5


@pytest.mark.feature("M15")
@pytest.mark.parametrize("name", FORMULAS)
def test_a_variant_is_what_the_dense_formula_says(name: str) -> None:
    o, known = code_run(name)
    right = dense(FORMULAS[name](known), known["q"], known["k"], known["v"])
    np.testing.assert_allclose(o, right, atol=3e-5 if name == "softcap" else 5e-6)


@pytest.mark.slow
@pytest.mark.feature("J02")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", [name for name in FORMULAS if name != "sinks"])
def test_a_variant_is_what_flex_attention_says(name: str) -> None:
    torch = pytest.importorskip("torch")
    flex = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention
    o, known = code_run(name)
    formula = FORMULAS[name](known)
    added = np.where(formula.visible, np.broadcast_to(formula.added, (8, 64, 64)), -np.inf)
    table = torch.from_numpy(added.astype(np.float32))

    def modified(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        if formula.cap < math.inf:
            s = formula.cap * torch.tanh(s / formula.cap)
        return s + table[h, q, k]

    torch.compiler.reset()  # it keeps what it traced of the functions of other variants
    arrays = (torch.from_numpy(known[letter]) for letter in "qkv")
    found = flex(*arrays, score_mod=modified, scale=formula.scale)
    np.testing.assert_allclose(o, found.numpy(), atol=5e-5)


def test_the_pictures_are_drawn_by_the_code_of_the_page() -> None:
    for name, drawn in variants.pictures().items():
        kept = (variants.FOLDER / f"{name}.png").read_bytes()
        assert pixels(kept) == pixels(drawn), f"{name}: python tools/variants.py"
        assert f"images/variants/{name}.png" in variants.PAGE.read_text(encoding="utf-8")


def pixels(data: bytes) -> dict[bytes, bytes]:
    """The chunks of a PNG; its pixels without their compression, which depends on the library."""
    chunks, at = {}, 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        chunks[data[at + 4 : at + 8]] = data[at + 8 : at + 8 + size]
        at += 12 + size
    chunks[b"IDAT"] = zlib.decompress(chunks[b"IDAT"])
    return chunks
