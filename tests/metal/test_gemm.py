"""Products and softmax of their own on Apple GPUs: what their texts say, and what is refused."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

import pytest
from numpy.typing import NDArray

from tilefold.backends.matmul import Codes
from tilefold.backends.metal.matmul import calls, gemm, rows
from tilefold.backends.metal.matmul.rows import SoftmaxSpec
from tilefold.backends.metal.matmul.spec import GemmBlocks, GemmSpec
from tilefold.common import disk_cache

Array = NDArray[Any]

FOUR = GemmBlocks(48, 48, 24, split=(2, 2))

PRODUCT = GemmSpec("bfloat16", "bfloat16", "bfloat16", FOUR, staged=True, bfloat=False)
OTHER_PRODUCT: dict[str, Any] = {
    "a": "float16",
    "b": "float32",
    "c": "float32",
    "blocks": GemmBlocks(32, 48, 24, split=(2, 2)),
    "staged": False,
    "bfloat": True,
    "unit": False,
    "transpose_a": True,
    "transpose_b": True,
    "bias": "row",
    "activation": "relu",
    "bias_type": "float32",
    "old": "bfloat16",
    "gate": True,
    "codes": Codes("int4", 32, "float16"),
}


def changed(name: str) -> dict[str, Any]:
    """A field with another value; a type of the bias needs a bias, and codes are float32."""
    more = {"bias_type": {"bias": "row"}, "codes": {"b": "float32"}}.get(name, {})
    return more | {name: OTHER_PRODUCT[name]}


SOFTMAX = SoftmaxSpec("bfloat16", rows=4, bfloat=False, lse=False)
OTHER_SOFTMAX: dict[str, Any] = {"dtype": "float16", "rows": 1, "bfloat": True, "lse": True}


@pytest.mark.feature("A05")
@pytest.mark.parametrize("name", [field.name for field in fields(GemmSpec)])
def test_every_field_of_a_product_makes_another_kernel(name: str) -> None:
    start = replace(PRODUCT, **{each: x for each, x in changed(name).items() if each != name})
    other = replace(PRODUCT, **changed(name))
    texts = [gemm.emit(spec) for spec in (start, other, start)]
    keys = [disk_cache.key(text, "metal") for text in texts]
    assert keys[0] == keys[2] != keys[1]


@pytest.mark.feature("A05")
@pytest.mark.parametrize("name", [*"mnk", "split"])
@pytest.mark.parametrize("staged", [False, True])
def test_every_length_of_a_block_makes_another_kernel(name: str, staged: bool) -> None:
    other = replace(FOUR, **{name: (1, 1) if name == "split" else 64})
    specs = [replace(PRODUCT, staged=staged, blocks=blocks) for blocks in (FOUR, other)]
    assert gemm.emit(specs[0]) != gemm.emit(specs[1])


@pytest.mark.feature("A05")
@pytest.mark.parametrize("name", [field.name for field in fields(SoftmaxSpec)])
def test_every_field_of_a_softmax_makes_another_kernel(name: str) -> None:
    other = replace(SOFTMAX, **{name: OTHER_SOFTMAX[name]})
    assert rows.emit(SOFTMAX) != rows.emit(other)


@pytest.mark.parametrize("staged", [False, True])
def test_texts_are_plain_and_fit_a_screen(staged: bool) -> None:
    product = replace(PRODUCT, staged=staged, bias="column", activation="gelu", unit=False)
    coded = replace(product, b="float32", codes=Codes("int4", 128, "float16"))
    for text in (
        gemm.emit(product),
        gemm.emit(coded),
        rows.emit(replace(SOFTMAX, rows=1, lse=True)),
    ):
        assert text.isascii()
        assert max(map(len, text.splitlines())) <= 120
        assert text.startswith("// ") and text.count("[[buffer(") == len(set(buffers(text)))


def buffers(text: str) -> list[str]:
    return [part.partition(")")[0] for part in text.split("[[buffer(")[1:]]


@pytest.mark.parametrize("name", [None, *OTHER_PRODUCT])
@pytest.mark.parametrize("staged", [False, True])
def test_a_text_declares_what_it_uses_and_no_more(staged: bool, name: str | None) -> None:
    spec = replace(PRODUCT, staged=staged)
    text = gemm.emit(replace(spec, **changed(name)) if name else spec)
    names = re.findall(r"const \w+ (\w+) =", text)
    assert names and all(len(re.findall(rf"\b{name}\b", text)) > 1 for name in names)


@pytest.mark.feature("A03")
@pytest.mark.parametrize(
    "field, value, message",
    [
        ("a", "float64", "the type of a must be 'float32', 'float16' or 'bfloat16', got 'float64'"),
        ("b", "int8", "the type of b must be"),
        ("c", "int8", "the type of c must be 'float32', 'float16' or 'bfloat16', got 'int8'"),
        ("bias", "both", "bias must be None, 'column' or 'row', got 'both'"),
        ("bias_type", "float16", "bias_type must be None, 'bfloat16' or 'float32', got 'float16'"),
        ("old", "float64", "old must be None, 'bfloat16' or 'float32', got 'float64'"),
        (
            "codes",
            Codes("palette6"),
            "codes have no gate, lie in rows, and are multiplied as float32",
        ),
        ("activation", "sine", "activation must be None, 'relu', 'gelu', 'gelu_tanh', 'silu', 's"),
        ("blocks", GemmBlocks(64, 64, 64, split=(2, 2)), "64 x 64 x 64 take 34816"),
        ("blocks", GemmBlocks(96, 48, 8, split=(12, 6)), "threads must be at most 1024"),
    ],
)
def test_what_no_kernel_has_is_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        replace(PRODUCT, **{field: value})
    assert message in str(caught.value)


@pytest.mark.feature("T14")
def test_rows_of_stages_are_longer_or_exchanged() -> None:
    """Padding keeps whole fragments; swizzled rows are as long as their elements."""
    spec = replace(PRODUCT, a="float32", c="float32", blocks=replace(FOUR, k=32))
    swizzled = replace(spec, blocks=replace(spec.blocks, banks="swizzle"))
    assert spec.stages == ((48, 36), (32, 52)) and swizzled.stages == ((48, 32), (32, 48))
    assert "simdgroup_load" in gemm.emit(spec) and "simdgroup_load" not in gemm.emit(swizzled)
    for length, item in ((32, "float32"), (64, "float32"), (32, "float16"), (64, "float16")):
        other = replace(swizzled, a=item, b=item, bfloat=True)
        size = other.operand.compute_bytes
        turned = [other.exchanged(str(row), "0", length).replace("/", "//") for row in range(8)]
        at = [row * length + eval(place) for row, place in enumerate(turned)]
        banks = {size * place % 128 // (8 * size) for place in at}
        assert len(banks) == 128 // (8 * size), "8 rows of a column lie in all banks"
    with pytest.raises(ValueError, match="rows of 16 elements or multiples, and blocks 48 x 48 x"):
        replace(PRODUCT, blocks=replace(FOUR, banks="swizzle"))
    with pytest.raises(ValueError, match="banks must be 'padding' where operands pass no thread"):
        replace(swizzled, staged=False)
    with pytest.raises(ValueError, match="banks must be 'padding' or 'swizzle', got 'none'"):
        replace(FOUR, banks="none")


@pytest.mark.parametrize("lengths", [(44, 48, 8), (48, 0, 8), (48, 48, 4), (-16, 48, 8)])
def test_blocks_are_whole_fragments(lengths: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be a multiple of"):
        GemmBlocks(*lengths, split=(2, 2))


@pytest.mark.parametrize(
    "staged, multiplied, length, batch, cores, want",
    [
        (True, "float32", 4096, 1, 32, "48 x 48 x 24"),
        (True, "float16", 4096, 1, 32, "48 x 48 x 32"),
        (True, "bfloat16", 4096, 1, 32, "48 x 48 x 32"),
        (True, "float32", 480, 1, 32, "32 x 32 x 32"),  # 100 groups for 192
        (True, "float32", 480, 2, 32, "48 x 48 x 24"),
        (True, "float16", 480, 2, 32, "32 x 32 x 32"),  # 200 for 288
        (True, "float16", 480, 1, 8, "48 x 48 x 32"),
        (False, "float16", 4096, 1, 10, "32 x 32 x 8"),
    ],
)
def test_the_table_gives_small_products_small_blocks(
    staged: bool, multiplied: str, length: int, batch: int, cores: int, want: str
) -> None:
    blocks = calls.block_sizes(staged, multiplied, length, length, batch, cores)
    assert str(blocks) == want
