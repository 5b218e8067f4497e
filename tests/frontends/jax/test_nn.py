"""`tilefold.jax.dot_product_attention` beside jax.nn's; Flax's layers and Equinox's."""

from __future__ import annotations

import inspect
import random
from typing import Any

import numpy as np
import pytest
from jaxed import jax, jnp, needs

from tilefold import causal, local

pytestmark = needs


def drawn(number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Random arguments of any kind."""
    draw, data = random.Random(number), np.random.default_rng(number)
    batch, len_q, len_k = draw.choice([1, 2]), draw.choice([1, 9]), draw.choice([1, 6, 9])
    keys, dim = draw.choice([1, 2]), draw.choice([4, 8])
    heads, dtype = keys * draw.choice([1, 2]), draw.choice(["float32", "float32", "bfloat16"])
    shapes = (batch, len_q, heads, dim), *[(batch, len_k, keys, dim)] * 2
    arrays = [jnp.asarray(data.normal(size=shape), dtype) for shape in shapes]
    if batch == 1 and draw.random() < 0.5:
        arrays = [x[0] for x in arrays]

    def some(chance: float, value: Any) -> Any:
        return value() if draw.random() < chance else None

    def shape() -> list[int]:
        return [draw.choice([1, size]) for size in (batch, heads, len_q, len_k)]

    def lengths(most: int) -> Any:
        return jnp.asarray(data.integers(0, most + 1, batch), jnp.int32)

    bias = some(
        0.5, lambda: jnp.asarray(data.normal(size=shape()), draw.choice(["float32", dtype]))
    )
    mask = some(0.4, lambda: jnp.asarray(data.random(size=shape()) < 0.6))
    return (*arrays, bias, mask), {
        "is_causal": draw.random() < 0.5,
        "query_seq_lengths": some(0.4, lambda: lengths(len_q)),
        "key_value_seq_lengths": some(0.4, lambda: lengths(len_k)),
        "local_window_size": some(0.4, lambda: draw.choice([2, (1, 3), (0, 0), (3, 1)])),
        "scale": some(0.3, lambda: 0.3),
        "return_residual": draw.random() < 0.5,
    }


@pytest.mark.feature("J02")
@pytest.mark.parametrize("number", range(10))
def test_the_same_as_jax_nn(number: int) -> None:
    """Values and gradients, that of the bias too; also of queries that see no key."""
    import tilefold.jax

    (q, k, v, bias, mask), options = drawn(number)
    given = (q, k, v) if bias is None else (q, k, v, bias)

    def found(call: Any, given: Any) -> Any:
        def loss(q: Any, k: Any, v: Any, bias: Any = None) -> Any:
            made = call(q, k, v, bias, mask, **options)
            o = made[0] if options["return_residual"] else made
            return (o.astype("float32") ** 2).sum(), made

        return jax.grad(loss, tuple(range(len(given))), has_aux=True)(*given)

    calls = tilefold.jax.dot_product_attention, jax.nn.dot_product_attention
    ours, theirs = jax.jit(lambda *given: [found(call, given) for call in calls])(*given)
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        allowed = 4e-2 if q.dtype == jnp.bfloat16 else 2e-5
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        size = np.abs(want[np.abs(want) < 1e30]).max(initial=1)
        np.testing.assert_allclose(got, want, atol=allowed * size, rtol=1e-2)


def test_the_arguments_are_those_of_jax_nn_and_of_tilefold() -> None:
    import tilefold.jax

    def names(call: Any) -> list[Any]:
        return [(x.name, x.kind, x.default) for x in inspect.signature(call).parameters.values()]

    assert names(tilefold.jax.dot_product_attention) == names(jax.nn.dot_product_attention)
    assert names(tilefold.jax.attention) == names(tilefold.attention)


def test_masks_a_window_and_a_scale_may_be_traced() -> None:
    import tilefold.jax

    q = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 2, 4)), jnp.float32)
    seen = jnp.asarray(np.random.default_rng(1).random((2, 1, 6, 6)) < 0.7)
    n = jnp.array([3, 6], jnp.int32)

    def call(attend: Any) -> Any:
        def run(q: Any, seen: Any, n: Any, scale: Any, left: Any) -> Any:
            options = {"key_value_seq_lengths": n, "scale": scale}
            alone = attend(q, q, q, local_window_size=(left, left))
            return attend(q, q, q, None, seen, local_window_size=(left, 2), **options) + alone

        return jax.jit(run)(q, seen, n, jnp.float32(0.7), 1)

    got, want = call(tilefold.jax.dot_product_attention), call(jax.nn.dot_product_attention)
    np.testing.assert_allclose(got, want, atol=1e-5)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "mask": ({"mask": np.ones((2, 1, 6, 6), np.float32)}, ValueError, "mask dtype should be bool"),
    "mask shape": ({"mask": np.ones((3, 1, 6, 6), bool)}, ValueError, "mask must broadcast to"),
    "bias": ({"bias": np.ones((2, 3, 6, 6), np.float32)}, ValueError, "bias must broadcast to"),
    "window": ({"local_window_size": (1, 2, 3)}, TypeError, "local_window_size must be an integer"),
    "window of text": ({"local_window_size": "x"}, TypeError, "for left and right, got 'x'"),
    "lengths": (
        {"key_value_seq_lengths": np.ones(3, np.int32)},
        ValueError,
        "key_value_seq_lengths must be int32 of shape",
    ),
    "value": ({"value": np.ones((2, 6, 1, 4), np.float32)}, ValueError, "the shape of key"),
    "query": ({"query": np.ones((2, 6, 2, 5), np.float32)}, ValueError, "a dim of 4"),
    "axes": ({"query": np.ones((6, 4), np.float32)}, ValueError, "query must have the axes"),
    "type": ({"query": np.ones((2, 6, 2, 4), np.float16)}, ValueError, "query must be of float32"),
    "heads": (
        {"query": np.ones((2, 6, 3, 4), np.float32)},
        ValueError,
        "the heads of query must be a multiple",
    ),
}


@pytest.mark.feature("T15")
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    import tilefold.jax

    options, kind, words = BAD[name]
    usual = dict.fromkeys(("query", "key", "value"), np.ones((2, 6, 2, 4), np.float32))
    with pytest.raises(kind, match=words) as raised:
        tilefold.jax.dot_product_attention(**{**usual, **options})
    assert "\n" not in str(raised.value)


# Layers -----------------------------------------------------------------------------------------


def test_flax_nnx() -> None:
    """The layer's own mask, and a rule beside it; two batch axes, or none."""
    nnx = pytest.importorskip("flax.nnx", reason="flax is not installed")
    import tilefold.jax

    def layer(**options: Any) -> Any:
        return nnx.MultiHeadAttention(
            num_heads=4, in_features=16, decode=False, rngs=nnx.Rngs(0), **options
        )

    many = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 10, 16)), jnp.float32)
    seen = nnx.make_attention_mask(jnp.arange(10) < 10, jnp.arange(10) < 7)
    both = (seen > 0) & causal().to_dense(10, 10)
    ruled = tilefold.jax.attention_fn(mask=causal())
    plain = tilefold.jax.attention_fn()

    @nnx.jit
    def call(ours: Any, free: Any, theirs: Any) -> Any:
        masks = [jnp.broadcast_to(mask, (2, 3, 1, 10, 10)) for mask in (seen, both)]
        return (
            (ours(many, mask=masks[0]), theirs(many, mask=masks[1])),
            (free(many[0, 0], mask=masks[1][0, 0]), theirs(many[0, 0], mask=masks[1][0, 0])),
        )

    x = many.reshape(2, 3, 10, 4, 4)
    passed, known = plain(x, x, x, is_causal=True), ruled(x, x, x)
    np.testing.assert_allclose(passed, known, atol=2e-5)
    for got, want in call(layer(attention_fn=ruled), layer(attention_fn=plain), layer()):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_flax_nnx_drops_weights() -> None:
    nnx = pytest.importorskip("flax.nnx", reason="flax is not installed")
    import tilefold.jax

    options = {"num_heads": 2, "in_features": 8, "dropout_rate": 0.5, "decode": False}
    attend = tilefold.jax.attention_fn()
    layer = nnx.MultiHeadAttention(**options, attention_fn=attend, rngs=nnx.Rngs(0))
    x = jnp.ones((1, 12, 8))

    @nnx.jit
    def call(layer: Any, rngs: Any) -> Any:
        return layer(x, deterministic=False, rngs=rngs)

    one, other, again = (call(layer, nnx.Rngs(n)) for n in (1, 2, 1))
    assert (one != other).any() and (one == again).all()
    with pytest.raises(NotImplementedError, match="sow_weights=False"):
        layer(x, deterministic=True, sow_weights=True)


