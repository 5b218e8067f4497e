"""The softmax of rows on the emulator, by a simdgroup for each row and by a threadgroup."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from compare import UNITS, assert_near
from metal import needs
from numpy.typing import NDArray

from tilefold.backends.metal.dispatch import Emulated
from tilefold.backends.metal.emulator.fault import Fault
from tilefold.backends.metal.matmul import calls, rows

Array = NDArray[Any]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=("apple7", "apple9"))
def machine(request: pytest.FixtureRequest) -> Emulated:
    needs()
    return Emulated(request.param)


@pytest.fixture(params=[10**9, 0], ids=["a simdgroup for each row", "a threadgroup"])
def shared(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has a row, whatever its width."""
    monkeypatch.setattr(rows, "WIDE", request.param)


def definition(x: Array) -> tuple[Array, Array]:
    """Softmax and log-sum-exp in float64; 0 and -inf where a row is -inf alone."""
    x = x.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        m = np.where(np.isneginf(x).all(-1, keepdims=True), 0, x.max(-1, keepdims=True))
        e = np.exp(x - m)
        total = e.sum(-1, keepdims=True)
        return np.where(total == 0, 0, e / total), (m + np.log(total))[..., 0]


def assert_softmax(machine: Emulated, x: Array, p: Array | None = None) -> None:
    """Raises unless weights and lse are as near as float32 allows.

    A sum of `width` terms in lanes is off by as many units at most. x - m is off by a unit of
    itself, which its exponential passes on; weights below the smallest normal number may be 0.
    """
    got, lse = map(np.atleast_1d, calls.softmax(x, p, return_lse=True, machine=machine))
    want, want_lse = map(np.atleast_1d, definition(x))
    unit, kept = UNITS["float32"], str(x.dtype)
    with np.errstate(invalid="ignore"):
        depth = np.where(want > 0, -np.log(np.maximum(want, 1e-45)), 0)
    exact = (x.shape[-1] + 8 + depth) * unit * want
    least = max(1.2e-38, float(ml_dtypes.finfo(kept).smallest_subnormal))
    assert_near("p", got, want, exact + 1.01 * UNITS[kept] * want + least)
    assert_near("lse", lse, want_lse, unit * (x.shape[-1] + 8 + abs(np.nan_to_num(want_lse))))
    assert p is None or np.shares_memory(got, p)


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_of_any_width(machine: Emulated, dtype: str) -> None:
    for shape in ((1, 1), (5, 7), (3, 129), (2, 300)):
        x = 10 * np.random.default_rng(shape).normal(size=shape)
        assert_softmax(machine, x.astype(dtype))


@pytest.mark.usefixtures("shared")
def test_rows_lie_anywhere_and_in_a_batch(machine: Emulated) -> None:
    x = np.random.default_rng(1).normal(size=(2, 3, 5, 40)).astype("float32")
    p = np.full((40, 3, 2, 9), np.nan, "float32")[..., 1::2][..., ::-1]
    assert_softmax(machine, x)
    assert_softmax(machine, x[0, 0, 0])
    assert_softmax(machine, x[:, ::-1, ::2, ::-3])
    x = x.transpose(3, 1, 0, 2)[..., :4]
    assert_softmax(machine, x, p)


@pytest.mark.usefixtures("shared")
def test_weights_may_replace_their_scores(machine: Emulated) -> None:
    x = np.random.default_rng(2).normal(size=(6, 200)).astype("float32")
    want, _ = definition(x)
    assert calls.softmax(x, x, machine=machine) is x
    assert_near("p", x, want, 1e-6)


@pytest.mark.usefixtures("shared")
def test_numbers_at_the_ends_of_their_range(machine: Emulated) -> None:
    """Safe whatever the scores: huge ones, all alike, -inf among others or alone, +inf, NaN."""
    inf, nan, most = np.inf, np.nan, float(np.finfo("float32").max)
    x = np.zeros((8, 140), "float32")
    x[0] = most
    x[1] = -most
    x[2], x[2, 70] = -most, most
    x[3, 1:] = -inf
    x[4] = -inf
    x[5, 139] = inf
    x[6, 100] = nan
    x[7] = np.linspace(-100, 100, 140)
    p, lse = calls.softmax(x, return_lse=True, machine=machine)
    want, want_lse = definition(x)
    assert_near("p", p, want, 1e-6)
    assert (p[4] == 0).all() and lse[4] == -inf
    assert np.isnan(p[5:7]).all() and np.isnan(lse[6])
    finite = [0, 1, 2, 3, 7]
    assert_near("lse", lse[finite], want_lse[finite], 1e-6 * (1 + abs(want_lse[finite])))


def test_wide_rows_have_a_threadgroup_each(machine: Emulated) -> None:
    x = np.random.default_rng(3).normal(size=(2, rows.WIDE + 1)).astype("float32")
    texts: list[str] = []

    class Listening(Emulated):
        def compile(self, text: str) -> Any:
            texts.append(text)
            return super().compile(text)

    listening = Listening(machine.family)
    assert_softmax(listening, x)
    assert_softmax(listening, x[:, : rows.WIDE])
    assert ["threadgroup float" in text for text in texts] == [True, False]


def test_a_row_too_many_is_found(machine: Emulated) -> None:
    class Careless(Emulated):
        def compile(self, text: str) -> Any:
            broken = text.replace("row >= rows", "row > rows")
            assert broken != text
            return super().compile(broken)

    with pytest.raises(Fault, match="out-of-bounds"):
        calls.softmax(np.ones((3, 50), "float32"), machine=Careless(machine.family))


@pytest.mark.parametrize(
    "x, p, error, message",
    [
        (np.ones((2, 2)), None, TypeError, "x must be one of float32, float16, bfloat16"),
        (np.ones((2, 0), "float32"), None, ValueError, "none of length 0"),
        (np.ones((1,) * 5, "float32"), None, ValueError, "x must have 1 to 4 axes"),
        (np.ones((2, 2), "float32"), np.ones((2, 3), "float32"), ValueError, r"shape \(2, 2\)"),
        (np.ones((2, 2), "float32"), np.ones((2, 2), "float16"), ValueError, "got float16"),
    ],
)
def test_what_is_no_matrix_is_refused(x: Array, p: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        calls.softmax(x, p, machine=Emulated())
