"""Scores as values: they compare, hash, print, and are copied; and what is said of wrong ones."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

import tilefold
from tilefold import alibi, attention, bias, score, softcap, table, temperature, where
from tilefold.scores.score import InOrder, Score

RNG = np.random.default_rng(0)
MADE: dict[str, Score] = {
    "softcap(30)": softcap(30.0),
    "alibi()": alibi(),
    "alibi(array[2])": alibi(RNG.normal(size=2)),
    "bias(array[3x3])": bias(RNG.normal(size=(3, 3))),
    "temperature(0.5)": temperature(0.5),
    "relative_bias(array[2x8], bidirectional=False, max_distance=9)": tilefold.relative_bias(
        RNG.normal(size=(2, 8)), bidirectional=False, max_distance=9
    ),
    "distance_bias(array[2x3])": tilefold.distance_bias(RNG.normal(size=(2, 3))),
    "window_bias(array[2x5x1])": tilefold.window_bias(RNG.normal(size=(2, 5, 1))),
    "score(lambda s, h: s - array[2][h])": score(lambda s, h: s - table(np.ones(2))[h]),
    "[softcap(2), alibi()]": InOrder((softcap(2), alibi())),
    "bias(array[3])": bias(torch.nn.Parameter(torch.arange(3, dtype=torch.bfloat16))),
}
Q = np.ones((1, 2, 3, 4))
F = Q.astype(np.float32)
T = torch.ones(1, 2, 3, 4)


@pytest.mark.parametrize("text", MADE)
def test_scores_print_as_the_call_that_makes_them_and_are_copied(text: str) -> None:
    made = MADE[text]
    assert repr(made) == text
    given = T if "bfloat16" in str(made.inputs) else Q
    want = np.asarray(attention(given, given, given, score=made).detach() if given is T else 0)
    for again in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made), copy.copy(made)):
        assert again == made and hash(again) == hash(made) and repr(again) == text
        assert (again.form.score == made.form.score and made.form.score != made) or not made.inputs
        if given is T:
            found = attention(given, given, given, score=again)
            assert np.array_equal(found.detach(), want) and found.requires_grad
    assert sum(made == other for other in MADE.values()) == 1


def test_equal_scores_have_equal_arrays_and_one_form() -> None:
    first, same, other = bias(np.ones(3)), bias(np.ones(3)), bias(np.zeros(3))
    assert first == same and first != other and first.form.score == other.form.score
    assert bias(np.ones(3, np.float32)) != first
    assert softcap(2) != softcap(3) and [softcap(2)] != softcap(2)


@pytest.mark.slow
def test_a_module_is_copied_with_its_score() -> None:
    """The copy's score reads the copy's parameter, in copies and in new types of the weights."""

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slopes = torch.nn.Parameter(torch.rand(2))
            self.score = alibi(self.slopes)

        def forward(self, q: torch.Tensor) -> torch.Tensor:
            o: torch.Tensor = attention(q, q, q, score=self.score)
            return o

    first = Module()
    first(T)
    second = copy.deepcopy(first)
    second(torch.randn(1, 2, 3, 4)).sum().backward()
    assert second.slopes.grad is not None and first.slopes.grad is None
    assert second.score.form.arrays[0] is second.slopes


def test_threads_share_a_score() -> None:
    made = [bias(RNG.normal(size=(3, 3))), softcap(3.0)]
    want = attention(Q, Q, Q, score=made)
    again = [bias(made[0].form.arrays[0]), softcap(3.0)]  # nothing of it is computed yet

    def call(_: int) -> bool:
        return np.array_equal(attention(Q, Q, Q, score=again), want)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(64)))


ENTRIES = table(np.zeros(4))
TRACED = "the truth of `(q > k)` is not known while a rule is traced; Python's `and`"
MESSAGES: dict[str, tuple[Callable[[], Any], str]] = {
    "a bias that does not broadcast": (
        lambda: attention(Q, Q, Q, score=bias(np.zeros((5, 3)))),
        "bias: array of shape (5, 3) does not broadcast to (batch, heads, len_q, len_k)"
        " = (1, 2, 3, 3)",
    ),
    "slopes of another length": (
        lambda: attention(Q, Q, Q, score=alibi(np.zeros(3))),
        "alibi: slopes of shape (3,) does not broadcast to (batch, heads) = (1, 2)",
    ),
    "a truth for a number": (
        lambda: score(lambda s, q, k: s + (q > k)),
        "`(q > k)` is a truth where a number is wanted; write where(truth, x, y)",
    ),
    "a truth returned": (
        lambda: score(lambda q, k: q > k),
        "score: the function returned the truth `(q > k)`; write where(...)",
    ),
    "a number for a truth": (
        lambda: score(lambda s, q: where(q, s, 0)),
        "where: the first argument must be a truth, got the number `q`",
    ),
    "if": (lambda: score(lambda s, q, k: s if q > k else 0), TRACED),
    "and": (lambda: score(lambda s, q, k: where(q > k and k > 1, s, 0)), TRACED),
    "not": (lambda: score(lambda s, q, k: where(not q > k, s, 0)), TRACED),
    "a float index": (
        lambda: score(lambda s: s + ENTRIES[s]),
        "an index of a table must be an integer, got `s`",
    ),
    "too few indices": (
        lambda: score(lambda s, q: s + table(np.zeros((2, 2)))[q]),
        "table of shape (2, 2) takes 2 indices, got 1",
    ),
    "an index beyond its table": (
        lambda: attention(Q, Q, Q, score=score(lambda s, q: s + ENTRIES[q + 2])),
        "the score reads the entries 2 to 4 of axis 0 of its array 0, which has 4",
    ),
    "NumPy's indexing": (
        lambda: score(lambda s, q: s + np.zeros(4)[q]),
        "`q` has no value while a rule is traced, so it cannot index an array; use documents(),"
        " lengths() or dense(), or in a score tilefold.table(array)[i]",
    ),
    "functions of math": (
        lambda: score(lambda s: math.exp(s)),
        "`s` has no value while a rule is traced: in a score write tilefold.exp",
    ),
    "functions of NumPy": (
        lambda: score(lambda s: np.exp(s)),
        "score: the function cannot be called with symbols: TypeError: operand 'ScoreValue'",
    ),
    "an unknown name": (
        lambda: score(lambda s, x: s),
        "score: the parameters of a function must be any of s, b, h, q, k; got 'x'",
    ),
    "nothing returned": (
        lambda: score(lambda s: None),
        "score: the function returned None, no number; is `return` missing?",
    ),
    "rounding a real number": (lambda: score(lambda s: s // 2), "`s // 2`: // takes integers"),
    "an array of bool": (
        lambda: bias(np.zeros((2, 2), bool)),
        "bias: array must be an array of floats, got bool array(",
    ),
    "an array for a score": (
        lambda: attention(Q, Q, Q, score=np.zeros(3)),  # type: ignore[arg-type]  # the point
        "score must be one such as tilefold.softcap(30), got array([0., 0., 0.]); wrap an array",
    ),
    "a rule for a score": (
        lambda: attention(Q, Q, Q, score=tilefold.causal()),  # type: ignore[arg-type]  # the point
        "score must be one such as tilefold.softcap(30), got causal(); pass a rule as mask=",
    ),
    "a sum of scores": (
        lambda: softcap(3) + alibi(),
        "scores have no arithmetic, got softcap(3) and alibi(): write several in order as a list",
    ),
    "a number times a score": (lambda: 2 * alibi(), "scores have no arithmetic, got alibi() and 2"),
    "a function for a score": (
        lambda: attention(Q, Q, Q, score=softcap),  # type: ignore[arg-type]  # the point
        "score must be one such as tilefold.softcap(30), got <function softcap",
    ),
    "another implementation": (
        lambda: attention(Q, Q, Q, score=alibi(), impl="native"),
        "impl='native' takes no score; use impl='kernel' or impl='composed'",
    ),
    "a cap of NaN": (
        lambda: softcap(math.nan),
        "softcap: cap must be a finite number > 0 with a finite inverse, got nan",
    ),
    "a temperature of 0": (
        lambda: temperature(0),
        "temperature: a number must be finite and not 0, with a finite inverse, got 0",
    ),
    "an infinite temperature": (
        lambda: temperature(math.inf),
        "temperature: a number must be finite and not 0, with a finite inverse, got inf",
    ),
    "a cap that float32 does not hold": (
        lambda: attention(F, F, F, score=softcap(1e300)),
        "score=softcap(1e+300) computes with 1e-300, and float32 has numbers from 1.18e-38 to"
        " 3.4e+38 in size: choose another number, or pass float64 arrays",
    ),
    "a temperature that float32 does not hold": (
        lambda: attention(F, F, F, score=[alibi(), temperature(1e-40)], impl="composed"),
        "score=[alibi(), temperature(1e-40)] computes with 1e+40, and float32 has numbers from",
    ),
    "a number of one's own that float32 does not hold": (
        lambda: attention(T, T, T, score=score(lambda s, k: s / (k + 1e-300))),
        "score=score(lambda s, k: s / (k + 1e-300)) computes with 1e-300, and float32 has numbers",
    ),
    "a cap whose inverse is infinite": (
        lambda: softcap(1e-310),
        "softcap: cap must be a finite number > 0 with a finite inverse, got 1e-310",
    ),
    "a number that no float holds": (
        lambda: softcap(10**400),
        "softcap: cap must be a number that a float holds, got 1000",
    ),
    "integers of more than 32 bits": (
        lambda: table(np.array([5, 2**40])),
        "table: integers must fit 32 bits, got numbers from 5 to 1099511627776; pass floats",
    ),
    "an array without an index": (
        lambda: score(lambda s: s + np.ones(3)),
        "a score computes with numbers, not with ndarray array([1., 1., 1.]); an entry of an array"
        " is tilefold.table(array)[i, j]",
    ),
    "a table without an index": (
        lambda: score(lambda s: s + table(np.ones(3))),
        "a score computes with numbers, not with Entries table of shape (3,); an entry of an",
    ),
    "a masked array": (
        lambda: bias(np.ma.masked_array(np.zeros((3, 3)), np.eye(3) > 0)),
        "bias: array must be an array without a mask of its own: pass its data",
    ),
    "a distance beyond memory": (
        lambda: tilefold.relative_bias(np.zeros((2, 32)), max_distance=10**12),
        "relative_bias: max_distance must be at most 1048576, got 1000000000000",
    ),
    "a score for the mask of a picture": (
        lambda: tilefold.picture(softcap(3), 4),  # type: ignore[arg-type]  # the point
        "mask must be a rule such as tilefold.causal(), got softcap(3)",
    ),
    "five axes": (
        lambda: bias(np.zeros((1, 1, 1, 1, 1))),
        "bias: array must broadcast to (batch, heads, len_q, len_k), got shape (1, 1, 1, 1, 1)",
    ),
}


def test_numbers_of_numpy_are_numbers() -> None:
    for made in (np.float32(2), np.float64(2), np.int64(2)):
        assert temperature(made) == temperature(2) and softcap(made) == softcap(2)


@pytest.mark.slow
def test_numbers_that_float64_holds_are_those_of_float64() -> None:
    for made in (softcap(1e300), temperature(1e-200), score(lambda s: s * 1e300)):
        for impl in ("kernel", "composed"):
            o = attention(Q * 1e-150, Q, Q, score=made, impl=impl)
            np.testing.assert_allclose(o, Q, rtol=1e-12)


@pytest.mark.feature("T15")
@pytest.mark.parametrize("case", MESSAGES)
def test_message(case: str) -> None:
    call, said = MESSAGES[case]
    errors = TypeError, ValueError, IndexError, NotImplementedError
    with pytest.raises(errors, match=f"^{re.escape(said)}") as raised:
        call()
    assert "\n" not in str(raised.value)
