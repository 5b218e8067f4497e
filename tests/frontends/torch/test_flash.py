"""flash_attn's functions, against their definition in dense float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import tilefold.torch

pytestmark = pytest.mark.slow  # kernels are compiled

BATCH, HEADS, DIM = 2, 4, 8


def inputs(len_q: int, len_k: int, key_heads: int = 2) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (len_q, HEADS), (len_k, key_heads), (len_k, key_heads)
    return [
        torch.randn(BATCH, *shape, DIM, dtype=torch.float64).requires_grad_() for shape in shapes
    ]


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """The definition: distances count from the last query and the last key."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * (softmax_scale or 1 / math.sqrt(DIM))
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    len_q, len_k = scores.shape[2:]
    past = torch.arange(len_q)[:, None] + len_k - len_q - torch.arange(len_k)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[..., None, None] * past.abs()
    left, right = window_size
    seen = torch.ones_like(past, dtype=torch.bool)
    if causal or right >= 0:
        seen &= past >= -(0 if causal else right)
    if left >= 0:
        seen &= past <= left
    weights = torch.softmax(scores.masked_fill(~seen, -math.inf), -1).nan_to_num()
    return (weights @ v).transpose(1, 2)


def slopes(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.rand(shape, dtype=torch.float64).requires_grad_()


CASES: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "everything": ((5, 9), {}),
    "causal, fewer queries": ((5, 9), {"causal": True, "softmax_scale": 0.3}),
    "causal, more queries": ((9, 5), {"causal": True}),
    "causal window": ((12, 16), {"causal": True, "window_size": (3, 2)}),
    "window": ((12, 16), {"window_size": (3, 3), "softcap": 2.0}),
    "to the left": ((12, 16), {"window_size": (3, -1)}),
    "to the right": ((16, 12), {"window_size": (-1, 2), "alibi_slopes": (BATCH, HEADS)}),
    "both, not equal": ((12, 16), {"window_size": (5, 1)}),
    "softcap and ALiBi": (
        (9, 9),
        {"window_size": [-1, 0], "softcap": 1.5, "alibi_slopes": (HEADS,), "deterministic": True},
    ),
}


@pytest.mark.feature("T09")
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients(name: str) -> None:
    lengths, options = CASES[name]
    given = leaves = inputs(*lengths)
    if "alibi_slopes" in options:
        options = {**options, "alibi_slopes": slopes(*options["alibi_slopes"])}
        leaves = [*given, options["alibi_slopes"]]
    o = tilefold.torch.flash_attn_func(*given, **options)
    options.pop("deterministic", None)
    expected = dense(*given, **options)
    torch.testing.assert_close(o, expected, rtol=1e-11, atol=1e-11)
    do = torch.randn_like(o)
    pairs = (torch.autograd.grad(x, leaves, do) for x in (o, expected))
    for found, wanted in zip(*pairs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_packed_tensors() -> None:
    q, k, v = inputs(6, 6, HEADS)
    expected = dense(q, k, v, causal=True)
    qkv, kv = torch.stack((q, k, v), 2), torch.stack((k, v), 2)
    o = tilefold.torch.flash_attn_qkvpacked_func(qkv, causal=True)
    torch.testing.assert_close(o, expected)
    o = tilefold.torch.flash_attn_kvpacked_func(q, kv, 0.0, None, True)
    torch.testing.assert_close(o, expected)
    (slope,) = torch.autograd.grad(o.sum(), k)
    assert slope.shape == k.shape and slope.any()


def test_dropout_is_that_of_the_seed() -> None:
    q, k, v = inputs(6, 6)
    torch.manual_seed(3)
    first = tilefold.torch.flash_attn_func(q, k, v, dropout_p=0.5)
    assert not torch.equal(first, tilefold.torch.flash_attn_func(q, k, v, dropout_p=0.5))
    torch.manual_seed(3)
    assert torch.equal(first, tilefold.torch.flash_attn_func(q, k, v, dropout_p=0.5))


@pytest.mark.feature("T15")
def test_what_is_not_here_says_what_to_do() -> None:
    q, k, v = inputs(3, 3)
    call = tilefold.torch.flash_attn_func
    with pytest.raises(NotImplementedError, match=r"^return_attn_probs: .*return_lse"):
        call(q, k, v, return_attn_probs=True)
    for name in ("varlen", "varlen_qkvpacked", "varlen_kvpacked"):
        with pytest.raises(NotImplementedError, match=rf"^flash_attn_{name}_func: .*documents"):
            getattr(tilefold.torch, f"flash_attn_{name}_func")(q, k, v, cu_seqlens_q=None)
    with pytest.raises(NotImplementedError, match=r"^flash_attn_with_kvcache: .*cache_seqlens"):
        tilefold.torch.flash_attn_with_kvcache(q, k, v)
    with pytest.raises(ValueError, match=r"q must be .*heads, dim.*\(3,\)"):
        call(torch.ones(3), k, v)
    with pytest.raises(ValueError, match=r"window_size must be \(left, right\), got 3"):
        call(q, k, v, window_size=3)
    for window in ((1.5, 2), ("1", 2), (True, 0)):
        with pytest.raises(TypeError, match=r"window_size must be an integer >= -1, got"):
            call(q, k, v, window_size=window)
    with pytest.raises(ValueError, match=r"qkv must be .*3, heads, dim"):
        tilefold.torch.flash_attn_qkvpacked_func(q)
    with pytest.raises(ValueError, match=r"kv must be .*2, heads, dim\), got \[1\]"):
        tilefold.torch.flash_attn_kvpacked_func(q, [1])
    with pytest.raises(TypeError, match="causal"):
        call(q, k, v, causal=1)
