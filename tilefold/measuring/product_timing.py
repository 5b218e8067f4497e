"""Products of tilefold and of other libraries, timed turn by turn in one process.

A turn repeats a short call. The first result of a peer is compared with tilefold's before the peer
is timed. All read the same arrays in each turn, so small ones come from a cache.
"""

from __future__ import annotations

import functools
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tilefold.backends.cpu.device import usable_cores
from tilefold.common.array_files import element_type
from tilefold.common.check import one_line
from tilefold.common.imports import why_not
from tilefold.measuring import openvino_model
from tilefold.measuring.baselines import BASELINES, TOLERANCE, results, tensor
from tilefold.measuring.products import ProductCase
from tilefold.measuring.timing import PAUSE, first_call, turn_by_turn, using_threads
from tilefold.measuring.workload import Array, Call
from tilefold.products.calls import gemm
from tilefold.products.quantized import QuantizedMatrix, quantize
from tilefold.products.quantized_calls import qgemm

PEERS = {"gemm": ("torch", "numpy", "openvino"), "qgemm": ("float16", "torch")}
"""What is measured beside each product: "float16" is tilefold's gemm with weights of float16."""

TURN_SECONDS = 2e-3
"""A turn repeats its call for about so long."""

_ROUNDED = 0.1
"""The largest relative error where both sides have rounded A or B to 8 bits in their own way."""


@dataclass(frozen=True)
class ProductRow:
    """The times of one implementation in one case, or the reason why it has none.

    `bytes` are those of its operands and its result.
    """

    case: ProductCase
    name: str
    seconds: tuple[float, ...]
    first_call_seconds: float
    bytes: int
    reason: str | None = None

    @property
    def median(self) -> float:
        """The median time of a call over the rounds, in seconds; NaN without rounds."""
        return statistics.median(self.seconds) if self.seconds else math.nan

    @property
    def gflops(self) -> float:
        """Billions of operations per second, by the median."""
        return self.case.flops / self.median / 1e9

    @property
    def gb_per_second(self) -> float:
        """Billions of bytes of operands and result per second, by the median."""
        return self.bytes / self.median / 1e9

    def record(self, own: ProductRow) -> dict[str, Any]:
        """The row as plain values for JSON, with its ratio to tilefold's row `own`."""
        timed = {
            "median_seconds": self.median,
            "best_seconds": min(self.seconds, default=None),
            "first_call_seconds": self.first_call_seconds,
            "gflops": self.gflops,
            "gb_per_second": self.gb_per_second,
            "tilefold_speedup": self.median / own.median,
        }
        return {
            **asdict(self.case),
            "name": self.name,
            "bytes": self.bytes,
            "rounds": len(self.seconds),
            **(timed if self.reason is None else dict.fromkeys(timed)),
            "reason": self.reason,
        }


def unusable(name: str) -> str | None:
    """Why a peer cannot be measured here, or None."""
    return None if name == "float16" else BASELINES[name].unusable


def measure(
    case: ProductCase, names: Sequence[str] = (), *, seconds: float = 1.0
) -> list[ProductRow]:
    """Time tilefold and some of `PEERS` on a case; tilefold's row comes first.

    A peer that cannot do the case, or whose result is wrong, has a row with the reason.
    """
    for name in names:
        # Before tilefold's first call, so that it shares the OpenMP runtime of torch.
        if reason := unusable(name):
            raise ImportError(f"the peer {name} cannot be measured: {reason}")
    makers = _GEMM if case.operation == "gemm" else _QGEMM
    firsts, reasons, calls, sizes = {}, {}, {}, {}
    with using_threads(case.threads), _blas_threads(case.threads):
        given = arrays(case)
        expected: object = None
        for name in ("tilefold", *names):
            try:
                call, sizes[name] = makers[name](case, given)
                firsts[name], found = first_call(call)
                if name == "tilefold":
                    expected = np.array(found, copy=True)
                _check(name, case, expected, found)
            except (RuntimeError, ArithmeticError, MemoryError) as error:
                if name == "tilefold":
                    raise
                reasons[name] = one_line(error)
            else:
                calls[name] = call
        repeats = {name: _repeats(call) for name, call in calls.items()}
        turns = {
            name: functools.partial(_turn, call, repeats[name]) for name, call in calls.items()
        }
        own_team = case.threads > 1 and not {"numpy", "openvino"}.isdisjoint(calls)
        timed = turn_by_turn(turns, seconds=seconds, pause=PAUSE if own_team else 0)
    return [
        ProductRow(
            case,
            name,
            tuple(each / repeats[name] for each in timed.get(name, ())),
            firsts.get(name, math.nan),
            sizes.get(name, case.bytes),
            reasons.get(name),
        )
        for name in ("tilefold", *names)
    ]


