"""Cases of modified scores for the kernels of GPUs, and all results by the definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  # NumPy knows the name "bfloat16" from it
import numpy as np
from numpy.typing import NDArray

from tilefold import (
    alibi,
    bias,
    causal,
    full,
    local,
    relative_bias,
    score,
    softcap,
    table,
    temperature,
    where,
)
from tilefold.problems import reference
from tilefold.problems.attention import STATISTICS, Problem
from tilefold.scores.score import as_score

Array = NDArray[Any]
Normal = Callable[..., Array]

B, H, KV, Q, K, D = 2, 4, 2, 19, 53, 16
TOLERANCES = {"float32": 1e-5, "float64": 1e-12, "float16": 5e-3, "bfloat16": 4e-2}


class Case(NamedTuple):
    """A score of arrays of random numbers, sinks of each head, and how it is computed."""

    make: Callable[[Normal], Any]
    mask: Any = full()
    dtype: str = "float32"
    form: str = "tiled"
    sinks: int = 0
    scale: float = 0.3
    sizes: tuple[int, ...] = (B, H, KV, Q, K, D)


def hiding(array: Array) -> Array:
    """The array, with pairs that are hidden: some of all queries, and all of one."""
    array[..., 5:11] = -np.inf
    array[..., 2, :] = -np.inf
    return array


def own(n: Normal) -> Any:
    """A score that reads an array twice, at places that depend on both indices."""
    entries = table(n(H, 7))
    return score(
        lambda s, b, h, q, k: where(
            (q + k) % 5 == 0, s * entries[h, (q * 2 + k) % 7], s + entries[h, q % 7] * (b + 1)
        )
    )


CASES = {
    "softcap": Case(lambda n: softcap(2.0), causal(), "float64", "fused", sinks=2),
    "slopes": Case(lambda n: [softcap(3.0), alibi(n(H))], local(30), "float16", "decode", scale=-1),
    "hiding": Case(lambda n: bias(hiding(n(H, Q, K))), causal(), form="fused", sinks=1),
    "hiding-decode": Case(lambda n: bias(hiding(n(Q, K))), form="decode"),
    "keys": Case(lambda n: [bias(n(B, 1, 1, K)), temperature(1 + n(Q, 1) ** 2)], dtype="float64"),
    "t5": Case(lambda n: relative_bias(n(H, 32)), form="decode", sinks=1),
    "own": Case(own, causal(), "float64"),
}


def of_case(case: Case) -> tuple[Problem, dict[str, Array], Any]:
    """The problem of a case, its arrays by their names, and the score with its arrays."""
    rng = np.random.default_rng(3)
    batch, heads, heads_kv, len_q, len_k, dim = case.sizes

    def normal(*shape: int) -> Array:
        return rng.normal(size=shape).astype(case.dtype)

    modified = as_score(case.make(normal))
    arrays = {
        "q": normal(batch, heads, len_q, dim),
        "k": normal(batch, heads_kv, len_k, dim),
        "v": normal(batch, heads_kv, len_k, dim + 8),
        "do": normal(batch, heads, len_q, dim + 8),
        "dlse": normal(batch, heads, len_q).astype(STATISTICS[case.dtype]),
    }
    shapes = [arrays[name].shape for name in "qkv"]
    options = {"scale": case.scale, "sinks": case.sinks, "dtype": case.dtype}
    problem = Problem.of(*shapes, mask=case.mask, score=modified, **options)
    if case.sinks:
        arrays["sinks"] = normal(heads, case.sinks).astype(STATISTICS[case.dtype])
    given = modified.form.arrays if modified else ()
    return problem, arrays | {f"input{i}": array for i, array in enumerate(given)}, modified


def definition(case: Case, arrays: Mapping[str, Array], modified: Any) -> dict[str, Array]:
    """The results of both passes: o, lse and max, then all gradients."""
    options = {"mask": case.mask, "scale": case.scale, "score": modified}
    options |= {"sinks": arrays["sinks"]} if case.sinks else {}
    o, lse = reference.attention(arrays["q"], arrays["k"], arrays["v"], **options)
    found = reference.attention_backward(
        *(arrays[name] for name in ("do", "q", "k", "v")), o, lse, dlse=arrays["dlse"], **options
    )
    names = [f"d{name}" for name in ("q", "k", "v", *extra(arrays))]
    want = dict(zip(("o", "lse", *names), (o, lse, *found), strict=True))
    return want | {"max": largest(case, arrays, modified)}


def extra(arrays: Mapping[str, Array]) -> list[str]:
    """The names of the arrays of a score, and sinks."""
    return sorted(name for name in arrays if name.startswith(("input", "sinks")))


def largest(case: Case, arrays: Mapping[str, Array], modified: Any) -> Array:
    """The largest score of each query, -inf where it sees none: lse of sinks is not in it."""
    keys = arrays["k"].repeat(case.sizes[1] // case.sizes[2], 1)
    made = reference.Modified(modified, arrays["q"], keys)
    shown = case.mask.to_dense(*case.sizes[3:5], *case.sizes[:2])
    found = np.empty(arrays["dlse"].shape)
    for at in np.ndindex(found.shape[:2]):
        products = arrays["q"][at].astype(float) @ keys[at].astype(float).T
        scores = made.scores(at, case.scale * products)
        found[at] = np.where(
            np.broadcast_to(shown, (*found.shape, keys.shape[2]))[at], scores, -np.inf
        ).max(1)
    return found
