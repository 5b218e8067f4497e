"""Few queries, planned: when they are decoded, and how their keys are split."""

from __future__ import annotations

import itertools

import pytest
from trial import problem

from tilefold import Rule, causal, lengths, local
from tilefold.backends.cpu.device import Device
from tilefold.backends.cpu.kernel import workspace_bytes
from tilefold.backends.cpu.plan import plan
from tilefold.problems.attention import Problem


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
        return [launch.items for launch in plan(sizes, device, "forward").launches]

    assert items(8, 32768, cores=2) == [8]
    assert items(1, 131072, cores=2) == [8, 1]
    assert items(1, 131072, cores=4) == [16, 1]
    assert items(3, 131072, cores=4) == [18, 3]
    assert items(1, 131072, cores=1) == [1]
    assert items(1, 500, cores=4) == [1], "too few keys to share"
    assert items(1, 131072, cores=4, mask=causal() & local(400)) == [1], "as few are visited"


@pytest.mark.feature("T07", "T08")
def test_splits_share_what_is_visited() -> None:
    """The first sequence is long, the second short: keys are classified 32 at a time."""
    device = Device("cpu", "any", "avx512", "", "", cores=4)
    mask = lengths([100000, 5000])
    sizes = problem(1, 131072, 64, mask, batch=2, heads=(1, 1))
    launch = plan(sizes, device, "forward").launches[0]
    rows, runs = launch.runs.rows, launch.runs.runs
    visited = [int((runs[a:b, 1] - runs[a:b, 0]).sum()) for a, b in itertools.pairwise(rows)]
    first, second = visited[: launch.splits], visited[launch.splits :]
    assert sum(first) == 100000 and sum(second) == second[0] == 5024
    assert max(visited) <= 1.1 * 105024 / 16
    order = [visited[row] for row in launch.order]
    assert order == sorted(visited, reverse=True)


@pytest.mark.feature("M01")
def test_scratch_does_not_grow_with_the_keys() -> None:
    device = Device("cpu", "any", "avx512", "", "", cores=4)
    short, long = (plan(problem(1, n, 64), device, "forward") for n in (300_000, 3_000_000))
    for one, other in zip(short.launches, long.launches, strict=True):
        assert one.spec == other.spec
        assert workspace_bytes(one.spec) < 2**20
    assert short.buffers == long.buffers
