"""What is wrong with a Metal kernel is found: each kind of fault, planted beside a healthy twin."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from metal import HEAD, backward, forward, kernel, machine, needs
from operands import inputs
from paths import DATA

import tilefold
from tilefold.backends.metal import dispatch, emulate
from tilefold.backends.metal.emulator import toolchain
from tilefold.backends.metal.emulator.fault import KINDS, Fault
from tilefold.problems.attention import Problem

pytestmark = pytest.mark.slow  # each launch is a process, each kernel a run of a C++ compiler

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


@dataclass(frozen=True)
class Plant:
    """A kernel of x and y, of 64 floats each: `healthy` is in its text, `planted` is put there."""

    check: str
    kind: str
    says: str
    body: str
    healthy: str
    planted: str
    threads: int = 64
    groups: int = 1

    def run(self, body: str) -> None:
        text = kernel(body, "device const float* x", "device float* y", threads=self.threads)
        x, y = np.zeros(64, np.float32), np.zeros(64, np.float32)
        grid = self.threads * self.groups
        library = emulate.compile_shader(text, self.check)
        library.test(x, y, threads=grid, group_size=self.threads)


COPY = "y[thread_index] = x[thread_index];"
STAGE = f"""
    threadgroup float other[64];
    threadgroup float stage[64];
    other[thread_index] = 0.0f;
    stage[thread_index] = x[thread_index];
    {BARRIER}
    y[thread_index] = stage[63 - thread_index] + other[thread_index];
"""
NEIGHBOURS = """
    threadgroup float stage[64];
    stage[thread_index] = x[thread_index];
    simdgroup_barrier(mem_flags::mem_threadgroup);
    y[thread_index] = stage[thread_index ^ 1];
"""
BRANCH = """
    float value = x[thread_index];
    if (lane < 64) {
        value = simd_shuffle_xor(value, 1);
    }
    y[thread_index] = value;
"""
TWO = """
    float value = x[thread_index];
    if (lane < 64)
        value = simd_max(value);
    else
        value = simd_sum(value);
    y[thread_index] = value;
"""
RETURN = f"""
    if (thread_index > 64) return;
    {BARRIER}
    y[thread_index] = 0.0f;
"""
TILE = """
    simdgroup_matrix<float, 8, 8> tile;
    simdgroup_load(tile, x, 8);
    simdgroup_store(tile, y, 8);
