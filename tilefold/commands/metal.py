"""`tilefold doctor --metal`: tests and times of all Metal kernels on a Mac, on one page.

Every Metal kernel is compared with the definition. Then each pass is timed beside PyTorch's fused
attention on the same GPU. With `--emulate`, a few tests run in the emulator on Linux, and nothing
is timed.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tilefold.backends.metal import dispatch, emulate, gated, runtime
from tilefold.commands import terminal
from tilefold.common import array_files, settings
from tilefold.common.check import one_line
from tilefold.common.files import write_atomically
from tilefold.measuring import baselines, metal_selftest, metal_utilisation
from tilefold.measuring.environment import environment
from tilefold.measuring.metal_selftest import Place, Trial
from tilefold.measuring.metal_utilisation import Measured
from tilefold.measuring.workload import Arrays, Case
from tilefold.problems.attention import STATISTICS, Problem

DTYPES = ("float16", "float32")
DIMS = (64, 128, 256)
LENGTH, HEADS = 4096, 8
"""The length and the heads of timed problems: an M1 Max needs about 8192 rows to be busy, and this
is 8 x 4096."""

SECONDS = 3.0
"""The time of the turns of each problem, in seconds."""


def main(options: argparse.Namespace) -> int:
    """Test and measure the kernels, show and save the results; exit code 1 if a test fails."""
    if options.save and not Path(options.save).resolve().parent.is_dir():
        raise FileNotFoundError(f"{Path(options.save).parent}: there is no such folder")
    machine, place, gpu = _emulated() if options.emulate else _real()
    about = environment()
    trials: list[Trial] = []
    measured: list[Measured] = []
    notes: list[str] = []

    def document() -> dict[str, Any]:
        return _document(about, gpu, trials, measured, notes)

    def keep() -> None:
        """Save what there is so far, since a faulty kernel may hang the GPU or end the process."""
        if options.save:
            content = json.dumps(document(), indent=1, allow_nan=False) + "\n"
            write_atomically(Path(options.save), content.encode())

    for trial in _tried(machine, place, few=options.emulate):
        trials.append(trial)
        keep()
    for found, without in () if options.emulate else _measured(machine):
        measured += found
        notes += without
        keep()
    if options.json:
        terminal.print_json(document())
    else:
        _show(gpu, trials)
        if options.emulate:
            terminal.out().print("emulated: nothing was timed, and nothing here ran on hardware")
        else:
            _show_measured(gpu, measured, notes)
        if options.save:
            terminal.out().print(f"written to {terminal.escape(options.save)}")
    failed = [trial for trial in trials if not trial.passed and not trial.absent]
    if failed:
        tried = [trial for trial in trials if not trial.absent]
        raise terminal.Failure(f"{len(failed)} of {len(tried)} tests of Metal kernels failed")
    return 0


Found = tuple[dispatch.Machine, Place, dict[str, Any]]
"""A machine, the functions that copy arrays to and from it, and a description of it."""


def _emulated() -> Found:
    """The emulator, as a GPU of the family in the settings."""
    if reason := emulate.available():
        raise NotImplementedError(f"Metal kernels cannot be emulated here: {reason}")
    machine = dispatch.Emulated(settings.METAL_FAMILY.get() or "apple9")
    gpu = {"name": None, "family": machine.family, "emulated": True}
    return machine, Place(), gpu


def _real() -> Found:
    """The GPU of this Mac. Raises NotImplementedError if there is none."""
    advice = "`tilefold doctor --metal --emulate` tests the kernels on the CPU"
    if reason := runtime.missing(advice):
        raise NotImplementedError(reason)
    import torch

    from tilefold.backends.arrays.torch import tensor_of

    machine = runtime.gpu()
    name, cores = torch.backends.mps.get_name(), torch.backends.mps.get_core_count()
    place = Place(
        lambda array: tensor_of(array).to("mps"), lambda tensor: baselines.results(tensor)[0]
    )
    gpu = {"name": name, "family": machine.family, "emulated": False, "cores": cores}
    return machine, place, gpu | {"peak_ginstrs": metal_utilisation.peak(name, cores)}


def _tried(machine: dispatch.Machine, place: Place, *, few: bool) -> Iterator[Trial]:
    missing = None if few else gated.missing()
    with terminal.progress() as bar:
        task = bar.add_task("Testing", total=None)
        for trial in metal_selftest.trials(machine, place, missing, few=few):
            yield trial
            bar.update(task, description=f"{trial.kernel} {trial.dtype}", advance=1)


def _measured(machine: dispatch.Machine) -> Iterator[tuple[list[Measured], list[str]]]:
    """The measurements of each problem, and notes of failed ones."""
    wanted = [(dtype, dim) for dtype in DTYPES for dim in DIMS]
    with terminal.progress() as bar:
        for dtype, dim in bar.track(wanted, description="Measuring"):
            problem = Problem.of((1, HEADS, LENGTH, dim), dtype=dtype)
            try:
                yield measure(machine, problem, "mps")
            except RuntimeError as error:  # too little memory in torch, or a refused kernel
                yield [], [f"{dtype} d{dim}: {one_line(error)}"]


def measure(
    machine: dispatch.Machine, problem: Problem, device: str, seconds: float = SECONDS
) -> tuple[list[Measured], list[str]]:
    """Measure a problem's kernels and PyTorch's own attention on a torch device; with notes."""
    from tilefold.backends.arrays.torch import tensor_of
    from tilefold.implementations.torch import finish

    rng, p = np.random.default_rng(0), problem
    shape, kind = (p.batch, p.heads_q, p.len_q, p.dim), array_files.element_type(p.dtype)
    q, k, v, do = (rng.standard_normal(shape, np.float32).astype(kind) for _ in range(4))
    o, lse = np.zeros_like(q), np.zeros(shape[:3], STATISTICS[p.dtype])
    given = {"q": q, "k": k, "v": v, "do": do, "o": o, "lse": lse}
    given |= {name: np.zeros_like(q) for name in ("dq", "dk", "dv")}
    operands = {name: tensor_of(array).to(device) for name, array in given.items()}
    wait = functools.partial(finish, device)
    native: dict[str, Callable[[], object]] = {}
    notes = []
    for each in ("forward", "backward"):
        inputs, case = Arrays(q, k, v, do, o, lse), Case(p, each)
        try:
            call = baselines.implementation("native", device, case, inputs, wait=False)
            call()
            wait()
        except RuntimeError as error:  # its backward holds all scores, and memory may not suffice
            notes.append(f"native {each}, {p.dtype} d{p.dim}: {one_line(error)}")
        else:
            native[each] = call
    return metal_utilisation.measure(machine, p, operands, wait, native, seconds), notes


def _document(
    about: dict[str, Any],
    gpu: dict[str, Any],
    trials: list[Trial],
    measured: list[Measured],
    notes: list[str],
) -> dict[str, Any]:
    return {
        **about,
        "system": platform.platform(),
        "macos": runtime.macos(),
        "gpu": gpu,
        "self_test": [
            {**trial.__dict__, "error": _finite(trial.error), "passed": trial.passed}
            for trial in trials
        ],
        "benchmark": [each.record(gpu.get("peak_ginstrs")) for each in measured],
        "notes": notes,
    }


def _finite(error: float | None) -> float | None:
    return error if error is not None and np.isfinite(error) else None


def _show(gpu: dict[str, Any], trials: list[Trial]) -> None:
    console = terminal.out()
    rows = []
    for trial in trials:
        sign = "[green]passed[/]" if trial.passed else "[red]FAILED[/]"
        error = "" if trial.error is None else f"{trial.error:.0e}"
        row = [trial.kernel, terminal.escape(f"{trial.dtype} {trial.case}")]
        rows.append([*row, "[dim]absent[/]" if trial.absent else sign, error])
    where = gpu["name"] or "the emulator on the CPU"
    title = f"Metal kernels on {where} ({gpu['family']}) against dense float64"
    console.print(terminal.table(title, ["", "", "", ">error"], rows))
    reasons = [f"{trial.kernel}: {trial.reason}" for trial in trials if trial.reason]
    for reason in dict.fromkeys(reasons):
        console.print(terminal.escape(reason))
    console.print()


def _show_measured(gpu: dict[str, Any], measured: list[Measured], notes: list[str]) -> None:
    console, peak = terminal.out(), gpu["peak_ginstrs"]
    rows = [
        [
            f"{each.problem.dtype} d{each.problem.dim}",
            each.name,
            terminal.seconds(each.median),
            f"{each.ginstrs:,.0f}",
            f"{each.ginstrs / peak:.0%}" if peak else "",
        ]
        for each in measured
    ]
    title = f"{gpu['name']}, {gpu['cores']} cores: {HEADS} heads of {LENGTH} x {LENGTH}"
    columns = ["", "", ">median", ">GINSTRS", ">utilisation"]
    console.print(terminal.table(title, columns, rows))
    console.print(
        "GINSTRS: billions of instructions a second, for each pair 2D+5 forward, 3D+5 dQ, 4D+5"
        " dK/dV; native is PyTorch's, its backward counted as 5D+5"
    )
    if not peak:
        console.print(f"no utilisation: the peak of {gpu['name']} is not known here")
    for note in notes:
        console.print(f"not measured: {terminal.escape(note)}")
