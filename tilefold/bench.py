"""Timing: implementations measured turn by turn in one process, on the same random arrays.

A machine's clock, its neighbours and its caches drift within seconds. So every implementation runs
once per round, in rotating order, and what is compared is the ratio of medians of the same rounds.
Operations are counted over visible pairs, 2 per multiply-add, 2 products forward and 5 backward,
whatever an implementation really computes.
"""

from __future__ import annotations

import functools
import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold import api, engine, reference
from tilefold.backends.cpu import threads
from tilefold.buffer import Buffer
from tilefold.device import host
from tilefold.mask import causal, full
from tilefold.plan import plan
from tilefold.problem import Problem
from tilefold.roofline import visible_pairs
from tilefold.tables import FAMILIES

Array = NDArray[Any]
Call = Callable[[], object]

OPERATIONS = ("forward", "backward")
SWEEP_TRAVERSE = (32, 64, 128, 256)
"""Traversed rows per block that a sweep tries, cut to whole register tiles."""

_SIZES = ("batch", "heads_q", "heads_kv", "len_q", "len_k", "dim", "dim_v")


@dataclass(frozen=True)
class Case:
    """One thing to time: a problem, one of `OPERATIONS`, and how many threads."""

    problem: Problem
    operation: str = "forward"
    threads: int = 1

    @property
    def shape(self) -> str:
        """The sizes of q, `1,8,2048,64`, and after a slash those of v where they differ."""
        problem = self.problem
        q = (problem.batch, problem.heads_q, problem.len_q, problem.dim)
        v = (problem.batch, problem.heads_kv, problem.len_k, problem.dim_v)
        return "/".join(",".join(map(str, sizes)) for sizes in ([q] if q == v else [q, v]))


@dataclass(frozen=True)
class Arrays:
    """Random inputs of a case and the outputs that a backward pass starts from."""

    q: Array
    k: Array
    v: Array
    do: Array
    o: Array
    lse: Array


@dataclass(frozen=True)
class Row:
    """What one implementation reached in one case."""

    case: Case
    name: str
    seconds: tuple[float, ...]
    pairs: int
    first_call_seconds: float

    @property
    def flops(self) -> int:
        """Operations over visible pairs."""
        return self.case.problem.flops(self.case.operation, self.pairs)

    @property
    def median(self) -> float:
        """Seconds of a call, the median over the rounds."""
        return statistics.median(self.seconds)

    @property
    def gflops(self) -> float:
        """Billions of operations per second, by the median."""
        return self.flops / self.median / 1e9

    def record(self, own: Row | None) -> dict[str, Any]:
        """The row as plain values, beside tilefold's row of the same case."""
        problem = self.case.problem
        sizes = {name: getattr(problem, name) for name in _SIZES}
        return sizes | {
            "shape": self.case.shape,
            "dtype": problem.dtype,
            "mask": str(problem.mask),
            "operation": self.case.operation,
            "threads": self.case.threads,
            "name": self.name,
            "rounds": len(self.seconds),
            "median_seconds": self.median,
            "best_seconds": min(self.seconds),
            "first_call_seconds": self.first_call_seconds,
            "gflops": self.gflops,
            "tilefold_speedup": self.median / own.median if own else None,
        }


def arrays(case: Case, seed: int = 0) -> Arrays:
    """Standard normal numbers in the layout (batch, heads, sequence, dim)."""
    problem, rng = case.problem, np.random.default_rng(seed)

    def random(heads: int, length: int, dim: int) -> Array:
        return rng.standard_normal((problem.batch, heads, length, dim)).astype(problem.dtype)

    q = random(problem.heads_q, problem.len_q, problem.dim)
    k = random(problem.heads_kv, problem.len_k, problem.dim)
    v = random(problem.heads_kv, problem.len_k, problem.dim_v)
    o, lse = api.attention(q, k, v, mask=case.problem.mask, return_lse=True)
    do = random(problem.heads_q, problem.len_q, problem.dim_v)
    return Arrays(q, k, v, do, o, lse)


def own(case: Case, a: Arrays) -> Call:
    """tilefold, through its public functions."""
    if case.operation == "forward":
        return lambda: api.attention(a.q, a.k, a.v, mask=case.problem.mask)
    return lambda: api.attention_backward(a.do, a.q, a.k, a.v, a.o, a.lse, mask=case.problem.mask)


