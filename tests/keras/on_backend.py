"""What Keras does with tilefold, on the backend that KERAS_BACKEND names.

`test_keras.py` runs this file in a process for each backend. Keras' own attention and the float64
reference are what results are compared with.
"""

from __future__ import annotations

import doctest
import json
import re
import threading
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from numpy.typing import NDArray
from paths import ROOT

import tilefold
from tilefold import alibi, bias, causal, documents, local, softcap
from tilefold.keras import Attention, MultiHeadAttention, disable, enable, enabled
from tilefold.layers import exchange, tensors
from tilefold.problems import reference

pytestmark = [
    pytest.mark.slow,
    # Keras 3.15 on torch asks NumPy 2 for arrays in the old way.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

Array = NDArray[Any]
RANDOM = np.random.default_rng(0)
BACKEND = keras.backend.backend()


def normal(*shape: int, dtype: str = "float32") -> Array:
    return RANDOM.standard_normal(shape).astype(dtype)


def gradients(function: Callable[..., Any], *given: Array) -> list[Array]:
    """The value of a function of tensors, and the gradients of the sum of its squares."""
    if BACKEND == "torch":
        import torch

        leaves = [torch.tensor(x, requires_grad=True) for x in given]
        value = function(*leaves)
        found = torch.autograd.grad((value**2).sum(), leaves)
    elif BACKEND == "jax":
        import jax

        def loss(*leaves: Any) -> Any:
            value = function(*leaves)
            return (value**2).sum(), value

        arguments = tuple(range(len(given)))
        found, value = jax.jit(jax.grad(loss, arguments, has_aux=True))(*given)
    else:
        import tensorflow as tf

        leaves = [tf.constant(x) for x in given]
        with tf.GradientTape() as tape:
            tape.watch(leaves)
            value = function(*leaves)
            loss = tf.reduce_sum(value**2)
        found = tape.gradient(loss, leaves)
    return [ops.convert_to_numpy(x) for x in (value, *found)]


def assert_close(found: list[Array], wanted: list[Array], tolerance: float = 2e-5) -> None:
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tensors.Hidden]:
    """What hides pairs in each call that runs here."""
    seen: list[tensors.Hidden] = []

    def attend(q: Any, k: Any, v: Any, hidden: tensors.Hidden, *more: Any, **options: Any) -> Any:
        seen.append(hidden)
        return tensors.attend(q, k, v, hidden, *more, **options)

    monkeypatch.setattr(exchange, "attend", attend)
    return seen


HEADS = {"k": (2, 7, 2, 8), "v": (2, 7, 2, 8)}
MASK = RANDOM.random((2, 1, 5, 7)) > 0.4
MASK[..., 0] = True
OPERATIONS: dict[str, dict[str, Any]] = {
    "all keys": {},
    "causal, flash asked for": {"is_causal": True, "flash_attention": True},
    "a mask": {"mask": MASK, "scale": 0.5, "flash_attention": False},
    "a mask of numbers, causal": {"mask": MASK.astype("int32"), "is_causal": True},
    "a bias": {"bias": normal(1, 4, 5, 7)},
    "a bias for all heads, causal": {"bias": normal(5, 7), "is_causal": True},
}


@pytest.mark.parametrize("case", OPERATIONS)
def test_the_operation_gives_what_keras_gives(case: str, ran: list[tensors.Hidden]) -> None:
    options = dict(OPERATIONS[case])
    given = [normal(2, 5, 4, 8), normal(2, 7, 2, 8), normal(2, 7, 2, 8)]
    if "bias" in options:
        given.append(options.pop("bias"))

    def attention(q: Any, k: Any, v: Any, *added: Any) -> Any:
        more = {"bias": added[0]} if added else {}
        return ops.dot_product_attention(q, k, v, **options, **more)

    with enabled():
        found = gradients(attention, *given)
    assert len(ran) == 1
    options.pop("flash_attention", None)
    if len(given) == 4 and options.pop("is_causal", False):  # Keras on torch takes one of both
        given[3] = np.where(np.tri(5, 7, dtype=bool), given[3], np.float32(-1e9))
    assert_close(found, gradients(attention, *given))
    assert len(ran) == 1