"""
PRODUCT = """
    simdgroup_matrix<float, 8, 8> tile[2];
    for (ushort i = 0; i < 2; ++i) tile[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    for (ushort i = 0; i < 2; ++i) simdgroup_multiply_accumulate(tile[i], tile[0], tile[1], tile[i]);
    y[lane] = tile[0].thread_elements()[0];
"""  # noqa: E501  a fault names one line of the kernel
HALF = """
    float value;
    if (x[thread_index] < 1.0f) value = 1.0f;
    if (value > 0.5f) y[thread_index] = 1.0f;
"""

PLANTS = {
    "reads one past the end": Plant(
        "fast", "out-of-bounds read", r"x \[\[buffer\(0\)\]\], byte 256 of 256; line 4",
        COPY, "x[thread_index]", "x[thread_index + 1]"),
    "writes one past the end": Plant(
        "fast", "out-of-bounds write", r"y \[\[buffer\(1\)\]\], byte 256 of 256; line 4",
        COPY, "y[thread_index]", "y[thread_index + 1]"),
    "writes before the start": Plant(
        "fast", "out-of-bounds write", r"y \[\[buffer\(1\)\]\], byte -1 of 256",
        COPY, "y[thread_index]", "y[int(thread_index) - 1]"),
    "reads before the start": Plant(
        "address", "out-of-bounds read", r"x \[\[buffer\(0\)\]\], byte -4 of 256; line 4.*lane 0",
        COPY, "x[thread_index]", "x[int(thread_index) - 1]"),
    "writes past a threadgroup array": Plant(
        "address", "out-of-bounds write", "threadgroup array other, byte 256 of 256; line 7",
        STAGE, "other[thread_index] = 0.0f", "other[thread_index + 1] = 0.0f"),
    "reads before a threadgroup array": Plant(
        "address", "out-of-bounds read", "threadgroup memory before or between its arrays; line 10",
        STAGE, "+ other[thread_index]", "+ other[int(thread_index) - 1]"),
    "multiplies past its own variables": Plant(
        "address", "out-of-bounds read", "variables of a thread; line 7",
        PRODUCT, "i < 2; ++i) simdgroup", "i < 3; ++i) simdgroup", 32),
    "reads unwritten threadgroup memory": Plant(
        "memory", "unwritten memory", r"y \[\[buffer\(1\)\]\], byte 0 of 256",
        STAGE, "stage[thread_index] = x", "if (thread_index < 63) stage[thread_index] = x"),
    "decides by unwritten variables": Plant(
        "memory", "unwritten memory", "a branch or an address depends on it; line 7",
        HALF, "x[thread_index] < 1.0f", "x[thread_index] > 1.0f"),
    "no barrier between two lanes": Plant(
        "thread", "race", "threadgroup array stage, byte .* line",
        NEIGHBOURS, "simdgroup_barrier(mem_flags::mem_threadgroup);", ""),
    "a barrier that orders no memory": Plant(
        "thread", "race", "threadgroup array stage",
        NEIGHBOURS, "mem_flags::mem_threadgroup", "mem_flags::mem_none"),
    "a shuffle for a barrier": Plant(
        "thread", "race", "threadgroup array stage",
        NEIGHBOURS, "simdgroup_barrier(mem_flags::mem_threadgroup);", "simd_shuffle(1.0f, 0);"),
    "no barrier across simdgroups": Plant(
        "thread", "race", "threadgroup array stage, .* of lane .* in threadgroup",
        STAGE, BARRIER, "simdgroup_barrier(mem_flags::mem_threadgroup);"),
    "two threadgroups write one address": Plant(
        "thread", "race", r"y \[\[buffer\(1\)\]\], .* in threadgroup \(1, 0, 0\)",
        "y[group.x * 32 + lane] = x[lane];", "group.x * 32 + lane", "lane", 32, 2),
    "a shuffle by some lanes": Plant(
        "fast", "divergence", "lanes 0-29 wait there, lane 30 has ended; line 7",
        BRANCH, "lane < 64", "lane < 30"),
    "lanes at two operations": Plant(
        "fast", "divergence", "simd_max is reached .* lane 30 simd_sum in line 9; line 7",
        TWO, "lane < 64", "lane < 30"),
    "a shuffle from a lane that is none": Plant(
        "fast", "divergence", "simd_shuffle reads from lane 40",
        "y[lane] = simd_shuffle(x[lane], 31);", "31", "40", 32),
    "a matrix in half a simdgroup": Plant(
        "fast", "divergence", "simdgroup_load in a simdgroup of only 16 threads",
        TILE, "", "", 16),
    "lanes that name different matrices": Plant(
        "fast", "divergence", "simdgroup_load: lanes .* name different places",
        TILE, "x, 8", "x + lane / 31, 4", 32),
    "a barrier by some threads": Plant(
        "fast", "barrier", "reached by a part of the threadgroup only",
        RETURN, "thread_index > 64", "thread_index > 40"),
    "a barrier by one of two simdgroups": Plant(
        "fast", "barrier", "threadgroup_barrier is reached .* has ended",
        RETURN, "thread_index > 64", "simdgroup == 0"),
    "a division by zero": Plant(
        "fast", "crash", "line 4: `y.*lane 3",
        "y[lane] = float(7 / (int(lane) + 1));", "+ 1", "- 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_fault_is_found_and_its_healthy_twin_passes(name: str) -> None:
    plant = PLANTS[name]
    needs(plant.check)
    if plant.healthy:
        assert plant.healthy in plant.body
        plant.run(plant.body)
    with pytest.raises(Fault, match=rf"(?s)^{plant.kind}: test: .*{plant.says}") as caught:
        plant.run(plant.body.replace(plant.healthy, plant.planted))
    assert caught.value.kind == plant.kind
    assert plant.kind in KINDS


def test_a_matrix_needs_a_full_simdgroup_and_gets_one() -> None:
    needs("fast")
    Plant("fast", "", "", TILE, "", "", 32).run(TILE)


def test_writing_between_the_elements_of_a_view_is_out_of_bounds() -> None:
    needs("fast")
    library = emulate.compile_shader(kernel("y[lane] = 1.0f;", "device float* y"))
    y = np.zeros(64, np.float32)
    library.test(y[:32], threads=32, group_size=32)
    with pytest.raises(Fault, match=r"out-of-bounds write.* between the elements of the view"):
        library.test(np.zeros(64, np.float32)[::2], threads=32, group_size=32)
    assert y[:32].sum() == 32 and y[32:].sum() == 0


REFUSED = {
    "// caf\u00e9": "line 5, column 7: '\\xe9' is not ASCII",
    "threadgroup float big[8193]; big[lane] = 0.0f;": "32784 bytes of threadgroup memory",
    "threadgroup float a[4096]; threadgroup half b[8200]; b[0] = half(a[0]);": "32784 bytes",
    "y[lane] = 0.5 * y[lane];": "line 5: `0.5`: a double in C++, a float in Metal: write 0.5f",
    "double z = y[lane];": "line 5: `double`: Metal has no double",
    "threadgroup float s[32]; threadgroup float* p = s; p[0] = 0.0f;": "index them",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_metal_refuses_and_cpp_takes_is_refused(line: str) -> None:
    needs("fast")
    text = kernel(f"// 1.0, double: comments may\n{line}", "device float* y")
    with pytest.raises(Fault, match=f"refused: .*{re.escape(REFUSED[line])}"):
        emulate.compile_shader(text)


@pytest.mark.parametrize(("text", "words"), [
    ("threadgroup float s[4];\nkernel void test(device float* y [[buffer(0)]]) { y[0] = s[0]; }",
     "outside of a kernel's body"),
    ("kernel void test(device float* y [[buffer(31)]]) {}", r"buffer\(31\) where 30 is the last"),
    ("kernel void test(device float* y [[buffer(0)]], constant long* s [[buffer(0)]]) {}",
     "two buffers share a number"),
    ("kernel void test(device float* y) {}", r"needs \[\[...\]\]"),
    ("kernel void test(float* y [[buffer(0)]]) {}", "to device or constant memory"),
    ("void test(device float* y) {}", "no kernel"),
])  # fmt: skip
def test_declarations_that_metal_refuses(text: str, words: str) -> None:
    needs("fast")
    with pytest.raises(Fault, match=f"refused: .*{words}"):
        emulate.compile_shader(HEAD + text)


def test_the_limits_themselves_are_allowed() -> None:
    needs("fast")
    body = "threadgroup float big[8192]; big[lane] = y[lane]; y[lane] = big[lane];"
    library = emulate.compile_shader(kernel(body, "device float* y"))
    library.test(np.zeros(32, np.float32), threads=32, group_size=32)


SPACES = {
    "device float* p = stage; y[0] = p[0];": "device const float* p = y; y[0] = p[0];",
    "thread const float* p = y; y[0] = p[0];": "thread const float* p = own; y[0] = p[0];",
    "device const long* p = sizes; y[0] = p[0];": "constant long* p = sizes; y[0] = p[0];",
    "y[0] = first(stage);": "y[0] = first(y);",
    "simdgroup_load(tile, own, 8);": "simdgroup_load(tile, stage, 8);",
}


@pytest.mark.parametrize("wrong", SPACES)
def test_a_pointer_into_other_memory_is_found(wrong: str) -> None:
    needs("address")
    before = "static inline float first(device const float* p) { return p[0]; }\n"

    def text(line: str) -> str:
        body = "threadgroup float stage[64]; float own[64];\n"
        body += "simdgroup_matrix<float, 8, 8> tile; const ulong2 at = ulong2(0, 1);\n"
        body += f"{line}\nsimdgroup_store(tile, y, 8, at);"
        return kernel(body, "device float* y", "constant long* sizes", before=before)

    emulate.check_address_spaces(text(SPACES[wrong]))
    with pytest.raises(Fault, match=f"address space: line 7: `{re.escape(wrong)}`"):
        emulate.check_address_spaces(text(wrong))


TEXTS = sorted((DATA / "metal").glob("*.metal"))


@pytest.mark.slow
@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_the_kernels_themselves_mistake_no_memory(path: Path) -> None:
    needs("address")
    emulate.check_address_spaces(path.read_text(encoding="ascii"))


def problem(dtype: str) -> Problem:
    """Edges everywhere: lengths and dims that no block divides, two heads on one."""
    mask = tilefold.causal() & tilefold.local(20)
    return Problem(1, 2, 1, 19, 37, 13, 13, dtype, 0.3, mask)


@pytest.mark.slow
@pytest.mark.parametrize("check", ["address", "memory", "thread"])
@pytest.mark.parametrize(("family", "dtype"), [("apple7", "bfloat16"), ("apple9", "float16")])
def test_attention_and_its_gradients_pass_every_check(family: str, dtype: str, check: str) -> None:
    needs(check)
    on = machine(family, check)
    case = problem(dtype)
    operands = inputs(case, "bhnd", "padded")
    found = forward(case, operands, on)
    for array in backward(case, {**operands, **found}, on).values():
        assert np.isfinite(array.astype(np.float32)).all()


@pytest.mark.slow
def test_no_barrier_of_the_staged_forward_kernel_can_be_spared() -> None:
    """Each, made one that orders no memory, is a race: the kernel has none too many."""
    needs("thread")
    case = Problem(1, 2, 1, 70, 150, 13, 13, "float32", 0.3, tilefold.causal())
    operands = inputs(case, "bhnd", "packed")
    barriers = 1
    number = 0
    while number < barriers:
        on = Spared("apple7", number)
        with pytest.raises(Fault, match="race"):
            forward(case, operands, on)
        barriers = on.barriers
        number += 1
    assert barriers > 2


class Spared(dispatch.Emulated):
    """A machine on which one barrier of each text orders no memory."""

    def __init__(self, family: str, number: int) -> None:
        super().__init__(family, "thread")
        object.__setattr__(self, "number", number)
        object.__setattr__(self, "barriers", 0)

    def compile(self, text: str) -> Any:
        parts = text.split(BARRIER)
        object.__setattr__(self, "barriers", len(parts) - 1)
        kept = BARRIER.join(parts[: self.number + 1]), BARRIER.join(parts[self.number + 1 :])
        return super().compile(BARRIER.replace("mem_threadgroup", "mem_none").join(kept))


def test_a_launch_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("fast")
    monkeypatch.setattr(emulate, "TIMEOUT_SECONDS", 0.5)
    library = emulate.compile_shader(kernel("while (y[lane] == 0.0f) {}", "device float* y"))
    with pytest.raises(Fault, match=r"time: test: no end in 0\.5 s"):
        library.test(np.zeros(32, np.float32), threads=32, group_size=32)


@pytest.mark.feature("J13")
def test_without_a_compiler_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(clang: bool, library: str) -> None:
        raise FileNotFoundError("a compiler is not here")

    monkeypatch.setattr(toolchain, "_compiler", missing)
    assert emulate.available() == "a compiler is not here"
    with pytest.raises(NotImplementedError, match="cannot be emulated here: a compiler is not"):
        emulate.compile_shader(kernel("", "device float* y"))
    with pytest.raises(NotImplementedError, match="spaces cannot be checked here: a compiler is"):
        emulate.check_address_spaces(kernel("", "device float* y"))
