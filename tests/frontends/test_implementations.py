"""The four implementations: the same answer as the dense float64 definition, or a clear refusal."""

from __future__ import annotations

import re
import sys
from typing import Any

import ml_dtypes  # noqa: F401  # NumPy knows the name "bfloat16" from it
import numpy as np
import pytest
import torch
from cases import Case
from compare import assert_near, dense, tolerances
from numpy.typing import NDArray
from operands import canonical, inputs

import tilefold
from tilefold import attention, implementations
from tilefold.backends.arrays.torch import tensor_of
from tilefold.backends.cpu.device import host
from tilefold.backends.cpu.plan import plan
from tilefold.implementations.torch import array_of
from tilefold.problems import reference
from tilefold.problems.attention import Problem
from tilefold.problems.request import LAYOUTS

Array = NDArray[Any]

PRESENT = ("composed", "native", "kernel")
DTYPES = [
    "float32",
    *(pytest.param(each, marks=pytest.mark.slow) for each in ("float64", "float16", "bfloat16")),
]
CASES = [
    Case((33, 20), 16, "full", "bhnd", "gqa"),
    Case((40, 40), 8, "causal", "bnhd", "mha"),
    Case((20, 33), 24, "causal-start", "bhnd", "mqa", dim_v="wider"),
    Case((33, 20), 5, "causal", "bhdn", "gqa", dim_v="narrower", scale=-0.5),
    Case((24, 24), 40, "documents", "bhnd", "gqa", memory="padded", scale=0.3),
    Case((17, 30), 16, "dense-all", "bnhd", "mha", memory="reversed"),
    Case((16, 16), 7, "lengths-of-batch", "bhdn", "mqa", memory="transposed"),
    Case((9, 12), 3, "nothing", "bhnd", "gqa"),
    Case((12, 16), 8, "heads-differ", "bhnd", "mha", memory="broadcast"),
]
"""Every layout, group of heads and kind of rule; rows that see nothing; scales of both signs."""


def by_torch(operands: dict[str, Array], problem: Problem, layout: str, impl: str) -> Any:
    """o, lse, dq, dk and dv by tensors and their autograd, as arrays with the canonical axes."""
    q, k, v = (
        tensor_of(canonical(operands[name], layout)).requires_grad_() for name in ("q", "k", "v")
    )
    do = tensor_of(canonical(operands["do"], layout))
    options: dict[str, Any] = {"mask": problem.mask, "scale": problem.scale, "layout": layout}
    o, lse = attention(q, k, v, **options, return_lse=True, impl=impl)
    assert o.dtype == q.dtype and o.is_contiguous() and o.shape == do.shape
    without = attention(q, k, v, **options, impl=impl)
    assert torch.equal(without, o)
    gradients = torch.autograd.grad(o, (q, k, v), do)
    found = {"o": o.detach(), **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}
    dtype = operands["q"].dtype
    arrays = {name: canonical(array_of(x, dtype), layout) for name, x in found.items()}
    return arrays | {"lse": lse.detach().numpy()}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")  # it finds NaN that is masked later
@pytest.mark.feature("J01", "J02", "A03")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("impl", ["composed", "native"])
def test_tensors_and_their_gradients_agree_with_the_definition(
    impl: str, case: Case, dtype: str
) -> None:
    problem = case.problem(dtype)
    operands = inputs(problem, case.layout, case.memory)
    want = dense(operands, problem.mask, problem.scale)
    allowed = tolerances(problem, operands, want)
    with torch.autograd.detect_anomaly(check_nan=True):
        got = by_torch(operands, problem, case.layout, impl)
    for name in want:
        assert_near(name, got[name], want[name], allowed[name])


@pytest.mark.feature("J01", "J02", "A03")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("impl", ["composed", "native"])
def test_arrays_agree_with_the_definition(impl: str, case: Case, dtype: str) -> None:
    problem = case.problem(dtype)
    operands = inputs(problem, case.layout, case.memory)
    want = dense(operands, problem.mask, problem.scale)
    allowed = tolerances(problem, operands, want)
    q, k, v = (canonical(operands[name], case.layout) for name in ("q", "k", "v"))
    options: dict[str, Any] = {"mask": problem.mask, "scale": case.scale, "layout": case.layout}
    o, lse = attention(q, k, v, **options, return_lse=True, impl=impl)
    assert o.dtype == q.dtype and o.flags.c_contiguous
    assert_near("o", canonical(o, case.layout), want["o"], allowed["o"])
    assert_near("lse", lse, want["lse"], allowed["lse"])
    assert np.array_equal(attention(q, k, v, **options, impl=impl), o)


