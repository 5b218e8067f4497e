"""What does not depend on Keras' backend: `test_keras.py` runs this file on torch alone."""

from __future__ import annotations

import doctest
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
from keras_checks import BACKEND, MARKS, RANDOM, Array, Seen, assert_close, normal
from paths import ROOT

import tilefold
from tilefold import bias, documents, local
from tilefold.keras import Attention, MultiHeadAttention, disable, enable, enabled
from tilefold.layers import exchange, tensors
from tilefold.problems import reference

pytestmark = MARKS


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


def test_the_precision_of_products_is_that_of_enable(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def attend(*given: Any, precision: str, **options: Any) -> Any:
        asked.append(precision)
        return tensors.attend(*given, precision=precision, **options)

    monkeypatch.setattr(exchange, "attend", attend)
    q = normal(1, 3, 2, 8)
    enable("medium")
    try:
        keras.ops.dot_product_attention(q, q, q)
    finally:
        disable()
    with enabled():
        keras.ops.dot_product_attention(q, q, q)
    assert asked == ["medium", "highest"]
    with pytest.raises(ValueError, match="precision must be 'highest', 'high' or 'medium'"):
        enable("fast")


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
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran = Seen(monkeypatch)
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


def test_weights_of_keras_layer_fit() -> None:
    theirs: Any = keras.layers.MultiHeadAttention(2, 8, output_shape=5)
    ours = MultiHeadAttention(np.int64(2), 8, output_shape=(5,), kernel_regularizer="l2")
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
        "sinks must be an integer >= 0, got -1",
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
    "no width of values": (
        lambda: MultiHeadAttention(2, 4, value_dim=0),
        "value_dim must be an integer >= 1, got 0",
    ),
    "an output without size": (
        lambda: MultiHeadAttention(2, 4, output_shape=-1),
        "output_shape must be an integer >= 1, got -1",
    ),
    "a scale": (
        lambda: Attention(scale="x"),  # type: ignore[arg-type]
        "scale must be a finite number, or None for 1 / sqrt(dim), got 'x'",
    ),
    "a seed": (
        lambda: Attention(seed=1.5),  # type: ignore[arg-type]
        "seed must be an integer from -2**63 to 2**64 - 1, got 1.5",
    ),
    "heads that do not divide": (
        lambda: Attention()(keras.Input((3, 4, 8)), *[keras.Input((3, 3, 8))] * 2),
        "the heads of key must divide those of query, got 3 and 4: query is (None, 3, 4, 8) and"
        " key (None, 3, 3, 8)",
    ),
    "no heads": (
        lambda: MultiHeadAttention(0, 8),
        "num_heads must be an integer >= 1, got 0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_one_line(case: str) -> None:
    make, said = REFUSED[case]
    assert re.search(re.escape(said), error_of(make))


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
