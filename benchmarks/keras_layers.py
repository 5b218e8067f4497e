"""What `tilefold.keras.enable()` saves in Keras' own MultiHeadAttention, on each backend.

Each backend has a process of its own. There the layer (8 heads of 64, width 512, one sequence of
2,048 tokens, float32) runs forward and backward turn by turn: as Keras computes it, and with
`enable()`; all keys, and causal. Gradients are those of the input and of all weights. JAX and
TensorFlow compile the step (`jax.jit`, `tf.function`), as `fit` does; torch runs it eagerly.

Prints one JSON document: the least milliseconds of each job, and their ratios.

    python benchmarks/keras_layers.py --save benchmarks/results/keras_layers.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

import tilefold
from tilefold.measuring.environment import environment
from tilefold.measuring.timing import turn_by_turn

BACKENDS = ("tensorflow", "jax", "torch")
HEADS, DIM, WIDTH = 8, 64, 512

Step = Callable[[], Any]


def main() -> None:
    """Measure each backend in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each backend")
    parser.add_argument("--save", type=Path, help="write the document to this file too")
    parser.add_argument("--child", choices=BACKENDS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        print(json.dumps(measured(chosen.child, chosen.tokens, chosen.seconds)))
        return
    shape = {"heads": HEADS, "key_dim": DIM, "width": WIDTH, "tokens": chosen.tokens}
    document: dict[str, Any] = {**environment(), "dtype": "float32", **shape}
    for backend in chosen.backends:
        options = ["--tokens", str(chosen.tokens), "--seconds", str(chosen.seconds)]
        done = subprocess.run(
            [sys.executable, __file__, "--child", backend, *options],
            env={**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        document[backend] = json.loads(done.stdout.splitlines()[-1])
    text = json.dumps(document, indent=1) + "\n"
    sys.stdout.write(text)
    if chosen.save:
        chosen.save.write_text(text, encoding="utf-8")


def measured(backend: str, tokens: int, seconds: float) -> dict[str, Any]:
    """The least milliseconds of each job on a backend, and the ratios."""
    import keras

    from tilefold.keras import enabled

    keras.utils.set_random_seed(0)
    layer = keras.layers.MultiHeadAttention(HEADS, DIM)
    x = np.random.default_rng(0).standard_normal((1, tokens, WIDTH), np.float32)
    layer.build(x.shape, x.shape)
    jobs: dict[str, Step] = {}
    for mask in ("all keys", "causal"):
        for name, scope in (("keras", nullcontext), ("tilefold", enabled)):
            step = _STEPS[backend](layer, x, mask == "causal")
            jobs[f"{mask}, {name}"] = _within(scope, step)
    results = {name: job() for name, job in jobs.items()}  # compiles
    error = max(
        float(abs(a - b).max())
        for mask in ("all keys", "causal")
        for a, b in zip(results[f"{mask}, keras"], results[f"{mask}, tilefold"], strict=True)
    )
    times = turn_by_turn(jobs, seconds=seconds)
    best = {name: round(1e3 * min(found), 2) for name, found in times.items()}
    return {
        "version": keras.__version__,
        "threads": tilefold.get_num_threads(),
        "milliseconds": best,
        "keras_over_tilefold": {
            mask: round(best[f"{mask}, keras"] / best[f"{mask}, tilefold"], 2)
            for mask in ("all keys", "causal")
        },
        "largest difference of gradients": error,
    }


def _within(scope: Callable[[], Any], step: Step) -> Step:
    def run() -> Any:
        with scope():
            return step()

    return run


def _torch(layer: Any, x: Any, causal: bool) -> Step:
    import torch

    given = torch.tensor(x, requires_grad=True)
    leaves = [given, *[weight.value for weight in layer.trainable_weights]]

    def step() -> Any:
        loss = layer(given, given, use_causal_mask=causal).square().sum()
        return torch.autograd.grad(loss, leaves)

    return step


def _jax(layer: Any, x: Any, causal: bool) -> Step:
    import jax

    weights = [weight.value for weight in layer.trainable_weights]
    others = [weight.value for weight in layer.non_trainable_weights]

    def loss(weights: Any, x: Any) -> Any:
        y, _ = layer.stateless_call(weights, others, x, x, use_causal_mask=causal)
        return (y**2).sum()

    compiled = jax.jit(jax.grad(loss, (1, 0)))
    given = jax.numpy.asarray(x)

    def step() -> Any:
        dx, slopes = jax.block_until_ready(compiled(weights, given))
        return [dx, *slopes]

    return step


def _tensorflow(layer: Any, x: Any, causal: bool) -> Step:
    import tensorflow as tf

    given = tf.constant(x)
    weights = [weight.value for weight in layer.trainable_weights]

    @tf.function  # type: ignore[untyped-decorator]  # mypy does not follow TensorFlow
    def step() -> Any:
        with tf.GradientTape() as tape:
            tape.watch(given)
            loss = tf.reduce_sum(layer(given, given, use_causal_mask=causal) ** 2)
        return tape.gradient(loss, [given, *weights])

    def run() -> Any:
        return [x.numpy() for x in step()]

    return run


_STEPS = {"torch": _torch, "jax": _jax, "tensorflow": _tensorflow}


if __name__ == "__main__":
    main()
