"""Each instruction-set level: right results on machines that have it, and the right instructions.

The assembly is looked at for every level on every machine: LLVM writes it for all of them.
"""

from __future__ import annotations

import re
import subprocess
import sys

import amx
import pytest
from cases import RULES, Sizes
from elementary import check_functions
from levels import X86, device
from paths import finding
from score_cases import trials as scored
from trial import PASSES, Trial, numbers, planned, problem, run

from tilefold import causal, full
from tilefold.backends.cpu import runtime
from tilefold.backends.cpu.device import Device, host
from tilefold.backends.cpu.kernel import emit
from tilefold.backends.cpu.spec import KernelSpec
from tilefold.backends.cpu.tables import FAMILIES
from tilefold.masks.position_rules import Rule
from tilefold.problems.attention import ITEM_BYTES, Problem

# Results --------------------------------------------------------------------------------------

TRIALS = [
    ("full", (113, 203), (40, 40), "bhnd"),
    ("full", (3, 300), (3, 2), "padded bhdn"),
    ("window-and-prefix", (300, 290), (64, 64), "bnhd"),
    ("documents-of-batch", (37, 71), (16, 5), "backwards"),
    ("dense-all", (70, 9), (2, 77), "no unit stride"),
    ("heads-differ", (41, 260), (128, 16), "shared heads"),
    ("local-2d-scale_front", (108, 256), (1, 1), "bhdn"),
]


def trials(dtype: str) -> list[Trial]:
    """Every second trial: each type meets half of them, and each trial half of the types."""
    found = []
    first = [*ITEM_BYTES].index(dtype) % 2
    for number, (rule, (len_q, len_k), (dim, dim_v), layout) in enumerate(TRIALS[first::2]):
        mask = RULES[rule](Sizes(2, 2, len_q, len_k))
        sizes = problem(len_q, len_k, dim, mask, dtype, dim_v=dim_v, batch=2)
        found.append(Trial(sizes, layout, poisoned=number % 2 == 0))
    return found


def every_trial() -> list[Trial]:
    """Trials of all types, and some with modified scores and sinks."""
    return [*(trial for dtype in ITEM_BYTES for trial in trials(dtype)), *scored(every=5)]


def passes(number: int) -> list[tuple[str, str]]:
    """The passes of a trial: forward, and backward in one of its forms; each type meets all."""
    forward, *backward = PASSES
    return [forward, backward[number % len(backward)]]


def check_results(isa: str) -> None:
    """Every trial; for a process whose machine is of level `isa`."""
    assert host().isa == isa
    for number, trial in enumerate(every_trial()):
        given = numbers(trial)
        for operation, form in passes(number):
            print(trial, operation, form, flush=True)
            run(trial, given, operation, form)
    check_functions()


@pytest.mark.slow
@pytest.mark.feature("M01", "M04", "T01")
@pytest.mark.parametrize("isa", X86)
def test_results_at_every_level(isa: str) -> None:
    code = f"from test_isa import *\ncheck_results({isa!r})"
    environment = {"TILEFOLD_CPU_ISA": isa}
    if isa == "amx" and host().isa != "amx":
        if reason := amx.missing():
            pytest.skip(reason)
        code = code.replace("check_results", "with amx.everywhere(): check_results")
        environment = {}
    else:
        try:
            host().lowered(isa)
        except ValueError as error:
            pytest.skip(f"this machine has no {isa}: {error}")
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=600,
        env=finding(__file__, **environment),
    )
    assert done.returncode == 0, (done.stdout.splitlines()[-1:], done.stderr)
    count = len(every_trial())
    assert count == len(ITEM_BYTES) * len(TRIALS) // 2 + 2
    assert len(done.stdout.splitlines()) == count * len(passes(0))


# Instructions ---------------------------------------------------------------------------------


def listings(isa: str, dtype: str, mask: Rule) -> list[tuple[KernelSpec, str]]:
    """Spec and assembly of all kernels that long sequences get, each once."""
    sizes = Problem(1, 8, 8, 2048, 2048, 64, 64, dtype, 0.125, mask)
    plans = [planned(sizes, device(isa), operation, form) for operation, form in PASSES]
    specs = dict.fromkeys(launch.spec for made in plans for launch in made.launches)
    return [(spec, runtime.assembly(emit(spec), device(isa))) for spec in specs]


def inner_loops(listing: str) -> list[list[str]]:
    """The instructions of every loop without a label inside."""
    loops: list[list[str]] = []
    label: str | None = None
    body: list[str] = []
    for line in listing.splitlines():
        if named := re.match(r"(\.L\w+):", line):
            label, body = named[1], []
        elif label and re.match(r"\t[a-z]", line):
            body.append(line.strip())
            if re.match(rf"(j|b|cb|tb).*\W{re.escape(label)}$", body[-1]):
                loops.append(body)
                label = None
    return loops


