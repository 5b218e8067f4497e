"""Gradients of the arrays that a score reads: against the definition, and their plans."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  # NumPy knows the name "bfloat16" from it
import numpy as np
import pytest
from compare import UNITS, assert_near, assert_same
from guarded import SIDES, guarded
from levels import device
from numpy.typing import NDArray
from paths import finding
from trial import LAYOUTS, Layout

from tilefold import (
    alibi,
    attention,
    attention_backward,
    bias,
    causal,
    dense,
    distance_bias,
    get_num_threads,
    local,
    relative_bias,
    score,
    set_num_threads,
    table,
    temperature,
)
from tilefold.backends.cpu import dispatch, native
from tilefold.backends.cpu.device import Device, host
from tilefold.backends.cpu.plan import CpuPlan, plan
from tilefold.backends.protocols import BACKWARD
from tilefold.frontends.operation import Operation
from tilefold.problems import reference
from tilefold.problems.attention import describe
from tilefold.problems.buffer import Buffer
from tilefold.problems.request import Request
from tilefold.scores.score import as_score

pytestmark = pytest.mark.slow  # kernels are compiled

Array = NDArray[Any]

B, H, KV, Q, K, D = 2, 4, 2, 37, 53, 8
"""Sizes of most cases: a batch, grouped heads, and lengths that are no whole blocks."""


class Case(NamedTuple):
    """A score of arrays of random numbers, and a mask."""

    make: Callable[[Callable[..., Array]], Any]
    mask: Any = None
    sizes: tuple[int, ...] = (B, H, KV, Q, K, D)
    layout: str = "bhnd"


CASES = {
    "bias": Case(lambda n: bias(n(B, H, Q, K)), causal(), layout="bnhd"),
    "bias-of-heads": Case(lambda n: bias(n(H, Q, K)), layout="bhdn"),
    "bias-turned": Case(lambda n: bias(n(K, Q, H).T[:, ::-1]), causal()),
    "bias-of-batch": Case(lambda n: bias(n(B, 1, Q, K)), local(9)),
    "one-temperature": Case(lambda n: temperature(np.asarray(1 + n() ** 2))),
    "one-query": Case(lambda n: bias(n(K)), sizes=(B, H, KV, 1, K, D)),
    "one-pair": Case(lambda n: bias(n(1, 1)), sizes=(1, 1, 1, 1, 1, 1)),
    "t5-of-all-heads": Case(lambda n: relative_bias(n(1, 8), False, 20), causal()),
    "several": Case(
        lambda n: [
            relative_bias(n(H, 32)),
            temperature(1 + n(B, H, 1, 1) ** 2),
            bias(n(B, H, Q, K)),
            bias(n(K)),
        ],
        causal() & local(30),
    ),
    "heads-last": Case(lambda n: _buckets_then_heads(n(9, H))),
    "one-array-twice": Case(lambda n: _twice(n(K + Q)), layout="backwards"),
    "one-bias-twice": Case(lambda n: _bias_twice(n(H, Q, K))),
    "by-parity": Case(lambda n: _by_parity(n(2, 3)), causal(), layout="no unit stride"),
    "not-used": Case(lambda n: _unused(n(H), n(H))),
}


def _buckets_then_heads(array: Array) -> Any:
    a = table(array)
    return score(lambda s, q, k, h: s + a[(q + 2 * k) % 9, h])


def _twice(array: Array) -> Any:
    a = table(array)
    return score(lambda s, q, k: s * a[k] + a[K + q])


def _bias_twice(array: Array) -> Any:
    return [bias(array), bias(array)]


def _by_parity(array: Array) -> Any:
    a = table(array)
    return score(lambda s, b, h, q: s * a[(b + h) % 2, q % 3])


def _unused(first: Array, second: Array) -> Any:
    """An array that is read and does not matter has a gradient of zeros."""
    a, c = table(first), table(second)
    return score(lambda s, h: s + a[h] + c[h] * 0)


def _laid(array: Array, layout: Layout) -> Array:
    """The array with the strides of a layout."""
    strides = layout.strides(array.shape)
    reach = [(size - 1) * stride for size, stride in zip(array.shape, strides, strict=True)]
    first = -sum(min(0, far) for far in reach)
    flat = np.zeros(first + sum(max(0, far) for far in reach) + 1, array.dtype)
    steps = tuple(stride * flat.itemsize for stride in strides)
    view = np.lib.stride_tricks.as_strided(flat[first:], array.shape, steps)
    view[...] = array
    return view


class Trial:
    """The arrays of a case, in a type."""

    def __init__(self, case: Case, dtype: str, of_arrays: str | None = None) -> None:
        self.case, random = case, np.random.default_rng(7)

        def numbers(*shape: int) -> Array:
            return np.asarray(random.normal(size=shape)).astype(of_arrays or dtype)

        batch, heads, heads_kv, len_q, len_k, dim = case.sizes
        shapes = [(batch, heads_kv, len_k, dim)] * 2 + [(batch, heads, len_q, dim)] * 2
        self.k, self.v, self.q, self.do = (
            _laid(random.normal(size=shape).astype(dtype), LAYOUTS[case.layout]) for shape in shapes
        )
        self.score = case.make(numbers)
        self.options = {"mask": case.mask, "score": self.score}

    def gradients(self) -> tuple[Array, ...]:
        """What tilefold computes, forward and backward."""
        given = (self.q, self.k, self.v)
        o, lse = attention(*given, **self.options, return_lse=True)
        return attention_backward(self.do, *given, o, lse, **self.options)

    def expected(self) -> tuple[Array, ...]:
        """The definition in float64."""
        given = (self.q, self.k, self.v)
        o, lse = reference.attention(*given, **self.options)
        return reference.attention_backward(self.do, *given, o, lse, **self.options)

    def check(self, tolerance: float) -> tuple[Array, ...]:
        """Compare all gradients; `tolerance` is a share of the largest element."""
        found, expected = self.gradients(), self.expected()
        form = as_score(self.score)
        assert form is not None
        types = [str(np.asarray(array).dtype) for array in form.form.arrays]
        assert [str(array.dtype) for array in found[3:]] == types
        for number, (got, want) in enumerate(zip(found, expected, strict=True)):
            allowed = tolerance + 2 * UNITS[str(got.dtype)]
            allowed *= max(1, np.abs(want).max(initial=0))
            assert_near(str(number), np.atleast_1d(got), np.atleast_1d(want), allowed)
            assert got.flags.c_contiguous
        return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_arrays_are_those_of_the_definition(name: str) -> None:
    Trial(CASES[name], "float64").check(1e-12)


TYPES = [
    ("float32", "float32"),
    ("float32", "float64"),
    ("float32", "float16"),
    ("float64", "bfloat16"),
    ("bfloat16", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
]
NEAR = {"float32": 3e-6, "float64": 1e-12, "float16": 4e-3, "bfloat16": 3e-2}


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "of_arrays"), TYPES)
def test_gradients_have_the_types_of_their_arrays(dtype: str, of_arrays: str) -> None:
    Trial(CASES["several"], dtype, of_arrays).check(NEAR[dtype])


@pytest.mark.slow
def test_long_sums_keep_the_precision_of_float32() -> None:
    """All 2e6 changes of one bucket have one sign: float32 added one by one would lose 1e-2."""
    trial = Trial(
        Case(lambda n: relative_bias(n(1, 4), True, 2), sizes=(1, 2, 1, 1000, 1000, 4)), "float32"
    )
    trial.check(3e-6)


# Hidden pairs -------------------------------------------------------------------------------------


def test_hidden_pairs_add_nothing_even_where_numbers_are_nan() -> None:
    case = Case(lambda n: [bias(n(H, Q, K)), relative_bias(n(H, 32)), bias(n(K))], local(5))
    trial = Trial(case, "float32")
    clean = trial.gradients()
    trial.k[:, :, :3], trial.v[:, :, :3] = np.nan, np.inf  # no query sees these keys
    assert not case.mask.to_dense(Q, K)[:, :3].any()
    for number, (got, want) in enumerate(zip(trial.gradients()[3:], clean[3:], strict=True)):
        assert_same(str(number), got, want)


def test_a_nan_reaches_the_entries_of_its_row_alone() -> None:
    trial = Trial(Case(lambda n: bias(n(H, Q, K)), causal()), "float32")
    trial.q[0, 1, 5] = np.nan
    found = np.isnan(trial.gradients()[3])
    visible = causal().to_dense(Q, K)[5]
    assert found[1, 5, visible].all()
    assert found.sum() == visible.sum()


def test_queries_without_keys_have_gradients_of_zero() -> None:
    case = Case(lambda n: [bias(n(K, Q)), bias(n(K, 1))], causal(), (B, H, KV, K, Q, D))
    for gradient in Trial(case, "float32").check(3e-6)[3:]:
        assert not gradient[: K - Q].any()


def test_a_mask_that_shows_nothing_leaves_no_entry_unwritten() -> None:
    """The plan and its launches: the result holds other numbers before."""
    rng = np.random.default_rng(0)
    do, q, k, v = (rng.normal(size=(1, 2, 9, 8)).astype(np.float32) for _ in range(4))
    added, hidden = np.ones((1, 2, 9, 9), np.float32), dense(np.zeros((1, 1), bool))
    form = as_score(bias(added)).form.score
    wanted = BACKWARD.plus(("input0",), ("dinput0",))
    o, lse = attention(q, k, v, mask=hidden, return_lse=True)
    given = do, q, k, v, o, lse, added
    shapes = [(array.shape, array.dtype.name) for array in given]
    call = Operation(wanted, Request(hidden, score=form)).native(shapes)
    results = [np.full_like(array, 7) for array in (q, k, v, added)]
    every = [*given, *results]
    addresses = (ctypes.c_int64 * len(every))(*[array.ctypes.data for array in every])
    run = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)(native.runner())
    assert run(call.address, ctypes.addressof(addresses)) == 0
    assert not any(array.any() for array in results)


def test_without_keys_the_gradients_of_arrays_are_zero() -> None:
    trial = Trial(Case(lambda n: alibi(n(H)), sizes=(B, H, KV, Q, 0, D)), "float32")
    assert trial.gradients()[3].tolist() == [0.0] * H


def test_an_array_without_elements_is_read_by_no_pair() -> None:
    for sizes in ((B, H, KV, 0, K, D), (B, H, KV, Q, 0, D)):
        shape = sizes[3:5]
        trial = Trial(Case(lambda n, shape=shape: bias(n(*shape)), sizes=sizes), "float32")
        assert trial.gradients()[3].shape == shape


# Plans --------------------------------------------------------------------------------------------


def planned(
    trial: Trial, device: Device | None = None, **options: Any
) -> tuple[CpuPlan, tuple[Array, ...]]:
    """The plan of a backward pass with the gradients of all arrays."""
    modified = as_score(trial.score)
    assert modified is not None
    form, arrays = modified.form
    request = Request(trial.case.mask, None, "bhnd", "highest", form)
    shapes = [array.shape for array in (trial.q, trial.k, trial.v)]
    problem = describe(*shapes, str(trial.q.dtype), request)
    numbers = tuple(range(len(arrays)))
    return plan(problem, device or host(), "backward", inputs=numbers, **options), arrays


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda n: bias(n(8, 8, 256, 256)), {}),  # the result itself
        (lambda n: bias(n(8, 256, 256)), {}),  # heads and queries stay apart, the batch in turn
        (lambda n: relative_bias(n(8, 32)), {"dinput0_parts": (32, 8, 32)}),
        (lambda n: alibi(n(8, 8)), None),
        (lambda n: bias(n(256)), {"dinput0_parts": (32, 256)}),
    ],
)
def test_parts_follow_from_shapes_and_are_few(make: Any, parts: dict[str, Any] | None) -> None:
    trial = Trial(Case(make, sizes=(8, 8, 8, 256, 256, D)), "float32")
    made, _ = planned(trial, device("avx512"))  # by its blocks of rows
    found = {name: each.shape for name, each in made.buffers.items() if "input" in name}
    if parts is None:  # as many as there are block rows
        ((name, shape),) = found.items()
        assert name == "dinput0_parts" and shape[0] <= 32 and shape[1:] == (8, 8)
    else:
        assert found == parts
    lines = made.explain_scratch()
    assert all(any(name in line for line in lines) for name in found)
    assert "backward_inputs" in [launch.spec.kernel for launch in made.launches]


@pytest.mark.slow
def test_bits_do_not_depend_on_threads_nor_on_the_run() -> None:
    sizes = (3, 4, 2, 210, 200, 8)
    case = Case(
        lambda n: [relative_bias(n(4, 32)), bias(n(200)), bias(n(4, 210, 200))], sizes=sizes
    )
    trial = Trial(case, "float32")
    usual, found = get_num_threads(), []
    try:
        for threads in (1, 2, 7, 7):
            set_num_threads(threads)
            found.append(trial.gradients())
    finally:
        set_num_threads(usual)
    for other in found[1:]:
        for number, (got, want) in enumerate(zip(other, found[0], strict=True)):
            assert_same(str(number), got, want)


def test_memory_is_that_of_the_array() -> None:
    sizes = (1, 2, 1, 2048, 2048, 8)
    trial = Trial(Case(lambda n: relative_bias(n(2, 32)), causal(), sizes), "float32")
    trial.gradients()
    tracemalloc.start()
    trial.gradients()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2048 * 2048 * 4 / 8, peak


# Forbidden pages ----------------------------------------------------------------------------------


def touch_guarded_arrays() -> None:
    """Every array ends at, or begins after, a page that no one may touch."""
    sizes = (2, 2, 1, 37, 45, 8)
    scores = (
        lambda n: bias(n(2, 2, 37, 45)),
        lambda n: [relative_bias(n(2, 32)), distance_bias(n(1, 3001)), bias(n(45)), bias(n(37, 1))],
    )
    for make in scores:
        trial = Trial(Case(make, causal(), sizes), "float32")
        made, arrays = planned(trial)
        o, lse = attention(trial.q, trial.k, trial.v, **trial.options, return_lse=True)
        given = {"do": trial.do, "q": trial.q, "k": trial.k, "v": trial.v, "o": o, "lse": lse}
        given |= {f"input{number}": array for number, array in enumerate(arrays)}
        expected = trial.gradients()
        names = ["dq", "dk", "dv", *(f"dinput{number}" for number in range(len(arrays)))]
        for side in SIDES:
            print(make, side, flush=True)
            with guarded(side) as memory:
                views = {name: memory.copy(name, array) for name, array in given.items()}
                for name, want in zip(names, expected, strict=True):
                    flat = memory.allocate(name, want.size, str(want.dtype))
                    views[name] = flat.reshape(want.shape)
                dispatch.run(
                    memory.move(made),
                    {
                        name: Buffer(
                            memory.address(name, view),
                            view.shape,
                            tuple(step // view.itemsize for step in view.strides),
                            str(view.dtype),
                            view,
                        )
                        for name, view in views.items()
                    },
                )
                for name, want in zip(names, expected, strict=True):
                    assert_same(name, views[name], want)
    print("done")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no mprotect")
def test_nothing_outside_of_the_arrays_is_touched() -> None:
    done = _child("from test_inputs import *\ntouch_guarded_arrays()", {})
    assert done.stdout.splitlines()[-1:] == ["done"], done.stdout[-500:] + done.stderr[-2000:]


def _child(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env={**finding(__file__), **environment},
    )
