"""Arrays of frameworks that tilefold does not import: recognised by what is already imported."""

from __future__ import annotations

import sys
from typing import Any

_FRAMEWORKS = ("jax", "jaxlib", "tensorflow")


def is_traced(value: Any) -> bool:
    """True for an array without values, which JAX, TensorFlow or PyTorch traces.

    Where `torch.compile` traces, every array is one, a list too: it becomes a part of the graph.

    >>> is_traced(1.0)
    False
    """
    if compiled_by_torch():
        return hasattr(value, "shape") or isinstance(value, (list, tuple))
    torch = sys.modules.get("torch")
    if isinstance(value, getattr(torch, "Tensor", ())):
        return torch._C._get_tracing_state() is not None  # type: ignore[union-attr]  # imported
    if isinstance(value, getattr(sys.modules.get("jax.core"), "Tracer", ())):
        return True
    symbolic = getattr(sys.modules.get("tensorflow"), "is_symbolic_tensor", None)
    return bool(symbolic and symbolic(value))


def compiled_by_torch() -> bool:
    """True where `torch.compile` or `torch.export` traces the function that calls this one."""
    torch = sys.modules.get("torch")
    # PyTorch may be half imported
    return hasattr(torch, "compiler") and torch.compiler.is_compiling()  # type: ignore[union-attr]


def constant_of(number: Any) -> Any:
    """A number that PyTorch's compiler traces, as a constant of its graph; others as they are."""
    if not compiled_by_torch():
        return number
    torch = sys.modules["torch"]
    if isinstance(number, (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return torch.fx.experimental.symbolic_shapes.guard_scalar(number)
    return number


def is_of_torch(value: Any) -> bool:
    """True for a tensor of PyTorch, and for all that its compiler makes one of."""
    if compiled_by_torch():
        return True
    return isinstance(value, getattr(sys.modules.get("torch"), "Tensor", ()))


def unwrapped(value: Any) -> Any:
    """The tensor of a variable of Keras, which keeps its gradient; other values as they are."""
    if hasattr(value, "value") and type(value).__module__.partition(".")[0] == "keras":
        return value.value
    return value


def is_of_framework(value: Any) -> bool:
    """True for an array of JAX or TensorFlow, traced or not."""
    package = type(value).__module__.partition(".")[0]
    return package in _FRAMEWORKS and hasattr(value, "dtype") and hasattr(value, "shape")


def dtype_name(array: Any) -> str:
    """The name of an array's type, such as "float32".

    >>> import numpy as np
    >>> dtype_name(np.zeros(1, np.float16))
    'float16'
    """
    dtype = array.dtype
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.")


def type_name(dtype: Any, name: str = "out_dtype") -> str:
    """The name of a type of NumPy or torch, which may be its name already.

    >>> import numpy as np
    >>> type_name(np.float16), type_name("bfloat16")
    ('float16', 'bfloat16')
    """
    if isinstance(dtype, str):
        return dtype
    if type(dtype).__module__ == "torch":
        return str(dtype).removeprefix("torch.")
    import numpy as np

    try:
        return str(np.dtype(dtype).name)
    except TypeError:
        raise TypeError(f"{name} must be a type or its name, got {dtype!r}") from None
