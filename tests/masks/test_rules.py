"""Every rule means what its definition says, prints as it was made, and refuses bad arguments."""

from __future__ import annotations

import doctest
import importlib
import json
import pickle
import re
from collections.abc import Callable
from copy import copy, deepcopy
from functools import reduce
from operator import or_
from typing import Any

import mask_cases
import numpy as np
import pytest
from hypothesis import given
from mask_cases import Case
from paths import DATA

from tilefold import causal, chunked, dense, documents, full, lengths, local, prefix, rule
from tilefold.masks.position_rules import Rule
from tilefold.masks.tables import Table
from tilefold.problems.attention import Problem

GOLDEN = json.loads((DATA / "masks.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "name",
    ["common.check", "masks.coordinates", "masks.position_rules", "masks.rule", "masks.data_rules"],
)
def test_the_examples_of_the_documentation_are_true(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(f"tilefold.{name}"))
    assert failed == 0
    assert tried > 0 or name in ("masks.data_rules", "masks.coordinates")


def golden_id(case: dict[str, Any]) -> str:
    sizes = "_".join("x".join(map(str, case[f"shape_{side}"])) for side in "qk")
    ordered = "causal" if case["causal"] else "free"
    window = f"w{case['window']}-s{case['log2_stride']}"
    return f"{case['rule']}-{sizes}-{case['sync_mode']}-{window}-{ordered}"


def golden_rule(case: dict[str, Any]) -> Rule:
    given: dict[str, Any] = {"sync": case["sync_mode"]}
    if len(case["shape_q"]) == 2:
        given |= {"grid_q": tuple(case["shape_q"]), "grid_k": tuple(case["shape_k"])}
    if case["rule"] == "causal":
        return causal(**given)
    return local(case["window"], stride=2 ** case["log2_stride"], causal=case["causal"], **given)


@pytest.mark.feature("T04", "T05", "T06")
@pytest.mark.parametrize("sync", ["none_front", "scale_front", "scale_end"])
@pytest.mark.parametrize("rule", ["causal", "local"])
def test_golden_masks(rule: str, sync: str) -> None:
    cases = [case for case in GOLDEN if (case["rule"], case["sync_mode"]) == (rule, sync)]
    assert len(cases) == {"causal": 9, "local": 108}[rule]
    for case in cases:
        len_q, len_k = (int(np.prod(case[f"shape_{side}"])) for side in "qk")
        rows = golden_rule(case).to_dense(len_q, len_k).astype(int)
        assert ["".join(map(str, row)) for row in rows] == case["rows"], golden_id(case)


def test_all_golden_masks_are_there() -> None:
    assert len(GOLDEN) == 351


@pytest.mark.slow
@pytest.mark.feature("T03", "T04", "T05", "T06")
@given(mask_cases.cases())
def test_every_composition_means_its_definition(case: Case) -> None:
    s = case.sizes
    found = case.rule.to_dense(s.len_q, s.len_k, s.batch, s.heads)
    assert found.dtype == np.bool_
    np.testing.assert_array_equal(found, case.dense())


@pytest.mark.feature("T05", "T06")
def test_a_window_between_1024_queries_and_2048_keys() -> None:
    visible = local(32, sync="scale_front").to_dense(1024, 2048)
    assert visible.sum() == 64016
    assert visible.any(axis=1).all()
    assert visible[[0, 512, 1023]].sum(axis=1).tolist() == [32, 63, 33]


@pytest.mark.feature("T06")
@pytest.mark.parametrize(
    ("sync", "places"),
    [("none_front", [0, 1, 2]), ("scale_front", [0, 2, 4]), ("scale_end", [1, 3, 5])],
)
def test_three_keys_spread_over_six_queries(sync: str, places: list[int]) -> None:
    same = local(1, sync=sync).to_dense(6, 3)
    assert [int(np.flatnonzero(column)[0]) for column in same.T] == places


def test_the_diagonal_and_the_widest_window() -> None:
    np.testing.assert_array_equal(local(1).to_dense(5, 5), np.eye(5, dtype=bool))
    widest = local(9, causal=True).to_dense(5, 9)
    np.testing.assert_array_equal(widest, causal().to_dense(5, 9))
    assert local(9).to_dense(5, 9).all()


def test_align_chooses_which_ends_meet() -> None:
    assert causal().to_dense(1, 5).all()
    assert causal(align="start").to_dense(1, 5).tolist() == [[True, False, False, False, False]]
    window = (causal() & local(2)).to_dense(2, 5).astype(int)
    assert window.tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]


