"""Sinks: logits in the sum alone, in every form of the forward pass, and their gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compare import assert_near, assert_same
from numpy.typing import NDArray

import tilefold
from tilefold.problems import reference

pytestmark = pytest.mark.slow  # kernels are compiled

Array = NDArray[Any]


def arrays(len_q: int, len_k: int, *, number: int = 1, dtype: Any = np.float32) -> list[Array]:
    """q, k, v, sinks and do of grouped queries, of standard normal numbers."""
    rng = np.random.default_rng([len_q, len_k])
    shapes = (2, 4, len_q, 16), (2, 2, len_k, 16), (2, 2, len_k, 24), (4, number), (2, 4, len_q, 24)
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


def assert_right(
    q: Array, k: Array, v: Array, sinks: Array, do: Array, *, within: float = 4e-6, **options: Any
) -> None:
    """Raise AssertionError unless results and all gradients are those of float64."""
    o, lse, largest = tilefold.attention(
        q, k, v, sinks=sinks, return_lse=True, return_max=True, **options
    )
    given = {"score": options.get("score"), "mask": options.get("mask")}
    sunk = sinks if sinks.ndim == 2 else sinks[:, None]
    want_o, want_lse = reference.attention(q, k, v, sinks=sunk, **given)
    assert_near("o", o, want_o, within)
    assert_near("lse", lse, want_lse, within)
    assert_near("max", largest, reference.largest(q, k, **given), within)
    got = tilefold.attention_backward(do, q, k, v, o, lse, sinks=sinks, **options)
    wanted = reference.attention_backward(do, q, k, v, want_o, want_lse, sinks=sunk, **given)
    assert got[-1].shape == sinks.shape
    for name, array, want in zip(("dq", "dk", "dv", "dsinks"), got, wanted, strict=True):
        assert_near(name, array, want.reshape(array.shape), within * max(1, np.abs(want).max()))


@pytest.mark.feature("T10")
@pytest.mark.parametrize(
    ("len_q", "len_k", "number", "options"),
    [
        (3, 70, 2, {"mask": tilefold.local(1)}),
        (1, 9000, 1, {"score": tilefold.alibi()}),
    ],
    ids=["decode", "split-keys"],
)
def test_sinks_are_in_the_sum_alone(
    len_q: int, len_k: int, number: int, options: dict[str, Any]
) -> None:
    assert_right(*arrays(len_q, len_k, number=number), **options)


def test_rows_without_keys_have_the_lse_of_their_sinks() -> None:
    q, k, v, sinks, _ = arrays(5, 7, number=3)
    want = np.log(np.exp(sinks.astype(float)).sum(axis=1))
    nobody = tilefold.rule(lambda q, k: k < 0)
    for mask, keys in ((nobody, 7), (None, 0)):
        for queries in (q, np.repeat(q, 20, axis=2)):
            o, lse = tilefold.attention(
                queries, k[:, :, :keys], v[:, :, :keys], mask=mask, sinks=sinks, return_lse=True
            )
            assert not o.any()
            assert_near("lse", lse, np.broadcast_to(want[:, None], lse.shape), 1e-6)


def test_without_keys_sinks_have_the_gradients_of_lse() -> None:
    q, k, v, sinks, do = arrays(5, 7, number=3)
    k, v, sinks = k[:, :, :0], v[:, :, :0], sinks.copy()
    sinks[0, 1] = -np.inf
    o, lse = tilefold.attention(q, k, v, sinks=sinks, return_lse=True)
    dlse = np.linspace(-1, 2, lse.size, dtype=lse.dtype).reshape(lse.shape)
    *others, found = tilefold.attention_backward(do, q, k, v, o, lse, sinks=sinks, dlse=dlse)
    weights = np.exp(sinks - np.log(np.exp(sinks).sum(axis=1, keepdims=True)))
    want = weights * dlse.sum(axis=(0, 2))[:, None]
    assert_near("dsinks", found, want, 1e-5)
    assert not any(gradient.any() for gradient in others)


@pytest.mark.parametrize("len_q", [3, 70])
def test_sinks_of_minus_infinity_are_none(len_q: int) -> None:
    q, k, v, sinks, do = arrays(len_q, 70)
    mask = tilefold.local(2) & tilefold.rule(lambda q: q != 1)  # a query sees no key
    sinks[:] = -np.inf
    o, lse = tilefold.attention(q, k, v, mask=mask, return_lse=True)
    same_o, same_lse = tilefold.attention(q, k, v, mask=mask, sinks=sinks, return_lse=True)
    assert_near("o", same_o, o, 1e-6)
    np.testing.assert_allclose(same_lse, lse, rtol=1e-6)
    *_, dsinks = tilefold.attention_backward(do, q, k, v, o, lse, mask=mask, sinks=sinks)
    assert not dsinks.any()


def test_large_sinks_and_scores_are_as_exact_as_small_ones() -> None:
    q, k, v, sinks, do = arrays(70, 90)
    q *= 300
    assert_right(q, k, v, sinks * 500 + 1000, do, within=2e-3)


def test_nan_in_a_sink_reaches_its_head_alone() -> None:
    q, k, v, sinks, _ = arrays(70, 90)
    sinks[2] = np.nan
    o = tilefold.attention(q, k, v, sinks=sinks)
    assert np.isnan(o[:, 2]).all() and np.isfinite(o[:, [0, 1, 3]]).all()


def test_gradients_of_sinks_have_their_shape_and_type_in_any_layout() -> None:
    q, k, v, sinks, do = arrays(40, 40)
    turned = [array.transpose(0, 2, 1, 3) for array in (q, k, v, do)]
    given = np.float64(sinks[:, 0])
    o, lse = tilefold.attention(*turned[:3], sinks=given, layout="bnhd", return_lse=True)
    *_, got = tilefold.attention_backward(
        turned[3], *turned[:3], o, lse, sinks=given, layout="bnhd"
    )
    assert (got.shape, got.dtype) == (given.shape, given.dtype)
    want = reference.attention_backward(
        do, q, k, v, *reference.attention(q, k, v, sinks=sinks), sinks=sinks
    )[-1]
    assert_near("dsinks", got, want[:, 0], 1e-5)


def test_gradients_of_sinks_are_the_same_for_any_number_of_threads() -> None:
    q, k, v, sinks, do = arrays(300, 300)
    before, found = tilefold.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            tilefold.set_num_threads(threads)
            o, lse = tilefold.attention(q, k, v, sinks=sinks, return_lse=True)
            found.append(tilefold.attention_backward(do, q, k, v, o, lse, sinks=sinks)[-1])
    finally:
        tilefold.set_num_threads(before)
    assert all(found[0].tobytes() == other.tobytes() for other in found[1:])


@pytest.mark.parametrize("sinks", [[1, 2, 0, 3], ((1.0,), (2.0,), (0.0,), (3.0,)), range(4)])
def test_sinks_may_be_numbers_in_lists_and_integers(sinks: Any) -> None:
    q, k, v, _, do = arrays(3, 70)
    results = []
    for given in (np.array(sinks, np.float64), sinks, np.array(sinks).astype(np.int8)):
        o, lse = tilefold.attention(q, k, v, sinks=given, return_lse=True)
        *_, dsinks = tilefold.attention_backward(do, q, k, v, o, lse, sinks=given)
        results.append((o, lse, dsinks))
    tensors = [torch.tensor(array) for array in (q, k, v)]
    for given in (sinks, torch.tensor(sinks)):
        o, lse = tilefold.attention(*tensors, sinks=given, return_lse=True)
        results.append((o.numpy(), lse.numpy(), results[0][2]))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert_same("sinks", got, want)


@pytest.mark.parametrize(
    ("sinks", "message"),
    [
        (2.0, r"sinks must have shape \(heads,\) or \(heads, number\), got \(\)"),
        (np.zeros((2, 4, 1)), r"sinks must have shape \(heads,\) or \(heads, number\)"),
        (np.zeros(3), r"sinks must have shape \(4,\) or \(4, number\), .* got 3 rows"),
        (np.zeros(4, bool), r"sinks must be an array of floats, got bool"),
    ],
    ids=["number", "axes", "heads", "bools"],
)
def test_what_is_no_sinks_is_refused(sinks: Any, message: str) -> None:
    q, k, v, _, _ = arrays(2, 2)
    with pytest.raises((TypeError, ValueError), match=message):
        tilefold.attention(q, k, v, sinks=sinks)
