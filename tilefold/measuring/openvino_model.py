"""Models of one operator that OpenVINO compiles for the processor, and runs on arrays in place."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from tilefold.measuring.workload import Array

NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "bool": "boolean"}
"""OpenVINO's names of types."""


class Model:
    """A call of an operator of OpenVINO, which is asked to compute in `dtype`."""

    def __init__(
        self, operator: str, arrays: Sequence[Array], dtype: str, threads: int, **attributes: Any
    ) -> None:
        import openvino

        operators = importlib.import_module("openvino.opset13")
        kinds = [getattr(openvino.Type, NAMES[x.dtype.name]) for x in arrays]
        parameters = [
            operators.parameter(x.shape, kind) for x, kind in zip(arrays, kinds, strict=True)
        ]
        node = getattr(operators, operator)(*parameters, **attributes)
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            # without it, float32 may be computed in bfloat16
            "INFERENCE_PRECISION_HINT": getattr(openvino.Type, NAMES[dtype]),
        }
        model = openvino.Model([node], parameters)
        self._compiled = openvino.Core().compile_model(model, "CPU", settings)
        self._request = self._compiled.create_infer_request()
        self._type = arrays[0].dtype
        # a Tensor does not own the memory it shares
        self._held = [x.view(np.uint16) if x.dtype.name == "bfloat16" else x for x in arrays]
        for number, (x, kind) in enumerate(zip(self._held, kinds, strict=True)):
            self._request.set_input_tensor(number, openvino.Tensor(x, x.shape, kind))

    def __call__(self) -> Array:
        """The result, of the type of the first array; the next call overwrites it."""
        self._request.infer()
        found: Array = self._request.get_output_tensor(0).data.view(self._type)
        return found

    def computes_in(self, layer: str) -> str:
        """OpenVINO's name of the type in which it computes a kind of layer here."""
        for node in self._compiled.get_runtime_model().get_ops():
            facts = node.get_rt_info()
            if facts["layerType"].astype(str) == layer:
                return str(facts["runtimePrecision"].astype(str))
        raise RuntimeError(f"OpenVINO has made no {layer} of the model")


def product(
    a: Array, b: Array, threads: int, *, transpose_a: bool = False, transpose_b: bool = False
) -> Model:
    """OpenVINO's product of two matrices of one type.

    Raises NotImplementedError where it has none, or computes it in another type.
    """
    dtype = a.dtype.name
    if dtype not in ("float32", "float16", "bfloat16"):
        raise NotImplementedError("OpenVINO multiplies float32, float16 and bfloat16 alone")
    turned = {"transpose_a": transpose_a, "transpose_b": transpose_b}
    model = Model("matmul", (a, b), dtype, threads, **turned)
    found = model.computes_in("MatMul")
    if found != NAMES[dtype]:
        raise NotImplementedError(f"OpenVINO computes products of {dtype} in {found} here")
    return model
