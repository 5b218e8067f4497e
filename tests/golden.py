"""A few emitted texts, kept beside the tests so that a change of them is seen in review.

`python tests/golden.py` writes them anew.
"""

from __future__ import annotations

from pathlib import Path

from tilefold.backends.metal import gated, source
from tilefold.backends.metal.plan import plan
from tilefold.parse import parse
from tilefold.problem import Problem

FOLDER = Path(__file__).parent / "data" / "metal"


def texts() -> dict[str, str]:
    """Texts by the names of their files: every kernel, both families, all types, four masks."""
    found = {}
    for name, family, dtype, dim, mask, operation, form in (
        ("causal", "apple9", "float16", 64, "causal()", "forward", "tiled"),
        ("paged", "apple7", "float32", 77, "full()", "forward", "tiled"),
        ("window", "apple7", "bfloat16", 80, "causal() & local(100)", "backward", "auto"),
        ("chunked", "apple9", "bfloat16", 128, "chunked(64) | prefix(4)", "backward", "auto"),
        ("causal", "apple9", "float16", 128, "causal()", "forward", "decode"),
    ):
        queries = 1 if form == "decode" else 1000
        shapes = (1, 4, queries, dim), (1, 4, 1000, dim)
        problem = Problem.of(*shapes, dtype=dtype, mask=parse(mask))
        for launch in plan(problem, family, operation, form=form).launches:
            file = f"{launch.spec.operation}_{family}_{dtype}_d{dim}_{name}.metal"
            found[file] = source.emit(launch.spec)
    problem = Problem.of((1, 4, 1000, 80), dtype="float16", mask=parse("causal()"))
    (launch,) = gated.plan(problem, "apple10").launches
    found["forward_tensorops_float16_d80_causal.metal"] = source.emit(launch.spec)
    return found


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for file in FOLDER.glob("*.metal"):
        file.unlink()
    for file, text in texts().items():
        (FOLDER / file).write_text(text, encoding="ascii")
