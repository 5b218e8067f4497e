"""The other implementation on TensorFlow's tensors, differentiable by TensorFlow's own operations.

"composed" is written as a user of TensorFlow would write it. So NaN and infinity behave as in
TensorFlow: a hidden key is multiplied by 0, and 0 * NaN is NaN.
"""

from __future__ import annotations

from typing import Any, NoReturn

from tilefold.backends.extra import NOTHING, Extra
from tilefold.frontends.operation import Holding, taken
from tilefold.frontends.tensorflow.pairs import whole
from tilefold.frontends.tensorflow.tensors import extra_tensors, tensors_of
from tilefold.problems.request import Request

Tensor = Any


def composed(
    q: Any,
    k: Any,
    v: Any,
    request: Request | Holding,
    wants_lse: bool,
    extra: Extra = NOTHING,
    further: tuple[str, ...] = (),
) -> tuple[Tensor, ...]:
    """o and lse by two matrix products and a softmax, in the type of lse, for all pairs at once.

    With "max" as a `further` result also the largest scores.
    """
    request, extra = taken(request, extra)
    q, k, v = tensors_of(q=q, k=k, v=v)
    named = dict(zip(extra.names, extra_tensors(extra, q), strict=True))
    o, lse, largest = whole(request, {"q": q, "k": k, "v": v, **named})
    return (o, lse, largest) if further else (o, lse)


def native(*_: Any, **__: Any) -> NoReturn:
    """Raises NotImplementedError, since TensorFlow has no fused attention on processors."""
    raise NotImplementedError(
        "impl='native' is a framework's fused attention, and TensorFlow has none; choose"
        " impl='composed' or impl='kernel'"
    )


def tensorops(*_: Any, **__: Any) -> NoReturn:
    """Raises NotImplementedError, since TensorFlow's tensors never lie where its kernels run."""
    raise NotImplementedError(
        "impl='tensorops' runs on Apple GPUs by Metal 4, on torch tensors; choose impl='composed'"
        " or impl='kernel'"
    )
