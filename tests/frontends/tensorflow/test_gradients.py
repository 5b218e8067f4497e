"""Gradients are not lost: tapes outside of functions, persistent tapes, and captured constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from compare import assert_near
from tensorflow_calls import MARKS, Tensor, framework

import tilefold

pytestmark = MARKS

HEADS = 2


def query() -> Tensor:
    random = np.random.default_rng(4)
    return framework().constant(random.normal(size=(1, HEADS, 9, 8)).astype("f4"))


def sloped(q: Tensor, slopes: Tensor, impl: str = "kernel") -> Tensor:
    return tilefold.attention(q, q, q, score=tilefold.alibi(slopes), impl=impl)


def first(
    call: Callable[[Tensor], Tensor], q: Tensor, other: Tensor, persistent: bool = False
) -> list[Tensor]:
    """The gradients of a call with respect to q and to another tensor that it captures."""
    with framework().GradientTape(persistent=persistent) as tape:
        tape.watch([q, other])
        o = call(q)
    return [*tape.gradient(o, [q, other])]


def second(call: Callable[[Tensor], Tensor], q: Tensor, other: Tensor) -> list[Tensor]:
    """Gradients of the square of the gradient of q, which alone is watched inside."""
    tf = framework()
    with tf.GradientTape() as outer:
        outer.watch([q, other])
        with tf.GradientTape() as inner:
            inner.watch(q)
            o = call(q)
        slope = inner.gradient(o, q)
        loss = tf.reduce_sum(slope**2)
    return [*outer.gradient(loss, [q, other])]


def near(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert_near("gradient", a, b, 1e-5 * max(1.0, float(np.abs(b).max())))


def test_small_tensors_that_a_function_captures_have_gradients() -> None:
    """TensorFlow copies them into the graph as constants."""
    tf, q = framework(), query()
    slopes = tf.constant([0.1, 0.2])
    want = first(lambda q: sloped(q, slopes, "composed"), q, slopes)
    run = tf.function(lambda q: sloped(q, slopes))
    near(first(run, q, slopes), want)
    near(first(run, q, slopes, persistent=True), want)

    @tf.function
    def inside(q: Tensor) -> Any:
        constant = tf.constant([0.1, 0.2])
        return tf.gradients(sloped(q, constant), [q, constant])

    near(inside(q), want)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "function"])
def test_an_inner_tape_that_does_not_watch_an_array(traced: bool) -> None:
    """The second derivative has the array, though the first one did not ask for it."""
    tf, q = framework(), query()
    slopes = tf.constant([0.1, 0.2])
    want = second(lambda q: sloped(q, slopes, "composed"), q, slopes)
    run = (lambda q: sloped(q, slopes)) if not traced else tf.function(lambda q: sloped(q, slopes))
    near(second(run, q, slopes), want)


def test_gradients_that_nothing_asks_for_are_not_computed() -> None:
    """Those of NumPy's arrays, of stopped tensors, and of integers."""
    tf, q = framework(), query()

    def made(slopes: Any, change: Callable[[Any], Any] = lambda x: x) -> int:
        """The number of gradients beside those of q, k and v."""

        def run(q: Tensor, ids: Tensor) -> Any:
            score, mask = tilefold.alibi(change(slopes)), tilefold.documents(ids)
            return tf.gradients(tilefold.attention(q, q, q, score=score, mask=mask), q)

        graph = tf.function(run).get_concrete_function(q, ids).graph
        (back,) = (op for op in graph.get_operations() if op.type.startswith("TilefoldAttentionG"))
        return len(back.get_attr("G"))

    slopes = np.array([0.1, 0.2], "f4")
    ids = tf.constant([[0] * 4 + [1] * 5])
    assert made(tf.constant(slopes)) == made(tf.Variable(slopes)) == 1
    assert made(slopes) == made(tf.constant(slopes), tf.stop_gradient) == 0


@pytest.mark.feature("T02")
def test_tapes_outside_of_what_xla_compiles() -> None:
    """Persistent and nested ones ask XLA's operator itself for gradients."""
    from tilefold.frontends.tensorflow import compiled

    if reason := compiled.missing():
        pytest.skip(f"the XLA of this TensorFlow takes no function of ours: {reason}")
    tf, q = framework(), query()
    slopes = tf.constant([0.1, 0.2])
    run = tf.function(lambda q: sloped(q, slopes), jit_compile=True)
    near(
        first(run, q, slopes, persistent=True),
        first(lambda q: sloped(q, slopes, "composed"), q, slopes),
    )
    near(second(run, q, slopes), second(lambda q: sloped(q, slopes, "composed"), q, slopes))