def test_dropout_needs_its_key() -> None:
    import tilefold.jax

    q = jnp.ones((1, 2, 2, 4))
    with pytest.raises(ValueError, match="dropout_rng must be a key"):
        tilefold.jax.attention_fn()(q, q, q, dropout_rate=0.5)


def test_flax_linen() -> None:
    linen = pytest.importorskip("flax.linen", reason="flax is not installed")
    import tilefold.jax

    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 10, 16)), jnp.float32)
    mask = linen.make_causal_mask(jnp.ones((2, 10)))

    def layer(**options: Any) -> Any:
        return linen.MultiHeadDotProductAttention(num_heads=4, **options)

    def slopes(each: Any, weights: Any, **options: Any) -> Any:
        def loss(weights: Any) -> Any:
            return (each.apply(weights, x, **options) ** 2).sum()

        return jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(weights))

    weights = jax.jit(layer().init)(jax.random.key(0), x)
    want = slopes(layer(), weights, mask=mask)
    ours = layer(attention_fn=tilefold.jax.attention_fn())
    ruled = layer(attention_fn=tilefold.jax.attention_fn(mask=causal()))
    for found in (slopes(ours, weights, mask=mask), slopes(ruled, weights)):
        for got, expected in zip(found, want, strict=True):
            np.testing.assert_allclose(got, expected, atol=2e-4)


