"""torch's own checks of tilefold's two operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import tilefold.frontends.torch  # noqa: F401  # gives the operators their derivatives
from tilefold.frontends import operators
from tilefold.problems.request import Request

_CALLED = ("test_schema", "test_autograd_registration", "test_faketensor")


def opcheck(inputs: Sequence[Tensor], request: Request) -> None:
    """Check both operators; q, k and v require gradients.

    The check of compiled functions sums all results that carry gradients. A gradient of lse raises,
    so q, k and v carry none there: the tests of compiled gradients use o alone.
    """
    torch.library.opcheck(operators.attention, (*inputs, request), test_utils=_CALLED)
    given = [tensor.detach() for tensor in inputs]
    torch.library.opcheck(operators.attention, (*given, request))
    o, lse, _ = operators.attention(*given, request)
    saved = (o, *given, o, lse, request)
    torch.library.opcheck(operators.attention_backward, saved)
    torch.library.opcheck(operators.attention_backward, (*saved, 0 * o[..., 0].to(lse.dtype)))
