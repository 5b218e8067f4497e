"""Every rule and every variant through JAX's compiler, forward and backward, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import LAYOUTS, RULES, Sizes
from compare import UNITS, assert_near
from jaxed import jax, jnp, needs
from operands import canonical
from variants import VARIANTS, Variant, arrays_of, lengths_of

import tilefold
from tilefold.problems import dropout, reference
from tilefold.problems.attention import STATISTICS
from tilefold.scores.score import as_score

pytestmark = needs

Array = Any
SEED = -0x5EED_0123_4567_89AB
SIZES = Sizes(2, 4, 24, 30)
TOLERANCES = {"float64": 1e-12, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""The largest error, relative to the largest element but at least to 1. It tells wrong from right:
the precision of kernels is measured where they are tested."""

RULES_OF_JAX = [
    *[(number, [*TOLERANCES][number % 4]) for number in range(0, len(RULES), 3)],
    *[(number, "float32") for number in range(1, len(RULES), 3)],
]
"""Two thirds of the rules; a half with the kernels of TensorFlow's tests, in all types."""


def data(sizes: Sizes, dtype: str, widths: tuple[int, int] = (8, 12)) -> dict[str, Array]:
    """q, k, v, do and dlse with canonical axes."""
    random, (dim, dim_v) = np.random.default_rng(7), widths
    rows = sizes.batch, sizes.heads, sizes.len_q
    keys = sizes.batch, sizes.heads // 2, sizes.len_k
    shapes = {"q": (*rows, dim), "k": (*keys, dim), "v": (*keys, dim_v), "do": (*rows, dim_v)}
    found = {name: random.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    return found | {"dlse": random.normal(size=rows).astype(STATISTICS[dtype])}


def check(name: str, got: Any, want: Any, dtype: str) -> None:
    """Raises unless a result is near."""
    got, want = np.asarray(got, np.float64), np.asarray(want)
    size = np.abs(want[np.isfinite(want)]).max(initial=1)
    assert_near(name, got, want, (TOLERANCES[dtype] + 2 * UNITS[dtype]) * size)


@pytest.mark.feature("T01", "T03", "T04", "T05", "T06", "T09")
@pytest.mark.parametrize(
    ("number", "dtype"), RULES_OF_JAX, ids=[f"{[*RULES][n]}-{dtype}" for n, dtype in RULES_OF_JAX]
)
def test_rules(number: int, dtype: str, x64: None) -> None:
    """In one program with gradients; layouts take turns."""
    layout = [*LAYOUTS][number % 3]
    mask, given = [*RULES.values()][number](SIZES), data(SIZES, dtype)
    o, lse = reference.attention(given["q"], given["k"], given["v"], mask=mask)
    slopes = reference.attention_backward(
        *(given[x] for x in ("do", "q", "k", "v")), o, lse, mask=mask, dlse=given["dlse"]
    )
    arrays = [jnp.asarray(canonical(given[x], layout)) for x in ("q", "k", "v", "do")]
    made, gradients = with_gradients(
        lambda *arrays: tilefold.attention(*arrays, mask=mask, layout=layout, return_lse=True),
        arrays[:3],
        (arrays[3], given["dlse"]),
    )
    assert [x.dtype.name for x in made] == [dtype, STATISTICS[dtype]]
    check("lse", made[1], lse, dtype)
    for name, got, want in zip("oqkv", (made[0], *gradients), (o, *slopes), strict=True):
        check(name, canonical(np.asarray(got), layout), want, dtype)


def with_gradients(call: Any, given: Any, slopes: Any) -> Any:
    """The results of a call and its gradients, in one compiled program."""

    def both(*arrays: Array) -> Any:
        made, pull = jax.vjp(call, *arrays)
        return made, pull(tuple(map(jnp.asarray, slopes)))

    return jax.jit(both)(*given)


def options_of(variant: Variant, sinks: Array) -> dict[str, Any]:
    """The options of a call, beside its arrays."""
    options: dict[str, Any] = {"mask": variant.mask, "scale": 0.3}
    if variant.dropout:
        options |= {"dropout": variant.dropout, "seed": SEED}
    return options | {"sinks": sinks} if variant.sinks else options


@pytest.mark.feature("T09", "T10")
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str, x64: None) -> None:
    """Values and all gradients; those of arrays and sinks too."""
    variant = VARIANTS[name]
    dtype = "float64" if len(name) % 2 else "float32"
    sizes = Sizes(2, 4, *lengths_of(variant, 24, 30))
    given, arrays = data(sizes, dtype), arrays_of(variant, sizes)
    sinks = np.random.default_rng(3).normal(size=(sizes.heads, max(1, variant.sinks)))
    every = sizes.batch, sizes.heads, sizes.len_q, sizes.len_k
    options: dict[str, Any] = {
        "mask": variant.mask,
        "scale": 0.3,
        "score": as_score(variant.score and variant.score(*arrays)),
        "sinks": sinks if variant.sinks else None,
        "keep": dropout.factors(SEED, variant.dropout, *every) if variant.dropout else None,
    }
    o, lse = reference.attention(*(given[x] for x in "qkv"), **options)
    slopes = reference.attention_backward(
        *(given[x] for x in ("do", "q", "k", "v")), o, lse, **options, dlse=given["dlse"]
    )

    def attend(q: Array, k: Array, v: Array, sinks: Array, *arrays: Array) -> Array:
        score = variant.score and variant.score(*arrays)
        return tilefold.attention(
            q, k, v, score=score, **options_of(variant, sinks), return_lse=True
        )

    made, (dq, dk, dv, dsinks, *more) = with_gradients(
        attend, (*(given[x] for x in "qkv"), sinks, *arrays), (given["do"], given["dlse"])
    )
    found = dq, dk, dv, *more, *[dsinks] * bool(variant.sinks)
    check("o", made[0], o, dtype)
    check("lse", made[1], lse, dtype)
    for number, (got, want) in enumerate(zip(found, slopes, strict=True)):
        kinds = dtype, got.dtype.name
        check(f"gradient {number}", got, want, max(kinds, key=TOLERANCES.__getitem__))