def test_rows_may_be_empty() -> None:
    assert not causal().to_dense(5, 2)[:3].any()
    assert not causal(sync="scale_end").to_dense(4, 2)[0].any()


@pytest.mark.parametrize("huge", [10**6, 2**40, 10**30])
def test_numbers_past_the_lengths_mean_the_same_as_the_lengths(huge: int) -> None:
    assert local(huge).to_dense(6, 9).all()
    np.testing.assert_array_equal(local(huge, causal=True).to_dense(6, 9), causal().to_dense(6, 9))
    assert prefix(huge).to_dense(6, 9).all()
    assert chunked(huge).to_dense(6, 9).all()
    far = local(huge, stride=huge)
    np.testing.assert_array_equal(far.to_dense(6, 6), np.eye(6, dtype=bool))


@pytest.mark.parametrize(
    "empty",
    [
        full(),
        causal(),
        causal(sync="scale_end", grid_q=(0, 3), grid_k=(2, 0)),
        local(3, stride=2, causal=True),
        prefix(2),
        chunked(3),
        documents([]),
        lengths(0),
        lengths(0, side="left"),
        local(2, lengths=0),
        documents([], causal=True),
        dense(np.zeros((0, 0), bool)),
        rule(lambda q, k: q % 3 == k % 3),
    ],
    ids=repr,
)
def test_empty_sequences(empty: Rule) -> None:
    assert empty.to_dense(0, 0).shape == (0, 0)
    assert empty.to_dense(0, 0, batch=0, heads=2).shape == (0, 2, 0, 0)
    assert empty.blocks(0, 0, 4, 4) == (0, 0, 0)


def test_shapes_of_dense_arrays() -> None:
    assert causal().to_dense(2, 3).shape == (2, 3)
    assert causal().to_dense(2, 3, batch=4).shape == (4, 1, 2, 3)
    assert causal().to_dense(2, 3, heads=4).shape == (1, 4, 2, 3)
    per_head = rule(lambda h, q, k: q - k <= h)
    assert per_head.to_dense(4, 4, heads=3).sum(axis=(0, 2, 3)).tolist() == [10, 13, 15]


# What rules are: values.


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (full(), "full()"),
        (causal(), "causal()"),
        (causal("start"), 'causal(align="start")'),
        (causal(sync="scale_end"), 'causal(sync="scale_end")'),
        (causal(grid_q=(3, 4)), "causal(grid_q=(3, 4))"),
        (causal(grid_q=[3, 4], grid_k=(6, 2)), "causal(grid_q=(3, 4), grid_k=(6, 2))"),
        (local(256), "local(256)"),
        (
            local(3, 2, causal=True, sync="none_front"),
            'local(3, stride=2, sync="none_front", causal=True)',
        ),
        (local(np.int64(3), align="start"), 'local(3, align="start")'),
        (prefix(4), "prefix(4)"),
        (chunked(8), "chunked(8)"),
        (documents(np.zeros(128, int)), "documents(ids[128])"),
        (documents(np.zeros((2, 8), int), np.ones(4, int)), "documents(ids_q[2x8], ids_k[4])"),
        (lengths(7), "lengths(7)"),
        (lengths([3, 5]), "lengths(n_k[2])"),
        (lengths(7, side="left"), 'lengths(7, side="left")'),
        (lengths([3, 5], "left"), 'lengths(n_k[2], side="left")'),
        (causal(lengths=7), "causal(lengths=7)"),
        (causal(lengths=[3, 5]), "causal(lengths=n[2])"),
        (local(4, causal=True, lengths=[3, 5]), "local(4, lengths=n[2], causal=True)"),
        (documents([1, 2], causal=True), "documents(ids[2], causal=True)"),
        (documents([1], [1, 2], True), "documents(ids_q[1], ids_k[2], causal=True)"),
        (dense(np.ones((8, 1, 4, 4), bool)), "dense(array[8x1x4x4])"),
        (rule(lambda q, k: abs(q - k) % 3 == 0), "rule(lambda q, k: (abs((q - k)) % 3) == 0)"),
        (rule(lambda h, q, k: ~(q < h) | (k == -2)), "rule(lambda h, q, k: ~(q < h) | (k == -2))"),
        ((causal() & local(2)) | prefix(4), "(causal() & local(2)) | prefix(4)"),
        (causal() & (local(2) | prefix(4)), "causal() & (local(2) | prefix(4))"),
        (causal() & local(2) & full(), "causal() & local(2) & full()"),
        (causal() & (local(2) & full()), "causal() & local(2) & full()"),
        (~(causal() | local(2)), "~(causal() | local(2))"),
        (~~causal(), "~~causal()"),
        (~documents([1, 2]), "~documents(ids[2])"),
    ],
)
def test_rules_print_as_they_are_made(made: Rule, text: str) -> None:
    assert repr(made) == text
    assert str(made) == text


