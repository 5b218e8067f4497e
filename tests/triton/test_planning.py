"""Plans for Triton: which kernels, blocks, programs and scratch; and what cannot be planned."""

from __future__ import annotations

import doctest
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from interpreted import machine
from paths import ROOT

import tilefold
from tilefold import Problem, Rule, causal, cli, full, local
from tilefold.backends.triton import (
    architectures,
    datasheets,
    dispatch,
    module,
    plan,
    runtime,
    source,
    spec,
)
from tilefold.backends.triton.dispatch import fitted
from tilefold.backends.triton.heuristics import DEFAULT, Heuristics
from tilefold.backends.triton.kernels import hopper_launch
from tilefold.backends.triton.machine import MachineCache
from tilefold.backends.triton.spec import Blocks, pieces

LARGE = Problem.of((2, 16, 4096, 128), (2, 4, 4096, 128), dtype="bfloat16", mask=causal())


def operations(made: plan.TritonPlan) -> list[str]:
    return [launch.spec.kernel for launch in made.launches]


@pytest.mark.feature("M05", "M07", "T08")
def test_each_block_of_results_has_one_program() -> None:
    made = plan.plan(LARGE, "sm_90", "forward")
    (launch,) = made.launches
    rows = -(-4096 // launch.spec.blocks.parallel)
    assert launch.programs == rows * 16 * 2
    assert sorted(launch.order.tolist()) == list(range(rows))
    assert launch.order[0] == rows - 1, "the last block of a causal mask is the heaviest"
    dq, dkv = plan.plan(LARGE, "sm_90", "backward").launches
    assert dq.programs == -(-4096 // dq.spec.blocks.parallel) * 16 * 2
    assert dkv.programs == -(-4096 // dkv.spec.blocks.parallel) * 4 * 2


@pytest.mark.feature("M04")
def test_scratch_of_the_split_form_is_a_number_for_each_query() -> None:
    made = plan.plan(LARGE, "sm_90", "backward")
    assert operations(made) == ["backward_dq", "backward_dkv"]
    assert {name: buffer.shape for name, buffer in made.buffers.items()} == {"delta": (2, 16, 4096)}


def test_the_fused_form_has_a_part_of_dq_for_each_owner() -> None:
    made = plan.plan(LARGE, "sm_90", "backward", form="fused", scope="machine")
    assert operations(made) == ["delta", "backward", "reduce_dq"]
    owners = made.launches[1].splits
    assert made.launches[1].programs == owners * 2 * 4
    assert owners == min(made.launches[1].block_rows, -(-DEFAULT.enough_programs // 8))
    assert made.buffers["dq_parts"].shape == (owners, 2, 16, 4096, 128)
    assert made.cleared == ("dq_parts",)
    alone = plan.plan(LARGE, "sm_90", "backward", form="fused", owners=1)
    assert alone.launches[1].splits == 1


@pytest.mark.parametrize(
    ("shape", "form"),
    [
        (((4, 8, 1, 64), (4, 2, 8192, 64)), "auto"),
        (((4, 8, 64, 64), (4, 2, 8192, 64)), "auto"),
        (((4, 8, 16, 64), (4, 8, 8192, 64)), "auto"),
        (((4, 8, 17, 64), (4, 2, 8192, 64)), "decode"),
    ],
)
def test_decode_has_programs_enough_and_a_part_for_each_split(
    shape: tuple[Any, ...], form: str
) -> None:
    problem = Problem.of(*shape, dtype="float16")
    made = plan.plan(problem, "sm_90", "forward", form=form, scope="machine")
    launch, programs = made.launches[0], 4 * shape[1][1] * made.launches[0].block_rows
    assert programs >= min(DEFAULT.enough_programs, 8 * 8192 // DEFAULT.keys_per_split)
    assert made.buffers["part_o"].shape == (4, 8, launch.splits, shape[0][2], 64)


def test_a_planner_takes_other_heuristics() -> None:
    few = Problem.of((1, 8, 1, 64), (1, 8, 8192, 64), dtype="float16")
    device = architectures.architecture("sm_90")
    splits = []
    for keys in (1024, 4096):
        chosen = Heuristics(fixed_keys=keys)
        made = plan.Planner(few, device, heuristics=chosen).plan("forward")
        splits.append(made.launches[0].splits)
    assert splits == [8, 2]
    never = Heuristics(many_keys=10**6)
    made = plan.Planner(few, device, heuristics=never).plan("forward", "auto")
    assert operations(made) == ["forward"]


@pytest.mark.feature("M10")
def test_a_plan_says_how_fast_it_can_be_at_most() -> None:
    """By the data sheet: here 4 b h n^2 d operations at 989 TFLOP/s, of which causal() has half."""
    shape = (1, 8, 8192, 128)
    problem = Problem.of(shape, dtype="bfloat16")
    lines = plan.plan(problem, "sm_90", "forward", form="tiled").explain()
    seconds = 4 * 8 * 8192**2 * 128 / 989e12
    assert "  100.0% of all pairs lie in the tiles that are visited" in lines
    bound = f"no faster than {seconds * 1e3:.3g} ms (arithmetic) on an H100 SXM, by its data sheet"
    assert f"  {bound}" in lines
    half = plan.plan(replace(problem, mask=causal()), "sm_90", "backward", form="fused")
    *_, last = (line for line in half.explain() if "of all pairs" in line)
    assert 50.0 < float(last.partition("%")[0]) < 52.0
    few = plan.plan(Problem.of((1, 8, 1, 128), shape, dtype="bfloat16"), "gfx942", "forward")
    words = "\n".join(few.explain())
    assert words.count("no faster than") == 1 and "(bytes) on an MI300X" in words
    assert not datasheets.rates("none", "float16", "ieee")


def test_the_examples_of_the_page() -> None:
    page = ROOT / "docs" / "triton.md"
    failed, tried = doctest.testfile(str(page), module_relative=False)
    assert tried and not failed


@pytest.mark.feature("M15", "T07")
@pytest.mark.parametrize("mask", [causal(), local(200), full()], ids=repr)
def test_runs_cover_what_is_seen_and_nothing_twice(mask: Rule) -> None:
    problem = Problem.of((1, 1, 500, 64), (1, 1, 700, 64), dtype="float16", mask=mask)
    (launch,) = plan.plan(problem, "sm_80", "forward").launches
    visible = mask.to_dense(500, 700)
    rows, step = launch.spec.blocks.parallel, launch.spec.blocks.traverse
    for block in range(launch.visited_rows):
        met = np.zeros(700, int)
        begin, middle, end = launch.run_rows[2 * block : 2 * block + 3]
        for index in range(begin, end):
            first, last = launch.runs[index]
            met[first:last] += 1
            if index < middle:
                assert (last - first) % step == 0, "a tile of whole pairs is whole"
                assert visible[block * rows : (block + 1) * rows, first:last].all()
        assert met.max() <= 1
        assert met[visible[block * rows : (block + 1) * rows].any(0)].all()


@pytest.mark.feature("M06")
def test_pieces_of_a_head_are_powers_of_two() -> None:
    for dim in range(1, spec.MOST_DIM + 1):
        found = pieces(dim)
        assert sum(piece.width for piece in found) == -(-dim // 16) * 16
        assert found[-1].stop == dim and found[0].first == 0
        assert all(piece.width & (piece.width - 1) == 0 for piece in found)


def test_descriptors_where_tiles_can_be_moved_whole() -> None:
    made = plan.plan(LARGE, "sm_90", "forward")
    kernel = made.launches[0].spec
    packed = dict.fromkeys("qkvo", (4096 * 128, 4096, 128, 1))
    assert fitted(kernel, made, packed, True).descriptors
    assert not fitted(kernel, made, packed, False).descriptors
    for odd in ((4096 * 128, 4096, 132, 1), (4096 * 128, 0, 128, 1), (8, 4, 1, 4096)):
        assert not fitted(kernel, made, {**packed, "k": odd}, True).descriptors
    older = plan.plan(LARGE, "sm_80", "forward")
    assert not fitted(older.launches[0].spec, older, packed, True).descriptors
    far = {**packed, "v": (1, 1, 2**25, 1)}
    assert fitted(kernel, made, far, True).wide and not fitted(kernel, made, packed, True).wide


@pytest.mark.feature("T15")
@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: plan.plan(LARGE, "sm_75", "forward"), ValueError, "architecture must be 'sm_80'"),
        (lambda: plan.plan(LARGE, "sm_90", "sideways"), ValueError, "operation must be"),
        (lambda: plan.plan(LARGE, "sm_90", "forward", form="split"), ValueError, "form must be"),
        (
            lambda: plan.plan(Problem.of((1, 1, 8, 600)), "sm_90", "forward"),
            NotImplementedError,
            "heads of up to 512 numbers are implemented for GPUs, got dim 600",
        ),
        (
            lambda: plan.plan(Problem.of((0, 1, 8, 64)), "sm_90", "forward", form="decode"),
            ValueError,
            "form 'decode' splits keys",
        ),
        (
            lambda: plan.plan(LARGE, "sm_90", "backward", blocks={"dq": Blocks(64, 64, 4, 2)}),
            ValueError,
            "a kernel of blocks must be 'forward'",
        ),
        (
            lambda: plan.plan(LARGE, "sm_90", "forward", blocks=(64, 64, 4, 2)),  # type: ignore[arg-type]  # bad
            TypeError,
            "blocks must be Blocks, or Blocks by kernel, got (64, 64, 4, 2)",
        ),
        (lambda: Blocks(48, 64, 4, 2), ValueError, "parallel must be a power of two from 16"),
        (lambda: Blocks(64, 64, 3, 2), ValueError, "warps must be 1, 2, 4, 8 or 16, got 3"),
        (lambda: Blocks(64, 64, 4, 0), ValueError, "stages must be from 1 to 8, got 0"),
        (lambda: Blocks(64, 64, 4, 1, 1), ValueError, "streamed must be True or False, got 1"),
        (lambda: runtime.known("sm_75", "T4"), NotImplementedError, "T4 is of architecture sm_75"),
    ],
)
def test_message(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as raised:
        call()
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_precision_decides_how_float32_is_multiplied() -> None:
    for precision, products in (("highest", "ieee"), ("high", "tf32x3"), ("medium", "tf32")):
        problem = Problem.of((1, 1, 512, 64), precision=precision)
        (launch,) = plan.plan(problem, "sm_90", "forward").launches
        assert launch.spec.float32_mode == products
        assert f'input_precision="{products}"' in source.emit(launch.spec)
        (other,) = plan.plan(problem, "gfx942", "forward").launches
        assert other.spec.float32_mode == "ieee", "more exact than asked where there is no TF32"


@pytest.mark.feature("M14", "M03")
def test_a_text_is_a_module_in_the_cache(fresh_cache: Path) -> None:
    module.load.cache_clear()
    module._module.cache_clear()
    text = source.emit(plan.plan(LARGE, "sm_80", "forward").launches[0].spec)
    pytest.importorskip("triton", reason="a module of Triton's kernels imports it")
    function = module.load(text, "tilefold_forward")
    (file,) = fresh_cache.glob("*.py")
    assert file.read_text() == text
    assert function.fn.__code__.co_filename == str(file)
    with pytest.raises(SyntaxError):
        module.load(text.replace("def tilefold_forward(", "def def ("), "tilefold_forward")


def test_the_same_text_for_other_lengths() -> None:
    texts = {
        source.emit(plan.plan(problem, "sm_90", "forward").launches[0].spec)
        for problem in (
            Problem.of((1, 2, 4096, 64), dtype="float16", mask=local(64)),
            Problem.of((3, 4, 300, 64), (3, 1, 900, 64), dtype="float16", mask=local(99)),
        )
    }
    assert len(texts) == 1


@pytest.mark.feature("M03", "S07")
def test_names_of_kernels_are_stable() -> None:
    names = {
        launch.spec.entry
        for operation, form in (("forward", "tiled"), ("backward", "split"), ("backward", "fused"))
        for launch in plan.plan(LARGE, "sm_90", operation, form=form).launches
    }
    assert names == {
        "tilefold_forward",
        "tilefold_backward_dq",
        "tilefold_backward_dkv",
        "tilefold_delta",
        "tilefold_backward",
        "tilefold_reduce_dq",
    }


SMALL = Problem.of((1, 2, 40, 16), dtype="float32", mask=causal())


def test_architectures_name_a_table() -> None:
    tables = {found.table for found in architectures.ARCHITECTURES.values()}
    assert tables <= architectures.ARCHITECTURES.keys()


@pytest.mark.feature("A10")
def test_modules_are_written_ahead() -> None:
    """In the interpreter nothing is compiled; without a GPU there is nowhere to compile for."""
    futures = tilefold.compile_async([SMALL], device=machine("sm_90"))
    assert [future.result(60) for future in futures] == [None]
    if runtime.missing():
        with pytest.raises(NotImplementedError):
            tilefold.compile_async([SMALL], device="cuda:1")
    with pytest.raises(ValueError, match="device must be 'cpu', 'mps' or 'cuda', got 'gpu'"):
        tilefold.compile_async([SMALL], device="gpu")


@pytest.mark.feature("M13", "S07")
def test_inspect_prints_a_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    words = "inspect --backend triton --architecture sm_80 --dtype float16 --shape 1,2,64,32"
    assert cli.main([*words.split(), "--operation", "backward", "--kernel", "backward_dkv"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        "# tilefold_backward_dkv: float16, dim 32, dim_v 32, for sm_80 (A100)"
    )
    compile(printed, "printed", "exec")
    assert cli.main([*words.split(), "--json"]) == 2
    assert "--json goes with --backend cpu" in capsys.readouterr().err


# Hopper's own kernel --------------------------------------------------------------------------


@dataclass(eq=False)
class Recorder:
    """A machine that takes all kernels and keeps what they are launched with."""

    architecture: str = "sm_90"
    multiprocessors: int = 132
    gluon: bool = True
    kept: MachineCache = field(default_factory=MachineCache)
    launches: list[tuple[str, int, tuple[Any, ...], dict[str, int]]] = field(default_factory=list)

    def active(self) -> Any:
        return nullcontext()

    def function(self, text: str, entry: str) -> Any:
        def launch(grid: tuple[int]) -> Any:
            return lambda *given, **options: self.launches.append((entry, *grid, given, options))

        return SimpleNamespace(launch=launch)  # stands for what is subscripted

    upload = staticmethod(lambda array: array)
    launched = staticmethod(lambda tensors: None)


def launched(problem: Problem, machine: Recorder, **options: Any) -> dispatch._Step:
    """The only step of a forward pass on packed operands."""
    made = plan.plan(problem, machine.architecture, "forward", **options)
    row = problem.dim
    strides: dict[str, Any] = dict.fromkeys("qkvo", (row * 4096, row * 4096, row, 1))
    return dispatch.prepare(made, machine, strides | {"lse": (1,)}, True).steps[0]


def test_an_h100_takes_its_own_kernel_where_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="descriptors are Triton's")
    step = launched(LARGE, Recorder())
    assert step.spec.entry == "tilefold_forward_hopper"
    assert step.programs == 132, "programs stay, as many as multiprocessors"
    assert [tiles.operand for tiles in step.tma] == ["q", "k", "v"]
    operands = len(step.operands)
    names = hopper_launch.parameters(step.spec)
    assert len(names) == operands + len(step.constants) + len(step.tma)
    known = dict(zip(names[operands:], step.constants, strict=False))
    assert known["places"] == 32 * 32 and 1 <= known["near"] <= 32
    assert launched(LARGE, Recorder(gluon=False)).spec.entry == "tilefold_forward"
    assert launched(LARGE, Recorder(), form="tiled").spec.entry == "tilefold_forward"
    monkeypatch.setenv("TILEFOLD_HOPPER", "0")
    assert launched(LARGE, Recorder()).spec.entry == "tilefold_forward"


def test_a_head_that_would_be_padded_much_is_cut_instead() -> None:
    for dim, entry in ((96, "tilefold_forward_hopper"), (80, "tilefold_forward")):
        problem = Problem.of((1, 2, 512, dim), dtype="float16")
        assert plan.plan(problem, "sm_90", "forward").launches[0].spec.entry == entry
    forced = plan.plan(problem, "sm_90", "forward", form="hopper")
    assert forced.launches[0].spec.entry == "tilefold_forward_hopper"


@pytest.mark.parametrize(
    ("problem", "architecture", "reason"),
    [
        (LARGE, "sm_80", "it is written for sm_90, not for sm_80"),
        (Problem.of((1, 2, 512, 64)), "sm_90", "it multiplies float16 and bfloat16, not float32"),
        (Problem.of((1, 2, 512, 320), dtype="float16"), "sm_90", "heads have at most 256"),
        (Problem.of((1, 2, 0, 64), dtype="float16"), "sm_90", "no query meets a key"),
    ],
)
def test_elsewhere_the_plain_kernel_serves(
    problem: Problem, architecture: str, reason: str
) -> None:
    (launch,) = plan.plan(problem, architecture, "forward").launches
    assert launch.spec.entry == "tilefold_forward" and not launch.persistent
    with pytest.raises(ValueError, match=f"form 'hopper' is not possible: {reason}"):
        plan.plan(problem, architecture, "forward", form="hopper")


def test_arrays_that_cannot_be_moved_whole_take_the_plain_kernel() -> None:
    made = plan.plan(LARGE, "sm_90", "forward")
    odd: dict[str, Any] = dict.fromkeys("qkvo", (128 * 4096, 128 * 4096, 129, 1))
    call = dispatch.prepare(made, Recorder(), odd | {"lse": (1,)}, True)
    assert call.steps[0].spec.entry == "tilefold_forward"
    forced = plan.plan(LARGE, "sm_90", "forward", form="hopper")
    with pytest.raises(ValueError, match="it moves whole tiles"):
        dispatch.prepare(forced, Recorder(), odd | {"lse": (1,)}, True)
