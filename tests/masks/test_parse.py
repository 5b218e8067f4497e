"""Mask strings: what rules print can be read back, and nothing else is understood."""

from __future__ import annotations

import doctest
from typing import Any

import mask_cases
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_cases import Case

from tilefold import causal, chunked, dense, documents, full, lengths, local, prefix, rule
from tilefold.masks import parse as parse_module
from tilefold.masks.parse import parse
from tilefold.masks.position_rules import Rule


def test_the_examples_of_the_documentation_are_true() -> None:
    failed, tried = doctest.testmod(parse_module)
    assert (failed, tried > 0) == (0, True)


@pytest.mark.parametrize("operator", ["&", "|"])
def test_constants_side_by_side_read_back_as_they_were(operator: str) -> None:
    """Found by the test below: Python would join them before a rule sees them."""
    join = {"&": lambda x, y: x & y, "|": lambda x, y: x | y}[operator]
    made = rule(lambda q, k: join(False, join(True, join(False, q < k))))
    assert (
        repr(made)
        == f"rule(lambda q, k: False {operator} (True {operator} (False {operator} (q < k))))"
    )
    assert parse(repr(made)) == made


@pytest.mark.slow
@settings(max_examples=100)
@given(mask_cases.cases(depth=3, data=False))
def test_what_a_rule_prints_reads_back_as_the_rule(case: Case) -> None:
    again = parse(repr(case.rule))
    assert again == case.rule
    assert repr(again) == repr(case.rule)


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("causal()", causal()),
        ("  causal ( ) ", causal()),
        ("causal() & (local(256) | prefix(4))", causal() & (local(256) | prefix(4))),
        ("causal() & local(256) | prefix(4)", (causal() & local(256)) | prefix(4)),
        ("~causal() & full()", ~causal() & full()),
        ("~(causal() | full())", ~(causal() | full())),
        ("causal(align='start')", causal("start")),
        ('causal("start")', causal("start")),
        (
            'local(3, stride=2, sync="scale_end", grid_q=(2, 3), grid_k=[4, 6], causal=True)',
            local(3, 2, causal=True, sync="scale_end", grid_q=(2, 3), grid_k=(4, 6)),
        ),
        ("local(window=1_000)", local(1000)),
        ("prefix(0x10)", prefix(16)),
        ("chunked(8)", chunked(8)),
        ("lengths(5)", lengths(5)),
        ("lengths((3, 5))", lengths([3, 5])),
        ("lengths((3, 5), side='left')", lengths([3, 5], side="left")),
        ("causal(lengths=5)", causal(lengths=5)),
        ("local(4, lengths=(3, 5))", local(4, lengths=[3, 5])),
        ("documents((0, 0, 1), (0, 1), causal=True)", documents([0, 0, 1], [0, 1], causal=True)),
        ("documents((0, 0, -1))", documents([0, 0, -1])),
        ("documents([[0, 1], [1, 1]], (0, 1))", documents([[0, 1], [1, 1]], [0, 1])),
        ("dense([[True, False], [True, True]])", dense([[True, False], [True, True]])),
        ("rule(lambda q, k: (q - k) % 3 == 0)", rule(lambda q, k: (q - k) % 3 == 0)),
        (
            "rule(lambda b, h, q, k: ~(abs(q - k) // 2 < h + 1) | (k != -b * 2) & True)",
            rule(lambda b, h, q, k: ~(abs(q - k) // 2 < h + 1) | (k != -b * 2) & True),
        ),
        ("causal()\n  & local(3)\t", causal() & local(3)),
    ],
)  # fmt: skip
def test_strings_and_their_rules(text: str, made: Rule) -> None:
    assert parse(text) == made


KNOWN = f"use {', '.join(parse_module.RULES)}"
ARITHMETIC = (
    "is not known here; use q, k, integers, + - * // % abs(), one comparison at a time, and & | ~"
)


