"""The six functions of channel-first sequences: masks, values, gradients and errors, by float64."""

from __future__ import annotations

import doctest
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from compare import assert_near
from tensorflow_calls import MARKS, Array, arrays, framework, with_gradients

pytestmark = MARKS

SYNCS = ("none_front", "scale_front", "scale_end")
TOLERANCE = {"float16": 1e-3, "float32": 1e-5, "float64": 1e-12}
Shape = tuple[int, ...]


def seen(
    kind: str, q: Shape, k: Shape, sync: str, w: int = 1, s: int = 0, c: bool = False
) -> Array:
    """The visible pairs by the formulas: (queries, keys), in the order of reading."""
    later, near = False, True  # is the key later in the order of reading, and is it in the window
    for own, other in reversed([*zip(q, k, strict=True)]):
        longest = max(own, other)
        steps = [longest // own, longest // other]
        places = [np.arange(size) * step for size, step in zip((own, other), steps, strict=True)]
        if sync == "none_front":
            places = [np.arange(own), np.arange(other)]
        elif sync == "scale_end":
            places = [place + step - 1 for place, step in zip(places, steps, strict=True)]
        distance = places[0][:, None] - places[1]
        far, rest = np.divmod(abs(distance), 2**s)
        inside = (rest == 0) & (far < w)
        if np.ndim(later) == 0:
            later, near = distance < 0, inside
        else:  # rows of columns
            shape = own * len(later), other * later.shape[1]
            row = distance[:, None, :, None]
            later = ((row < 0) | ((row == 0) & later[None, :, None])).reshape(shape)
            near = (inside[:, None, :, None] & near[None, :, None]).reshape(shape)
    visible = np.ones(np.shape(later), bool)
    visible &= ~later if kind == "causal" or c else True
    visible &= near if kind == "local" else True
    return visible


def call(kind: str, dims: int, w: int, s: int, c: bool, sync: str) -> Callable[..., Any]:
    """The function with its arguments, by name."""
    import tilefold.tensorflow

    options: dict[str, Any] = {"sync_mode": sync}
    if kind == "local":
        options |= {"window_size": w, "log2_stride_size": s, "is_causal": c}
    function = getattr(tilefold.tensorflow, f"{kind}_{dims}d")
    return lambda *given, **more: function(*given, **options, **more)


def zeros(*shape: int, dtype: str = "f4") -> Array:
    return np.zeros(shape, dtype)


def digits(rows: Array) -> str:
    return " ".join("".join(map(str, row)) for row in rows.astype(int))


GOLDEN: list[tuple[str, Shape, Shape, str, tuple[int, int, bool], str]] = [
    ("causal", (6,), (3,), "none_front", (1, 0, False), "100 110 111 111 111 111"),
    ("causal", (6,), (3,), "scale_front", (1, 0, False), "100 100 110 110 111 111"),
    ("causal", (6,), (3,), "scale_end", (1, 0, False), "000 100 100 110 110 111"),
    ("causal", (3,), (6,), "none_front", (1, 0, False), "100000 110000 111000"),
    ("causal", (3,), (6,), "scale_front", (1, 0, False), "100000 111000 111110"),
    ("causal", (3,), (6,), "scale_end", (1, 0, False), "110000 111100 111111"),
    ("local", (6,), (3,), "none_front", (1, 0, False), "100 010 001 000 000 000"),
    ("local", (6,), (3,), "scale_front", (1, 0, False), "100 000 010 000 001 000"),
    ("local", (6,), (3,), "scale_end", (1, 0, False), "000 100 000 010 000 001"),
    ("local", (4,), (8,), "none_front", (2, 1, False), "10100000 01010000 10101000 01010100"),
    ("local", (4,), (8,), "scale_front", (2, 1, False), "10100000 10101000 00101010 00001010"),
    ("local", (4,), (8,), "scale_end", (2, 1, False), "01010000 01010100 00010101 00000101"),
    ("local", (4,), (8,), "none_front", (2, 1, True), "10000000 01000000 10100000 01010000"),
    ("local", (4,), (8,), "scale_front", (2, 1, True), "10000000 10100000 00101000 00001010"),
    ("local", (4,), (8,), "scale_end", (2, 1, True), "01000000 01010000 00010100 00000101"),
    *[("local", (5,), (3,), sync, (2, 0, False), "110 111 011 001 000") for sync in SYNCS],
    *[("causal", (2, 2), (2, 2), sync, (1, 0, False), "1000 1100 1110 1111") for sync in SYNCS],
    (
        *("causal", (2, 2), (4, 4), "none_front", (1, 0, False)),
        "1000000000000000 1100000000000000 1111100000000000 1111110000000000",
    ),
    (
        *("causal", (2, 2), (4, 4), "scale_front", (1, 0, False)),
        "1000000000000000 1110000000000000 1111111110000000 1111111111100000",
    ),
    (
        *("causal", (2, 2), (4, 4), "scale_end", (1, 0, False)),
        "1111110000000000 1111111100000000 1111111111111100 1111111111111111",
    ),
    (
        *("causal", (4, 4), (2, 2), "scale_end", (1, 0, False)),
        " ".join(["0000"] * 5 + ["1000"] * 2 + ["1100"] * 6 + ["1110"] * 2 + ["1111"]),
    ),
    (
        *("local", (2, 2), (4, 4), "scale_end", (2, 0, False)),
        "1110111011100000 0011001100110000 0000000011101110 0000000000110011",
    ),
    (
        *("local", (2, 2), (4, 4), "scale_end", (2, 0, True)),
        "1110110000000000 0011001100000000 0000000011101100 0000000000110011",
    ),
    (
        *("local", (3, 3), (3, 3), "none_front", (2, 0, True)),
        "100000000 110000000 011000000 110100000 111110000 011011000 000110100 000111110 000011011",
    ),
    (
        *("local", (3, 3), (3, 3), "scale_end", (2, 1, False)),
        "101000101 010000010 101000101 000101000 000010000 000101000 101000101 010000010 101000101",
    ),
]


@pytest.mark.feature("T03", "T04", "T05", "T06")
def test_golden_vectors() -> None:
    """Values are unit vectors, so a weight above 0 is a visible pair."""
    for kind, q, k, sync, options, want in GOLDEN:
        count = math.prod(k)
        values = np.eye(16, dtype="f4")[:, :count].reshape((1, 16, *k))
        o = call(kind, len(q), *options, sync)(zeros(1, 2, *q), zeros(1, 2, *k), values)
        rows = np.asarray(o).reshape(16, -1).T[:, :count]
        assert digits(rows > 0) == want, (kind, q, k, sync, options)
        assert digits(seen(kind, q, k, sync, *options)) == want  # the formulas of the other tests
        np.testing.assert_allclose(rows.sum(1), rows.any(1), rtol=1e-6)


def dense(q: Array, k: Array, v: Array, visible: Array) -> tuple[Array, Array, Array, Array]:
    """O, l, m and the weights of flattened sequences, in float64; rows that see nothing are 0."""
    scores = np.einsum("bcq,bck->bqk", q, k) / math.sqrt(q.shape[1])
    hidden = np.where(visible, scores, -np.inf)
    m = hidden.max(2, initial=-np.inf)
    weights = np.where(visible, np.exp(scores - np.where(np.isinf(m), 0, m)[..., None]), 0)
    total = weights.sum(2)
    p = weights / np.where(total, total, 1)[..., None]
    return np.einsum("bqk,bck->bcq", p, v), total, m, p


def slopes(do: Array, q: Array, k: Array, v: Array, o: Array, p: Array) -> list[Array]:
    """The gradients of sum(do * O)."""
    delta = (do * o).sum(1)
    ds = p * (np.einsum("bcq,bck->bqk", do, v) - delta[..., None]) / math.sqrt(q.shape[1])
    return [
        np.einsum("bqk,bck->bcq", ds, k),
        np.einsum("bqk,bcq->bck", ds, q),
        np.einsum("bqk,bcq->bck", p, do),
    ]


Case = tuple[str, Shape, Shape, Shape, str, tuple[int, int, bool], str, bool]


def cases() -> list[Case]:
    """All functions, modes and types, some with gradients.

    Windows are small, and sizes have no whole ratios too.
    """
    random = np.random.default_rng(5)
    found: list[Case] = []
    kinds = [("full", (1, 0, False)), ("causal", (1, 0, False))]
    kinds += [("local", options) for options in ((1, 0, False), (2, 1, True), (3, 0, False))]
    for dims in (1, 2):
        for number, (kind, options) in enumerate(kinds):
            one = SYNCS[(number + dims) % 3]
            for sync in SYNCS if kind == "causal" else (one,):
                low, high = (20, 90) if dims == 1 else (2, 11)
                q, k = (tuple(map(int, random.integers(low, high, dims))) for _ in "qk")
                turn = len(found) % 3
                batch, dtype = [(3,), (2, 2), (1, 2, 1)][turn], [*TOLERANCE][turn]
                found.append((kind, q, k, batch, sync, options, dtype, len(found) % 2 == 0))
    return found


@pytest.mark.feature("T01", "T02", "T03", "T04", "T05", "T06", "T09", "T10")
@pytest.mark.parametrize("case", cases(), ids=repr)
def test_values_and_gradients(case: Case) -> None:
    """O, l, m and all gradients in a function whose sizes are unknown, against plain float64."""
    tf = framework()
    kind, size_q, size_k, batch, sync, options, dtype, differs = case
    random = np.random.default_rng(7)
    channels = {"q": 8, "k": 8, "v": 5, "do": 5}
    flat = {
        name: random.uniform(-2, 2, (math.prod(batch), width, math.prod(sizes))).astype(dtype)
        for (name, width), sizes in zip(
            channels.items(), (size_q, size_k, size_k, size_q), strict=True
        )
    }
    q, k, v, do = (flat[name].astype("f8") for name in ("q", "k", "v", "do"))
    o, total, m, p = dense(q, k, v, seen(kind, size_q, size_k, sync, *options))
    want = dict(zip(("dq", "dk", "dv"), slopes(do, q, k, v, o, p), strict=True))
    shapes = {"q": size_q, "k": size_k, "v": size_k, "do": size_q}
    given = [flat[x].reshape((*batch, channels[x], *shapes[x])) for x in ("q", "k", "v", "do")]
    function = call(kind, len(size_q), *options, sync)
    spec = tf.TensorSpec([None] * given[0].ndim, dtype)

    @tf.function(input_signature=[spec] * 4)
    def run(q: Any, k: Any, v: Any, do: Any) -> Any:
        if not differs:
            return function(q, k, v, returning_l_m=True), ()
        return with_gradients(lambda *x: function(*x, returning_l_m=True), [q, k, v], [do])

    (got_o, l_, got_m), gradients = run(*given)
    assert got_o.shape == (*batch, 5, *size_q) and l_.shape == got_m.shape == (*batch, *size_q)
    kinds = [x.dtype.name for x in (got_o, l_, got_m, *gradients)]
    kind_of_l = "float64" if dtype == "float64" else "float32"
    assert kinds == [dtype, kind_of_l, dtype, *[dtype] * (3 * differs)]
    unseen = m == -np.inf
    rows_m, rows_l = (np.asarray(x).reshape(unseen.shape) for x in (got_m, l_))
    assert (rows_m[unseen].view(np.uint8) == 0xFA).all() and not rows_l[unseen].any()
    allowed = TOLERANCE[dtype]
    assert_near("o", np.asarray(got_o).reshape(o.shape), o, allowed)
    assert_near("m", rows_m[~unseen], m[~unseen], allowed * 4)
    lse = (rows_m.astype("f8") + np.log(np.where(unseen, 1, rows_l)))[~unseen]
    assert_near("m + log l", lse, (m + np.log(np.where(unseen, 1, total)))[~unseen], allowed * 4)
    for (name, expected), x in zip(want.items(), gradients, strict=differs):
        bound = allowed * max(1, np.abs(expected).max())
        assert_near(name, np.asarray(x).reshape(expected.shape), expected, bound)


def test_flags_and_sizes_of_numpy() -> None:
    from tilefold.tensorflow import local_1d

    x = np.random.default_rng(3).normal(size=(2, 8, 9)).astype("f4")
    want = local_1d(x, x, x, 2, 0, True, "none_front", True)
    got = local_1d(x, x, x, np.int64(2), np.int8(0), np.True_, "none_front", np.True_)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.feature("T10")
def test_l_and_m_have_no_gradient() -> None:
    tf = framework()
    q = tf.random.normal((2, 8, 9))
    function = call("causal", 1, 1, 0, False, "scale_end")
    _, (alone, *_) = with_gradients(lambda x: function(x, x, x), [q], [1.0])
    _, (with_l_m, *_) = with_gradients(
        lambda x: function(x, x, x, returning_l_m=True), [q], [1.0, 2.0, 3.0]
    )
    np.testing.assert_array_equal(alone, with_l_m)


@pytest.mark.feature("T02", "T11", "T12")
def test_the_documented_example() -> None:
    tf = framework()
    from tilefold.tensorflow import local_1d

    Q = tf.random.normal([8, 32, 1024])
    K = tf.random.normal([8, 32, 2048])
    V = tf.random.normal([8, 16, 2048])
    O = local_1d(Q=Q, K=K, V=V, window_size=32, log2_stride_size=0, is_causal=False,  # noqa: E741
                 sync_mode="scale_front")  # fmt: skip
    assert O.shape == [8, 16, 1024]
    places = np.arange(1024)[:, None] * 2 - np.arange(2048)
    visible = np.abs(places) < 32
    assert visible.sum() == 64016 and visible[[0, 512, 1023]].sum(1).tolist() == [32, 63, 33]
    want, *_ = dense(*arrays(Q, K, V), visible)
    assert_near("O", O, want, 2e-5)


@pytest.mark.feature("T05", "T07")
def test_tiles_that_begin_in_the_middle_of_a_row() -> None:
    """A case of which tf_flash_attention's rule for skipping tiles loses 598 of 96,075 pairs."""
    size_q, size_k = (12, 56), (30, 33)
    visible = seen("local", size_q, size_k, "scale_front", 9)
    assert visible.sum() == 96075
    random = np.random.default_rng(1)
    q, k, v = (random.normal(size=(1, 8, *size)).astype("f4") for size in (size_q, size_k, size_k))
    o = call("local", 2, 9, 0, False, "scale_front")(q, k, v)
    want, *_ = dense(*[x.reshape(1, 8, -1).astype("f8") for x in (q, k, v)], visible)
    assert_near("o", np.asarray(o).reshape(want.shape), want, 1e-5)


@pytest.mark.feature("T05", "T06")
def test_windows_as_wide_as_the_sequences() -> None:
    """The cases of tf_flash_attention's own tests: they show the phase of a stride alone."""
    tf = framework()
    random = np.random.default_rng(9)
    for sizes, dims in (((96, 128), 1), ((128, 96), 1), ((8, 12, 10, 9), 2)):
        size_q, size_k = sizes[:dims], sizes[dims:]
        given = [
            random.uniform(-2, 2, (1, 8, 8, *size)).astype("f4")
            for size in (size_q, size_k, size_k)
        ]
        q, k, v = (x.reshape(8, 8, -1).astype("f8") for x in given)
        for s, c in ((1, False), (1, True)):
            w = max(sizes)
            for sync in SYNCS[1 + c :]:
                o = call("local", dims, w, s, c, sync)(*map(tf.constant, given))
                want, *_ = dense(q, k, v, seen("local", size_q, size_k, sync, w, s, c))
                assert_near("o", np.asarray(o).reshape(want.shape), want, 1e-5)


Q1, K1 = zeros(2, 8, 5), zeros(2, 8, 7)
REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "ranks": (
        lambda f: f.causal_1d(Q1, zeros(1, 2, 8, 7), K1, "none_front"),
        "same number of axes",
    ),
    "no batch axis": (lambda f: f.full_1d(*[zeros(8, 5)] * 3), "at least 3 axes, got shape (8, 5)"),
    "no batch axis, 2d": (lambda f: f.full_2d(*[zeros(2, 8, 5)] * 3), "at least 4 axes"),
    "channels": (
        lambda f: f.full_1d(Q1, zeros(2, 6, 7), K1),
        "Q and K must have the same channels",
    ),
    "batch": (lambda f: f.full_1d(Q1, zeros(3, 8, 7), K1), "Q and K must have the same batch axes"),
    "batch of V": (lambda f: f.full_1d(Q1, K1, zeros(1, 8, 7)), "Q and V must have the same batch"),
    "keys": (lambda f: f.full_1d(Q1, K1, zeros(2, 8, 6)), "K and V must have the same sequence"),
    "keys, 2d": (
        lambda f: f.full_2d(zeros(1, 8, 2, 3), zeros(1, 8, 2, 3), zeros(1, 8, 3, 2)),
        "K and V must have the same height, width",
    ),
    "sync_mode": (
        lambda f: f.causal_2d(*[zeros(1, 8, 2, 3)] * 3, "front"),
        "sync_mode must be 'none_front', 'scale_front' or 'scale_end', got 'front'",
    ),
    "window": (
        lambda f: f.local_1d(Q1, K1, K1, 0, 0, False, "none_front"),
        "window_size must be an integer >= 1, got 0",
    ),
    "stride": (
        lambda f: f.local_1d(Q1, K1, K1, 1, -1, False, "none_front"),
        "log2_stride_size must be an integer >= 0, got -1",
    ),
    "long stride": (lambda f: f.local_1d(Q1, K1, K1, 1, 31, False, "none_front"), "below 2**31"),
    "wide window": (lambda f: f.local_1d(Q1, K1, K1, 2**20, 11, True, "scale_end"), "below 2**31"),
    "is_causal": (
        lambda f: f.local_1d(Q1, K1, K1, 1, 0, "yes", "none_front"),
        "is_causal must be True or False, got 'yes'",
    ),
    "type": (lambda f: f.full_1d(*[zeros(2, 8, 5, dtype="i4")] * 3), "got int32"),
    "two types": (lambda f: f.full_1d(Q1, K1, K1.astype("f8")), "V must be of float32 as Q is"),
    "no keys": (
        lambda f: f.full_1d(Q1, zeros(2, 8, 0), zeros(2, 8, 0)),
        "K has an axis of length 0",
    ),
}


