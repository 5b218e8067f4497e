"""Products of their own by Triton: what their texts say, what is refused, and what compilers make.

Compilers run in a process of their own, since this one interprets.
"""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interpreted import machine, needs, tensor
from numpy.typing import NDArray
from triton_ahead import compiled

from tilefold.backends.matmul import Codes
from tilefold.backends.triton.architectures import ARCHITECTURES
from tilefold.backends.triton.interpreter import Interpreted
from tilefold.backends.triton.machine import ResourceError
from tilefold.backends.triton.matmul import calls, gemm, tables
from tilefold.backends.triton.matmul import codes as widening
from tilefold.backends.triton.matmul.gemm import GemmBlocks, GemmSpec
from tilefold.backends.triton.module import launch_options

Array = NDArray[Any]

SMALL = GemmBlocks(32, 32, 16, warps=4, stages=2)
PRODUCT = GemmSpec("bfloat16", "bfloat16", "bfloat16", SMALL)
OTHER: dict[str, Any] = {
    "a": "float16",
    "b": "float32",
    "c": "float32",
    "blocks": replace(SMALL, m=64),
    "bias": "row",
    "activation": "relu",
    "products": "tf32",
    "wide": True,
    "descriptors": True,
    "transpose_a": True,
    "transpose_b": True,
    "bias_type": "float32",
    "old": "bfloat16",
    "gate": True,
    "codes": Codes("int4", 16, "float16"),
}


@pytest.mark.feature("A05")
@pytest.mark.parametrize("name", [each.name for each in fields(GemmSpec)])
def test_every_field_makes_another_text(name: str) -> None:
    start = replace(PRODUCT, c="float32") if name in "ab" else PRODUCT
    if name == "products":
        start = GemmSpec("float32", "float32", "float32", SMALL)
    start = replace(start, descriptors=name.startswith("transpose"))
    start = replace(start, bias="row" if name == "bias_type" else None)
    specs = start, replace(start, **{name: OTHER[name]}), start
    texts = [(gemm.emit(spec), gemm.signature(spec)) for spec in specs]
    assert texts[0] == texts[2] != texts[1]
    assert texts[0][0] != texts[1][0] or name == "bias_type"  # which pointers say


@pytest.mark.parametrize("changed", [None, *OTHER])
def test_texts_are_plain_and_fit_a_screen(changed: str | None) -> None:
    spec = replace(PRODUCT, b="float32", c="float32") if changed in ("b", "c") else PRODUCT
    spec = replace(spec, c="bfloat16") if changed == "a" else spec
    spec = replace(spec, activation="tanh")
    spec = replace(spec, descriptors=str(changed).startswith("transpose"))
    spec = replace(spec, bias="row" if changed == "bias_type" else None)
    spec = replace(spec, **{changed: OTHER[changed]}) if changed else spec
    text = gemm.emit(spec)
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
        ("c", "float64", "the type of c must be 'float32', 'float16' or 'bfloat16', got"),
        ("bias_type", "float16", "bias_type must be None, 'bfloat16' or 'float32', got 'float16'"),
        ("old", "int8", "old must be None, 'bfloat16' or 'float32', got 'int8'"),
        ("bias", "both", "bias must be None, 'column' or 'row', got 'both'"),
        ("codes", Codes("palette6"), "codes have no gate and no descriptors, and b is float32"),
        ("activation", "sine", "activation must be None, 'relu', 'gelu', 'gelu_tanh', 'silu', 's"),
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


