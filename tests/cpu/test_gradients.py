"""The kernels' gradients against finite differences of the kernels' own forward, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from tilefold import (
    Rule,
    attention,
    attention_backward,
    causal,
    chunked,
    dense,
    documents,
    full,
    lengths,
    local,
    prefix,
    rule,
)


@dataclass(frozen=True)
class Case:
    """Sizes and a rule; batch is 2."""

    len_q: int
    len_k: int
    dim: int
    dim_v: int
    heads_q: int
    heads_kv: int
    mask: Rule
    scale: float | None = None

    def __str__(self) -> str:
        sizes = f"{self.len_q}x{self.len_k} d{self.dim},{self.dim_v}"
        return f"{sizes} h{self.heads_q}/{self.heads_kv} {self.mask!r}"


CASES = [
    Case(1, 1, 1, 1, 1, 1, full()),
    Case(3, 3, 2, 5, 4, 2, causal()),
    Case(5, 40, 16, 3, 2, 1, causal() & local(7)),
    Case(40, 5, 3, 16, 2, 2, causal(), scale=1.3),
    Case(33, 17, 7, 7, 3, 1, local(4, stride=3, align="start")),
    Case(17, 33, 8, 8, 2, 1, causal() | prefix(5) | chunked(6)),
    Case(20, 20, 5, 5, 2, 2, ~documents(np.arange(20) // 7) & causal()),
    Case(9, 70, 4, 4, 2, 1, lengths([70, 13])),
    Case(16, 16, 6, 6, 2, 2, causal(grid_q=(4, 4)) & local(2, grid_q=(4, 4))),
    Case(12, 20, 3, 3, 2, 1, causal(sync="scale_end")),
    Case(13, 11, 5, 2, 2, 2, dense(np.indices((13, 11)).sum(axis=0) % 3 == 0), scale=0.0),
    Case(10, 10, 2, 2, 4, 2, rule(lambda h, q, k: (q + k) % (3) == h % 3)),
]


@pytest.mark.slow
@pytest.mark.feature("T09")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_finite_differences(case: Case) -> None:
    """Along 6 random directions per input: the slope of sum(do * o) is the gradient's share."""
    random = np.random.default_rng(len(str(case)))
    shapes = {
        "q": (2, case.heads_q, case.len_q, case.dim),
        "k": (2, case.heads_kv, case.len_k, case.dim),
        "v": (2, case.heads_kv, case.len_k, case.dim_v),
    }
    inputs = {name: random.normal(size=shape) for name, shape in shapes.items()}
    do = random.normal(size=(2, case.heads_q, case.len_q, case.dim_v))
    options = {"mask": case.mask, "scale": case.scale}
    o, lse = attention(**inputs, **options, return_lse=True)
    gradients = attention_backward(do, **inputs, o=o, lse=lse, **options)
    step = 1e-5
    for name, gradient in zip(inputs, gradients, strict=True):
        for _ in range(6):
            direction = random.normal(size=shapes[name])
            ends = [
                (attention(**{**inputs, name: inputs[name] + shift * direction}, **options) * do)
                for shift in (step, -step)
            ]
            slope = (ends[0] - ends[1]).sum() / (2 * step)
            size = np.abs(gradient * direction).sum()
            assert abs((gradient * direction).sum() - slope) <= 1e-8 * max(size, 1), name


@pytest.mark.feature("T09")
@pytest.mark.slow
def test_rows_and_keys_without_partners_have_no_gradient() -> None:
    random = np.random.default_rng(0)
    q, k, v, do = random.normal(size=(4, 1, 2, 50, 24))
    seen = np.ones((50, 50), bool)
    seen[[3, 40]] = seen[:, [7, 44]] = False
    q[:, :, [3, 40]] = do[:, :, [3, 40]] = k[:, :, [7, 44]] = v[:, :, [7, 44]] = np.nan
    o, lse = attention(q, k, v, mask=dense(seen), return_lse=True)
    dq, dk, dv = attention_backward(do, q, k, v, o, lse, mask=dense(seen))
    assert not o[:, :, [3, 40]].any() and (lse[:, :, [3, 40]] == -np.inf).all()
    assert not dq[:, :, [3, 40]].any()
    assert not dk[:, :, [7, 44]].any() and not dv[:, :, [7, 44]].any()
    assert all(np.isfinite(array).all() for array in (o, dq, dk, dv))
