"""`tilefold tune --device cuda`: the fastest blocks of Triton kernels on this machine's GPU."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

from tilefold.backends.triton import autotune, runtime, tuned
from tilefold.backends.triton.autotune import Trial
from tilefold.backends.triton.machine import Machine
from tilefold.commands import specification, terminal
from tilefold.masks import parse
from tilefold.measuring.environment import environment
from tilefold.problems.attention import Problem

SHOWN = 6
"""The number of candidates of a kernel that are shown, beside the usual blocks; JSON has all."""


def main(options: argparse.Namespace) -> int:
    """Measure candidates, keep the winners and show them."""
    if not options.dry_run:
        tuned.STORE.check()
    machine = runtime.gpu()
    document = {
        **environment(),
        "architecture": machine.architecture,
        "gpu": machine.name,
        "path": None if options.dry_run else str(tuned.STORE.path),
        "kernels": _measured(options, machine),
    }
    if options.json:
        terminal.print_json(document)
    else:
        _show(document)
    return 0


def _measured(options: argparse.Namespace, machine: Machine) -> list[dict[str, Any]]:
    """The kernels of all problems as plain values, each with its candidates."""
    found = []
    with terminal.progress() as bar:
        task = bar.add_task("", total=None)
        for dtype, operation, shape, mask in itertools.product(
            options.dtype, options.operation, options.shape, options.mask
        ):
            problem = specification.problem(options, shape, parse.parse(mask), dtype)
            trials = autotune.tune(
                problem,
                operation,
                machine,
                form=options.form if operation == "backward" else "auto",
                seconds=options.seconds,
                note=lambda line: bar.update(task, description=line),
                keep=not options.dry_run,
            )
            for kernel, group in itertools.groupby(trials, lambda trial: trial.operation):
                found.append(_described(problem, shape, kernel, list(group)))
    return found


def _described(
    problem: Problem, shape: str, kernel: str, trials: Sequence[Trial]
) -> dict[str, Any]:
    usual = next((trial for trial in trials if trial.usual), None)
    winner = next((trial for trial in trials if trial.winner), None)
    gain = None
    if usual and winner and usual.seconds and winner.seconds:
        gain = usual.seconds / winner.seconds - 1
    return {
        "kernel": kernel,
        "shape": shape,
        "dtype": problem.dtype,
        "precision": problem.precision,
        "mask": str(problem.mask),
        "usual": str(usual.blocks) if usual else None,
        "winner": str(winner.blocks) if winner else None,
        "gain": gain,
        "candidates": [
            {"blocks": str(trial.blocks), "seconds": trial.seconds, "reason": trial.reason}
            for trial in trials
        ],
    }


def _show(document: dict[str, Any]) -> None:
    console = terminal.out()
    console.print(f"{document['gpu']} ({document['architecture']})", markup=False)
    for kernel in document["kernels"]:
        console.print()
        console.print(_table(kernel))
        console.print(_verdict(kernel), soft_wrap=True, markup=False)
    console.print()
    faster = any(kernel["winner"] != kernel["usual"] for kernel in document["kernels"])
    if not document["kernels"]:
        words = "there is nothing to tune: no query meets a key"
    elif not document["path"]:
        words = "nothing kept (--dry-run)"
    else:
        words = f"kept in {document['path']}" if faster else "nothing to keep"
    console.print(words, soft_wrap=True, markup=False)


def _table(kernel: dict[str, Any]) -> Any:
    marks = {kernel["usual"]: "as before", kernel["winner"]: "winner"}
    if kernel["usual"] == kernel["winner"]:
        marks = {kernel["winner"]: "winner, as before"}
    timed = [one for one in kernel["candidates"] if one["seconds"] is not None]
    base = next((one["seconds"] for one in timed if one["blocks"] == kernel["usual"]), None)
    rows = [
        [
            one["blocks"],
            terminal.seconds(one["seconds"]),
            f"{one['seconds'] / base:.3f}" if base else "",
            marks.get(one["blocks"], ""),
        ]
        for place, one in enumerate(timed)
        if place < SHOWN or one["blocks"] in marks
    ]
    kind = specification.kind(kernel["dtype"], kernel["precision"])
    title = f"{kernel['kernel']} {kernel['shape']} {kind} {kernel['mask']}"
    return terminal.table(title, ["blocks", ">time", ">ratio", ""], rows)


def _verdict(kernel: dict[str, Any]) -> str:
    every = kernel["candidates"]
    misfits = sum(one["seconds"] is None for one in every)
    words = f"; {misfits} of {len(every)} do not fit" if misfits else ""
    if kernel["winner"] is None:
        return f"no blocks ran: {every[0]['reason']}"
    if kernel["winner"] == kernel["usual"]:
        return f"the blocks stay: nothing is {autotune.LEAST_GAIN:.0%} faster{words}"
    gain = kernel["gain"]
    faster = f"{gain:.1%} faster than the blocks of before" if gain is not None else "the fastest"
    return f"{kernel['winner']} is {faster}{words}"
