"""Sources of GPU kernels, as `tilefold inspect --backend metal` and `--backend triton` print them.

Each source is a complete file for an app or a profiler. Its first lines say how to launch it.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping
from typing import Any

from tilefold import metal, triton
from tilefold.backends.metal import dispatch, gated
from tilefold.backends.metal.kernels import tensorops
from tilefold.backends.metal.plan import Launch, MetalPlan
from tilefold.common import check
from tilefold.problems.attention import Problem


def named(launches: Mapping[str, Any], name: str | None) -> str:
    """The name of a kernel of a plan; without one, the kernel with the most work.

    Raises ValueError for other names.
    """
    known = [*launches]
    if name is None:
        return next(kernel for kernel in known if launches[kernel].spec.row.visits)
    if name not in known:
        raise ValueError(f"--kernel must be one of {', '.join(known)}, not {name!r}")
    return name


def source(options: argparse.Namespace, problem: Problem) -> str:
    """The source of a GPU kernel for contiguous arrays. Raises ValueError."""
    for option in ("isa", "asm", "json"):  # --text says what is shown anyway
        if getattr(options, option):
            raise ValueError(
                f"--{option} goes with --backend cpu: a GPU kernel is shown as source only"
            )
    return {"metal": _metal, "triton": _triton}[options.backend](options, problem)


def _metal(options: argparse.Namespace, problem: Problem) -> str:
    if options.kernel == "tensorops":
        made = _tensor_operations(options, problem)
        (launch,) = made.launches
    else:
        family = options.family or "apple9"
        made = metal.plan(problem, family, options.operation, form=options.form)
        launches = {launch.spec.kernel: launch for launch in made.launches}
        launch = launches[named(launches, options.kernel)]
    spec, (x, y, z) = launch.spec, launch.grid
    kind = f"{spec.dtype}, dim {spec.dim}, dim_v {spec.dim_v}, innermost strides 1"
    where = f"for GPUs of {made.family.name} ({made.family.chips})"
    if spec.tensor_ops:
        where += f" with macOS {'.'.join(map(str, tensorops.OLDEST_OS))} or later"
    else:
        kind += ", one element moved at a time: any alignment"
    known = dispatch.sizes_of(made, launch)
    sizes = [f"{name}={known[name]}" if name in known else name for name in metal.sizes(spec)]
    facts = [
        f"{spec.entry}: {kind}; {where}.",
        f"Threadgroups have {spec.threads} threads; for this shape there are {x} x {y} x {z}.",
        f"The buffer `sizes` holds, as 64-bit integers, for this mask and shape: {', '.join(sizes)}"
        ". Names without a value are strides, in elements.",
        *_visits(launch),
    ]
    chosen = [*made.explain_score(), *launch.choice.explain()]
    return _commented("//", facts, chosen) + metal.emit(spec)


def _tensor_operations(options: argparse.Namespace, problem: Problem) -> MetalPlan:
    """The plan on tensor operations. Raises ValueError for calls that they do not serve."""
    if options.operation != "forward":
        raise ValueError("--kernel tensorops: tensor operations serve the forward pass only")
    check.choice("form", options.form, ("auto", "tiled"))
    family = options.family or gated.FAMILIES[0]
    if family not in gated.FAMILIES:
        needed = " or ".join(gated.FAMILIES)
        raise ValueError(f"--kernel tensorops needs --family {needed}, not {family}")
    return gated.plan(problem, family)


def _visits(launch: Launch) -> list[str]:
    """A description of the buffers that say where a threadgroup works."""
    if not launch.spec.row.visits:
        return []
    row = "its block row"
    if launch.spec.kernel == "decode":
        row = "its block row times the number of splits, plus its split of the keys"
    return [
        f"`order` gives each threadgroup along x {row}; the threadgroups with the most work come"
        " first. `run_rows` and `runs` hold the tiles that the mask leaves: see `Runs` in"
        " tilefold/masks/runs.py and tilefold/planning/visited.py."
    ]


def _triton(options: argparse.Namespace, problem: Problem) -> str:
    architecture = options.architecture or "sm_90"
    made = triton.plan(problem, architecture, options.operation, form=options.form)
    launches = {launch.spec.kernel: launch for launch in made.launches}
    launch = launches[named(launches, options.kernel)]
    spec, device = launch.spec, triton.ARCHITECTURES[architecture]
    facts = [
        f"{spec.entry}: {spec.dtype}, dim {spec.dim}, dim_v {spec.dim_v}, for {device.name}"
        f" ({device.chips}).",
        f"Launched with num_warps={spec.blocks.warps} and num_stages={spec.blocks.stages}; for this"
        f" shape there are {launch.programs} programs.",
        "Strides count elements. `order`, `run_rows` and `runs` hold the tiles that the mask"
        " leaves: see `Runs` in tilefold/masks/runs.py and tilefold/planning/visited.py.",
    ]
    chosen = [*made.explain_score(), *launch.choice.explain()]
    return _commented("#", facts, chosen) + triton.emit(spec)


def _commented(sign: str, facts: list[str], chosen: list[str]) -> str:
    lines = [line for fact in facts for line in textwrap.wrap(fact, 97)]
    lines += ["What was chosen, and why:", *(f"  {line}" for line in chosen), ""]
    return "".join(f"{sign} {line}".rstrip() + "\n" for line in lines)
