"""The names in a mask as Triton source. `test_mask_source.py` has what all languages do."""

from __future__ import annotations

import ast

from mask_sources import Triton, chain


def test_mask_source_names_what_is_used_often() -> None:
    text = Triton().source(chain(), 32)
    function = next(
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name == "visible"
    )
    names = [node.targets[0].id for node in function.body if isinstance(node, ast.Assign)]  # type: ignore[attr-defined]  # names alone are assigned
    assert len(names) == len(set(names))
    assert "truth" in text and "number" not in "".join(names[:1])