def numpy_peer(case: Case, a: Arrays) -> Call:
    """Dense attention in basic operations, of the case's own type."""
    if case.operation == "forward":
        return lambda: reference.attention(
            a.q, a.k, a.v, mask=case.problem.mask, dtype=case.problem.dtype
        )
    inputs = (a.do, a.q, a.k, a.v, a.o, a.lse)
    return lambda: reference.attention_backward(
        *inputs, mask=case.problem.mask, dtype=case.problem.dtype
    )


def torch_peer(case: Case, a: Arrays) -> Call:
    """PyTorch's `scaled_dot_product_attention` on the CPU, and its own gradient."""
    import torch

    torch.set_num_threads(case.threads)
    q, k, v, do = (torch.from_numpy(x) for x in (a.q, a.k, a.v, a.do))
    options: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    if case.problem.mask == causal() and q.shape[2] == k.shape[2]:
        options["is_causal"] = True
    elif case.problem.mask != full():
        dense = case.problem.mask.to_dense(
            q.shape[2], k.shape[2], case.problem.batch, case.problem.heads_q
        )
        options["attn_mask"] = torch.from_numpy(np.ascontiguousarray(dense))
    attend: Any = torch.nn.functional.scaled_dot_product_attention
    if case.operation == "forward":
        return lambda: attend(q, k, v, **options)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    o = attend(*inputs, **options)
    return lambda: torch.autograd.grad(o, inputs, do, retain_graph=True)


PEERS: Mapping[str, Callable[[Case, Arrays], Call]] = {"torch": torch_peer, "numpy": numpy_peer}
"""Other implementations of the same thing; one that is not installed raises ModuleNotFoundError."""


def turn_by_turn(
    calls: Mapping[str, Call], *, seconds: float, least: int = 3, most: int = 1000
) -> dict[str, list[float]]:
    """Times of each call, in rounds of one turn each, for about `seconds` in all."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for number in range(most):
        if number >= least and time.perf_counter() > end:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    return times


def measure(
    case: Case, peers: Sequence[str] = (), *, seconds: float = 1.0, sweep: bool = False
) -> list[Row]:
    """Time tilefold and the peers on one case; tilefold's row comes first.

    With `sweep` every block size of `block_sizes` follows, as rows of their own. A first call of
    each compiles what has to be compiled; it is reported by itself.
    """
    for peer in peers:
        # Before any call of ours: threads are then those of the peer's runtime, not a second team.
        importlib.import_module(peer)
    with using_threads(case.threads):
        inputs = arrays(case)
        calls = {"tilefold": own(case, inputs)} | {p: PEERS[p](case, inputs) for p in peers}
        if sweep:
            calls |= block_sizes(case, inputs)
        first = turn_by_turn(calls, seconds=0, least=1)
        times = turn_by_turn(calls, seconds=seconds)
    pairs = visible_pairs(case.problem)
    return [Row(case, n, tuple(times[n]), pairs, first[n][0]) for n in calls]


def block_sizes(case: Case, a: Arrays) -> dict[str, Call]:
    """The same call with other register tiles and blocks: `6x4 by 96` is 6 rows of 4 vectors, and
    about 96 traversed rows at a time.
    """
    buffers = operands(case, a)
    calls: dict[str, Call] = {}
    for tile in FAMILIES[host().isa].tiles:
        for wanted in SWEEP_TRAVERSE:
            block = max(1, wanted // tile.rows) * tile.rows
            made = plan(
                case.problem, host(), case.operation, "auto", tile=tile, block_traverse=block
            )
            calls[f"{tile} by {wanted}"] = functools.partial(engine.run, made, buffers)
    return calls


def operands(case: Case, a: Arrays) -> dict[str, Buffer]:
    """The arrays of a case by their names in the kernels, with outputs of their own."""
    outputs = [np.empty_like(x) for x in (a.q, a.k, a.v, a.o, a.lse)]
    named = {"q": a.q, "k": a.k, "v": a.v, "do": a.do, "o": a.o, "lse": a.lse}
    if case.operation == "forward":
        named |= {"o": outputs[3], "lse": outputs[4]}
    else:
        named |= {"dq": outputs[0], "dk": outputs[1], "dv": outputs[2]}
    return {name: _buffer(array) for name, array in named.items()}


def _buffer(array: Array) -> Buffer:
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return Buffer(array.ctypes.data, array.shape, strides, str(array.dtype), array)


@contextmanager
def using_threads(number: int) -> Iterator[None]:
    """So many threads inside, as many as before after it."""
    before = threads.get_num_threads()
    threads.set_num_threads(number)
    try:
        yield
    finally:
        threads.set_num_threads(before)