@pytest.mark.feature("J01", "J02")
@pytest.mark.parametrize("impl", PRESENT)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-2), ("float32", 3.5e-4)])
def test_an_uneven_small_case_is_near_by_norm(
    impl: str, masked: bool, dtype: str, tolerance: float
) -> None:
    """Shapes and tolerances of the fused operation that this row of the table describes."""
    random = np.random.default_rng(1)
    q, k, v = (random.normal(size=(1, 2, n, 8)).astype(dtype) for n in (12, 16, 16))
    mask = tilefold.dense(random.random((12, 16)) < 0.7) if masked else None
    want, _ = reference.attention(q, k, v, mask=mask)
    got = attention(q, k, v, mask=mask, impl=impl).astype(np.float64)
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


@pytest.mark.feature("J01", "J10")
@pytest.mark.parametrize("n", [8, 64])
def test_square_cases_in_float16_are_near_by_norm_and_one_kernel(n: int) -> None:
    q, k, v = np.random.default_rng(2).normal(size=(3, 2, 3, n, n)).astype(np.float16)
    want, _ = reference.attention(q, k, v)
    for impl in PRESENT:
        got = attention(q, k, v, impl=impl).astype(np.float64)
        assert np.linalg.norm(got - want) <= 1e-2 * np.linalg.norm(want), impl
    problem = Problem(2, 3, 3, n, n, n, n, "float16", n**-0.5, tilefold.full())
    assert len(plan(problem, host(), "forward").launches) == 1


@pytest.mark.parametrize("impl", ["composed", "native"])
@pytest.mark.parametrize(("len_q", "len_k", "batch"), [(0, 3, 2), (3, 0, 2), (3, 3, 0)])
def test_empty_calls(impl: str, len_q: int, len_k: int, batch: int) -> None:
    shapes = [(batch, 4, len_q, 8), (batch, 2, len_k, 8), (batch, 2, len_k, 5)]
    for mask in (None, tilefold.causal()):
        tensors = [torch.ones(shape, requires_grad=True) for shape in shapes]
        o, lse = attention(*tensors, mask=mask, return_lse=True, impl=impl)
        o.sum().backward()
        assert o.shape == (batch, 4, len_q, 5) and (o == 0).all()
        assert lse.shape == (batch, 4, len_q) and (lse == -torch.inf).all()
        assert all((x.grad == 0).all() for x in tensors)
        o, lse = attention(*map(np.ones, shapes), mask=mask, return_lse=True, impl=impl)
        assert o.shape == (batch, 4, len_q, 5) and (o == 0).all() and o.dtype == np.float64
        assert lse.shape == (batch, 4, len_q) and (lse == -np.inf).all()


def test_the_default_is_the_kernel() -> None:
    q, k, v = np.random.default_rng(3).normal(size=(3, 1, 2, 50, 16)).astype(np.float32)
    o, lse = attention(q, k, v, impl="kernel", return_lse=np.True_)  # flags may be NumPy's
    assert np.array_equal(attention(q, k, v), o) and lse.shape == (1, 2, 50)


