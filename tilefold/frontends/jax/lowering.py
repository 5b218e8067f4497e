"""How a pass becomes a part of a compiled program: a call that XLA makes into native code."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.interpreters import xla as xla_calls
from numpy.typing import NDArray

from tilefold.backends import calls
from tilefold.backends.arrays import numpy as arrays
from tilefold.backends.protocols import Pass
from tilefold.backends.registry import machine
from tilefold.frontends import xla
from tilefold.frontends.jax import handler
from tilefold.frontends.operation import Operation
from tilefold.frontends.written import text_of
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


@functools.lru_cache(maxsize=32)  # few: a request may hold tables
def results_of(wanted: Pass, request: Request, given: Given) -> Given:
    """The shapes and types of the results of a pass. Raises as `tilefold.attention` does."""
    return Operation(wanted, request).results(given)


def lower(ctx: Any, *operands: Any, wanted: Pass, request: Request) -> Any:
    """The lowering of a pass on a processor."""
    if not handler.register():
        _warn()
        return mlir.lower_fun(_called_back(ctx, wanted, request), True)(ctx, *operands)
    texts = {
        "operation": Operation(wanted, request).text,
        "given": text_of(described(wanted, ctx.avals_in)),
    }
    return jax.ffi.ffi_lowering(xla.TARGET)(ctx, *operands, **texts)


def run(wanted: Pass, request: Request, *given: Any) -> tuple[NDArray[Any], ...]:
    """The results of a pass, which Python calls."""
    named = zip(wanted.given, map(np.asarray, given), strict=True)
    every = tuple([x.view(np.int64) if name == "seed" else x for name, x in named])
    return calls.run(machine("cpu"), arrays, wanted, every, request)


def run_eagerly(primitive: Primitive, *given: Any, wanted: Pass, request: Request) -> Any:
    """The results of a pass outside of programs.

    XLA would compile a program for each shape and each mask, in 30 ms, and keep it. So Python calls
    the kernels, but for arrays that are divided among devices.
    """
    devices = {device for x in given if hasattr(x, "devices") for device in x.devices()}
    if len(devices) != 1 or next(iter(devices)).platform != "cpu":
        return xla_calls.apply_primitive(primitive, *given, wanted=wanted, request=request)
    made, place = list(_as_jax(*run(wanted, request, *given))), devices.pop()
    there = isinstance(made[0], jax.Array) and place in made[0].devices()  # not in disable_jit
    return made if there else jax.device_put(made, place)


_as_jax: Any = jax.jit(lambda *arrays: arrays)
"""Arrays of NumPy as those of JAX: in 7 us, where jax.device_put of two takes 50 us."""


def _called_back(ctx: Any, wanted: Pass, request: Request) -> Any:
    """A pass as a call of Python."""
    types = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in ctx.avals_out]
    call = functools.partial(run, wanted, request)
    return lambda *given: jax.pure_callback(call, types, *given)


@functools.cache
def _warn() -> None:
    found, known = (".".join(map(str, each or "?")) for each in (handler.version(), xla.KNOWN[-1]))
    warnings.warn(
        f"this JAX has version {found} of XLA's foreign functions, and tilefold knows those up to"
        f" {known}: it calls Python for each attention, which takes 0.2 ms more",
        RuntimeWarning,
        stacklevel=2,
    )


def refuse(*_: Any, **__: Any) -> Any:
    """The lowering of a pass elsewhere."""
    raise NotImplementedError(
        "tilefold's kernels for JAX run on the CPU alone so far: put the arrays there with"
        " jax.device_put(x, jax.devices('cpu')[0]), or use jax.nn.dot_product_attention"
    )
