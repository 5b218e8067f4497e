"""Attention in the transformations of JAX: each result is that of what it stands for.

The derivatives are compared with those of impl="composed", which JAX itself differentiates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from jaxed import jax, jnp, needs
from operands import canonical

import tilefold
from tilefold import alibi, attention, bias, causal, dense, documents, lengths, local, softcap

pytestmark = needs

SHAPE = (2, 4, 20, 8)


def normal(*shape: int, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype("float32"))


def three(*more: int) -> list[Any]:
    """q, k and v, with two heads of queries for each head of keys."""
    keys = (*more, 2, 2, 24, 8)
    return [normal(*more, *SHAPE, seed=1), normal(*keys, seed=2), normal(*keys, seed=3)]


def near(got: Any, want: Any, tolerance: float = 2e-5) -> None:
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        size = max(1.0, float(jnp.abs(other).max(initial=0, where=jnp.isfinite(other))))
        np.testing.assert_allclose(one, other, atol=tolerance * size, rtol=0)


# Derivatives ------------------------------------------------------------------------------------

Call = Callable[..., Any]


def own(s: Any, q: Any, k: Any, h: Any, heat: Any) -> Any:
    """Its logarithm is infinite and NaN where it is not chosen, and at hidden pairs."""
    return tilefold.where(q == k, s, s * heat[h] + tilefold.log(q - k))


CALLS: dict[str, tuple[Call, tuple[Any, ...]]] = {
    "plain": (lambda: {"mask": causal() & local(9)}, ()),
    "own": (
        lambda heat, sinks: {
            "mask": causal(),
            "score": tilefold.score(lambda s, q, k, h: own(s, q, k, h, tilefold.table(heat))),
            "sinks": sinks,
        },
        ((4,), (4, 2)),
    ),
    "all": (
        lambda table, slopes, sinks: {
            "score": [softcap(2.0), bias(table), alibi(slopes)],
            "dropout": 0.3,
            "seed": 5,
            "sinks": sinks,
        },
        ((4, 20, 1), (4,), (4,)),
    ),
}


def loss_of(name: str, impl: str) -> tuple[Call, list[Any]]:
    """A number that every operand moves, and its arguments."""
    options, shapes = CALLS[name]
    weight, other = normal(*SHAPE, seed=9), normal(*SHAPE[:3], seed=8)

    def loss(q: Any, k: Any, v: Any, *arrays: Any) -> Any:
        o, lse = attention(q, k, v, impl=impl, return_lse=True, **options(*arrays))
        return (o * weight).sum() + (jnp.sin(lse) * other).sum() + (o * o).sum()

    return loss, [*three(), *[normal(*shape, seed=n) for n, shape in enumerate(shapes, 20)]]


@pytest.mark.feature("T09")
@pytest.mark.parametrize("name", CALLS)
def test_first_and_second_derivatives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each order of forward and reverse mode is met by one of the calls; in several tiles."""
    from tilefold.frontends.jax import tiles

    monkeypatch.setattr(tiles, "BLOCK", 8)

    def found(impl: str) -> Any:
        loss, given = loss_of(name, impl)
        ways = tuple([normal(*x.shape, seed=n) for n, x in enumerate(given, 40)])
        every = tuple(range(len(given)))
        slopes = jax.grad(loss, every)

        def along(*given: Any) -> Any:
            return jax.jvp(loss, given, ways)[1]

        def twice(*given: Any) -> Any:
            return sum((x * y).sum() for x, y in zip(slopes(*given), ways, strict=True))

        def both(*given: Any) -> Any:
            if name == "plain":
                return slopes(*given), jax.jvp(along, given, ways), jax.grad(along, every)(*given)
            if name == "own":
                return jax.jvp(slopes, given, ways)
            return jax.grad(twice, every)(*given)

        return jax.jit(both)(*given)

    near(found("kernel"), found("composed"), 2e-4)


