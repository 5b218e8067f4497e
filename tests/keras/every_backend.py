"""What Keras does with tilefold on each backend.

`test_keras.py` runs this file in a process for each. Keras' own attention and the definition in
float64 are what results are compared with.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_checks import BACKEND, MARKS, RANDOM, Array, Seen, assert_close, gradients, normal

import tilefold
from tilefold import alibi, causal, local, softcap
from tilefold.keras import Attention, MultiHeadAttention, disable, enable, enabled
from tilefold.layers import tensors

pytestmark = MARKS

MASK = RANDOM.random((2, 1, 5, 7)) > 0.4
MASK[..., 0] = True
OPERATIONS: dict[str, dict[str, Any]] = {
    "causal, flash asked for": {"is_causal": True, "flash_attention": True},
    "all keys": {},
    "a mask": {"mask": MASK, "scale": 0.5, "flash_attention": False},
    "a mask, causal": {"mask": MASK, "is_causal": True},
    "a bias for all heads, causal": {"bias": normal(1, 1, 5, 7), "is_causal": True},
    "a bias": {"bias": normal(1, 4, 5, 7)},
}


def defined(q: Array, k: Array, v: Array, **named: Any) -> list[Array]:
    """What `gradients` of attention returns, from the definition in float64."""
    wide = [x.astype(np.float64) for x in (q, k, v)]
    named["layout"] = "bnhd"
    o, lse = tilefold.attention(*wide, **named, return_lse=True, impl="composed")
    return [o, *tilefold.attention_backward(2 * o, *wide, o, lse, **named)]


@pytest.mark.parametrize("case", list(OPERATIONS)[:: 1 if BACKEND == "torch" else 2])
def test_the_operation_gives_what_it_is_defined_to_give(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran, options = Seen(monkeypatch), dict(OPERATIONS[case])
    given = [normal(2, 5, 4, 8), normal(2, 7, 2, 8), normal(2, 7, 2, 8)]
    rule = causal(align="start") if "is_causal" in options else tilefold.full()
    named = {"mask": rule & tilefold.dense(options.get("mask", True)), "score": None}
    named["scale"] = options.get("scale")
    if "bias" in options:
        given.append(options.pop("bias"))
        named["score"] = tilefold.bias(given[3].astype(np.float64))

    def attention(q: Any, k: Any, v: Any, *added: Any) -> Any:
        more = {"bias": added[0]} if added else {}
        return ops.dot_product_attention(q, k, v, **options, **more)

    with enabled():
        found = gradients(attention, *given)
    assert len(ran) == 1
    assert_close(found, defined(*given[:3], **named))


MADE = {
    "multi-head": lambda: keras.layers.MultiHeadAttention(2, 8),
    "grouped": lambda: keras.layers.GroupQueryAttention(8, 2, 1),
}


@pytest.mark.parametrize("kind", MADE if BACKEND == "torch" else ["multi-head"])
def test_layers_keep_the_structure_of_causal_calls(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, ran = MADE[kind](), Seen(monkeypatch)
    x = ops.convert_to_tensor(normal(2, 6, 16))
    wanted = [ops.convert_to_numpy(made(x, x, use_causal_mask=True))]
    enable()
    assert_close([ops.convert_to_numpy(made(x, x, use_causal_mask=True))], wanted)
    if "use_causal_mask" in inspect.signature(made._compute_attention).parameters:
        assert ran == [tensors.Hidden(causal(align="start"))]
    else:  # before version 3.15 Keras makes an array of the causal mask
        assert len(ran[0].masks) == 1
    made(x, x, use_causal_mask=True, attention_mask=np.ones((2, 6, 6), bool))
    assert len(ran[1].masks) == 1
    disable()
    made(x, x)
    assert len(ran) == 2


def test_a_model_of_before_runs_here_and_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = Seen(monkeypatch)
    keras.utils.set_random_seed(0)
    given = keras.Input((6, 16))
    x = keras.layers.MultiHeadAttention(2, 8)(given, given, use_causal_mask=True)
    model = keras.Model(given, keras.layers.Dense(1)(x))
    rows, wanted = normal(8, 6, 16), normal(8, 6, 1)
    start = model.get_weights()

    def losses() -> list[float]:
        model.set_weights(start)
        model.compile(keras.optimizers.SGD(0.03), "mse")
        history = model.fit(rows, wanted, batch_size=4, epochs=2, shuffle=False, verbose=0)
        found: list[float] = history.history["loss"]
        return found

    with enabled():
        here = losses()
    assert ran
    assert here == pytest.approx(losses(), rel=1e-5) and here[1] < here[0]


RULES: dict[str, dict[str, Any]] = {
    "everything": {
        "mask": causal() & local(3),
        "score": "[softcap(2.0), alibi()]",
        "sinks": 3,
        "scale": 0.7,
    },
    "one sink": {"mask": "causal()", "sinks": True},
    "a score": {"score": alibi()},
}


@pytest.mark.parametrize("case", RULES if BACKEND == "torch" else ["everything"])
def test_attention_is_that_of_the_reference(case: str) -> None:
    layer = Attention(**RULES[case])
    q, k, v = (normal(2, 6, heads, 8) for heads in (4, 2, 2))
    layer(q, k, v)
    number = layer.number_of_sinks
    sinks = normal(4, number)
    if number:
        layer.set_weights([sinks])
    found = gradients(lambda *given: layer(*given), q, k, v)
    named: dict[str, Any] = {
        "mask": layer.mask,
        "scale": layer.scale,
        "score": layer.score,
        "sinks": sinks.astype(np.float64) if number else None,
    }
    assert_close(found, defined(q, k, v, **named)[:4])


def test_variables_in_scores_and_as_sinks_learn() -> None:
    q = normal(1, 5, 2, 8)
    added, sinks = normal(2, 1, 5), normal(2)

    class Scored(keras.layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.added = self.add_weight(shape=added.shape, initializer="zeros")
            self.sinks = self.add_weight(shape=sinks.shape, initializer="zeros")

        def call(self, x: Any) -> Any:
            o = tilefold.attention(
                x, x, x, score=tilefold.bias(self.added), sinks=self.sinks, layout="bnhd"
            )
            return ops.sum(o, axis=(1, 2, 3))[:, None]

    layer = Scored()
    model = keras.Sequential([layer])
    model.compile("sgd", "mse")
    model.fit(q, np.ones((1, 1), np.float32), verbose=0)
    for weight in (layer.added, layer.sinks):
        assert np.abs(ops.convert_to_numpy(weight)).max() > 0


def test_masks_of_earlier_layers_arrive() -> None:
    given = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(9, 16, mask_zero=True)(given)
    x = MultiHeadAttention(2, 8, mask=causal(), num_key_heads=1)(x, x)
    model = keras.Model(given, x)
    long = np.array([[1, 2, 3, 4, 0, 0]], np.int32)
    found, short = (model.predict(rows, verbose=0) for rows in (long, long[:, :4]))
    np.testing.assert_allclose(found[:, :4], short, rtol=1e-5, atol=1e-6)
    embedded = model.layers[1](long)
    assert embedded._keras_mask is not None and model(long)._keras_mask is not None


def test_dropout_falls_in_training_alone_and_repeats_with_the_seed() -> None:
    q = normal(2, 16, 2, 8)
    plain = ops.convert_to_numpy(Attention()(q, q, q))
    layers = [Attention(dropout=0.5, seed=7) for _ in range(2)]
    np.testing.assert_array_equal(ops.convert_to_numpy(layers[0](q, q, q)), plain)
    first, again = (
        [ops.convert_to_numpy(layer(q, q, q, training=True)) for _ in range(2)] for layer in layers
    )
    np.testing.assert_array_equal(first, again)
    assert abs(first[0] - first[1]).max() > 0.1 < abs(first[0] - plain).max()
    many = np.mean([layers[0](q, q, q, training=True) for _ in range(400)], axis=0)
    assert abs(many - plain).max() < 0.5 * abs(first[0] - plain).max()


def test_half_types_follow_the_policy_of_the_layer() -> None:
    x = normal(2, 5, 16)
    layer = MultiHeadAttention(2, 8, sinks=True, dtype="mixed_bfloat16")
    assert keras.backend.standardize_dtype(layer(x, x).dtype) == "bfloat16"
    assert {w.dtype for w in layer.weights} == {"float32"}


def test_a_model_is_saved_and_read(tmp_path: Path) -> None:
    given = keras.Input((None, 16))
    layer = MultiHeadAttention(
        2,
        8,
        num_key_heads=1,
        mask=causal() & (local(3) | tilefold.prefix(1)),
        score=[softcap(30), alibi()],
        sinks=2,
        dropout=0.1,
        kernel_initializer="he_normal",
    )
    x = keras.layers.Reshape((-1, 4, 4))(layer(given, given))
    model = keras.Model(given, Attention(mask=local(2), seed=3)(x, x, x))
    rows = normal(2, 5, 16)
    model.save(tmp_path / "model.keras")
    read = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(model.predict(rows, verbose=0), read.predict(rows, verbose=0))
    for old, new in zip(model.layers, read.layers, strict=True):
        assert json.dumps(old.get_config()) == json.dumps(new.get_config())
    assert read.layers[1].mask == layer.mask and read.layers[1].core.score == layer.core.score


def test_a_language_model_learns_a_text() -> None:
    import keras_text

    model, losses, letters = keras_text.trained(epochs=3)
    assert losses[0] < np.log(len(letters)) and losses[-1] < 2.6
    assert ops.convert_to_numpy(model.get_layer("attention").core.sinks).any(), "sinks learn"
