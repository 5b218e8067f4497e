"""The emulator of Metal kernels runs what they say: each primitive is exact against NumPy."""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from metal import HEAD, kernel, needs

from tilefold.backends.metal import emulate
from tilefold.backends.metal.emulator.fault import Fault

pytestmark = pytest.mark.slow  # each launch is a process, each kernel a run of a C++ compiler

Array = np.ndarray[Any, Any]


@pytest.fixture(autouse=True)
def compiler() -> None:
    needs()


def run(text: str, *values: Any, threads: int = 32, check: str = "fast") -> dict[str, int]:
    """One threadgroup; what was counted."""
    library = emulate.compile_shader(text, check)
    library.test(*values, threads=threads, group_size=threads)
    return library.counters


FROM_LANES = {
    "simd_shuffle(x, ushort(31 - lane))": lambda x: x[::-1],
    "simd_shuffle_xor(x, 8)": lambda x: x[np.arange(32) ^ 8],
    "simd_shuffle_up(x, 3)": lambda x: np.concatenate([x[:3], x[:-3]]),
    "simd_shuffle_down(x, 3)": lambda x: np.concatenate([x[3:], x[-3:]]),
    "simd_shuffle_rotate_down(x, 5)": lambda x: np.roll(x, -5),
    "simd_shuffle_rotate_up(x, 5)": lambda x: np.roll(x, 5),
    "simd_broadcast(x, 7)": lambda x: np.full(32, x[7]),
    "simd_broadcast_first(x)": lambda x: np.full(32, x[0]),
    "simd_max(x)": lambda x: np.full(32, x.max()),
    "simd_min(x)": lambda x: np.full(32, x.min()),
    "simd_sum(x)": lambda x: np.full(32, x.sum()),
    "float(simd_any(x > 30.0f))": lambda x: np.full(32, (x > 30).any()),
    "float(simd_all(x > 30.0f))": lambda x: np.full(32, (x > 30).all()),
    "float(simd_sum(int(x)))": lambda x: np.full(32, x.sum()),
    "float(simd_shuffle_xor(half(x), 1))": lambda x: x[np.arange(32) ^ 1],
}


def test_lanes_exchange_numbers() -> None:
    body = "const float x = in[lane];\n"
    body += "\n".join(f"out[{32 * n} + lane] = {each};" for n, each in enumerate(FROM_LANES))
    x = np.random.default_rng(0).permutation(32).astype(np.float32)
    out = np.zeros((len(FROM_LANES), 32), np.float32)
    counted = run(kernel(body, "device const float* in", "device float* out"), x, out)
    for (name, want), row in zip(FROM_LANES.items(), out, strict=True):
        assert np.array_equal(row, want(x)), name
    assert (counted["shuffles"], counted["reductions"]) == (9, 6)


FUNCTIONS = {
    "fast::exp2(x)": np.exp2,
    "exp(x)": np.exp,
    "precise::log(abs(x) + 1.0f)": lambda x: np.log(np.abs(x) + 1),
    "log2(abs(x) + 1.0f)": lambda x: np.log2(np.abs(x) + 1),
    "tanh(x)": np.tanh,
    "rsqrt(x * x + 1.0f)": lambda x: 1 / np.sqrt(x * x + 1),
    "fma(x, x, -x)": lambda x: x * x - x,
    "clamp(x, -1.0f, 0.5f)": lambda x: np.clip(x, -1, 0.5),
    "max(x, NAN)": lambda x: x,
    "select(x, 1.0f, x > 1.0f)": lambda x: np.minimum(x, 1),
    "fast::divide(x, 3.0f)": lambda x: x / 3,
    "float(half(x))": lambda x: x.astype(np.float16),
    "float(bfloat(x))": lambda x: x.astype(ml_dtypes.bfloat16),
    "float(half(x) * half(3.0f))": lambda x: x.astype(np.float16) * np.float16(3),
    "float(bfloat(x) * bfloat(3.0f))": lambda x: (
        x.astype(ml_dtypes.bfloat16) * ml_dtypes.bfloat16(3)
    ),
    "as_type<float>(as_type<uint>(x) ^ 0x80000000u)": lambda x: -x,
    "float(isfinite(x / 0.0f))": lambda x: np.zeros_like(x),
    "dot(float2(x, 2.0f), float2(x, x))": lambda x: x * x + 2 * x,
    "(float4(float2(x), float2(1.0f)) * 2.0f)[1]": lambda x: 2 * x,
    "numeric_limits<float>::lowest() < x ? M_LN2_F : 0.0f": lambda x: np.full(32, np.log(2)),
}