@pytest.mark.parametrize("impl", ["composed", "native"])
def test_what_is_causal_in_torch_too_is_given_by_its_flag(
    impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flag counts from the first query and key: with other lengths it is another rule."""
    seen: list[dict[str, Any]] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def watched(*arguments: Any, **options: Any) -> Any:
        seen.append(options)
        return real(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    for align, len_k, flagged in [
        ("end", 6, True),
        ("end", 9, False),
        ("start", 6, True),
        ("start", 9, True),
    ]:
        q, k = torch.randn(1, 2, 6, 8), torch.randn(1, 2, len_k, 8)
        mask = tilefold.causal(align)
        got = attention(q, k, k, mask=mask, impl=impl)
        torch.testing.assert_close(got, attention(q, k, k, mask=mask))
        if impl == "native":
            options = seen.pop()
            assert ("is_causal" in options, "attn_mask" in options) == (flagged, not flagged)
    assert not seen


@pytest.mark.parametrize("impl", ["composed", "native"])
def test_a_rule_is_not_built_twice(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = tilefold.local(3) & tilefold.rule(lambda q, k: (q + k) % 5 != 2)
    q, k, v = torch.randn(3, 1, 2, 11, 8).unbind()
    first = attention(q, k, v, mask=mask, impl=impl)
    monkeypatch.setattr(type(mask), "to_dense", lambda *_: pytest.fail("built again"))
    assert torch.equal(attention(q, k, v, mask=mask, impl=impl), first)


# Scores, sinks and dropout ----------------------------------------------------------------------

ROWS = np.array([[0.5, -1.0, 0.25], [-np.inf] * 3])
"""A bias of two queries: the second one sees nothing."""


def blind(sinks: Any = None, **options: Any) -> tuple[Any, ...]:
    """o, lse, max and all gradients where a bias hides all keys of a query."""
    rng = np.random.default_rng(4)
    given = [rng.normal(size=(1, 2, n, 4)) for n in (2, 3, 3)] + [ROWS]
    q, k, v, rows, *more = (
        torch.tensor(x, requires_grad=True) for x in (*given, *([] if sinks is None else [sinks]))
    )
    score = [tilefold.bias(rows), tilefold.score(lambda s, k: s + tilefold.log(k))]
    asked: dict[str, Any] = {"score": score, "sinks": more[0] if more else None, **options}
    results = attention(q, k, v, **asked, return_lse=True, return_max=True, impl="composed")
    with torch.autograd.detect_anomaly(check_nan=True):
        loss = results[0].sum() + results[1].masked_fill(results[1].isinf(), 0).sum()
        gradients = torch.autograd.grad(loss, (q, k, v, rows, *more))
    return tuple([x.detach().numpy() for x in (*results, *gradients)])


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.feature("J01")
@pytest.mark.parametrize("sinks", [None, [-np.inf, -np.inf], [0.5, 2.0]], ids=str)
def test_rows_that_a_score_hides_have_no_value_and_no_gradient(sinks: Any) -> None:
    """The logarithm of 0 hides the first key too, and its derivative there is infinite."""
    given = None if sinks is None else np.array(sinks)
    o, lse, largest, dq, dk, dv, drows, *_ = blind(given)
    seen = -np.inf if sinks is None else np.array(sinks)
    assert (o[0, :, 1] == 0).all() and (largest[0, :, 1] == -np.inf).all()
    np.testing.assert_array_equal(lse[0, :, 1], np.broadcast_to(seen, 2))
    for gradient in (dq[0, :, 1], drows[1], dk[0, :, 0], dv[0, :, 0], drows[0, 0]):
        assert (gradient == 0).all()
    assert np.isfinite(lse[0, :, 0]).all() and drows[0, 1:].all()


@pytest.mark.feature("J01")
@pytest.mark.parametrize("shape", [(1, 2, 0, 4), (0, 2, 3, 4)])
def test_without_keys_sinks_alone_are_in_lse(shape: tuple[int, ...]) -> None:
    q, k = np.ones((shape[0], 2, 3, 4)), np.ones(shape)
    sinks = np.array([[1.0, 2.0], [-np.inf, -np.inf]])
    slopes = np.ones(2)
    options: dict[str, Any] = {"return_lse": True, "return_max": True, "impl": "composed"}
    for turn in (np.asarray, torch.tensor):
        score = tilefold.alibi(turn(slopes))
        given = (turn(x) for x in (q, k, k))
        o, lse, largest = attention(*given, sinks=turn(sinks), score=score, **options)
        assert (o == 0).all() and (largest == -np.inf).all()
        want = np.logaddexp.reduce(sinks, axis=1)[:, None]
        np.testing.assert_allclose(lse, np.broadcast_to(want, lse.shape))


@pytest.mark.slow
@pytest.mark.feature("J01")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_composed_scores_are_differentiable_in_every_way() -> None:
    rng = np.random.default_rng(5)
    q, k, v = (torch.tensor(rng.normal(size=(1, 2, n, 2))) for n in (3, 4, 4))
    slopes, rows = torch.tensor([0.5, 0.1], dtype=q.dtype), torch.randn(3, 1, dtype=q.dtype)

    def call(q: Any, k: Any, v: Any, slopes: Any, rows: Any) -> Any:
        score = [tilefold.softcap(1.5), tilefold.alibi(slopes), tilefold.bias(rows)]
        return attention(q, k, v, score=score, mask=tilefold.causal(), impl="composed")

    given = [x.requires_grad_() for x in (q, k, v, slopes, rows)]
    assert torch.autograd.gradcheck(call, given, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, given, fast_mode=True)


# Refusals --------------------------------------------------------------------------------------


@pytest.mark.feature("A03", "A06")
@pytest.mark.parametrize("array", [np.ones((1, 1, 2, 3)), torch.ones(1, 1, 2, 3)])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"impl": "fused"},
            ValueError,
            "impl must be 'composed', 'native', 'kernel' or 'tensorops', got 'fused'",
        ),
        ({"impl": None}, ValueError, "impl must be 'composed', .* got None"),
        ({"impl": "tensorops"}, NotImplementedError, "impl='tensorops' runs on Apple GPUs"),
        ({"impl": "native", "layout": "nhd"}, ValueError, "layout must be"),
        ({"impl": "composed", "precision": "low"}, ValueError, "precision must be"),
        ({"impl": "native", "scale": float("nan")}, ValueError, "scale must be a finite number"),
        ({"impl": "composed", "mask": tilefold.lengths([1, 2])}, ValueError, "batch"),
        ({"impl": "native", "sinks": [1.0]}, NotImplementedError, "'native' takes no sinks; use"),
        ({"impl": "native", "dropout": 0.5, "seed": 1}, NotImplementedError, "no dropout; use"),
        ({"impl": "native", "return_max": True}, NotImplementedError, "takes no return_max; use"),
        ({"return_max": 2}, TypeError, "return_max must be True or False, got 2"),
        ({"return_lse": None}, TypeError, "return_lse must be True or False, got None"),
        ({"impl": "composed", "sinks": [1.0, 2.0]}, ValueError, "sinks must have shape .* 2 rows"),
    ],
)
def test_bad_arguments_are_named(
    array: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        attention(array, array, array, **options)


@pytest.mark.feature("A03")
@pytest.mark.parametrize("impl", ["composed", "native"])
def test_types_and_shapes_are_checked_as_for_the_kernel(impl: str) -> None:
    q = np.ones((1, 1, 2, 3))
    for bad, error in [(q.astype(int), TypeError), (q.astype("f4"), TypeError), (q[0], ValueError)]:
        for turn in (np.asarray, torch.from_numpy):
            messages = []
            for each in (impl, "kernel"):
                with pytest.raises(error) as raised:
                    attention(turn(q), turn(bad), turn(q), impl=each)
                messages.append(str(raised.value))
            assert messages[0] == messages[1]
    with pytest.raises(ValueError, match=re.escape("k must be on cpu as q is, got meta")):
        there = torch.ones(1, 1, 2, 3, device="meta")
        attention(torch.ones(1, 1, 2, 3), there, there, impl=impl)


def test_native_on_arrays_without_torch_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    q = np.ones((1, 1, 2, 3))
    monkeypatch.delitem(sys.modules, "tilefold.implementations.torch")
    monkeypatch.delattr(implementations, "torch")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="torch is not installed: pip install torch, or choose"):
        attention(q, q, q, impl="native")


def test_arrays_that_torch_cannot_share_are_copied() -> None:
    kept = np.arange(6.0)
    fixed = kept.copy()
    fixed.flags.writeable = False
    for array in (kept[::-1], fixed, np.broadcast_to(kept, (2, 6))):
        assert np.array_equal(tensor_of(array).numpy(), array)
    assert tensor_of(kept).data_ptr() == kept.ctypes.data
    bits = np.arange(6).astype("bfloat16")
    assert np.array_equal(array_of(tensor_of(bits), bits.dtype), bits)
    assert [*LAYOUTS] == ["bhnd", "bnhd", "bhdn"]
