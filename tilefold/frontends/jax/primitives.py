"""Attention, its backward pass and its forward mode as primitives of JAX.

attention   the kernels of the forward pass. Its derivative is `tangents`, which is linear in what
            moves. What reverse mode makes of `tangents`, its transpose, is `backward`.
backward    the kernels of the backward pass. Its derivatives are those of a function of JAX that
            computes the same tile by tile.
tangents    a function of JAX, tile by tile: only forward mode computes it.

The primitives have their operands and results in the order of a `Pass`; dropout's seed is two words
of 32 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from tilefold.backends.protocols import BACKWARD, BACKWARD_LOW, FORWARD, Pass
from tilefold.frontends.jax import formulas
from tilefold.frontends.jax.batching import looped, merged, size_of, split
from tilefold.frontends.jax.joined import with_sinks
from tilefold.frontends.jax.lowering import described, lower, refuse, results_of, run_eagerly
from tilefold.frontends.jax.varying import alike, typed, whole
from tilefold.problems.request import Request

Arrays = Sequence[Any]


def _primitive(name: str) -> Primitive:
    made = Primitive(f"tilefold_{name}")
    made.multiple_results = True
    return made


attention_p, backward_p, tangents_p = map(_primitive, ("attention", "backward", "tangents"))
attention_p.def_impl(functools.partial(run_eagerly, attention_p))
backward_p.def_impl(functools.partial(run_eagerly, backward_p))
tangents_p.def_impl(functools.partial(xla.apply_primitive, tangents_p))


def attention(wanted: Pass, request: Request, given: Arrays) -> list[Any]:
    """The results of a forward pass, differentiable in every way."""
    made: list[Any] = attention_p.bind(*alike(given), wanted=wanted, request=request)
    return made


def backward(wanted: Pass, request: Request, given: Arrays) -> list[Any]:
    """The results of a backward pass, differentiable in every way."""
    made: list[Any] = backward_p.bind(*alike(given), wanted=wanted, request=request)
    return made


def extra_of(wanted: Pass) -> tuple[str, ...]:
    """The operands of a forward pass beside q, k and v."""
    return wanted.given[len(FORWARD.given) :]


def _with_low(wanted: Pass) -> Pass:
    """The forward pass that also writes what rounding took from lse."""
    return FORWARD.plus(extra_of(wanted), ("lse_low", *[x for x in wanted.results if x == "max"]))


def _moves(name: str) -> bool:
    """True for an operand that is differentiated."""
    return not name.startswith(("data", "seed", "lse_low"))


# attention --------------------------------------------------------------------------------------


def _attention_jvp(primals: Arrays, tangents: Arrays, *, wanted: Pass, request: Request) -> Any:
    low = _with_low(wanted)
    named = dict(zip(low.results, attention(low, request, primals), strict=True))
    moves = {
        name: tangent
        for name, tangent in zip(wanted.given, tangents, strict=True)
        if type(tangent) is not ad.Zero and _moves(name)
    }
    moved = {}
    if moves:
        given = *primals, named["o"], named["lse"], named["lse_low"], *moves.values()
        found = tangents_p.bind(*alike(given), wanted=low, request=request, moved=(*moves,))
        moved = dict(zip(("o", "lse"), found, strict=True))
    results = [named[name] for name in wanted.results]
    return results, [
        moved[name] if name in moved else _still(x)
        for name, x in zip(wanted.results, results, strict=True)
    ]


def _attention_batch(args: Arrays, dims: Any, *, wanted: Pass, request: Request) -> Any:
    def call(*given: Any) -> Any:
        return attention(wanted, request, given)

    if request.dropout:
        return looped(call, args, dims)
    if request.sinks and dims[wanted.given.index("sinks")] is not None:
        return _with_sinks_of_each(args, dims, wanted, request)
    found, joined, parts = merged(wanted.given, args, dims, request)
    made = [split(x, parts) for x in attention(wanted, joined, found)]
    return made, (0,) * len(made)


def _with_sinks_of_each(args: Arrays, dims: Any, wanted: Pass, request: Request) -> Any:
    """Sinks are not of the batch: the kernels leave them out, and operations of JAX join them."""
    place = wanted.given.index("sinks")
    low = _with_low(wanted)
    plain = FORWARD.plus(tuple([x for x in extra_of(low) if x != "sinks"]), low.results[2:])
    given, own = [*args[:place], *args[place + 1 :]], [*dims[:place], *dims[place + 1 :]]
    request, axis = request.changed(sinks=0), None
    if any(dim is not None for dim in own):
        given, request, parts = merged(plain.given, given, own, request)
        axis = 0
    made = attention(plain, request, given)
    named = dict(zip(plain.results, made, strict=True))
    if axis is not None:
        named = {name: split(x, parts) for name, x in named.items()}
    join = jax.vmap(
        functools.partial(with_sinks, layout=request.layout), (axis, axis, axis, dims[place])
    )
    names = "o", "lse", "lse_low"
    found = join(*[named[name] for name in names], whole(args[place]))
    named |= dict(zip(names, found, strict=True))
    return [named[x] for x in wanted.results], [0 if x in names else axis for x in wanted.results]


# tangents ---------------------------------------------------------------------------------------


def _tangents(*args: Any, wanted: Pass, request: Request, moved: tuple[str, ...]) -> Any:
    """The tangents of o and lse, in operations of JAX."""
    named, moves = _apart(args, wanted, moved)
    return [*formulas.forward(request, named, moves)]


def _apart(args: Arrays, wanted: Pass, moved: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
    """The operands of `tangents` by their names, and what moves."""
    names = *wanted.given, "o", "lse", "lse_low"
    return (
        dict(zip(names, args, strict=False)),
        dict(zip(moved, args[len(names) :], strict=True)),
    )


def _tangents_types(*avals: Any, wanted: Pass, request: Request, moved: Any) -> Any:
    o, lse = avals[len(wanted.given) :][:2]
    return [typed(avals[0], x.shape, x.dtype.name) for x in (o, lse)]


def _tangents_jvp(primals: Arrays, tangents: Arrays, **params: Any) -> Any:
    results = tangents_p.bind(*primals, **params)
    first = len(primals) - len(params["moved"])
    if all(type(x) is ad.Zero for x in tangents[:first]):  # it is linear in the others
        turned = [ad.instantiate_zeros(x) for x in tangents[first:]]
        return results, tangents_p.bind(*alike([*primals[:first], *turned]), **params)
    return results, _pushed(functools.partial(_tangents, **params), primals, tangents)


def _tangents_transpose(
    slopes: Arrays, *args: Any, wanted: Pass, request: Request, moved: tuple[str, ...]
) -> Any:
    named, moves = _apart(args, wanted, moved)
    do, dlse = slopes
    if type(do) is ad.Zero and type(dlse) is ad.Zero:
        return [None] * len(args)
    do = ad.instantiate_zeros(do)
    extra = extra_of(wanted)
    last = () if type(dlse) is ad.Zero else ("dlse",)
    usual = ("q", "k", "v")
    back = BACKWARD_LOW.plus(
        (*extra, *last), tuple([f"d{name}" for name in moved if name not in usual])
    )
    named |= {"do": do, "dlse": dlse}
    found = backward(back, request, [named[name] for name in back.given])
    gradients = dict(zip(back.results, found, strict=True))
    return [None] * (len(args) - len(moves)) + [gradients[f"d{name}"] for name in moved]


def _tangents_batch(args: Arrays, dims: Any, **params: Any) -> Any:
    found = jax.vmap(functools.partial(_tangents, **params), tuple(dims))(*args)
    return found, (0,) * len(found)


# backward ---------------------------------------------------------------------------------------


def _backward(*args: Any, wanted: Pass, request: Request) -> Any:
    """The results of a backward pass, in operations of JAX."""
    return formulas.backward(request, dict(zip(wanted.given, args, strict=True)), wanted.results)


def _backward_jvp(primals: Arrays, tangents: Arrays, *, wanted: Pass, request: Request) -> Any:
    results = backward(wanted, request, primals)
    moving = [
        tangent if _moves(name) else _still(x)
        for name, x, tangent in zip(wanted.given, primals, tangents, strict=True)
    ]
    function = functools.partial(_backward, wanted=wanted, request=request)
    return results, _pushed(function, primals, moving)


def _backward_batch(args: Arrays, dims: Any, *, wanted: Pass, request: Request) -> Any:
    def call(*given: Any) -> Any:
        return backward(wanted, request, given)

    if request.dropout:
        return looped(call, args, dims)
    args = [whole(x) for x in args]
    named = dict(zip(wanted.given, zip(args, dims, strict=True), strict=True))
    names = tuple([name for name in wanted.given if name != "sinks"])
    results = tuple([name for name in wanted.results if name != "dsinks"])
    plain = BACKWARD_LOW if "lse_low" in names else BACKWARD
    extra = names[len(plain.given) :]
    plain = plain.plus(extra, results[3:])
    found, joined, parts = merged(
        names,
        [named[name][0] for name in names],
        [named[name][1] for name in names],
        request.changed(sinks=0),
        own=[name[1:] for name in results],
        size=size_of(args, dims),
    )
    every = {}
    for name, x in zip(results, backward(plain, joined, found), strict=True):
        every[name] = x if name.startswith("dinput") else split(x, parts)
    if "dsinks" in wanted.results:
        asked = ("do", "o", "lse", "lse_low", "dlse", "sinks")
        given = [named.get(name, (None, None)) for name in asked]
        own = functools.partial(formulas.gradient_of_sinks, layout=request.layout)
        axes = tuple([dim for _, dim in given])
        mapped = any(dim is not None for dim in axes)
        every["dsinks"] = (jax.vmap(own, axes) if mapped else own)(*[x for x, _ in given])
    return [every[name] for name in wanted.results], [
        None if name == "dsinks" and not mapped else 0 for name in wanted.results
    ]


# all --------------------------------------------------------------------------------------------


def _types(*avals: Any, wanted: Pass, request: Request) -> Any:
    """The types of the results of a pass."""
    found = results_of(wanted, request, described(wanted, avals))
    return [typed(avals[0], shape, dtype) for shape, dtype in found]


def _still(x: Any) -> Any:
    """The tangent of what does not move."""
    return ad.Zero(jax.typeof(x).to_tangent_aval())


def _pushed(function: Callable[..., Any], primals: Arrays, tangents: Arrays) -> Any:
    """The tangents of a function's results, where only some of its arguments move."""
    places = [n for n, x in enumerate(tangents) if type(x) is not ad.Zero]
    if not places:
        shapes = jax.eval_shape(function, *primals)
        return [_still(jnp.zeros(x.shape, x.dtype)) for x in shapes]

    def inner(*moving: Any) -> Any:
        args = list(primals)
        for place, x in zip(places, moving, strict=True):
            args[place] = x
        return function(*args)

    return jax.jvp(inner, [primals[n] for n in places], [tangents[n] for n in places])[1]


for each, lowering, types in (
    (attention_p, lower, _types),
    (backward_p, lower, _types),
    (tangents_p, mlir.lower_fun(_tangents, multiple_results=True), _tangents_types),
):
    each.def_abstract_eval(types)
    if lowering is lower:
        mlir.register_lowering(each, refuse)
        mlir.register_lowering(each, lower, platform="cpu")
    else:
        mlir.register_lowering(each, lowering)

ad.primitive_jvps[attention_p] = _attention_jvp
ad.primitive_jvps[backward_p] = _backward_jvp
ad.primitive_jvps[tangents_p] = _tangents_jvp
ad.primitive_transposes[tangents_p] = _tangents_transpose
batching.primitive_batchers[attention_p] = _attention_batch
batching.primitive_batchers[backward_p] = _backward_batch
batching.primitive_batchers[tangents_p] = _tangents_batch