def test_a_query_that_sees_nothing_has_no_derivatives() -> None:
    q, k, v = three()

    def call(q: Any, k: Any, v: Any) -> Any:
        return attention(q, k, v, mask=lengths([0, 5]), return_lse=True)

    def moved(*given: Any) -> Any:
        return jax.jvp(call, given, given)[1]

    def seconds(*given: Any) -> Any:
        return jax.grad(lambda *given: moved(*given)[0].sum() ** 2, (0, 1, 2))(*given)

    found = jax.jit(lambda *given: (call(*given), moved(*given), seconds(*given)))(q, k, v)
    (o, lse), (to, tlse), second = found
    assert not o[0].any() and not to[0].any() and not tlse[0].any() and (lse[0] == -np.inf).all()
    assert all(jnp.isfinite(x).all() and not x[0].any() and x[1].any() for x in second)


def test_hidden_keys_that_are_not_finite_reach_no_gradient() -> None:
    q, k, v = three()
    k, v = k.at[:, :, 20:].set(jnp.nan), v.at[:, :, 20:].set(jnp.inf)
    slopes = jax.grad(lambda *x: (attention(*x, mask=lengths(20)) ** 2).sum(), (0, 1, 2))
    found = jax.jit(slopes)(q, k, v)
    assert all(jnp.isfinite(x).all() for x in found)


@pytest.mark.parametrize("shape", [(0, 4, 3, 8), (2, 4, 0, 8)])
def test_empty_arrays(shape: tuple[int, ...]) -> None:
    q, k = jnp.zeros(shape), jnp.zeros((shape[0], 4, 5, 8))
    o, pull = jax.vjp(lambda q, k: attention(q, k, k), q, k)
    assert o.shape == shape and [x.shape for x in pull(o)] == [q.shape, k.shape]
    nothing = jnp.zeros((2, 4, 0, 8))
    o, lse = attention(jnp.ones((2, 4, 3, 8)), nothing, nothing, return_lse=True)
    assert not o.any() and (lse == -jnp.inf).all()


# vmap -------------------------------------------------------------------------------------------


def one_by_one(call: Call, given: Any, axes: Any) -> Any:
    """The results of a call for each entry, stacked."""
    parts = [
        call(
            *[
                x if axis is None else jnp.take(x, n, axis)
                for x, axis in zip(given, axes, strict=True)
            ]
        )
        for n in range(3)
    ]
    return jax.tree.map(lambda *x: jnp.stack(x), *parts)


def biased(q: Any, k: Any, v: Any, x: Any) -> Any:
    return attention(q, k, v, score=bias(x))


def sunk(q: Any, k: Any, v: Any, x: Any) -> Any:
    return attention(q, k, v, sinks=x)


MAPPED: dict[str, tuple[Call, Any, tuple[Any, ...]]] = {
    "all": (lambda q, k, v: attention(q, k, v, mask=causal()), (0, 0, 0), ()),
    "queries": (lambda q, k, v: attention(q, k, v, mask=local(5)), (0, None, None), ()),
    "other axes": (lambda q, k, v: attention(q, k, v, return_max=True), (1, 2, 3), ()),
    "rule of the batch": (
        lambda q, k, v: attention(q, k, v, mask=lengths([3, 9])),
        (0, None, 0),
        (),
    ),
    "bias of each": (biased, (0, 0, 0, 0), ((2, 4, 20, 24),)),
    "shared bias": (biased, (0, 0, 0, None), ((2, 1, 20, 24),)),
    "sinks of each": (sunk, (0, None, 0, 0), ((4,),)),
    "sinks alone": (sunk, (None, None, None, 0), ((4,),)),
    "shared sinks": (sunk, (0, 0, None, None), ((4, 2),)),
    "dropout": (lambda q, k, v: attention(q, k, v, dropout=0.4, seed=3), (0, 0, 0), ()),
}  # fmt: skip


