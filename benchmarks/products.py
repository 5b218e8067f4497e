"""Products of matrices and quantised products beside the peers that are installed.

- "square": 512 to 4096 in float32, 1024 and 2048 in other types, GFLOP/s of each peer
- "odd": float32 products of random sizes, and the geometric mean of the ratios
- "few": 1 to 16 rows by 4096 x 4096 as x @ w and as x @ w.T, GB/s of w beside reading
- "quantized": 1, 8 and 128 rows by 4096 x 11008, groups of 128, GB/s of the codes
- "linear": `QuantizedLinear` of int8 beside torch's dynamic int8, batches of 1 to 64

Every peer is a process of its own, and they take turns: threads of one do not disturb another.
Weights of "few" and "quantized" are many, so that none is in a cache. Medians count.

    python benchmarks/products.py --threads 1 2 --save benchmarks/results/products.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import tilefold
from tilefold.backends.cpu import peak
from tilefold.backends.cpu.device import host
from tilefold.measuring import openvino_model
from tilefold.measuring.environment import environment

PEERS = ("tilefold", "torch", "numpy", "onnxruntime", "openvino")
"""Those that are installed are measured."""

SHARE = 768 * 2**20
"""Bytes of all weights of "few" and "quantized"."""

LEAST_SECONDS = 0.05
"""A turn repeats its call for so long: in turns of 4 ms GNU's OpenMP is still waking its threads
(2 threads, 512 x 512 x 512: 25 GFLOP/s, and 270 in one process)."""

PAUSE = 0.1
"""The pause before a turn of several threads: those of the peer before spin on its cores.
OpenBLAS's do so for 2**26 cycles, 20 ms and more: after a pause of 20 ms a row by 4096 x 4096 read
8 GB/s, after this one 28 (Zen 3, 2 threads)."""

Job = Callable[[], Any]


def main() -> None:
    """Measure the chosen parts on each number of threads."""
    parts = {"square": square, "odd": odd, "few": few, "quantized": quantized, "linear": linear}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, tilefold.get_num_threads()])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each row")
    parser.add_argument("--save", type=Path, help="write the document to this file too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        serve(chosen.child, chosen.threads[0])
        return
    document: dict[str, Any] = environment()
    for threads in dict.fromkeys(chosen.threads):
        document[f"{threads} threads"] = found = {"rates": rates(threads)}
        peers = {name: Peer(name, threads) for name in PEERS if find_spec(name)}
        for name in chosen.parts:
            found[name] = parts[name](peers, chosen.seconds)
            if chosen.save:  # a part takes minutes, and a run may be cut
                chosen.save.write_text(_text(document), encoding="utf-8")
        for peer in peers.values():
            peer.close()
    sys.stdout.write(_text(document))


def _text(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=1) + "\n"


def rates(threads: int) -> dict[str, float]:
    """What this machine multiplies in float32 and reads at most, now."""
    seen = peak.measure(host(), "float32", threads)
    return {"gflops": seen.flops_per_second / 1e9, "gb_per_second": seen.bytes_per_second / 1e9}


def square(peers: dict[str, Peer], seconds: float) -> dict[str, Any]:
    """Square products by type."""
    sizes = {"float32": (512, 1024, 2048, 4096)}
    found = {}
    for dtype in ("float32", "float64", "float16", "bfloat16", "int8"):
        for n in sizes.get(dtype, (1024, 2048)):
            job = {"kind": "gemm", "m": n, "n": n, "k": n, "dtype": dtype}
            found[f"{dtype} {n}"] = _flops(_turns(peers, job, seconds), 2.0 * n**3)
    return found


def odd(peers: dict[str, Peer], seconds: float) -> dict[str, Any]:
    """Random sizes from 33 to 3000, no power of two."""
    draw, found, ratios = np.random.default_rng(0), {}, []
    for _ in range(20):
        m, n, k = (int(x) for x in np.exp(draw.uniform(math.log(33), math.log(3000), 3)))
        job = {"kind": "gemm", "m": m, "n": n, "k": k, "dtype": "float32"}
        row = _flops(_turns(peers, job, seconds / 4), 2.0 * m * n * k)
        found[f"{m} x {n} x {k}"] = row
        ratios.append(row["ratio to the best peer"])
    return {**found, "geometric mean": round(statistics.geometric_mean(ratios), 3)}


def few(peers: dict[str, Peer], seconds: float) -> dict[str, Any]:
    """Few rows: what is read of w in a second."""
    found = {}
    for m in (1, 4, 8, 16):
        for turned in (False, True):
            job = {"kind": "gemm", "m": m, "n": 4096, "k": 4096, "dtype": "float32"}
            job |= {"turned": turned, "weights": SHARE // 2**26}
            compiled = ("onnxruntime", "openvino")  # a model for each of the weights
            kept = {name: peer for name, peer in peers.items() if name not in compiled}
            times = _turns(kept, job, seconds)
            row = {name: 2**26 / median / 1e9 for name, median in _medians(times).items()}
            found[f"{m} x 4096 x 4096{', w.T' if turned else ''}"] = _best(row)
    return found


def quantized(peers: dict[str, Peer], seconds: float) -> dict[str, Any]:
    """Quantised products, and the product by weights of float16."""
    ours, found = {"tilefold": peers["tilefold"]}, {}
    k, n = 4096, 11008
    for m in (1, 8, 128):
        rows = {}
        for scheme in ("float16", "int8", "int4", "palette6"):
            size = k * n * {"float16": 2, "int8": 1, "int4": 0.5, "palette6": 0.75}[scheme]
            job = {"kind": "quantized", "m": m, "n": n, "k": k, "scheme": scheme}
            job["weights"] = max(2, int(SHARE // size)) if m < 128 else 2
            (median,) = _medians(_turns(ours, job, seconds)).values()
            rows[scheme] = {"ms": 1e3 * median, "gb_per_second": size / median / 1e9}
        for row in rows.values():
            row["times float16"] = rows["float16"]["ms"] / row["ms"]
        found[f"{m} x {k} x {n}"] = _rounded(rows)
    return found


def linear(peers: dict[str, Peer], seconds: float) -> dict[str, Any]:
    """A layer 1024 -> 4096 of int8."""
    both = {name: peers[name] for name in ("tilefold", "torch") if name in peers}
    found = {}
    for m in (1, 8, 64):
        job = {"kind": "linear", "m": m, "n": 4096, "k": 1024}
        row = {name: 1e6 * x for name, x in _medians(_turns(both, job, seconds)).items()}
        if "torch" in row:
            row["times torch"] = row["torch"] / row["tilefold"]
        found[f"{m} x 1024 x 4096, microseconds"] = _rounded(row)
    return found


def _flops(times: dict[str, list[float]], flops: float) -> dict[str, Any]:
    return _best({name: flops / median / 1e9 for name, median in _medians(times).items()})


def _best(rates: dict[str, float]) -> dict[str, Any]:
    """Rates, and how ours compares with the best of the others."""
    others = {name: rate for name, rate in rates.items() if name != "tilefold"}
    row: dict[str, Any] = dict(rates)
    if others:
        row["best peer"] = max(others, key=lambda name: others[name])
        row["ratio to the best peer"] = rates["tilefold"] / max(others.values())
    return _rounded(row)


def _rounded(row: Any) -> Any:
    if isinstance(row, dict):
        return {name: _rounded(value) for name, value in row.items()}
    return round(row, 3) if isinstance(row, float) else row


def _medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(each) for name, each in times.items()}


def _turns(peers: dict[str, Peer], job: dict[str, Any], seconds: float) -> dict[str, list[float]]:
    """The seconds of a call in each turn, of the peers that have it."""
    able = {name: peer for name, peer in peers.items() if peer.ask(job) == "ready"}
    times: dict[str, list[float]] = {name: [] for name in able}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["tilefold"]) < 3:
        for name, peer in able.items():
            time.sleep(PAUSE if peer.threads > 1 else 0)
            times[name].append(float(peer.ask("run")))
    return times


class Peer:
    """A process that makes one peer's calls when it is asked."""

    def __init__(self, name: str, threads: int) -> None:
        self.threads = threads
        many = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), str(threads))
        command = [sys.executable, "-W", "ignore", __file__, "--child", name]
        self._process = subprocess.Popen(
            [*command, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | many,
        )

    def ask(self, question: Any) -> str:
        """Its answer of one line."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().strip()
        if not answer:
            raise RuntimeError(f"a peer ended with {self._process.wait()}")
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


# ------------------------------------------------------------------------ in the process of a peer


def serve(name: str, threads: int) -> None:
    """Answer questions: a job is made ready, "run" is timed."""
    if name != "numpy":
        tilefold.set_num_threads(threads)
    jobs: list[Job] = []
    turn = 0
    for line in sys.stdin:
        question = json.loads(line)
        if question == "run":
            count, start = 0, time.perf_counter()
            while not count or time.perf_counter() - start < LEAST_SECONDS:
                jobs[turn % len(jobs)]()
                turn, count = turn + 1, count + 1
            print((time.perf_counter() - start) / count, flush=True)
            continue
        jobs = []
        try:
            jobs = _MAKERS[question["kind"]](name, threads, question)
            for job in jobs:
                job()
            print("ready", flush=True)
        except (NotImplementedError, ImportError) as error:
            print(f"not here: {error}".replace("\n", " "), flush=True)


def _random(shape: tuple[int, ...], dtype: str, seed: int) -> Any:
    draw = np.random.default_rng(seed)
    if dtype == "int8":
        return draw.integers(-128, 128, shape, dtype=np.int8)
    numbers = draw.standard_normal(shape, np.float32)
    return numbers if dtype == "bfloat16" else numbers.astype(dtype)


def _gemm(name: str, threads: int, job: dict[str, Any]) -> list[Job]:
    m, n, k, dtype, turned = job["m"], job["n"], job["k"], job["dtype"], job.get("turned", False)
    x = _random((m, k), dtype, 0)
    shape = (n, k) if turned else (k, n)
    weights = [_random(shape, dtype, 1 + each) for each in range(job.get("weights", 1))]
    if name == "tilefold":
        if dtype == "bfloat16":
            import ml_dtypes

            x, weights = (
                x.astype(ml_dtypes.bfloat16),
                [w.astype(ml_dtypes.bfloat16) for w in weights],
            )
        out = tilefold.gemm(x, weights[0], transpose_b=turned)
        return [lambda w=w: tilefold.gemm(x, w, transpose_b=turned, out=out) for w in weights]
    if name == "numpy":
        if dtype not in ("float32", "float64"):
            raise NotImplementedError("OpenBLAS has float32 and float64")
        made = np.empty((m, n), dtype)
        return [lambda w=w: np.matmul(x, w.T if turned else w, out=made) for w in weights]
    if name == "torch":
        return _gemm_of_torch(threads, x, weights, dtype, turned)
    if name == "openvino":
        return _gemm_of_openvino(threads, x, weights[0], dtype)
    return _gemm_of_onnxruntime(threads, x, weights[0], dtype)


def _gemm_of_openvino(threads: int, x: Any, w: Any, dtype: str) -> list[Job]:
    if dtype == "bfloat16":
        import ml_dtypes

        x, w = x.astype(ml_dtypes.bfloat16), w.astype(ml_dtypes.bfloat16)
    model = openvino_model.product(x, w, threads)
    error = np.abs(model()[0].astype(float) - x[0].astype(float) @ w.astype(float)).max()
    if not error <= 0.02 * math.sqrt(len(w)):  # sums of so many products of normal numbers
        raise ArithmeticError(f"openvino computes something else: off by {error}")
    return [model]


def _gemm_of_torch(threads: int, x: Any, weights: list[Any], dtype: str, turned: bool) -> list[Job]:
    import torch

    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    a, *rest = [torch.from_numpy(each).to(kind) for each in (x, *weights)]
    b = [w.T if turned else w for w in rest]
    if dtype == "int8":
        return [lambda w=w: torch._int_mm(a, w) for w in b]
    out = torch.empty(a.shape[0], b[0].shape[1], dtype=kind)
    return [lambda w=w: torch.mm(a, w, out=out) for w in b]


def _gemm_of_onnxruntime(threads: int, x: Any, w: Any, dtype: str) -> list[Job]:
    if dtype != "float32":
        raise NotImplementedError("only its float32 is measured")
    import onnx
    import onnxruntime

    real, helper = onnx.TensorProto.FLOAT, onnx.helper
    given = [helper.make_tensor_value_info(name, real, a.shape) for name, a in (("a", x), ("b", w))]
    result = [helper.make_tensor_value_info("c", real, (x.shape[0], w.shape[1]))]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["c"])], "gemm", given, result
    )
    opset = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    binding.bind_cpu_input("a", x)
    binding.bind_cpu_input("b", w)
    out = np.empty((x.shape[0], w.shape[1]), np.float32)
    value = onnxruntime.OrtValue.ortvalue_from_numpy(out)
    binding.bind_ortvalue_output("c", value)
    return [lambda: session.run_with_iobinding(binding)]


def _quantized(name: str, threads: int, job: dict[str, Any]) -> list[Job]:
    m, n, k, scheme = job["m"], job["n"], job["k"], job["scheme"]
    x = _random((m, k), "float32", 0)
    w = _random((k, n), "float32", 1)
    if scheme == "float16":
        halves = [w.astype(np.float16) for _ in range(job["weights"])]
        return [lambda w=w: tilefold.gemm(x, w, out_dtype="float32") for w in halves]
    grouped = {} if scheme == "palette6" else {"group_size": 128}
    first = tilefold.quantize(w, scheme, **grouped)
    copies = [_copied(first) for _ in range(job["weights"])]
    return [lambda w=w: tilefold.qgemm(x, w) for w in copies]


def _copied(w: Any) -> Any:
    """The same matrix in memory of its own."""
    from dataclasses import replace

    return replace(w, **{name: np.array(array) for name, array in w.arrays.items()})


def _linear(name: str, threads: int, job: dict[str, Any]) -> list[Job]:
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(job["k"], job["n"]), torch.randn(job["m"], job["k"])
    if name == "tilefold":
        import tilefold.torch

        made: Any = tilefold.torch.QuantizedLinear.from_linear(layer, "int8", dynamic=True)
    else:
        model = torch.nn.Sequential(layer)
        made = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)

    def run() -> Any:
        with torch.inference_mode():
            return made(x)

    return [run]


_MAKERS = {"gemm": _gemm, "quantized": _quantized, "linear": _linear}

if __name__ == "__main__":
    main()
