"""Calls that were made before take a short way: it must see all that the long way sees."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import tilefold
from tilefold.backends.cpu import records, threads
from tilefold.backends.cpu.device import host
from tilefold.common import generation
from tilefold.products import calls, quantized_calls, quantized_torch, repeated

rng = np.random.default_rng(0)


def drawn(*shape: int) -> Any:
    return rng.standard_normal(shape).astype(np.float32)


def twice(*given: Any, **options: Any) -> list[Any]:
    """Results of the long way, and of the short one."""
    generation.advance()  # no call was made before
    first = tilefold.gemm(*given, **options)
    with mock.patch.object(calls, "_multiply", side_effect=AssertionError("the long way")):
        return [first, tilefold.gemm(*given, **options)]


@pytest.mark.slow
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
    tilefold.gemm(a, b, transpose_b=True)
    with pytest.raises(TypeError, match="transpose_b must be True or False"):
        tilefold.gemm(a, b, transpose_b=1)
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
w = tilefold.quantize(draw.standard_normal((512, 700)), "int8")
x = draw.standard_normal((2, 512)).astype("f")
wanted, rows = tilefold.gemm(a, b), tilefold.qgemm(x, w, dynamic=True)
def right():
    same = tilefold.qgemm(x, w, dynamic=True) == rows
    return (tilefold.gemm(a, b) == wanted).all() and same.all()
child = os.fork()
if child == 0:
    os._exit(0 if right() else 1)
assert os.waitpid(child, 0)[1] == 0 and right()
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


W = tilefold.quantize(drawn(64, 40), "int8")
"""Copies have prepared nothing."""

QUANTISED: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((64,), {}),
    ((3, 64), {"bias": drawn(40), "activation": "silu", "out_dtype": "float16"}),
    ((2, 64), {"dynamic": True}),
    ((20, 64), {}),  # arranged in tiles
]


@pytest.mark.feature("A02")
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_both_ways_to_a_quantised_product_are_equal(kind: type) -> None:
    for shape, options in QUANTISED:
        w, x = copy.copy(W), drawn(*shape).astype(kind)
        first = tilefold.qgemm(x, w, **options)
        with mock.patch.object(quantized_calls, "_multiply", side_effect=AssertionError("long")):
            again = tilefold.qgemm(x.copy(), w, **options)
        np.testing.assert_array_equal(first, again)
        assert first.dtype == again.dtype
        tensors = {**options}
        if "bias" in options:
            tensors["bias"] = torch.from_numpy(options["bias"])
        found = tilefold.qgemm(torch.from_numpy(x), w, **tensors)
        with mock.patch.object(quantized_torch, "multiply", side_effect=AssertionError("long")):
            again = tilefold.qgemm(torch.from_numpy(x), w, **tensors)
        assert torch.equal(found, again) and again.shape == first.shape
        np.testing.assert_array_equal(again.numpy(), first)


@pytest.mark.feature("A02")
def test_the_short_way_to_a_quantised_product_looks_at_addresses() -> None:
    w, memory = copy.copy(W), np.zeros(1024, np.float32)
    x, apart = memory[:128].reshape(2, 64), memory[128:208].reshape(2, 40)
    x[:] = drawn(2, 64)
    wanted = tilefold.qgemm(x, w, out=apart).copy()
    np.testing.assert_array_equal(tilefold.qgemm(x, w, out=apart), wanted)
    for start in (0, 1, 127):
        with pytest.raises(ValueError, match="out must not overlap x"):
            tilefold.qgemm(x, w, out=memory[start : start + 80].reshape(2, 40))
    odd = np.zeros(128 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(2, 64)
    odd[:] = x
    np.testing.assert_array_equal(tilefold.qgemm(odd, w, out=apart), wanted)
    halves = np.zeros(1024, np.float16)
    rows = halves[:128].reshape(2, 64)
    tilefold.qgemm(rows, w, out=halves[128:208].reshape(2, 40))
    with pytest.raises(ValueError, match="out must not overlap x"):
        tilefold.qgemm(rows, w, out=halves[100:180].reshape(2, 40))
    apart.flags.writeable = False
    with pytest.raises(ValueError, match="must not be read-only"):
        tilefold.qgemm(x, w, out=apart)
    tilefold.qgemm(x, w, dynamic=True)
    with pytest.raises(TypeError, match="dynamic must be True or False, got 1"):
        tilefold.qgemm(x, w, dynamic=1)
    freed = torch.from_numpy(x).clone()
    tilefold.qgemm(torch.from_numpy(x), w)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="freed"):
        tilefold.qgemm(freed, w)


@pytest.mark.feature("A02")
def test_what_was_prepared_for_a_matrix_ends_with_it() -> None:
    w, x = tilefold.quantize(drawn(64, 40), "int8"), drawn(20, 64)
    wanted = tilefold.qgemm(x, w)
    tilefold.qgemm(torch.from_numpy(x), w)
    assert len(w.kept) >= 2
    for other in (copy.copy(w), copy.deepcopy(w), pickle.loads(pickle.dumps(w))):
        assert not other.kept
        np.testing.assert_array_equal(tilefold.qgemm(x, other), wanted)
    ends = [weakref.ref(each) for each in (w, w.codes)]
    del w
    assert [end() for end in ends[:1]] == [None]
    other.codes[:] = 0  # its own; a copy shares its arrays with the first
    assert not tilefold.qgemm(x, other).any() and ends[1]() is None


@pytest.mark.feature("A02")
def test_a_level_chosen_later_changes_no_call_that_was_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    w, x = copy.copy(W), drawn(20, 64)
    wanted = tilefold.qgemm(x, w)
    monkeypatch.setenv("TILEFOLD_CPU_ISA", "neon" if host().isa == "neon" else "sse2")
    np.testing.assert_array_equal(tilefold.qgemm(x, w), wanted)
    np.testing.assert_allclose(tilefold.qgemm(x[:18], w), wanted[:18], rtol=1e-4, atol=1e-4)


@pytest.mark.feature("A02")
def test_threads_multiply_at_once_by_one_record() -> None:
    before = threads.get_num_threads()
    w, rows = tilefold.quantize(drawn(512, 700), "int8"), [drawn(1, 512) for _ in range(4)]
    tilefold.set_num_threads(2)
    try:
        wanted = [tilefold.qgemm(x, w, dynamic=True) for x in rows]

        def check(number: int) -> bool:
            found = [tilefold.qgemm(rows[number], w, dynamic=True) for _ in range(50)]
            return all((each == wanted[number]).all() for each in found)

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(check, range(4)))
    finally:
        tilefold.set_num_threads(before)


def test_a_guard_runs_nothing_without_all_its_operands() -> None:
    a, b, out = drawn(4, 4), drawn(4, 4), np.zeros((4, 4), np.float32)
    tilefold.gemm(a, b)
    way = repeated.WAYS.get(repeated.key(a, b, None, None, None, None, ASKED))
    assert way is not None and not way.guard.run(a, b, out) and not out.any()
    assert way.guard.run(a, b.ctypes.data, None, None, None, out)  # an address, and arrays
    np.testing.assert_allclose(out, a @ b, rtol=1e-5)


ASKED = (1.0, 0.0, False, False, None, None, "highest")