@pytest.mark.feature("T15")
@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_an_invalid_argument(name: str) -> None:
    import tilefold.tensorflow

    tf = framework()
    run, words = REFUSED[name]
    with pytest.raises(tf.errors.InvalidArgumentError, match=re.escape(words)) as caught:
        run(tilefold.tensorflow)
    assert "\n" not in caught.value.message


@pytest.mark.feature("T15")
def test_shapes_that_are_unknown_while_tracing_are_refused_when_the_graph_runs() -> None:
    tf = framework()
    bfloat16 = tf.zeros((1, 8, 5), tf.bfloat16)
    function = call("local", 1, 2, 0, True, "scale_end")
    with pytest.raises(tf.errors.InvalidArgumentError, match="got bfloat16"):
        function(bfloat16, bfloat16, bfloat16)
    run = tf.function(function, input_signature=[tf.TensorSpec(None)] * 3)
    with pytest.raises(tf.errors.InvalidArgumentError, match="K and V must have the same sequence"):
        run(Q1, K1, Q1)
    with pytest.raises(tf.errors.InvalidArgumentError, match="at least 3 axes"):
        run(Q1[0], K1[0], K1[0])


@pytest.mark.feature("T12")
def test_help_says_shapes_rule_and_errors() -> None:
    import tilefold.tensorflow

    assert not doctest.testmod(tilefold.tensorflow).failed
    for name in tilefold.tensorflow.__all__:
        function = getattr(tilefold.tensorflow, name)
        text = inspect.getdoc(function) or ""
        assert ">>>" in text and "aises" in text
        if name != "attention":
            words = text + (inspect.getdoc(tilefold.tensorflow.full_1d) or "")
            assert all(parameter in words for parameter in inspect.signature(function).parameters)
    assert [*inspect.signature(tilefold.tensorflow.local_2d).parameters] == [
        *("Q", "K", "V", "window_size", "log2_stride_size"),
        *("is_causal", "sync_mode", "returning_l_m"),
    ]
