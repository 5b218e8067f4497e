"""Kernels touch their arrays and nothing else: every array ends at a page that no one may touch.

A step outside ends the process with SIGSEGV, so everything runs in child processes, which say what
they are about to do before they do it.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest
import score_cases
from cases import CASES, RULES, Sizes
from compare import HALVES
from guarded import SIDES, guarded
from paths import finding
from trial import LAYOUTS, PASSES, Trial, dropped, numbers, problem, run

from tilefold import set_num_threads
from tilefold.backends.cpu.spec import KERNELS
from tilefold.problems.attention import ITEM_BYTES

PARTS = 8

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no mprotect")


def child(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter that has imported this file."""
    return subprocess.run(
        [sys.executable, "-c", f"from test_memory_safety import *\n{code}"],
        capture_output=True,
        text=True,
        timeout=300,
        env=finding(__file__),
    )


def check(done: subprocess.CompletedProcess[str]) -> int:
    """How many calls a child made. Raises with its last words unless all went well."""
    said = done.stdout.splitlines()
    if done.returncode == -signal.SIGSEGV:
        raise AssertionError(f"an access outside of the arrays: {said[-1]}")
    assert done.returncode == 0, f"{said[-1:]} {done.stderr}"
    assert said[-1] == "done"
    return len(said) - 1


Passes = Sequence[tuple[str, str]]


def attempt(trial: Trial, passes: Passes = PASSES, sides: Sequence[str] = SIDES) -> None:
    """Operations in their forms, arrays flush with the page before them, then after."""
    given = numbers(trial)
    for (operation, form), side in itertools.product(passes, sides):
        print(trial, operation, form, f"page {side}", flush=True)
        with guarded(side) as memory:
            run(trial, given, operation, form, memory)


# The shared cases -----------------------------------------------------------------------------


