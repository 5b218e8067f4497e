"""Passes in what XLA compiles, by the foreign functions of TensorFlow's own XLA.

XLA knows no operator of ours. It takes a module of StableHLO with a custom call. The shapes of such
a module must be known while the function is traced.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import tensorflow as tf

from tilefold.backends.protocols import Pass
from tilefold.common.check import one_line
from tilefold.frontends import xla
from tilefold.frontends.operation import Operation
from tilefold.frontends.tensorflow.operators import is_wanted
from tilefold.frontends.tensorflow.passes import gradients
from tilefold.frontends.tensorflow.second import second_gradients
from tilefold.frontends.written import text_of
from tilefold.problems.request import Request

Tensor = Any

_TYPES = {
    "float32": "f32",
    "float64": "f64",
    "float16": "f16",
    "bfloat16": "bf16",
    "int32": "i32",
    "int64": "i64",
    "bool": "i1",
}
"""StableHLO's names of types."""

_MESSAGE, _REGISTER, _TYPE_REGISTER = 56, 72, 88
"""The places of functions in XLA's table, in version 0.2."""

_OPERATION = "operation = "
"""What stands before the text of an operation in a module."""

_VERSION = 9
"""The format of the attributes of XlaCallModule."""


def is_compiled() -> bool:
    """True while a function is traced that XLA compiles."""
    if tf.executing_eagerly():
        return False
    from tensorflow.python.framework import ops
    from tensorflow.python.ops import control_flow_util

    found: bool = control_flow_util.GraphOrParentsInXlaContext(ops.get_default_graph())
    return found


