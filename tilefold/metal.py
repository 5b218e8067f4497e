"""Metal kernels by themselves: their parts, their sources, and ways to run them.

`tilefold.attention` needs nothing of this module: it takes tensors on an Apple GPU directly.

    >>> import numpy as np
    >>> import tilefold
    >>> machine = tilefold.metal.emulated()  # on a Mac: tilefold.metal.gpu(), with tensors on "mps"
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 5, 8), np.float32)
    >>> with tilefold.metal.queue(machine) as commands:
    ...     o, lse = commands.attention(q, k, v, mask=tilefold.causal())
    >>> bool(np.allclose(o[:, :, 0], v[:, :, 0]))  # the first query sees only the first key
    True
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tilefold.common.first_use import imported

if TYPE_CHECKING:
    from tilefold.backends.metal import emulate
    from tilefold.backends.metal.commands import Commands as queue
    from tilefold.backends.metal.commands import attention, attention_backward
    from tilefold.backends.metal.dispatch import CompileError
    from tilefold.backends.metal.dispatch import Emulated as emulated
    from tilefold.backends.metal.families import FAMILIES
    from tilefold.backends.metal.kernels import fragment, matmul2d
    from tilefold.backends.metal.kernels.arguments import sizes
    from tilefold.backends.metal.kernels.fragment import Fragment
    from tilefold.backends.metal.kernels.matmul2d import Matmul2d, Tile
    from tilefold.backends.metal.kernels.msl import Text
    from tilefold.backends.metal.matmul.calls import gemm, softmax
    from tilefold.backends.metal.matmul.quantized import qgemm
    from tilefold.backends.metal.matmul.spec import GemmBlocks
    from tilefold.backends.metal.plan import plan
    from tilefold.backends.metal.runtime import gpu, missing
    from tilefold.backends.metal.source import emit
    from tilefold.backends.metal.spec import Blocks, MetalSpec
    from tilefold.compiling import compile_async

_BACKEND = "tilefold.backends.metal"
_HOMES = {
    "Blocks": (f"{_BACKEND}.spec", "Blocks"),
    "CompileError": (f"{_BACKEND}.dispatch", "CompileError"),
    "FAMILIES": (f"{_BACKEND}.families", "FAMILIES"),
    "Fragment": (f"{_BACKEND}.kernels.fragment", "Fragment"),
    "GemmBlocks": (f"{_BACKEND}.matmul.spec", "GemmBlocks"),
    "Matmul2d": (f"{_BACKEND}.kernels.matmul2d", "Matmul2d"),
    "MetalSpec": (f"{_BACKEND}.spec", "MetalSpec"),
    "Text": (f"{_BACKEND}.kernels.msl", "Text"),
    "Tile": (f"{_BACKEND}.kernels.matmul2d", "Tile"),
    "attention": (f"{_BACKEND}.commands", "attention"),
    "attention_backward": (f"{_BACKEND}.commands", "attention_backward"),
    "compile_async": ("tilefold.compiling", "compile_async"),
    "emit": (f"{_BACKEND}.source", "emit"),
    "emulate": (f"{_BACKEND}.emulate", None),
    "emulated": (f"{_BACKEND}.dispatch", "Emulated"),
    "fragment": (f"{_BACKEND}.kernels.fragment", None),
    "gemm": (f"{_BACKEND}.matmul.calls", "gemm"),
    "gpu": (f"{_BACKEND}.runtime", "gpu"),
    "matmul2d": (f"{_BACKEND}.kernels.matmul2d", None),
    "missing": (f"{_BACKEND}.runtime", "missing"),
    "plan": (f"{_BACKEND}.plan", "plan"),
    "qgemm": (f"{_BACKEND}.matmul.quantized", "qgemm"),
    "queue": (f"{_BACKEND}.commands", "Commands"),
    "sizes": (f"{_BACKEND}.kernels.arguments", "sizes"),
    "softmax": (f"{_BACKEND}.matmul.calls", "softmax"),
}
"""The home of each public name: a module, and the name in it (None means the module itself)."""

__all__ = [
    "FAMILIES",
    "Blocks",
    "CompileError",
    "Fragment",
    "GemmBlocks",
    "Matmul2d",
    "MetalSpec",
    "Text",
    "Tile",
    "attention",
    "attention_backward",
    "compile_async",
    "emit",
    "emulate",
    "emulated",
    "fragment",
    "gemm",
    "gpu",
    "matmul2d",
    "missing",
    "plan",
    "qgemm",
    "queue",
    "sizes",
    "softmax",
]


_module = imported(import_module)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tilefold.metal' has no attribute {name!r}")
    module, inner = _HOMES[name]
    value: Any = _module(module)
    if inner is not None:
        value = getattr(value, inner)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
