"""Products of matrices on GPUs: what is refused, and the examples of their modules."""

from __future__ import annotations

import doctest
import importlib
import re
from typing import Any

import numpy as np
import pytest
from interpreted import machine, needs, tensor
from metal import needs as needs_emulator
from numpy.typing import NDArray

from tilefold.backends.metal.dispatch import Emulated
from tilefold.backends.metal.matmul import calls as metal_calls
from tilefold.backends.triton.matmul import calls as triton_calls

Array = NDArray[Any]


def ones(*shape: int, dtype: str = "float32") -> Array:
    return np.ones(shape, dtype)


A, B = ones(2, 3), ones(3, 2)
BOTH: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((ones(2, 3), ones(2, 3)), {}, ValueError, "op(a) is 2 x 3 and op(b) 2 x 3"),
    ((ones(3), B), {}, ValueError, "a must have 2 to 32 axes"),
    ((ones(2, 2, 3), ones(4, 3, 2)), {}, ValueError, "the batches of a and b must broadcast"),
    ((A, ones(3, 2, dtype="int8")), {}, TypeError, "b must be one of float32, float"),
    ((A, B), {"dtype": "int8"}, ValueError, "the type of c must be"),
    ((A, B), {"beta": 1.0}, ValueError, "beta is 1.0, so c must be given"),
    ((A, B, A), {}, ValueError, "float32 of shape (2, 2), got"),
    ((A, B), {"bias": ones(3)}, ValueError, "bias must be (2,) or (2, 1), got (3,)"),
    (
        *((A, B), {"bias": ones(3), "bias_axis": "row"}),
        *(ValueError, "bias must be (..., 2), got (3,)"),
    ),
    ((A, B), {"gate": ones(2, 3)}, ValueError, "gate must be float32 of shape (3, 2) as b is"),
    ((A, B, ones(2, 2)), {"gate": B, "beta": 1.0}, ValueError, "beta must be 0 with a gate"),
    ((A, B), {"out": ones(3, 2)}, ValueError, "out must be float32 of shape (2, 2)"),
    (
        *((A, B), {"out": ones(2, 2), "dtype": "float16"}),
        *(ValueError, "dtype must be float32 as out is, got float16"),
    ),
    (
        *((A, B, ones(2, 2, dtype="float16")), {"out": ones(2, 2), "beta": 1.0}),
        *(TypeError, "c must be float32 beside this out, got float16"),
    ),
    (
        *((A, B, ones(3, 2)), {"out": ones(2, 2), "beta": 1.0}),
        *(ValueError, "c must broadcast to (2, 2), got (3, 2)"),
    ),
    (
        *((A, B), {"bias": ones(2, dtype="float16")}),
        *(TypeError, "bias must be float32 as the result is"),
    ),
    ((A, B), {"bias": ones(2), "bias_axis": "k"}, ValueError, "bias_axis must be None, 'column'"),
    ((A, B), {"activation": "sine"}, ValueError, "activation must be None"),
]
METAL = [
    *BOTH,
    ((ones(2, 3, dtype="float64"), B), {}, TypeError, "got float64"),
    ((A, B, np.broadcast_to(ones(1), (2, 2))), {}, ValueError, "no axis of it may be broadcast"),
    (([[1.0]], ones(1, 1)), {}, TypeError, "a must be a NumPy array or a tensor"),
]
TRITON = [
    *BOTH,
    ((ones(2, 3, dtype="float64"), B), {}, ValueError, "must both be float64 or nei"),
    ((A, B), {"bias_axis": "k"}, ValueError, "bias_axis must be None, 'column'"),
    ((A, B), {"precision": "tf32"}, ValueError, "precision must be 'highest'"),
]
REFUSED = [
    *(pytest.param("metal", *case, id=f"metal-{case[3]}") for case in METAL),
    *(pytest.param("triton", *case, id=f"triton-{case[3]}-{[*case[1]]}") for case in TRITON),
]


@pytest.mark.feature("A03")
@pytest.mark.parametrize(("backend", "arguments", "options", "error", "message"), REFUSED)
def test_gemm_refuses_what_is_no_product(
    backend: str,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    if backend == "metal":
        with pytest.raises(error, match=re.escape(message)):
            metal_calls.gemm(*arguments, **options, machine=Emulated())
        return
    on = machine()
    options = {name: tensor(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    with pytest.raises(error, match=re.escape(message)):
        triton_calls.gemm(*map(tensor, arguments), **options, machine=on)


SHOWN = ("gemm", "rows", "activation", "codes", "calls", "quantized")


@pytest.mark.parametrize(
    ("backend", "name"),
    [*(("metal", name) for name in SHOWN), *(("triton", name) for name in (*SHOWN, "tables"))],
)
def test_examples(backend: str, name: str) -> None:
    (needs_emulator if backend == "metal" else needs)()
    module = importlib.import_module(f"tilefold.backends.{backend}.matmul.{name}")
    failed, _ = doctest.testmod(module)
    assert failed == 0
