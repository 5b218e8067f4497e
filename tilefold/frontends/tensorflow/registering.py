"""Operators of our own in TensorFlow's registry: definition, kernel, shapes, and Python function.

TensorFlow ends the process when a name is registered twice, and nothing can be registered anew. So
a name carries a version, a name that is there already is used as it is, and what TensorFlow calls
lives until the process ends: also after this module was loaded again. Each step looks whether it is
done, so a registration that was cut in two goes on at the next call.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tilefold.common.check import one_line
from tilefold.frontends.tensorflow import compute
from tilefold.frontends.tensorflow.library import (
    CREATE,
    INTERNAL,
    INVALID_ARGUMENT,
    RESOURCE_EXHAUSTED,
    SHAPES,
    UNIMPLEMENTED,
    Library,
    library,
)
from tilefold.frontends.tensorflow.states import ASK, TYPES, Array, Ready, State

END = 2**63 - 1
"""The end of a part of a shape that goes to its last axis."""

Part = tuple[int, int, int]
"""Axes of an input: its number, the first axis, and the end; negative axes count from the end."""

Prepare = Callable[[Sequence[Array]], Ready]
"""What prepares a call for inputs of certain shapes and types."""


@dataclass(frozen=True)
class Operator:
    """An operator: its name, attributes, inputs and outputs as TensorFlow writes them.

    `shapes` has the parts of the shape of each output, one after the other; further outputs have
    the last one, or none if it is None. `read` makes what prepares calls from the attribute
    "text", and raises ValueError for another text.
    """

    name: str
    attributes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: tuple[tuple[Part, ...] | None, ...]
    read: Callable[[str], Prepare]


_lock = threading.Lock()

kernels: dict[str, _Kernels] = {}
"""What this module has registered, by the names of operators."""


def register(operators: Sequence[Operator], gradients: dict[str, Callable[..., Any]]) -> None:
    """Register the operators that TensorFlow does not know yet, with their gradients."""
    from tensorflow import RegisterGradient
    from tensorflow.python.framework.kernels import get_registered_kernels_for_op as found

    with _lock:
        for operator in operators:
            name = operator.name
            if not found(name).kernel:
                made = _Kernels(operator, library())  # it compiles, which may fail
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))
                made.register()
                kernels[name] = made
            with contextlib.suppress(KeyError):  # it has one
                RegisterGradient(name)(gradients[name])


def _renew_lock() -> None:
    """In a forked child: a thread that held the lock is not there."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def functions(names: Sequence[str]) -> list[Callable[..., Any]]:
    """The Python functions of operators, as `tf.load_op_library` makes them."""
    from tensorflow.core.framework import op_def_pb2
    from tensorflow.python.framework import _pywrap_python_op_gen, op_def_registry

    listed = op_def_pb2.OpList(op=[op_def_registry.get(name) for name in names])
    made: dict[str, Any] = {}
    exec(_pywrap_python_op_gen.GetPythonWrappers(listed.SerializeToString()), made)
    short = {name.replace("_", ""): function for name, function in made.items()}
    return [short[name.lower()] for name in names]


