"""Rules and expressions whose parts are shared, and deep ones: as cheap as they have nodes.

Every rule here would be 2^n parts if it were walked as a tree, or deeper than Python's stack.
"""

from __future__ import annotations

import gc
import pickle
import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
from cases import random_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_sources import LANGUAGES, SIZES, graphs
from numpy.typing import NDArray

import tilefold
from tilefold import Rule, attention, causal, dense, full, local, prefix, rule
from tilefold.backends.cpu import calls, kernel
from tilefold.backends.cpu.plan import plan
from tilefold.masks.evaluate import intervals
from tilefold.masks.expression import MOST_OPERATIONS, Collect, Index, evaluate
from tilefold.masks.graph import ordered
from tilefold.masks.parse import parse
from tilefold.masks.picture import draw
from tilefold.masks.skeleton import split
from tilefold.masks.table_bounds import TableBounds
from tilefold.planning.masked import MaskedProblem
from tilefold.planning.roofline import visible_pairs
from tilefold.problems.attention import Problem

Q, K = Index("q"), Index("k")


def doubled(times: int) -> Rule:
    """A number that is the sum of two of the one before."""

    def sees(q: Any, k: Any) -> Any:
        number = q - k
        for _ in range(times):
            number = number + number
        return number >= 0

    return rule(sees)


def halves(times: int) -> Rule:
    """A rule that occurs twice in the next one."""
    made = causal()
    for n in range(times):
        made = (made & local(n + 3)) | (made & prefix(n))
    return made


def negated(times: int) -> Rule:
    """A rule under many negations."""
    made = causal()
    for _ in range(times):
        made = ~made
    return made


def nested(times: int) -> Rule:
    """Joins of two kinds, one in the other."""
    made = causal()
    for n in range(times):
        made = (made & local(n + 2)) | prefix(1)
    return made


def counted(times: int) -> Rule:
    """A number to which 1 is added many times."""

    def sees(q: Any, k: Any) -> Any:
        for _ in range(times):
            q = q + 1
        return q >= k + times

    return rule(sees)


def pieces(times: int) -> Rule:
    """A piece of a piece of a piece, each beside another rule."""
    made = causal()
    for _ in range(times):
        made = made.window(8, 8) | prefix(1)
    return made


GRAPHS: dict[str, tuple[Callable[[int], Rule], int]] = {
    "doubled": (doubled, 40),
    "halves": (halves, 24),
    "negated": (negated, 3000),
    "nested": (nested, 600),
    "counted": (counted, 2000),
    "pieces": (pieces, 80),
}

every_graph = pytest.mark.parametrize(("make", "times"), GRAPHS.values(), ids=GRAPHS)


@pytest.mark.slow
@every_graph
def test_rules_of_shared_and_of_deep_parts_are_values(
    make: Callable[[int], Rule], times: int
) -> None:
    made, again, other = make(times), make(times), make(times - 1)
    assert made == again and hash(made) == hash(again)
    assert made != other
    for copied in (pickle.loads(pickle.dumps(made)), deepcopy(made)):
        assert copied == made and hash(copied) == hash(made)


@pytest.mark.slow
@every_graph
def test_rules_of_shared_and_of_deep_parts_print_what_makes_them(
    make: Callable[[int], Rule], times: int
) -> None:
    made = make(times)
    assert len(repr(made)) < 60 * times
    assert parse(repr(made)) == made
    assert eval(repr(made), vars(tilefold)) == made


@pytest.mark.slow
@every_graph
def test_rules_of_shared_and_of_deep_parts_mean_what_they_say(
    make: Callable[[int], Rule], times: int
) -> None:
    want, first = dense_of(causal()), dense_of(prefix(1))
    for n in range(times):
        if make is nested:
            want = (want & dense_of(local(n + 2))) | first
        if make is halves:
            want = (want & dense_of(local(n + 3))) | (want & dense_of(prefix(n)))
        if make is pieces:
            want = want | first
    np.testing.assert_array_equal(dense_of(make(times)), want)
    assert sum(make(times).blocks(8, 8, 4, 4)) == 4


