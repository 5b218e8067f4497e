"""How emitted Metal sources read, and the examples of the page on Apple GPUs."""

from __future__ import annotations

import doctest
import re

import pytest
from golden import METAL
from metal import needs
from paths import ROOT

import tilefold

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


@pytest.mark.slow
def test_the_examples_of_the_page() -> None:
    needs()
    text = PAGE.read_text(encoding="utf-8")
    examples = doctest.DocTestParser().get_doctest(text, {"tilefold": tilefold}, PAGE.name, None, 0)
    assert len(examples.examples) > 10
    runner = doctest.DocTestRunner()
    runner.run(examples)
    assert not runner.failures
