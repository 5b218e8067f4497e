"""A few emitted sources of every GPU backend, kept so that a change of them is seen in review."""

from __future__ import annotations

import pytest
from golden import METAL, TRITON, Golden

SOURCES = [
    pytest.param(golden, file, source, id=file)
    for golden in (METAL, TRITON)
    for file, source in golden.texts().items()
]


@pytest.mark.parametrize(("golden", "file", "source"), SOURCES)
def test_a_change_of_source_is_seen_in_review(golden: Golden, file: str, source: str) -> None:
    message = f"{file} changed: look at it, then python tests/support/golden.py"
    assert source == golden.kept(file), message


@pytest.mark.parametrize("golden", [METAL, TRITON], ids=["metal", "triton"])
def test_no_source_is_kept_that_nobody_emits(golden: Golden) -> None:
    assert golden.files() == set(golden.texts())