def dense_of(made: Rule) -> NDArray[np.bool_]:
    """A rule as an array."""
    return made.to_dense(8, 8)


@pytest.mark.slow
def test_deep_graphs_are_freed() -> None:
    made = [negated(50_000), counted(50_000)]
    gc.collect()
    made.clear()
    gc.collect()


def test_what_is_shared_is_no_part_of_a_rules_value() -> None:
    def apart(q: Any, k: Any) -> Any:
        return (q + k) * 2 + (q + k) * 2 > 3

    def shared(q: Any, k: Any) -> Any:
        number = (q + k) * 2
        return number + number > 3

    assert rule(apart) == rule(shared)
    assert hash(rule(apart)) == hash(rule(shared))
    assert rule(apart) != rule(lambda q, k: (q + k) * 2 + (q + k) * 3 > 3)
    one, pair = local(3) & prefix(2), [local(3) & prefix(2) for _ in range(2)]
    assert ~one | one == ~pair[0] | pair[1]
    assert hash(~one | one) == hash(~pair[0] | pair[1])
    assert causal() & local(3) != causal() | local(3)
    assert causal().window(8, 8) != causal().window(8, 8, q0=1)


def test_a_small_graph_is_written_out() -> None:
    number = Q + K
    assert str(number * number > number) == "(((q + k) * (q + k)) > (q + k))"
    large = str(_powers(Q - K, 12) >= 0)
    assert large.startswith("(x0 := ") and large.endswith(" >= 0))[-1]")
    assert eval(large, {"q": 5, "k": 3}) and not eval(large, {"q": 3, "k": 5})


def _powers(number: Any, times: int) -> Any:
    for _ in range(times):
        number = number + number
    return number


def test_a_fold_keeps_no_value_longer_than_it_is_needed() -> None:
    alive = peak = 0

    class Held:
        def __init__(self) -> None:
            nonlocal alive, peak
            alive += 1
            peak = max(peak, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    class Hold(Collect[Held]):
        def combine(self, values: tuple[Held, ...]) -> Held:
            return Held()

    evaluate(_powers(Q - K, 1000) >= 0, Hold())
    assert peak < 10


# What a planner and a kernel make of it.


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_source_of_a_shared_node_is_written_once(language: str) -> None:
    lengths = [len(LANGUAGES[language].source(doubled(times))) for times in (10, 20, 40)]
    assert lengths[2] - lengths[1] < 2.5 * (lengths[1] - lengths[0]) < 2000
    deepest = max(_levels(LANGUAGES[language].source(one(90))) for one in (negated, counted))
    assert deepest < 100


def _levels(source: str) -> int:
    """The deepest parentheses of a source."""
    level = deepest = 0
    for letter in source:
        level += (letter == "(") - (letter == ")")
        deepest = max(deepest, level)
    return deepest


def test_the_cpu_computes_a_shared_node_once() -> None:
    device = calls.machine(0).device

    def adds(times: int) -> int:
        problem = Problem.of((1, 1, 8, 8), mask=doubled(times))
        spec = plan(problem, device, "forward").launches[0].spec
        return kernel.emit(spec).count(" = add <")

    assert adds(40) - adds(20) == 2 * (adds(20) - adds(10)) > 0


@pytest.mark.slow
def test_a_mask_too_large_for_a_kernel_is_refused_in_one_line() -> None:
    half = MOST_OPERATIONS // 2
    fits, large = counted(half), counted(MOST_OPERATIONS)
    assert MaskedProblem.of(Problem.of((1, 1, 8, 8), mask=fits)).index_bits == 32
    with pytest.raises(ValueError) as caught:
        attention(*np.ones((3, 1, 1, 8, 8), np.float32), mask=large)
    assert str(caught.value).endswith(
        "... has 4098 operations, at most 4096 are compiled; "
        "write it as dense(mask.to_dense(len_q, len_k))"
    )
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)
    seen = attention(*np.ones((3, 1, 1, 8, 8), np.float32), mask=dense(large.to_dense(8, 8)))
    assert seen.shape == (1, 1, 8, 8)