def run(wanted: Pass, request: Request, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The results of a pass, which are differentiable."""
    if reason := missing():
        raise NotImplementedError(
            f"the XLA of TensorFlow {tf.__version__} takes no function of tilefold ({reason}): call"
            " it in a tf.function with jit_compile=False"
        )
    return _run(wanted, request, given)


def _run(wanted: Pass, request: Request, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    from tensorflow.compiler.tf2xla.ops import gen_xla_ops

    for name, tensor in zip(wanted.given, given, strict=True):
        if not tensor.shape.is_fully_defined():
            raise NotImplementedError(
                f"XLA compiles this function, so the shape of {name} must be known while it is"
                f" traced, got {tensor.shape}: give the function tensors of known shapes, or"
                " jit_compile=False"
            )
    described = [(tuple(tensor.shape.as_list()), tensor.dtype.name) for tensor in given]
    operation = Operation(wanted, request)
    results = operation.results(described)
    found: list[Tensor] = gen_xla_ops.xla_call_module(
        args=list(given),
        version=_VERSION,
        module=_module(operation.text, described, results),
        Tout=[tf.as_dtype(dtype) for _, dtype in results],
        Sout=[shape for shape, _ in results],
        platforms=["CPU"],
        disabled_checks=[f"custom_call:{xla.TARGET}"],
    )
    return tuple(found)


def _gradient(op: Any, *slopes: Tensor) -> list[Tensor | None]:
    """The gradients of what a call is given; `slopes` are those of its results.

    The operator is XLA's own. Raises LookupError, as without us, where another library made it.
    """
    module = op.get_attr("module").decode(errors="replace")
    if f"@{xla.TARGET}(" not in module:
        raise LookupError("No gradient defined for operation XlaCallModule")
    operation = Operation.read(_text(module))
    wanted, request, given = operation.wanted, operation.request, [*op.inputs]
    if wanted.operation == "backward":
        return second_gradients(wanted, request, given, slopes)
    asked = partial(is_wanted, op)
    return gradients(_run, wanted, request, given, op.outputs, slopes, asked)


with contextlib.suppress(KeyError):  # it was registered before this module was loaded again
    tf.RegisterGradient("XlaCallModule")(_gradient)


def _module(text: str, given: Sequence[Any], results: Sequence[Any]) -> str:
    """A module of StableHLO that calls the handler."""
    names = [f"%x{number}" for number in range(len(given))]
    kinds, made = ([_type(*each) for each in arrays] for arrays in (given, results))
    arguments = ", ".join(f"{name}: {kind}" for name, kind in zip(names, kinds, strict=True))
    values = ", ".join(f"%r#{number}" for number in range(len(made)))
    config = f"{_OPERATION}{json.dumps(text)}, given = {json.dumps(text_of(given))}"
    return f"""\
module @tilefold {{
  func.func public @main({arguments}) -> ({", ".join(made)}) {{
    %r:{len(made)} = stablehlo.custom_call @{xla.TARGET}({", ".join(names)})
      {{api_version = 4 : i32, backend_config = {{{config}}}}}
      : ({", ".join(kinds)}) -> ({", ".join(made)})
    return {values} : {", ".join(made)}
  }}
}}
"""


def _text(module: str) -> str:
    """The text of the operation that a module of `_module` calls."""
    start = module.index(_OPERATION) + len(_OPERATION)
    text: str = json.JSONDecoder().raw_decode(module, start)[0]
    return text


def _type(shape: tuple[int, ...], dtype: str) -> str:
    return f"tensor<{''.join(f'{size}x' for size in shape)}{_TYPES[dtype]}>"


# Registration -----------------------------------------------------------------------------------


class _Register(ctypes.Structure):
    _fields_: ClassVar = [
        ("size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("name_length", ctypes.c_size_t),
        ("platform", ctypes.c_char_p),
        ("platform_length", ctypes.c_size_t),
        ("instantiate", ctypes.c_void_p),
        ("prepare", ctypes.c_void_p),
        ("initialize", ctypes.c_void_p),
        ("execute", ctypes.c_void_p),
        ("traits", ctypes.c_uint32),
    ]


class _RegisterType(ctypes.Structure):
    _fields_: ClassVar = [
        ("size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("name_length", ctypes.c_size_t),
        ("type_id", ctypes.c_void_p),
        ("type_info", ctypes.c_void_p),
    ]


class _Message(ctypes.Structure):
    _fields_: ClassVar = [
        ("size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("error", ctypes.c_void_p),
        ("message", ctypes.c_char_p),
    ]


@functools.lru_cache(maxsize=1)
def missing() -> str | None:
    """Register the handler. The reason why TensorFlow's XLA does not take it; None if it does."""
    try:
        library = ctypes.CDLL(str(Path(tf.sysconfig.get_lib()) / "libtensorflow_cc.so.2"))
        table = library._ZN3xla3ffi12GetXlaFfiApiEv
        table.restype = ctypes.c_void_p
        api = table()
        if (found := xla.version(api)) != (0, 2):
            return f"its interface has version {found[0]}.{found[1]}"
        _register(api)
    except Exception as error:  # of any version of TensorFlow
        again = "already registered" in str(error)  # this module was loaded before
        return None if again else f"{type(error).__name__}: {one_line(error)}"
    return None


def _register(api: int) -> None:
    """Tell an XLA of version 0.2 about the handler. Raises RuntimeError with its message."""
    handler, name = xla.Handler(), xla.TARGET.encode()
    kind = _RegisterType(
        ctypes.sizeof(_RegisterType), None, name, len(name), handler.type_id, handler.type_info
    )
    _call(api, _TYPE_REGISTER, kind)
    stages = handler.instantiate, None, None, handler.execute
    size = _Register.traits.offset + 4
    _call(api, _REGISTER, _Register(size, None, name, len(name), b"Host", 4, *stages, 0))


def _call(api: int, place: int, arguments: ctypes.Structure) -> None:
    kind = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)

    def function(at: int) -> Any:
        return kind(ctypes.c_void_p.from_address(api + at).value or 0)

    error = function(place)(ctypes.addressof(arguments))
    if error:
        said = _Message(ctypes.sizeof(_Message), None, error, None)
        function(_MESSAGE)(ctypes.addressof(said))
        raise RuntimeError((said.message or b"").decode())