def _repeats(call: Call) -> int:
    """How often a turn repeats a call, by the time of its second one."""
    second, _ = first_call(call)
    return max(1, min(1000, int(TURN_SECONDS / max(second, 1e-7))))


def _turn(call: Call, repeats: int) -> None:
    for _ in range(repeats):
        call()


def _check(name: str, case: ProductCase, expected: object, found: object) -> None:
    """Raises ArithmeticError unless a peer's result is near to tilefold's."""
    (mine,), (theirs,) = results(expected), results(found)
    allowed = 0.0 if case.dtype == "int8" else TOLERANCE[case.dtype]
    if case.operation == "qgemm":
        rounded = name == "torch" or case.dynamic
        allowed = _ROUNDED if rounded else max(allowed, TOLERANCE["float16"])
    if theirs.shape != mine.shape:
        raise ArithmeticError(f"{name} gives {theirs.shape} where {mine.shape} is asked for")
    error = float(np.linalg.norm(theirs - mine) / (np.linalg.norm(mine) or 1.0))
    if not error <= allowed:
        raise ArithmeticError(f"{name} computes something else: relative error {error:.1e}")


@contextmanager
def _blas_threads(number: int) -> Iterator[None]:
    """NumPy's library uses `number` threads inside the block, if threadpoolctl is installed."""
    if why_not("threadpoolctl"):
        yield
        return
    from threadpoolctl import threadpool_limits

    with threadpool_limits(number, user_api="blas"):
        yield


@dataclass(frozen=True)
class Given:
    """The random operands of a case, and memory for its result; `w` is a quantised B."""

    a: Array
    b: Array
    gate: Array | None
    out: Array
    w: QuantizedMatrix | None


def arrays(case: ProductCase, seed: int = 0) -> Given:
    """Standard normal elements, or all integers of 8 bits; the B of qgemm is of float32."""
    draw = np.random.default_rng(seed)

    def random(shape: tuple[int, int], dtype: str) -> Array:
        if dtype == "int8":
            return draw.integers(-128, 128, shape, np.int8)
        return draw.standard_normal(shape, np.float32).astype(element_type(dtype))

    lies = (case.k, case.m) if case.transpose_a else (case.m, case.k)
    a, shape = random(lies, case.dtype), (case.m, case.n)
    if case.operation == "qgemm":
        b = random((case.k, case.n), "float32")
        w = quantize(b, str(case.scheme), group_size=case.group_size)
        return Given(a, b, None, np.empty(shape, a.dtype), w)
    lies = (case.n, case.k) if case.transpose_b else (case.k, case.n)
    b, gate = random(lies, case.dtype), random(lies, case.dtype) if case.gate else None
    out = np.empty(shape, element_type(case.described.out.dtype))
    return Given(a, b, gate, out, None)


Made = tuple[Call, int]
"""A call, and the bytes of its operands and its result."""


def _tilefold(case: ProductCase, x: Given) -> Made:
    options: dict[str, Any] = {"activation": case.activation, "out": x.out}
    if x.w is not None:
        w, dynamic = x.w, case.dynamic
        return lambda: qgemm(x.a, w, dynamic=dynamic, **options), case.bytes
    options |= {"transpose_a": case.transpose_a, "transpose_b": case.transpose_b, "gate": x.gate}
    return lambda: gemm(x.a, x.b, **options), case.bytes


