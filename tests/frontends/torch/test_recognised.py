"""Masks in memory that are rules are recognised, exactly, and never from what they were before."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tilefold.backends.cpu import scan
from tilefold.frontends.torch import recognised
from tilefold.frontends.torch.recognised import Intervals, rule_of
from tilefold.masks.rule import Rule
from tilefold.torch import enabled, scaled_dot_product_attention

LENGTH, BATCH, HEADS = 70, 2, 3
SIZES = BATCH, HEADS, LENGTH, LENGTH
AT_Q, AT_K = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
DOCUMENTS = torch.tensor([0] * 20 + [1] * 33 + [2] * 17)
USED = torch.tensor([40, LENGTH])[:, None, None, None]
CAUSAL, WINDOW, BLOCKS = (
    AT_Q >= AT_K,
    (AT_Q >= AT_K) & (AT_Q - AT_K < 9),
    DOCUMENTS[:, None] == DOCUMENTS,
)

MASKS: dict[str, tuple[Tensor, str | None]] = {
    "causal": (CAUSAL, None),
    "all": (torch.ones(LENGTH, LENGTH, dtype=torch.bool), None),
    "window": (WINDOW, "q"),
    "window to both sides": ((AT_Q - AT_K).abs() < 5, "q"),
    "documents": (BLOCKS, "q"),
    "documents and causal and window": (BLOCKS & WINDOW, "q"),
    "prefix": ((AT_K < 12) | CAUSAL, "q"),
    "chunks": (AT_Q // 16 == AT_K // 16, "q"),
    "padding": (USED > AT_K, "b"),
    "padding of every row": ((USED > AT_K).expand(BATCH, 1, LENGTH, LENGTH).contiguous(), "b"),
    "padding and causal": ((USED > AT_K) & CAUSAL, "bq"),
    "padding on the left, causal and window": ((LENGTH - USED <= AT_K) & WINDOW, "bq"),
    "unlike heads": ((AT_Q - AT_K).abs() < torch.tensor([3, 9, 27])[:, None, None], "hq"),
    "everything unlike": (
        (USED > AT_K) & ((AT_Q - AT_K).abs() < torch.tensor([3, 9, 27])[:, None, None]),
        "bhq",
    ),
    "one interval for all": ((AT_K > 3).expand(LENGTH, LENGTH) & (AT_K < 60), ""),
}


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(recognised, "FEWEST_FLOPS", 0)
    monkeypatch.setattr(recognised, "WORTH_FLOPS", 0)
    recognised._seen.clear()
    yield
    recognised._seen.clear()


def added(seen: Tensor, dtype: torch.dtype, hides: float = -torch.inf) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, hides)


def four(mask: Tensor) -> Tensor:
    return mask[(None,) * (4 - mask.ndim)]


def found(mask: Tensor) -> Rule | None:
    return rule_of(four(mask), SIZES, 16)


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_becomes_the_rule_that_it_is(name: str) -> None:
    mask, axes = MASKS[name]
    for given in (mask, added(mask, torch.float32), added(mask, torch.bfloat16)):
        rule = found(given)
        assert rule is not None
        assert (rule.axes if isinstance(rule, Intervals) else None) == axes
        dense = rule.to_dense(LENGTH, LENGTH, batch=BATCH, heads=HEADS)
        assert np.array_equal(dense, four(mask).expand(SIZES).numpy())


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("length", [17, 63, 64, 65, 130, 400])
def test_every_change_of_an_element_is_found(dtype: torch.dtype, length: int) -> None:
    """Also where rows end between the elements that are compared at once."""
    draw = np.random.default_rng(length)
    places = torch.arange(length)
    seen = (places[:, None] - places).abs() < 7
    mask = seen if dtype == torch.bool else added(seen, dtype)
    sizes = 1, 1, length, length
    wide = torch.cat([mask, mask], 1)[:, :length]  # rows that do not follow each other
    assert rule_of(four(mask), sizes, 8) == rule_of(four(wide), sizes, 8) != None  # noqa: E711
    for _ in range(20):
        row, key = (int(n) for n in draw.integers(0, length, 2))
        before = mask[row, key].clone()
        seen_before = bool(seen[row, key])
        edge = abs(row - key) in (6, 7)
        mask[row, key] = (
            not seen_before if dtype == torch.bool else (-torch.inf if seen_before else 0)
        )
        rule = rule_of(four(mask), sizes, 8)
        if not edge and 0 < key < length - 1:
            assert rule is None
        elif rule is not None:
            dense = rule.to_dense(length, length)
            assert np.array_equal(dense, (mask == (0 if dtype != torch.bool else True)).numpy())
        if dtype != torch.bool:
            mask[row, key] = 0.5
            assert rule_of(four(mask), sizes, 8) is None
        mask[row, key] = before


def test_what_is_no_rule_is_left_to_the_kernels() -> None:
    sparse = (AT_Q * 7 + AT_K * 5) % 3 > 0
    for mask in (
        sparse,
        torch.randn(LENGTH, LENGTH),
        CAUSAL.T.contiguous().T,  # the elements of a row lie apart
        added(CAUSAL, torch.float32, -1e4),
        added(CAUSAL, torch.float32).masked_fill(AT_Q - AT_K == 3, torch.nan),
        torch.ones(LENGTH, 1, dtype=torch.bool),
    ):
        assert found(mask) is None
    assert rule_of(four(CAUSAL[:8]), (BATCH, HEADS, 8, LENGTH), 16) is None


def test_the_lowest_number_hides_where_a_query_sees_another_key() -> None:
    """Where it stands in the whole row it changes nothing: softmax does not see a common term."""
    least = torch.finfo(torch.float32).min
    assert found(added(WINDOW, torch.float32, least)) == found(WINDOW)
    empty = WINDOW.clone()
    empty[5] = False
    assert found(empty) == found(added(empty, torch.float32)) != None  # noqa: E711
    mask = added(empty, torch.float32, least)
    assert found(mask) is None
    q, k, v = torch.randn(3, 1, 1, LENGTH, 8, generator=torch.Generator().manual_seed(0)).unbind()
    o = scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(o, F.scaled_dot_product_attention(q, k, v, mask))
    torch.testing.assert_close(o[0, 0, 5], v[0, 0].mean(0))


def behind_numpy(mask: Tensor) -> None:
    mask.numpy()[...] = WINDOW.numpy() if mask.dtype == torch.bool else added(WINDOW, mask.dtype)


def behind_data(mask: Tensor) -> None:
    mask.data[40:] = WINDOW[40:] if mask.dtype == torch.bool else added(WINDOW, mask.dtype)[40:]


def one_element(mask: Tensor) -> None:
    mask.data[50, 20] = 0 if mask.dtype == torch.bool else -torch.inf


@pytest.mark.slow
@pytest.mark.parametrize("change", [behind_numpy, behind_data, one_element])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_memory_that_changed_behind_torch_gives_the_new_answer(
    change: Any, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, BATCH, HEADS, LENGTH, 8, generator=generator).unbind()
    mask = CAUSAL.clone() if dtype == torch.bool else added(CAUSAL, dtype)
    with enabled():
        for _ in range(2):
            o = F.scaled_dot_product_attention(q, k, v, mask)
        version = mask._version
        change(mask)
        assert mask._version == version
        changed = F.scaled_dot_product_attention(q, k, v, mask)
        x = q.clone().requires_grad_()
        (slope,) = torch.autograd.grad(F.scaled_dot_product_attention(x, k, v, mask).sum(), x)
    want = F.scaled_dot_product_attention(x, k, v, mask)
    assert not torch.allclose(o, changed)
    torch.testing.assert_close(changed, want)
    torch.testing.assert_close(slope, torch.autograd.grad(want.sum(), x)[0], rtol=1e-4, atol=1e-5)


def test_new_intervals_are_planned_when_they_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recognised, "WORTH_FLOPS", 1e12)
    assert found(WINDOW) is None
    assert isinstance(found(added(WINDOW, torch.float32)), Intervals)
    assert found(CAUSAL) is not None  # whose plan is that of every causal call
    monkeypatch.setattr(recognised, "WORTH_FLOPS", 1e5)
    assert isinstance(found(BLOCKS), Intervals)
    monkeypatch.setattr(recognised, "FEWEST_FLOPS", 1e7)
    assert found(BLOCKS) is None  # the whole call takes less than a look for rules


@pytest.mark.slow
def test_nothing_keeps_a_mask_alive_and_rules_are_few() -> None:
    mask = WINDOW.clone()
    gone = weakref.ref(mask)
    assert found(mask) is not None
    del mask
    gc.collect()
    assert gone() is None
    for width in range(1, LENGTH):
        assert found((AT_Q - AT_K).abs() < width) is not None
    assert len(recognised._seen) <= 64


def test_two_threads_read_a_large_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_ALONE_BYTES", 0)
    monkeypatch.setattr(scan.threads, "number", lambda: 2)
    test_a_mask_becomes_the_rule_that_it_is("everything unlike")
    test_what_is_no_rule_is_left_to_the_kernels()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["documents and causal and window", "padding", "everything unlike"]
)
def test_values_and_gradients_are_those_of_the_mask(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    given = [
        x.requires_grad_() for x in torch.randn(3, *SIZES[:3], 8, generator=generator).unbind()
    ]
    mask = MASKS[name][0]
    for each in (mask, added(mask, torch.float32)):
        want = F.scaled_dot_product_attention(*given, attn_mask=each)
        got = scaled_dot_product_attention(*given, attn_mask=each)
        torch.testing.assert_close(got, want)
        theirs = torch.autograd.grad(want.square().sum(), given)
        for one, other in zip(torch.autograd.grad(got.square().sum(), given), theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