@pytest.mark.feature("M02")
@pytest.mark.parametrize("name", MAPPED)
def test_vmap_is_a_loop(name: str) -> None:
    """Values, gradients of each entry, and gradients of the whole."""
    call, axes, shapes = MAPPED[name]
    extra = [(3, *shape) if axes[3] == 0 else shape for shape in shapes]
    plain, many = three(), three(3)
    given = [
        one if axis is None else jnp.moveaxis(each, 0, axis)
        for one, each, axis in zip(plain, many, axes, strict=False)
    ]
    given += [normal(*shape, seed=30) for shape in extra]
    every = tuple(range(len(given)))

    def loss(*given: Any) -> Any:
        return (jax.tree.leaves(call(*given))[0] ** 2).sum()

    slopes, mapped = jax.grad(loss, every), jax.vmap(call, axes)

    def whole(*given: Any) -> Any:
        return (jax.tree.leaves(mapped(*given))[0] ** 2).sum()

    def at_once(*given: Any) -> Any:
        return mapped(*given), jax.vmap(slopes, axes)(*given), jax.grad(whole, every)(*given)

    def in_turn(*given: Any) -> Any:
        apart = one_by_one(slopes, given, axes)
        joined = [
            x.sum(0) if axis is None else jnp.moveaxis(x, 0, axis)
            for x, axis in zip(apart, axes, strict=True)
        ]
        return one_by_one(call, given, axes), apart, tuple(joined)

    near(jax.jit(at_once)(*given), jax.jit(in_turn)(*given))


def test_vmap_keeps_the_gradients_of_large_scores() -> None:
    """Products of integers are the same scores in every call; one float of lse is off by 1e-3."""
    q, k, v = (jnp.round(x) for x in three(3))
    large = tilefold.score(lambda s: s + 3e4)

    def loss(q: Any, sinks: Any) -> Any:
        o, lse = attention(q, k[0], v[0], scale=1.0, score=large, sinks=sinks, return_lse=True)
        return (o**2).sum() + (lse - 3e4).sum()

    given, slopes = (q, normal(3, 4) + 3e4), jax.grad(loss, (0, 1))
    near(jax.vmap(slopes)(*given), one_by_one(slopes, given, (0, 0)), 1e-5)
    total = jax.grad(lambda *x: jax.vmap(loss)(*x).sum(), (0, 1))
    near(total(*given), one_by_one(slopes, given, (0, 0)), 1e-5)


OPERANDS = "do", "q", "k", "v", "o", "lse", "dlse", "sinks", "table"


@pytest.mark.parametrize("name", OPERANDS)
def test_any_operand_of_a_backward_pass_may_be_mapped_alone(name: str) -> None:
    q, k, v = three()
    table, sinks = normal(4, 20, 1), normal(4)
    o, lse = attention(q, k, v, score=bias(table), sinks=sinks, return_lse=True)
    named = dict(zip(OPERANDS, (o, q, k, v, o, lse, lse, sinks, table), strict=True))

    def backward(x: Any) -> Any:
        *given, dlse, sinks, table = (named | {name: x}).values()
        options = {"dlse": dlse, "sinks": sinks, "score": bias(table)}
        return tilefold.attention_backward(*given, **options)

    several = (jnp.stack([named[name] * n for n in (1.0, 0.5, 1.5)]),)
    near(jax.vmap(backward)(*several), one_by_one(backward, several, (0,)))


def test_vmap_of_nothing_has_the_shape_of_its_results() -> None:
    _, k, v = three()

    def call(q: Any, sinks: Any) -> Any:
        return attention(q, k, v, sinks=sinks)

    q, sinks = jnp.zeros((0, *SHAPE)), jnp.zeros((0, 4))
    o, pull = jax.vjp(jax.vmap(call), q, sinks)
    assert o.shape == q.shape and [x.shape for x in pull(o)] == [q.shape, sinks.shape]
    assert jax.vmap(call, (0, None))(q, jnp.zeros(4)).shape == q.shape
    assert jax.vmap(call, (None, 0))(jnp.zeros(SHAPE), sinks).shape == q.shape


def test_vmap_has_no_loop_but_with_dropout() -> None:
    for name, loops in (("bias of each", False), ("dropout", True)):
        call, axes, shapes = MAPPED[name]
        given = [*three(3), *[normal(3, *shape) for shape in shapes]]
        text = str(jax.make_jaxpr(jax.vmap(call, axes))(*given))
        assert text.count("tilefold_attention") == 1 and ("scan" in text) == loops


def test_vmap_of_vmap_and_jacobians() -> None:
    q, k, v = three()
    twice = jax.vmap(jax.vmap(lambda q: attention(q, k, v), 0), 1)
    many = normal(3, 5, *SHAPE)
    near(
        twice(many),
        jnp.stack([jnp.stack([attention(many[i, j], k, v) for i in range(3)]) for j in range(5)]),
    )

    def rows(x: Any) -> Any:
        return attention(q * x, k, v).sum((0, 1, 3))

    near(jax.jit(jax.jacfwd(rows))(0.5), jax.jit(jax.jacrev(rows))(0.5), 1e-4)