def test_equinox() -> None:
    """A layer of one's own, mapped over the batch and trained for a step."""
    eqx = pytest.importorskip("equinox", reason="equinox is not installed")
    import tilefold.jax

    class Layer(eqx.Module):
        make: Any
        join: Any
        heads: int = eqx.field(static=True)

        def __init__(self, dim: int, heads: int, key: Any) -> None:
            one, two = jax.random.split(key)
            self.make = eqx.nn.Linear(dim, 3 * dim, key=one)
            self.join = eqx.nn.Linear(dim, dim, key=two)
            self.heads = heads

        def __call__(self, x: Any) -> Any:
            """x of one entry, (length, dim)."""
            q, k, v = jnp.split(jax.vmap(self.make)(x), 3, axis=1)
            laid = [y.reshape(1, len(x), self.heads, -1) for y in (q, k, v)]
            o = tilefold.jax.attention(*laid, mask=causal() & local(4), layout="bnhd")
            return jax.vmap(self.join)(o.reshape(len(x), -1))

    layer = Layer(16, 4, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (3, 10, 16))

    @eqx.filter_jit
    def step(layer: Any) -> Any:
        return eqx.filter_value_and_grad(lambda layer: (jax.vmap(layer)(x) ** 2).mean())(layer)

    first, slopes = step(layer)
    moved = eqx.apply_updates(layer, jax.tree.map(lambda g: -0.1 * g, slopes))
    assert step(moved)[0] < first
    assert all(jnp.isfinite(x).all() and x.any() for x in jax.tree.leaves(slopes))