def test_functions_of_numbers() -> None:
    body = "const float x = in[lane];\n"
    body += "\n".join(f"out[{32 * n} + lane] = {each};" for n, each in enumerate(FUNCTIONS))
    x = np.random.default_rng(1).normal(0, 3, 32).astype(np.float32)
    out = np.zeros((len(FUNCTIONS), 32), np.float32)
    counted = run(kernel(body, "device const float* in", "device float* out"), x, out)
    for (name, want), row in zip(FUNCTIONS.items(), out, strict=True):
        np.testing.assert_allclose(row, want(x).astype(np.float32), 1e-6, 1e-6, err_msg=name)
    assert counted["exponentials"] == 2 * 32


MATRICES = """
    simdgroup_matrix<T, 8, 8> a, b;
    simdgroup_matrix<S, 8, 8> c, d;
    simdgroup_load(a, left + 1, 12);
    simdgroup_load(b, right, 12, ulong2(2, 1), true);
    simdgroup_load(c, start, 8);
    simdgroup_multiply_accumulate(d, a, b, c);
    simdgroup_store(d, out, 8);
    simdgroup_multiply(d, a, b);
    simdgroup_store(d, out + 64, 8, ulong2(0), true);
    d = make_filled_simdgroup_matrix<S, 8, 8>(S(3.0f));
    d.thread_elements()[1] = S(float(lane));
    simdgroup_store(d, out + 128, 8);
"""
KINDS = {"float": np.float32, "half": np.float16, "bfloat": ml_dtypes.bfloat16}


@pytest.mark.feature("J04")
@pytest.mark.parametrize(("factor", "total"), [
    ("float", "float"), ("half", "float"), ("half", "half"), ("bfloat", "float"),
    ("bfloat", "bfloat"),
])  # fmt: skip
def test_matrices_of_8x8(factor: str, total: str) -> None:
    before = f"typedef {factor} T;\ntypedef {total} S;\n"
    text = kernel(
        MATRICES,
        "device const T* left",
        "device const T* right",
        "device const S* start",
        "device S* out",
        before=before,
    )
    rng = np.random.default_rng(2)
    left, right = (rng.integers(-3, 4, (10, 12)).astype(KINDS[factor]) for _ in range(2))
    start = rng.integers(-3, 4, (8, 8)).astype(KINDS[total])
    out = np.zeros((3, 8, 8), KINDS[total])
    counted = run(text, left, right, start, out)
    a = left.reshape(-1)[1:].reshape(-1)[: 7 * 12 + 8]
    a = np.stack([a[12 * row : 12 * row + 8] for row in range(8)]).astype(np.float32)
    b = right[1:9, 2:10].T.astype(np.float32)
    assert np.array_equal(out[0].astype(np.float32), a @ b + start.astype(np.float32))
    assert np.array_equal(out[1].astype(np.float32), (a @ b).T)
    lanes = np.arange(32)
    rows, columns = lanes // 2 % 4 + 4 * (lanes // 16), 2 * (lanes % 2) + 4 * (lanes // 8 % 2)
    assert np.array_equal(out[2][rows, columns + 1].astype(int), lanes)
    assert np.all(out[2][rows, columns].astype(int) == 3)
    assert (counted["multiplies"], counted["matrix_loads"], counted["elements"]) == (2, 3, 32)


PLACES = HEAD + """
kernel void places(device int* out [[buffer(0)]], uint3 at [[thread_position_in_grid]],
                   ushort3 inside [[thread_position_in_threadgroup]],
                   uint3 group [[threadgroup_position_in_grid]],
                   uint3 threads [[threads_per_grid]], uint3 size [[threads_per_threadgroup]],
                   uint3 groups [[threadgroups_per_grid]]) {
    const uint n = (at.z * threads.y + at.y) * threads.x + at.x;
    out[2 * n] += int(100 * inside.x + 10 * inside.y + inside.z);
    out[2 * n + 1] += int(group.x + groups.x * (group.y + groups.y * group.z) + 1000 * size.x);
}
"""  # fmt: skip


def test_threads_know_where_they_are_also_in_groups_cut_off_by_the_end() -> None:
    out = np.zeros((2, 3, 10, 2), np.int32)
    emulate.compile_shader(PLACES).places(out, threads=(10, 3, 2), group_size=(4, 2, 1))
    z, y, x = np.meshgrid(np.arange(2), np.arange(3), np.arange(10), indexing="ij")
    assert np.array_equal(out[..., 0], 100 * (x % 4) + 10 * (y % 2))
    group = x // 4 + 3 * (y // 2 + 2 * z)
    assert np.array_equal(out[..., 1], group + 1000 * np.where(x < 8, 4, 2))


REVERSE = """
    for (long n = lane; n < sizes[0]; n += 32)
        y[n * sizes[2]] += scale * float(x[n * sizes[1]]) + float(offset);
"""