@pytest.mark.slow
def test_pieces_of_pieces_do_not_grow_without_end() -> None:
    made = causal()
    for _ in range(40):
        made = made.window(8, 8) | made.window(8, 8, q0=0, k0=0) | made
    with pytest.raises(ValueError, match="at most 4096 are compiled"):
        made.bind(8, 8)


# Numbers past 64 bits.


def _squares(number: Any) -> Any:
    for _ in range(64):
        number = number * number
    return number


@pytest.mark.parametrize(
    ("made", "high"),
    [
        (rule(lambda q, k: (q + (2**63 - 1)) > k), 2**63 + 2),
        (rule(lambda q, k: q * 2**62 * 2 >= k), 3 * 2**62),
        (rule(lambda q, k: _squares(q + 1) >= k), 2**64),
        (full() & ~rule(lambda q, k: q * 2**62 * 2 >= k), 3 * 2**62),
    ],
    ids=["sum", "product", "squares", "inside"],
)
def test_numbers_past_64_bits_raise_one_error_wherever_they_are_computed(
    made: Rule, high: int
) -> None:
    arrays = np.ones((3, 1, 1, 4, 4), np.float32)
    problem = Problem.of((1, 1, 4, 4), mask=made)
    paths: dict[str, Callable[[], object]] = {
        "to_dense": lambda: made.to_dense(4, 4),
        "blocks": lambda: made.blocks(4, 4, 2, 2),
        "draw": lambda: draw(made, 4, 4, 2, 2),
        "attention": lambda: attention(*arrays, mask=made),
        "composed": lambda: attention(*arrays, mask=made, impl="composed"),
        "visible_pairs": lambda: visible_pairs(problem),
        "plan": lambda: MaskedProblem.of(problem),
    }
    for name, path in paths.items():
        with pytest.raises(OverflowError) as caught:
            path()
        assert str(caught.value) == (
            f"the mask computes numbers from 0 to {high} at batch=1, heads=1, len_q=4, "
            "len_k=4; at most 64 bits are allowed"
        ), name


# Random graphs.


@pytest.mark.slow
@settings(max_examples=40)
@given(st.randoms(use_true_random=False), st.integers(1, 5), st.integers(1, 5))
def test_folds_of_random_graphs_agree_with_plain_python(
    draw: random.Random, block_q: int, block_k: int
) -> None:
    graph = random_graph(draw)
    made = rule(lambda b, h, q, k: graph(b, h, q, k))
    indices = list(np.ndindex(2, 2, 6, 7))
    want = np.array([bool(graph(*index)) for index in indices]).reshape(2, 2, 6, 7)
    np.testing.assert_array_equal(made.to_dense(6, 7, 2, 2), want)
    expression = made.bind(6, 7)
    for b, h, q, k in indices[::11]:
        tile = {"b": (b, b), "h": (h, h)}
        tile |= {"q": (q, min(q + block_q, 6) - 1), "k": (k, min(k + block_k, 7) - 1)}
        inside = want[b, h, q : q + block_q, k : k + block_k]
        known = intervals(expression, tile, TableBounds({}))
        assert inside.all() or not known.all
        assert known.any or not inside.any()
    assert parse(repr(made)) == made == eval(repr(made), vars(tilefold))
    assert len(ordered(split(expression).skeleton.expression)) <= 3 * len(ordered(expression))


@pytest.mark.slow
def test_the_cpu_sees_what_graphs_say() -> None:
    made, (batch, heads, len_q, len_k) = graphs(), (2, 3, SIZES.len_q, SIZES.len_k)
    q, k = np.zeros((batch, heads, len_q, 8)), np.zeros((batch, heads, len_k, 8))
    v = np.broadcast_to(np.eye(len_k), (batch, heads, len_k, len_k))
    o = attention(*(x.astype(np.float32) for x in (q, k, v)), mask=made)
    np.testing.assert_array_equal(o > 0, made.to_dense(len_q, len_k, batch, heads))