def _numpy(case: ProductCase, x: Given) -> Made:
    if case.dtype not in ("float32", "float64"):
        raise NotImplementedError("NumPy's library multiplies float32 and float64 alone")
    if case.activation or case.gate:
        raise NotImplementedError("NumPy has neither activations nor gates of products")
    if case.threads != usable_cores() and (reason := why_not("threadpoolctl")):
        raise NotImplementedError(f"NumPy's threads are set by threadpoolctl, which {reason}")
    a, b = x.a.T if case.transpose_a else x.a, x.b.T if case.transpose_b else x.b
    out = np.empty_like(x.out)
    return lambda: np.matmul(a, b, out=out), case.bytes


def _openvino(case: ProductCase, x: Given) -> Made:
    if case.activation or case.gate:
        raise NotImplementedError("the adapter of openvino takes neither activations nor gates")
    turned = {"transpose_a": case.transpose_a, "transpose_b": case.transpose_b}
    return openvino_model.product(x.a, x.b, case.threads, **turned), case.bytes


def _torch(case: ProductCase, x: Given) -> Made:
    import torch

    torch.set_num_threads(case.threads)
    a, b = tensor(x.a), tensor(x.b)
    gate = None if x.gate is None else tensor(x.gate)
    a = a.T if case.transpose_a else a
    if case.transpose_b:
        b, gate = b.T, None if gate is None else gate.T
    if case.dtype == "int8":
        if gate is not None:
            raise NotImplementedError("torch has no gated product of integers")
        return lambda: torch._int_mm(a, b), case.bytes
    if case.activation is None and gate is None:
        out = torch.empty(case.m, case.n, dtype=a.dtype)
        return lambda: torch.mm(a, b, out=out), case.bytes
    activate = _activation(case.activation)

    def run() -> Any:
        found = activate(torch.mm(a, b))
        return found if gate is None else found * torch.mm(a, gate)

    return run, case.bytes


def _activation(name: str | None) -> Callable[[Any], Any]:
    """A function of torch."""
    import torch

    if name is None:
        return lambda x: x
    functions = torch.nn.functional
    if name == "gelu_tanh":
        return functools.partial(functions.gelu, approximate="tanh")
    found: Callable[[Any], Any] = getattr(functions if hasattr(functions, name) else torch, name)
    return found


def _float16(case: ProductCase, x: Given) -> Made:
    assert x.w is not None
    half, out = x.w.dequantize("float16"), np.empty_like(x.out)
    size = case.bytes - case.b_bytes + half.nbytes
    return lambda: gemm(x.a, half, activation=case.activation, out=out), size


def _torch_dynamic(case: ProductCase, x: Given) -> Made:
    """PyTorch's layer of int8, which rounds rows of x too."""
    import torch

    if case.scheme != "int8" or case.group != case.k or case.dtype != "float32":
        raise NotImplementedError("torch's dynamic layers have int8 without groups, and float32")
    library: Any = getattr(torch.ao, "quantization", None)
    if not hasattr(library, "quantize_dynamic"):
        raise NotImplementedError(f"torch {torch.__version__} has no dynamic layers of int8")
    torch.set_num_threads(case.threads)
    layer = torch.nn.Linear(case.k, case.n, bias=False)
    with torch.no_grad():
        layer.weight.copy_(tensor(x.b).T)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch names a package that is to come
        made = library.quantize_dynamic(torch.nn.Sequential(layer), {torch.nn.Linear}, torch.qint8)
    rows, activate = tensor(x.a), _activation(case.activation)

    def run() -> Any:
        with torch.inference_mode():
            return activate(made(rows))

    return run, case.bytes


_GEMM: dict[str, Callable[[ProductCase, Given], Made]]
_GEMM = {"tilefold": _tilefold, "numpy": _numpy, "torch": _torch, "openvino": _openvino}
_QGEMM = {"tilefold": _tilefold, "float16": _float16, "torch": _torch_dynamic}
