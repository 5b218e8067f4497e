"""Promises that no single room keeps alone: heads are independent, outputs have one owner."""

from __future__ import annotations

import numpy as np
import pytest

import tilefold
from tilefold.backends.cpu.device import host
from tilefold.backends.cpu.plan import plan
from tilefold.masks import parse
from tilefold.problems import reference
from tilefold.problems.attention import Problem


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.feature("M02")
def test_batch_and_heads_are_a_loop_over_single_heads() -> None:
    q, k, v = normal(2, 4, 70, 24), normal(2, 2, 90, 24, seed=1), normal(2, 2, 90, 24, seed=2)
    mask = tilefold.causal() & tilefold.local(40)
    o, lse = tilefold.attention(q, k, v, mask=mask, return_lse=True)
    for b in range(2):
        for h in range(4):
            one = (slice(b, b + 1), slice(h, h + 1))
            one_kv = (slice(b, b + 1), slice(h // 2, h // 2 + 1))
            single, single_lse = tilefold.attention(
                q[one], k[one_kv], v[one_kv], mask=mask, return_lse=True
            )
            assert np.array_equal(single, o[one])
            assert np.array_equal(single_lse, lse[one])


@pytest.mark.slow
@pytest.mark.feature("T11", "T02")
def test_channel_first_local_window_between_sequences_of_different_sizes() -> None:
    q, k, v = normal(1, 8, 32, 1024), normal(1, 8, 32, 2048, seed=1), normal(1, 8, 16, 2048, seed=2)
    mask = tilefold.local(64, sync="scale_front")
    o = tilefold.attention(q, k, v, mask=mask, layout="bhdn")
    assert o.shape == (1, 8, 16, 1024)
    turned = (x.swapaxes(2, 3) for x in (q, k, v))
    expected, _ = reference.attention(*turned, mask=mask)
    np.testing.assert_allclose(o.swapaxes(2, 3), expected, rtol=0, atol=2e-5)


def problem(mask: str, **changes: int) -> Problem:
    sizes = {"batch": 2, "heads_q": 4, "heads_kv": 2, "len_q": 300, "len_k": 500} | changes
    return Problem(**sizes, dim=32, dim_v=32, dtype="float32", scale=0.2, mask=parse.parse(mask))


@pytest.mark.feature("M05", "T08")
@pytest.mark.parametrize("mask", ["full()", "causal() & local(50)", "lengths((500, 0))"])
@pytest.mark.parametrize(
    ("operation", "kernel", "length", "heads"),
    [
        ("forward", "forward", 300, 4),
        ("backward", "backward_dq", 300, 4),
        ("backward", "backward_dkv", 500, 2),
    ],
)
def test_every_output_block_is_one_work_item(
    operation: str, kernel: str, length: int, heads: int, mask: str
) -> None:
    made = plan(problem(mask), host(), operation, "split" if operation == "backward" else "auto")
    (launch,) = (launch for launch in made.launches if launch.spec.kernel == kernel)
    blocks = -(-length // launch.spec.block_parallel)
    assert (launch.block_rows, launch.heads) == (blocks, heads)
    assert launch.items == 2 * heads * blocks
    # Where all heads are alike the order is that of one head, and is walked once for each.
    repeats = launch.items // len(launch.order)
    assert repeats in (1, 2 * heads)
    assert sorted(launch.order.tolist()) == list(range(launch.items // repeats))


@pytest.mark.feature("M05")
def test_the_fused_backward_has_one_owner_per_key_head() -> None:
    made = plan(problem("causal()"), host(), "backward", "fused")
    assert [launch.spec.kernel for launch in made.launches] == ["delta", "backward"]
    assert made.launches[-1].items == 2 * 2


@pytest.mark.feature("M15")
def test_heavy_block_rows_come_first() -> None:
    made = plan(problem("causal(align='start')", len_q=500), host(), "forward")
    (launch,) = made.launches
    tiles = -(-launch.runs.met.ravel() // launch.spec.block_traverse)[launch.order]
    assert tiles.tolist() == sorted(tiles, reverse=True) and tiles[0] > tiles[-1]