@pytest.mark.parametrize("kind", ["multi-head", "grouped"])
def test_layers_keep_the_structure_of_causal_calls(kind: str, ran: list[tensors.Hidden]) -> None:
    made: Any = keras.layers.MultiHeadAttention(4, 8)
    if kind == "grouped":
        made = keras.layers.GroupQueryAttention(8, 4, 2)
    x = ops.convert_to_tensor(normal(2, 6, 16))
    wanted = [ops.convert_to_numpy(made(x, x, use_causal_mask=True))]
    enable()
    assert_close([ops.convert_to_numpy(made(x, x, use_causal_mask=True))], wanted)
    assert ran == [tensors.Hidden(causal(align="start"))]
    made(x, x, use_causal_mask=True, attention_mask=np.ones((2, 6, 6), bool))
    assert len(ran[1].masks) == 1
    disable()
    made(x, x)
    assert len(ran) == 2


def test_a_model_of_before_runs_here_and_learns(ran: list[tensors.Hidden]) -> None:
    given = keras.Input((6, 16))
    x = keras.layers.MultiHeadAttention(2, 8)(given, given, use_causal_mask=True)
    model = keras.Model(given, keras.layers.Dense(1)(x))
    rows, wanted = normal(8, 6, 16), normal(8, 6, 1)
    start = model.get_weights()

    def losses() -> list[float]:
        model.set_weights(start)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        history = model.fit(rows, wanted, batch_size=4, epochs=2, shuffle=False, verbose=0)
        found: list[float] = history.history["loss"]
        return found

    with enabled():
        here = losses()
    assert ran
    assert here == pytest.approx(losses(), rel=1e-5) and here[1] < here[0]


def test_the_function_is_exchanged_once_and_put_back() -> None:
    from keras.src.backend import nn

    own = nn.dot_product_attention
    enable()
    ours = nn.dot_product_attention
    enable()
    assert nn.dot_product_attention is ours is not own
    with enabled(), enabled():
        disable()
        assert nn.dot_product_attention is ours
    assert nn.dot_product_attention is own
    with enabled():
        nn.dot_product_attention = wrapper = lambda *given, **options: None
    assert nn.dot_product_attention is wrapper, "what another library put there stays"
    nn.dot_product_attention = own
    with enabled():
        assert nn.dot_product_attention is not own
    assert nn.dot_product_attention is own


def test_blocks_of_several_threads_end_in_any_order() -> None:
    from keras.src.backend import nn

    own, inside, go = nn.dot_product_attention, threading.Event(), threading.Event()

    def first() -> None:
        with enabled():
            inside.set()
            go.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(10)
    with enabled():
        go.set()
        thread.join()
        assert nn.dot_product_attention is not own
    assert nn.dot_product_attention is own


def test_what_cannot_run_here_is_said_once_and_left_to_keras(
    monkeypatch: pytest.MonkeyPatch, ran: list[tensors.Hidden]
) -> None:
    monkeypatch.setitem(tensors._DEVICES, BACKEND, lambda tensor: "tpu")
    q = ops.convert_to_tensor(normal(1, 3, 2, 4))
    wanted = ops.convert_to_numpy(ops.dot_product_attention(q, q, q))
    said = "Keras computes this attention itself, tilefold does not: it serves Keras on processors,"
    with enabled():
        with pytest.warns(UserWarning, match=f"^{said} got a tensor on tpu$"):
            found = ops.dot_product_attention(q, q, q)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ops.dot_product_attention(q, q, q)
    assert not ran
    np.testing.assert_array_equal(ops.convert_to_numpy(found), wanted)


RULES: dict[str, dict[str, Any]] = {
    "a window with sinks": {"mask": causal() & local(3), "sinks": True},
    "scores from strings": {"mask": "causal()", "score": "[softcap(2.0), alibi()]", "scale": 0.7},
    "many sinks": {"score": alibi(), "sinks": 3},
}


@pytest.mark.parametrize("case", RULES)
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
        "layout": "bnhd",
    }
    wide = [x.astype(np.float64) for x in (q, k, v)]
    o, lse = tilefold.attention(*wide, **named, return_lse=True, impl="composed")
    slopes = tilefold.attention_backward(2 * o, *wide, o, lse, **named)
    assert_close([x.astype(np.float64) for x in found], [o, *slopes[:3]])


def reference_of(q: Array, k: Array, v: Array, **named: Any) -> Array:
    """`reference.attention` in Keras' order of axes."""
    wide = [x.astype(np.float64).transpose(0, 2, 1, 3) for x in (q, k, v)]
    o: Array = reference.attention(*wide, **named)[0]
    return o.transpose(0, 2, 1, 3)


