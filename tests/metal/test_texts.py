"""How emitted Metal sources read, and the examples of the page on Apple GPUs."""

from __future__ import annotations

import doctest
import itertools
import re
from collections.abc import Iterator
from dataclasses import replace

import ml_dtypes  # noqa: F401  # NumPy knows the name "bfloat16" from it
import numpy as np
import pytest
from golden import METAL
from metal import FAMILIES, needs, tensor_plan
from paths import ROOT

import tilefold
from tilefold import bias, relative_bias, softcap
from tilefold.backends.metal import families
from tilefold.backends.metal.dispatch import WIDEST_MOVE
from tilefold.backends.metal.emulator import signature
from tilefold.backends.metal.emulator.fault import Fault
from tilefold.backends.metal.kernels import tensorops
from tilefold.backends.metal.kernels.fragment import TYPES
from tilefold.backends.metal.matmul import gemm, rows
from tilefold.backends.metal.matmul.calls import block_sizes
from tilefold.backends.metal.matmul.rows import SIMDGROUPS, SoftmaxSpec
from tilefold.backends.metal.matmul.spec import GemmSpec
from tilefold.backends.metal.plan import plan
from tilefold.backends.metal.source import emit
from tilefold.measuring.metal_selftest import LARGE, MASKS
from tilefold.problems.attention import Problem

PAGE = ROOT / "docs" / "metal.md"
TEXTS = METAL.texts()


@pytest.mark.parametrize("file", TEXTS)
def test_a_text_reads_as_if_a_person_wrote_it(file: str) -> None:
    """It opens with its algorithm, is indented by its blocks, and names all that it declares."""
    text = TEXTS[file]
    assert re.match(r"// Attention[^\n]*\n//\n// \w", text)
    depth, before = 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        code = line.split("//")[0]
        inside = depth - code.startswith("}" if depth == 0 else 4 * (depth - 1) * " " + "}")
        if code.strip() and not code.lstrip().startswith("device") and "constant" not in code:
            wraps = code.startswith((" " * 27, "    uint3", "    ushort")) and depth == 0
            wraps = wraps or before.endswith(("(", ",", "<"))
            assert wraps or len(code) - len(code.lstrip()) == 4 * inside, f"line {number}: {line}"
        before = code
        depth += code.count("{") - code.count("}")
    assert depth == 0
    for name in re.findall(r"const \w+ (\w+) =", text):
        assert len(re.findall(rf"\b{name}\b", text)) > 1, f"{name} is declared and never used"


def every_text() -> Iterator[str]:
    """What `tilefold doctor --metal` compiles: every kernel, family, type and kind of head."""
    yield tensorops.probe()
    for family, dtype in itertools.product(FAMILIES, TYPES):
        specs = []
        for dim, dim_v, len_q, len_k, mask in LARGE:
            shapes = (2, 4, len_q, dim), (2, 2, len_k, dim), (2, 2, len_k, dim_v)
            problem = Problem.of(*shapes, dtype=dtype, mask=MASKS[mask]())
            plans = [plan(problem, family, "forward", form=form) for form in ("tiled", "decode")]
            for made in (*plans, plan(problem, family, "backward"), tensor_plan(problem)):
                specs += [launch.spec for launch in made.launches]
        score = [
            softcap(2.0),
            bias(np.zeros((4, 1, 90), dtype)),
            relative_bias(np.zeros((4, 32), dtype)),
        ]
        scored = Problem.of((2, 4, 70, 40), (2, 2, 90, 40), dtype=dtype, score=score, sinks=2)
        specs += [launch.spec for launch in plan(scored, family, "forward").launches]
        extra = ("dsinks", "dinput0", "dinput1")
        specs += [launch.spec for launch in plan(scored, family, "backward", extra=extra).launches]
        for n, spec in enumerate(specs):
            several = n % 2 and spec.dim % WIDEST_MOVE == spec.dim_v % WIDEST_MOVE == 0
            yield emit(replace(spec, vector=WIDEST_MOVE if several else 1))
        one = families.family(family)
        blocks = block_sizes(one.staged, dtype, 70, 90)
        yield gemm.emit(GemmSpec(dtype, dtype, dtype, blocks, one.staged, one.bfloat))
        for shared in (1, SIMDGROUPS):
            yield rows.emit(SoftmaxSpec(dtype, shared, one.bfloat, lse=True))


@pytest.mark.slow
def test_no_text_holds_what_apples_compiler_makes_wrong_code_of() -> None:
    """A promise of one simdgroup, and elements of a fragment by an index at run time."""
    texts = set(every_text())
    assert len(texts) > 150
    promises = set()
    for text in texts:
        signature.check_text(text)
        promises |= set(re.findall(r"max_total_threads_per_threadgroup\((\d+)\)", text))
    assert promises and min(map(int, promises)) == 64
    assert sum("c % 2 ?" in text for text in texts) > 50, "pairs that are added one by one"


@pytest.mark.parametrize(
    ("index", "loop"),
    [
        ("c % 2", ""),
        ("e", "for (ushort e = 0; e < 2; ++e)"),
        ("e", "#pragma clang loop unroll(full)\nfor (ushort e = 0; e < n; ++e)"),
        ("e", "#pragma clang loop unroll(full)\nfor (ushort c = 0; c < 2; ++c)"),
    ],
)
def test_an_element_by_an_index_at_run_time_is_refused(index: str, loop: str) -> None:
    line = f"{loop} x.thread_elements()[{index}] = 0.0f;"
    with pytest.raises(Fault, match=r"refused: .*thread_elements.*: an index at run time: take 0,"):
        signature.check_text(line)


@pytest.mark.slow
def test_the_examples_of_the_page() -> None:
    needs()
    text = PAGE.read_text(encoding="utf-8")
    examples = doctest.DocTestParser().get_doctest(text, {"tilefold": tilefold}, PAGE.name, None, 0)
    assert len(examples.examples) > 10
    runner = doctest.DocTestRunner()
    runner.run(examples)
    assert not runner.failures
