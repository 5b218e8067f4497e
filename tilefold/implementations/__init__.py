"""Who computes attention: what `attention(..., impl=...)` names, to check each by the others.

- "kernel": tilefold's own kernels, the only one whose memory does not grow with len_q * len_k.
- "composed": two products and a softmax of the framework's own. Scores and weights of all pairs
  are arrays, and so is the rule.
- "native": the framework's own fused attention, PyTorch's `scaled_dot_product_attention`.
- "tensorops": tilefold's kernel on the matrix units of Apple's newest GPUs, by Metal 4.

The arrays choose the framework, and a file here is named after each: a function per way, all with
the arguments of `Implementation`. The kernels are the frontends' own and do not pass through here.
What an implementation cannot do raises NotImplementedError with the reason; none stands in for
another.

    torch  on PyTorch tensors
    numpy  on NumPy arrays
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from tilefold.common.check import choice

KERNEL = "kernel"
NAMES = ("composed", "native", KERNEL, "tensorops")

Implementation = Callable[..., tuple[Any, Any]]
"""(q, k, v, request, wants_lse) -> (o, lse); lse may be None unless wanted."""


def find(name: object, framework: str) -> Implementation:
    """The function of an implementation for arrays of a framework, "numpy" or "torch".

    >>> find("dense", "numpy")
    Traceback (most recent call last):
    ValueError: impl must be 'composed', 'native', 'kernel' or 'tensorops', got 'dense'
    """
    choice("impl", name, NAMES)
    found: Implementation = getattr(import_module(f"{__name__}.{framework}"), str(name))
    return found
