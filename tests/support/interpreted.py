"""Attention in Triton's interpreter: the operands of a case, and the results of its kernels."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from operands import SENTINEL, Array

from tilefold.backends.triton import dispatch, interpreter
from tilefold.backends.triton.plan import plan
from tilefold.problems.attention import STATISTICS, Problem

PLACES = ("packed", "padded", "step2")
"""Kinds of memory that torch tensors can have: their strides are never negative."""


def needs() -> None:
    """Skip, with the reason, if Triton's interpreter or torch is missing; CI has both."""
    reason = interpreter.missing()
    if reason is None and importlib.util.find_spec("torch") is None:
        reason = "Triton's kernels are given tensors of PyTorch, which is not installed"
    if reason:
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    _quicken()


@functools.cache
def _quicken() -> None:
    """Save Triton's interpreter repeated work at each step, a third of its time.

    Each call of a device function patches the whole language, although its kernel has already
    patched it, and each operation makes a table of all types to look up one type.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    function = interpreter.InterpretedFunction
    called = function.__call__
    types = interpreter._get_np_dtype

    def patched(fn: Any) -> bool:
        seen = fn.__globals__.values()
        languages = [value for value in seen if inspect.ismodule(value) and value in (tl, tl.core)]
        return bool(languages) and all(
            language.static_range.__module__ == interpreter.__name__ for language in languages
        )

    def call(self: Any, *given: Any, **options: Any) -> Any:
        if not patched(self.fn):
            return called(self, *given, **options)
        try:
            return self.rewrite()(*given, **options)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    known: dict[str, Any] = {}

    def type_of(kind: Any) -> Any:
        element = kind.element_ty if isinstance(kind, tl.block_type) else kind
        name = element.name
        if name not in known:
            known[name] = types(kind)
        return known[name]

    function.__call__ = call
    interpreter._get_np_dtype = type_of


def machine(architecture: str = "sm_90") -> interpreter.Interpreted:
    """The interpreter as a GPU of an architecture."""
    needs()
    found = _machines.get(architecture)
    if found is None:
        found = _machines[architecture] = interpreter.Interpreted(architecture)
    return found


_machines: dict[str, interpreter.Interpreted] = {}


def tensor(array: Array) -> Any:
    """The array as a tensor: the same memory, or a copy if torch has no such tensor."""
    from tilefold.backends.arrays.torch import tensor_of

    return tensor_of(array if array.flags.aligned else array.copy())


def array(found: Any, dtype: str) -> Array:
    """A tensor as an array of a type."""
    from tilefold.implementations.torch import array_of

    return array_of(found, np.dtype(dtype))


def forward(
    problem: Problem,
    operands: Mapping[str, Array],
    on: interpreter.Interpreted | None = None,
    into: Array | None = None,
    **options: Any,
) -> dict[str, Array]:
    """Return o, in `into` if it is given, and lse; `options` go to `plan`."""
    on = on or machine()
    shape, kind = (problem.batch, problem.heads_q, problem.len_q), STATISTICS[problem.dtype]
    if into is None:
        into = np.full((*shape, problem.dim_v), SENTINEL, problem.dtype)
    results = {"o": into, "lse": np.full(shape, SENTINEL, kind)}
    given = {name: tensor(operands[name]) for name in ("q", "k", "v", "seed") if name in operands}
    made = plan(problem, on.architecture, "forward", **options)
    return run(made, on, given, results)


def backward(
    problem: Problem,
    operands: Mapping[str, Array],
    on: interpreter.Interpreted | None = None,
    into: Mapping[str, Array] | None = None,
    **options: Any,
) -> dict[str, Array]:
    """Return dq, dk and dv; `operands` holds do, q, k, v, o and lse."""
    on = on or machine()
    results = into or {
        f"d{name}": np.full(operands[name].shape, SENTINEL, problem.dtype) for name in "qkv"
    }
    names = ("do", "q", "k", "v", "o", "lse", "seed")
    given = {name: tensor(operands[name]) for name in names if name in operands}
    made = plan(problem, on.architecture, "backward", **options)
    return run(made, on, given, dict(results))


def run(
    made: Any, on: interpreter.Interpreted, given: dict[str, Any], results: dict[str, Array]
) -> dict[str, Array]:
    """The results of a plan, in these arrays; the operands are tensors."""
    written = {name: tensor(array) for name, array in results.items()}
    # The interpreter computes what a kernel then does not choose, and warns of rows of NaN alone.
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        dispatch.execute(made, on, {**given, **written})
    for name, found in written.items():
        if found.data_ptr() != results[name].ctypes.data:  # a copy
            results[name][...] = array(found, results[name].dtype.name)
    return results
