"""The softmax of rows by Triton: in one pass and walked, against float64; what is refused."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bounds import Fault, Watched
from compare import assert_near
from interpreted import needs, tensor
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from products import assert_weights, definition, weigh
from triton_ahead import compiled

from tilefold.backends.triton.matmul import calls, rows
from tilefold.backends.triton.matmul.rows import SoftmaxBlocks, SoftmaxSpec

# Tracing Python's operations doubles the time of these tests.
pytestmark = [pytest.mark.slow, pytest.mark.no_cover]

Array = NDArray[Any]

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
    for width in (rows.WIDE + 1, rows.WIDE):
        one = x[:, :width]
        assert_weights(one, *weigh(one))
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


TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_compiler_takes_the_texts(target: str, tmp_path: Path) -> None:
    """And moves 16 bytes at a time where rows are multiples of 16 bytes apart."""
    needs()
    tasks = []
    columns = ("x_column", "p_column")
    turn = TARGETS.index(target)
    for number, dtype in enumerate(rows.DTYPES):  # widths of a type take turns among targets
        for width in (1, 64, 4096, rows.WIDE + 1)[(number + turn) % 2 :: 2]:
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