@pytest.mark.feature("T01")
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_types(dtype: str, x64: None) -> None:
    """Values, gradients and forward mode."""
    sizes = Sizes(2, 4, 20, 24)
    given, mask = data(sizes, dtype), tilefold.causal()
    o, lse = reference.attention(*(given[x] for x in "qkv"), mask=mask)
    want = reference.attention_backward(
        *(given[x] for x in ("do", "q", "k", "v")), o, lse, mask=mask
    )
    arrays = [jnp.asarray(given[x]) for x in "qkv"]

    def attend(*arrays: Array) -> Array:
        return tilefold.attention(*arrays, mask=mask, return_lse=True)

    (got_o, got_lse), pull = jax.vjp(attend, *arrays)
    assert got_o.dtype == dtype and got_lse.dtype == STATISTICS[dtype]
    check("o", got_o, o, dtype)
    check("lse", got_lse, lse, dtype)
    do = jnp.asarray(given["do"])
    found = pull((do, jnp.zeros_like(got_lse)))
    for letter, got, expected in zip("qkv", found, want, strict=True):
        assert got.dtype == dtype
        check(f"d{letter}", got, expected, dtype)
    ways = [jnp.asarray(x[::-1]) for x in (given["q"], given["k"], given["v"])]
    _, (moved, _) = jax.jvp(attend, arrays, ways)
    slope = sum(
        float((x * np.asarray(y, np.float64)).sum()) for x, y in zip(want, ways, strict=True)
    )
    along = float((np.asarray(moved, np.float64) * given["do"].astype(np.float64)).sum())
    assert abs(along - slope) <= TOLERANCES[dtype] * max(1, abs(slope)) * 10
