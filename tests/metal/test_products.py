"""Products and softmax on the emulator: what the emitted texts compute, on both kinds of GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import product_cases
import pytest
from compare import assert_near
from metal import needs
from product_cases import BATCHES, SHAPES, VARIANTS, Variant, given, padded

from tilefold.backends.metal.dispatch import Emulated
from tilefold.backends.metal.emulator.fault import Fault
from tilefold.backends.metal.matmul import calls

pytestmark = pytest.mark.slow

FAMILIES = ("apple7", "apple9")
"""One that stages operands in threadgroup memory, and one whose lanes read them."""


METAL_SHAPES = (*SHAPES, (48, 48, 24), (47, 49, 25))
"""The shared shapes, whole blocks, and one that is not."""

assert_product = partial(product_cases.assert_product, activation_unit=3e-7)
"""Activations are off by 3e-7 of their argument here."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    needs()
    return str(request.param)


@pytest.fixture(scope="module")
def machine(family: str) -> Emulated:
    return Emulated(family)


def product(
    machine: Emulated, variant: Variant, shape: tuple[int, int, int], **options: Any
) -> None:
    """Raises unless a product of random numbers is right."""
    x = given(variant, shape)
    c = x.c.copy()
    got = calls.gemm(
        x.a,
        x.b,
        c,
        transpose_a=variant.transpose_a,
        transpose_b=variant.transpose_b,
        bias=x.bias if variant.bias else None,
        bias_axis=variant.bias or "column",
        activation=variant.activation,
        **x.scalars,
        **options,
        machine=machine,
    )
    assert got is c
    activation = variant.activation
    assert_product(got, x.left, x.right, c=x.c, bias=x.added, activation=activation, **x.scalars)


@pytest.mark.feature("M11")
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_products_of_any_shape(machine: Emulated, variant: Variant) -> None:
    for shape in METAL_SHAPES:
        product(machine, variant, shape, cores=1)


@pytest.mark.feature("M11", "A05")
def test_one_text_serves_all_sizes_and_scalars(family: str) -> None:
    seen: list[str] = []

    class Listening(Emulated):
        def compile(self, text: str) -> Any:
            seen.append(text)
            return super().compile(text)

    machine = Listening(family)
    for shape in ((1, 2, 3), (50, 40, 30), (7, 100, 8)):
        product(machine, VARIANTS[0], shape, cores=1)
    assert len(seen) == 1 and "50" not in seen[0]


@pytest.mark.feature("M11")
def test_where_arrays_lie_does_not_matter(machine: Emulated) -> None:
    """Padded rows, turned and reversed ones: the emulator faults outside of what a view reaches."""
    m, n, k = 37, 21, 19
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(m, k)).astype("float32"), rng.normal(size=(k, n)).astype("float32")
    for place in PLACES:
        left, right = PLACES[place](a), PLACES[place](b)
        assert (left == a).all() and (right == b).all()
        c = PLACES[place](np.full((m, n), np.nan, "float32"))
        assert_product(calls.gemm(left, right, c, machine=machine), a, b)
        assert calls.gemm(left, right, c, machine=machine) is c


PLACES = {
    "as they come": np.ascontiguousarray,
    "padded rows": padded,
    "padded columns": lambda array: padded(array.T).T,
    "backwards": lambda array: np.ascontiguousarray(array[::-1, ::-1])[::-1, ::-1],
}


@pytest.mark.feature("M11")
def test_a_batch_broadcasts_as_in_numpy(machine: Emulated) -> None:
    rng = np.random.default_rng(6)
    for shape_a, shape_b in BATCHES:
        a, b = (rng.normal(size=shape).astype("float32") for shape in (shape_a, shape_b))
        got = calls.gemm(a, b, machine=machine)
        assert got.shape == np.matmul(a, b).shape
        assert_product(got, a, b)


@pytest.mark.feature("M11")
def test_a_batch_has_a_bias_of_its_own_or_shares_one(machine: Emulated) -> None:
    rng = np.random.default_rng(7)
    a, b = (
        rng.normal(size=(2, 3, 9, 5)).astype("float32"),
        rng.normal(size=(5, 11)).astype("float32"),
    )
    for axis, length in (("column", 11), ("row", 9)):
        for batch in ((), (3,), (2, 1), (2, 3)):
            bias = rng.normal(size=(*batch, length)).astype("float32")
            got = calls.gemm(a, b, bias=bias, bias_axis=axis, machine=machine)
            added = bias[..., None, :] if axis == "column" else bias[..., None]
            assert_product(got, a, b, bias=added)


def test_c_is_read_only_where_beta_asks(machine: Emulated) -> None:
    ones = np.ones((3, 3), "float32")
    for old in (np.nan, np.inf):
        c = np.full((3, 3), old, "float32")
        assert (calls.gemm(ones, ones, c, alpha=2.0, machine=machine) == 6).all()
    c = np.full((3, 3), np.nan, "float32")
    assert np.isnan(calls.gemm(ones, ones, c, beta=1.0, machine=machine)).all()


def test_the_bias_is_not_times_alpha_and_comes_before_the_activation(machine: Emulated) -> None:
    ones, bias = np.ones((2, 2), "float32"), np.array([-3, 1], "float32")
    c = np.full((2, 2), 10, "float32")
    options: dict[str, Any] = {"alpha": 0.5, "bias": bias, "activation": "relu"}
    assert (calls.gemm(ones, ones, **options, machine=machine) == [[0, 2], [0, 2]]).all()
    assert (
        calls.gemm(ones, ones, c, beta=0.25, **options, machine=machine) == [[0.5, 4.5]] * 2
    ).all()


