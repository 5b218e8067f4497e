"""torch's own checks of tilefold's two operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import tilefold.frontends.torch.calls  # noqa: F401  # gives the operators their derivatives
from tilefold.frontends.torch import operators
from tilefold.problems.request import Request


def opcheck(inputs: Sequence[Tensor], request: Request) -> None:
    """Check both operators; q, k and v require gradients."""
    torch.library.opcheck(operators.attention, (*inputs, request))
    given = [tensor.detach() for tensor in inputs]
    o, lse, _ = operators.attention(*given, request)
    saved = (o, *given, o, lse, request)
    torch.library.opcheck(operators.attention_backward, saved)
    torch.library.opcheck(operators.attention_backward, (*saved, torch.ones_like(lse)))
