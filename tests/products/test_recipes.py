"""Recipes and cases of other systems by `tilefold.gemm`."""

from __future__ import annotations

import inspect
import re
from typing import Any

import attention_block
import numpy as np
import pytest
from gemms import check, normal
from paths import ROOT

import tilefold
from tilefold.backends.metal.matmul import gemm as metal_gemm
from tilefold.backends.metal.matmul.spec import GemmBlocks, GemmSpec
from tilefold.backends.triton.matmul import gemm as triton_gemm


@pytest.mark.slow
@pytest.mark.feature("A11")
def test_a_block_of_attention_is_three_calls(capsys: Any) -> None:
    attention_block.main()
    assert "Y is (2, 100, 128), and differs from NumPy's by at most" in capsys.readouterr().out
    x = np.random.default_rng(2).normal(size=(3, 21, 40)).astype(np.float32)
    weights = attention_block.Weights.random(features=40, heads=4, dim=8, outputs=24)
    want = attention_block.plain(x, weights)
    got = attention_block.block(x, weights)
    assert got.shape == (3, 21, 24) and abs(got - want).max() < 1e-5
    halves = attention_block.Weights(*(array.astype(np.float16) for array in weights))
    low = attention_block.block(x.astype(np.float16), halves)
    assert low.dtype == np.float16 and abs(low - want).max() < 1e-2


@pytest.mark.slow
@pytest.mark.feature("A11")
def test_a_block_of_attention_has_gradients() -> None:
    torch = pytest.importorskip("torch")
    arrays = attention_block.Weights.random(features=12, heads=2, dim=4, outputs=6)
    weights = attention_block.Weights(*(torch.tensor(w).requires_grad_() for w in arrays))
    x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    given = (x, *weights)
    got = attention_block.block(x, weights, mask=tilefold.causal())
    qkv = torch.einsum("bnc,phdc->pbhnd", x, weights.qkv) + weights.qkv_bias.mT[:, None]
    o = torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True)
    want = torch.nn.functional.gelu(o.transpose(1, 2).flatten(2) @ weights.out + weights.out_bias)
    slope = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    for mine, other in zip(
        *(torch.autograd.grad(y, given, slope) for y in (got, want)), strict=True
    ):
        assert (mine - other).abs().max() < 1e-5 * max(1, other.abs().max())


def kinds() -> list[tuple[Any, ...]]:
    """The 91 kinds of products that the Metal FlashAttention of 2023 tests, with smaller sizes.

    There are products of all transposes, of 2 to 16 matrices, of B for all matrices of A, and with
    a bias in every third. Sizes are drawn as there: whole blocks, edges, and very long sides.
    """
    rng = np.random.default_rng(91)
    sides, found = (1, 2, 3, 7, 8, 15, 16, 24, 31, 32, 33, 48, 63, 65, 100), []
    for number in range(91):
        m, n, k = (int(side) for side in rng.choice(sides, 3))
        batch = () if number < 40 else (int(rng.integers(2, 17)),)
        found.append((number, m, n, k, batch, number % 4, number % 5 == 4))
    return found


@pytest.mark.slow
@pytest.mark.feature("A12", "M11")
def test_kinds_of_another_system() -> None:
    for number, m, n, k, batch, flips, shared in kinds():
        dtype = "float16" if number % 9 == 0 else "float32"
        turned_a, turned_b = bool(flips & 1), bool(flips & 2)
        a = normal(*batch, *((k, m) if turned_a else (m, k)), dtype=dtype)
        b = normal(*(() if shared else batch), *((n, k) if turned_b else (k, n)), dtype=dtype)
        bias = normal(n, dtype=dtype) if number % 3 == 0 else None
        check(a, b, bias=bias, transpose_a=turned_a, transpose_b=turned_b)


@pytest.mark.feature("A09")
def test_types_are_mixed_in_one_call_without_a_pass() -> None:
    """A in float16, B in float32, C in bfloat16: no array but the result is made."""
    a, b, c = normal(33, 50, dtype="float16"), normal(50, 21), normal(33, 21, dtype="bfloat16")
    got = check(a, b, c, beta=1.0, alpha=0.5, out=np.empty_like(c))
    assert got.dtype.name == "bfloat16"
    torch = pytest.importorskip("torch")
    left, right = torch.from_numpy(a), torch.from_numpy(b)
    added = torch.from_numpy(c.view(np.int16)).view(torch.bfloat16)
    other = tilefold.gemm(left, right, added, beta=1.0, alpha=0.5)
    assert other.dtype is torch.bfloat16
    assert (other.view(torch.int16).numpy() == got.view(np.int16)).all()


@pytest.mark.feature("A16")
def test_the_page_names_what_other_programs_build_on() -> None:
    page = (ROOT / "docs" / "products.md").read_text(encoding="utf-8")
    table = page.partition("## In other programs")[2]
    names = ", ".join(inspect.signature(tilefold.gemm).parameters).replace(
        "c, alpha", "c, *, alpha"
    )
    assert f"`tilefold.gemm({names})`" in table
    blocks = GemmBlocks(32, 32, 8, split=(1, 1))
    options = {"staged": False, "bfloat": False, "bias": "column", "activation": "gelu"}
    source = metal_gemm.emit(GemmSpec("float16", "float32", "float16", blocks, **options))
    assert f"`{metal_gemm.ENTRY}`" in table and f"kernel void {metal_gemm.ENTRY}(" in source
    assert re.findall(r"#include (\S+)", source) == ["<metal_stdlib>"]
    assert triton_gemm.ENTRY == metal_gemm.ENTRY
    torch = pytest.importorskip("torch")
    from tilefold.products import torch as products

    assert products.gemm is not None
    assert f"`{torch.ops.tilefold.gemm.default._schema}`" in table
