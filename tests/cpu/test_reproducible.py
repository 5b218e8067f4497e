"""Results of a key head do not depend on the cores, on its neighbours, or on how arrays lie.

First plans alone: all that decides bits is the same for random problems, in company and alone. Then
bits, of calls.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
from compare import assert_same
from kept import kept_plans
from operands import backward, forward, inputs
from paths import finding
from trial import problem

import tilefold
from tilefold import Rule, causal, dense, documents, full, lengths, local
from tilefold.backends.calls import calls
from tilefold.backends.cpu.device import Device, host
from tilefold.backends.cpu.launches import Launch
from tilefold.backends.cpu.plan import CpuPlan, plan
from tilefold.measuring.timing import using_threads
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


@pytest.mark.slow
@pytest.mark.feature("M02", "T08")
@pytest.mark.parametrize("operation", FORMS)
def test_what_decides_bits_follows_from_one_key_head(operation: str) -> None:
    kernels = set()
    for number, sample in enumerate(samples(1, 80)):
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


@pytest.mark.feature("M02", "T08")
def test_heads_whose_blocks_differ_are_launched_apart() -> None:
    device = Device("cpu", "any", "avx512", "", "", 4)
    sizes = problem(600, 600, 64, CASES["documents"][2](EVERY), batch=3, heads=(8, 2))
    for operation, kernel in (("forward", "forward"), ("backward", "backward")):
        made = plan(sizes, device, operation)
        launches = [one for one in made.launches if one.spec.kernel == kernel]
        assert len({one.spec for one in launches}) == len(launches) > 1
        for b, h in np.ndindex(3, 2):
            assert sum(_has(one, b, h) for one in launches) == 1
        assert all(0 < one.share < 1 for one in launches)


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
    "documents": (600, 600, lambda b: documents(IDS[b])),
}


Array = np.ndarray[Any, Any]
NAMES = ("o", "lse", "dq", "dk", "dv")


def results(q: Array, k: Array, v: Array, do: Array, mask: Rule) -> dict[str, Array]:
    """The results of both passes."""
    o, lse = tilefold.attention(q, k, v, mask=mask, return_lse=True)
    gradients = tilefold.attention_backward(do, q, k, v, o, lse, mask=mask)
    return dict(zip(NAMES, (o, lse, *gradients), strict=True))


@pytest.mark.slow
@pytest.mark.feature("M02", "T08")
@pytest.mark.parametrize(
    "case",
    [*list(CASES)[:2], pytest.param("documents", marks=pytest.mark.slow)],  # it has most kernels
)
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


@pytest.mark.slow
@pytest.mark.feature("M02", "T08")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_the_cores_or_threads(dtype: str) -> None:
    """Also not on who makes the parts of dQ, and whether dq can hold their sum."""
    decoding = 1, 12000, lambda b: lengths([12000, 100, 6000])
    gradients = 40, 1200, lambda b: causal()
    kinds = set()
    for (len_q, len_k, rule), operation in ((decoding, "forward"), (gradients, "backward")):
        sizes = problem(len_q, len_k, 64, rule(EVERY), dtype, batch=3, heads=(2, 1))
        given = inputs(sizes, "bhnd", "packed")
        given |= forward(sizes, given)
        found = []
        for cores, threads in ((1, 1), (1, 3), (2, 2), (3, 1), (64, 4)):
            device = replace(host(), cores=cores)
            with using_threads(threads):
                if operation == "forward":
                    found.append(forward(sizes, given, device=device))
                else:
                    found.append(backward(sizes, given, "auto", device=device))
                    found.append(backward(sizes, given, "auto", device=device, in_place=False))
            made = plan(sizes, device, operation)
            kinds |= {(one.spec.kernel, one.spec.in_turn) for one in made.launches}
        for again in found[1:]:
            for name, array in again.items():
                assert_same(name, array, found[0][name])
    expected = {("decode_part", False), ("delta", False), ("reduce_dq", False)}
    assert kinds == expected | {("backward", False), ("backward", True)}


@pytest.mark.slow
@pytest.mark.feature("T02", "T08")
def test_bits_do_not_depend_on_the_layout() -> None:
    for len_q, len_k, rule in ((1, 5000, full()), (130, 130, causal())):
        sizes = problem(len_q, len_k, 64, batch=2, heads=(4, 2))
        given = arrays(sizes)
        want = results(*given, mask=rule)
        for order in ((0, 2, 1, 3), (0, 1, 3, 2), (3, 2, 1, 0)):
            back = np.argsort(order)
            moved = [array.transpose(order).copy().transpose(back) for array in given]
            for name, array in results(*moved, mask=rule).items():
                assert_same(f"{name}, axes {order}", array, want[name])


def digest() -> None:
    """Print what identifies the results of a few calls."""
    found = [results(*arrays(problem(n, m, 64)), mask=causal()) for n, m in ((1, 5000), (1, 1100))]
    found.append(results(*arrays(problem(600, 600, 64)), mask=causal()))
    hashes = [hashlib.sha256(a.tobytes()).hexdigest() for one in found for a in one.values()]
    print(" ".join(hashes))


@pytest.mark.slow
@pytest.mark.feature("T08")
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sched_setaffinity")
def test_bits_in_a_process_that_may_use_one_core() -> None:
    bound = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    lines = [
        subprocess.run(
            [sys.executable, "-c", f"{first}from test_reproducible import *\ndigest()"],
            capture_output=True,
            text=True,
            check=True,
            env=finding(__file__),
        ).stdout
        for first in (bound, "")
    ]
    assert lines[0] == lines[1] != ""


# The scope ------------------------------------------------------------------------------------


@pytest.mark.feature("T08")
def test_a_new_scope_holds_for_calls_that_were_prepared_before() -> None:
    calls.clear()  # of other tests, of which some compute nothing
    sizes = problem(1, 5000, 64)
    given = arrays(sizes)
    before = tilefold.get_reproducible()
    splits = []
    try:
        for scope in ("anywhere", "machine", "anywhere"):
            tilefold.set_reproducible(scope)
            tilefold.attention(*given[:3])
            (launch,) = kept_plans()[-1].launches
            splits.append(launch.splits)
            assert plan(sizes, host(), "forward").launches[0].splits == launch.splits
    finally:
        tilefold.set_reproducible(before)
    assert splits[0] == splits[2] != splits[1]
    for wrong in ("here", "", None, 1):
        with pytest.raises(ValueError, match=r"scope must be 'anywhere' or 'machine', not "):
            tilefold.set_reproducible(wrong)  # type: ignore[arg-type]  # the point
