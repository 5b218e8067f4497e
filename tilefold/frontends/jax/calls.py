"""The frontend of JAX arrays, traced or not: what `tilefold.attention` asks of a framework.

Arrays that lie elsewhere than on the CPU are refused, here where they have a place, and else where
XLA would compile the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tilefold.backends.extra import NOTHING, Extra, rows_of
from tilefold.backends.protocols import BACKWARD, FORWARD, spoken
from tilefold.common.check import shown
from tilefold.common.foreign_arrays import is_traced
from tilefold.frontends import operation
from tilefold.frontends.jax import primitives
from tilefold.frontends.jax.joined import joined
from tilefold.frontends.jax.lowering import described, results_of
from tilefold.frontends.operation import Holding, extended_request, taken
from tilefold.masks.tables import Input
from tilefold.problems.attention import STATISTICS, check_parts
from tilefold.problems.dropout import check_probability, check_seed, words_of
from tilefold.problems.request import Request

__all__ = [
    "PLAIN",
    "attention",
    "attention_backward",
    "chance_of",
    "extended_request",
    "merge",
    "request_of",
    "seed_of",
]

PLAIN: tuple[type, ...] = ()
"""JAX has many classes of traced arrays, so none of them is kept."""


def request_of(mask: Any, scale: Any, layout: Any, precision: Any) -> Request | Holding:
    """The request of a call, from its options. Raises for a scale that is traced."""
    if is_traced(scale):
        raise NotImplementedError(
            "scale is traced by JAX, and a kernel holds it: multiply q by it and pass scale=1.0"
        )
    return operation.request_of(mask, scale, layout, precision)


chance_of = check_probability
"""Makes a probability of an argument."""


def seed_of(seed: Any, q: Any) -> Array:
    """The seed of dropout as two words of 32 bits, of an integer that may be traced.

    Raises ValueError where there is none.
    """
    if seed is None:
        raise ValueError(
            "seed must be an integer where dropout is above 0, got None: make one of a key with"
            " jax.random.bits(key)"
        )
    if not isinstance(seed, jax.Array):
        return jnp.array(words_of(check_seed(seed)), jnp.uint32)
    if seed.shape or not jnp.issubdtype(seed.dtype, jnp.integer):
        kind = f"{seed.dtype} of shape {seed.shape}"
        raise TypeError(
            f"seed must be one integer, got an array {kind}; make one of a key with"
            " jax.random.bits(key)"
        )
    if seed.dtype.itemsize == 8:
        high = (seed >> 32).astype(jnp.uint32)
    else:
        high = jnp.where(seed < 0, np.uint32(0xFFFFFFFF), np.uint32(0))
    return jnp.stack([seed.astype(jnp.uint32), high])


def attention(
    q: Any,
    k: Any,
    v: Any,
    request: Request | Holding,
    extra: Extra = NOTHING,
    further: tuple[str, ...] = (),
) -> tuple[Array, ...]:
    """Return o and lse, and `further` results of the pass; see `tilefold.attention`."""
    given = _placed(("q", "k", "v"), (q, k, v))
    plain, extra = taken(request, extra)
    plain, more = _arrays_of(extra, plain, given[0])
    wanted = FORWARD.plus(extra.names, further)
    return tuple(primitives.attention(wanted, plain, (*given, *more)))


def attention_backward(
    do: Any,
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    lse: Any,
    request: Request | Holding,
    dlse: Any = None,
    extra: Extra = NOTHING,
) -> tuple[Array, ...]:
    """Return dq, dk, dv, and the gradients of extra arrays; see `tilefold.attention_backward`."""
    given = _placed(("do", "q", "k", "v", "o", "lse"), (do, q, k, v, o, lse))
    plain, extra = taken(request, extra)
    plain, more = _arrays_of(extra, plain, given[1])
    wanted, every = BACKWARD.plus(extra.names, extra.gradients), (*given, *more)
    if dlse is not None:
        wanted, every = wanted.plus(("dlse",)), (*every, jnp.asarray(dlse))
    return extra.fitted(wanted, primitives.backward(wanted, plain, every), _like_sinks)


def _like_sinks(gradient: Array, sinks: Any) -> Array:
    given = jnp.asarray(sinks)
    return gradient.reshape(given.shape).astype(given.dtype)


def prepared(
    q: Any, k: Any, v: Any, request: Request | Holding, extra: Extra
) -> tuple[Request, dict[str, Array]]:
    """The request and the operands by their names, for other implementations.

    Raises as the kernels' own call does.
    """
    given = _placed(("q", "k", "v"), (q, k, v))
    plain, extra = taken(request, extra)
    plain, more = _arrays_of(extra, plain, given[0])
    wanted, every = FORWARD.plus(extra.names), (*given, *more)
    results_of(wanted, plain, described(wanted, every))
    return plain, dict(zip(wanted.given, every, strict=True))


def merge(o1: Any, lse1: Any, o2: Any, lse2: Any, layout: str) -> tuple[Array, Array]:
    """Return o and lse; see `tilefold.merge`."""
    given = {"o1": o1, "lse1": lse1, "o2": o2, "lse2": lse2}
    shapes = {name: tuple(array.shape) for name, array in given.items()}
    check_parts(shapes, {name: array.dtype.name for name, array in given.items()}, layout)
    return joined((o1, o2), (lse1, lse2), layout)


def _placed(names: Sequence[str], arrays: Sequence[Any]) -> list[Array]:
    """The arrays. Raises NotImplementedError for one that lies elsewhere than on the CPU.

    And for one with a size that is a symbol of `jax.export`.
    """
    for name, array in zip(names, arrays, strict=True):
        if not all(isinstance(size, int) for size in jnp.shape(array)):
            raise NotImplementedError(
                f"{name} has the shape {array.shape}, and a kernel is made for numbers: export one"
                " program for each shape, without symbols"
            )
        if hasattr(array, "devices") and not is_traced(array):
            platform = next(iter(array.devices())).platform
            if platform != "cpu":
                raise NotImplementedError(
                    f"{name} is on {platform}, where tilefold has no kernels for JAX yet; put it on"
                    " the CPU with jax.device_put(x, jax.devices('cpu')[0])"
                )
    return list(arrays)


def _arrays_of(extra: Extra, request: Request, q: Any) -> tuple[Request, list[Array]]:
    """The extra arrays as kernels read them, and the request for them.

    Sinks are rows, in the type of lse. JAX converts arrays of NumPy to its own types.
    """
    found: dict[str, Array] = {}
    for name, array in zip(extra.names, extra.arrays, strict=True):
        if hasattr(array, "requires_grad"):
            raise TypeError(f"{spoken(name)} must be a JAX array as q is, got a torch tensor")
        (made,) = _placed((spoken(name),), (jnp.asarray(array),))
        if name == "sinks":
            if not jnp.issubdtype(made.dtype, jnp.floating):
                raise TypeError(f"sinks must be an array of floats, got {made.dtype.name}")
            made = rows_of(made).astype(STATISTICS.get(q.dtype.name, made.dtype))
        found[name] = made
    if request.score is not None and "input0" in found:

        def fitted(old: Input) -> Input:
            array = found[old.name]
            return Input(old.number, array.dtype.name, array.shape)

        request = request.changed(score=request.score.renamed(fitted))
    return request, list(found.values())


def as_jax(name: str, value: Any) -> Array:
    """An argument as an array of JAX. Raises TypeError for what is none."""
    if isinstance(value, jax.Array):
        return value
    try:
        return jnp.asarray(np.asarray(value) if not hasattr(value, "dtype") else value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be an array, got {shown(value)}") from None
