"""Matrices packed once: the same results, and what is refused."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from gemms import exact, normal

import tilefold

TYPES = (
    *(("float32", "float32"), ("float64", "float64"), ("float16", "float16")),
    *(("bfloat16", "bfloat16"), ("float16", "float32"), ("int8", "int8")),
    *(("int8", "uint8"), ("float32", "int8"), ("bfloat16", "uint8")),
)
"""Types of a and of the packed matrix."""


@pytest.mark.slow
@pytest.mark.parametrize("types", TYPES, ids="-".join)
def test_products_with_a_packed_matrix_are_those_with_the_matrix(types: tuple[str, str]) -> None:
    """Of any rows, in batches, transposed or not; the matrix may change after it was packed."""
    for turned, (k, n) in ((False, (37, 70)), (True, (130, 9))):
        w = normal(*((n, k) if turned else (k, n)), dtype=types[1])
        packed = tilefold.pack(w, transpose=turned, a_dtype=types[0])
        assert packed.shape == (k, n) and packed.dtype == types[1] and packed.nbytes >= w.nbytes
        kept = w.copy()
        w[...] = 0
        for shape in ((k,), (1, k), (2, 33, k), (200, k)):
            a = normal(*shape, dtype=types[0])
            options = {"alpha": 2.0, "transpose_b": turned}
            want, terms = exact(a, kept, **options)
            got = tilefold.gemm(a, packed, alpha=2.0)
            plain = tilefold.gemm(a, kept, **options)
            assert got.shape == want.shape and got.dtype == plain.dtype
            unit = {"bfloat16": 2**-7, "float16": 2**-9}.get(got.dtype.name, 1e-5)
            assert (abs(got.astype("d") - want) <= unit * (terms + 1e-3)).all()


def test_a_packed_pair_has_a_gate_and_options() -> None:
    x, w, gate, bias = normal(2, 9, 24), normal(24, 50), normal(24, 50), normal(50)
    one, two = tilefold.pack(w), tilefold.pack(gate)
    options = {"bias": bias, "activation": "silu", "alpha": 0.5}
    got = tilefold.gemm(x, one, gate=two, **options)
    assert abs(got - exact(x, w, gate=gate, **options)[0]).max() < 1e-4
    c = normal(18, 50)
    assert tilefold.gemm(x.reshape(18, 24), one, c, beta=0.5, out=c) is c


def test_empty_matrices_are_packed_too() -> None:
    nothing = tilefold.pack(np.ones((0, 3), "f"))
    assert (tilefold.gemm(np.ones((2, 0), "f"), nothing, bias=np.ones(3, "f")) == 1).all()
    assert tilefold.gemm(np.ones((2, 3), "f"), tilefold.pack(np.ones((3, 0), "f"))).shape == (2, 0)
    assert nothing.nbytes == 0


@pytest.mark.feature("T15")
def test_bad_input_raises_one_line() -> None:
    w = normal(4, 5)
    packed = tilefold.pack(w)
    assert copy.deepcopy(packed) is packed and "4 x 5, float32" in repr(packed)
    with pytest.raises(TypeError, match="a packed matrix is for one machine"):
        pickle.dumps(packed)
    for wrong, line in ((normal(4), "w must have 2 axes"), (normal(2, 4, 5), "w must have 2 axes")):
        with pytest.raises(ValueError, match=line):
            tilefold.pack(wrong)
    with pytest.raises(TypeError, match="w must be one of float32"):
        tilefold.pack(w.astype("i4"))
    with pytest.raises(ValueError, match="a_dtype must be None, 'float32'"):
        tilefold.pack(w, a_dtype="int32")
    with pytest.raises(TypeError, match="a_dtype must be a type or its name"):
        tilefold.pack(w, a_dtype=object())
    a = normal(3, 4)
    with pytest.raises(ValueError, match="op\\(a\\) is 3 x 3 and op\\(b\\) 4 x 5"):
        tilefold.gemm(a[:, :3], packed)
    with pytest.raises(ValueError, match="transpose_b must be False where b is packed"):
        tilefold.gemm(normal(3, 5), packed, transpose_b=True)
    with pytest.raises(TypeError, match="gate must be packed as b is"):
        tilefold.gemm(a, packed, gate=w)
    with pytest.raises(TypeError, match="gate must be packed as b is"):
        tilefold.gemm(a, w, gate=packed)
    with pytest.raises(
        NotImplementedError, match="b, of float32, is packed for other products than"
    ):
        tilefold.gemm(a.astype("d"), packed)


@pytest.mark.slow
def test_tensors_and_packed_matrices() -> None:
    torch = pytest.importorskip("torch")
    layer, x = torch.nn.Linear(12, 7), torch.randn(5, 12)
    packed = tilefold.pack(layer.weight.detach(), transpose=True)
    with torch.no_grad():
        got = tilefold.gemm(x, packed, bias=layer.bias)
        assert (got - layer(x)).abs().max() < 1e-5
        half = tilefold.pack(layer.weight.bfloat16(), transpose=True)
        assert tilefold.gemm(x.bfloat16(), half).dtype is torch.bfloat16
        out = torch.empty(5, 7)
        assert tilefold.gemm(x, packed, out=out) is out
        assert (tilefold.gemm(x.numpy(), packed) == out.numpy()).all()
    with pytest.raises(NotImplementedError, match="a packed matrix carries no gradients"):
        tilefold.gemm(x.requires_grad_(), packed)
    with pytest.raises(ValueError, match="w wants a gradient, which a packed matrix has not"):
        tilefold.pack(layer.weight)


@pytest.mark.slow
def test_a_compiler_leaves_its_graph_for_a_packed_matrix() -> None:
    torch = pytest.importorskip("torch")
    w, x = torch.randn(12, 7), torch.randn(5, 12)
    packed = tilefold.pack(w)
    run = torch.compile(lambda x: tilefold.gemm(x + 1, packed) * 2, backend="eager")
    assert (run(x) - (x + 1) @ w * 2).abs().max() < 1e-5
