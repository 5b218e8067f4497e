"""`tilefold inspect --operation gemm` and `qgemm`: the plan that a call has, and bad input."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import tilefold
from tilefold import cli
from tilefold.backends.cpu import peak
from tilefold.backends.cpu.device import host
from tilefold.backends.cpu.matmul.few_rows_plan import FEW_ROWS
from tilefold.measuring.products import ProductCase
from tilefold.planning.roofline import Rates


@pytest.fixture(autouse=True)
def _rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that nobody measures: 100 GFLOP/s and 10 GB/s."""
    when = "2026-01-01T00:00:00+00:00"
    monkeypatch.setattr(
        peak, "rates", lambda *_, **__: Rates("a machine", "float32", 1, 1e11, 1e9, 1e10, when)
    )


def inspected(capsys: Any, *arguments: str) -> dict[str, Any]:
    assert cli.main(["inspect", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_large_product_is_blocked_and_bound_by_arithmetic(capsys: Any) -> None:
    found = inspected(capsys, "--operation", "gemm", "--size", "1000x900x800")
    plan, least = found["plan"], found["bounds"]
    assert (plan["form"], plan["turned"], plan["chunks"]) == ("panels", False, 1)
    assert plan["row_blocks"] == -(-1000 // plan["block_m"])
    assert plan["items"] == plan["row_blocks"] * plan["column_blocks"]
    assert set(found["kernels"]) - {"pack_b"} == {"gemm"}
    assert found["problem"]["flops"] == 2 * 1000 * 900 * 800
    assert found["problem"]["bytes"] == 4 * (1000 * 800 + 800 * 900 + 1000 * 900)
    assert (least["seconds"], least["binding"]) == (2 * 0.72e9 / 1e11, "arithmetic")


@pytest.mark.parametrize("way", [[], ["--transpose-b"]])
def test_few_rows_read_b_where_it_lies(way: list[str], capsys: Any) -> None:
    size = f"{FEW_ROWS}x512x1024"
    found = inspected(capsys, "--operation", "gemm", "--size", size, "--gate", *way)
    assert found["plan"]["form"] == ("deep" if way else "wide")
    assert found["kernels"]["few_rows"]["gate"]
    assert found["problem"]["flops"] == 4 * FEW_ROWS * 512 * 1024
    turned = inspected(capsys, "--operation", "gemm", "--size", "4096x1x64")
    assert turned["plan"]["turned"]
    small = inspected(capsys, "--operation", "gemm", "--size", f"{FEW_ROWS}x100x100")["plan"]
    assert (small["form"], small["items"]) == ("panels", 1)
    assert "pack_b" not in inspected(capsys, "--operation", "gemm", "--size", "40x60x50")["kernels"]


def test_integers_have_a_bound_of_arithmetic(capsys: Any) -> None:
    found = inspected(capsys, "--operation", "gemm", "--size", "64x64x64", "--dtype", "int8")
    assert found["bounds"]["arithmetic_seconds"] == 2 * 64**3 / 1e11
    assert found["bounds"]["binding"] == "arithmetic"
    assert found["problem"]["bytes"] == 2 * 64 * 64 + 4 * 64 * 64


@pytest.mark.feature("A02")
@pytest.mark.parametrize(
    ("scheme", "more"),
    [
        ("int4", ["--group-size", "32"]),
        ("int4_symmetric", []),
        ("int8", ["--dynamic"]),
        ("palette6", []),
        ("float8_e4m3", []),
    ],
)
def test_the_bytes_of_a_quantised_matrix_are_those_of_its_arrays(
    scheme: str, more: list[str], capsys: Any
) -> None:
    sizes = ["--operation", "qgemm", "--scheme", scheme, "--size", "3x40x256", *more]
    found = inspected(capsys, *sizes)
    w = tilefold.quantize(
        np.ones((256, 40), np.float32), scheme, group_size=32 if "--group-size" in more else None
    )
    assert found["plan"]["bits_per_weight"] == w.bits_per_weight
    assert found["kernels"]["qgemm"]["scheme"] == scheme
    assert ("round_rows" in found["kernels"]) == bool(more == ["--dynamic"])
    assert found["plan"]["items"] == w.panels


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("gemm --size 1024x1024x1024", "registers "),
        ("gemm --size 4x4096x4096 --activation gelu", "few rows: B is read once, where it lies"),
        ("qgemm --scheme int4 --size 64x512x512", "many rows: they share a panel"),
    ],
)
def test_the_plan_fits_the_terminal(
    arguments: str, said: str, columns: int, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main(["inspect", "--operation", *arguments.split()]) == 0
    shown = capsys.readouterr().out
    assert said in shown
    assert "10.0 GB/s" in shown
    assert max(map(len, shown.splitlines())) <= columns


@pytest.mark.feature("M03")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("gemm --kernel gemm", "define void @gemm("),
        ("gemm --kernel pack_b --size 20000x64x64", "define void @pack_b("),
        ("qgemm --scheme palette6 --size 1x32x32", "define void @qgemm("),
        ("qgemm --scheme int8 --dynamic --kernel round_rows", "define void @round_rows("),
    ],
)
def test_the_source_of_a_kernel(arguments: str, said: str, capsys: Any) -> None:
    assert cli.main(["inspect", "--operation", *arguments.split(), "--text"]) == 0
    assert said in capsys.readouterr().out


def test_the_assembly_of_a_kernel(capsys: Any) -> None:
    assert cli.main(["inspect", "--operation", "gemm", "--size", "1x64x64", "--asm"]) == 0
    said = capsys.readouterr().out
    assert "few_rows:" in said
    assert "ret" in said