def exponential(loop: list[str]) -> bool:
    """Whether a loop shifts bits to where an exponent stands."""
    return any(re.match(r"v?psll|shl\s+v", line) for line in loop)


PRODUCT = {
    ("avx512", "float32"): r"vfmadd\d+ps\s.*%zmm",
    ("avx512", "float64"): r"vfmadd\d+pd\s.*%zmm",
    ("avx2", "float32"): r"vfmadd\d+ps\s.*%ymm",
    ("avx2", "float64"): r"vfmadd\d+pd\s.*%ymm",
    ("sse2", "float32"): r"mulps\s.*%xmm",
    ("sse2", "float64"): r"mulpd\s.*%xmm",
    ("neon", "float32"): r"fmla\s+v\d+\.4s",
    ("neon", "float64"): r"fmla\s+v\d+\.2d",
}
"""The multiplication of one register of numbers."""

FORBIDDEN = {
    "avx512": None,
    "avx2": r"%zmm|%k\d",
    "sse2": r"%[yz]mm|%k\d|\bv[a-z]+p[sd]\b",
    "neon": r"\bz\d+\.[sd]\b",
}
"""What belongs to a wider level: registers, masks, instructions."""

STACK = r"\(%rsp|\[sp"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("isa", "dtype", "mask"),
    [
        *((*pair, causal()) for pair in PRODUCT),
        *((*pair, full()) for pair in PRODUCT if pair[1] == "float32"),
    ],
    ids=str,
)
def test_products_fill_the_registers_and_nothing_spills(isa: str, dtype: str, mask: Rule) -> None:
    """And no instruction is of a wider level."""
    for spec, listing in listings(isa, dtype, mask):
        if FORBIDDEN[isa]:
            wider = [line for line in listing.splitlines() if re.search(FORBIDDEN[isa], line)]
            assert not wider, (spec.kernel, wider[:3])
        if spec.kernel in ("delta", "reduce_dq"):
            continue
        size = spec.rows * spec.vectors
        counted = [
            (sum(bool(re.match(PRODUCT[isa, dtype], line)) for line in loop), loop)
            for loop in inner_loops(listing)
        ]
        products = [loop for count, loop in counted if count == size and not exponential(loop)]
        least = {"forward": 2, "backward_dq": 3, "backward_dkv": 4, "backward": 5}[spec.kernel]
        assert len(products) >= least, (spec.kernel, [count for count, _ in counted])
        for loop in products:
            spilled = [line for line in loop if re.search(STACK, line)]
            assert not spilled, (spec.kernel, spilled)


PRODUCTS_ON_TILES = {
    "bfloat16": {"tileload": 4, "tdpbf16ps": 4},
    "float16": {"tileload": 8, "tdpbf16ps": 12},
}
"""Tile instructions of one step: in two parts a product is three, which share sides."""


@pytest.mark.slow
@pytest.mark.parametrize("mask", [full(), causal()], ids=repr)
@pytest.mark.parametrize("dtype", PRODUCTS_ON_TILES)
def test_tile_products_touch_no_memory_but_their_tiles(dtype: str, mask: Rule) -> None:
    for spec, listing in listings("amx", dtype, mask):
        if spec.kernel in ("delta", "reduce_dq"):
            continue
        kinds = [line.split()[0] for line in amx.tile_instructions(listing)]
        assert kinds.count("ldtilecfg") == kinds.count("tilerelease") == 1, spec.kernel
        products = [
            loop for loop in inner_loops(listing) if any("tdpbf16ps" in line for line in loop)
        ]
        assert products, spec.kernel
        for loop in products:
            counts = {
                kind: sum(line.startswith(kind) for line in loop)
                for kind in ("tileload", "tdpbf16ps")
            }
            assert counts == PRODUCTS_ON_TILES[dtype], (spec.kernel, loop)
            others = [line for line in loop if "(" in line and not re.match(r"tileload|lea", line)]
            addresses = [line for line in others if re.match(r"(mov|cmp)q\t\d*\(%rsp\), %r", line)]
            assert others == addresses, (spec.kernel, others)
            # Two parts have ten addresses and strides; one on the stack hides behind 12 products.
            assert len(addresses) <= (dtype == "float16"), (spec.kernel, others)


@pytest.mark.slow
def test_a_wider_level_would_be_noticed() -> None:
    for narrow, wide in (("avx2", "avx512"), ("sse2", "avx2")):
        for spec, listing in listings(wide, "float32", full()):
            assert re.search(FORBIDDEN[narrow], listing), spec.kernel


def test_the_register_tiles_fit_their_registers() -> None:
    for isa, family in FAMILIES.items():
        assert family.registers == Device("cpu", "", isa, "", "", 1).vector_registers
        for tile in family.tiles:
            assert tile.registers <= family.registers, (isa, tile)
