"""Functions as a compiler runs them outside of its graphs: attributes of this module.

`torch.compiler.disable` imports torch's compiler, which takes a second. So each of them is made
when it is first asked for, and a compiler asks first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

_functions: dict[str, Callable[..., Any]] = {}


def keep(name: str, function: Callable[..., Any]) -> None:
    """Make a function an attribute of this module, by its name here."""
    _functions[name] = function


def __getattr__(name: str) -> Any:
    """The function of this name, which compilers do not trace."""
    if name not in _functions:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    reason = "forward mode, and transforms of torch.func, are no part of a graph"
    function, disable = _functions[name], torch.compiler.disable

    def run(*args: Any, **options: Any) -> Any:
        """Run the function with requests that a compiler has taken apart for its graph."""
        return function(
            *[x.as_request() if hasattr(x, "as_request") else x for x in args], **options
        )

    found = globals()[name] = disable(run, reason=reason)  # type: ignore[no-untyped-call]
    return found


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function that PyTorch calls back: a compiler that is at work does not trace it."""

    @wraps(function)
    def run(*args: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args)
        return _here.called(function, *args)

    return run


_here: Any = sys.modules[__name__]
keep("called", lambda function, *args: function(*args))
