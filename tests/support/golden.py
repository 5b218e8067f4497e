"""A few emitted kernel sources, kept beside the tests so that a change is seen in review.

`python tests/support/golden.py` writes them anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from paths import DATA

from tilefold import alibi, bias, softcap
from tilefold.backends.metal import dispatch, gated, source
from tilefold.backends.metal import plan as metal_plan
from tilefold.backends.triton import plan as triton_plan
from tilefold.backends.triton import source as triton_source
from tilefold.masks.parse import parse
from tilefold.problems.attention import Problem
from tilefold.scores.score import as_score


class Golden(NamedTuple):
    """The sources of one backend: their folder, the ending of their files, and their generator."""

    folder: Path
    suffix: str
    texts: Callable[[], dict[str, str]]

    def kept(self, file: str) -> str:
        """The kept source with the name of a file."""
        return (self.folder / file).read_text(encoding="ascii")

    def files(self) -> set[str]:
        """The names of all kept files."""
        return {path.name for path in self.folder.glob(f"*{self.suffix}")}


def problem(dtype: str, dim: int, mask: str, form: str, heads_kv: int = 4) -> Problem:
    """A problem of long sequences, or of two queries for the form "decode"."""
    queries = 2 if form == "decode" else 1000
    shapes = (1, 4, queries, dim), (1, heads_kv, 1000, dim)
    return Problem.of(*shapes, dtype=dtype, mask=parse(mask))


def metal() -> dict[str, str]:
    """Sources by the names of their files: every kernel, both families, all types, four masks.

    Some kernels modify scores, too. They serve any alignment, except one source for aligned arrays.
    """
    found = {}
    for name, family, dtype, dim, mask, operation, form in (
        ("causal", "apple9", "float16", 64, "causal()", "forward", "tiled"),
        ("spilled", "apple7", "float32", 77, "full()", "forward", "tiled"),
        ("window", "apple7", "bfloat16", 80, "causal() & local(100)", "backward", "auto"),
        (
            "chunked",
            "apple9",
            "bfloat16",
            128,
            "chunked(64) | causal() | prefix(4)",
            "backward",
            "auto",
        ),
        ("causal", "apple9", "float16", 128, "causal()", "forward", "decode"),
    ):
        asked = problem(dtype, dim, mask, form)
        for launch in metal_plan.plan(asked, family, operation, form=form).launches:
            file = f"{launch.spec.kernel}_{family}_{dtype}_d{dim}_{name}.metal"
            found[file] = source.emit(launch.spec)
    asked = problem("bfloat16", 80, "causal() & local(100)", "auto")
    spec = metal_plan.plan(asked, "apple7", "backward").launches[0].spec
    aligned = replace(spec, vector=dispatch.WIDEST_MOVE)
    found[f"{spec.kernel}_apple7_bfloat16_d80_window_aligned.metal"] = source.emit(aligned)
    asked = problem("float16", 80, "causal()", "tiled")
    (launch,) = gated.plan(asked, "apple10").launches
    found["forward_tensorops_float16_d80_causal.metal"] = source.emit(launch.spec)
    score = as_score([softcap(30.0), bias(np.zeros((4, 1, 1000), np.float16)), alibi()])
    assert score is not None
    asked = replace(problem("float16", 64, "causal()", "tiled"), score=score.form.score)
    launches = metal_plan.plan(asked, "apple9", "forward").launches
    launches += metal_plan.plan(asked, "apple9", "backward", extra=("dinput0",)).launches
    for launch in launches:
        found[f"{launch.spec.kernel}_apple9_float16_d64_scored.metal"] = source.emit(launch.spec)
    return found


def triton() -> dict[str, str]:
    """Sources by the names of their files: every kernel, four architectures, all types."""
    found = {}
    for name, device, dtype, dim, mask, operation, form in (
        ("causal", "sm_90", "bfloat16", 128, "causal()", "forward", "tiled"),
        ("window", "sm_80", "float16", 80, "causal() & local(100)", "backward", "split"),
        ("full", "gfx942", "float32", 64, "full()", "backward", "fused"),
        ("causal", "sm_120", "float64", 77, "causal()", "forward", "decode"),
        ("window", "sm_80", "float64", 500, "causal() & local(100)", "backward", "split"),
    ):
        asked = problem(dtype, dim, mask, form, heads_kv=2)
        for launch in triton_plan.plan(asked, device, operation, form=form).launches:
            file = f"{launch.spec.kernel}_{device}_{dtype}_d{dim}_{name}.triton"
            found[file] = triton_source.emit(launch.spec)
    return found


METAL = Golden(DATA / "metal", ".metal", metal)
TRITON = Golden(DATA / "triton", ".triton", triton)


if __name__ == "__main__":
    for golden in (METAL, TRITON):
        golden.folder.mkdir(parents=True, exist_ok=True)
        for file in golden.files():
            (golden.folder / file).unlink()
        for file, text in golden.texts().items():
            (golden.folder / file).write_text(text, encoding="ascii")
