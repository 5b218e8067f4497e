"""Kernels that compile in the background ahead of their calls."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from metal_recorder import Recorder, forward, operands

import tilefold
from tilefold import Problem
from tilefold.backends.cpu import kernel as kernels
from tilefold.backends.cpu import runtime as llvm
from tilefold.backends.metal.dispatch import CompileError
from tilefold.problems import reference

MASK = tilefold.causal()


@pytest.mark.feature("A10")
def test_a_call_waits_for_the_kernel_that_is_being_compiled() -> None:
    machine = Recorder(gate=threading.Event())
    known = Problem.of((1, 4, 21, 12), (1, 2, 35, 12), (1, 2, 35, 9), mask=MASK)
    (future,) = tilefold.compile_async([known], operations=["forward"], device=machine)
    assert machine.begun.wait(30) and not future.done()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(forward, machine, *operands(), mask=MASK)
        other = Recorder()
        forward(other, *operands(), mask=MASK)
        assert other.launched, "what needs no unfinished kernel does not wait"
        assert not call.done() and not machine.launched
        assert machine.gate is not None
        machine.gate.set()
        call.result(30)
    assert future.result(30) is None
    assert len(machine.texts) == 1 and len(machine.launched) == 1


@pytest.mark.feature("A10")
def test_cpu_kernels_compile_ahead_too(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, gate, texts = threading.Event(), threading.Event(), []
    compile_ = llvm.compile
    kernels.kernel.cache_clear()

    def slow(text: str, device: Any) -> bytes:
        texts.append(text)
        begun.set()
        assert gate.wait(30)
        return compile_(text, device)

    monkeypatch.setattr(llvm, "compile", slow)
    shape = (1, 2, 40, 23)
    futures = tilefold.compile_async([Problem.of(shape, dtype="float64")], operations=["forward"])
    assert begun.wait(30) and not futures[0].done()
    q = np.random.default_rng(0).standard_normal(shape)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(tilefold.attention, q, q, q)
        gate.set()
        o = call.result(60)
    assert futures[0].result(60) is None
    assert len(texts) == len(set(texts)) == 1
    np.testing.assert_allclose(o, reference.attention(q, q, q)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.feature("A10")
def test_kernels_of_scores_and_sinks_are_those_of_the_calls() -> None:
    q, k, v = operands()
    given = np.zeros((4, 1, 35), np.float32)
    score, sinks = [tilefold.bias(given), tilefold.softcap(30.0)], np.zeros(4, np.float32)
    shapes = q.shape, k.shape, v.shape
    machine = Recorder()
    known = Problem.of(*shapes, mask=MASK, score=score, sinks=1)
    for future in tilefold.compile_async([known], device=machine):
        assert future.result(60) is None
    before = len(machine.texts)
    options = {"mask": MASK, "score": score, "sinks": sinks, "machine": machine}
    o, lse = tilefold.metal.attention(q, k, v, **options)
    assert len(tilefold.metal.attention_backward(o, q, k, v, o, lse, **options)) == 5
    assert len(machine.texts) == before == 5, "forward, dq, dkv, sinks and the array of the score"


@pytest.mark.feature("A10")
def test_many_problems_are_compiled_once_each_and_errors_stay_in_their_futures() -> None:
    machine = Recorder()
    known = [Problem.of((1, 2, length, dim)) for length in (64, 128, 256) for dim in (8, 16)]
    for future in tilefold.compile_async(known, device=machine):
        assert future.result(60) is None
    assert len(machine.texts) == len({*machine.texts}) == 2 * 3, "lengths share kernels"
    before = len(machine.texts)
    forward(machine, *[np.zeros((3, 2, 100, 8), np.float32)] * 3)
    assert len(machine.texts) == before
    failing = Recorder(error="error: no")
    (future,) = tilefold.compile_async(known[:1], device=failing)
    with pytest.raises(CompileError, match="error: no"):
        future.result(60)


@pytest.mark.parametrize("started", [0, 1])
def test_if_threads_cannot_start_those_that_did_compile_or_the_caller_does(
    started: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = threading.Thread.start, [started]

    def start(thread: threading.Thread) -> None:
        if not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    machine = Recorder()
    known = [Problem.of((1, 2, 64, dim)) for dim in (8, 16, 24)]
    futures = tilefold.compile_async(known, operations=["forward"], device=machine)
    assert started or all(future.done() for future in futures)
    assert [future.result(60) for future in futures] == [None] * 3
    assert len(machine.texts) == 3


def test_compile_async_names_what_is_wrong() -> None:
    known = [Problem.of((1, 2, 8, 8))]
    with pytest.raises(TypeError, match=r"^problems must be tilefold\.Problem objects"):
        tilefold.compile_async([(1, 2, 8, 8)])  # type: ignore[list-item]  # the point
    with pytest.raises(
        ValueError, match=r"^operations must be 'forward' or 'backward', got 'both'"
    ):
        tilefold.compile_async(known, operations=["both"])
    with pytest.raises(ValueError, match=r"^device must be 'cpu', 'mps' or 'cuda', got 'gpu'"):
        tilefold.compile_async(known, device="gpu")
    with pytest.raises(ValueError, match=r"^layout must be"):
        tilefold.compile_async(known, layout="nbhd")
