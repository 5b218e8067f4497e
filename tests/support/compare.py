"""The one comparison of results, which raises and shows the worst place; and its tolerances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from tilefold import Rule
from tilefold.backends.cpu.device import Device, host
from tilefold.backends.cpu.plan import plan
from tilefold.backends.cpu.spec import Multiplier
from tilefold.problems import reference
from tilefold.problems.attention import Problem

Array = NDArray[Any]

UNITS = {
    "float32": 2.0**-24,
    "float64": 2.0**-53,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}
"""The largest relative error of one rounding, by type."""

HALVES = ("float16", "bfloat16")


def assert_near(name: str, got: ArrayLike, want: ArrayLike, tolerance: ArrayLike) -> None:
    """Raises AssertionError unless |got - want| <= tolerance; NaN and infinities must agree.

    >>> assert_near("o", [1.0, 2.5], [1.0, 2.0], 0.1)
    Traceback (most recent call last):
    AssertionError: o: 1 of 2 elements differ; worst at (1,): got 2.5, want 2.0, error 0.5 > 0.1
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{name}: got shape {got.shape}, want {want.shape}"
    error = errors(got, want)
    allowed = np.broadcast_to(tolerance, want.shape)
    wrong = ~(error <= allowed)
    if wrong.any():
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = np.where(wrong, np.nan_to_num(error / allowed, nan=np.inf, posinf=np.inf), -1)
        at = tuple(int(i) for i in np.unravel_index(np.argmax(ratio), want.shape))
        raise AssertionError(
            f"{name}: {wrong.sum()} of {wrong.size} elements differ; worst at {at}: got "
            f"{float(got[at])!r}, want {float(want[at])!r}, error {float(error[at]):.3g} > "
            f"{float(allowed[at]):.3g}"
        )


