"""What no kernel computes: forward mode, and the backward pass to be differentiated; and all pairs.

With S = F(scale Q K^T, E), where F is a modified score and E are entries of its arrays,
P = exp(S - lse), and dropout's factors Z:

    backward   dS = P (Z dO V^T - delta + dlse), G = dS dF/ds:
               scale G K, scale G^T Q, (Z P)^T dO, dS dF/dE
    forward    X = dF/ds scale (tQ K^T + Q tK^T) + dF/dE tE,  xi = rowsum(P X) + sum(P_sink tsink):
               tO = (Z P X) V + (Z P) tV - xi O, tlse = xi
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from tilefold.frontends.jax.scores import dropped
from tilefold.frontends.jax.tiles import Call, Named, Pairs, Tree, shift_of
from tilefold.problems.request import LAYOUTS, Request


def backward(request: Request, named: Named, results: Sequence[str]) -> list[Array]:
    """The results of a backward pass, of its operands by their names."""
    call = Call.of(request, named)
    arrays = call.inputs(named)
    wanted = [number for number in arrays if f"dinput{number}" in results]
    minus = -(call.rows(named["do"]) * call.rows(named["o"])).sum(-1)
    if "dlse" in named:
        minus = minus + call.statistic(named["dlse"])

    def tile(pairs: Pairs, row: Tree, key: Tree) -> Tree:
        q, do, shift, minus = row
        k, v = key
        found = call.weights(pairs, q, k, shift, arrays, named)
        dp = jnp.einsum("bhgqd,bhkd->bhgqk", do, v) * found.z
        ds = found.p * (dp + minus[..., None])
        g = ds * found.slope
        own = {
            number: sum(
                _scattered(call, pairs, arrays[number], place, ds * slope)
                for place, slope in enumerate(found.slopes)
                if call.score is not None and call.number(place) == number
            )
            for number in wanted
        }
        dq = call.problem.scale * jnp.einsum("bhgqk,bhkd->bhgqd", g, k)
        dk = call.problem.scale * jnp.einsum("bhgqk,bhgqd->bhkd", g, q)
        return dq, (dk, jnp.einsum("bhgqk,bhgqd->bhkd", found.p * found.z, do)), own

    rows = call.rows(named["q"]), call.rows(named["do"]), call.shift(named), minus
    dq, (dk, dv), own = call.walk(tile, rows, (call.keys(named["k"]), call.keys(named["v"])))
    made = {
        "dq": call.as_rows(dq, named["q"]),
        "dk": call.as_keys(dk, named["k"]),
        "dv": call.as_keys(dv, named["v"]),
        **{f"dinput{n}": total.astype(named[f"input{n}"].dtype) for n, total in own.items()},
    }
    if "dsinks" in results:
        found = call.of_sinks(named) * minus[..., None]
        made["dsinks"] = found.sum((0, 3)).reshape(named["sinks"].shape)
    return [made[name] for name in results]


def forward(request: Request, named: Named, moves: Named) -> tuple[Array, Array]:
    """The tangents of o and lse, from those of operands by their names."""
    call = Call.of(request, named)
    arrays = call.inputs(named)
    moved = {n: moves[f"input{n}"].astype(call.kind) for n in arrays if f"input{n}" in moves}

    def tile(pairs: Pairs, row: Tree, key: Tree) -> Tree:
        q, shift, *tq = row
        k, v, tk, tv = key
        found = call.weights(pairs, q, k, shift, arrays, named)
        x = jnp.zeros_like(found.p)
        for product in tq:
            x = x + call.problem.scale * jnp.einsum("bhgqd,bhkd->bhgqk", product, k)
        for product in tk:
            x = x + call.problem.scale * jnp.einsum("bhgqd,bhkd->bhgqk", q, product)
        x = x * found.slope
        for place, slope in enumerate(found.slopes):
            if call.number(place) in moved:
                x = x + slope * call.entry(place, moved[call.number(place)], pairs)
        px = found.p * x
        o = jnp.einsum("bhgqk,bhkd->bhgqd", px * found.z, v)
        for product in tv:
            o = o + jnp.einsum("bhgqk,bhkd->bhgqd", found.p * found.z, product)
        return (o, px.sum(-1)), (), ()

    def those(name: str, way: Callable[[Array], Array]) -> list[Array]:
        return [way(moves[name])] if name in moves else []

    rows = call.rows(named["q"]), call.shift(named), *those("q", call.rows)
    values = call.keys(named["k"]), call.keys(named["v"])
    keys = *values, those("k", call.keys), those("v", call.keys)
    (total, xi), _, _ = call.walk(tile, rows, keys)
    if "sinks" in moves:
        turned = moves["sinks"].reshape(1, *call.heads, 1, -1).astype(call.kind)
        xi = xi + (call.of_sinks(named) * turned).sum(-1)
    to = total - xi[..., None] * call.rows(named["o"])
    return call.as_rows(to, named["o"]), xi.reshape(named["lse"].shape)


def whole(request: Request, named: Named) -> tuple[Array, Array, Array]:
    """o, lse and the largest score, of all pairs at once."""
    call = Call.of(request, named)
    problem = call.problem
    pairs = call.pairs(0, 0, problem.len_q, problem.len_k)
    q, k, v = call.rows(named["q"]), call.keys(named["k"]), call.keys(named["v"])
    s, hidden, _, _ = call.scores(pairs, q, k, call.inputs(named))
    s = jnp.where(hidden, -jnp.inf, s)
    largest = s.max(-1, initial=-jnp.inf)
    if problem.sinks:
        sinks = named["sinks"].reshape(1, *call.heads, 1, -1).astype(call.kind)
        s = jnp.concatenate((s, jnp.broadcast_to(sinks, (*s.shape[:-1], problem.sinks))), -1)
    nothing = (s == -jnp.inf).all(-1)
    top = jax.lax.stop_gradient(jnp.where(nothing, 0, s.max(-1, initial=-jnp.inf)))
    p = jnp.where(s == -jnp.inf, 0, jnp.exp(jnp.where(s == -jnp.inf, 0, s - top[..., None])))
    total = jnp.where(nothing, 1, p.sum(-1))
    lse = jnp.where(nothing, -jnp.inf, top + jnp.log(total))
    p = p[..., : problem.len_k] / total[..., None]
    if problem.dropout:
        p = p * dropped(named["seed"], problem.dropout, pairs.indices, call.kind)
    o = jnp.einsum("bhgqk,bhkd->bhgqd", p, v)
    rows = problem.batch, problem.heads_q, problem.len_q
    return call.as_rows(o, named["q"]), lse.reshape(rows), largest.reshape(rows)


def shown(request: Request, named: Named) -> Array:
    """The pairs that a mask shows, (batch, heads, queries, keys)."""
    call = Call.of(request, named)
    problem = call.problem
    hidden = call.pairs(0, 0, problem.len_q, problem.len_k).hidden
    sizes = problem.batch, *call.heads, problem.len_q, problem.len_k
    return ~jnp.broadcast_to(hidden, sizes).reshape(sizes[0], problem.heads_q, *sizes[3:])


def gradient_of_sinks(
    do: Array,
    o: Array,
    lse: Array,
    low: Array | None,
    dlse: Array | None,
    sinks: Array,
    layout: str,
) -> Array:
    """dsinks: -exp(sinks - lse) (delta - dlse), summed over batch and queries."""
    axes, kind = LAYOUTS[layout], lse.dtype
    delta = (do.transpose(axes).astype(kind) * o.transpose(axes).astype(kind)).sum(-1)
    delta = delta if dlse is None else delta - dlse
    share = sinks[:, None] - shift_of(lse)[..., None]
    share = jnp.exp(share if low is None else share - low[..., None])
    return -(share * delta[..., None]).sum((0, 2))


def _scattered(call: Call, pairs: Pairs, array: Array, place: int, change: Array) -> Array:
    """An array of 0 with the changes of pairs added to the entries that they read at a place."""
    read = call.entry(place, array, pairs)
    _, pull = jax.vjp(lambda x: jnp.broadcast_to(call.entry(place, x, pairs), change.shape), array)
    assert read.dtype == change.dtype
    (found,) = pull(change)
    return found
