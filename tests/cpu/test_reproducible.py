"""Results of a key head do not depend on the cores, on its neighbours, or on how arrays lie.

First plans alone: all that decides bits is the same for random problems, in company and alone. Then
bits, of calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
from compare import assert_same
from trial import problem

import tilefold
from tilefold import Rule, causal, dense, documents, full, lengths, local
from tilefold.backends.cpu.device import Device
from tilefold.backends.cpu.launches import Launch
from tilefold.backends.cpu.plan import CpuPlan, plan
from tilefold.problems.attention import Problem

Of = Callable[[slice, slice], Rule]
"""The rule of some batch entries and some query heads."""

EVERY = slice(None)


@dataclass(frozen=True)
class Sample:
    """A problem whose mask can be asked of a part of its batch entries and heads."""

    problem: Problem
    mask: Of

    def part(self, b: int, h: int) -> Problem:
        """One batch entry and key head alone."""
        whole = self.problem
        group = whole.heads_q // whole.heads_kv
        mask = self.mask(slice(b, b + 1), slice(h * group, (h + 1) * group))
        return replace(whole, batch=1, heads_q=group, heads_kv=1, mask=mask)


def masks(random: np.random.Generator, batch: int, heads: int, len_q: int, len_k: int) -> list[Of]:
    """Rules that differ by batch entry and by head, and rules that do not."""
    window = int(random.integers(1, 300))
    visible = random.integers(0, len_k + 1, batch)
    scale = random.integers(1, 400, (batch, 1))
    ids_q, ids_k = (np.arange(n)[None] // scale for n in (len_q, len_k))
    shown: list[Of] = [
        lambda b, h: full(),
        lambda b, h: causal(),
        lambda b, h: causal() & local(window),
        lambda b, h: lengths(visible[b].tolist()),
        lambda b, h: causal() & lengths(visible[b].tolist()),
        lambda b, h: documents(ids_q[b], ids_k[b]),
    ]
    if len_q * len_k * batch * heads < 1 << 20:
        widths = random.integers(1, len_k + 1, (batch, heads, 1, 1))
        seen = abs(np.arange(len_q)[:, None] - np.arange(len_k)) < widths
        shown.append(lambda b, h: dense(seen[b, h]))
    return shown


def samples(seed: int, count: int) -> Iterator[Sample]:
    """Random problems."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        batch, heads_kv, group = (int(random.integers(1, most)) for most in (5, 4, 4))
        len_q = int(random.choice([1, 2, 7, 16, 33, 64, 200, 1000, 3000]))
        len_k = int(random.choice([1, 50, 300, 1000, 3000, 9000]))
        found = masks(random, batch, heads_kv * group, len_q, len_k)
        mask = found[int(random.integers(len(found)))]
        dtype = str(random.choice(["float32", "float64", "bfloat16", "float16"]))
        dims = [int(random.choice([8, 40, 64, 128])) for _ in "qv"]
        sizes = (batch, heads_kv * group, heads_kv, len_q, len_k, *dims, dtype, 0.1)
        yield Sample(Problem(*sizes, mask(EVERY, EVERY)), mask)


# Plans ----------------------------------------------------------------------------------------


def signature(made: CpuPlan, b: int, h: int) -> list[Any]:
    """All that decides the bits of one key head: its kernels, their tiles, splits and parts.

    Not who adds the parts of dQ: they are added in their order.
    """
    launches = [launch for launch in made.launches if launch.spec.kernel != "reduce_dq"]
    return [_of_launch(one, b, h) for one in launches if not one.some or _has(one, b, h)]


def _has(launch: Launch, b: int, h: int) -> bool:
    """True if the kernel is launched for a key head."""
    group = launch.heads // launch.problem.heads_kv
    first = (b * launch.heads + h * group) * launch.item_rows
    return bool(np.isin(first, launch.order))


def _of_launch(launch: Launch, b: int, h: int) -> Any:
    spec = {field.name: getattr(launch.spec, field.name) for field in fields(launch.spec)}
    del spec["index_bits"], spec["mask"]  # a mask is what it says, in any integers
    if launch.spec.kernel == "decode_part":
        spec["kernel"] = "decode"  # with the others of the batch there may be empty splits
    del spec["in_turn"]
    return spec, _parts(launch), [part for part in _runs(launch, b, h) if part]


def _parts(launch: Launch) -> Any:
    """The block rows of each part of dQ."""
    return launch.owners[:, :2].tolist() if launch.spec.kernel == "backward" else None


