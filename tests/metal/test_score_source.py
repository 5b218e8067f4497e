"""The emitted function of a modified score: emulated, it computes what the exact fold does."""

from __future__ import annotations

import numpy as np
import pytest
from metal import HEAD, machine
from score_sources import COLUMNS, EXPRESSIONS, INPUTS, ROWS, SCORES, assert_as_said

from tilefold import bias, softcap
from tilefold.backends.launching import plain
from tilefold.backends.metal.kernels import mask
from tilefold.backends.metal.plan import plan
from tilefold.backends.metal.source import emit
from tilefold.masks.expression import Several
from tilefold.masks.skeleton import split
from tilefold.masks.tables import Table
from tilefold.problems.attention import Problem

KERNEL = """
[[max_total_threads_per_threadgroup({columns})]]
kernel void values({given}) {{
    const int q = place.x, k = thread_index;
    const Modified found = modified(scores[q * {columns} + k], 0, 2, q, k, {passed});
{stores}
}}
"""


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, 64])
def test_score_source_computes_what_the_expression_says(bits: int) -> None:
    parts = split(Several(tuple(EXPRESSIONS)))
    slots = parts.skeleton.slots
    names, words, arrays = [], [], []
    for parameter, value in zip(parts.skeleton.parameters, parts.parameters, strict=True):
        names.append(parameter.name)
        real = parameter.dtype == "real"
        words.append(int(np.float32(value).view(np.uint32)) if real else value)
    for slot, read in zip(slots, parts.tables, strict=True):
        arrays.append(plain(read.array if isinstance(read, Table) else INPUTS[read.number]))
        names += slot.strides
        words += [step // arrays[-1].itemsize for step in arrays[-1].strides]
    wanted = {f"value_{number}": number for number in range(len(EXPRESSIONS))}
    function = mask.modified(parts.skeleton, wanted, bits, True, names.index)
    given = ["device float* out", "device const float* scores", "constant long* sizes"]
    given += mask.tables(parts.skeleton)
    given = [f"{name} [[buffer({number})]]" for number, name in enumerate(given)]
    given += ["uint3 place [[threadgroup_position_in_grid]]"]
    given += ["ushort thread_index [[thread_index_in_threadgroup]]"]
    stores = "\n".join(
        f"    out[({number} * {ROWS} + q) * {COLUMNS} + k] = found.{name};"
        for name, number in wanted.items()
    )
    passed = ", ".join(["sizes", *(slot.name for slot in slots)])
    sizes = {"given": ", ".join(given), "columns": COLUMNS, "passed": passed, "stores": stores}
    kernel = machine("apple9").compile(HEAD + function + KERNEL.format(**sizes)).values
    out = np.full((len(EXPRESSIONS), ROWS, COLUMNS), 7.0, np.float32)
    threads = {"threads": (ROWS * COLUMNS, 1, 1), "group_size": (COLUMNS, 1, 1)}
    kernel(out, SCORES.astype(np.float32), words, *arrays, **threads)
    assert_as_said(out, "float32", 3e-5)


def test_a_modified_score_reads_like_its_formula() -> None:
    given = np.zeros((8, 33), np.float16)
    problem = Problem.of((1, 2, 8, 16), (1, 2, 33, 16), score=[softcap(30.0), bias(given)])
    made = plan(problem, "apple9", "backward")
    assert """\
struct Modified {
    float score;
    float slope;
};

static inline Modified modified(const float s, const int b, const int h, const int q, const int k,
                                constant long* sizes, device const half* t0) {
    const float p0 = as_type<float>(uint(sizes[31]));
    const float p1 = as_type<float>(uint(sizes[32]));
    const float p2 = as_type<float>(uint(sizes[33]));
    const float p3 = as_type<float>(uint(sizes[34]));
    const float real0 = precise::tanh(s * p0);
    const float real1 = float(t0[q * sizes[35] + k * sizes[36]]);
    return {real0 * p1 + real1, p2 * (1.0f - real0 * real0) * p3};
}
""" in emit(made.launches[0].spec)
