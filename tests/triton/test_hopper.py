"""Hopper's kernel in Gluon: it finishes and is right whatever comes late, and compiles as meant.

No machine of ours has a Hopper GPU. `gluon` runs the text with all that can wait for something else
in a random order; the compiler shows that products overlap and what they take. Neither shows times.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import gluon
import numpy as np
import pytest
from compare import assert_near

from tilefold import Rule, causal, dense, local
from tilefold.backends.triton.kernels import arguments, hopper, hopper_launch
from tilefold.backends.triton.plan import plan
from tilefold.backends.triton.spec import Blocks, TritonSpec
from tilefold.problems import reference
from tilefold.problems.attention import Problem

# Tracing Python's operations doubles the time of these tests.
pytestmark = pytest.mark.no_cover

SMALL = Blocks(128, 64, 4, 2)


def attend(
    problem: Problem,
    operands: dict[str, Any],
    *,
    blocks: Blocks = SMALL,
    programs: int = 2,
    near: int = 2,
    seed: int = 0,
    edit: tuple[str, str] = ("", ""),
) -> tuple[Any, Any]:
    """o and lse of the kernel, as the machine of `gluon` runs it."""
    made = plan(problem, "sm_90", "forward", form="tiled", blocks=blocks)
    (launch,) = made.launches
    spec = replace(launch.spec, gluon=True, blocks=blocks)
    q = operands["q"]
    results = {
        "o": np.full((*q.shape[:3], problem.dim_v), np.nan, np.float16),
        "lse": np.full(q.shape[:3], np.nan, np.float32),
    }
    arrays = {
        **{name: array.reshape(-1) for name, array in {**operands, **results}.items()},
        "order": launch.order,
        "run_rows": launch.run_rows,
        "runs": launch.runs.reshape(-1),
    }
    tables = {f"t{i}": table.array.reshape(-1) for i, table in enumerate(made.tables)}
    steps = {
        f"t{i}_{axis}": int(np.prod(table.array.shape[axis + 1 :]))
        for i, table in enumerate(made.tables)
        for axis in range(table.array.ndim)
    }
    rows, (planes_b, planes_h) = launch.block_rows, launch.planes
    numbers = {
        **{f"p{i}": number for i, number in enumerate(made.parameters)},
        **steps,
        "len_q": problem.len_q,
        "len_k": problem.len_k,
        "heads": problem.heads_q,
        "group": problem.heads_q // problem.heads_kv,
        "row_b": rows * planes_h if planes_b > 1 else 0,
        "row_h": rows if planes_h > 1 else 0,
        "block_rows": rows,
        "places": launch.programs,
        "near": near,
    }
    for name, array in {**operands, **results}.items():
        steps_of = np.array(array.strides) // array.itemsize
        numbers |= {
            f"{name}_{axis}": int(step)
            for axis, step in zip("bhnd"[: array.ndim], steps_of, strict=True)
        }
    given: list[Any] = []
    for name in arguments.names(spec) + hopper_launch.ROW_BLOCKS:
        if name in arrays or name in tables:
            given.append(gluon.Pointer({**arrays, **tables}[name]))
        elif name == "scale":
            given.append(np.float32(problem.scale))
        else:
            given.append(gluon.tensor(numbers.get(name, 0)))
    for tile in hopper_launch.descriptors(spec):
        given.append(gluon.Descriptor(operands[tile.operand], tile.rows, tile.columns))
    text = hopper.emit(spec)
    if edit[0] not in text:
        raise LookupError(edit[0])
    device = gluon.Device(text.replace(*edit) if edit[0] else text, spec.entry, seed)
    device.launch(programs, given)
    return results["o"], results["lse"]


def inputs(problem: Problem, seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    keys = (problem.batch, problem.heads_kv, problem.len_k)
    shapes = {
        "q": (problem.batch, problem.heads_q, problem.len_q, problem.dim),
        "k": (*keys, problem.dim),
        "v": (*keys, problem.dim_v),
    }
    return {
        name: random.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()
    }


def compare(problem: Problem, operands: dict[str, Any], **options: Any) -> None:
    o, lse = attend(problem, operands, **options)
    want, want_lse = reference.attention(
        *(operands[name] for name in "qkv"), mask=problem.mask, scale=problem.scale
    )
    assert_near("lse", lse, want_lse, 1e-4 * (1 + np.abs(np.nan_to_num(want_lse))))
    assert_near("o", o, want, 4e-3 * (1 + np.abs(np.nan_to_num(want))))


def problem_of(
    len_q: int, len_k: int, mask: Rule | None = None, heads: tuple[int, int] = (2, 1),
    dims: tuple[int, int] = (64, 64), batch: int = 1, scale: float | None = None,
) -> Problem:  # fmt: skip
    return Problem.of(
        (batch, heads[0], len_q, dims[0]),
        (batch, heads[1], len_k, dims[0]),
        (batch, heads[1], len_k, dims[1]),
        dtype="float16",
        mask=mask,
        scale=scale,
    )


def holes(len_q: int, len_k: int) -> Rule:
    """A mask without order; some queries see no key, and a block of queries none at all."""
    seen = np.random.default_rng(5).random((len_q, len_k)) < 0.3
    seen[128:256] = False
    seen[7] = False
    return dense(seen)


CASES = {
    "whole tiles": (problem_of(256, 256), {}),
    "ends of sequences": (problem_of(130, 150, heads=(4, 2)), {"stages": 3}),
    "causal": (problem_of(300, 300, causal()), {}),
    "causal, one slot": (problem_of(256, 320, causal()), {"stages": 1}),
    "window, negative scale": (problem_of(200, 400, local(40), scale=-0.2), {}),
    "holes": (problem_of(260, 150, holes(260, 150)), {}),
    "nothing seen": (problem_of(140, 70, dense(np.zeros((140, 70), np.bool_))), {}),
    "padded heads": (problem_of(70, 200, causal(), dims=(40, 136), batch=2), {}),
    "many programs": (problem_of(256, 64, heads=(3, 3)), {"programs": 9, "near": 3}),
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CASES)
def test_right_whatever_comes_late(name: str, seed: int) -> None:
    problem, options = CASES[name]
    options = dict(options)
    blocks = replace(SMALL, stages=options.pop("stages", 2))
    compare(problem, inputs(problem, seed), blocks=blocks, seed=seed, **options)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [None, -0.3])
def test_odd_keys_reach_who_sees_them(scale: float | None) -> None:
    problem = problem_of(200, 200, causal(), scale=scale)
    operands = inputs(problem)
    operands["k"][0, 0, 150], operands["v"][0, 0, 170, 3] = np.nan, np.inf
    compare(problem, operands)
    operands["v"][0, 0, 20] = np.nan
    compare(problem, operands)


@pytest.mark.slow
def test_odd_values_that_nobody_sees() -> None:
    seen = np.ones((140, 140), np.bool_)
    seen[:, 90] = False
    problem = problem_of(140, 140, dense(seen))
    operands = inputs(problem)
    operands["v"][:, :, 90], operands["k"][:, :, 90] = np.nan, np.inf
    compare(problem, operands)
    with pytest.raises(AssertionError, match="elements differ"):
        compare(problem, operands, edit=("    if odd != 0:", "    if False:"))


@pytest.mark.slow
@pytest.mark.parametrize("mask", [None, causal()], ids=str)
def test_scores_of_minus_infinity_alone_have_no_mean(mask: Rule | None) -> None:
    problem = problem_of(200, 180, mask, heads=(2, 2), scale=1.0)
    operands = inputs(problem)
    operands["q"][...] = abs(operands["q"])
    operands["k"][:, 0] = operands["k"][:, 1, :100] = -np.inf
    o, _ = attend(problem, operands)
    assert np.isnan(o[:, 0, 20:]).all() and np.isfinite(o[:, 1, 199]).all()
    compare(problem, operands)


@pytest.mark.slow
@pytest.mark.parametrize("mask", [None, causal()], ids=str)
def test_huge_scores_choose_one_key(mask: Rule | None) -> None:
    problem = problem_of(140, 140, mask, scale=2.0**100)
    operands = inputs(problem)
    for name in "qk":
        operands[name][...] = 0
    operands["q"][..., 0], operands["k"][..., 0] = 1, np.arange(140)
    compare(problem, operands)


MUTATIONS = {
    "keys not waited for": ("mbarrier.wait(k_full.index(tile % STAGES), tile // STAGES & 1)", ""),
    "values not waited for": ("mbarrier.wait(v_full.index(slot), (tile - 1) // STAGES & 1)", ""),
    "queries not waited for": ("mbarrier.wait(q_full.index(warpgroup), filled & 1)", ""),
    "keys overwritten": ("mbarrier.wait(k_free.index(slot), tile // STAGES & 1 ^ 1)", ""),
    "queries overwritten": ("mbarrier.wait(q_free.index(1), filled & 1 ^ 1)", ""),
    "slots never free": ("release(v_free.index(slot))", ""),
    "scores not waited for": ("warpgroup_mma_wait(1, [s])", "warpgroup_mma_wait(2, [s])"),
    "nobody begins": ("pass_turn(warpgroup)  # the other warpgroup begins", "pass"),
    "both begin": ("if warpgroup == 1:\n        pass_turn", "if True:\n        pass_turn"),
    "a turn too many": ("wait_turn(warpgroup)  # the other", "pass  # the other"),
    "the first tile again": ("skip = TRAVERSE", "skip = 0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_machine_sees_what_is_missing(name: str) -> None:
    problem = problem_of(256, 320, causal())
    with pytest.raises(AssertionError):
        for seed in range(20):
            compare(problem, inputs(problem), seed=seed, edit=MUTATIONS[name], programs=1)


@pytest.mark.parametrize(("programs", "near"), [(1, 1), (5, 3), (7, 100), (132, 4)])
def test_every_place_has_one_program(programs: int, near: int) -> None:
    block_rows, heads, batch = 8, 3, 5
    places = gluon.tensor(block_rows * heads * batch)
    spec = spec_of(64, causal())
    device = gluon.Device(hopper.emit(spec), spec.entry, 0)
    weights = np.arange(block_rows, 0, -1)
    order = gluon.Pointer(np.arange(block_rows)[::-1].copy())
    found: Counter[tuple[int, ...]] = Counter()
    loads = np.zeros(programs)
    for program in range(programs):
        with device.as_program(program, programs):
            for turn in range(int(device.function("rounds_of")(places))):
                place = device.function("place_in")(turn)
                at = device.function("position")(
                    place, order, places, gluon.tensor(near), block_rows, heads
                )
                found[tuple(map(int, at))] += 1
                loads[program] += weights[::-1][int(at[0])]
    assert len(found) == places and set(found.values()) == {1}
    if programs < 100:
        assert loads.max() - loads.min() <= 2 * block_rows


def test_what_does_not_fit() -> None:
    spec = spec_of(128, causal())
    assert hopper_launch.fits(spec) is None
    for change, word in {
        "kernel": ("backward_dq", "forward"),
        "dtype": ("float32", "float16"),
        "dim": (257, "256"),
        "blocks": (Blocks(64, 128, 4, 2), "128 queries"),
    }.items():
        reason = hopper_launch.fits(replace(spec, **{change: word[0]}))  # type: ignore[arg-type]
        assert reason is not None and word[1] in reason
    for blocks in (Blocks(128, 256, 4, 1), Blocks(128, 128, 8, 2), Blocks(128, 128, 4, 4)):
        assert hopper_launch.fits(replace(spec, blocks=blocks)) is not None


def spec_of(dim: int, mask: Rule) -> TritonSpec:
    """The kernel of a head dimension as it is planned."""
    problem = replace(problem_of(1024, 1024, mask, dims=(dim, dim)), dtype="bfloat16")
    return plan(problem, "sm_90", "forward", form="hopper").launches[0].spec


COMPILE = """
import importlib.util, json, pathlib, pickle, subprocess, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout
from tilefold.backends.triton.kernels import arguments, hopper, hopper_launch
from tilefold.backends.triton.kernels.text import ELEMENTS

