"""Gradients that are finished by operations of torch: of sinks, and of the arrays of a score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tilefold.backends.triton.launch import TritonPlan

if TYPE_CHECKING:
    from torch import Tensor


def finish(plan: TritonPlan, given: Mapping[str, Tensor]) -> None:
    """Write the gradients that tensors of the kernels give: of sinks, and of a score's arrays."""
    added = {each.added.given.name: each.added for each in plan.launches if each.added is not None}
    for name, tensor in given.items():
        if name.startswith("dinput") and name.removeprefix("dinput").isdigit():
            parts = added.get(name.removeprefix("d"))
            if parts is None:
                tensor.zero_()
            else:
                tensor.copy_(given[parts.parts].sum(0))
    if "dsinks" in given:
        _gradient_of_sinks(given)


def _gradient_of_sinks(given: Mapping[str, Tensor]) -> None:
    """d sink = -sum of exp(sink - lse) delta over the queries of a head; lse of -inf gives 0."""
    lse, delta = given["lse"], given["delta"]
    base = lse.masked_fill(lse.isinf(), 0.0)
    for at, sink in enumerate(given["sinks"].unbind(-1)):
        share = (sink[None, :, None] - base).exp()
        given["dsinks"][:, at] = -(share * delta).sum((0, 2))
