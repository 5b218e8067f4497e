"""The implementations that `attention(..., impl=...)` names; each can be checked by the others.

- "kernel": tilefold's own kernels, the only one whose memory does not grow with len_q * len_k.
- "composed": two matrix products and a softmax of the framework. The scores and weights of all
  pairs, and the mask, are arrays.
- "native": the framework's own fused attention, PyTorch's `scaled_dot_product_attention`.
- "tensorops": tilefold's kernel on the matrix units of Apple's newest GPUs, by Metal 4.

The arrays choose the framework, and each framework has a file here. The file has one function for
each implementation, all with the arguments of `Implementation`. Calls of "kernel" go through the
frontends and not through this folder. An implementation that cannot do a call raises
NotImplementedError with the reason; no other one takes its place.

    torch       on PyTorch tensors
    numpy       on NumPy arrays
    jax         on JAX arrays
    tensorflow  on TensorFlow tensors
    standard    on arrays of libraries that follow the array API standard, by NumPy's
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from tilefold.common.check import choice
from tilefold.common.first_use import imported
from tilefold.problems.request import Request

KERNEL = "kernel"
NAMES = ("composed", "native", KERNEL, "tensorops")

Implementation = Callable[..., tuple[Any, ...]]
"""The type of an implementation: (q, k, v, request, wants_lse, extra, further) -> (o, lse, ...).

lse may be None if `wants_lse` is False. The last two arguments may be left out; the results that
`further` names follow.
"""


def find(name: object, framework: str) -> Implementation:
    """The function of the implementation `name` for arrays of a frontend, such as "numpy".

    >>> find("dense", "numpy")
    Traceback (most recent call last):
    ValueError: impl must be 'composed', 'native', 'kernel' or 'tensorops', got 'dense'
    """
    choice("impl", name, NAMES)
    found: Implementation = getattr(_module(framework), str(name))
    return found


def refuse_extra(name: str, request: Request, further: tuple[str, ...]) -> None:
    """Raises NotImplementedError for what the implementation `name` does not do.

    >>> refuse_extra("native", Request(sinks=1), ())
    Traceback (most recent call last):
    NotImplementedError: impl='native' takes no sinks; use impl='kernel' or impl='composed'
    """
    asked = [what for what in ("score", "sinks", "dropout") if getattr(request, what)]
    for what in (*asked, *[f"return_{word}" for word in further]):
        raise NotImplementedError(
            f"impl={name!r} takes no {what}; use impl='kernel' or impl='composed'"
        )


@imported
def _module(framework: str) -> ModuleType:
    return import_module(f"{__name__}.{framework}")
