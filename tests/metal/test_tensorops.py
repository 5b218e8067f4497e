"""Attention on Metal 4's tensor operations, on the emulator: against the definition.

Each case runs under both layouts of cooperative tensors that the emulator knows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from compare import assert_near, dense, tolerances
from metal import TENSOR_LAYOUTS as LAYOUTS
from metal import machine
from metal import tensor_plan as plan
from metal_cases import CASES
from metal_recorder import Recorder
from operands import SENTINEL, Array, inputs, place

from tilefold import Rule, causal, cli, documents, full, local, rule
from tilefold.backends.metal import dispatch
from tilefold.backends.metal.kernels import tensorops
from tilefold.backends.metal.source import emit
from tilefold.backends.metal.spec import Blocks
from tilefold.problems.attention import Problem

pytestmark = pytest.mark.slow  # each launch is a process, each kernel a run of a C++ compiler


def forward(
    problem: Problem, operands: Mapping[str, Array], layout: int, into: Array | None = None
) -> dict[str, Array]:
    """o and lse of one launch, under a layout of cooperative tensors."""
    shape = (problem.batch, problem.heads_q, problem.len_q)
    o = np.full((*shape, problem.dim_v), SENTINEL, problem.dtype) if into is None else into
    results = {"o": o, "lse": np.full(shape, SENTINEL, np.float32)}
    given = {name: operands[name] for name in "qkv"}
    dispatch.execute(plan(problem), machine("apple10", tensor_layout=layout), {**given, **results})
    return results


def check(problem: Problem, layout: int, memory: str = "packed") -> None:
    """Compare with the definition, within the tolerances of the CPU's kernels."""
    operands = inputs(problem, "bhnd", memory)
    into = place((*operands["q"].shape[:3], problem.dim_v), problem.dtype, "bhnd", memory)
    got = forward(problem, operands, layout, into.array)
    assert into.untouched(), "the kernel wrote around o"
    want = dense(operands, problem.mask, problem.scale)
    allowed = tolerances(problem, operands, want, host_pairs=False)
    for name, array in got.items():
        assert_near(name, array, want[name], allowed[name])


@pytest.mark.slow
@pytest.mark.feature("J10")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("length", [64, 200])
def test_attention_of_a_head_is_one_launch(dtype: str, length: int, layout: int) -> None:
    problem = Problem.of((2, 2, 64, 64), (2, 2, length, 64), dtype=dtype)
    (launch,) = plan(problem).launches
    assert launch.spec.entry == "tilefold_forward" and launch.grid == (1, 2, 2)
    check(problem, layout)


SIDE_BY_SIDE = ("packed", "padded", "broadcast", "misaligned")
SERVED = [case for case in CASES if case.layout != "bhdn" and case.memory in SIDE_BY_SIDE]
"""Cases of the other kernels whose rows lie side by side: one of three, to save time."""