def attempt_cases(part: int) -> None:
    """One part of the shared cases, every sixth one in float64 too, and another in a half type.

    The layouts take turns, and so do NaN where no one may look, the forms "split" and "parts", and
    for the other types the side of the page.
    """
    forward, split, fused, parts = PASSES
    for number, (case, layout) in enumerate(zip(CASES, itertools.cycle(LAYOUTS))):
        if number % PARTS == part:
            others = {0: ["float64"], 3: [HALVES[number // 6 % 2]]}.get(number % 6, [])
            for dtype in ("float32", *others):
                poisoned = number // 2 % 2 == 0
                passes = forward, (split, parts)[number % 2], fused
                sides = SIDES if dtype == "float32" else SIDES[number // 12 % 2 :][:1]
                attempt(Trial(case.problem(dtype), layout, poisoned=poisoned), passes, sides)


@pytest.mark.slow
@pytest.mark.feature("M01", "M04", "T15")
@pytest.mark.parametrize("part", range(PARTS))
def test_all_cases(part: int) -> None:
    calls = check(child(f"attempt_cases({part})\nprint('done')"))
    assert calls >= 2 * 3 * (len(CASES) // PARTS)


def modified() -> list[Trial]:
    """Some trials with modified scores and sinks."""
    return score_cases.trials(every=3)


@pytest.mark.slow
def test_modified_scores_and_sinks() -> None:
    calls = check(child("for t in modified(): attempt(t)\nprint('done')"))
    assert calls == 2 * len(PASSES) * len(modified())


# Every length around the sizes of vectors and tiles -------------------------------------------


def lengths(dtype: str) -> range:
    """All from one to more than a tile; else than float32 every third, which meets every layout."""
    return range(1, 140, 1 if dtype == "float32" else 3)


def every_length(dtype: str) -> Iterator[Trial]:
    """Queries and keys of all lengths, in turn; two threads."""
    set_num_threads(2)
    for n in lengths(dtype):
        layout = list(LAYOUTS)[n % len(LAYOUTS)]
        sizes = Sizes(1, 2, n, 140 - n)
        rule = RULES["window-and-prefix" if n % 2 else "full"](sizes)
        yield Trial(problem(n, 140 - n, 19, rule, dtype), layout)


@pytest.mark.slow
@pytest.mark.feature("M16")
@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_every_length(dtype: str) -> None:
    calls = check(child(f"for t in every_length({dtype!r}): attempt(t)\nprint('done')"))
    assert calls == 2 * len(PASSES) * len(lengths(dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dropout(dtype: str) -> None:
    calls = check(child(f"for t in dropped({dtype!r}): attempt(t)\nprint('done')"))
    assert calls == 2 * len(PASSES) * len(dropped(dtype))


# That the pages do their work -----------------------------------------------------------------


def things(operation: str, form: str) -> list[str]:
    """What a call reads and writes, by the names that this harness gives it."""
    kernels = {
        "auto": ["forward"],
        "split": ["backward_dq", "backward_dkv", "delta"],
        "fused": ["backward", "delta"],
        "parts": ["backward", "delta", "reduce_dq"],
    }[form]
    operands = {name for kernel in kernels for name in KERNELS[kernel].operands}
    lists = ["order", "rows", "runs", "table 0", "argument block", "workspace"]
    if form == "fused":  # the part of the one owner is dq
        operands = operands - {"dq_parts"} | {"dq"}
    if "backward" in kernels:
        lists.append("owners")
    return [*sorted(operands), *lists]


PAGES = [*((side, "float32") for side in SIDES), ("after", "bfloat16")]
"""Where the forbidden page is, and the type of the arrays."""


def fates(operation: str, form: str) -> None:
    """For each thing: lay it one element onto the forbidden page; print how a call ends.

    Which layout needs the whole workspace depends on the machine: tiles of keys are kept there as
    they lie or turned, in one place that is large enough for both. Tiles of AMX have 32 columns:
    with a dim of 16 or less the last words of that place are never written.
    """
    set_num_threads(1)
    ids = RULES["documents-of-batch"](Sizes(1, 2, 600, 600))
    names = [None, *things(operation, form)]
    workspace = [None, "workspace"]
    laid = ("bhnd", 16, names), ("bhdn", 16, workspace), ("bhnd", 24, workspace)
    for (side, dtype), (layout, dim, short) in itertools.product(PAGES, laid):
        trial = Trial(problem(600, 600, dim, ids, dtype), layout)
        given = numbers(trial)
        for name in short:
            pid = os.fork()
            if pid == 0:
                with guarded(side, short=name) as memory:
                    run(trial, given, operation, form, memory)
                os._exit(0)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            print(side, dtype, name, code, sep=",", flush=True)


@pytest.mark.slow
@pytest.mark.parametrize(("operation", "form"), PASSES)
def test_one_element_too_far_is_noticed(operation: str, form: str) -> None:
    done = child(f"fates({operation!r}, {form!r})")
    assert done.returncode == 0, done.stderr
    words = [line.split(",") for line in done.stdout.splitlines()]
    for page in PAGES:
        found = [(name, int(code)) for side, dtype, name, code in words if (side, dtype) == page]
        assert [code for name, code in found if name == "None"] == [0] * 3, (page, done.stderr)
        noticed = {name for name, code in found if code == -signal.SIGSEGV}
        assert noticed == set(things(operation, form)), page


def read(side: str, index: int) -> None:
    """One byte of an array of 32, `index` counted from its start."""
    with guarded(side) as memory:
        start = memory.allocate("x", 8, "float32").ctypes.data
        print(ctypes.c_ubyte.from_address(start + index).value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "index", "end"),
    [
        *[("after", 31, 0), ("after", 32, -signal.SIGSEGV)],
        *[("before", 0, 0), ("before", -1, -signal.SIGSEGV)],
    ],
)
def test_a_read_outside_ends_the_child(side: str, index: int, end: int) -> None:
    assert child(f"read({side!r}, {index})").returncode == end
