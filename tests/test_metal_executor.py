"""The executor of Metal kernels: what it runs is exact, and what is wrong it finds.

Each kind of fault is planted in a small kernel, whose healthy twin must pass the same check.
"""

from __future__ import annotations

import os

import numpy as np
import pytest

from tilefold.backends.metal import emulate
from tilefold.backends.metal.emulator.fault import Fault

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"


@pytest.fixture(autouse=True)
def compiler() -> None:
    if reason := emulate.available():
        assert not os.environ.get("CI"), reason
        pytest.skip(reason)


def test_a_kernel_is_given_the_first_element_of_a_reversed_array() -> None:
    text = f"""{HEAD}
kernel void copy(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                 constant long* strides [[buffer(2)]], ushort lane [[thread_index_in_simdgroup]]) {{
    y[lane * strides[1]] = x[lane * strides[0]];
}}
"""
    x, y = np.arange(32, dtype=np.float32), np.empty((2, 32), np.float32)
    library = emulate.compile_shader(text)
    library.copy(x[::-1], y[0], [-1, 1], threads=32, group_size=32)
    library.copy(x, y[1, ::-1], [1, -1], threads=32, group_size=32)
    assert (y == x[::-1]).all()


PRODUCT = (
    HEAD
    + """
kernel [[max_total_threads_per_threadgroup(64)]] void product(
    device const half* a [[buffer(0)]],
    device const half* b [[buffer(1)]],
    device float* d [[buffer(2)]],
    constant long* sizes [[buffer(3)]],
    constant float& scale [[buffer(4)]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort thread_index [[thread_index_in_threadgroup]]) {
    threadgroup half stage[64];
    const long n = sizes[0];
    simdgroup_matrix<half, 8, 8> left, right;
    simdgroup_matrix<float, 8, 8> sum = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    for (long k = 0; k < n; k += 8) {
        stage[thread_index] = b[k * 8 + thread_index];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        simdgroup_load(left, a + simdgroup * 8 * n + k, n);
        simdgroup_load(right, stage, 8);
        simdgroup_multiply_accumulate(sum, left, right, sum);
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    sum.thread_elements() *= scale;
    simdgroup_store(sum, d + simdgroup * 64, 8);
}
"""
)


@pytest.mark.parametrize("past", [0, 1])
def test_a_product_reads_its_operands_and_not_past_them(past: int) -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(-4, 5, (16, 24)).astype(np.float16)
    b = rng.integers(-4, 5, (24, 8)).astype(np.float16)
    d = np.zeros((16, 8), np.float32)
    library = emulate.compile_shader(PRODUCT)
    if past:
        with pytest.raises(Fault, match=r"out-of-bounds read: product: b \[\[buffer\(1\)\]\]"):
            library.product(a, b[:-1], d, [24], 0.5, threads=64, group_size=64)
    else:
        library.product(a, b, d, [24], 0.5, threads=64, group_size=64)
        assert np.array_equal(d, 0.5 * a.astype(np.float32) @ b.astype(np.float32))
        assert library.counters["multiplies"] == 2 * 3
