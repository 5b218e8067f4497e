"""The other implementations on JAX arrays, differentiable by JAX's own operations.

"composed" is written as a user of JAX would write it, and "native" is
`jax.nn.dot_product_attention`. So NaN and infinity behave as in JAX: a hidden key is multiplied by
0, and 0 * NaN is NaN. A query that sees no key has tilefold's results: o = 0, lse = -inf and
gradients 0.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tilefold.backends.extra import NOTHING, Extra
from tilefold.frontends.jax import formulas
from tilefold.frontends.jax.calls import prepared
from tilefold.implementations import refuse_extra
from tilefold.masks.position_rules import causal, full
from tilefold.problems.request import LAYOUTS


def composed(
    q: Array,
    k: Array,
    v: Array,
    request: Any,
    wants_lse: bool,
    extra: Extra = NOTHING,
    further: tuple[str, ...] = (),
) -> tuple[Array | None, ...]:
    """o and lse by two matrix products and a softmax, in the type of lse, for all pairs at once.

    With "max" as a `further` result also the largest scores.
    """
    plain, named = prepared(q, k, v, request, extra)
    o, lse, largest = formulas.whole(plain, named)
    return (o, lse, largest) if further else (o, lse)


def native(
    q: Array,
    k: Array,
    v: Array,
    request: Any,
    wants_lse: bool,
    extra: Extra = NOTHING,
    further: tuple[str, ...] = (),
) -> tuple[Array | None, ...]:
    """o by `jax.nn.dot_product_attention`, and lse by "composed" if it is wanted."""
    plain, named = prepared(q, k, v, request, extra)
    refuse_extra("native", plain, further)
    axes = LAYOUTS[plain.layout]
    queries, keys, values = (x.transpose(axes).swapaxes(1, 2) for x in (q, k, v))
    if keys.shape != values.shape or 0 in (*q.shape, *k.shape):
        raise NotImplementedError(
            "impl='native' takes values as wide as keys, and no axis of length 0; use impl='kernel'"
            " or impl='composed'"
        )
    options: dict[str, Any] = {"scale": plain.scale}
    nothing = None
    square = queries.shape[1] == keys.shape[1]
    if plain.mask == causal("start") or (square and plain.mask == causal()):
        options["is_causal"] = True
    elif plain.mask != full():
        options["mask"] = formulas.shown(plain, named)
        nothing = ~options["mask"].any(3).swapaxes(1, 2)[..., None]
    found = jax.nn.dot_product_attention(queries, keys, values, **options)
    o = found if nothing is None else jnp.where(nothing, 0, found)
    lse = formulas.whole(plain, named)[1] if wants_lse else None
    return o.swapaxes(1, 2).transpose(axes), lse


def tensorops(*_: Any, **__: Any) -> Any:
    """Raises NotImplementedError: JAX has no arrays on Apple GPUs that it serves."""
    raise NotImplementedError(
        "impl='tensorops' runs on Apple GPUs by Metal 4, on torch tensors; choose impl='composed',"
        " 'native' or 'kernel'"
    )
