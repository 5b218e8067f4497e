"""Attention on Metal 4's tensor operations, on the executor: against the definition.

Each case runs under both layouts of cooperative tensors that the executor knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from compare import assert_near, dense, tolerances
from numpy.typing import NDArray

from tilefold import Rule, causal, documents, full, local, rule
from tilefold.backends.metal import tensorops
from tilefold.backends.metal.arguments import arrays, sizes
from tilefold.backends.metal.source import emit
from tilefold.backends.metal.spec import Blocks, MetalSpec
from tilefold.blocks import runs
from tilefold.expression import split
from tilefold.problem import Problem

Array = NDArray[Any]
Compile = Callable[..., Any]

LAYOUTS = (0, 1)

TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def spec_of(problem: Problem, **options: Any) -> tuple[MetalSpec, tuple[int, ...], list[Array]]:
    skeleton, parameters, tables = split(problem.mask.bind(problem.len_q, problem.len_k))
    spec = MetalSpec(
        "forward",
        problem.dtype,
        problem.dim,
        problem.dim_v,
        Blocks(32, 64, 16),
        cached=("q", "o"),
        staged=False,
        bfloat=True,
        mask=skeleton,
        index_bits=32,
        **options,
    )
    return tensorops.variant(spec), parameters, [table.array for table in tables]


def forward(compiled: Compile, problem: Problem, given: dict[str, Array]) -> tuple[Array, Array]:
    """o and lse of one launch of the kernel."""
    spec, parameters, tables = spec_of(problem)
    step = spec.blocks
    visited = runs(
        problem.mask.bind(problem.len_q, problem.len_k),
        parallel="q",
        batch=problem.batch,
        heads=problem.heads_q,
        len_parallel=problem.len_q,
        len_traverse=problem.len_k,
        block_parallel=step.parallel,
        block_traverse=step.traverse,
    )
    rows = -(-problem.len_q // step.parallel)
    o = np.full((*given["q"].shape[:3], problem.dim_v), 9, given["q"].dtype)
    operands = {**given, "o": o, "lse": np.full(o.shape[:3], 9, np.float32)}
    numbers = {
        "len_q": problem.len_q,
        "len_k": problem.len_k,
        "heads_q": problem.heads_q,
        "group": problem.heads_q // problem.heads_kv,
        "row_b": rows * visited.planes_h if visited.planes_b > 1 else 0,
        "row_h": rows if visited.planes_h > 1 else 0,
        "splits": 1,
        **{f"p{i}": value for i, value in enumerate(parameters)},
    }
    for name, array in {**operands, **{f"t{i}": t for i, t in enumerate(tables)}}.items():
        axes = "bhnd" if name in "qkvo" else "01234"
        for axis, stride in zip(axes, array.strides, strict=False):
            numbers[f"{name}_{axis}"] = stride // array.itemsize
    bound = operands | {"order": np.arange(rows)[::-1].copy(), "run_rows": visited.rows}
    bound |= {"runs": visited.runs} | {f"t{i}": t for i, t in enumerate(tables)}
    values = [bound[argument.name] for argument in arrays(spec)]
    library = compiled(emit(spec))
    library.tilefold_forward(
        *(value.view(np.uint8) if value.dtype == bool else value for value in values),
        [numbers[name] for name in sizes(spec)],
        problem.scale,
        threads=(rows * spec.threads, problem.heads_q, problem.batch),
        group_size=(spec.threads, 1, 1),
    )
    return o, operands["lse"]


def check_forward(
    compiled: Compile,
    q: tuple[int, ...],
    k: tuple[int, ...],
    dim_v: int,
    dtype: str = "float32",
    mask: Rule | None = None,
) -> None:
    """Compare with the definition, within the tolerances of the CPU's kernels."""
    random = np.random.default_rng([*q, *k, dim_v])
    shapes = {"q": q, "k": k, "v": (*k[:3], dim_v), "do": (*q[:3], dim_v)}
    given = {name: random.normal(size=s).astype(TYPES[dtype]) for name, s in shapes.items()}
    problem = Problem.of(q, k, shapes["v"], dtype=dtype, mask=mask)
    o, lse = forward(compiled, problem, {name: given[name] for name in "qkv"})
    want = dense(given, problem.mask, problem.scale)
    allowed = tolerances(problem, given, want)
    assert_near("o", o, want["o"], allowed["o"])
    assert_near("lse", lse, want["lse"], allowed["lse"])


@pytest.mark.slow
@pytest.mark.feature("J10")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_attention_of_a_square_head_is_one_launch(metal: Compile, dtype: str, layout: int) -> None:
    def compiled(text: str) -> Any:
        return metal(text, tensor_layout=layout)

    check_forward(compiled, (2, 2, 64, 64), (2, 2, 64, 64), 64, dtype)
    check_forward(compiled, (1, 1, 128, 64), (1, 1, 200, 64), 64, dtype)


GENERAL = {
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
def test_attention_of_any_shape_and_mask(metal: Compile, name: str, layout: int) -> None:
    check_forward(lambda text: metal(text, tensor_layout=layout), *GENERAL[name])


def test_what_tensor_operations_do_not_serve_is_refused() -> None:
    spec, _, _ = spec_of(Problem.of((1, 1, 8, 8)))
    for change, message in (
        ({"operation": "backward_dq", "cached": ()}, "forward pass alone, not backward_dq"),
        ({"dtype": "bfloat16", "bfloat": False}, "bfloat16 only where"),
        ({"unit": False}, "side by side"),
        ({"wide": True}, "31 bits"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            tensorops.variant(replace(spec, **change))
        with pytest.raises(NotImplementedError, match="use the kernels on fragments"):
            tensorops.emit(replace(spec, **change))


def test_the_gate_says_what_a_machine_lacks(metal: Compile) -> None:
    def broken(text: str) -> None:
        raise SyntaxError("no header\nmore")

    assert tensorops.gate((26, 2), 17, metal) is None
    assert tensorops.gate((26, 1), 17, metal) == (
        "tensor operations need macOS 26.2 or later, this is 26.1"
    )
    assert "of generation 17 (M5, A19) or later, this is of 16" in str(
        tensorops.gate((27, 0), 16, metal)
    )
    assert str(tensorops.gate((27, 0), 18, broken)).endswith("does not compile: no header")