@pytest.mark.slow
@pytest.mark.feature("J10")
@pytest.mark.parametrize("number", [n for n in range(len(SERVED)) if n % 3 == 1])
def test_the_cases_of_the_other_kernels(number: int) -> None:
    case, dtype = SERVED[number], ("float32", "float16", "bfloat16")[number // 3 % 3]
    problem = case.problem(dtype)
    operands = inputs(problem, case.layout, case.memory)
    got = forward(problem, operands, number % 2)
    want = dense(operands, problem.mask, problem.scale)
    allowed = tolerances(problem, operands, want, host_pairs=False)
    for name, array in got.items():
        assert_near(name, array, want[name], allowed[name])


def test_rows_that_do_not_lie_side_by_side_are_refused() -> None:
    problem = Problem.of((1, 1, 8, 8))
    with pytest.raises(NotImplementedError, match="elements lie side by side; use the kernels on"):
        forward(problem, inputs(problem, "bhdn", "packed"), layout=0)


def test_the_probe_computes_a_product() -> None:
    a = np.random.default_rng(0).integers(-4, 5, (32, 32)).astype(np.float16)
    c = np.zeros((16, 32), np.float32)
    machine("apple10").compile(tensorops.probe()).tilefold_probe(a, c, threads=32, group_size=32)
    np.testing.assert_array_equal(c, a[:16].astype(np.float32) @ a)


GENERAL: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, str, Rule]] = {
    "causal": ((2, 4, 70, 40), (2, 2, 133, 40), 53, "float16", causal()),
    "window": ((1, 2, 150, 77), (1, 1, 150, 77), 20, "float32", local(30, causal=True)),
    "one": ((1, 1, 1, 1), (1, 1, 1, 1), 1, "float32", full()),
    "panels": ((1, 2, 17, 8), (1, 2, 70, 8), 300, "bfloat16", causal()),
    "wide": ((1, 1, 30, 200), (1, 1, 33, 200), 256, "float16", full()),
    "documents": ((2, 1, 65, 16), (2, 1, 65, 16), 16, "float32", documents(np.arange(65) // 20)),
    "empty": ((1, 1, 20, 16), (1, 1, 40, 16), 16, "float16", rule(lambda b, h, q, k: q > k + 9)),
}


@pytest.mark.slow
@pytest.mark.feature("J10")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", GENERAL)
def test_attention_of_any_shape_and_mask(name: str, layout: int) -> None:
    q, k, dim_v, dtype, mask = GENERAL[name]
    problem = Problem.of(q, k, (*k[:3], dim_v), dtype=dtype, mask=mask)
    check(problem, layout, "padded" if layout else "packed")


@pytest.mark.slow
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["k", "v", "q"])
def test_what_no_query_may_see_changes_nothing(name: str, bad: float) -> None:
    mask = documents(np.repeat([0, 1, 2], 15), np.repeat([0, 1, 4], 50))
    problem = Problem.of((1, 2, 45, 5), (1, 1, 150, 5), (1, 1, 150, 7), mask=mask, scale=0.5)
    operands = {key: array.copy() for key, array in inputs(problem, "bhnd", "packed").items()}
    operands[name][:, :, 20 : 30 if name == "q" else 120] = bad
    with np.errstate(all="ignore"):
        want = dense(operands, problem.mask, problem.scale)
    for key, array in forward(problem, operands, layout=1).items():
        assert_near(key, array, want[key], 1e-5)


def test_a_plan_says_what_it_takes() -> None:
    said = plan(Problem.of((1, 8, 2048, 128), dtype="float16")).explain()
    assert said == [
        "forward: 64 x 64 x 64, cached o",
        "  from blocks for tensor operations, which nobody tuned",
        "  registers 384 of 512 bytes: o 256, tiles 128",
        "  threadgroup 25344 of 32768 bytes",
        "  grid 32 x 8 x 1 threadgroups of 128 threads",
    ]


def test_inspect_prints_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        "--shape",
        "1,8,2048,128",
        "--dtype",
        "float16",
        "--backend",
        "metal",
        "--kernel",
        "tensorops",
    ]
    assert cli.main(["inspect", *given]) == 0
    spec = plan(Problem.of((1, 8, 2048, 128), dtype="float16")).launches[0].spec
    said = capsys.readouterr().out
    assert said.endswith(emit(spec)) and "32 x 8 x 1" in said
    assert cli.main(["inspect", *given, "--operation", "backward"]) == 2
    assert "tensor operations serve the forward pass only" in capsys.readouterr().err


@pytest.mark.feature("J12")
def test_sizes_and_simdgroups_are_in_the_text() -> None:
    (launch,) = plan(Problem.of((1, 1, 8, 8))).launches
    text = emit(launch.spec)
    assert "matmul2d_descriptor(\n        16, 32, static_cast<int>(dynamic_extent)" in text
    assert "max_total_threads_per_threadgroup(128)" in text and launch.spec.threads == 128
    other = replace(launch.spec, blocks=Blocks(32, 32, 16))
    assert "max_total_threads_per_threadgroup(64)" in emit(other)


def test_what_tensor_operations_do_not_serve_is_refused() -> None:
    (launch,) = plan(Problem.of((1, 1, 8, 8))).launches
    for change, message in (
        ({"kernel": "backward_dq", "cached": ()}, "forward pass alone, not backward_dq"),
        ({"dtype": "bfloat16", "bfloat": False}, "bfloat16 only where"),
        ({"unit": False}, "side by side"),
        ({"wide": True}, "31 bits"),
    ):
        spec = replace(launch.spec, **change)
        with pytest.raises(NotImplementedError, match=message):
            tensorops.variant(spec)
        with pytest.raises(NotImplementedError, match="use the kernels on fragments"):
            tensorops.emit(spec)


def test_the_gate_says_what_a_machine_lacks() -> None:
    def broken(text: str) -> None:
        raise SyntaxError("no header\nmore")

    compiles = machine("apple10").compile
    assert tensorops.gate((26, 2), 17, compiles) is None
    assert tensorops.gate((26, 1), 17, compiles) == (
        "tensor operations need macOS 26.2 or later, this is 26.1"
    )
    old = tensorops.gate((27, 0), 16, compiles)
    assert old and "of generation 17 (M5, A19) or later, this is of 16" in old
    assert str(tensorops.gate((27, 0), 18, broken)).endswith("does not compile: no header")
    no_pipeline = Recorder(pipeline_error="no pipeline\nmore").compile
    assert str(tensorops.gate((27, 0), 18, no_pipeline)).endswith("does not compile: no pipeline")
