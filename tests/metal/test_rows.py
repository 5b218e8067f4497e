"""The softmax of rows on the emulator, by a simdgroup for each row and by a threadgroup."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from metal import needs
from numpy.typing import NDArray
from products import assert_weights

from tilefold.backends.metal.dispatch import Emulated
from tilefold.backends.metal.emulator.fault import Fault
from tilefold.backends.metal.matmul import calls, rows

Array = NDArray[Any]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=("apple7", "apple9"))
def machine(request: pytest.FixtureRequest) -> Emulated:
    needs()
    return Emulated(request.param)


def test_wide_rows_have_a_threadgroup_each(machine: Emulated) -> None:
    x = np.random.default_rng(3).normal(size=(2, rows.WIDE + 1)).astype("float32")
    texts: list[str] = []

    class Listening(Emulated):
        def compile(self, text: str) -> Any:
            texts.append(text)
            return super().compile(text)

    listening = Listening(machine.family)
    for width in (rows.WIDE + 1, rows.WIDE):
        one = x[:, :width]
        assert_weights(one, *calls.softmax(one, return_lse=True, machine=listening))
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
