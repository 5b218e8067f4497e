"""The softmax of rows by Triton: in one pass and walked, against float64; what is refused."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from bounds import Fault, Watched
from compare import UNITS, assert_near
from interpreted import array, needs, tensor
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from triton_ahead import compiled

from tilefold.backends.triton.matmul import calls, rows
from tilefold.backends.triton.matmul.rows import SoftmaxBlocks, SoftmaxSpec

pytestmark = pytest.mark.slow

Array = NDArray[Any]

LOWEST = -float(np.finfo("float64").max)

SOFTMAX = SoftmaxSpec("bfloat16", SoftmaxBlocks(4, 64, 4))
OTHER: dict[str, Any] = {
    "dtype": "float16",
    "blocks": SoftmaxBlocks(1, 64, 4),
    "online": True,
    "lse": True,
    "wide": True,
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The interpreter warns of differences of infinities, and of rows of NaN alone."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@pytest.fixture(
    params=[None, SoftmaxBlocks(2, 32, 4), SoftmaxBlocks(1, 16, 4)],
    ids=["one pass", "walked, two rows", "walked, one row"],
)
def blocks(request: pytest.FixtureRequest) -> SoftmaxBlocks | None:
    """Who has a row: None is a block that holds it."""
    found: SoftmaxBlocks | None = request.param
    return found


def weigh(x: Array, p: Array | None = None, **options: Any) -> tuple[Array, Array]:
    """`softmax` on arrays, with lse; its kernel touches its operands and no more."""
    needs()
    into = None if p is None else tensor(p)
    on = Watched(written=("p", "lse"))
    got, lse = calls.softmax(tensor(x), into, return_lse=True, machine=on, **options)
    assert into is None or got is into
    return array(got, str(x.dtype)), lse.numpy()


def definition(x: Array) -> tuple[Array, Array]:
    """Softmax and log-sum-exp in float64; 0 and -inf where a row is -inf alone."""
    x = x.astype(np.float64)
    m = np.where(np.isneginf(x).all(-1, keepdims=True), 0, x.max(-1, keepdims=True, initial=LOWEST))
    e = np.exp(x - m)
    total = e.sum(-1, keepdims=True)
    return np.where(total == 0, 0, e / np.where(total == 0, 1, total)), (m + np.log(total))[..., 0]


def assert_softmax(x: Array, p: Array | None = None, blocks: SoftmaxBlocks | None = None) -> None:
    """Raises unless weights and lse are as near as the type of the sums allows.

    A sum of `width` terms is off by as many units at most. x - m is off by a unit of itself, which
    its exponential passes on; weights below the smallest normal number may be 0. Of float64 the
    definition is off by as much itself.
    """
    got, lse = map(np.atleast_1d, weigh(x, p, blocks=blocks))
    want, want_lse = map(np.atleast_1d, definition(x))
    kept = str(x.dtype)
    unit = 2 * UNITS["float64"] if kept == "float64" else UNITS["float32"]
    assert lse.dtype == ("float64" if kept == "float64" else "float32")
    depth = np.where(want > 0, -np.log(np.maximum(want, 1e-45)), 0)
    exact = (x.shape[-1] + 8 + depth) * unit * want
    least = max(1.2e-38, float(ml_dtypes.finfo(kept).smallest_subnormal))
    assert_near("p", got, want, exact + 1.01 * UNITS[kept] * want + least)
    assert_near("lse", lse, want_lse, unit * (x.shape[-1] + 8 + abs(np.nan_to_num(want_lse))))


@pytest.mark.parametrize("dtype", rows.DTYPES)
def test_rows_of_any_width(blocks: SoftmaxBlocks | None, dtype: str) -> None:
    for shape in ((1, 1), (5, 7), (3, 129), (2, 300), (0, 3), (3, 0), (1, 16), (7, 32), (2, 64)):
        x = 10 * np.random.default_rng(shape).normal(size=shape)
        assert_softmax(x.astype(dtype), blocks=blocks)


@pytest.mark.feature("S02")
@pytest.mark.parametrize(
    "shape",
    [
        *((256, 256), (99, 99)),
        *(
            pytest.param(shape, marks=pytest.mark.slow)
            for shape in ((100, 2048), (100, 2047), (1024, 1024))
        ),
    ],
)
def test_the_shapes_of_the_learning_ladder(shape: tuple[int, int]) -> None:
    """Weights from 0 to 1, rows that sum to 1, and all within 1e-4 of the definition."""
    x = np.random.default_rng(shape).normal(size=shape).astype("float32")
    p, _ = weigh(x)
    assert ((p >= 0) & (p <= 1)).all()
    assert_near("sums", p.sum(axis=1, dtype="float64"), np.ones(len(x)), 1e-5)
    assert_near("p", p, definition(x)[0], 1e-4)


def test_rows_lie_anywhere_and_in_a_batch(blocks: SoftmaxBlocks | None) -> None:
    x = np.random.default_rng(1).normal(size=(2, 3, 5, 40)).astype("float32")
    assert_softmax(x, blocks=blocks)
    assert_softmax(x[0, 0, 0], blocks=blocks)
    assert_softmax(x[:, 1:, ::2, ::3], blocks=blocks)
    around = np.full((40, 3, 2, 9), 7, "float32")
    p = around[..., 1::2]
    assert_softmax(x.transpose(3, 1, 0, 2)[..., :4], p, blocks=blocks)
    assert (around[..., ::2] == 7).all() and (p != 7).all()


def test_weights_may_replace_their_scores(blocks: SoftmaxBlocks | None) -> None:
    x = np.random.default_rng(2).normal(size=(6, 200)).astype("float32")
    want, _ = definition(x)
    weigh(x, x, blocks=blocks)
    assert_near("p", x, want, 1e-6)


def test_numbers_at_the_ends_of_their_range(blocks: SoftmaxBlocks | None) -> None:
    """Safe whatever the scores: huge ones, all alike, -inf among others or alone, +inf, NaN."""
    inf, nan = np.inf, np.nan
    for dtype in ("float32", "float64"):
        most = float(np.finfo(dtype).max)
        x = np.zeros((9, 140), dtype)
        x[0] = most
        x[1] = -most
        x[2], x[2, 70] = -most, most
        x[3, 1:] = -inf
        x[4] = -inf
        x[5, 139] = inf
        x[6, 100] = nan
        x[7] = np.linspace(-100, 100, 140)
        x[8] = nan
        p, lse = weigh(x, blocks=blocks)
        want, want_lse = definition(x)
        assert_near("p", p, want, 1e-6)
        assert (p[4] == 0).all() and lse[4] == -inf
        assert np.isnan(p[[5, 6, 8]]).all() and np.isnan(lse[[6, 8]]).all()
        finite = [0, 1, 2, 3, 7]
        assert_near("lse", lse[finite], want_lse[finite], 1e-6 * (1 + abs(want_lse[finite])))


@pytest.mark.parametrize("text", ["row < rows", "(column < width"])
def test_a_forgotten_edge_is_found(text: str) -> None:
    """A kernel that leaves an array by one element: these tests can fail."""
    needs()
    from triton.runtime.errors import InterpreterError

    on = Watched(written=("p", "lse"), replaced=(text, text.replace("<", "<=")))
    x = tensor(np.ones((5, 7), "float32"))
    with pytest.raises(InterpreterError, match="elements outside of its operands"):
        calls.softmax(x, return_lse=True, machine=on)


def test_a_row_too_few_is_found() -> None:
    needs()
    on = Watched(written=("p", "lse"), replaced=("row < rows", "row < rows - 1"))
    with pytest.raises(Fault, match="8 elements were not written"):
        calls.softmax(tensor(np.ones((5, 7), "float32")), return_lse=True, machine=on)


def test_wide_rows_are_walked() -> None:
    x = np.random.default_rng(3).normal(size=(2, rows.WIDE + 1)).astype("float32")
    assert_softmax(x)
    assert_softmax(x[:, : rows.WIDE])
    blocks = SoftmaxBlocks.of(rows.WIDE)
    assert blocks == SoftmaxBlocks.of(rows.WIDE + 1) and blocks.columns == rows.WIDE


def test_offsets_beyond_31_bits(blocks: SoftmaxBlocks | None) -> None:
    """Numbers that lie 2^26 apart, 70 of them; the pages between are never touched."""
    memory = np.zeros(70 * 2**26, "float16")
    x = as_strided(memory, (3, 70), (2, 2**27))
    x[...] = np.random.default_rng(4).normal(size=x.shape)
    got, _ = weigh(x, blocks=blocks)
    assert_near("p", got, definition(x)[0], 1e-3)


@pytest.mark.feature("A05")
@pytest.mark.parametrize("name", [each.name for each in fields(SoftmaxSpec)])
def test_every_field_makes_another_text(name: str) -> None:
    other = replace(SOFTMAX, **{name: OTHER[name]})
    assert rows.emit(SOFTMAX) == rows.emit(SOFTMAX) != rows.emit(other)


@pytest.mark.parametrize("changed", [None, *OTHER])
def test_texts_are_plain_and_fit_a_screen(changed: str | None) -> None:
    spec = replace(SOFTMAX, **{changed: OTHER[changed]}) if changed else SOFTMAX
    text = rows.emit(spec)
    assert text.isascii() and max(map(len, text.splitlines())) <= 100
    compile(text, "module", "exec")
    for name in rows.names(spec):
        assert len(re.findall(rf"\b{name}\b", text)) > 1, name


@pytest.mark.parametrize(
    "x, p, error, message",
    [
        (np.ones((2, 2), "int32"), None, TypeError, "x must be one of float32, float16, bfloat16"),
        (np.ones((1,) * 5, "float32"), None, ValueError, "x must have 1 to 4 axes"),
        (np.float32(1)[...], None, ValueError, "x must have 1 to 4 axes"),
        (np.ones((2, 2), "float32"), np.ones((2, 3), "float32"), ValueError, r"shape \(2, 2\)"),
        (np.ones((2, 2), "float32"), np.ones((2, 2), "float16"), ValueError, "got float16"),
    ],
)
def test_what_is_no_matrix_is_refused(x: Array, p: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        weigh(np.asarray(x), p)


@pytest.mark.parametrize(
    "given, message",
    [
        ((3, 64, 4), "rows must be a power of two, got 3"),
        ((4, 48, 4), "columns must be a power of two, got 48"),
        ((4, 64, 5), "warps must be 1, 2, 4, 8 or 16, got 5"),
    ],
)
def test_blocks_are_powers_of_two(given: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SoftmaxBlocks(*given)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_every_compiler_takes_the_texts(target: str, tmp_path: Path) -> None:
    """And moves 16 bytes at a time where rows are multiples of 16 bytes apart."""
    needs()
    tasks = []
    columns = ("x_column", "p_column")
    for dtype in rows.DTYPES:
        for width in (1, 64, 4096, rows.WIDE + 1):
            ones = (*columns, "width", "x_row", "p_row") if width == 1 else columns
            blocks = SoftmaxBlocks.of(width)
            spec = SoftmaxSpec(dtype, blocks, width > blocks.columns, lse=True)
            file = tmp_path / f"{target}_{dtype}_{width}.py"
            file.write_text(rows.emit(spec), encoding="utf-8")
            types = rows.signature(spec)
            tasks.append(
                {
                    "file": str(file),
                    "entry": rows.ENTRY,
                    "signature": types,
                    "constants": dict.fromkeys(ones, 1),
                    "aligned": [name for name in types if name not in rows.alike()],
                    "options": {"num_warps": blocks.warps, "num_stages": rows.STAGES},
                    "target": target,
                }
            )
    for each, found in zip(tasks, compiled(tasks, tmp_path), strict=True):
        assert "failure" not in found, (each["file"], found)
        if target != "gfx942" and "float64" not in each["file"] and len(each["constants"]) == 2:
            assert found["assembly"].get("ld.global.v4"), (each["file"], found)