def reverse(element: str) -> str:
    return kernel(
        REVERSE,
        f"device const {element}* x",
        "device float* y",
        "constant long* sizes",
        "constant float& scale",
        "constant int& offset",
    )


@pytest.mark.parametrize("element", ["float", "bfloat"])
@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_arrays_of_any_strides_are_read_and_written_in_place(element: str, framework: str) -> None:
    x = np.arange(40).astype(KINDS[element])
    y = np.arange(80, dtype=np.float32)
    want = y.copy()
    if framework == "torch":
        given = torch.arange(40).to(torch.bfloat16 if element == "bfloat" else torch.float32)
        target = torch.from_numpy(y)[1::2]
        want[1::2] += np.arange(40) * 0.5 + 3
        sizes = [40, 1, 2]
        values = given, target, sizes
    else:
        want[79::-2] += np.arange(40)[::-1] * 0.5 + 3
        values = x[::-1], y[::-2], [40, -1, -2]
    library = emulate.compile_shader(reverse(element))
    library.test(*values, 0.5, 3, threads=32, group_size=32, arg_casts={4: "int32"})
    assert np.array_equal(y, want)


def test_arguments_that_share_memory_share_it_in_the_kernel() -> None:
    library = emulate.compile_shader(reverse("float"))
    both = np.arange(64, dtype=np.float32)
    library.test(both[:32], both[31:], [1, 1, 32], 1.0, 0, threads=32, group_size=32)
    assert both[31] == 31  # y[0] = x[31] of before, plus x[0]
    library.test(both[31:], both[:32], [1, 1, 1], 2.0, 0, threads=32, group_size=32)
    assert both[0] == 62


@pytest.mark.parametrize(("change", "error", "words"), [
    ({1: np.zeros(4, np.float16)}, Fault, "y is .* but is given an array of float16"),
    ({3: 1}, Fault, "scale is .* but is given integers"),
    ({2: [1] * 513}, Fault, "4104 bytes"),
    ({0: "x"}, TypeError, "must be an array"),
    ({0: 1.5}, None, ""),
])  # fmt: skip
def test_arguments_are_checked(change: dict[int, Any], error: Any, words: str) -> None:
    values = [np.ones(1, np.float32), np.zeros(4, np.float32), [1, 1, 1], 1.0, 0]
    for index, value in change.items():
        values[index] = value
    library = emulate.compile_shader(reverse("float"))
    if error is None:  # a number is a buffer of one
        library.test(*values, threads=32, group_size=32)
        assert values[1][0] == 1.5
    else:
        with pytest.raises(error, match=words):
            library.test(*values, threads=32, group_size=32)


def test_a_launch_is_checked_as_metal_does() -> None:
    library = emulate.compile_shader(reverse("float"))
    values = np.ones(1, np.float32), np.zeros(4, np.float32), [1, 1, 1], 1.0, 0
    with pytest.raises(Fault, match="refused: test: a group of 64 threads where 32 are the most"):
        library.test(*values, threads=64, group_size=64)
    with pytest.raises(ValueError, match="as many numbers"):
        library.test(*values, threads=(32, 1), group_size=32)
    with pytest.raises(Fault, match="4 values where the buffers are"):
        library.test(*values[:4], threads=32, group_size=32)
    with pytest.raises(AttributeError, match="there are test"):
        library.other  # noqa: B018  # the point
    read_only = np.zeros(4, np.float32)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        library.test(values[0], read_only, *values[2:], threads=32, group_size=32)


def test_what_does_not_compile_is_a_syntax_error_with_the_place() -> None:
    with pytest.raises(SyntaxError, match=r"kernel\.metal:4:1: error: .*nothing"):
        emulate.compile_shader(kernel("nothing(x);", "device float* x"))


def test_a_second_start_compiles_nothing(fresh_cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tilefold.backends.metal.emulator import toolchain

    text = kernel("x[lane] = float(lane);", "device float* x")
    x = np.zeros(32, np.float32)
    toolchain._folder.cache_clear()  # as in another process
    run(text, x)
    toolchain._folder.cache_clear()
    monkeypatch.setattr(toolchain, "_compiled", lambda *_: sys.exit("compiled"))
    run(text, x)
    assert np.array_equal(x, np.arange(32))


def test_loads_and_stores_are_counted_by_their_memory() -> None:
    needs("count")
    body = """
    threadgroup float stage[32];
    stage[lane] = x[lane];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    x[lane] = stage[31 - lane] + stage[0];
    """
    x = np.arange(32, dtype=np.float32)
    counted = run(kernel(body, "device float* x"), x, check="count")
    names = "device_loads", "device_stores", "threadgroup_loads", "threadgroup_stores"
    assert [counted[name] for name in names] == [32, 32, 64, 32]
    assert counted["threadgroup_barriers"] == 1
