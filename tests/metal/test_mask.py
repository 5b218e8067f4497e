"""A mask as Metal source reads like its rule; `test_mask_source.py` has what all languages do."""

from __future__ import annotations

import numpy as np
import pytest
from mask_sources import Metal

from tilefold import documents, full, local, rule

source = Metal().source


@pytest.mark.feature("M15", "A05")
def test_mask_source_reads_like_the_rule() -> None:
    grids = {"grid_q": (6, 10), "grid_k": (7, 12)}
    assert source(local(3, stride=2, causal=True, **grids)) == (
        """\
static inline bool visible(const int b, const int h, const int q, const int k,
                           constant long* sizes) {
    const int p0 = int(sizes[7]);
    const int p1 = int(sizes[8]);
    const int p2 = int(sizes[9]);
    const int p3 = int(sizes[10]);
    const int p4 = int(sizes[11]);
    const int p5 = int(sizes[12]);
    const int p6 = int(sizes[13]);
    const int p7 = int(sizes[14]);
    const int number0 = abs(q / 10 + p0 - k / 12);
    const int number1 = abs(q % 10 + p3 - k % 12);
    const bool truth2 = number0 < p1 && number0 % 2 == p2 && number1 < p4;
    return truth2 && number1 % 2 == p5 && q + p6 + q / 10 * p7 >= k;
}
"""
    )
    ids = np.arange(2 * 60).reshape(2, 60), np.arange(2 * 84).reshape(2, 84)
    assert source(documents(*ids) | rule(lambda q, k: (q - k) % 3 == 0)) == (
        """\
static inline int floor_remainder(const int x, const int y) {
    return x % y + (x % y < 0 ? y : 0);
}

static inline bool visible(const int b, const int h, const int q, const int k,
                           constant long* sizes, device const int* t0, device const int* t1) {
    const int p0 = int(sizes[7]);
    const int number0 = t0[b * sizes[8] + q * sizes[9]];
    const int number1 = t1[b * sizes[10] + k * sizes[11]];
    return number0 == number1 || floor_remainder(q - k, 3) == p0;
}
"""
    )


def test_a_mask_that_is_the_same_everywhere_is_a_constant() -> None:
    for given, call in ((full(), "true"), (rule(lambda q, k: False), "false")):
        assert Metal().call(given) == call
