"""All implementations on one small problem, compared with the definition and with each other.

The problem has grouped queries, a window, and queries that see nothing, since implementations treat
these differently. On NumPy arrays o and lse are compared. On torch tensors, on every device of this
machine, o and the gradients are compared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold import api
from tilefold.common.check import one_line
from tilefold.common.imports import why_not
from tilefold.implementations import NAMES
from tilefold.masks.position_rules import causal, local
from tilefold.measuring import baselines
from tilefold.measuring.workload import Arrays, Case
from tilefold.problems import reference
from tilefold.problems.attention import Problem

Array = NDArray[np.float64]

PROBLEM = Problem.of((2, 4, 40, 24), (2, 2, 33, 24), (2, 2, 33, 16), mask=causal() & local(20))
ARRAYS = "NumPy arrays"


@dataclass(frozen=True)
class Agreement:
    """The result of one implementation on arrays of one kind.

    `error` is the largest error, relative to the largest element of the definition. It is None if
    there is no result, and `reason` then says why. `broken` is True if the reason is an error, and
    False if something is missing.
    """

    implementation: str
    arrays: str
    error: float | None = None
    reason: str | None = None
    broken: bool = False
    results: dict[str, Array] = field(default_factory=dict, compare=False, repr=False)


def check() -> list[Agreement]:
    """Run every implementation on every kind of arrays that exists here."""
    inputs = _inputs()
    o, lse = reference.attention(inputs.q, inputs.k, inputs.v, mask=PROBLEM.mask)
    gradients = reference.attention_backward(
        inputs.do, inputs.q, inputs.k, inputs.v, o, lse, mask=PROBLEM.mask
    )
    expected = {"o": o, "lse": lse, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}

    def of_arrays(name: str) -> dict[str, Any]:
        options: dict[str, Any] = {"mask": PROBLEM.mask, "return_lse": True, "impl": name}
        o, lse = api.attention(inputs.q, inputs.k, inputs.v, **options)
        return {"o": o, "lse": lse}

    def of_tensors(device: str, name: str) -> dict[str, Any]:
        forward, backward = (
            baselines.results(baselines.implementation(name, device, Case(PROBLEM, each), inputs)())
            for each in ("forward", "backward")
        )
        return dict(zip(("o", "dq", "dk", "dv"), (*forward, *backward), strict=True))

    found = [_try(name, ARRAYS, of_arrays, expected) for name in NAMES]
    if reason := why_not("torch"):
        found.append(Agreement("kernel", "tensors", reason=f"PyTorch {reason}"))
    else:
        from tilefold.implementations.torch import devices

        for device in devices():
            for name in NAMES:
                run = functools.partial(of_tensors, device)
                found.append(_try(name, f"tensors on {device}", run, expected))
    return found


def largest_difference(found: list[Agreement]) -> float:
    """The largest difference between any two results, relative as `error` is."""
    made = [each.results for each in found if each.results]
    differences = [
        error(one[name], other[name])
        for number, one in enumerate(made)
        for other in made[:number]
        for name in one.keys() & other.keys()
    ]
    return max(differences, default=0.0)


def error(found: Any, expected: Any) -> float:
    """The largest difference; infinities must agree, NaN must not occur."""
    found = found.astype(np.float64)
    finite = np.isfinite(expected)
    if (
        not np.array_equal(np.isfinite(found), finite)
        or (found[~finite] != expected[~finite]).any()
    ):
        return float("inf")
    difference = np.abs(found[finite] - expected[finite]).max(initial=0)
    return float(difference / max(1.0, np.abs(expected[finite]).max(initial=0)))


def _try(
    name: str, arrays: str, run: Callable[[str], dict[str, Any]], expected: dict[str, Array]
) -> Agreement:
    try:
        results = {key: np.asarray(each, np.float64) for key, each in run(name).items()}
    except (NotImplementedError, ImportError) as raised:
        return Agreement(name, arrays, reason=one_line(raised))
    except Exception as raised:  # every error is shown
        return Agreement(
            name, arrays, reason=f"{type(raised).__name__}: {one_line(raised)}", broken=True
        )
    worst = max(error(each, expected[key]) for key, each in results.items())
    return Agreement(name, arrays, worst, results=results)


def _inputs() -> Arrays:
    """Random inputs. They include no o and lse, since each run begins with a forward pass."""
    rng, p = np.random.default_rng(0), PROBLEM
    q, k, v, do = (
        rng.standard_normal((p.batch, heads, length, dim), np.float32)
        for heads, length, dim in (
            (p.heads_q, p.len_q, p.dim),
            (p.heads_kv, p.len_k, p.dim),
            (p.heads_kv, p.len_k, p.dim_v),
            (p.heads_q, p.len_q, p.dim_v),
        )
    )
    return Arrays(q, k, v, do, np.empty(0), np.empty(0))
