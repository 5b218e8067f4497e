"""How a pass becomes a part of a compiled program: a call that XLA makes into native code."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.interpreters import mlir

from tilefold.backends import calls
from tilefold.backends.arrays import numpy as arrays
from tilefold.backends.protocols import Pass
from tilefold.backends.registry import machine
from tilefold.problems.request import Request

Given = tuple[tuple[tuple[int, ...], str], ...]


def described(wanted: Pass, avals: Sequence[Any]) -> Given:
    """The shapes and types of operands, as kernels read them: JAX has a seed as two words."""
    return tuple(
        [
            ((1,), "int64") if name == "seed" else (tuple(aval.shape), aval.dtype.name)
            for name, aval in zip(wanted.given, avals, strict=True)
        ]
    )


@functools.lru_cache(maxsize=256)
def results_of(wanted: Pass, request: Request, given: Given) -> Given:
    """The shapes and types of the results of a pass. Raises as `tilefold.attention` does."""
    made = [np.empty(shape, dtype) for shape, dtype in given]
    found, _ = calls._look_up(machine("cpu"), arrays, wanted, tuple(made), request)
    return tuple([(shape, np.dtype(dtype).name) for shape, dtype in found.results])


def lower(ctx: Any, *operands: Any, wanted: Pass, request: Request) -> Any:
    """The lowering of a pass on a processor."""
    types = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in ctx.avals_out]

    def run(*given: Any) -> Any:
        named = [np.asarray(x) for x in given]
        named = [
            x.view(np.int64) if name == "seed" else x
            for name, x in zip(wanted.given, named, strict=True)
        ]
        return calls.run(machine("cpu"), arrays, wanted, tuple(named), request)

    def called(*given: Any) -> Any:
        return jax.pure_callback(run, types, *given)

    return mlir.lower_fun(called, multiple_results=True)(ctx, *operands)


def refuse(*_: Any, **__: Any) -> Any:
    """The lowering of a pass elsewhere."""
    raise NotImplementedError(
        "tilefold's kernels for JAX run on the CPU alone so far: put the arrays there with"
        " jax.device_put(x, jax.devices('cpu')[0]), or use jax.nn.dot_product_attention"
    )