@pytest.mark.parametrize(
    "make",
    [
        full,
        causal,
        lambda: local(5, 2, causal=True),
        lambda: prefix(3),
        lambda: documents([1, 2, 3]),
        lambda: lengths([1, 2]),
        lambda: lengths([1, 2], side="left"),
        lambda: causal(lengths=[1, 2]),
        lambda: documents([1, 2], [2, 3, 3], causal=True),
        lambda: dense([[True, False]]),
        lambda: rule(lambda q, k: q * k % 3 == 0),
        lambda: (causal() & local(3)) | ~chunked(4),
    ],
)
def test_rules_made_alike_are_equal(make: Callable[[], Rule]) -> None:
    assert make() == make()
    assert hash(make()) == hash(make())
    assert len({make(), make()}) == 1


def test_rules_made_differently_differ() -> None:
    rules = [
        *(full(), causal(), causal("start"), local(3), local(3, 2), prefix(3), prefix(4)),
        *(chunked(3), lengths(3), lengths([3]), documents([1, 2]), documents([1, 3])),
        *(lengths(3, side="left"), lengths([3], side="left"), documents([1, 2], causal=True)),
        *(causal(lengths=3), causal(lengths=[3]), causal(lengths=[4]), local(3, lengths=[3])),
        *(dense([[True]]), dense([[False]]), rule(lambda q, k: q < k), rule(lambda q, k: k < q)),
        *(causal() & local(3), local(3) & causal(), causal() | local(3), ~causal()),
    ]
    assert len(set(rules)) == len(rules)
    assert causal() != "causal()"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: causal() and local(3),
        lambda: causal() or local(3),
        lambda: not causal(),
        lambda: local(3) if causal() else full(),
    ],
)
def test_python_logic_on_rules_raises_with_a_hint(wrong: Callable[[], Any]) -> None:
    with pytest.raises(
        TypeError, match=re.escape("causal() is not one value; combine rules with &")
    ):
        wrong()


@pytest.mark.parametrize("other", [True, "causal()", None, lambda q, k: q < k])
def test_rules_combine_with_rules_only(other: Any) -> None:
    with pytest.raises(TypeError, match=re.escape("causal() combines with other rules by & and |")):
        causal() & other
    with pytest.raises(TypeError, match="combines"):
        causal() | other
    with pytest.raises(TypeError, match="combines"):
        other & causal()
    with pytest.raises(TypeError, match="combines"):
        other | causal()


def test_a_rule_that_was_not_called_is_named() -> None:
    with pytest.raises(TypeError, match=r"got <function causal.*; call it$"):
        causal & local(3)  # type: ignore[operator]  # the point


def test_a_rule_keeps_its_data_whatever_happens_to_the_array() -> None:
    ids, n_k, array = np.array([0, 1, 1]), np.array([2]), np.eye(3, dtype=bool)
    made = documents(ids) & lengths(n_k) & dense(array)
    before, mark = made.to_dense(3, 3, batch=1), hash(made)
    ids[:], n_k[:], array[:] = 7, 0, False
    np.testing.assert_array_equal(made.to_dense(3, 3, batch=1), before)
    assert hash(made) == mark


