"""The same bits whatever else is in the call: a batch entry alone, a key head alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import interpreted
import numpy as np
import pytest
from compare import assert_same
from operands import Array, inputs

from tilefold import Rule, causal, documents, lengths, local
from tilefold.backends.triton.plan import plan
from tilefold.backends.triton.spec import Blocks
from tilefold.problems.attention import Problem

TILES = Blocks(16, 16, 4, 1)


def problem_of(mask: Rule, batch: int, heads_kv: int, len_q: int, len_k: int) -> Problem:
    """Two query heads to a key head."""
    shapes = (batch, 2 * heads_kv, len_q, 16), (batch, heads_kv, len_k, 16)
    return Problem.of(*shapes, dtype="float32", mask=mask)


def last(arrays: dict[str, Array], entry: int) -> dict[str, Array]:
    """The last key head of a batch entry, with its query heads."""
    return {
        name: array[entry : entry + 1, -1 if name in ("k", "v", "dk", "dv") else -2 :].copy()
        for name, array in arrays.items()
    }


@pytest.mark.slow
def test_decoding_alone_gives_the_same_bits() -> None:
    """Three splits, two of which another entry fills and this one does not."""
    ends = [700, 1300, 0]
    problem = problem_of(lengths(ends), 3, 2, 1, 1300)
    given = inputs(problem, "bhnd", "packed")
    options: dict[str, Any] = {"form": "decode", "scope": "anywhere"}
    got = interpreted.forward(problem, given, **options)
    for entry, end in enumerate(ends[:2]):
        one = problem_of(lengths([end]), 1, 1, 1, 1300)
        found = interpreted.forward(one, last(given, entry), **options)
        for name, array in last(got, entry).items():
            assert_same(name, array, found[name])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["split", "fused"])
def test_gradients_alone_are_the_same_bits(form: str) -> None:
    """In the fused form owners have several blocks, whose weights differ between the entries."""
    ids = np.repeat([[0, 1, 2], [0, 1, 2], [0, 1, 2]], 20, axis=1)
    ids[0, :48], ids[1, 16:] = 0, 1
    problem = problem_of(documents(ids), 3, 2, 60, 60)
    given = inputs(problem, "bhnd", "packed")
    options: dict[str, Any] = {"blocks": TILES, "scope": "anywhere"}
    given |= interpreted.forward(problem, given, form="tiled", **options)
    options |= {"form": form, **({"owners": 2} if form == "fused" else {})}
    got = interpreted.backward(problem, given, **options)
    for entry in (0, 1):
        one = problem_of(documents(ids[entry : entry + 1]), 1, 1, 60, 60)
        found = interpreted.backward(one, last(given, entry), **options)
        for name, array in last(got, entry).items():
            assert_same(name, array, found[name])


def test_only_where_bits_may_follow_from_the_machine_does_a_plan_follow_from_the_batch() -> None:
    """Splits and owners; a window in a long sequence is split by what it holds."""
    for scope in ("anywhere", "machine"):
        found = []
        for batch in (1, 64):
            problem = problem_of(causal(), batch, 2, 1, 8192)
            decode = plan(problem, "sm_90", "forward", scope=scope).launches[0]
            many = replace(problem, len_q=8192)
            fused = plan(many, "sm_90", "backward", form="fused", scope=scope).launches[1]
            found.append((decode.splits, fused.splits))
        assert (found[0] == found[1]) == (scope == "anywhere"), found
    assert found == [(32, 128), (2, 3)]
    window = problem_of(local(2000) & causal(), 1, 2, 1, 131072)
    assert plan(window, "sm_90", "forward", scope="anywhere").launches[0].splits == 4
    whole = replace(window, mask=causal())
    assert plan(whole, "sm_90", "forward", scope="anywhere").launches[0].splits == 64