@pytest.mark.slow
@pytest.mark.feature("A03")
def test_what_is_no_tensor_of_the_machine_is_refused() -> None:
    on = machine()
    one = tensor(ones(1, 1))
    with pytest.raises(TypeError, match="a must be a tensor on the CPU, got a list"):
        calls.gemm([[1.0]], one, machine=on)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a must be a tensor, got a list"):
        calls.gemm([[1.0]], one)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a must be on a GPU that torch calls cuda, got cpu"):
        calls.gemm(one, one)
    with pytest.raises(ValueError, match="c is written, so no axis of it may be broadcast"):
        calls.gemm(one.expand(2, 1), one.expand(1, 2), one.expand(2, 2), machine=on)
    twice = tensor(ones(1, 1, dtype="float64"))
    for name in ("sm_100", "gfx942"):
        assert calls.gemm(twice, twice, machine=machine(name)) == 1


def test_blocks_that_are_too_large_for_the_gpu_are_named() -> None:
    needs()

    class OutOfResources(Exception):
        """As Triton has it."""

    class Full(Interpreted):
        def function(self, text: str, entry: str) -> Any:
            return self

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return self

        def __call__(self, *given: Any, **options: Any) -> None:
            raise OutOfResources("shared memory, required 999999")

    one = tensor(ones(1, 1))
    with pytest.raises(ResourceError, match=r"blocks of 32 x 32 x 16, 4 warps, 2 stages do not"):
        calls.gemm(one, one, blocks=SMALL, machine=Full())
    with pytest.raises(ResourceError, match=r"blocks of 1024 x 1, 4 warps do not fit"):
        calls.softmax(one, machine=Full())


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    "a, products",
    [("float16", "ieee"), ("float32", "ieee"), ("float32", "tf32x3"), ("float64", "ieee")],
)
def test_blocks_of_the_tables_fit_shared_memory(name: str, a: str, products: str) -> None:
    for size in (64, 8192):
        blocks = tables.block_sizes(name, a, size, size, products=products)
        assert blocks.m < 64 or (name, a) != ("sm_100", "float64"), "3.7 compiles no such block"
        item = np.dtype(a).itemsize
        bytes_of_stage = item * blocks.k * (blocks.m + blocks.n)
        assert blocks.stages * bytes_of_stage <= ARCHITECTURES[name].shared_bytes


ONES = ("a_k", "b_n", "c_n")
"""Strides of rows whose elements are neighbours."""


def task(spec: GemmSpec, folder: Path, target: str, ones: tuple[str, ...] = ONES) -> dict[str, Any]:
    """A product of matrices whose rows are multiples of 16 bytes apart, for a compiler.

    `ones` are the numbers that are 1, which Triton puts into the kernel.
    """
    file = folder / f"{target}_{len(list(folder.iterdir()))}.py"
    file.write_text(gemm.emit(spec), encoding="utf-8")
    types = gemm.signature(spec)
    return {
        "file": str(file),
        "entry": gemm.ENTRY,
        "signature": types,
        "constants": dict.fromkeys(set(ones) & types.keys(), 1),
        "aligned": [name for name in types if name not in gemm.alike(spec)],
        "options": launch_options(
            ARCHITECTURES[target].kind, spec.a, spec.blocks.warps, spec.blocks.stages
        ),
        "target": target,
    }


def table_spec(target: str, a: str, products: str, **options: Any) -> GemmSpec:
    blocks = tables.block_sizes(target, a, 4096, 4096, products=products)
    return GemmSpec(a, a, a, blocks, products=products, **options)


@pytest.mark.slow
@pytest.mark.parametrize("descriptors", [False, True])
def test_a_gpu_multiplies_on_its_matrix_unit_and_copies_ahead(
    tmp_path: Path, descriptors: bool
) -> None:
    """Compiled for H100: several tiles are under way, 16 bytes a copy or moved whole."""
    needs()
    spec = table_spec("sm_90", "float16", "ieee", bias="column", descriptors=descriptors)
    (found,) = compiled([task(spec, tmp_path, "sm_90")], tmp_path / "cache")
    assert found["assembly"]["wgmma.mma_async"] and found["assembly"]["st.global.v4"]
    assert ("cp.async.bulk.tensor" in found["assembly"]) == descriptors
    assert ("cp.async.cg" in found["assembly"]) != descriptors
    blocks = spec.blocks
    assert found["shared"] >= blocks.stages * 2 * blocks.k * (blocks.m + blocks.n)


TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_compiler_takes_the_texts(target: str, tmp_path: Path) -> None:
    needs()
    device = ARCHITECTURES[target]
    kinds = [(dtype, "ieee") for dtype in gemm.DTYPES]
    if device.kind == "cuda":
        kinds += [("float32", "tf32x3"), ("float32", "tf32")]
    turn, ends = TARGETS.index(target), ((None, "tanh"), ("row", "silu"))
    specs = []
    for number, kind in enumerate(kinds):  # each for two targets of one maker, with either end
        if device.kind != "cuda" or number % 2 == turn % 2:
            bias, activation = ends[(number // 2 + turn // 2) % 2]
            specs.append(table_spec(target, *kind, bias=bias, activation=activation))
    tasks = [task(spec, tmp_path, target) for spec in specs]
    vector = GemmSpec("float16", "float16", "float16", SMALL, bias="row", wide=True)
    number = ("mnk", "nk", "n")[turn % 3]
    names = (
        *number,
        *(name for name in gemm.STRIDES if name[-1] in number or name[-1] in "hb"),
    )
    specs, tasks = [*specs, vector], [*tasks, task(vector, tmp_path, target, names)]
    if device.descriptors:
        for turned in (((False, False), (True, True)), ((False, True), (True, False)))[turn % 2]:
            options = dict(zip(("transpose_a", "transpose_b"), turned, strict=True))
            moved = table_spec(target, "bfloat16", "ieee", descriptors=True, **options)
            specs, tasks = [*specs, moved], [*tasks, task(moved, tmp_path, target)]
    for spec, found in zip(specs, compiled(tasks, tmp_path / "cache"), strict=True):
        assert "failure" not in found, (spec, found)
        assert found["shared"] <= device.shared_bytes, spec
        assert ("cp.async.bulk.tensor" in found["assembly"]) == spec.descriptors, spec


QUANTIZED = (
    ("float16", Codes("palette6"), 1),
    ("bfloat16", Codes("palette6"), 4096),
    ("bfloat16", Codes("int4", 128, "float16"), 1),
    ("float16", Codes("int4_symmetric", 32, "float16"), 4096),
    ("bfloat16", Codes("int8", None, "float32"), 4096),
    ("float16", Codes("float8_e4m3", None, "float32"), 4096),
)


def quantized_spec(target: str, a: str, codes: Codes, m: int) -> GemmSpec:
    blocks = tables.quantized_blocks(codes, m)
    how = widening.products(codes, a, "ieee") if ARCHITECTURES[target].kind == "cuda" else "ieee"
    kind = widening.multiplied(codes, a)
    return GemmSpec(a, kind, a, blocks, codes=codes, bias="column", products=how)


@pytest.mark.slow
@pytest.mark.feature("A02")
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])  # the table of resources has all of them
def test_compilers_take_the_texts_of_quantised_and_gated_products(
    target: str, tmp_path: Path
) -> None:
    needs()
    specs = [quantized_spec(target, *each) for each in QUANTIZED]
    moved = ARCHITECTURES[target].asynchronous
    gated = table_spec(target, "float16", "ieee", activation="silu", gate=True, descriptors=moved)
    specs.append(replace(gated, blocks=tables.halved(gated.blocks)))
    tasks = [task(spec, tmp_path, target, (*ONES, "g_n")) for spec in specs]
    units = {"wgmma.mma_async", "mma.sync", "v_mfma"}
    for spec, found in zip(specs, compiled(tasks, tmp_path / "cache"), strict=True):
        assert "failure" not in found, (spec, found)
        assert found["shared"] <= ARCHITECTURES[target].shared_bytes, spec
        assert any(found["assembly"].get(name) for name in units), spec
