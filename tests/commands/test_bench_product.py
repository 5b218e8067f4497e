"""`tilefold bench --operation gemm` and `qgemm`: rows, peers that are checked, and bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tilefold import cli
from tilefold.backends.cpu import peak
from tilefold.measuring import product_timing
from tilefold.measuring.product_timing import ProductRow, measure
from tilefold.measuring.products import ProductCase
from tilefold.planning.roofline import Rates


@pytest.fixture(autouse=True)
def _rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that nobody measures, and that no product of these tests reaches."""
    found = Rates("a machine", "float32", 1, 1e15, 1e15, 1e15)
    monkeypatch.setattr(peak, "rates", lambda *_, **__: found)


def rows(capsys: Any, *arguments: str) -> list[dict[str, Any]]:
    quick = ["--seconds", "0.001", "--threads", "1", "--json"]
    assert cli.main(["bench", "--operation", *arguments, *quick]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["rows"]
    return found


def test_rates_follow_from_times_and_sizes() -> None:
    case = ProductCase("gemm", 100, 200, 300)
    own = ProductRow(case, "tilefold", (2e-3, 1e-3, 3e-3), 1.0, case.bytes)
    assert (own.median, own.gflops) == (2e-3, pytest.approx(6.0))
    assert own.gb_per_second == pytest.approx(4 * (30_000 + 60_000 + 20_000) / 2e-3 / 1e9)
    slow = ProductRow(case, "numpy", (4e-3,), 1.0, case.bytes).record(own)
    assert (slow["tilefold_speedup"], slow["m"], slow["reason"]) == (2.0, 100, None)
    cannot = ProductRow(case, "numpy", (), math.nan, case.bytes, "why").record(own)
    assert (cannot["median_seconds"], cannot["gflops"], cannot["reason"]) == (None, None, "why")


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "int8"])
def test_products_and_peers_agree(dtype: str, capsys: Any) -> None:
    pytest.importorskip("torch")
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    turned = ["--transpose-b"] if dtype == "float64" else []
    peers = ["--peers", "torch", "numpy"]
    found = rows(capsys, "gemm", "--size", "32x48x40", "--dtype", dtype, *turned, *peers)
    assert [row["name"] for row in found] == ["tilefold", "torch", "numpy"]
    own, torch, numpy = found
    assert own["median_seconds"] > 0
    assert torch["reason"] is None or dtype == "int8"  # torch._int_mm is not everywhere
    assert (numpy["reason"] is None) == (dtype in ("float32", "float64"))
    assert own["gflops"] == pytest.approx(2 * 32 * 48 * 40 / own["median_seconds"] / 1e9)
    assert 0 < own["share_of_bound"] < 1
    assert torch["share_of_bound"] is None


@pytest.mark.slow
def test_openvino_computes_in_the_type_or_says_that_it_does_not(capsys: Any) -> None:
    if reason := product_timing.unusable("openvino"):
        pytest.skip(reason)
    peer = ["--size", "32x48x40", "--peers", "openvino", "--transpose-b"]
    _, plain = rows(capsys, "gemm", *peer)
    assert plain["reason"] is None and plain["median_seconds"] > 0
    for dtype in ("float64", "int8"):
        _, row = rows(capsys, "gemm", *peer, "--dtype", dtype)
        assert row["reason"] == "OpenVINO multiplies float32, float16 and bfloat16 alone"
    _, half = rows(capsys, "gemm", *peer, "--dtype", "float16")
    assert half["reason"] in (None, "OpenVINO computes products of float16 in f32 here")
    _, relu = rows(capsys, "gemm", *peer, "--activation", "relu")
    assert "neither activations nor gates" in relu["reason"]


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh"])
def test_torch_composes_activations_and_gates(activation: str, capsys: Any) -> None:
    pytest.importorskip("torch")
    more = ["--gate"] if activation == "silu" else []
    sizes = ["--size", "5x33x40", "--activation", activation, "--transpose-b", *more]
    _, torch, numpy = rows(capsys, "gemm", *sizes, "--peers", "torch", "numpy")
    assert torch["reason"] is None
    assert numpy["reason"] == "NumPy has neither activations nor gates of products"