# Masks that are traced --------------------------------------------------------------------------

_random = np.random.default_rng(5)
TRACED: dict[str, tuple[Call, Any, str]] = {
    "lengths": (lambda n: causal() & lengths(n), np.array([7, 24], np.int32), "bhdn"),
    "documents": (documents, np.sort(_random.integers(0, 3, (2, 24))).astype(np.int32), "bnhd"),
    "dense": (lambda seen: dense(seen) | local(2), _random.random((2, 1, 24, 24)) < 0.4, "bnhd"),
    "dense of keys": (dense, _random.random((2, 1, 1, 24)) < 0.4, "bhnd"),
}


@pytest.mark.feature("T07")
@pytest.mark.parametrize("name", TRACED)
def test_arrays_of_masks_may_change(name: str) -> None:
    """One program serves all of them, with gradients; `vmap` gives each entry its own."""
    make, data, layout = TRACED[name]
    given = [normal(2, 4, 24, 8, seed=n) for n in range(3)]
    laid = [canonical(x, layout) for x in given]
    traces = []

    def loss(data: Any, *given: Any) -> Any:
        traces.append(name)
        return (attention(*given, mask=make(data), layout=layout) ** 2).sum()

    compiled = jax.jit(jax.grad(loss, (1, 2, 3)))
    several = [data, np.roll(data, 1, axis=0), np.flip(data, axis=0)]
    want = []
    for each in several:
        want.append(jax.grad(loss, (1, 2, 3))(each, *laid))
        near(compiled(each, *laid), want[-1])
    assert len(traces) == len(several) + 1
    mapped = jax.jit(jax.vmap(jax.grad(loss, (1, 2, 3)), (0, None, None, None)))
    near(mapped(jnp.stack(several), *laid), jax.tree.map(lambda *x: jnp.stack(x), *want))
    assert len(traces) == len(several) + 2


def test_lengths_that_are_traced_may_be_out_of_bounds() -> None:
    """They show all keys, or none; those with values are refused."""
    q, k, v = three()
    n = np.array([99, -3], np.int32)
    found = jax.jit(lambda n: attention(q, k, v, mask=lengths(n)))(n)
    near(found, attention(q, k, v, mask=lengths([24, 0])))
    with pytest.raises(ValueError, match="n_k must be integers >= 0"):
        lengths(jnp.asarray(n))


def test_the_derivatives_see_masks_that_are_traced() -> None:
    q, k, v = three()

    def second(impl: str, n: Any) -> Any:
        def loss(q: Any) -> Any:
            return (attention(q, k, v, mask=lengths(n), impl=impl) ** 2).sum()

        return jax.jit(jax.hessian(lambda x: loss(q * x)))(jnp.float32(1.0))

    n = jnp.array([5, 20], jnp.int32)
    near(second("kernel", n), second("composed", n), 1e-4)


# Other transformations --------------------------------------------------------------------------


def test_checkpoint_scan_and_rules_of_ones_own() -> None:
    q, k, v = three()

    def loss(q: Any) -> Any:
        return (attention(q, k, v, mask=causal()) ** 2).sum()

    want = jax.grad(loss)(q)
    near(jax.grad(jax.checkpoint(loss))(q), want, 0)

    def layers(q: Any) -> Any:
        return jax.lax.scan(lambda x, _: (attention(x, k, v), None), q, None, length=3)[0].sum()

    def unrolled(q: Any) -> Any:
        return attention(attention(attention(q, k, v), k, v), k, v).sum()

    near(jax.jit(jax.grad(layers))(q), jax.jit(jax.grad(unrolled))(q))

    @jax.custom_vjp
    def clipped(q: Any) -> Any:
        return loss(q)

    clipped.defvjp(lambda q: (loss(q), q), lambda q, g: (g * jnp.clip(jax.grad(loss)(q), -1, 1),))
    near(jax.jit(jax.grad(clipped))(q), jnp.clip(want, -1, 1))


