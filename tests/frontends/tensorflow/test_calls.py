"""Attention on TensorFlow's tensors: every rule and variant with its gradients, against float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes  # noqa: F401  # NumPy knows the name "bfloat16" from it
import numpy as np
import pytest
from cases import RULES, Sizes
from compare import UNITS, assert_near
from tensorflow_calls import MARKS, Array, arrays, framework, with_gradients
from variants import VARIANTS, arrays_of, lengths_of

import tilefold
from tilefold.problems import dropout, reference
from tilefold.problems.attention import STATISTICS
from tilefold.problems.request import LAYOUTS
from tilefold.scores.score import as_score

pytestmark = MARKS

SIZES = Sizes(2, 4, 24, 30)
TOLERANCE = {"float64": 1e-12, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
SEED = -0x5EED_0123_4567_89AB
TYPES, ORDERS = [*TOLERANCE], [*LAYOUTS]


def drawn(sizes: Sizes, dtype: str, **more: tuple[int, ...]) -> dict[str, Array]:
    """Random q, k, v, do and dlse with two heads of queries for each head of keys, and more."""
    random = np.random.default_rng(11)
    batch, heads, len_q, len_k = sizes.batch, sizes.heads, sizes.len_q, sizes.len_k
    shapes = {
        "q": (batch, heads, len_q, 8),
        "k": (batch, heads // 2, len_k, 8),
        "v": (batch, heads // 2, len_k, 12),
        "do": (batch, heads, len_q, 12),
        **more,
    }
    found = {name: random.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    found["dlse"] = random.normal(size=(batch, heads, len_q)).astype(STATISTICS[dtype])
    return found


def compare(got: dict[str, Any], want: dict[str, Array], dtype: str) -> None:
    for name, tensor in got.items():
        allowed = TOLERANCE[dtype] + 2 * UNITS[tensor.dtype.name]
        largest = np.abs(want[name][np.isfinite(want[name])]).max(initial=1)
        assert_near(name, *arrays(tensor), want[name], allowed * largest)


@pytest.mark.feature("T01", "T03", "T04", "T05", "T06", "T09")
@pytest.mark.parametrize("number", range(0, len(RULES), 5), ids=[*RULES][::5])
def test_rules(number: int) -> None:
    """Eager, with gradients, and composed; types and layouts take turns."""
    tf = framework()
    mask = [*RULES.values()][number](SIZES)
    dtype, layout = TYPES[number % 4], ORDERS[number % 3]
    axes, given = LAYOUTS[layout], drawn(SIZES, TYPES[number % 4])
    given["dlse"] *= 0
    q, k, v, do = (given[name] for name in ("q", "k", "v", "do"))
    o, lse = reference.attention(q, k, v, mask=mask)
    slopes = reference.attention_backward(do, q, k, v, o, lse, mask=mask)
    want = dict(zip(("dq", "dk", "dv"), slopes, strict=True))
    laid = [tf.constant(array.transpose(axes)) for array in (q, k, v, do)]

    def call(*tensors: Any) -> Any:
        return tilefold.attention(*tensors, mask=mask, layout=layout, return_lse=True)

    results, gradients = with_gradients(call, laid[:3], [laid[3], given["dlse"]][:1])
    assert [x.dtype.name for x in results] == [dtype, STATISTICS[dtype]]
    again, lse_again = tilefold.attention(
        *laid[:3], mask=mask, layout=layout, return_lse=True, impl="composed"
    )
    composed = {"o": tf.transpose(again, axes), "lse": lse_again}
    compare(composed, {"o": o, "lse": lse}, dtype)
    names = ("o", "dq", "dk", "dv")
    got = {
        name: tf.transpose(tensor, axes)
        for name, tensor in zip(names, (results[0], *gradients), strict=True)
    }
    compare({**got, "lse": results[1]}, {**want, "o": o, "lse": lse}, dtype)


@pytest.mark.feature("T09", "T10")
@pytest.mark.parametrize("name", [*[*VARIANTS][1::3], "all together"])
def test_variants(name: str) -> None:
    """In one tf.function of unknown sizes: all results, and the gradients of all arrays."""
    tf, variant = framework(), VARIANTS[name]
    lengths = lengths_of(variant, 24, 30)
    sizes = Sizes(2, 4, *lengths)
    dtype = "float64" if len(name) % 2 else "float32"
    given = drawn(sizes, dtype, **({"sinks": (4, variant.sinks)} if variant.sinks else {}))
    held = arrays_of(variant, sizes)
    score = as_score(variant.score and variant.score(*held))
    options: dict[str, Any] = {"mask": variant.mask, "scale": 0.3}
    every = sizes.batch, sizes.heads, sizes.len_q, sizes.len_k
    kept = dropout.factors(SEED, variant.dropout, *every) if variant.dropout else None
    extra = {"sinks": given.get("sinks"), "keep": kept}
    q, k, v, do = (given[letter] for letter in ("q", "k", "v", "do"))
    o, lse = reference.attention(q, k, v, **options, score=score, **extra)
    slopes = reference.attention_backward(
        do, q, k, v, o, lse, **options, score=score, **extra, dlse=given["dlse"]
    )
    inputs = score.form.arrays if score else ()
    floats = [array for array in held if array.dtype.kind == "f"]
    places = [[x is array for x in inputs].index(True) for array in floats]
    names = ["q", "k", "v", *[f"input{n}" for n in range(len(inputs))]]
    names += ["sinks"] * bool(variant.sinks)
    want = dict(zip([f"d{name}" for name in names], slopes, strict=True))
    want |= {"o": o, "lse": lse, "max": reference.largest(q, k, variant.mask, 0.3, score)}
    sunk = [given["sinks"]] if variant.sinks else []
    tensors = [tf.constant(np.ascontiguousarray(x)) for x in (q, k, v, *floats, *sunk)]

    def call(*given: Any) -> Any:
        rest = iter(given[3:])
        own = [next(rest) if array.dtype.kind == "f" else array for array in held]
        return tilefold.attention(
            *given[:3],
            **options,
            score=variant.score and variant.score(*own),
            sinks=given[-1] if variant.sinks else None,
            dropout=variant.dropout,
            seed=SEED,
            return_lse=True,
            return_max=True,
        )

    unknown = [tf.TensorSpec([None] * len(x.shape), x.dtype) for x in tensors[:3]]
    known = [tf.TensorSpec(x.shape, x.dtype) for x in tensors[3:]]
    weights = [do, given["dlse"]]
    run = tf.function(
        lambda *given: with_gradients(call, given, weights), input_signature=[*unknown, *known]
    )
    results, gradients = run(*tensors)
    got = dict(zip(("o", "lse", "max"), results, strict=True))
    order = ["q", "k", "v", *[f"input{place}" for place in places], *["sinks"] * len(sunk)]
    got |= {f"d{name}": x for name, x in zip(order, gradients, strict=True)}
    compare(got, want, dtype)


@pytest.mark.feature("J02")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_an_additive_mask(dtype: str) -> None:
    """q, k and v (batch, heads, tokens, dim), a scale, and a mask that is added, or none."""
    tf, random = framework(), np.random.default_rng(2)
    shapes = (1, 2, 12, 8), (1, 2, 16, 8), (1, 2, 16, 8), (2, 12, 16)
    q, k, v, added = (random.normal(size=shape).astype(dtype) for shape in shapes)
    added[:, :, 9:] = -np.inf
    for mask in (None, added):
        score = None if mask is None else tilefold.bias(tf.constant(mask))
        o = tilefold.attention(*map(tf.constant, (q, k, v)), scale=0.3, score=score)
        s = 0.3 * q.astype("f8") @ k.astype("f8").swapaxes(2, 3) + (0 if mask is None else mask)
        p = np.exp(s - s.max(3, keepdims=True))
        want = p / p.sum(3, keepdims=True) @ v.astype("f8")
        assert_near("o", *arrays(o), want, 1e-2 if dtype == "float16" else 2e-6)


@pytest.mark.parametrize("name", ["all functions", "all together"])
def test_composed(name: str) -> None:
    """The same by two products and a softmax of TensorFlow, and by its own gradients."""
    tf, variant = framework(), VARIANTS[name]
    sizes = Sizes(2, 4, *lengths_of(variant, 24, 30))
    given = drawn(sizes, "float64", **({"sinks": (4, variant.sinks)} if variant.sinks else {}))
    held = [tf.constant(np.ascontiguousarray(array)) for array in arrays_of(variant, sizes)]
    tensors = [tf.constant(given[letter]) for letter in "qkv"] + held
    tensors += [tf.constant(given["sinks"])] if variant.sinks else []

    def call(impl: str) -> Any:
        def run(*given: Any) -> Any:
            return tilefold.attention(
                *given[:3],
                mask=variant.mask,
                score=variant.score and variant.score(*given[3 : 3 + len(held)]),
                sinks=given[-1] if variant.sinks else None,
                dropout=variant.dropout,
                seed=SEED,
                return_lse=True,
                return_max=True,
                impl=impl,
            )

        return with_gradients(run, tensors, [1.0, 2.0])

    (results, slopes), (want, exact) = call("composed"), call("kernel")
    for got, kernels in zip((*results, *slopes), (*want, *exact), strict=True):
        assert_near(name, got, kernels, 1e-5 if got.dtype == tf.float32 else 1e-12)


def test_other_implementations_are_refused() -> None:
    q = framework().zeros((1, 1, 2, 8))
    for impl, words in (("native", "TensorFlow has none"), ("tensorops", "runs on Apple GPUs")):
        with pytest.raises(NotImplementedError, match=words):
            tilefold.attention(q, q, q, impl=impl)


def test_products_of_tensors_are_refused() -> None:
    ones = framework().ones((2, 2))
    with pytest.raises(NotImplementedError, match="torch tensors, got a tensorflow array"):
        tilefold.gemm(ones, ones)
    assert (tilefold.gemm(ones.numpy(), ones.numpy()) == 2).all()
