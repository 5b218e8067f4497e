"""From a forward pass to the backward pass that gives its gradients, and to those of the latter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import tensorflow as tf

from tilefold.backends.protocols import BACKWARD_LOW, Pass
from tilefold.frontends.tensorflow.second import second_gradients
from tilefold.problems.request import Request

Tensor = Any

Run = Callable[[Pass, Request, Sequence[Tensor]], tuple[Tensor, ...]]
"""What runs a pass: (wanted, request, given) -> results."""


def gradients(
    run: Run,
    wanted: Pass,
    request: Request,
    given: Sequence[Tensor],
    results: Sequence[Tensor],
    slopes: Sequence[Tensor],
    asked: Callable[[int], bool],
) -> list[Tensor | None]:
    """The gradients of the tensors given to a pass that also wrote lse_low.

    `slopes` are the gradients of its results. Of the arrays beside q, k and v those are computed
    whose place is `asked` for. Integers have none.
    """
    names = wanted.given[3:]
    further = [
        name
        for place, name in enumerate(names, 3)
        if name.startswith(("input", "sinks")) and asked(place)
    ]
    named = dict(zip(wanted.results, results, strict=True))
    do, dlse = (slopes[wanted.results.index(name)] for name in ("o", "lse"))
    back = BACKWARD_LOW.plus(names, tuple([f"d{name}" for name in further])).plus(("dlse",))
    kept = [named[name] for name in ("o", "lse", "lse_low")]
    dq, dk, dv, *more = run(back, request, (do, *given[:3], *kept, *given[3:], dlse))
    found = dict(zip(further, more, strict=True))
    return [dq, dk, dv, *[found.get(name) for name in names]]


def differentiable(
    run: Run, wanted: Pass, request: Request, given: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The results of a pass with its gradients, where `run` has none."""

    @tf.custom_gradient  # type: ignore[untyped-decorator]  # TensorFlow ships no types
    def call(*tensors: Tensor) -> Any:
        results = run(wanted, request, tensors)

        def pulled(*slopes: Tensor) -> list[Tensor | None]:
            if wanted.operation == "backward":
                return second_gradients(wanted, request, tensors, slopes)
            back = partial(differentiable, run)
            return gradients(back, wanted, request, tensors, results, slopes, lambda _: True)

        return results, pulled

    found: tuple[Tensor, ...] = call(*given)
    return found