def test_shard_map_computes_each_part_in_its_place() -> None:
    """Over the batch and over heads; keys that all devices share get the sum of the gradients."""
    from jax.sharding import AxisType, PartitionSpec

    mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,))
    q, k, v = three()

    def call(q: Any, k: Any, v: Any) -> Any:
        return attention(q, k, v, mask=causal())

    def slopes(call: Call, *given: Any, twice: bool = False) -> Any:
        both = jax.grad(lambda *x: (call(*x) ** 2).sum(), (0, 1, 2))
        return jax.jit(lambda *x: jax.jvp(both, x, x) if twice else both(*x))(*given)

    for spec, twice in ((PartitionSpec("i"), True), (PartitionSpec(None, "i"), False)):
        parts = jax.shard_map(call, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=twice)
        near(slopes(parts, q, k, v, twice=twice), slopes(call, q, k, v, twice=twice), 1e-4)
    specs = PartitionSpec("i"), PartitionSpec(), PartitionSpec()
    shared = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=specs[0])

    def repeated(q: Any, k: Any, v: Any) -> Any:
        return call(q, jnp.concatenate([k, k]), jnp.concatenate([v, v]))

    near(slopes(shared, q, k[:1], v[:1]), slopes(repeated, q, k[:1], v[:1]), 1e-4)

    def drawn(seed: Any) -> Any:
        return jax.shard_map(
            lambda x: attention(x, x, x, dropout=0.5, seed=seed()),
            mesh=mesh, in_specs=PartitionSpec("i"), out_specs=PartitionSpec("i"),
        )(jnp.ones(SHAPE).at[..., 0].set(q[0, ..., 0]))  # fmt: skip

    same, apart = drawn(lambda: 7), drawn(lambda: 7 + jax.lax.axis_index("i"))
    assert (same[0] == same[1]).all() and (apart[0] != apart[1]).any()
    near(same[0], apart[0])
    text = jax.jit(shared).lower(q, k[:1], v[:1]).compile().as_text()
    assert "tilefold_attention" in text and "all-gather" not in text


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_arrays_that_are_divided_among_devices(kind: str) -> None:
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType[kind],))
    q, k, v = three()

    def slopes(*given: Any) -> Any:
        return jax.grad(lambda *x: (attention(*x, mask=causal()) ** 2).sum(), (0, 1, 2))(*given)

    want = jax.jit(slopes)(q, k, v)
    given = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("i"))) for x in (q, k, v)]
    found = [jax.jit(slopes)(*given)]
    with jax.set_mesh(mesh):
        found += [jax.jit(slopes)(*given), slopes(*given)]
    for each in found:
        near([jnp.asarray(np.asarray(x)) for x in each], want)


def test_the_default_mesh() -> None:
    """Its axes are explicit, and no mesh is set; the mapped axis is divided."""
    from jax.sharding import NamedSharding, PartitionSpec

    import tilefold.jax

    place = NamedSharding(jax.make_mesh((2,), ("i",)), PartitionSpec("i"))
    q, k, v = three(2)
    given = [jax.device_put(x, place) for x in (q, k, v, normal(2, 4))]

    def call(q: Any, k: Any, v: Any, sinks: Any) -> Any:
        return attention(q, k, v, sinks=sinks)

    def every(q: Any, k: Any, v: Any, sinks: Any) -> Any:
        total = jax.grad(lambda q: (jax.vmap(call)(q, k, v, sinks) ** 2).sum())
        dropped = jax.vmap(lambda q, k, v: attention(q, k, v, dropout=0.2, seed=1))
        attend, ones = tilefold.jax.dot_product_attention, jnp.ones((2, 2, 3, 1, 4))
        return total(q), dropped(q, k, v), attend(sinks[:, None, None], *ones, is_causal=True)

    here = [jnp.asarray(np.asarray(x)) for x in given]
    for function in (jax.jit(every), jax.vmap(call)):
        found = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), function(*given))
        near(found, function(*here))


def test_donated_arrays() -> None:
    q, k, v = three()
    want = np.asarray(attention(q, k, v))
    found = jax.jit(lambda q, k, v: attention(q, k, v) * 2, donate_argnums=0)(q, k, v)
    np.testing.assert_allclose(found, 2 * want)
    assert q.is_deleted()
