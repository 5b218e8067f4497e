"""Calls that were made before take a short way: it must see all that the long way sees."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import tilefold
from tilefold.backends.cpu import records, threads
from tilefold.common import generation
from tilefold.products import calls

rng = np.random.default_rng(0)


def drawn(*shape: int) -> Any:
    return rng.standard_normal(shape).astype(np.float32)


def twice(*given: Any, **options: Any) -> list[Any]:
    """Results of the long way, and of the short one."""
    generation.advance()  # no call was made before
    first = tilefold.gemm(*given, **options)
    with mock.patch.object(calls, "_multiply", side_effect=AssertionError("the long way")):
        return [first, tilefold.gemm(*given, **options)]


@pytest.mark.feature("A01")
@pytest.mark.parametrize("sizes", [(5, 7, 9), (70, 65, 300), (300, 200, 100)])
def test_both_ways_are_equal(sizes: tuple[int, int, int]) -> None:
    m, n, k = sizes
    a, b, gate, bias, c = drawn(m, k), drawn(k, n), drawn(k, n), drawn(n), drawn(m, n)
    for options in (
        {},
        {"bias": bias, "activation": "silu", "gate": gate},
        {"c": c, "beta": 2.0, "out_dtype": np.float16},
        {"c": c},  # not read
        {"out": np.empty((n, m), np.float32).T},
    ):
        first, again = (np.array(x) for x in twice(a, b, **options))
        np.testing.assert_array_equal(first, again)
    packed = tilefold.pack(b)
    first, again = twice(a, packed, gate=tilefold.pack(gate))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(again, tilefold.gemm(a, b, gate=gate))


def test_the_short_way_looks_at_addresses() -> None:
    memory = np.zeros(4096, np.float32)
    a, b = memory[:64].reshape(8, 8), memory[64:128].reshape(8, 8)
    a[:], b[:] = drawn(8, 8), np.eye(8)
    apart = memory[128:192].reshape(8, 8)
    tilefold.gemm(a, b, out=apart)
    for start in (1, 60, 100, 127):
        with pytest.raises(ValueError, match="out must not overlap"):
            tilefold.gemm(a, b, out=memory[start : start + 64].reshape(8, 8))
    c = drawn(8, 8)
    wanted = a + 2 * c
    for _ in range(2):  # c may be out itself, and nothing else of it
        given = c.copy()
        np.testing.assert_allclose(
            tilefold.gemm(a, b, given, beta=2.0, out=given), wanted, rtol=1e-6
        )
    given = np.zeros(65, np.float32)
    with pytest.raises(ValueError, match="out must not overlap c"):
        tilefold.gemm(a, b, given[1:].reshape(8, 8), beta=2.0, out=given[:64].reshape(8, 8))
    odd = np.zeros(64 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(8, 8)
    odd[:] = a
    np.testing.assert_array_equal(tilefold.gemm(odd, b), a)


def test_the_short_way_refuses_what_the_long_way_refuses() -> None:
    a, b, out = drawn(8, 8), drawn(8, 8), np.empty((8, 8), np.float32)
    tilefold.gemm(a, b, out=out)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="must not be read-only"):
        tilefold.gemm(a, b, out=out)
    tilefold.gemm(a, b, alpha=1.0)
    with pytest.raises(TypeError, match="alpha"):
        tilefold.gemm(a, b, alpha=True)
    with pytest.raises(TypeError):
        tilefold.gemm(a, b, out_dtype=[])
    assert tilefold.gemm(a.astype(">f4"), b).dtype == np.float32
    masked = np.ma.masked_array(a, a > 0)
    with pytest.raises(TypeError):
        tilefold.gemm(masked, b)


def test_other_objects_are_never_taken_for_arrays() -> None:
    class Other(np.ndarray): ...

    a, b = drawn(8, 8), drawn(8, 8)
    wanted = tilefold.gemm(a, b)
    for other in (b.view(Other), memoryview(b), torch.from_numpy(b)):
        for _ in range(2):
            try:
                found = tilefold.gemm(a, other)
            except TypeError as error:
                assert "b must be" in str(error) or "a must be" in str(error)
            else:
                np.testing.assert_array_equal(found, wanted)


def test_tensors_take_the_short_way_where_nothing_observes_them() -> None:
    a, b, bias = (torch.from_numpy(drawn(*shape)) for shape in ((9, 8), (8, 7), (7,)))
    for options in ({}, {"bias": bias, "activation": "relu"}, {"out_dtype": torch.bfloat16}):
        first = tilefold.gemm(a, b, **options)
        with mock.patch.object(calls, "_frontend", side_effect=AssertionError("the long way")):
            again = tilefold.gemm(a, b, **options)
        assert torch.equal(first, again)
    assert tilefold.gemm(a, b.requires_grad_()).requires_grad
    with torch.no_grad():
        assert not tilefold.gemm(a, b).requires_grad
    freed = torch.from_numpy(drawn(9, 8)).clone()
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="freed"):
        tilefold.gemm(freed, b.detach())


@pytest.mark.feature("A01")
def test_a_team_of_python_threads_runs_the_same_steps() -> None:
    every = [((300, 260), (260, 150)), ((20, 3000), (3000, 40)), ((4, 900), (900, 800))]
    for left, right in every:  # packed before, split, few rows
        a, b = drawn(*left), drawn(*right)
        wanted = tilefold.gemm(a, b)
        with mock.patch.object(records.Recorded, "is_native", False):
            np.testing.assert_array_equal(tilefold.gemm(a, b), wanted)


FORKED = """
import os, numpy as np, tilefold
draw = np.random.default_rng(0)
a, b = (draw.standard_normal(shape).astype("f") for shape in ((300, 260), (260, 150)))
tilefold.set_num_threads(2)
wanted = tilefold.gemm(a, b)
child = os.fork()
if child == 0:
    os._exit(0 if (tilefold.gemm(a, b) == wanted).all() else 1)
assert os.waitpid(child, 0)[1] == 0 and (tilefold.gemm(a, b) == wanted).all()
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_multiplies_and_so_does_its_parent() -> None:
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=60)


def test_the_number_of_threads_is_that_of_the_moment() -> None:
    a, b = drawn(300, 260), drawn(260, 150)
    before = threads.get_num_threads()
    try:
        found = []
        for number in (1, 3, 2):
            tilefold.set_num_threads(number)
            found.append(tilefold.gemm(a, b))
            assert threads.follow() and threads._process.shared[0] == number
    finally:
        tilefold.set_num_threads(before)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
