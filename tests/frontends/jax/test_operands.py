"""Calls of other origin: a program whose operands are not those of its text ends in an error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from jaxed import jax, jnp, needs

import tilefold
from tilefold.backends.protocols import FORWARD
from tilefold.frontends.operation import Operation
from tilefold.frontends.written import text_of
from tilefold.problems.request import Request

pytestmark = needs

SHAPE = (1, 1, 8, 8)
OPERANDS = "the operands of this call are not those of its operation"


@pytest.mark.feature("T15")
@pytest.mark.parametrize(
    ("shape", "count", "dtype", "more", "message"),
    [
        ((1, 1, 200_000, 8), 3, "float32", {}, OPERANDS),
        (SHAPE, 2, "float32", {}, OPERANDS),
        (SHAPE, 3, "float16", {}, OPERANDS),
        (SHAPE, 3, "float32", {"more": np.int32(1)}, "the attributes of a call of tilefold are"),
    ],
    ids=["shape", "number", "type", "attribute"],
)
def test_buffers_are_compared_with_the_text(
    shape: tuple[int, ...], count: int, dtype: str, more: dict[str, Any], message: str
) -> None:
    jax.jit(tilefold.attention)(*[jnp.zeros(SHAPE)] * 3)  # registers the handler
    results = [jax.ShapeDtypeStruct(SHAPE, dtype), jax.ShapeDtypeStruct(SHAPE[:3], jnp.float32)]
    texts = {
        "operation": Operation(FORWARD, Request()).text,
        "given": text_of([[shape, "float32"]] * 3),
    }
    call = jax.ffi.ffi_call("tilefold_attention", results)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.jit(lambda *x: call(*x, **texts, **more))(*[jnp.zeros(SHAPE, dtype)] * count)


@pytest.mark.feature("A06")
def test_products_have_no_kernel_for_these_arrays() -> None:
    ones = jnp.ones((2, 2))
    with pytest.raises(NotImplementedError, match="torch tensors, got a jax array: pass"):
        tilefold.gemm(ones, ones)
    assert (tilefold.gemm(np.asarray(ones), np.asarray(ones)) == 2).all()
    c = jnp.arange(4.0)
    given = ("N", "N", 2, 2, 2, 1.0, np.ones(4, "f"), 2, np.ones(4, "f"), 2, 0.0, c, 2)
    with pytest.raises(NotImplementedError, match=r"parameter 12 \(c\) must be a NumPy array or a"):
        tilefold.blas.sgemm(*given)
    assert tilefold.blas.sgemm(*given, strict=False) is c