@pytest.mark.parametrize(
    "make",
    [
        lambda: documents([1, 2, 3]),
        lambda: documents([[1, 2, 3]], [4, 5, 6]),
        lambda: lengths([1, 2]),
        lambda: dense(np.eye(3, dtype=bool)),
    ],
    ids=["documents", "documents-of-batch", "lengths", "dense"],
)
@pytest.mark.parametrize(
    "copied",
    [lambda made: made, lambda made: pickle.loads(pickle.dumps(made)), deepcopy, copy],
    ids=["made", "pickle", "deepcopy", "copy"],
)
def test_nobody_can_write_to_the_data_of_a_rule(
    make: Callable[[], Rule], copied: Callable[[Rule], Rule]
) -> None:
    """Not even after `setflags(write=True)`: the hash of the data is computed once."""
    made = copied(make())
    assert made == make()
    tables = [table for table in vars(made).values() if isinstance(table, Table)]
    assert tables
    for table in tables:
        for array in (table.array, table.array.reshape(-1), table.array.T):
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0
            with pytest.raises(ValueError, match="cannot set WRITEABLE flag"):
                array.setflags(write=True)


class Exporter:
    """An array of some other library, by one protocol alone."""

    def __init__(self, array: np.ndarray, protocol: str) -> None:
        self.array, self.protocol = array, protocol

    def __getattr__(self, name: str) -> Any:
        if name == self.protocol:
            return getattr(self.array, name)
        raise AttributeError(name)


class DlpackExporter:
    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


def test_data_come_from_any_library() -> None:
    torch = pytest.importorskip("torch")
    ids = np.array([4, 4, 9])
    expected = documents(ids)
    assert documents([4, 4, 9]) == expected
    assert documents(tuple(ids)) == expected
    assert documents(torch.tensor([4, 4, 9])) == expected
    assert documents(Exporter(ids, "__array_interface__")) == expected
    assert documents(DlpackExporter(ids)) == expected
    assert lengths(torch.tensor(3)) == lengths(3) == lengths(np.array(3)) == lengths(np.uint8(3))
    assert lengths(torch.tensor([3, 1])) == lengths([3, 1])
    assert causal(lengths=torch.tensor([3, 1])) == causal(lengths=[3, 1])
    assert causal(lengths=torch.tensor(3)) == causal(lengths=3)
    visible = torch.tensor([[True, False], [True, True]])
    assert dense(visible) == dense([[True, False], [True, True]])
    assert dense(visible.T) == dense([[True, True], [False, True]])


