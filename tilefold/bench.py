"""Timing: implementations measured turn by turn in one process, on the same random arrays.

A machine's clock, its neighbours and its caches drift within seconds. So every implementation runs
once per round, in rotating order, and what is compared is the ratio of medians of the same rounds.
Operations are counted over visible pairs, 2 per multiply-add, 2 products forward and 5 backward,
whatever an implementation really computes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold import api, reference
from tilefold.backends.cpu import threads
from tilefold.mask import causal, full
from tilefold.problem import Problem
from tilefold.roofline import visible_pairs

Array = NDArray[Any]
Call = Callable[[], object]

OPERATIONS = ("forward", "backward")
_SIZES = ("batch", "heads_q", "heads_kv", "len_q", "len_k", "dim", "dim_v")


@dataclass(frozen=True)
class Case:
    """One thing to time: a problem, one of `OPERATIONS`, and how many threads."""

    problem: Problem
    operation: str = "forward"
    threads: int = 1

    @property
    def shape(self) -> str:
        """The sizes of q in short, `1,8,2048,64`, and after a slash those of v where they differ."""
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
    flops: int
    first_call_seconds: float

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
    attend = torch.nn.functional.scaled_dot_product_attention
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


def measure(case: Case, peers: Sequence[str] = (), *, seconds: float = 1.0) -> list[Row]:
    """Time tilefold and the peers on one case; tilefold's row comes first.

    A first call of each compiles what has to be compiled; it is reported by itself.
    """
    with _threads(case.threads):
        inputs = arrays(case)
        calls = {"tilefold": own(case, inputs)} | {p: PEERS[p](case, inputs) for p in peers}
        first = turn_by_turn(calls, seconds=0, least=1)
        times = turn_by_turn(calls, seconds=seconds)
    flops = case.problem.flops(case.operation, visible_pairs(case.problem))
    return [Row(case, n, tuple(times[n]), flops, first[n][0]) for n in calls]


def speedup(rows: Sequence[Row], peer: str) -> float:
    """The peer's median over tilefold's."""
    by_name = {row.name: row for row in rows}
    return by_name[peer].median / by_name["tilefold"].median


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = threads.get_num_threads()
    threads.set_num_threads(number)
    try:
        yield
    finally:
        threads.set_num_threads(before)