def assert_same(name: str, got: ArrayLike, want: ArrayLike) -> None:
    """Raises AssertionError unless both hold the same bits; payloads of NaN may differ."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype and got.shape == want.shape, (name, got.dtype, got.shape)
    with np.errstate(invalid="ignore"):  # signalling NaN
        both = np.isnan(got) & np.isnan(want)
        same = (got == want) & (np.signbit(got) == np.signbit(want)) | both
    if not same.all():
        at = tuple(int(i) for i in np.argwhere(~same)[0])
        raise AssertionError(
            f"{name}: {(~same).sum()} of {same.size} elements differ; first at {at}: got "
            f"{float(got[at])!r}, want {float(want[at])!r}"
        )


def errors(got: Array, want: Array) -> Array:
    """|got - want|: 0 where both are NaN or the same infinity, infinite where only one is."""
    with np.errstate(invalid="ignore"):
        error = np.abs(got - want)
    error[(got == want) | (np.isnan(got) & np.isnan(want))] = 0
    error[np.isnan(error)] = np.inf
    return error


def roundings(
    operands: Mapping[str, Array],
    results: Mapping[str, Array],
    mask: Rule,
    scale: float,
    *,
    exact_scores: bool = False,
) -> dict[str, float]:
    """The largest effect of rounding every intermediate value, in units of the type.

    A sum is off by the sum of its terms' sizes, even if the terms cancel (the running sums of one
    chain reach this size within a small factor). A score that is off by t moves its weight p by
    p t. The result is the largest effect over the array, in float64. It is the floor of a
    tolerance: a dense computation may be exact by luck (one key: p = 1 and dp = delta) or may sum
    in several chains, and another algorithm may have no such luck. With `exact_scores` only the
    roundings after the scores count.
    """
    do, q, k, v = (operands[name].astype(np.float64) for name in ("do", "q", "k", "v"))
    batch, heads_q, len_q, _ = q.shape
    heads_kv, len_k = k.shape[1:3]
    group = heads_q // heads_kv
    visible = mask.to_dense(len_q, len_k, batch, heads_q)
    keys, values = (np.repeat(array, group, axis=1) for array in (k, v))
    s = scale * (q @ keys.swapaxes(2, 3))
    with np.errstate(invalid="ignore", over="ignore"):
        p = np.where(visible, np.exp(s - results["lse"][..., None]), 0)
    slope = do @ values.swapaxes(2, 3) - (do * results["o"]).sum(axis=3, keepdims=True)
    terms_s = abs(scale) * (abs(q) @ abs(keys).swapaxes(2, 3)) * (not exact_scores)
    terms_slope = abs(do) @ abs(values).swapaxes(2, 3) + abs(do * results["o"]).sum(3)[..., None]
    moved = p * (1 + terms_s)
    ds = abs(scale) * (moved * abs(slope) + p * terms_slope)

    def over_group(array: Array) -> Array:
        return array.reshape(batch, heads_kv, group, *array.shape[2:]).sum(axis=2)

    terms = {
        "o": moved @ abs(values),
        "lse": np.where(visible, 1 + terms_s, 0),
        "dq": ds @ abs(keys),
        "dk": over_group(ds.swapaxes(2, 3) @ abs(q)),
        "dv": over_group(moved.swapaxes(2, 3) @ abs(do)),
    }
    return {name: float(array.max(initial=0)) for name, array in terms.items()}


def dense(
    operands: Mapping[str, Array], mask: Rule, scale: float, dtype: str = "float64", **options: Any
) -> dict[str, Array]:
    """The results o, lse, dq, dk and dv of the reference, computed in `dtype`."""
    q, k, v, do = (operands[name] for name in ("q", "k", "v", "do"))
    options |= {"mask": mask, "scale": scale, "dtype": dtype}
    o, lse = reference.attention(q, k, v, **options)
    gradients = reference.attention_backward(do, q, k, v, o, lse, **options)
    return dict(zip(("o", "lse", "dq", "dk", "dv"), (o, lse, *gradients), strict=True))


def dense_rounded(
    operands: Mapping[str, Array], mask: Rule, scale: float, *, weights: bool = True
) -> dict[str, Array]:
    """`dense` in the half type of the operands, as a matrix unit does it: the measure of precision.

    Products of halves are summed in float32, and softmax, lse and delta are float32 too. The
    factors of a second product are first rounded to the half type: the normalised P, and dS.
    Results are rounded once; results of grouped queries are summed before. The backward pass takes
    this forward pass's own o and lse. Without `weights` the P of the forward pass is not rounded,
    so o is another one, rounded once alone. Operands are finite.
    """
    kept = operands["q"].dtype
    q, k, v, do = (operands[name].astype(np.float32) for name in ("q", "k", "v", "do"))
    batch, heads_q, len_q, _ = q.shape
    heads_kv, len_k = k.shape[1:3]
    group = heads_q // heads_kv
    visible = mask.to_dense(len_q, len_k, batch, heads_q)

    def rounded(array: Array) -> Array:
        return array.astype(kept).astype(np.float32)

    def grouped(array: Array) -> Array:
        return array.reshape(batch, heads_kv, group, *array.shape[2:]).sum(axis=2)

    keys, values = (np.repeat(array, group, axis=1) for array in (k, v))
    factor = np.float32(scale)
    with np.errstate(all="ignore"):
        s = np.where(visible, factor * (q @ keys.swapaxes(2, 3)), np.float32(-np.inf))
        m = s.max(axis=3, initial=-np.inf, keepdims=True)
        p = np.where(visible, np.exp(s - m), np.float32(0))
        total = p.sum(axis=3, keepdims=True)
        p = np.where(total > 0, p / total, np.float32(0))
        lse = (m + np.log(total))[..., 0]
        o = rounded((rounded(p) if weights else p) @ values)
        p = np.where(visible, np.exp(s - lse[..., None]), np.float32(0))
        ds = p * (do @ values.swapaxes(2, 3) - (do * o).sum(axis=3, keepdims=True))
        found = {
            "o": o,
            "dq": factor * (rounded(ds) @ keys),
            "dk": factor * grouped(rounded(ds).swapaxes(2, 3) @ q),
            "dv": grouped(rounded(p).swapaxes(2, 3) @ do),
        }
        return {"lse": lse} | {name: array.astype(kept) for name, array in found.items()}


def tolerances(
    problem: Problem,
    operands: Mapping[str, Array],
    want: Mapping[str, Array],
    *,
    host_pairs: bool = True,
    device: Device | None = None,
) -> dict[str, float]:
    """The tolerances of the results.

    float64: 1e-12 of the largest element. float32: twice the largest error of the same dense
    computation by NumPy in float32. Both have a floor of a few roundings of the terms of every sum
    (`roundings`): 3 in float32, of which these cases and 120 random ones need at most 1.7, and 6 in
    float64, where the definition rounds as much itself. Half types: see `_of_halves`. `host_pairs`
    is False for kernels of GPUs, which do not multiply them as this processor does. `device` is
    another processor.
    """
    dtype = problem.dtype
    moves = roundings(operands, want, problem.mask, problem.scale)
    if dtype in HALVES:
        launches = plan(problem, device or host(), "forward").launches if host_pairs else ()
        products = [launch.spec.multiplier for launch in launches]
        return _of_halves(problem, operands, want, moves, products)
    units = {"float32": 3, "float64": 6}[dtype] * UNITS[dtype]
    if dtype == "float64":
        allowed = {name: 1e-12 * largest(array) for name, array in want.items()}
    else:
        low = dense(operands, problem.mask, problem.scale, dtype)
        allowed = {name: 2 * largest_error(low[name], array) for name, array in want.items()}
    return {name: allowed[name] + units * moves[name] for name in want}


def _of_halves(
    problem: Problem,
    operands: Mapping[str, Array],
    want: Mapping[str, Array],
    moves: Mapping[str, float],
    products: Sequence[Multiplier],
) -> dict[str, float]:
    """Tolerances of half types: two times the error of a dense computation, three for gradients.

    They are at least one rounding of the largest result, since the dense computation may be exact
    by luck. If all values are equal, dQ and dK are 0 and only rounding is left: then the floor is
    one rounding of the largest term. The floor of float32 is added, since sums are float32. If
    elements are multiplied in two parts, the product of the low parts is missing in every term. The
    tolerance of lse is the tolerance of float32, and with pairs the error of the exponential, which
    is exact enough for weights of a half type. Of one query's few keys the dense computation may be
    nearly exact by luck too: gradients take the larger error of two, whose o is rounded otherwise.
    """
    low, other = (
        dense_rounded(operands, problem.mask, problem.scale, weights=flag) for flag in (True, False)
    )
    kept = problem.dtype
    least = float(ml_dtypes.finfo(kept).smallest_subnormal) / 2
    terms = roundings(operands, want, problem.mask, problem.scale, exact_scores=True)
    exponential = 3e-6 if any(each.unit != "fma" for each in products) else 0.0
    allowed = {"lse": 2 * largest_error(low["lse"], want["lse"]) + exponential}
    for name, times in (("o", 2), ("dq", 3), ("dk", 3), ("dv", 3)):
        size = largest(want[name])
        if name in ("dq", "dk") and size < UNITS["float32"] * terms[name]:
            size = terms[name]
        once = max(UNITS[kept] * size, least)
        errors = [largest_error(found[name], want[name]) for found in (low, other)]
        error = errors[0] if name == "o" else max(errors)
        allowed[name] = max(times * error, once)
    two_parts = any(each.parts > 1 for each in products)
    units = UNITS["bfloat16"] ** 2 if two_parts else 3 * UNITS["float32"]
    return {name: allowed[name] + units * moves[name] for name in want}


def largest(array: Array) -> float:
    """The absolute value of the largest element, without -inf."""
    return float(abs(finite(array)).max(initial=0))


def largest_error(got: Array, want: Array) -> float:
    """The absolute value of the largest difference, without -inf."""
    return float(abs(finite(got) - finite(want)).max(initial=0))


def finite(array: Array) -> Array:
    """The array with 0 in place of -inf in lse, which must agree exactly."""
    return np.where(np.isneginf(array), 0, array).astype(np.float64)
