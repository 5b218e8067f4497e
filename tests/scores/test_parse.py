"""Score strings: what scores print can be read back, and nothing else is understood."""

from __future__ import annotations

import doctest
import importlib
import math
import pickle
from typing import Any

import numpy as np
import pytest

from tilefold import (
    Problem,
    Score,
    alibi,
    bias,
    exp,
    log,
    maximum,
    minimum,
    relative_bias,
    score,
    sigmoid,
    softcap,
    sqrt,
    table,
    tanh,
    temperature,
    where,
)
from tilefold.masks.evaluate import exact_real
from tilefold.scores.parse import parse_score
from tilefold.scores.score import Sizes, as_score

OWN = [
    score(lambda s: s),
    score(lambda: 3),
    score(lambda q: -q),
    score(lambda s, q, k: s - 0.1 * abs(q - k)),
    score(lambda s, q: s + q * 1.0),
    score(lambda s, q: where(q < 2.0, s, -math.inf)),
    score(lambda s: s + math.nan),
    score(lambda s: maximum(1.0, 2.0) * s - 0.0),
    score(lambda s, q: minimum(q, 2.0) - minimum(q, 2) * s),
    score(lambda s, q, k: -s / (q + 1) + 1 / (k + 1)),
    score(lambda s: -0.5 * s + -2.0 - 1e-20 * s + 1e30),
    score(lambda s, b, h: s * tanh(exp(-s)) - log(s * s + 1) * sqrt(sigmoid(b // 2 + h % 3))),
    score(lambda s, q, k: where((q >= k) & ~(s > 3) | (q % 2 == 0), s, sigmoid(-s))),
]
READY: list[Any] = [
    softcap(30.0),
    softcap(30.0000001),
    alibi(),
    temperature(0.5),
    temperature(1e20),
    [softcap(50), alibi()],
    [softcap(50), [alibi(), temperature(-2.0)]],
    [score(lambda s: s + 1)],
]


def doubled(s: Any) -> Any:
    for _ in range(12):
        s = s + s
    return s


@pytest.mark.feature("T12")
@pytest.mark.parametrize(
    "name", ["parse", "functions", "modifications", "relative", "score", "traced"]
)
def test_the_examples_of_the_documentation_are_true(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(f"tilefold.scores.{name}"))
    assert (failed, tried > 0) == (0, True)


def test_what_a_score_prints_reads_back_as_the_score() -> None:
    for made in [*OWN, *map(as_score, READY), score(doubled)]:
        again = parse_score(repr(made))
        assert again == made, made
        assert hash(again) == hash(made)
        assert repr(again) == repr(made)
        assert pickle.loads(pickle.dumps(made)) == again


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("  softcap ( cap = 30 )\n", softcap(30)),
        ("(softcap(50), alibi())", as_score([softcap(50), alibi()])),
        ("alibi(None)", alibi()),
        ("alibi((0.5, 0.25))", alibi(np.array([0.5, 0.25]))),
        ("bias([[0, -inf], [1.5, -2]])", bias(np.array([[0, -math.inf], [1.5, -2]]))),
        ("temperature(-2)", temperature(-2.0)),
        (
            "relative_bias(((1.0, 2, 3, 4),), bidirectional=False, max_distance=9)",
            relative_bias(np.array([[1.0, 2, 3, 4]]), bidirectional=False, max_distance=9),
        ),
        (
            "score(lambda s, h: s * table((0.5, 2.0))[h])",
            score(lambda s, h: s * table(np.array([0.5, 2.0]))[h]),
        ),
        (
            "score(lambda s, q, k: s + table(((1, 2), (3, 4)))[q, k])",
            score(lambda s, q, k: s + table(np.array([[1, 2], [3, 4]]))[q, k]),
        ),
    ],
)  # fmt: skip
def test_strings_and_their_scores(text: str, made: Score) -> None:
    q, k = np.ogrid[:2, :2]
    read, right = (
        exact_real(each.expression(Sizes(1, 2, 2, 2)), 0.5, b=0, h=1, q=q, k=k)
        for each in (parse_score(text), made)
    )
    np.testing.assert_array_equal(read, right)


USE = "use s, q, numbers, + - * / // %, abs, exp, log, tanh, sigmoid, sqrt, minimum, maximum, where"


@pytest.mark.feature("T15")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("softcap", "column 1: a score is called: write softcap(...)"),
        ("  softcp(30)", "column 3: unknown score softcp; use softcap, alibi, bias, temperature"),
        ("softcap(30) + alibi()", "column 1: expected a score, got `softcap(30) + alibi()`"),
        ("[softcap(30), causal()]", "column 15: unknown score causal; use softcap"),
        ("[]", "column 1: expected a score, got `[]`"),
        ("softcap(0)", "column 1: softcap: cap must be a finite number > 0"),
        ("softcap('a')", "column 1: softcap: cap must be a number, got 'a'"),
        ("softcap(inf)", "column 1: softcap: cap must be a finite number > 0"),
        ("bias(array[2x3])", "column 6: `array[2x3]` stands for an array, which a string cannot"),
        ("bias(array[8])", "column 6: `array[8]` stands for an array, which a string cannot hold"),
        ("alibi(slopes)", "column 7: expected a number, a string or a tuple of them, got `slopes`"),
        ("alibi(slope=1)", "column 1: alibi takes slopes: got an unexpected keyword argument"),
        ("score(3)", "column 7: score takes a lambda over s, b, h, q, k, got `3`"),
        ("score(lambda s, z: s)", "column 7: the parameters of a lambda must be any of s, b, h,"),
        ("score(lambda s: s < 3)", "column 1: score: the function returned the truth `(s < 3)`"),
        ("score(lambda s, q: s + (q < 3))", "column 20: `(q < 3)` is a truth where a number is"),
        ("score(lambda s, q: s if q else 0)", "column 20: `s if q else 0` is not known h"),
        ("score(lambda s, q: q > 1 and s)", f"column 20: `q > 1 and s` is not known here; {USE}"),
        ("score(lambda s, q: s ** 2)", f"column 20: `s ** 2` is not known here; {USE}"),
        ("score(lambda s, q: where(q, s, 0))", "column 20: where: the first argument must be a tr"),
        ("score(lambda s, q: where(q > 1, s))", "column 20: where() missing 1 required positional"),
        ("score(lambda s, q: log(s) // 2)", "column 20: `log(s) // 2`: // takes integers alone"),
        ("score(lambda s, q: 1 / 0)", "column 20: division by zero"),
        ("score(lambda s: table((1, 2))[s])", "column 17: an index of a table must be an integer"),
        ("score(lambda s: table((1, 2))[0, 0])", "column 17: table of shape (2,) takes 1 indices"),
        ("score(lambda s: s.real)", "column 17: `s.real` is not known here"),
        ("__import__('os').system('true')", "column 1: expected a score, got `__import__('os')"),
        ("softcap(30", "column 8: "),
        ("-" * 1000 + "softcap(3)", "column 1: nested more than 150 deep"),
        (" \n", "a score string is empty"),
    ],
)  # fmt: skip
def test_bad_strings_raise_one_line_with_the_column(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_score(text)
    assert type(caught.value) is ValueError
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_only_strings_are_read() -> None:
    with pytest.raises(TypeError, match="a score string must be a string, got"):
        parse_score(softcap(3))  # type: ignore[arg-type]  # what the test is about


@pytest.mark.feature("T15")
@pytest.mark.parametrize("array", [np.zeros(3), np.zeros(3, int), np.zeros(3, bool)])
def test_a_look_up_beyond_any_table_is_refused(array: Any) -> None:
    made = score(lambda s, q: where(table(array)[q] == 0, s, 0) if array.dtype != bool
                 else where(table(array)[q], s, 0))  # fmt: skip
    Problem.of((1, 1, 3, 4), score=made)
    with pytest.raises(IndexError, match=r"reads the entries 0 to 3 of axis 0 of .*, which has 3;"):
        Problem.of((1, 1, 4, 4), score=made)
