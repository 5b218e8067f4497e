"""`jax.vmap` of attention: the mapped axis joins the batch, and one call of a kernel serves all.

A rule and a score that ask for the batch then count within one entry. Dropout takes a seed and the
number in the batch, so entries with dropout are computed one after the other, in a loop of XLA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tilefold.frontends.jax.varying import whole
from tilefold.masks.repeated import repeated
from tilefold.problems.request import LAYOUTS, Request
from tilefold.scores.repeated import repeated_score
from tilefold.scores.score import Sizes

Axes = Sequence[int | None]


def looped(
    call: Callable[..., Any], args: Sequence[Any], dims: Axes
) -> tuple[Any, tuple[int, ...]]:
    """The results of a call for each entry of an axis, computed one after the other."""
    args = [whole(x) for x in args]
    mapped = [jnp.moveaxis(x, dim, 0) for x, dim in zip(args, dims, strict=True) if dim is not None]

    def one(entries: Sequence[Any]) -> Any:
        left = iter(entries)
        return call(*[x if dim is None else next(left) for x, dim in zip(args, dims, strict=True)])

    found = jax.lax.map(one, mapped)
    return found, (0,) * len(found)


def size_of(args: Sequence[Any], dims: Axes) -> int:
    """The length of the mapped axis."""
    return int(next(x.shape[dim] for x, dim in zip(args, dims, strict=True) if dim is not None))


def merged(
    names: Sequence[str],
    args: Sequence[Any],
    dims: Axes,
    request: Request,
    own: Sequence[str] = (),
    size: int | None = None,
) -> tuple[list[Any], Request, tuple[int, int]]:
    """Operands whose batch has the mapped axis as its slower part; the request; both lengths.

    The arrays of a score, and those of a mask, keep the mapped axis as their first; the others, and
    those of `own`, get one. Sinks have none. `size` is the length of the mapped axis; none of the
    operands needs to have it then.
    """
    size = size_of(args, dims) if size is None else size
    args = [whole(x) for x in args]
    named = dict(zip(names, zip(args, dims, strict=True), strict=True))
    (q, dim_q), (k, dim_k) = named["q"], named["k"]
    axes = LAYOUTS[request.layout]
    shape_q, shape_k = _without(q.shape, dim_q), _without(k.shape, dim_k)
    apart = frozenset(
        name
        for name, (_, dim) in named.items()
        if _is_array(name) and (dim is not None or name in own)
    )
    found = []
    for name, (x, dim) in named.items():
        if _is_array(name):
            found.append(_in_front(x, dim, size) if name in apart else x)
        elif name == "sinks":
            found.append(x)
        else:
            x = _in_front(x, dim, size)
            found.append(x.reshape(size * x.shape[1], *x.shape[2:]))
    batch, heads, len_q = (shape_q[axes[n]] for n in (0, 1, 2))
    sizes = Sizes(batch, heads, len_q, shape_k[axes[2]])
    own_data, own_inputs = (
        [int(name.removeprefix(start)) for name in apart if name.startswith(start)]
        for start in ("data", "input")
    )
    mask = repeated(request.mask, sizes.batch, sizes.len_q, sizes.len_k, own_data, size)
    score = request.score and repeated_score(request.score, sizes, own_inputs, size)
    return found, request.changed(mask=mask, score=score), (size, batch)


def split(x: Any, parts: tuple[int, int]) -> Any:
    """The mapped axis and the batch, of a result whose batch has both, with these lengths."""
    return x.reshape(*parts, *x.shape[1:])


def _is_array(name: str) -> bool:
    """True for an array of a score or of a mask."""
    return name.startswith(("input", "data"))


def _in_front(x: Any, dim: int | None, size: int) -> Any:
    return jnp.broadcast_to(x, (size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)


def _without(shape: Sequence[int], dim: int | None) -> tuple[int, ...]:
    return tuple([length for axis, length in enumerate(shape) if axis != dim])
