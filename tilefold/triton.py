"""Triton kernels by themselves: their plans and sources, and ways to run and to tune them.

`tilefold.attention` needs nothing of this module: it takes tensors on a GPU of NVIDIA or AMD
directly. Without a GPU, Triton's interpreter runs the same kernels on CPU tensors. Set
TRITON_INTERPRET=1 before Triton is imported, and use `machine = tilefold.triton.interpreted()`.

    >>> import tilefold
    >>> from tilefold import triton
    >>> problem = tilefold.Problem.of((1, 8, 4096, 64), dtype="bfloat16", mask=tilefold.causal())
    >>> plan = triton.plan(problem, "sm_90", "forward")
    >>> source = triton.emit(plan.launches[0].spec)
    >>> "def tilefold_forward(" in source
    True
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tilefold.common.first_use import imported

if TYPE_CHECKING:
    from tilefold.backends.triton.architectures import ARCHITECTURES
    from tilefold.backends.triton.autotune import tune
    from tilefold.backends.triton.calls import attention, attention_backward
    from tilefold.backends.triton.interpreter import Interpreted as interpreted
    from tilefold.backends.triton.machine import ResourceError
    from tilefold.backends.triton.matmul.calls import gemm, softmax
    from tilefold.backends.triton.matmul.gemm import GemmBlocks
    from tilefold.backends.triton.matmul.quantized import qgemm
    from tilefold.backends.triton.matmul.rows import SoftmaxBlocks
    from tilefold.backends.triton.plan import plan
    from tilefold.backends.triton.runtime import gpu, missing
    from tilefold.backends.triton.source import emit
    from tilefold.backends.triton.spec import Blocks, TritonSpec

_BACKEND = "tilefold.backends.triton"
_HOMES = {
    "ARCHITECTURES": "architectures",
    "Blocks": "spec",
    "GemmBlocks": "matmul.gemm",
    "ResourceError": "machine",
    "SoftmaxBlocks": "matmul.rows",
    "TritonSpec": "spec",
    "attention": "calls",
    "attention_backward": "calls",
    "emit": "source",
    "gemm": "matmul.calls",
    "gpu": "runtime",
    "interpreted": "interpreter",
    "missing": "runtime",
    "plan": "plan",
    "qgemm": "matmul.quantized",
    "softmax": "matmul.calls",
    "tune": "autotune",
}
"""The module of each public name."""

_CALLED = {"interpreted": "Interpreted"}
"""Names that differ in their module, by public name."""

__all__ = [
    "ARCHITECTURES",
    "Blocks",
    "GemmBlocks",
    "ResourceError",
    "SoftmaxBlocks",
    "TritonSpec",
    "attention",
    "attention_backward",
    "emit",
    "gemm",
    "gpu",
    "interpreted",
    "missing",
    "plan",
    "qgemm",
    "softmax",
    "tune",
]


_module = imported(import_module)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tilefold.triton' has no attribute {name!r}")
    value: Any = getattr(_module(f"{_BACKEND}.{_HOMES[name]}"), _CALLED.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
