"""How emitted Triton sources read."""

from __future__ import annotations

import ast

import pytest
from golden import TRITON

TEXTS = TRITON.texts()


@pytest.mark.parametrize("file", TEXTS)
def test_a_text_is_python_that_opens_with_its_algorithm(file: str) -> None:
    tree = ast.parse(TEXTS[file])
    words = ast.get_docstring(tree, clean=False)
    assert words and words.startswith("Attention") and "\n\n    " in words
    assert max(map(len, TEXTS[file].splitlines())) <= 140
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    called = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    (entry,) = (name for name in defined if name.startswith("tilefold_"))
    assert defined - called == {entry}, "a function that nobody calls"
