"""Optional packages: why one of them cannot be imported, in words that follow its name."""

from __future__ import annotations

import importlib

from tilefold.common.check import one_line


def why_not(module: str) -> str | None:
    """Import a module: None where this works, else the reason.

    >>> why_not("math"), why_not("a_module_of_no_one")
    (None, 'is not installed')

    A package that is installed and broken, as PyTorch is where its libraries do not load, raises
    any error. The reason is then "does not import: " and the error, in one line.
    """
    try:
        importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name in (module, None):
            return "is not installed"
        return f"does not import: {type(error).__name__}: {one_line(error)}"
    return None
