"""Products of their own by Triton: what the kernels compute, what their texts say, what is refused.

The texts run in Triton's interpreter, as emitted; that GPUs' compilers take them too is asked in a
process of its own.
"""

from __future__ import annotations

import doctest
import importlib
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from compare import UNITS, assert_near
from interpreted import array, machine, needs, tensor
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from triton_ahead import compiled

from tilefold.backends.triton import gemm, standalone
from tilefold.backends.triton.architectures import ARCHITECTURES
from tilefold.backends.triton.dispatch import Interpreted
from tilefold.backends.triton.gemm import GemmBlocks, GemmSpec

Array = NDArray[Any]

SMALL = GemmBlocks(32, 32, 16, warps=4, stages=2, band=2)
LARGE = GemmBlocks(128, 256, 64, warps=8, stages=3)

PRODUCT = GemmSpec("bfloat16", "bfloat16", "bfloat16", SMALL)
OTHER: dict[str, Any] = {
    "a": "float16",
    "b": "float32",
    "c": "float32",
    "blocks": LARGE,
    "bias": "row",
    "activation": "relu",
    "products": "tf32",
    "wide": True,
}
SLOPES = {None: 1.0, "relu": 1.0, "gelu": 1.13, "silu": 1.1, "tanh": 1.0}
"""How much an activation can make of an error."""


class Variant(NamedTuple):
    """Options of a product that make one kernel."""

    a: str = "float32"
    b: str = "float32"
    c: str = "float32"
    transpose_a: bool = False
    transpose_b: bool = False
    bias: str | None = None
    activation: str | None = None
    every: int = 1
    """Elements from one number of a row to the next."""

    def __str__(self) -> str:
        turned = "".join("NT"[each] for each in (self.transpose_a, self.transpose_b))
        return "-".join(str(each) for each in (*self[:3], turned, *self[5:]))


