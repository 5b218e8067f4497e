"""The expression language: what tracing builds, what it refuses, and what kernels depend on."""

from __future__ import annotations

import gc
import operator
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tilefold import causal, documents, lengths, local, rule
from tilefold.masks.evaluate import exact
from tilefold.masks.expression import (
    Boolean,
    Collect,
    Compare,
    Expression,
    Index,
    Integer,
    Logic,
    Lookup,
    Rebuild,
    Table,
    Truth,
    TruthLookup,
    as_boolean,
    as_integer,
    evaluate,
    names,
)
from tilefold.masks.skeleton import split

B, H, Q, K = (Index(name) for name in "bhqk")


@pytest.mark.parametrize(
    ("built", "text"),
    [
        (Q + 1, "(q + 1)"),
        (1 + Q, "(1 + q)"),
        (Q - K, "(q - k)"),
        (1 - Q, "(1 - q)"),
        (2 * Q * K, "((2 * q) * k)"),
        (Q // 3, "(q // 3)"),
        (Q % 3, "(q % 3)"),
        (-Q, "-q"),
        (abs(Q - K), "abs((q - k))"),
        (Q + np.int64(3), "(q + 3)"),
        (np.int32(3) + Q, "(3 + q)"),
        (np.int32(3) < Q, "(q > 3)"),
        (Q < K, "(q < k)"),
        (Q == 3, "(q == 3)"),
        (Q != K, "(q != k)"),
        (Q <= 3, "(q <= 3)"),
        ((Q < K) & (K < 3), "((q < k) & (k < 3))"),
        ((Q < K) | True, "((q < k) | True)"),
        (False & (Q < K), "(False & (q < k))"),
        (~(Q < K), "~(q < k)"),
        ((Q < 1) & (Q < 2) & (Q < 3), "((q < 1) & (q < 2) & (q < 3))"),
        ((Q < 1) & ((Q < 2) & (Q < 3)), "((q < 1) & (q < 2) & (q < 3))"),
        (((Q < 1) & (Q < 2)) | (Q < 3), "(((q < 1) & (q < 2)) | (q < 3))"),
        (Lookup(Table(np.zeros(4, np.int32)), (Q,)) == K, "(int32[4]#"),
    ],
)
def test_operators_build_what_they_say(built: Any, text: str) -> None:
    assert str(built).startswith(text)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda: bool(Q < K), TypeError, "the truth of `(q < k)` is not known while a rule is"),
        (lambda: 0 <= Q < 3, TypeError, "chained comparisons cannot be traced: write & | ~"),
        (lambda: rule(lambda q: q + 0.5 > 1), TypeError, "indices, not with float 0.5"),
        (lambda: Q + True, TypeError, "integers and indices, not with bool True"),
        (lambda: Q == "3", TypeError, "integers and indices, not with str '3'"),
        (lambda: (Q < K) & 1, TypeError, "a rule must be True or False, got int `1`"),
        (lambda: (Q < K) | Q, TypeError, "a rule must be True or False, got Index `q`"),
        (lambda: (Q < K) == (K < Q), TypeError, "== compares numbers; write (a & b) | ~(a | b)"),
        (lambda: (Q < K) != (K < Q), TypeError, "!= compares numbers; write (a | b) & ~(a & b)"),
        (lambda: Q // 0, ValueError, "right side of // in a rule must be a constant >= 1, got `0`"),
        (lambda: Q % -2, ValueError, "right side of % in a rule must be a constant >= 1, got `-2`"),
        (lambda: Q % K, ValueError, "right side of % in a rule must be a constant >= 1, got `k`"),
        (lambda: 7 // Q, ValueError, "right side of // in a rule must be a constant >= 1, got `q`"),
        (lambda: 7 % Q, ValueError, "right side of % in a rule must be a constant >= 1, got `q`"),
        (lambda: [1, 2][Q], TypeError, "`q` has no value while a rule is traced, so it cannot"),
        (lambda: np.arange(3)[Q], TypeError, "it cannot index an array; use documents()"),
        (lambda: int(Q), TypeError, "`q` has no value while a rule is traced"),
        (lambda: as_integer("3"), TypeError, "not with str '3'"),
        (lambda: as_boolean(None), TypeError, "a rule must be True or False, got NoneType `None`"),
    ],
)
def test_what_cannot_be_traced_says_why(
    wrong: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        wrong()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_are_the_indices_that_are_read() -> None:
    assert names(Truth(True)) == set()
    assert names((Q - K < 3) & (H == 0)) == {"q", "k", "h"}
    assert names(TruthLookup(Table(np.ones((2, 2), bool)), (B, K))) == {"b", "k"}


def test_tables_are_equal_by_content() -> None:
    one, other = np.arange(4, dtype=np.int32), np.arange(8, dtype=np.int32)[::2] // 2
    assert Table(one) == Table(other)
    assert hash(Table(one)) == hash(Table(other))
    assert Table(one) != Table(one.reshape(2, 2))
    assert Table(np.array([True])) != Table(np.array([1], np.int32))
    assert Table(one) != "table"


def text_of(expression: Boolean) -> str:
    return split(expression)[0].text


@pytest.mark.feature("M15")
def test_kernels_depend_on_the_shape_of_a_rule_alone() -> None:
    window = causal() & local(256)
    assert text_of(window.bind(8, 8)) == text_of((causal() & local(3)).bind(1000, 7))
    assert text_of(documents([1, 2]).bind(2, 2)) == text_of(documents([5] * 9, [6] * 7).bind(9, 7))
    assert text_of(lengths([3]).bind(4, 4)) == text_of(lengths([4, 2]).bind(4, 4))
    assert text_of(causal().bind(8, 8)) != text_of(local(3).bind(8, 8))
    assert text_of(local(3, stride=2).bind(8, 8)) != text_of(local(3, stride=3).bind(8, 8))


def test_split_gives_numbers_and_tables_in_the_order_of_their_slots() -> None:
    ids, n_k = np.array([1, 2], np.int32), np.array([1], np.int32)
    expression = (
        (Lookup(Table(ids), (Q,)) + 5 == Lookup(Table(n_k), (B,)) - 7)
        & (Q // 3 < 11)
        & TruthLookup(Table(np.ones((1, 2), bool)), (B, K))
    )
    skeleton, numbers, tables = split(expression)
    assert skeleton.text == (
        "(((t0:int32[q] + p0) == (t1:int32[b] - p1)) & ((q // 3) < p2) & t2:bool[b, k])"
    )
    assert numbers == (5, 7, 11)
    assert [table.array.shape for table in tables] == [(2,), (1,), (1, 2)]
    assert [(slot.dtype, slot.rank) for slot in skeleton.slots] == [
        *(("int32", 1), ("int32", 1), ("bool", 2)),
    ]
    assert [(one.name, one.dtype) for one in skeleton.parameters] == [
        *(("p0", "int"), ("p1", "int"), ("p2", "int")),
    ]
    assert [slot.name for slot in skeleton.slots] == ["t0", "t1", "t2"]
    assert [slot.strides for slot in skeleton.slots] == [("t0_0",), ("t1_0",), ("t2_0", "t2_1")]
    assert skeleton == split(expression)[0]
    assert hash(skeleton) == hash(split(expression)[0])
    assert skeleton != split(Q < K)[0]


@dataclass(frozen=True, eq=False)
class Larger(Integer):
    """A kind of node that the package does not know."""

    left: Integer
    right: Integer

    @property
    def children(self) -> tuple[Expression, ...]:
        return (self.left, self.right)


class Leaves(Collect[int]):
    def combine(self, values: tuple[int, ...]) -> int:
        return sum(values) or 1


def test_a_new_kind_of_node_means_something_to_what_only_walks_the_tree() -> None:
    expression = Larger(Q * 2, K + Q) < abs(B)
    assert names(expression) == {"q", "k", "b"}
    assert evaluate(expression, Leaves()) == 5
    with pytest.raises(NotImplementedError, match="no meaning to a node of Larger"):
        exact(expression, b=0, h=0, q=1, k=2)


def test_a_rebuilt_tree_is_the_same_tree() -> None:
    ids = Table(np.array([1, 2], np.int32))
    dense = TruthLookup(Table(np.ones((1, 2), bool)), (B, K))
    expression = (abs(-(Q // 3)) <= Lookup(ids, (K % 2,))) & dense & ~Truth(True)
    rebuilt = evaluate(expression, Rebuild())
    assert rebuilt is not expression and str(rebuilt) == str(expression)
    skeleton = split(expression)[0].expression
    assert str(evaluate(skeleton, Rebuild())) == str(skeleton)


class Count:
    """An interpretation that counts how often each kind of node is computed."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def visit(*parts: Any) -> Value:
            self.seen.append(name)
            return Value()

        return visit


class Value:
    """Something that a weak reference can watch."""


def test_shared_nodes_are_computed_once() -> None:
    shared = Q - K
    count = Count()
    evaluate((shared < 3) & (shared > -3), count)  # type: ignore[arg-type]  # stands for any interpretation
    assert count.seen.count("binary") == 1
    assert count.seen.count("compare") == 2


def test_a_fold_leaves_nothing_behind() -> None:
    """Values may be large arrays: they go at once, not when the collector comes by."""
    kept: list[weakref.ref[Value]] = []

    class Watch(Count):
        def index(self, name: str) -> Value:
            value = Value()
            kept.append(weakref.ref(value))
            return value

    gc.disable()
    try:
        evaluate((Q < 3) & (K < 3), Watch())  # type: ignore[arg-type]  # stands for any interpretation
        assert [reference() for reference in kept] == [None, None]
    finally:
        gc.enable()


def test_every_operator_means_what_it_means_in_python() -> None:
    numbers = np.arange(-6, 7)
    q, k = numbers[:, None], numbers
    operations = (operator.add, operator.sub, operator.mul)
    comparisons = (
        *(operator.lt, operator.le, operator.gt),
        *(operator.ge, operator.eq, operator.ne),
    )
    for compute in operations:
        for compare in comparisons:
            expression = compare(compute(Q, K), 2)
            assert isinstance(expression, Compare)
            found = exact(expression, b=0, h=0, q=q, k=k)
            assert found.tolist() == [
                [compare(compute(int(x), int(y)), 2) for y in numbers] for x in numbers
            ]


def test_a_thousand_terms_are_one_node() -> None:
    many = rule(lambda k: ~_any(k == sink for sink in range(1000))).bind(1, 1)
    assert isinstance(many, Logic)
    assert isinstance(many.operands[0], Logic)
    assert len(many.operands[0].operands) == 1001


def _any(terms: Any) -> Any:
    result: Any = False
    for term in terms:
        result = result | term
    return result
