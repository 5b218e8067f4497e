"""Products on GPUs of any options at once, drawn at random, beside the product in float64."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest
from product_cases import Array, assert_gated
from products import ALL, Products

from tilefold.problems.matmul import ACTIVATIONS

FLOATS = ("float32", "float16", "bfloat16")
LENGTHS = (1, 2, 5, 17, 33, 40)
KINDS = 7
"""Kinds of a product, each of which is a kernel of its own; sizes and strides are drawn anew."""


class Kind(NamedTuple):
    """What decides a kernel: types, activation, what stands beside A and B."""

    a: str
    b: str
    kept: str
    activation: str | None
    turned: tuple[bool, bool]
    bias: str | None
    beside: str

    @classmethod
    def drawn(cls, rng: np.random.Generator, number: int) -> Kind:
        """A kind; each activation and each neighbour has its turn."""
        a, b, kept = (FLOATS[n] for n in rng.integers(0, 3, 3))
        turned = (bool(rng.integers(2)), bool(rng.integers(2)))
        bias = (None, "column", "row")[int(rng.integers(3))]
        beside = ("nothing", "c", "gate")[number % 3]
        return cls(a, b, kept, ACTIVATIONS[number % 7], turned, bias, beside)


def placed(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    """Random numbers that lie in any order of axes, some with gaps."""
    order = rng.permutation(len(shape))
    drawn = rng.normal(size=tuple(shape[n] for n in order)).transpose(np.argsort(order))
    return (
        np.repeat(drawn, 2, -1)[..., ::2].astype(dtype) if rng.integers(2) else drawn.astype(dtype)
    )


def shared(rng: np.random.Generator, batch: tuple[int, ...]) -> tuple[int, ...]:
    """A batch that broadcasts to another one, with fewer axes or with lengths of 1."""
    own = tuple([1 if rng.integers(3) == 0 else length for length in batch])
    return own[int(rng.integers(len(own) + 1)) :]


@pytest.mark.slow
@pytest.mark.no_cover
@pytest.mark.feature("M11", "A12")
@pytest.mark.parametrize("number", range(KINDS))
@pytest.mark.parametrize("products", ALL, ids=str)
def test_gemm_of_any_options(products: Products, number: int) -> None:
    rng = np.random.default_rng((number, ALL.index(products)))
    kind = Kind.drawn(rng, number)
    for _ in range(4):
        m, k, n = (int(length) for length in rng.choice(LENGTHS, 3))
        batch = tuple([int(length) for length in rng.integers(1, 4, rng.integers(5))])
        a = placed(rng, (*shared(rng, batch), m, k), kind.a)
        b = placed(rng, (*shared(rng, batch), k, n), kind.b)
        full = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        ends = {"column": (1, n), "row": (m, 1), None: ()}[kind.bias]
        if kind.bias == "row" and n == 1:
            ends = (1, n)  # a matrix of one column has a bias of columns
        bias = placed(rng, (*full, *ends), kind.kept) if ends else np.zeros(())
        options: dict[str, Any] = {"activation": kind.activation, "alpha": 0.5}
        options |= {"bias": bias} if ends else {}
        one, two = (
            x.swapaxes(-1, -2) if t else x for x, t in zip((a, b), kind.turned, strict=True)
        )
        turned = dict(zip(("transpose_a", "transpose_b"), kind.turned, strict=True))
        out = np.full((*full, m, n), np.nan, kind.kept)
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            if kind.beside == "gate":
                gate = placed(rng, b.shape, kind.b)
                given = gate.swapaxes(-1, -2) if kind.turned[1] else gate
                got = products.gemm(one, two, gate=given, out=out, **turned, **options)
                assert_gated(got, a, b, gate, alpha=0.5, bias=bias, name=kind.activation)
                continue
            more: dict[str, Any] = {"c": placed(rng, (1, n), "float32"), "beta": -1.5}
            more = more if kind.beside == "c" else {}
            got = products.gemm(one, two, out=out, **turned, **options, **more)
            products.check(got, a, b, **{**options, **more})
