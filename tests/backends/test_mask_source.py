"""A mask as kernel source: run, it says of every pair what the exact fold says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mask_sources import LANGUAGES, RULES_OF_SOURCES, SHAPE, SIZES, chain, widths

from tilefold import Rule, causal, dense, full, local, rule

in_every_language = pytest.mark.parametrize("language", LANGUAGES)


def trials() -> list[Any]:
    """Language and rule: Triton's first three are quick, and it has ten composed rules fewer."""
    return [
        pytest.param(
            *(language, name),
            marks=() if language == "triton" and number < 3 else pytest.mark.slow,
            id=f"{language}-{name}",
        )
        for language in LANGUAGES
        for number, name in enumerate(RULES_OF_SOURCES)
        if not (language == "triton" and name.startswith("composed-12"))
    ]


@pytest.mark.feature("M15", "T03", "T04", "T05", "T06", "T07")
@pytest.mark.parametrize(("language", "name"), trials())
def test_mask_source_says_of_every_pair_what_the_rule_says(language: str, name: str) -> None:
    given = RULES_OF_SOURCES[name]
    written = LANGUAGES[language]
    if language == "triton" and not written.source(given):
        return  # its kernels do not ask a mask that is the same everywhere
    batch, heads, len_q, len_k = SHAPE
    want = np.broadcast_to(given.to_dense(len_q, len_k, batch, heads), SHAPE)
    for bits in widths(given):
        wrong = np.argwhere(written.pairs(name, bits) != want)
        assert not len(wrong), f"{name}, {bits} bits: pair (b, h, q, k) {wrong[0]}"


@pytest.mark.feature("M15", "A05")
@in_every_language
def test_rules_that_differ_in_numbers_alone_share_their_source(language: str) -> None:
    def source(given: Rule) -> tuple[str, str]:
        return LANGUAGES[language].source(given), LANGUAGES[language].call(given)

    assert source(local(5)) == source(local(50))
    assert source(causal() & local(5)) == source(causal() & local(50))
    data = np.random.default_rng(0).random((SIZES.heads, SIZES.len_q, SIZES.len_k)) < 0.5
    assert source(dense(data)) == source(dense(~data))
    one, other = np.zeros((60, 84), bool), np.ones((60, 84), bool)
    assert source(dense(one)) == source(dense(other))
    assert source(local(5)) != source(local(5, causal=True))
    assert source(rule(lambda q, k: q % 3 == 0)) != source(rule(lambda q, k: q % 4 == 0))


@in_every_language
def test_a_mask_that_is_the_same_everywhere_is_no_function(language: str) -> None:
    for given in (full(), rule(lambda q, k: False)):
        assert LANGUAGES[language].source(given) == ""


@pytest.mark.slow
@in_every_language
def test_mask_sources_have_short_lines_of_ascii(language: str) -> None:
    written = LANGUAGES[language]
    for name, given in RULES_OF_SOURCES.items():
        source = written.source(given)
        longest = max(map(len, ["", *source.splitlines()]))
        assert longest <= written.most_columns, f"{name}: a line of {longest} characters"
        assert source.isascii()
    longest = max(map(len, written.source(chain()).splitlines()))
    assert longest <= 100, f"a chain of rules: a line of {longest} characters"