folder = pathlib.Path(sys.argv[1])
spec = pickle.loads((folder / "spec").read_bytes())
(folder / "kernel.py").write_text(hopper.emit(spec))
given = importlib.util.spec_from_file_location("kernel", folder / "kernel.py")
module = importlib.util.module_from_spec(given)
given.loader.exec_module(module)
types = arguments.signature(spec) | dict.fromkeys(hopper_launch.ROW_BLOCKS, "i32")
for tile in hopper_launch.descriptors(spec):
    layout = tile.layout(NVMMASharedLayout)
    types[tile.name] = f"tensordesc<{ELEMENTS[spec.dtype]}{tile.block},{layout!r}>"
names = hopper_launch.parameters(spec)
steps = arguments.strides(spec)
constants = {name: 1 for name in steps if name.endswith("_d")}
types = {name: "constexpr" if name in constants else types[name] for name in names}
strided = set(steps) - set(constants)
aligned = [i for i, name in enumerate(names) if types[name][0] == "*" or name in strided]
source = GluonASTSource(
    fn=getattr(module, spec.entry),
    signature=types,
    constexprs=constants,
    attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
)
made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
(folder / "cubin").write_bytes(made.asm["cubin"])
tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
sass = subprocess.run([tool, "-sass", folder / "cubin"], capture_output=True, text=True).stdout
print(json.dumps({"ptx": made.asm["ptx"], "sass": sass, "shared": made.metadata.shared}))
"""
"""Compile a specification for a Hopper GPU that need not be there."""


def compiled(spec: TritonSpec, folder: Path) -> Any:
    if importlib.util.find_spec("triton") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("Triton is not installed")
    (folder / "spec").write_bytes(pickle.dumps(spec))
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    made = subprocess.run(
        [sys.executable, "-c", COMPILE, str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert made.returncode == 0, made.stderr[-2000:]
    return json.loads(made.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_compiled_as_meant(dim: int, tmp_path: Path) -> None:
    spec = spec_of(dim, causal())
    made = compiled(spec, tmp_path)
    ptx, keys = made["ptx"], spec.blocks.traverse
    assert hopper_launch.shared_bytes(spec) < made["shared"] <= hopper_launch.SHARED_BYTES
    # Scores and values of the first and last tile, and of two loops, for each warpgroup.
    products = re.findall(r"wgmma\.mma_async\S+ \{[^}]*\}, (\{|%)", ptx)
    assert products.count("%") == 2 * 3 * dim // 16
    assert products.count("{") == 2 * 3 * keys // 16, "weights are not in registers"
    assert ptx.count("cp.async.bulk.tensor") == 5 * dim // 64
    assert not re.search(r"st\.shared\S*\.b16|stmatrix", ptx)
    for registers in hopper.REGISTERS:
        assert re.search(rf"setmaxnreg\.\w+\.sync\.aligned\.u32 \t?{registers};", ptx)
    for barrier in (14, 15):
        assert len(re.findall(rf"bar\.\w+ +\t?{barrier}\b", ptx)) == ptx.count(f" {barrier}, 256;")

    # All warps of a warpgroup meet before one thread says that they are done with a slot.
    words = r"bar\.sync\s+\d+, 128|wgmma\.wait_group|mbarrier\.arrive\.shared"
    events = [word.split()[0] for word in re.findall(words, ptx)]
    arrivals = [i for i, event in enumerate(events) if event.startswith("mbarrier")]
    assert len(arrivals) == 14 and all(events[i - 1] == "bar.sync" for i in arrivals)
    # In the loops of both warpgroups: two products, a wait, the exponentials, the other wait.
    loops = inner_loops(made["sass"])
    assert len(loops) == 4
    for loop in loops:
        kinds = r"HGMMA|WARPGROUP\.ARRIVE|DEPBAR\.LE gsb0, 0x\d|MUFU\.EX2|LDL|STL|BAR\.ARV"
        events = re.findall(kinds, "\n".join(loop))
        order = [event for i, event in enumerate(events) if event != events[i - 1]]
        assert [event for event in order if event != "MUFU.EX2"] == [
            *("WARPGROUP.ARRIVE", "HGMMA") * 2,
            "BAR.ARV",
            *("DEPBAR.LE gsb0, 0x1", "DEPBAR.LE gsb0, 0x0"),
        ], "products wait for each other, or registers are spilled"
        late = events[events.index("DEPBAR.LE gsb0, 0x0") :]
        assert late.count("MUFU.EX2") <= 2 < events.count("MUFU.EX2")


def inner_loops(sass: str) -> list[list[str]]:
    """The loops over tiles: with exponentials, and the three waits of a tile and no others.

    Waits that have to try again do so far behind, and jump back from there: no loops of tiles.
    """
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]*);", sass)
    lines = [(int(at, 16), words) for at, words in found]
    loops: dict[int, list[str]] = {}
    for at, words in lines:
        target = re.search(r"BRA.* 0x([0-9a-f]+)", words)
        if target and (first := int(target[1], 16)) < at:
            loop = [words for place, words in lines if first <= place <= at]
            text = "".join(loop)
            tile = "MUFU.EX2" in text and text.count("SYNCS.PHASECHK") == 3 and "EXIT" not in text
            if tile and not any(first < inner for inner in loops):
                loops[first] = loop
    return [*loops.values()]