@pytest.mark.parametrize("kept", ["float16", "bfloat16"])
def test_half_types_add_up_in_float32(machine: Emulated, kept: str) -> None:
    """4097 ones are no float16, and 257 no bfloat16: a sum in them would stop before."""
    a = np.ones((1, 4098), kept)
    got = calls.gemm(a, a.T, dtype="float32", machine=machine)
    assert got.dtype == np.float32 and got == 4098


def test_what_is_not_finite_stays_where_it_is(machine: Emulated) -> None:
    """NaN and infinity in one row and one column reach no other, at edges neither."""
    rng = np.random.default_rng(8)
    a, b = rng.normal(size=(35, 9)).astype("float32"), rng.normal(size=(9, 37)).astype("float32")
    a[3, 8], a[34, 0], b[8, 36] = np.nan, np.inf, np.nan
    got = calls.gemm(a, b, machine=machine)
    clean = np.ones(got.shape, bool)
    clean[[3, 34]] = clean[:, 36] = False
    assert np.isfinite(got[clean]).all() and not np.isfinite(got[~clean]).any()


@pytest.mark.parametrize("name", ["relu", "gelu", "silu", "tanh"])
@pytest.mark.parametrize("family", ["apple9"], indirect=True)
def test_activations_of_numbers_of_any_size(machine: Emulated, name: str) -> None:
    x = np.concatenate([np.linspace(-20, 20, 4001), [-1e30, 1e30, 1e-30, -88.8, 0]])
    a, one = x.astype("float32")[:, None], np.ones((1, 1), "float32")
    got = calls.gemm(a, one, activation=name, machine=machine)
    assert_product(got, a, one, activation=name)
    assert np.isnan(calls.gemm(a * np.nan, one, activation=name, machine=machine)).all()


@pytest.mark.parametrize(
    "edge, family", [("m", "apple7"), ("n", "apple9"), ("k", "apple7")], indirect=["family"]
)
def test_a_forgotten_edge_is_found(family: str, edge: str) -> None:
    """The emulator sees the kernel leave an array by one element: these tests can fail."""

    class Careless(Emulated):
        def compile(self, text: str) -> Any:
            number = "mnk".index(edge)
            broken = text.replace(f"= sizes[{number}];", f"= sizes[{number}] + 1;")
            assert broken != text
            return super().compile(broken)

    ones = np.ones((5, 5), "float32")
    with pytest.raises(Fault, match="out-of-bounds"):
        calls.gemm(ones, ones, machine=Careless(family))


def test_tensors_give_tensors(machine: Emulated) -> None:
    torch = pytest.importorskip("torch")
    a = torch.ones(3, 4, dtype=torch.bfloat16)
    b = torch.ones(5, 4, dtype=torch.bfloat16)
    c = calls.gemm(a, b.T, machine=machine)
    assert isinstance(c, torch.Tensor) and c.dtype == torch.bfloat16 and (c == 4).all()
    p, lse = calls.softmax(a, return_lse=True, machine=machine)
    assert p.dtype == torch.bfloat16 and lse.dtype == torch.float32 and (p == 0.25).all()


def checked(family: str, check: str) -> Emulated:
    """A machine whose emulator checks so; skips, with the reason, where it cannot."""
    needs(check)
    return Emulated(family, check)


@pytest.mark.parametrize("check", ["address", "memory", "thread"])
def test_sanitizers_find_nothing(family: str, check: str) -> None:
    machine = checked(family, check)
    product(machine, VARIANTS[1], (37, 50, 19), cores=1)
    x = np.random.default_rng(9).normal(size=(3, 1100)).astype("float32")
    for width in (70, 1100):
        p = calls.softmax(x[:, :width], machine=machine)
        assert_near("sums", p.sum(axis=1), np.ones(3), 1e-5)


@pytest.mark.parametrize("barrier", [0, 1])
def test_a_missing_barrier_is_found(barrier: int) -> None:
    """Before a block is copied over the last one, and before what was copied is read."""

    class Careless(Emulated):
        def compile(self, text: str) -> Any:
            parts = text.split("threadgroup_barrier(mem_flags::mem_threadgroup);")
            assert len(parts) == 3
            parts[barrier : barrier + 2] = ["".join(parts[barrier : barrier + 2])]
            joined = "threadgroup_barrier(mem_flags::mem_threadgroup);".join(parts)
            return super().compile(joined)

    machine = checked("apple7", "thread")
    ones = np.ones((40, 40), "float32")
    with pytest.raises(Fault) as caught:
        calls.gemm(ones, ones, machine=Careless(machine.family, machine.checks))
    assert caught.value.kind == "race"


def test_a_stage_that_is_not_filled_is_found() -> None:
    class Careless(Emulated):
        def compile(self, text: str) -> Any:
            broken = text.replace("stage_a[r * ", "if (inside) stage_a[r * ")
            assert broken != text
            return super().compile(broken)

    machine = checked("apple7", "memory")
    ones = np.ones((5, 5), "float32")
    with pytest.raises(Fault) as caught:
        calls.gemm(ones, ones, machine=Careless(machine.family, machine.checks))
    assert caught.value.kind == "unwritten memory"
