"""A mask as Triton text: interpreted, it says of every pair what the exact fold says."""

from __future__ import annotations

import ast
import random

import numpy as np
import pytest
from cases import RULES, Sizes, random_rule
from interpreted import needs

from tilefold import Rule, causal, dense, full, local, rule
from tilefold.backends.launching import plain, unbroadcast
from tilefold.backends.triton import module
from tilefold.backends.triton.kernels import mask
from tilefold.backends.triton.kernels.frame import HEADERS
from tilefold.masks.evaluate import index_bits
from tilefold.masks.expression import split

SIZES = Sizes(batch=2, heads=3, len_q=60, len_k=84)

PAIRS = """
@triton.jit
def pairs({given}):
    place = tl.program_id(0)
    h, b = place % {heads}, place // {heads}
    row, column = tl.arange(0, 64), tl.arange(0, 128)
    q = tl.minimum(row, {len_q} - 1)[:, None]
    k = tl.minimum(column, {len_k} - 1)[None, :]
    seen = {call}
    inside = (row < {len_q})[:, None] & (column < {len_k})[None, :]
    at = out + (place * {len_q} + row)[:, None] * {len_k} + column[None, :]
    tl.store(at, (inside & seen).to(tl.int8), mask=inside)
"""


def text_of(given: Rule, bits: int) -> str:
    """A module with the rule and a kernel that asks it about every pair."""
    skeleton, _, _ = split(given.bind(SIZES.len_q, SIZES.len_k))
    names = ["out", *mask.arguments(skeleton)]
    pairs = PAIRS.format(
        given=", ".join(names),
        call=mask.call(skeleton, b="b", h="h", q="q", k="k"),
        heads=SIZES.heads,
        len_q=SIZES.len_q,
        len_k=SIZES.len_k,
    )
    return "\n".join([*HEADERS, "", mask.visible(skeleton, bits), pairs])


def interpreted(given: Rule, bits: int) -> np.ndarray:
    import torch

    _, parameters, tables = split(given.bind(SIZES.len_q, SIZES.len_k))
    shape = (SIZES.batch, SIZES.heads, SIZES.len_q, SIZES.len_k)
    out = torch.full(shape, 7, dtype=torch.int8)
    arguments: list[object] = [*parameters]
    for table in tables:
        held = unbroadcast(table.array)
        spans = [
            stride // held.itemsize if length > 1 else 0
            for stride, length in zip(np.ascontiguousarray(held).strides, held.shape, strict=True)
        ]
        arguments += [torch.tensor(plain(held)), *spans]
    pairs = module.load(text_of(given, bits), "pairs")
    pairs[(SIZES.batch * SIZES.heads,)](out, *arguments)
    return out.numpy()


def chain() -> Rule:
    """Many rules in a row make no line too long, and a rule used twice is folded once."""
    window = local(9) & ~local(3)
    found = window
    for n in range(2, 30):
        found = (found & rule(lambda q, k, n=n: (q * n - k) % (n + 2) != 1)) | (window & local(n))
    return found


ALL: dict[str, Rule] = {
    **{name: make(SIZES) for name, make in RULES.items()},
    **{f"composed-{seed}": random_rule(random.Random(seed), SIZES, 3) for seed in range(100, 120)},
    "chain": chain(),
    "negative": rule(lambda q, k: (-abs(q - k) // 7 + -(7 - k) % 5) * 3 >= -(q - 50) // 9),
    "order": rule(lambda q, k: q - (k - 3) - (q - k) * 2 % 5 // 2 * (q + 1) < k * 5 // 3 % 7),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in list(ALL)[3:]]


@pytest.mark.feature("M15", "T03", "T04", "T05", "T06", "T07")
@pytest.mark.parametrize("name", [*list(ALL)[:3], *SLOW])
def test_the_text_says_of_every_pair_what_the_rule_says(name: str) -> None:
    needs()
    given = ALL[name]
    expression = given.bind(SIZES.len_q, SIZES.len_k)
    if not mask.masks(split(expression)[0]):
        assert mask.visible(split(expression)[0], 32) == ""
        return
    bits = index_bits(expression, SIZES.batch, SIZES.heads, SIZES.len_q, SIZES.len_k)
    want = given.to_dense(SIZES.len_q, SIZES.len_k, SIZES.batch, SIZES.heads)
    for width in (32, 64)[bits == 64 :]:
        np.testing.assert_array_equal(interpreted(given, width), want)


def test_rules_that_differ_in_numbers_alone_share_their_text() -> None:
    assert text_of(causal() & local(5), 32) == text_of(causal() & local(50), 32)
    one, other = np.zeros((60, 84), bool), np.ones((60, 84), bool)
    assert text_of(dense(one), 32) == text_of(dense(other), 32)
    assert mask.visible(split(full().bind(5, 5))[0], 32) == ""


def test_lines_are_short_and_names_few() -> None:
    text = text_of(chain(), 32)
    assert max(map(len, text.partition("def pairs(")[0].splitlines())) <= 100
    function = next(
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name == "visible"
    )
    names = [node.targets[0].id for node in function.body if isinstance(node, ast.Assign)]  # type: ignore[attr-defined]  # names alone are assigned
    assert len(names) == len(set(names))
    assert "truth" in text and "number" not in "".join(names[:1])