class _Kernels:
    """An operator in TensorFlow's registry; TensorFlow calls its methods as long as it runs."""

    def __init__(self, operator: Operator, tf: Library) -> None:
        self._operator, self._tf = operator, tf
        self._states: dict[int, State] = {}
        self._lock = threading.Lock()
        self._shapes, self._create = SHAPES(self._infer), CREATE(self._new_state)
        self._ask = ASK(self._prepared)
        self._native = [compute.address(f"tilefold_{it}") for it in ("compute", "delete")]

    def register(self) -> None:
        """Register what of the operator TensorFlow does not know: its definition, its kernel."""
        from tensorflow.python.framework import op_def_registry

        if op_def_registry.get(self._operator.name) is None:
            self._define()
        name = self._operator.name.encode()
        kernel = self._tf.NewKernelBuilder(name, b"CPU", self._create, *self._native)
        self._tf.checked("RegisterKernelBuilder", name, kernel)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew_locks)

    def _renew_locks(self) -> None:
        """In a forked child: a thread that held a lock is not there."""
        self._lock = threading.Lock()
        for state in self._states.values():
            state.renew_lock()

    def _define(self) -> None:
        tf, operator = self._tf, self._operator
        builder = tf.NewOpDefinitionBuilder(operator.name.encode())
        for kind, texts in (
            ("Attr", (*operator.attributes, "text: string")),
            ("Input", operator.inputs),
            ("Output", operator.outputs),
        ):
            for text in texts:
                getattr(tf, f"OpDefinitionBuilderAdd{kind}")(builder, text.encode())
        tf.OpDefinitionBuilderSetShapeInferenceFunction(builder, self._shapes)
        tf.checked("RegisterOpDefinition", builder)

    def _infer(self, context: int, status: int) -> None:
        """Set the shapes of outputs; runs while a graph is traced."""
        tf = self._tf
        tf.ShapeInferenceContextSetUnknownShape(context, status)
        handles: list[int] = []
        try:
            for number, parts in enumerate(self._operator.shapes):
                if tf.GetCode(status):
                    return
                if parts is not None:
                    shape = self._joined(context, parts, handles, status)
                    tf.ShapeInferenceContextSetOutput(context, number, shape, status)
            while parts is not None and not tf.GetCode(status):  # the outputs of a list
                number += 1
                tf.ShapeInferenceContextSetOutput(context, number, shape, status)
                if tf.GetCode(status):  # there is none with this number
                    tf.SetStatus(status, 0, b"")
                    return
        finally:
            for handle in handles:
                tf.DeleteShapeHandle(handle)

    def _joined(
        self, context: int, parts: Sequence[Part], handles: list[int], status: int
    ) -> int | None:
        """The shape of parts of the shapes of inputs; None after an error, which status has."""
        tf = self._tf

        def made(name: str, *arguments: Any) -> int:
            handles.append(tf.NewShapeHandle())
            getattr(tf, f"ShapeInferenceContext{name}")(context, *arguments, handles[-1], status)
            return handles[-1]

        joined = None
        for number, start, end in parts:
            shape = made("GetInput", number)
            if not tf.GetCode(status):
                shape = made("Subshape", shape, start, end)
            if tf.GetCode(status):
                return None
            joined = shape if joined is None else made("ConcatenateShapes", joined, shape)
        return joined

    def _new_state(self, construction: int) -> int | None:
        """The state of a new kernel: one for each node of a graph."""
        tf = self._tf
        status = tf.NewStatus()
        try:
            prepare = self._operator.read(self._text(construction, status))
            ask = ctypes.cast(self._ask, ctypes.c_void_p).value or 0
            state = State(prepare, ctypes.addressof(tf.table), ask)
            with self._lock:
                for address in [at for at, old in self._states.items() if old.is_dead]:
                    del self._states[address]
                self._states[state.address] = state
            return state.address
        except BaseException as error:
            self._fail(status, error)
            tf.OpKernelConstruction_Failure(construction, status)
            return None
        finally:
            tf.DeleteStatus(status)

    def _text(self, construction: int, status: int) -> str:
        count, size = ctypes.c_int32(), ctypes.c_int32()
        self._tf.OpKernelConstruction_GetAttrSize(
            construction, b"text", ctypes.byref(count), ctypes.byref(size), status
        )
        memory = ctypes.create_string_buffer(size.value + 1)
        self._tf.OpKernelConstruction_GetAttrString(
            construction, b"text", memory, size.value, status
        )
        return memory.raw[: size.value].decode()

    def _prepared(
        self, state: int, context: int, words: Any, count: int, status: int
    ) -> int | None:
        """The address of the prepared call for inputs of these words."""
        try:
            found = tuple(words[:count])
            dtypes: list[str] = []
            place = 1
            while place < count:
                dtypes.append(_NAMES[self._tf.InputDatatype(context, len(dtypes))])
                place += 1 + found[place]
            return self._states[state].prepared(found, dtypes)
        except BaseException as error:
            self._fail(status, error)
            return None

    def _fail(self, status: int, error: BaseException) -> None:
        codes = {
            (TypeError, ValueError, IndexError): INVALID_ARGUMENT,
            (NotImplementedError,): UNIMPLEMENTED,
            (MemoryError,): RESOURCE_EXHAUSTED,
        }
        code = next((code for kinds, code in codes.items() if isinstance(error, kinds)), INTERNAL)
        line = one_line(error)
        text = line if code != INTERNAL else f"{type(error).__name__}: {line}"
        self._tf.SetStatus(status, code, text.encode())
        if not isinstance(error, Exception):
            _raise_soon(type(error))


def _raise_soon(kind: type[BaseException]) -> None:
    """Raise what is no error, such as KeyboardInterrupt, once TensorFlow has returned.

    Nothing is raised through TensorFlow's own code.
    """
    here = ctypes.c_ulong(threading.get_ident())
    ask = ctypes.pythonapi.PyThreadState_SetAsyncExc
    timer = threading.Timer(0.01, ask, (here, ctypes.py_object(kind)))
    timer.daemon = True
    timer.start()


_NAMES = {number: name for name, number in TYPES.items()}
