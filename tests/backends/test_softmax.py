"""The softmax of rows: what the emitted kernels of every GPU backend compute."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from compare import assert_near
from products import Softmax, definition

from tilefold.backends.metal.matmul import rows
from tilefold.backends.triton.matmul.rows import DTYPES, SoftmaxBlocks

pytestmark = pytest.mark.slow

METAL = [Softmax(family, shared) for family in ("apple7", "apple9") for shared in (False, True)]
TRITON = [Softmax(blocks=each) for each in (None, SoftmaxBlocks(2, 32, 4), SoftmaxBlocks(1, 16, 4))]

in_every_way = pytest.mark.parametrize("softmax", [*METAL, *TRITON], ids=str)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Triton's interpreter warns of differences of infinities, and of rows of NaN alone."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@pytest.fixture(autouse=True)
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metal gives a row to a threadgroup from a width on: here always or never."""
    softmax: Softmax = request.getfixturevalue("softmax")
    monkeypatch.setattr(rows, "WIDE", 0 if softmax.shared else 10**9)


def trials() -> list[Any]:
    """Way and type: Apple GPUs have no float64."""
    ways = [*((one, DTYPES[:3]) for one in METAL), *((one, DTYPES) for one in TRITON)]
    return [(softmax, dtype) for softmax, dtypes in ways for dtype in dtypes]


@pytest.mark.parametrize(("softmax", "dtype"), trials(), ids=str)
def test_softmax_takes_rows_of_any_width(softmax: Softmax, dtype: str) -> None:
    shapes = [(1, 1), (5, 7), (3, 129), (2, 300)]
    if not softmax.family:
        shapes += [(0, 3), (3, 0), (1, 16), (7, 32), (2, 64)]
    for shape in shapes:
        x = 10 * np.random.default_rng(shape).normal(size=shape)
        softmax.check(x.astype(dtype))


@in_every_way
def test_softmax_takes_rows_wherever_they_lie(softmax: Softmax) -> None:
    """In a batch, alone, apart, and on Metal backwards; nothing is written around the weights."""
    x = np.random.default_rng(1).normal(size=(2, 3, 5, 40)).astype("float32")
    softmax.check(x)
    softmax.check(x[0, 0, 0])
    softmax.check(x[:, 1:, ::2, ::3])
    around = np.full((40, 3, 2, 9), 7, "float32")
    p = around[..., 1::2]
    if softmax.family:
        softmax.check(x[:, ::-1, ::2, ::-3])
        p = p[..., ::-1]
    softmax.check(x.transpose(3, 1, 0, 2)[..., :4], p)
    assert (around[..., ::2] == 7).all() and (p != 7).all()


@in_every_way
def test_softmax_may_replace_scores_by_weights(softmax: Softmax) -> None:
    x = np.random.default_rng(2).normal(size=(6, 200)).astype("float32")
    want, _ = definition(x)
    got, _ = softmax(x, x)
    assert np.shares_memory(got, x)
    assert_near("p", x, want, 1e-6)


@in_every_way
def test_softmax_takes_numbers_at_the_ends_of_their_range(softmax: Softmax) -> None:
    """Safe whatever the scores: huge ones, all alike, -inf among others or alone, +inf, NaN."""
    inf, nan = np.inf, np.nan
    for dtype in ("float32",) if softmax.family else ("float32", "float64"):
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
        p, lse = softmax(x)
        want, want_lse = definition(x)
        assert_near("p", p, want, 1e-6)
        assert (p[4] == 0).all() and lse[4] == -inf
        assert np.isnan(p[[5, 6, 8]]).all() and np.isnan(lse[[6, 8]]).all()
        finite = [0, 1, 2, 3, 7]
        assert_near("lse", lse[finite], want_lse[finite], 1e-6 * (1 + abs(want_lse[finite])))