def test_masks_of_sequences_hide_keys_and_queries() -> None:
    q, k, v = (normal(2, 6, 2, 8) for _ in range(3))
    ends = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], bool)
    layer = Attention(mask=local(3))
    found = ops.convert_to_numpy(layer(q, k, v, query_mask=ends, key_mask=ends, value_mask=ends))
    seen = ends[:, None, :, None] & ends[:, None, None, :]
    wanted = reference_of(q, k, v, mask=local(3) & tilefold.dense(seen))
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)
    assert not found[0, 4:].any()


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


def test_weights_of_keras_layer_fit() -> None:
    theirs: Any = keras.layers.MultiHeadAttention(2, 8, value_dim=6, output_shape=5)
    ours = MultiHeadAttention(2, 8, value_dim=6, output_shape=5, kernel_regularizer="l2")
    x, y = normal(2, 5, 16), normal(2, 7, 16)
    seen = RANDOM.random((2, 5, 7)) > 0.3
    theirs(x, y), ours(x, y)
    ours.set_weights(theirs.get_weights())
    for options in ({}, {"use_causal_mask": True}, {"attention_mask": seen}):
        results = [ops.convert_to_numpy(layer(x, y, **options)) for layer in (theirs, ours)]
        assert_close(results[:1], results[1:])
    assert [w.path.split("/")[1:] for w in ours.weights] == [
        w.path.split("/")[1:] for w in theirs.weights
    ]
    assert len(ours.losses) == 4


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
        4,
        8,
        num_key_heads=2,
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


def error_of(make: Callable[[], Any]) -> str:
    with pytest.raises((TypeError, ValueError)) as caught:
        make()
    return str(caught.value)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a rule of arrays": (
        lambda: Attention(mask=documents([0, 0, 1])).get_config(),
        "mask must have a string to be saved, and documents(ids[3]) carries arrays; give the layer"
        " a mask without arrays, or make the arrays part of each call",
    ),
    "a score of arrays": (
        lambda: MultiHeadAttention(2, 4, score=bias(normal(3, 3))).get_config(),
        "score must have a string to be saved, and bias(array[3x3]) carries arrays; give the layer"
        " a score without arrays, or make the arrays part of each call",
    ),
    "sinks": (
        lambda: Attention(sinks=-1),
        "sinks must be True, False or a number of sinks, got -1",
    ),
    "a string": (
        lambda: Attention(mask="causal"),
        "mask string, column 1: a rule is called: write causal(...)",
    ),
    "dropout": (lambda: Attention(dropout=1.0), "dropout must be a number in [0, 1), got 1.0"),
    "three axes": (
        lambda: Attention()(*[normal(2, 5, 8)] * 3),
        "query must have four axes, (batch, sequence, heads, dim), got shape (2, 5, 8)",
    ),
    "four axes": (
        lambda: MultiHeadAttention(2, 4)(*[normal(2, 5, 2, 8)] * 2),
        "query must have three axes, (batch, sequence, size), got shape (2, 5, 2, 8)",
    ),
    "key heads": (
        lambda: MultiHeadAttention(4, 8, num_key_heads=3),
        "num_key_heads must divide num_heads, which is 4, got 3",
    ),
    "no heads": (
        lambda: MultiHeadAttention(0, 8),
        "num_heads must be an integer of at least 1, got 0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_one_line(case: str) -> None:
    make, said = REFUSED[case]
    assert re.search(re.escape(said), error_of(make))


def test_a_language_model_learns_a_text() -> None:
    import keras_text

    _, losses, letters = keras_text.trained(epochs=3)
    assert losses[0] < np.log(len(letters)) and losses[-1] < 2.6


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "keras.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) > 5
    for block in blocks:
        exec(compile(block.replace("2048", "128"), "keras.md", "exec"), names)
    assert tuple(names["y"].shape) == (1, 128, 512) and tuple(names["o"].shape) == (1, 128, 8, 64)


HOMES = ["keras", "layers.exchange", "layers.attention", "layers.multi_head"]


@pytest.mark.parametrize("module", HOMES)
def test_examples_in_docstrings_run(module: str) -> None:
    found = doctest.testmod(import_module(f"tilefold.{module}"))
    assert found.attempted and not found.failed
