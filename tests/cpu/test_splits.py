"""Few queries, planned: when they are decoded, and how their keys are split."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from trial import problem

from tilefold import Rule, causal, lengths, local
from tilefold.backends.cpu.device import Device
from tilefold.backends.cpu.heuristics import DEFAULT
from tilefold.backends.cpu.kernel import workspace_bytes
from tilefold.backends.cpu.launches import Launch
from tilefold.backends.cpu.plan import plan
from tilefold.problems.attention import Problem

DEVICE = Device("cpu", "any", "avx512", "", "", cores=4)


def kernels(sizes: Problem, device: Device, form: str = "auto") -> list[str]:
    return [launch.spec.kernel for launch in plan(sizes, device, "forward", form).launches]


@pytest.mark.feature("M07", "T08")
def test_few_queries_are_decoded_and_many_are_not() -> None:
    device = Device("cpu", "any", "avx512", "", "", cores=4)
    for len_q, heads, expected in (
        (1, (8, 8), "decode"),
        (4, (8, 8), "decode"),
        (1, (32, 8), "decode"),
        (100, (8, 8), "forward"),
        (1000, (8, 8), "forward"),
    ):
        sizes = problem(len_q, 5000, 64, heads=heads)
        first = kernels(sizes, device)[0]
        assert first.removesuffix("_part") == expected, (len_q, heads)
        assert kernels(sizes, device, "tiled") == ["forward"]
    with pytest.raises(ValueError, match=r"form 'decode' takes at most 128 queries .* got 1000"):
        plan(problem(1000, 50, 64, heads=(1, 1)), device, "forward", "decode")


@pytest.mark.feature("T08")
def test_keys_are_split_where_heads_do_not_feed_the_cores() -> None:
    def items(heads: int, len_k: int, cores: int, mask: Rule | None = None) -> list[int]:
        device = Device("cpu", "any", "avx512", "", "", cores)
        sizes = problem(1, len_k, 64, mask, heads=(heads, heads))
        made = plan(sizes, device, "forward", scope="machine")
        return [launch.items for launch in made.launches]

    assert items(8, 32768, cores=2) == [8]
    assert items(1, 131072, cores=2) == [8]
    assert items(1, 131072, cores=4) == [16]
    assert items(3, 131072, cores=4) == [18]
    assert items(1, 131072, cores=1) == [1]
    assert items(1, 500, cores=4) == [1], "too few keys to share"
    assert items(1, 131072, cores=4, mask=causal() & local(400)) == [1], "as few are visited"


@pytest.mark.feature("M02", "T08")
def test_splits_anywhere_follow_from_the_keys_of_one_head() -> None:
    def splits(len_k: int, heads: int = 1, mask: Rule | None = None, **sizes: Any) -> int:
        asked = problem(1, len_k, 64, mask, heads=(heads, heads), **sizes)
        (launch,) = plan(asked, DEVICE, "forward", scope="anywhere").launches
        return launch.splits

    counts = [splits(len_k) for len_k in (500, 2900, 3000, 20000, 131072)]
    assert counts == [1, 1, 2, 13, 86]
    assert counts == [splits(n, heads=8, batch=3) for n in (500, 2900, 3000, 20000, 131072)]
    assert splits(20000, dtype="bfloat16") == 6, "half of the bytes"
    assert splits(131072, mask=causal() & local(400)) == 1, "few are visited"


@pytest.mark.feature("M02", "T08")
def test_heads_are_read_together_as_far_as_that_feeds_the_cores() -> None:
    def launch(cores: int, len_k: int, scope: str) -> Launch:
        sizes = problem(1, len_k, 64, heads=(8, 8))
        device = replace(DEVICE, cores=cores)
        return plan(sizes, device, "forward", "interleaved", scope=scope).launches[0]

    found = [launch(cores, 2000, "anywhere") for cores in (1, 2, 4, 64)]
    assert [one.heads_per_item for one in found] == [8, 4, 2, 1]
    assert [one.items for one in found] == [1, 2, 4, 8]
    assert launch(4, 20000, "anywhere").heads_per_item == 8, "13 splits feed 4 cores"
    assert launch(64, 2000, "machine").heads_per_item == 8


@pytest.mark.feature("M02", "T07")
def test_every_entry_is_split_by_its_own_keys() -> None:
    def splits(*keys: int) -> list[list[list[int]]]:
        """The runs of all splits of each entry."""
        sizes = problem(1, 20000, 64, lengths(keys), batch=len(keys), heads=(1, 1))
        (launch,) = plan(sizes, DEVICE, "forward", scope="anywhere").launches
        rows, runs = launch.runs.rows, launch.runs.runs.tolist()
        parts = [runs[a:b] for a, b in itertools.pairwise(rows)]
        starts = range(0, len(parts), launch.splits)
        return [[part for part in parts[n : n + launch.splits] if part] for n in starts]

    lengths_of_entries = (20000, 700, 9000, 0)
    together = splits(*lengths_of_entries)
    assert [len(entry) for entry in together] == [13, 1, 6, 0]
    assert together == [splits(keys)[0] for keys in lengths_of_entries]


@pytest.mark.feature("T07", "T08")
def test_splits_share_what_is_visited() -> None:
    """The first sequence is long, the second short: keys are classified 32 at a time."""
    device = Device("cpu", "any", "avx512", "", "", cores=4)
    mask = lengths([100000, 5000])
    sizes = problem(1, 131072, 64, mask, batch=2, heads=(1, 1))
    launch = plan(sizes, device, "forward", scope="machine").launches[0]
    rows, runs = launch.runs.rows, launch.runs.runs
    visited = [int((runs[a:b, 1] - runs[a:b, 0]).sum()) for a, b in itertools.pairwise(rows)]
    first, second = visited[: launch.splits], visited[launch.splits :]
    assert sum(first) == 100000 and sum(second) == second[0] == 5024
    assert max(visited) <= 1.1 * 105024 / 16
    order = [visited[row] for row in launch.order]
    assert order == sorted(visited, reverse=True)


@pytest.mark.feature("M01")
@pytest.mark.parametrize("scope", ["anywhere", "machine"])
def test_scratch_does_not_grow_with_the_keys(scope: str) -> None:
    short, long = (
        plan(problem(1, n, 64), DEVICE, "forward", scope=scope) for n in (500_000, 5_000_000)
    )
    for one, other in zip(short.launches, long.launches, strict=True):
        assert one.spec == other.spec
        assert workspace_bytes(one.spec) < 2**20
    if scope == "machine":
        assert short.buffers == long.buffers
    assert long.launches[0].splits <= DEFAULT.most_fixed_splits