@pytest.mark.slow
@pytest.mark.feature("T15")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("causal() & locl(3)", f"column 12: unknown rule locl; {KNOWN}"),
        ("   locl(3)", f"column 4: unknown rule locl; {KNOWN}"),
        ("causal() & foo", "column 12: expected a rule, got `foo`"),
        ("causal() & 3", "column 12: expected a rule, got `3`"),
        ("causal", "column 1: a rule is called: write causal(...)"),
        ("causal() and local(3)", "column 1: write & | ~ instead of `and`, `or`, `not`"),
        ("full() & (not causal())", "column 11: write & | ~ instead of `and`, `or`, `not`"),
        ("causal() + local(3)", "column 1: expected a rule, got `causal() + local(3)`"),
        ("-causal()", "column 1: expected a rule, got `-causal()`"),
        ("causal() == causal()", "column 1: expected a rule, got `causal() == causal()`"),
        ("causal() & local(0)", "column 12: local: window must be an integer >= 1, got 0"),
        ("local(2.5)", "column 7: expected a number, a string or a tuple of them, got `2.5`"),
        ("local(2 + 3)", "column 7: expected a number, a string or a tuple of them, got `2 + 3`"),
        ("local(n)", "column 7: expected a number, a string or a tuple of them, got `n`"),
        ("local(-3)", "column 1: local: window must be an integer >= 1, got -3"),
        ("full(3)", "column 1: full takes no argument: too many positional arguments"),
        ("full() & prefix(4, causal=False)", "column 10: prefix: there is no causal= any more"),
        ("prefix()", "column 1: prefix takes n: missing a required argument: 'n'"),
        (
            "chunked(sise=3)",
            "column 1: chunked takes size: ",
        ),
        ("local(3, *(1, 2))", "column 10: expected a number, a string or a tuple of them"),
        ("local(3, **{})", "column 10: ** is not known here"),
        ("causal(align='middle')", "column 1: causal: align must be 'end' or 'start'"),
        ("documents(ids[128])", "column 11: `ids[128]` stands for an array"),
        ("dense([[1, 0]])", "column 1: dense: array must be of bool, got int64"),
        ("rule(3)", "column 6: rule takes a lambda over b, h, q, k, got `3`"),
        ("rule(lambda x: x < 3)", "column 6: the parameters of a lambda must be any of b, h, q, k"),
        ("rule(lambda q=3: q < 3)", "column 6: the parameters of a lambda must be any of"),
        ("rule(lambda *q: True)", "column 6: the parameters of a lambda must be any of"),
        ("rule(lambda q, k: q <= k < 9)", f"column 19: `q <= k < 9` {ARITHMETIC}"),
        ("rule(lambda q, k: q ** 9 < k)", f"column 19: `q ** 9` {ARITHMETIC}"),
        ("rule(lambda q, k: z < k)", f"column 19: `z` {ARITHMETIC}"),
        ("rule(lambda q, k: q < 1.5)", f"column 23: `1.5` {ARITHMETIC}"),
        ("rule(lambda q, k: max(q, k))", f"column 19: `max(q, k)` {ARITHMETIC}"),
        ("rule(lambda q, k: q and k)", f"column 19: `q and k` {ARITHMETIC}"),
        ("rule(lambda q, k: q // 0 < k)", "column 19: the right side of // in a rule must be a"),
        ("rule(lambda q, k: 3 // 0 < k)", "column 19: integer division or modulo by zero"),
        ("rule(lambda q, k: q - k)", "column 1: a rule must be True or False, got Binary"),
        ("rule(lambda q, k: (q < k) + 1)", "column 19: "),
        ("local(window=3, window=4)", "column 17: window is given twice"),
        ("rule(lambda q, q: q == 0)", "column 6: a parameter of the lambda stands twice"),
        ("rule(lambda q, k: q / 2 < k)", "column 19: `q / 2`"),
        ("causal(", "column 7: "),
        ("causal() local(3)", "column"),
        ("causal();full()", "column 9: "),
        ("x = causal()", "column"),
        ("lambda: causal()", "column 1: expected a rule, got `lambda: causal()`"),
        ("[causal()][0]", "column 1: expected a rule, got `[causal()][0]`"),
        ("causal().bind(3, 3)", "column 1: expected a rule, got `causal().bind(3, 3)`"),
        ("causal().windows(3, 3)", "column 1: expected a rule, got `causal().windows(3, 3)`"),
        ("causal.window(3, 3)", "column 1: a rule is called: write causal(...)"),
        ("causal.__class__()", "column 1: expected a rule, got `causal.__class__()`"),
        ("__import__('os').system('true')", "column 1: expected a rule, got `__import__('os')"),
        ("eval('causal()')", f"column 1: unknown rule eval; {KNOWN}"),
        ("f'{causal()}'", "column 1: expected a rule, got `f'"),
        ("(fall := causal())", "column 2: expected a rule, got `fall := causal()`"),
        ("\u00e9() & causal()", "column 1: unknown rule \u00e9"),
        ("causal('\u00e9\u00e9') & 3", "column 1: causal: align must be 'end' or 'start'"),
        ("dense([[True]]) & lengths('\u00e9')", "column 19: lengths: n_k must be integers"),
        ("(causal(\n) & ~\u00e9)", "column 15: expected a rule, got `\u00e9`"),
        ("causal(\x00)", "column 1: "),
        ("~" * 1000 + "causal()", "column 1: nested more than 150 deep"),
        ("~" * 100000 + "causal()", "column 1: nested more than 150 deep"),
        ("(" * 80 + "causal()" + "& local(3) | prefix(1))" * 80, "nested more than 150 deep"),
        ("rule(lambda q, k: q * 99999999999999999999 > k)", "column 19: a rule computes with"),
        ("(x0 := causal(), local(3), ~x0)[-1]", "column 18: expected a name and :=, got `l"),
        ("(x0 := causal(), x1)[-1]", "column 18: expected a rule, got `x1`"),
        ("(x0 := causal(), x0)[0]", "column 1: expected a rule, got `(x0 := causal(), x0)[0]`"),
        ("causal() & rule(lambda q, k: (q, x0 >= k)[-1])", "column 31: expected a name and :="),
        ("(" * 1000 + "causal()" + ")" * 1000, "too many nested parentheses"),
        ("local(" + "9" * 10000 + ")", "column 1: "),
        ("", "a mask string is empty; write a rule, for example \"causal()\""),
        (" \n ", "a mask string is empty"),
    ],
)  # fmt: skip
def test_bad_strings_raise_one_line_with_the_column(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(text)
    assert type(caught.value) is ValueError
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("value", [None, 3, b"causal()", causal()])
def test_only_strings_are_read(value: Any) -> None:
    with pytest.raises(TypeError, match="a mask string must be a string, got"):
        parse(value)


@pytest.mark.slow
@settings(max_examples=300)
@given(st.text(st.sampled_from("causl()&|~ ,=3'\"[]{}qk%:.lambdrue_\n\\"), max_size=40))
def test_any_other_string_raises_a_value_error(text: str) -> None:
    try:
        assert isinstance(parse(text), Rule)
    except ValueError as error:
        assert "\n" not in str(error)


@pytest.mark.slow
def test_a_long_chain_that_is_allowed_works() -> None:
    made = parse(" | ".join(f"rule(lambda k: k == {sink})" for sink in range(0, 300, 3)))
    assert made.to_dense(1, 9).astype(int).tolist() == [[1, 0, 0, 1, 0, 0, 1, 0, 0]]
    longer = parse(" | ".join(f"local({size})" for size in range(1, 400)))
    assert parse(repr(longer)) == longer
    nested = parse("~" * 140 + "causal()")
    assert (nested.to_dense(3, 3) == causal().to_dense(3, 3)).all()