@pytest.mark.parametrize("kind", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", ">i4"])
def test_ids_of_every_integer_type(kind: str) -> None:
    ids = np.array([3, 3, 100, 3], kind)
    np.testing.assert_array_equal(documents(ids).to_dense(4, 4), ids[:, None] == ids)


def test_ids_past_32_bits_keep_their_equalities() -> None:
    ids_q = np.array([2**53, 2**53 + 1, 2**63 - 1, -(2**63)])
    ids_k = np.array([2**53 + 1, 2**63 - 1, 2**64 - 1], np.uint64)
    equal = [[int(x) == int(y) for y in ids_k] for x in ids_q]
    assert documents(ids_q, ids_k).to_dense(4, 3).tolist() == equal
    assert documents(ids_q).to_dense(4, 4).tolist() == np.eye(4, dtype=bool).tolist()


def test_left_padding_and_causal_order_are_the_dense_mask() -> None:
    n_k = np.array([9, 4, 0])
    left = (lengths(n_k, side="left") & causal()).to_dense(3, 9, batch=3)[:, 0]
    q, k = np.ogrid[:3, :9]
    np.testing.assert_array_equal(
        left, (k >= 9 - n_k[:, None, None]) & (q + 6 >= k) & np.ones((3, 3, 9), bool)
    )


def test_new_tokens_after_caches_of_different_lengths() -> None:
    """Entry b is what `causal()` says of its own keys alone, and keys past them are hidden."""
    n_k = [9, 3, 5, 2, 0]
    ended = causal(lengths=n_k).to_dense(3, 9, batch=5)[:, 0]
    near = (causal(lengths=n_k) & local(2, lengths=n_k)).to_dense(3, 9, batch=5)[:, 0]
    for entry, n in enumerate(n_k):
        np.testing.assert_array_equal(ended[entry, :, :n], causal().to_dense(3, n))
        np.testing.assert_array_equal(near[entry, :, :n], local(2, causal=True).to_dense(3, n))
        assert not ended[entry, :, n:].any() and not near[entry, :, n:].any()


def test_documents_with_other_numbers_of_queries_than_of_keys() -> None:
    """Each document is what `causal()` says of its own queries and keys alone."""
    counts_q, counts_k = [2, 1, 4, 0, 3], [5, 1, 2, 3, 0]
    sides = [np.repeat(np.arange(5), counts) for counts in (counts_q, counts_k)]
    whole = np.zeros((10, 11), bool)
    for d, (m, n) in enumerate(zip(counts_q, counts_k, strict=True)):
        whole[np.ix_(sides[0] == d, sides[1] == d)] = causal().to_dense(m, n)
    np.testing.assert_array_equal(documents(*sides, causal=True).to_dense(10, 11), whole)
    mixed = [np.random.default_rng(0).permutation(length) for length in (10, 11)]
    mixed_whole = np.zeros((10, 11), bool)
    ids = [side[order] for side, order in zip(sides, mixed, strict=True)]
    for d, (m, n) in enumerate(zip(counts_q, counts_k, strict=True)):
        mixed_whole[np.ix_(ids[0] == d, ids[1] == d)] = causal().to_dense(m, n)
    np.testing.assert_array_equal(documents(*ids, causal=True).to_dense(10, 11), mixed_whole)
    both = documents(np.stack([sides[0], ids[0]]), sides[1], causal=True).to_dense(10, 11, batch=2)
    np.testing.assert_array_equal(both[0, 0], whole)
    same = documents(ids[0], causal=True).to_dense(10, 10)
    np.testing.assert_array_equal(same, (documents(ids[0]) & causal()).to_dense(10, 10))


@pytest.mark.parametrize(
    "made",
    [
        lengths([3, 1], side="left"),
        causal(lengths=[3, 1]) & local(4, lengths=[3, 1]),
        documents([1, 2, 2], [1, 1, 2], causal=True),
    ],
    ids=repr,
)
def test_rules_travel_between_processes(made: Rule) -> None:
    again = pickle.loads(pickle.dumps(made))
    assert again == made and hash(again) == hash(made)
    np.testing.assert_array_equal(again.to_dense(3, 3, batch=2), made.to_dense(3, 3, batch=2))


def test_ids_per_batch_on_one_side_only() -> None:
    made = documents(np.array([[0, 1], [1, 1]]), [0, 1, 1])
    visible = made.to_dense(2, 3, batch=2)[:, 0].astype(int)
    assert visible.tolist() == [[[1, 0, 0], [0, 1, 1]], [[0, 1, 1], [0, 1, 1]]]


@pytest.mark.parametrize("shape", [(), (3,), (2, 1), (2, 3), (4, 1, 1), (5, 1, 2, 3), (5, 4, 1, 1)])
def test_dense_arrays_broadcast(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).random(shape) < 0.5
    visible = dense(array).to_dense(2, 3, batch=5, heads=4)
    np.testing.assert_array_equal(visible, np.broadcast_to(array, (5, 4, 2, 3)))


# What rules refuse: one line that names the argument, its value and what is allowed.


class Unreadable:
    def __array__(self, *arguments: Any, **options: Any) -> Any:
        raise RuntimeError("it lies on another device\nand more lines")


REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: causal("front"), ValueError, "causal: align must be 'end' or 'start', got 'front'"),
    (lambda: causal(None), ValueError, "causal: align must be 'end' or 'start', got None"),
    (
        lambda: causal(sync="scale"),
        ValueError,
        "causal: sync must be None, 'none_front', 'scale_front' or 'scale_end', got 'scale'",
    ),
    (
        lambda: local(3, align="start", sync="scale_end"),
        ValueError,
        "local: align='start' was given together with sync='scale_end'; "
        "sync replaces align, so give only one of them",
    ),
    (
        lambda: causal(grid_k=(2, 3)),
        ValueError,
        "causal: grid_k=(2, 3) was given without grid_q; give both",
    ),
    (
        lambda: causal(grid_q=6),
        ValueError,
        "causal: grid_q must be two integers (height, width), got 6",
    ),
    (
        lambda: local(3, grid_q=(2, 3), grid_k=(2, 3, 4)),
        ValueError,
        "local: grid_k must be two integers (height, width), got (2, 3, 4)",
    ),
    (
        lambda: causal(grid_q=(2, -3)),
        ValueError,
        "causal: grid_q must be an integer >= 0, got -3",
    ),
    (
        lambda: causal(grid_q=(2.0, 3)),
        TypeError,
        "causal: grid_q must be an integer >= 0, got 2.0",
    ),
    (lambda: local(0), ValueError, "local: window must be an integer >= 1, got 0"),
    (lambda: local(2.5), TypeError, "local: window must be an integer >= 1, got 2.5"),
    (lambda: local(True), TypeError, "local: window must be an integer >= 1, got True"),
    (lambda: local(3, stride=0), ValueError, "local: stride must be an integer >= 1, got 0"),
    (lambda: local(3, causal=1), TypeError, "local: causal must be True or False, got 1"),
    (lambda: prefix(-1), ValueError, "prefix: n must be an integer >= 0, got -1"),
    (
        lambda: prefix(2, causal=False),
        TypeError,
        "prefix: there is no causal= any more, prefix(n) is the first n keys alone; "
        "write causal() | prefix(n) for them and all that causal() shows",
    ),
    (lambda: prefix(2, size=3), TypeError, "prefix() got an unexpected keyword argument 'size'"),
    (lambda: chunked(0), ValueError, "chunked: size must be an integer >= 1, got 0"),
    (lambda: chunked("4"), TypeError, "chunked: size must be an integer >= 1, got '4'"),
    (
        lambda: documents([0.5, 1.0]),
        TypeError,
        "documents: ids_q must be integers, got float64 [0.5, 1.0]",
    ),
    (
        lambda: documents([1], ["a"]),
        TypeError,
        "documents: ids_k must be integers, got <U1 ['a']",
    ),
    (
        lambda: documents([True, False]),
        TypeError,
        "documents: ids_q must be integers, got bool [True, False]",
    ),
    (
        lambda: documents(3),
        ValueError,
        "documents: ids_q must have 1 or 2 axes, got 0 in shape ()",
    ),
    (
        lambda: documents(np.zeros((1, 2, 3), int)),
        ValueError,
        "documents: ids_q must have 1 or 2 axes, got 3 in shape (1, 2, 3)",
    ),
    (
        lambda: documents(Unreadable()),
        TypeError,
        "documents: ids_q must be an array on the CPU, got",
    ),
    (lambda: lengths(-1), ValueError, "lengths: n_k must be an integer >= 0, got -1"),
    (
        lambda: lengths([3, -2, -1]),
        ValueError,
        "lengths: n_k must be integers >= 0, got -2 among them",
    ),
    (lambda: lengths(2.0), TypeError, "lengths: n_k must be integers, got float64 2.0"),
    (lambda: lengths(True), TypeError, "lengths: n_k must be an integer >= 0, got True"),
    (
        lambda: lengths([[1, 2]]),
        ValueError,
        "lengths: n_k must have 0 or 1 axes, got 2 in shape (1, 2)",
    ),
    (
        lambda: lengths(3, side="both"),
        ValueError,
        "lengths: side must be 'right' or 'left', got 'both'",
    ),
    (
        lambda: lengths(99).to_dense(3, 64),
        ValueError,
        "lengths(99): n_k must be at most len_k=64, got 99",
    ),
    (
        lambda: lengths([3, 99], side="left").to_dense(3, 64, batch=2),
        ValueError,
        'lengths(n_k[2], side="left"): n_k must be at most len_k=64, got 99',
    ),
    (
        lambda: causal(lengths=[3, 99]).to_dense(3, 64, batch=2),
        ValueError,
        "causal(lengths=n[2]): lengths must be at most len_k=64, got 99",
    ),
    (
        lambda: local(4, lengths=[3, 9]).to_dense(3, 64, batch=3),
        ValueError,
        "local(4, lengths=n[2]): lengths is for a batch of 2, but batch is 3",
    ),
    (lambda: causal(lengths=-1), ValueError, "causal: lengths must be an integer >= 0, got -1"),
    (lambda: local(3, lengths=[0.5]), TypeError, "local: lengths must be integers, got float64"),
    (
        lambda: causal("start", lengths=[3]),
        ValueError,
        "causal: align='start' was given together with lengths; "
        "lengths make the last query meet the last key of its batch entry, so give one",
    ),
    (
        lambda: causal(sync="scale_end", lengths=3),
        ValueError,
        "causal: sync='scale_end' was given together with lengths",
    ),
    (
        lambda: local(3, grid_q=(2, 2), lengths=3),
        ValueError,
        "local: grid_q=(2, 2) was given together with lengths",
    ),
    (
        lambda: documents([1], causal=1),
        TypeError,
        "documents: causal must be True or False, got 1",
    ),
    (
        lambda: documents([[1], [2]], [[1]], causal=True),
        ValueError,
        "documents: ids_q is for a batch of 2, ids_k for one of 1",
    ),
    (
        lambda: dense([[0, 1]]),
        TypeError,
        "dense: array must be of bool, got int64; use array == 0 if 0 is seen and",
    ),
    (
        lambda: dense(np.ones((1,) * 5, bool)),
        ValueError,
        "dense: array must broadcast to (batch, heads, len_q, len_k), got 5 axes (1, 1, 1, 1, 1)",
    ),
    (
        lambda: dense([[True], [True, False]]),
        TypeError,
        "dense: array must be an array on the CPU, got [[True], [True, False]]",
    ),
    (lambda: rule(3), TypeError, "the parameters of a function must be any of b, h, q, k; got 3"),
    (
        lambda: rule(lambda x, y: x < y),
        TypeError,
        "the parameters of a function must be any of b, h, q, k; got 'x'",
    ),
    (
        lambda: rule(lambda *indices: True),
        TypeError,
        "the parameters of a function must be any of b, h, q, k; got '*indices'",
    ),
    (lambda: rule(lambda q, k: q - k), TypeError, "a rule must be True or False, got Binary"),
    (
        lambda: rule(lambda q, k: None),
        TypeError,
        "rule: the function returned None, no comparison; is `return` missing?",
    ),
    (lambda: rule(lambda q, k: 0 <= q - k < 4), TypeError, "chained comparisons cannot be traced"),
    (lambda: rule(lambda q, k: q > k and q < 9), TypeError, "cannot be traced: write & | ~"),
    (lambda: rule(lambda q, k: max(q, k) < 9), TypeError, "cannot be traced: write & | ~"),
    (
        lambda: rule(lambda q, k: q // 0 == k),
        ValueError,
        "the right side of // in a rule must be a constant >= 1, got `0`",
    ),
    (
        lambda: rule(lambda q, k: q % k == 0),
        ValueError,
        "the right side of % in a rule must be a constant >= 1, got `k`",
    ),
    (
        lambda: rule(lambda q, k: q / 2 < k),
        TypeError,
        "`q / 2`: a rule computes with integers; write //, which rounds down",
    ),
    (lambda: rule(lambda q, k: 1 / (q + k) < 1), TypeError, "`1 / (q + k)`: a rule computes with"),
    (
        lambda: rule(lambda q, k: q & 3 == k),
        TypeError,
        "rule: the function cannot be called with symbols: TypeError: unsupported operand type(s)"
        " for &",
    ),
    (
        lambda: rule(lambda q, k: {0: 1}[q] == k),
        TypeError,
        "the data of arrays go into documents(), lengths() or dense()",
    ),
    (
        lambda: rule(lambda q, k: q.float() < k),
        TypeError,
        "rule: the function cannot be called with symbols: AttributeError: 'Index' object has no",
    ),
    (
        lambda: rule(causal),
        TypeError,
        "rule: the function returned the rule causal(), no comparison; join rules with & | ~"
        " outside of rule()",
    ),
    (
        lambda: rule(lambda q, k: q * 0.5 < k),
        TypeError,
        "a rule computes with integers and indices, not with float 0.5",
    ),
    (
        lambda: rule(lambda q, k: (q < k) == (k < 3)),
        TypeError,
        "== compares numbers; write (a & b) | ~(a | b)",
    ),
    (
        lambda: rule(lambda q, k: np.zeros(9)[q] == k),
        TypeError,
        "has no value while a rule is traced, so it cannot index an array; use documents()",
    ),
    (
        lambda: rule(lambda q, k: q * 2**63 > k),
        OverflowError,
        "a rule computes with numbers of 64 bits, got one of 65 bits",
    ),
    (lambda: causal().to_dense(-1, 3), ValueError, "len_q must be an integer >= 0, got -1"),
    (lambda: causal().to_dense(3, 2.5), TypeError, "len_k must be an integer >= 0, got 2.5"),
    (lambda: causal().blocks(8, 8, 0, 4), ValueError, "block_q must be an integer >= 1, got 0"),
    (
        lambda: lengths([1, 2]).to_dense(3, 3),
        ValueError,
        "lengths(n_k[2]) depends on b, so batch must be given, got None",
    ),
    (
        lambda: rule(lambda h, k: k < h).blocks(3, 3, 1, 1),
        ValueError,
        "depends on h, so heads must be given, got None",
    ),
    (
        lambda: causal(grid_q=(3, 4)).to_dense(12, 13),
        ValueError,
        "causal(grid_q=(3, 4)): grid_k=(3, 4) holds 12 positions, but len_k is 13; "
        "height x width must equal it",
    ),
    (
        lambda: (full() | local(2, grid_q=(2, 2))).to_dense(5, 4),
        ValueError,
        "local(2, grid_q=(2, 2)): grid_q=(2, 2) holds 4 positions, but len_q is 5",
    ),
    (
        lambda: documents([1, 2, 3]).to_dense(3, 4),
        ValueError,
        "documents(ids[3]): ids_k has 3 entries, but len_k is 4; give one id per position",
    ),
    (
        lambda: documents([[1, 2], [3, 4]]).to_dense(2, 2, batch=3),
        ValueError,
        "documents(ids[2x2]): ids_q is for a batch of 2, but batch is 3",
    ),
    (
        lambda: (~lengths([1, 2]) & full()).to_dense(2, 2, batch=1),
        ValueError,
        "lengths(n_k[2]): n_k is for a batch of 2, but batch is 1",
    ),
    (
        lambda: dense(np.ones((3, 4), bool)).to_dense(3, 5),
        ValueError,
        "dense(array[3x4]) of shape (3, 4) does not broadcast to (batch, heads, 3, 5)",
    ),
    (
        lambda: dense(np.ones((2, 3, 4), bool)).to_dense(3, 4, batch=1, heads=3),
        ValueError,
        "dense(array[2x3x4]) of shape (2, 3, 4) does not broadcast to (1, 3, 3, 4)",
    ),
    (
        lambda: rule(lambda q, k: q * q * q * 10**9 < k).blocks(2**20, 4, 64, 64),
        OverflowError,
        "at most 64 bits are allowed",
    ),
]


