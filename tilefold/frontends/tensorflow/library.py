"""TensorFlow's C API, found in the library that Python has already loaded.

The library exports what an operator needs: its definition, its kernel, and its shape function. No
header and no compiler is needed. The names were checked with TensorFlow 2.21 on Linux, and are
those of 2.16. Where one of them is missing, `missing` says which, and calls go another way.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf

from tilefold.common.check import one_line

Pointer, Int, Long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
Text, Size = ctypes.c_char_p, ctypes.c_size_t

SHAPES = ctypes.CFUNCTYPE(None, Pointer, Pointer)
"""The type of a shape function: (context, status)."""

CREATE = ctypes.CFUNCTYPE(Pointer, Pointer)
"""The type of what makes the state of a kernel: (construction) -> state."""

_FILES = {
    "linux": "libtensorflow_framework.so.2",
    "darwin": "libtensorflow_framework.2.dylib",
    "win32": "python/_pywrap_tensorflow_common.dll",
}
"""The library in TensorFlow's folder. Only that of Linux was run."""

NATIVE = (
    *("NewStatus", "DeleteStatus", "GetCode", "SetStatus", "NumInputs", "GetInput", "NumDims"),
    *("Dim", "TensorData", "AllocateOutput", "DeleteTensor", "OpKernelContext_Failure"),
)
"""The functions that kernels call, in the order of the table that native code reads."""

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "NewStatus": (Pointer,),
    "DeleteStatus": (None, Pointer),
    "SetStatus": (None, Pointer, Int, Text),
    "GetCode": (Int, Pointer),
    "Message": (Text, Pointer),
    "NewOpDefinitionBuilder": (Pointer, Text),
    "OpDefinitionBuilderAddAttr": (None, Pointer, Text),
    "OpDefinitionBuilderAddInput": (None, Pointer, Text),
    "OpDefinitionBuilderAddOutput": (None, Pointer, Text),
    "OpDefinitionBuilderSetShapeInferenceFunction": (None, Pointer, SHAPES),
    "RegisterOpDefinition": (None, Pointer, Pointer),
    "NewKernelBuilder": (Pointer, Text, Text, CREATE, Pointer, Pointer),
    "RegisterKernelBuilder": (None, Text, Pointer, Pointer),
    "OpKernelConstruction_GetAttrSize": (None, Pointer, Text, Pointer, Pointer, Pointer),
    "OpKernelConstruction_GetAttrString": (None, Pointer, Text, Pointer, Size, Pointer),
    "OpKernelConstruction_Failure": (None, Pointer, Pointer),
    "InputDatatype": (Int, Pointer, Int),
    "NewShapeHandle": (Pointer,),
    "DeleteShapeHandle": (None, Pointer),
    "ShapeInferenceContextGetInput": (None, Pointer, Int, Pointer, Pointer),
    "ShapeInferenceContextSetOutput": (None, Pointer, Int, Pointer, Pointer),
    "ShapeInferenceContextSetUnknownShape": (None, Pointer, Pointer),
    "ShapeInferenceContextSubshape": (None, Pointer, Pointer, Long, Long, Pointer, Pointer),
    "ShapeInferenceContextConcatenateShapes": (None, Pointer, Pointer, Pointer, Pointer, Pointer),
}

INVALID_ARGUMENT, RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL = 3, 8, 12, 13


class Library:
    """The functions of the C API by their names, without `TF_`."""

    def __init__(self) -> None:
        place = Path(tf.sysconfig.get_lib()) / _FILES[sys.platform]
        library = ctypes.CDLL(str(place))
        self._functions: dict[str, Any] = {}
        for name, (result, *arguments) in _SIGNATURES.items():
            function = getattr(library, f"TF_{name}")
            function.restype, function.argtypes = result, arguments
            self._functions[name] = function
        addresses = [ctypes.cast(getattr(library, f"TF_{name}"), Pointer).value for name in NATIVE]
        self.table = (Pointer * len(NATIVE))(*addresses)
        """The addresses of the functions that kernels call."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        try:
            function: Callable[..., Any] = self._functions[name]
        except KeyError:
            raise AttributeError(name) from None
        return function

    def checked(self, name: str, *arguments: Any) -> Any:
        """What a function returns whose last argument is a status. Raises RuntimeError."""
        status = self.NewStatus()
        try:
            result = self._functions[name](*arguments, status)
            if self.GetCode(status):
                raise RuntimeError(self.Message(status).decode())
            return result
        finally:
            self.DeleteStatus(status)


@functools.lru_cache(maxsize=1)
def _found() -> tuple[Library | None, str]:
    try:
        from tensorflow.python.framework import _pywrap_python_op_gen, op_def_registry

        assert callable(_pywrap_python_op_gen.GetPythonWrappers) and callable(op_def_registry.get)
        return Library(), ""
    except Exception as error:  # of any version of TensorFlow
        return None, f"{type(error).__name__}: {one_line(error)}"


def missing() -> str | None:
    """The reason why this TensorFlow takes no operator of ours; None if it does."""
    return _found()[1] or None


def library() -> Library:
    """The library. Raises NotImplementedError where `missing` has a reason."""
    found, reason = _found()
    if found is None:
        raise NotImplementedError(f"TensorFlow {tf.__version__} takes no operator: {reason}")
    return found
