"""torch's own checks of tilefold's two operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import tilefold.frontends.torch.calls  # noqa: F401  # gives the operators their derivatives
from tilefold.frontends.torch import operators
from tilefold.frontends.torch.spelled import spelled_request
from tilefold.problems.request import Request


def opcheck(inputs: Sequence[Tensor], request: Request) -> None:
    """Check the operators of the request; q, k and v require gradients."""
    asked = spelled_request(request)
    text = asked.text, asked.numbers
    given = [tensor.detach() for tensor in inputs]
    if asked.data:
        data = [*asked.data]
        torch.library.opcheck(operators.attention_extended, (*inputs, data, *text, False))
        o, lse, *_ = operators.run(request, *given)
        saved = (o, *given, o, lse, data, *text, [False] * len(data), torch.ones_like(lse))
        torch.library.opcheck(operators.attention_extended_backward, saved)
        return
    torch.library.opcheck(operators.attention, (*inputs, *text))
    o, lse, *_ = operators.run(request, *given)
    saved = (o, *given, o, lse, *text)
    torch.library.opcheck(operators.attention_backward, saved)
    torch.library.opcheck(operators.attention_backward, (*saved, torch.ones_like(lse)))