@pytest.mark.feature("T15")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("gemm --size 1024x1024", "a size is three integers from 1 on such as 1024x1024x1024"),
        ("gemm --size 0x4x4", "not '0x4x4'"),
        ("gemm --size ax4x4", "not 'ax4x4'"),
        ("gemm --scheme int4", "--scheme goes with --operation qgemm"),
        ("gemm --mask causal()", "--mask goes with attention, not with --operation gemm"),
        ("gemm --shape 1,1,8,8", "--shape goes with attention"),
        ("gemm --kernel forward", "--kernel must be one of gemm"),
        (
            "gemm --dtype int8 --activation relu",
            "activation must be None where the result is int32",
        ),
        ("gemm --backend metal --json", "--json goes with --backend cpu for products"),
        ("gemm --backend triton --dtype int8", "--dtype of products on triton must be"),
        ("gemm --backend metal --dtype float64", "--dtype of products on metal must be"),
        ("gemm --family apple7", "--family goes with --backend metal, not cpu"),
        ("qgemm", "--operation qgemm needs --scheme: int8, int4"),
        ("qgemm --scheme int4 --gate", "--gate goes with --operation gemm"),
        ("qgemm --scheme int8 --dtype float64", "dtype of qgemm must be"),
        (
            "qgemm --scheme int4 --group-size 48 --size 1x64x64",
            "group_size must be 64, or a multiple of 16 that divides 64, got 48",
        ),
        ("qgemm --scheme int4 --group-size 0", "group_size must be an integer >= 1, got 0"),
        ("qgemm --scheme palette6 --group-size 32", "group_size must be None for palette6"),
        ("qgemm --scheme int4 --dynamic", "dynamic needs int8 without groups"),
        ("forward --size 4x4x4", "--size goes with --operation gemm or qgemm"),
        ("forward --dtype int8", "--dtype int8 goes with --operation gemm"),
    ],
)
def test_bad_input_is_one_line(arguments: str, said: str, capsys: Any) -> None:
    assert cli.main(["inspect", "--operation", *arguments.split()]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert said in shown.err


@pytest.mark.feature("T15")
@pytest.mark.parametrize(
    ("arguments", "near"),
    [("--operation gem", "gemm"), ("--operation qgemm --scheme palete6", "palette6")],
)
def test_a_mistyped_name_is_answered_by_the_nearest(arguments: str, near: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        cli.main(["inspect", *arguments.split()])
    assert f"did you mean {near}?" in capsys.readouterr().err


def test_a_case_has_the_plan_of_the_call() -> None:
    case = ProductCase("gemm", 40, 50, 60, transpose_b=True, activation="relu")
    made = case.plan(host())
    assert (made.product.m, made.product.n, made.product.k) == (40, 50, 60)
    assert made.product.b.axes.strides[-2:] == (1, 60)
    assert made.spec.activation == "relu"
    assert case.label == "gemm 40x50x60 float32 transpose b relu"


@pytest.mark.feature("M13")
@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        ("gemm --family apple7 --size 100x90x80 --gate --activation silu", ["m=100", "b_k=90"]),
        ("gemm --dtype float16 --transpose-b --size 100x90x80", ["for GPUs of apple9", "b_n=80"]),
        ("qgemm --scheme int4 --group-size 32 --size 1x64x128", ["groups of 32", "2 x 1 x 1"]),
        ("qgemm --scheme palette6 --size 1x64x128 --dtype float16", ["palette6"]),
    ],
)
def test_the_source_of_a_kernel_of_metal(arguments: str, facts: list[str], capsys: Any) -> None:
    given = ["inspect", "--backend", "metal", "--operation", *arguments.split()]
    assert cli.main(given) == 0
    comment, _, text = capsys.readouterr().out.partition("//\n")
    assert all(line.startswith("// ") for line in comment.splitlines())
    words = " ".join(comment.replace("//", "").split())
    assert all(fact in words for fact in facts), words
    assert "kernel void tilefold_gemm(" in text


def test_the_source_of_metal_is_that_of_a_call(capsys: Any, monkeypatch: Any) -> None:
    from tilefold.backends.metal.matmul import calls

    seen = []
    monkeypatch.setattr(
        calls, "kernel", lambda _, spec, emit, entry: seen.append(emit(spec)) or (lambda *a, **k: 0)
    )
    machine = tilefold.metal.emulated()
    a, b = np.ones((40, 24), np.float32), np.ones((50, 24), np.float32)
    tilefold.metal.gemm(a, b, transpose_b=True, activation="relu", machine=machine)
    name = machine.family
    given = "--operation gemm --size 40x50x24 --transpose-b --activation relu --backend metal"
    assert cli.main(["inspect", *given.split(), "--family", name]) == 0
    assert capsys.readouterr().out.partition("//\n")[2] == seen[0]


@pytest.mark.feature("M13")
@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        ("gemm --architecture sm_80 --size 100x90x80 --gate", ["for sm_80 (A100)", "gate"]),
        ("gemm --dtype bfloat16 --transpose-b", ["for sm_90", "num_warps="]),
        ("qgemm --scheme int4 --group-size 32 --size 1x64x128", ["a, b, scales, zeros, c"]),
    ],
)
def test_the_source_of_a_kernel_of_triton(arguments: str, facts: list[str], capsys: Any) -> None:
    given = ["inspect", "--backend", "triton", "--operation", *arguments.split()]
    assert cli.main(given) == 0
    said = capsys.readouterr().out
    words = " ".join(line.removeprefix("# ") for line in said.splitlines() if line[:1] == "#")
    assert all(fact in words for fact in facts), words
    assert "def tilefold_gemm(" in said
    compile(said, "printed", "exec")