@pytest.mark.feature("A02")
@pytest.mark.parametrize(
    ("options", "torch"),
    [
        ("--scheme int8", True),
        ("--scheme int8 --dynamic", True),
        ("--scheme int4 --group-size 32 --activation relu", False),
        ("--scheme float8_e4m3 --dtype float16", False),
    ],
)
def test_quantised_products_beside_weights_of_float16(
    options: str, torch: bool, capsys: Any
) -> None:
    pytest.importorskip("torch")
    own, half, dynamic = rows(capsys, "qgemm", "--size", "3x64x128", *options.split())
    assert (half["name"], half["reason"]) == ("float16", None)
    assert (dynamic["name"], dynamic["reason"] is None) == ("torch", torch)
    assert half["bytes"] - own["bytes"] > 0


def test_a_peer_that_computes_something_else_has_no_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(case: ProductCase, given: Any) -> tuple[Any, int]:
        return lambda: np.zeros((case.m, case.n), np.float32), 1

    monkeypatch.setitem(product_timing._GEMM, "numpy", wrong)
    _, row = measure(ProductCase("gemm", 8, 8, 8), ["numpy"], seconds=0.001)
    assert row.seconds == ()
    assert row.reason == "numpy computes something else: relative error 1.0e+00"


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_fits_the_terminal(
    columns: int, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    sizes = ["--size", "1000x30x20", "3x3x3", "--seconds", "0.001", "--threads", "1"]
    assert cli.main(["bench", "--operation", "gemm", *sizes, "--peers", "numpy"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= columns
    for word in ("1000x30x20", "GFLOP/s", "GB/s", "numpy", "of the measured roofline"):
        assert word in shown


@pytest.mark.slow
@pytest.mark.feature("S08")
def test_a_benchmark_is_saved(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    sizes = ["--size", "8x8x8", "--seconds", "0.001", "--threads", "1", "--peers", "numpy"]
    assert cli.main(["bench", "--operation", "gemm", *sizes, "--save", str(tmp_path)]) == 0
    assert f"written to {tmp_path}/gemm.json" in capsys.readouterr().out.replace("\n", "")
    found = json.loads((tmp_path / "gemm.json").read_text(encoding="utf-8"))["rows"]
    assert [row["name"] for row in found] == ["tilefold", "numpy"]
    assert (tmp_path / "gemm.csv").read_text(encoding="utf-8").count("\n") == 3
    assert (tmp_path / "gemm.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.feature("T15")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--operation gemm --size 8x8", "a size is three integers from 1 on"),
        ("--operation gemm forward", "--operation gemm stands alone"),
        (
            "--operation gemm --peers float16",
            "peers of --operation gemm are torch or numpy or open",
        ),
        ("--operation gemm --mask causal()", "--mask goes with attention"),
        ("--operation gemm --impl kernel", "--impl goes with attention"),
        ("--operation gemm --sweep", "--sweep goes with attention"),
        ("--operation qgemm --peers", "--operation qgemm needs --scheme: int8"),
        (
            "--operation qgemm --scheme int4 --group-size 48 --size 1x64x64 --peers",
            "group_size must be 64, or a multiple of 16 that divides 64, got 48",
        ),
        ("--size 8x8x8", "--size goes with --operation gemm or qgemm"),
        ("--dtype int8", "--dtype int8 goes with --operation gemm"),
        ("--peers float16", "--peers float16 goes with --operation qgemm"),
    ],
)
def test_bad_input_is_one_line(arguments: str, said: str, capsys: Any) -> None:
    assert cli.main(["bench", *arguments.split()]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert said in shown.err
