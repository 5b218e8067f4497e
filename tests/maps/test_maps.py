"""The weights of a region and the mass of keys, against dense float64 attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compare import assert_near
from numpy.typing import NDArray

import tilefold
from tilefold.problems import reference

pytestmark = pytest.mark.slow  # kernels are compiled

Array = NDArray[Any]


def arrays(len_q: int, len_k: int, dtype: Any = np.float32) -> tuple[Array, Array]:
    """q and k of grouped queries."""
    rng = np.random.default_rng([len_q, len_k])
    shapes = (2, 4, len_q, 16), (2, 2, len_k, 16)
    return tuple(rng.normal(size=shape).astype(dtype) for shape in shapes)  # type: ignore[return-value]  # as many as shapes


def dense(q: Array, k: Array, mask: Any = None, score: Any = None, sinks: Any = None) -> Array:
    """All weights in float64: attention to values that are the rows of the unit matrix."""
    batch, heads, len_k, _ = k.shape
    values = np.broadcast_to(np.eye(len_k), (batch, heads, len_k, len_k))
    return reference.attention(q, k, values, mask=mask, score=score, sinks=sinks)[0]


BIAS = np.random.default_rng(1).normal(size=(4, 70, 90)).astype(np.float32)
OPTIONS = [
    {},
    {"mask": tilefold.causal(), "score": tilefold.softcap(1.5)},
    {"mask": tilefold.local(3), "score": [tilefold.bias(BIAS), tilefold.alibi()]},
    {"sinks": np.array([0.5, 2, -1, -np.inf])},
]
IDS = ["plain", "softcap", "bias", "sinks"]


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_weights_of_a_region_are_those_of_all_pairs(options: dict[str, Any]) -> None:
    q, k = arrays(70, 90)
    sinks = options.get("sinks")
    want = dense(q, k, **{**options, "sinks": None if sinks is None else sinks[:, None]})
    for rows, columns in (
        (slice(None), slice(None)),
        (slice(60, None), [89, 3, -1, 3]),
        (np.array([5]), slice(80, 20, -7)),
        ([], slice(3)),
    ):
        got = tilefold.weights(q, k, rows=rows, columns=columns, **options)
        picked = want[:, :, np.arange(70)[rows if isinstance(rows, slice) else np.int64(rows)]]
        assert_near("weights", got, picked[..., columns], 2e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_the_mass_of_a_key_is_the_sum_of_its_weights(options: dict[str, Any], dtype: Any) -> None:
    q, k = arrays(70, 90, dtype)
    sinks = options.get("sinks")
    want = dense(q, k, **{**options, "sinks": None if sinks is None else sinks[:, None]})
    got = tilefold.key_mass(q, k, **options)
    assert got.dtype == (np.float64 if dtype == np.float64 else np.float32)
    bound = 1e-13 if dtype == np.float64 and "score" not in options else 2e-5
    assert_near("mass", got, want.sum(axis=2), bound)


def test_mass_and_weights_of_given_lse_in_any_layout() -> None:
    q, k = arrays(33, 40)
    want = dense(q, k, mask=tilefold.causal())
    _, lse = tilefold.attention(q, k, k, mask=tilefold.causal(), return_lse=True)
    turned = q.transpose(0, 2, 1, 3), k.transpose(0, 2, 1, 3)
    options: dict[str, Any] = {"mask": tilefold.causal(), "layout": "bnhd"}
    assert_near("mass", tilefold.key_mass(*turned, lse, **options), want.sum(axis=2), 2e-6)
    got = tilefold.weights(*turned, lse, rows=[4], **options)
    assert_near("weights", got, want[:, :, [4]], 2e-6)


def test_nan_in_hidden_pairs_and_rows_without_keys_have_no_weight() -> None:
    q, k = arrays(20, 20)
    k[:, :, 7] = np.nan
    mask = tilefold.rule(lambda q, k: (k != 7) & (q > 2))
    p = tilefold.weights(q, k, mask=mask)
    assert np.isfinite(p).all() and not p[:, :, :3].any() and not p[..., 7].any()
    mass = tilefold.key_mass(q, k, mask=mask)
    assert_near("mass", mass, p.sum(axis=2), 1e-5)


def test_the_mass_has_the_same_bits_for_any_number_of_threads() -> None:
    q, k = arrays(300, 300)
    before, found = tilefold.get_num_threads(), []
    try:
        for threads in (1, 3):
            tilefold.set_num_threads(threads)
            found.append(tilefold.key_mass(q, k, mask=tilefold.causal()).tobytes())
    finally:
        tilefold.set_num_threads(before)
    assert found[0] == found[1]


def test_tensors_have_the_maps_of_arrays() -> None:
    q, k = arrays(33, 40)
    tensors = [torch.from_numpy(x) for x in (q, k)]
    got = tilefold.weights(*tensors, rows=slice(5, 9), mask=tilefold.causal())
    want = tilefold.weights(q, k, rows=slice(5, 9), mask=tilefold.causal())
    assert_near("weights", got, want, 1e-6)
    mass = tilefold.key_mass(*tensors, mask=tilefold.causal())
    assert_near("mass", mass, tilefold.key_mass(q, k, mask=tilefold.causal()), 0)


def test_tensors_take_arrays_of_numpy_in_scores_as_attention_does() -> None:
    q, k = arrays(5, 6)
    tensors = [torch.from_numpy(x) for x in (q, k)]
    plane = np.arange(30.0).reshape(5, 6) / 8
    record = np.zeros((5, 6), [("a", "i1"), ("b", "f8")])
    record["b"] = plane
    for array in (plane.astype("bfloat16"), plane[::-1], plane.astype(">f8"), record["b"]):
        given = tilefold.bias(array)
        plain = tilefold.bias(np.array(array, np.float64))
        o = tilefold.attention(*tensors, tensors[1], score=given)
        assert_near("o", o, tilefold.attention(q, k, k, score=plain), 1e-5)
        want = tilefold.weights(q, k, score=plain)
        assert_near("weights", tilefold.weights(*tensors, score=given), want, 1e-5)
        mass = tilefold.key_mass(*tensors, score=given)
        assert_near("mass", mass, tilefold.key_mass(q, k, score=plain), 1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, of tangents
def test_weights_of_tensors_are_differentiable() -> None:
    q, k = (torch.from_numpy(x).double()[:1] for x in arrays(5, 6))
    learned = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
    q.requires_grad_()
    k.requires_grad_()
    _, lse = tilefold.attention(*(x.detach() for x in (q, k, k)), return_lse=True)

    def run(q: Any, k: Any, lse: Any, learned: Any) -> Any:
        score = [tilefold.softcap(2.0), tilefold.bias(learned)]
        options: dict[str, Any] = {"mask": tilefold.local(2), "score": score}
        return tilefold.weights(q, k, lse, rows=[0, 4], columns=slice(2, 6), **options)

    given, fast = (q, k, lse.requires_grad_(), learned), {"fast_mode": True}
    assert torch.autograd.gradcheck(run, given, check_forward_ad=True, **fast)
    assert torch.autograd.gradgradcheck(run, given, check_fwd_over_rev=True, **fast)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, of tangents
def test_transforms_of_weights_are_those_of_dense_operations() -> None:
    q, k = (torch.from_numpy(x).double()[:1, :2] for x in arrays(3, 4))
    array = torch.rand(2, 3, 4, dtype=torch.float64)

    def ours(*given: Any) -> Any:
        return tilefold.weights(*given[:2], score=[tilefold.bias(given[2]), tilefold.softcap(2.0)])

    def dense(q: Any, k: Any, array: Any) -> Any:
        return (2 * torch.tanh((q @ k.mT / 4 + array) / 2)).softmax(-1)

    for way in (
        lambda f: torch.func.hessian(lambda *given: f(*given).square().sum(), (0, 2))(q, k, array),
        lambda f: torch.vmap(f, in_dims=(0, None, 0))(
            torch.stack([q, -q]), k, torch.stack([array, -array])
        ),
    ):
        found, want = (torch.utils._pytree.tree_leaves(way(f)) for f in (ours, dense))
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-13)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, of tangents
def test_derivatives_of_the_mass_are_refused() -> None:
    q, k = (torch.from_numpy(x) for x in arrays(3, 3))

    def mass(q: Any) -> Any:
        return tilefold.key_mass(q, k)

    for call in (
        lambda: mass(q.clone().requires_grad_()),
        lambda: torch.func.jvp(mass, (q,), (q,)),
        lambda: torch.vmap(mass)(q[None]),
    ):
        with pytest.raises(NotImplementedError, match="key_mass has no derivatives, and no place"):
            call()
    q.requires_grad_()
    with torch.no_grad():
        assert tilefold.key_mass(q, k).shape == (2, 4, 3)


def test_blocks_of_rows_sum_to_the_mass(monkeypatch: pytest.MonkeyPatch) -> None:
    from tilefold.maps import torch as maps

    q, k = (torch.from_numpy(x) for x in arrays(33, 40))
    want = tilefold.key_mass(q, k)
    monkeypatch.setattr(maps, "_PAIRS", 8 * 40 * 10)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    _, lse = tilefold.attention(q.numpy(), k.numpy(), k.numpy(), return_lse=True)
    got = tilefold.key_mass(q, k, torch.from_numpy(lse))
    assert_near("mass", got, want, 2e-6)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ([1.5], TypeError, r"rows must be a slice or an array of whole numbers from -3 to 2"),
        ([[1]], TypeError, r"rows must be a slice"),
        ([3], IndexError, r"rows must be a slice .*got \[3\]"),
        ([True, False, True], TypeError, r"rows must be a slice"),
    ],
    ids=["float", "matrix", "outside", "truths"],
)
def test_rows_that_are_none_are_refused(index: Any, error: Any, message: str) -> None:
    q, k = arrays(3, 3)
    with pytest.raises(error, match=message):
        tilefold.weights(q, k, rows=index)


def test_sinks_of_other_heads_are_refused_where_lse_has_them_already() -> None:
    q, k = arrays(3, 3)
    lse, sinks = np.zeros((2, 4, 3), np.float32), np.zeros(5)
    for function in (tilefold.weights, tilefold.key_mass):
        for given in ((q, k, lse), tuple(map(torch.from_numpy, (q, k, lse)))):
            with pytest.raises(ValueError, match=r"sinks must have shape \(4,\).* got 5 rows"):
                function(*given, sinks=sinks)


def test_an_array_of_a_score_is_named_as_in_attention() -> None:
    q, k = arrays(3, 3)
    wanting = tilefold.bias(torch.zeros(3, 3, requires_grad=True))
    for function in (tilefold.weights, tilefold.key_mass):
        with pytest.raises(TypeError, match="the array 0 of score"):
            function(q, k, np.zeros((2, 4, 3), np.float32), score=wanting)