@pytest.mark.feature("T15")
@pytest.mark.parametrize(
    ("wrong", "error", "message"), REFUSED, ids=[str(number) for number in range(len(REFUSED))]
)
def test_bad_arguments_raise_one_line(
    wrong: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        wrong()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_rule_may_keep_values_in_defaults() -> None:
    rules = [rule(lambda q, k, n=n: q - k < n) for n in (1, 2)]
    assert [int(made.to_dense(3, 3).sum()) for made in rules] == [6, 8]


def test_a_rule_may_be_a_function_of_anything() -> None:
    assert rule(lambda: True).to_dense(2, 2).all()
    assert not rule(lambda k: k < 0).to_dense(2, 2).any()
    many = rule(lambda k: reduce(or_, [k == np.int64(sink) for sink in range(0, 3000, 3)]))
    assert many.to_dense(1, 9).astype(int).tolist() == [[1, 0, 0, 1, 0, 0, 1, 0, 0]]


def test_check_says_what_does_not_fit() -> None:
    (causal() & documents([0, 0, 1])).check(2, 4, 3, 3)
    with pytest.raises(ValueError, match="ids_q has 3 entries, but len_q is 4"):
        (causal() & documents([0, 0, 1])).check(2, 4, 4, 3)
    with pytest.raises(ValueError, match="is for a batch of 2, but batch is 5"):
        (~(full() | lengths([1, 2]))).check(5, 1, 3, 3)


def test_a_class_whose_bind_returns_no_expression_is_named() -> None:
    class Wrong(Rule):
        def bind(self, len_q: int, len_k: int) -> Any:
            return True

        def __repr__(self) -> str:
            return "wrong()"

    with pytest.raises(
        TypeError, match=r"^wrong\(\): bind must return an expression .*, got True$"
    ):
        Problem.of((1, 1, 3, 8), mask=Wrong())