def _runs(launch: Launch, b: int, h: int) -> Iterator[list[Any]]:
    """The runs of the block rows of a key head, of all its query heads."""
    runs, heads_q = launch.runs, launch.problem.heads_q
    group = heads_q // launch.problem.heads_kv
    planes = range(h * group, (h + 1) * group) if runs.planes_h == heads_q else [0]
    if runs.planes_h not in (1, heads_q):
        planes = [h // (launch.problem.heads_kv // runs.planes_h)]
    for plane in planes:
        first = ((b if runs.planes_b > 1 else 0) * runs.planes_h + plane) * runs.block_rows
        for row in range(first, first + runs.block_rows):
            yield runs.runs[runs.rows[row] : runs.rows[row + 1]].tolist()


FORMS = {"forward": ("auto", "interleaved"), "backward": ("auto",)}
ISAS = ("amx", "avx512", "avx2", "neon")
KERNELS = {
    "forward": {"forward", "decode", "decode_part"},
    "backward": {"delta", "backward", "reduce_dq", "backward_dq", "backward_dkv"},
}


@pytest.mark.feature("M02", "T08")
@pytest.mark.parametrize("operation", FORMS)
def test_what_decides_bits_follows_from_one_key_head(operation: str) -> None:
    kernels = set()
    for number, sample in enumerate(samples(1, 150)):
        isa = ISAS[number % len(ISAS)]
        alone = Device("cpu", "any", isa, "+avx512bf16" * (isa == "avx512"), "", 1)
        whole = sample.problem
        b, h = number % whole.batch, number % whole.heads_kv
        want = signature(plan(sample.part(b, h), alone, operation, scope="anywhere"), b=0, h=0)
        for cores in (1, 2, 64):
            device = replace(alone, cores=cores)
            for form in FORMS[operation]:
                made = plan(whole, device, operation, form, scope="anywhere")
                assert signature(made, b, h) == want, (sample, isa, cores, form)
                kernels |= {launch.spec.kernel for launch in made.launches}
    assert kernels == KERNELS[operation]


# Bits -----------------------------------------------------------------------------------------


def arrays(sizes: Problem, seed: int = 0) -> tuple[np.ndarray[Any, Any], ...]:
    """q, k, v and do."""
    random = np.random.default_rng(seed)
    q = (sizes.batch, sizes.heads_q, sizes.len_q)
    k = (sizes.batch, sizes.heads_kv, sizes.len_k)
    shapes = ((*q, sizes.dim), (*k, sizes.dim), (*k, sizes.dim_v), (*q, sizes.dim_v))
    return tuple(random.standard_normal(shape).astype(sizes.dtype) for shape in shapes)


IDS = np.arange(600) // [[40], [600], [150]]
CASES: dict[str, tuple[int, int, Callable[[slice], Rule]]] = {
    "one query, padded": (1, 5000, lambda b: lengths([5000, 1666, 4999][b])),
    "few queries": (7, 500, lambda b: causal() & lengths([500, 20, 499][b])),
    "documents": (600, 600, lambda b: causal() & documents(IDS[b])),
}


Array = np.ndarray[Any, Any]
NAMES = ("o", "lse", "dq", "dk", "dv")


def results(q: Array, k: Array, v: Array, do: Array, mask: Rule) -> dict[str, Array]:
    """The results of both passes."""
    o, lse = tilefold.attention(q, k, v, mask=mask, return_lse=True)
    gradients = tilefold.attention_backward(do, q, k, v, o, lse, mask=mask)
    return dict(zip(NAMES, (o, lse, *gradients), strict=True))


@pytest.mark.feature("M02", "T08")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_of_an_entry_and_a_head_alone_and_in_company(case: str, dtype: str) -> None:
    len_q, len_k, rule = CASES[case]
    sizes = problem(len_q, len_k, 64, dtype=dtype, batch=3, heads=(8, 2))
    q, k, v, do = arrays(sizes)
    together = results(q, k, v, do, rule(EVERY))
    for b, h in ((0, 0), (1, 1), (2, 0)):
        entry = slice(b, b + 1)
        of_k, of_q = (entry, slice(h, h + 1)), (entry, slice(4 * h, 4 * h + 4))
        alone = results(q[of_q], k[of_k], v[of_k], do[of_q], rule(entry))
        for name, array in alone.items():
            place = of_k if name in ("dk", "dv") else of_q
            assert_same(f"{name} of entry {b}, key head {h}", array, together[name][place])