VARIANTS = (
    Variant(),
    Variant("float16", "float16", "float16", False, True, "column", "relu"),
    Variant("bfloat16", "bfloat16", "bfloat16", True, False, "row", "gelu"),
    Variant("float16", "float32", "float32", True, True, "row", "silu"),
    Variant("bfloat16", "float16", "float32", False, False, "column", "tanh"),
    Variant("float32", "bfloat16", "bfloat16", True, False, every=3),
    Variant("float64", "float64", "float64", False, True, "column", "gelu"),
)
SHAPES = (
    *((1, 1, 1), (2, 20, 3), (20, 2, 9), (99, 3, 257), (3, 257, 99), (1, 130, 8), (130, 1, 24)),
    *((32, 32, 16), (31, 33, 17), (64, 96, 40), (33, 95, 7), (35, 6, 1)),
    *((0, 5, 3), (5, 0, 3), (5, 3, 0)),
)
"""m, n, k: single numbers, very long and very narrow ones, whole blocks, one beside them, none."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The interpreter computes what a kernel then does not choose."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@dataclass(frozen=True, eq=False)
class Listening(Interpreted):
    """The interpreter, and the texts that it was given."""

    texts: list[str] = field(default_factory=list)

    def function(self, text: str, entry: str) -> Any:
        self.texts.append(text)
        return super().function(text, entry)


def multiply(
    a: Array, b: Array, c: Array | None = None, on: Interpreted | None = None, **options: Any
) -> Array:
    """`standalone.gemm` on arrays."""
    tensors = {name: options[name] for name in ("bias",) if options.get(name) is not None}
    tensors = {name: tensor(each) for name, each in tensors.items()}
    written = None if c is None else tensor(c)
    options = {"blocks": SMALL, **options, **tensors}
    got = standalone.gemm(tensor(a), tensor(b), written, machine=on or machine(), **options)
    assert written is None or got is written
    return array(got, str(got.dtype).removeprefix("torch."))


def activate(name: str | None, x: Array) -> Array:
    """An activation in float64."""
    if name == "relu":
        return np.maximum(x, 0)
    if name == "gelu":
        return np.array(x * 0.5 * (1 + np.vectorize(math.erf, otypes=["d"])(x / math.sqrt(2))))
    if name == "silu":
        return np.array(x / (1 + np.exp(-x)))
    return np.tanh(x) if name == "tanh" else x


def assert_product(
    got: Array,
    a: Array,
    b: Array,
    *,
    alpha: float = 1,
    beta: float = 0,
    c: Array | float = 0,
    bias: Array | float = 0,
    activation: str | None = None,
) -> None:
    """Raises unless a product is as near to that in float64 as its sums can be.

    A sum of k rounded products, in any order, is off by k units of the sum of their sizes at most;
    alpha, the bias, beta C and their sums are five roundings more. Of float64 the definition has as
    many itself. An activation passes that on by its slope, and is off by 4 units of its argument
    itself. The result is rounded once.
    """
    left, right, old, added = (np.asarray(x, np.float64) for x in (a, b, c, bias))
    terms = abs(alpha) * (abs(left) @ abs(right)) + abs(beta * old) + abs(added)
    sums = alpha * (left @ right) + beta * old + added
    want = activate(activation, sums)
    kept = str(got.dtype)
    unit = 2 * UNITS["float64"] if a.dtype == np.float64 else UNITS["float32"]
    allowed = SLOPES[activation] * (a.shape[-1] + 5) * unit * terms
    allowed += 4 * unit * abs(sums) * (activation is not None)
    allowed += 1.01 * UNITS[kept] * (abs(want) + allowed)
    allowed += float(ml_dtypes.finfo(kept).smallest_subnormal)
    assert_near("c", got, want, allowed)


def product(
    variant: Variant, shape: tuple[int, int, int], on: Interpreted | None = None, **options: Any
) -> None:
    """Raises unless a product of random numbers is right."""
    m, n, k = shape
    rng = np.random.default_rng(shape)

    def matrix(rows: int, columns: int, dtype: str, turned: bool) -> tuple[Array, Array]:
        lengths = (columns, rows) if turned else (rows, columns)
        wide = rng.normal(size=(lengths[0], lengths[1] * variant.every)).astype(dtype)
        found = wide[:, :: variant.every]
        return found, found.T if turned else found

    a, left = matrix(m, k, variant.a, variant.transpose_a)
    b, right = matrix(k, n, variant.b, variant.transpose_b)
    c = rng.normal(size=(m, n)).astype(variant.c)
    bias = rng.normal(size={"column": n, "row": m, None: 0}[variant.bias]).astype(variant.c)
    scalars = {"alpha": float(np.float32(rng.normal())), "beta": float(np.float32(rng.normal()))}
    if variant.a == "float64":
        scalars = {"alpha": 1 / 3, "beta": -math.pi}
    got = multiply(
        a,
        b,
        c.copy(),
        on,
        transpose_a=variant.transpose_a,
        transpose_b=variant.transpose_b,
        bias=bias if variant.bias else None,
        bias_axis=variant.bias or "column",
        activation=variant.activation,
        **scalars,
        **options,
    )
    added = {"column": bias, "row": bias[:, None], None: 0.0}[variant.bias]
    assert_product(got, left, right, c=c, bias=added, activation=variant.activation, **scalars)


@pytest.mark.feature("M11", "S10")
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_products_of_any_shape(variant: Variant) -> None:
    for shape in SHAPES:
        product(variant, shape)


LADDER = (
    *((2, 2, 20), (20, 2, 2), (3, 7, 11), (1000, 10, 10), (10, 10, 1000)),
    *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((1024,) * 3, (999,) * 3)),
)


@pytest.mark.feature("M11", "S01")
@pytest.mark.parametrize("shape", LADDER)
def test_the_shapes_of_the_learning_ladder(shape: tuple[int, int, int]) -> None:
    """Rows, contraction, columns, held to 1e-4 of numbers from -1 to 1."""
    rows, inner, columns = shape
    rng = np.random.default_rng(shape)
    a, b = rng.uniform(-1, 1, (rows, inner)), rng.uniform(-1, 1, (inner, columns))
    a, b = a.astype("float32"), b.astype("float32")
    got = multiply(a, b, blocks=LARGE)
    assert_near("c", got, a.astype("float64") @ b.astype("float64"), 1e-4)
    into = np.full((rows, columns), np.nan, "float32")
    assert (multiply(a, b, into, blocks=LARGE) == got).all()


@pytest.mark.feature("M11", "A05")
def test_one_text_serves_all_sizes_and_scalars() -> None:
    needs()
    on = Listening()
    for shape in ((1, 2, 3), (50, 40, 30), (7, 100, 8)):
        product(VARIANTS[0], shape, on)
    assert len(set(on.texts)) == 1 and "50" not in on.texts[0]


@pytest.mark.feature("M11")
@pytest.mark.parametrize("band", [1, 2, 3, 8])
def test_every_block_of_c_has_one_program_whatever_the_bands(band: int) -> None:
    a, b = np.ones((5 * 32 - 3, 2), "float32"), np.ones((2, 3 * 32 - 1), "float32")
    c = np.zeros((len(a), b.shape[1]), "float32")
    got = multiply(a, b, c, beta=1.0, blocks=replace(SMALL, band=band))
    assert (got == 2).all()


@pytest.mark.feature("M11")
def test_where_arrays_lie_does_not_matter() -> None:
    """Padded rows and turned ones; nothing is written around C."""
    m, n, k = 37, 21, 19
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(m, k)).astype("float32"), rng.normal(size=(k, n)).astype("float32")
    for place in (padded, lambda x: padded(x.T).T, lambda x: np.repeat(x, 3, 1)[:, ::3]):
        around = np.full((m + 2, n + 5), 7, "float32")
        c = around[1:-1, 2:-3]
        assert_product(multiply(place(a), place(b), c), a, b)
        assert (around[[0, -1]] == 7).all() and (around[:, [0, 1, -3, -2, -1]] == 7).all()
        assert_product(multiply(place(a), place(b), place(np.full((m, n), np.nan, "f4"))), a, b)


def padded(given: Array) -> Array:
    """With room behind each row, that ends where the last row ends."""
    rows, columns = given.shape
    memory = np.full((rows - 1) * (columns + 5) + columns, np.nan, given.dtype)
    size = given.itemsize
    found = as_strided(memory, given.shape, ((columns + 5) * size, size))
    found[...] = given
    return found


@pytest.mark.feature("M11")
def test_offsets_beyond_31_bits() -> None:
    """Rows that lie 2^28 numbers apart, 20 of them; the pages between are never touched."""
    needs()
    rows, apart, on = 20, 2**28, Listening()
    memory = np.zeros(rows * apart, "float16")
    a = as_strided(memory, (rows, 3), (2 * apart, 2))
    a[...] = np.random.default_rng(4).normal(size=a.shape)
    b = np.random.default_rng(5).normal(size=(3, 4)).astype("float16")
    assert_product(multiply(a, b, on=on, dtype="float32"), a, b)
    assert_product(multiply(b.T.copy(), a.T, on=on, dtype="float32"), b.T, a.T)
    batch = as_strided(memory, (rows, 1, 3), (2 * apart, 2, 2))
    assert_product(multiply(batch, b, on=on, dtype="float32"), batch, b)
    assert ["tl.arange(0, M).to(tl.int64)" in text for text in on.texts] == [True, True, False]


@pytest.mark.feature("M11")
def test_a_batch_broadcasts_as_in_numpy() -> None:
    rng = np.random.default_rng(6)
    shapes = (
        ((2, 3, 9, 5), (5, 11)),
        ((9, 5), (3, 5, 11)),
        ((2, 1, 9, 5), (3, 5, 11)),
        ((2, 1, 9, 5), (1, 3, 5, 11)),
        ((0, 9, 5), (1, 5, 11)),
    )
    for shape_a, shape_b in shapes:
        a, b = (rng.normal(size=shape).astype("float32") for shape in (shape_a, shape_b))
        got = multiply(a, b)
        assert got.shape == np.matmul(a, b).shape
        assert_product(got, a, b)


@pytest.mark.feature("M11")
def test_a_batch_has_a_bias_of_its_own_or_shares_one() -> None:
    rng = np.random.default_rng(7)
    a = rng.normal(size=(2, 3, 9, 5)).astype("float32")
    b = rng.normal(size=(5, 11)).astype("float32")
    for axis, length in (("column", 11), ("row", 9)):
        for batch in ((), (3,), (2, 1), (2, 3)):
            bias = rng.normal(size=(*batch, length)).astype("float32")
            got = multiply(a, b, bias=bias, bias_axis=axis)
            added = bias[..., None, :] if axis == "column" else bias[..., None]
            assert_product(got, a, b, bias=added)


def test_c_is_read_only_where_beta_asks() -> None:
    ones = np.ones((3, 3), "float32")
    for old in (np.nan, np.inf):
        assert (multiply(ones, ones, np.full((3, 3), old, "float32"), alpha=2.0) == 6).all()
    assert np.isnan(multiply(ones, ones, np.full((3, 3), np.nan, "float32"), beta=1.0)).all()


def test_the_bias_is_not_times_alpha_and_comes_before_the_activation() -> None:
    ones, bias = np.ones((2, 2), "float32"), np.array([-3, 1], "float32")
    options: dict[str, Any] = {"alpha": 0.5, "bias": bias, "activation": "relu"}
    assert (multiply(ones, ones, **options) == [[0, 2], [0, 2]]).all()
    c = np.full((2, 2), 10, "float32")
    assert (multiply(ones, ones, c, beta=0.25, **options) == [[0.5, 4.5]] * 2).all()


def test_a_sum_over_nothing_is_0() -> None:
    a, b, bias = np.ones((2, 0), "float32"), np.ones((0, 3), "float32"), np.ones(3, "float32")
    assert (multiply(a, b) == np.zeros((2, 3))).all()
    c = np.full((2, 3), 4, "float32")
    assert (multiply(a, b, c, beta=0.5, bias=bias) == np.full((2, 3), 3)).all()


@pytest.mark.parametrize("kept", ["float16", "bfloat16"])
def test_half_types_add_up_in_float32(kept: str) -> None:
    """4097 ones are no float16, and 257 no bfloat16: a sum in them would stop before."""
    a = np.ones((1, 4098), kept)
    got = multiply(a, a.T, dtype="float32")
    assert got.dtype == np.float32 and got == 4098


def test_what_is_not_finite_stays_where_it_is() -> None:
    """NaN and infinity in one row and one column reach no other, at edges neither."""
    rng = np.random.default_rng(8)
    a, b = rng.normal(size=(35, 9)).astype("float32"), rng.normal(size=(9, 37)).astype("float32")
    a[3, 8], a[34, 0], b[8, 36] = np.nan, np.inf, np.nan
    got = multiply(a, b)
    clean = np.ones(got.shape, bool)
    clean[[3, 34]] = clean[:, 36] = False
    assert np.isfinite(got[clean]).all() and not np.isfinite(got[~clean]).any()


@pytest.mark.parametrize("name", ["relu", "gelu", "silu", "tanh"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_activations_of_numbers_of_any_size(name: str, dtype: str) -> None:
    ends = [-1e30, 1e30, 1e-30, -88.8, 0, -0.5, 0.5]
    x = np.concatenate([np.linspace(-20, 20, 4001), np.linspace(-0.6, 0.6, 601), ends])
    a, one = x.astype(dtype)[:, None], np.ones((1, 1), dtype)
    got = multiply(a, one, activation=name, blocks=replace(SMALL, m=256))
    assert_product(got, a, one, activation=name)
    assert np.isnan(multiply(a[:40] * np.nan, one, activation=name)).all()


@pytest.mark.feature("A05")
@pytest.mark.parametrize("name", [each.name for each in fields(GemmSpec)])
def test_every_field_makes_another_text(name: str) -> None:
    start = replace(PRODUCT, c="float32") if name in "ab" else PRODUCT
    if name == "products":
        start = GemmSpec("float32", "float32", "float32", SMALL)
    texts = [gemm.emit(spec) for spec in (start, replace(start, **{name: OTHER[name]}), start)]
    assert texts[0] == texts[2] != texts[1]


@pytest.mark.parametrize("changed", [None, *OTHER])
def test_texts_are_plain_and_fit_a_screen(changed: str | None) -> None:
    spec = replace(PRODUCT, b="float32", c="float32") if changed in ("b", "c") else PRODUCT
    spec = replace(spec, c="bfloat16") if changed == "a" else spec
    spec = replace(spec, activation="tanh")
    text = gemm.emit(replace(spec, **{changed: OTHER[changed]}) if changed else spec)
    assert text.isascii() and max(map(len, text.splitlines())) <= 100
    compile(text, "module", "exec")
    for name in gemm.names(spec):
        assert len(re.findall(rf"\b{name}\b", text)) > 1, name


@pytest.mark.feature("A03")
@pytest.mark.parametrize(
    "field, value, message",
    [
        ("a", "int8", "the type of a must be 'float32', 'float16', 'bfloat16' or 'float64', got"),
        ("b", "float64", "a and b must both be float64 or neither, got bfloat16 and float64"),
        ("c", "float16", "the type of c must be 'float32' or 'bfloat16', got 'float16'"),
        ("bias", "both", "bias must be None, 'column' or 'row', got 'both'"),
        ("activation", "sine", "activation must be None, 'relu', 'gelu', 'silu' or 'tanh'"),
        ("products", "bf16", "products must be 'ieee', 'tf32x3' or 'tf32', got 'bf16'"),
    ],
)
def test_what_no_kernel_has_is_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        replace(PRODUCT, **{field: value})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("m", 48, "m must be a power of two from 16, got 48"),
        ("k", 8, "k must be a power of two from 16, got 8"),
        ("n", 64.0, "n must be a power of two from 16, got 64.0"),
        ("warps", 3, "warps must be 1, 2, 4, 8 or 16, got 3"),
        ("stages", 0, "stages must be 1, 2"),
        ("band", 0, "band must be at least 1, got 0"),
    ],
)
def test_blocks_are_powers_of_two(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(SMALL, **{field: value})


def ones(*shape: int, dtype: str = "float32") -> Array:
    return np.ones(shape, dtype)


@pytest.mark.feature("A03")
@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((ones(2, 3), ones(2, 3)), {}, ValueError, "op(a) is 2 x 3 and op(b) 2 x 3"),
        ((ones(3), ones(3, 2)), {}, ValueError, "a must have 2 to 4 axes"),
        ((ones(2, 2, 3), ones(4, 3, 2)), {}, ValueError, "the batch of b must be (1, 2) or 1"),
        ((ones(2, 3, dtype="float64"), ones(3, 2)), {}, ValueError, "must both be float64 or nei"),
        ((ones(2, 3), ones(3, 2, dtype="int8")), {}, TypeError, "b must be one of float32, float"),
        ((ones(2, 3), ones(3, 2)), {"dtype": "float16"}, ValueError, "the type of c must be"),
        ((ones(2, 3), ones(3, 2)), {"beta": 1.0}, ValueError, "beta is 1.0, so c must be given"),
        ((ones(2, 3), ones(3, 2), ones(2, 3)), {}, ValueError, "float32 of shape (2, 2), got"),
        ((ones(2, 3), ones(3, 2)), {"bias": ones(3)}, ValueError, "bias must be (..., 2), got"),
        (
            (ones(2, 3), ones(3, 2)),
            {"bias": ones(2, dtype="float16")},
            TypeError,
            "bias must be float32 as the result is",
        ),
        ((ones(2, 3), ones(3, 2)), {"bias_axis": "k"}, ValueError, "bias_axis must be 'column'"),
        (
            (ones(2, 3), ones(3, 2)),
            {"precision": "tf32"},
            ValueError,
            "precision must be 'highest'",
        ),
        ((ones(2, 3), ones(3, 2)), {"activation": "sine"}, ValueError, "activation must be None"),
    ],
)
def test_what_is_no_product_is_refused(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        multiply(*arguments, **options)


@pytest.mark.feature("A03")
def test_what_is_no_tensor_of_the_machine_is_refused() -> None:
    on = machine()
    one = tensor(ones(1, 1))
    with pytest.raises(TypeError, match="a must be a tensor on the CPU, got a list"):
        standalone.gemm([[1.0]], one, machine=on)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a must be a tensor, got a list"):
        standalone.gemm([[1.0]], one)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a must be on a GPU that torch calls cuda, got cpu"):
        standalone.gemm(one, one)
    with pytest.raises(ValueError, match="c is written, so no axis of it may be broadcast"):
        standalone.gemm(one.expand(2, 1), one.expand(1, 2), one.expand(2, 2), machine=on)
    twice = tensor(ones(1, 1, dtype="float64"))
    with pytest.raises(NotImplementedError, match="does not multiply float64 on gfx942: convert"):
        standalone.gemm(twice, twice, machine=machine("gfx942"))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    "a, products",
    [("float16", "ieee"), ("float32", "ieee"), ("float32", "tf32x3"), ("float64", "ieee")],
)
def test_blocks_of_the_tables_fit_shared_memory(name: str, a: str, products: str) -> None:
    for size in (64, 8192):
        blocks = standalone.block_sizes(name, a, size, size, products=products)
        item = np.dtype(a).itemsize
        bytes_of_stage = item * blocks.k * (blocks.m + blocks.n)
        assert blocks.stages * bytes_of_stage <= ARCHITECTURES[name].shared_bytes


def task(spec: GemmSpec, folder: Path, target: str) -> dict[str, Any]:
    """A product of matrices whose rows are multiples of 16 bytes apart, for a compiler."""
    file = folder / f"{target}_{spec.multiplied}_{spec.products}_{spec.bias}.py"
    file.write_text(gemm.emit(spec), encoding="utf-8")
    types = gemm.signature(spec)
    return {
        "file": str(file),
        "entry": gemm.ENTRY,
        "signature": types,
        "constants": {"a_k": 1, "b_n": 1, "c_n": 1},
        "aligned": [name for name in types if name not in gemm.alike(spec)],
        "options": {"num_warps": spec.blocks.warps, "num_stages": spec.blocks.stages},
        "target": target,
    }


def table_spec(target: str, a: str, products: str, **options: Any) -> GemmSpec:
    blocks = standalone.block_sizes(target, a, 4096, 4096, products=products)
    return GemmSpec(a, a, a, blocks, products=products, **options)


def test_a_gpu_multiplies_on_its_matrix_unit_and_copies_ahead(tmp_path: Path) -> None:
    """Compiled for H100: 16 bytes a copy, several tiles under way, nothing kept in registers."""
    needs()
    spec = table_spec("sm_90", "float16", "ieee", bias="column", activation="gelu")
    (found,) = compiled([task(spec, tmp_path, "sm_90")], tmp_path)
    assert found["assembly"]["wgmma.mma_async"] and found["assembly"]["cp.async.cg"]
    assert found["assembly"]["st.global.v4"]
    blocks = spec.blocks
    assert found["shared"] >= blocks.stages * 2 * blocks.k * (blocks.m + blocks.n)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_every_compiler_takes_the_texts(target: str, tmp_path: Path) -> None:
    needs()
    device = ARCHITECTURES[target]
    kinds = [("float16", "ieee"), ("bfloat16", "ieee"), ("float32", "ieee")]
    if device.kind == "cuda":
        kinds += [("float32", "tf32x3"), ("float32", "tf32"), ("float64", "ieee")]
    specs = [
        table_spec(target, *kind, bias=bias, activation=activation)
        for kind in kinds
        for bias, activation in ((None, "tanh"), ("row", "silu"))
    ]
    tasks = [task(spec, tmp_path, target) for spec in specs]
    for spec, found in zip(specs, compiled(tasks, tmp_path), strict=True):
        assert "failure" not in found, (spec, found)
        assert found["shared"] <= device.shared_bytes, spec


@pytest.mark.parametrize("name", ["gemm", "rows", "activation", "standalone"])
def test_examples(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(f"tilefold.backends.triton.{name}"))
    assert failed == 0
