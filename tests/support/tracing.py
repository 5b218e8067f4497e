"""Arrays that look traced: as those of JAX do while a function is compiled."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest


class Tracer:
    """An array without values for rules and scores; `array` is what comes with the call."""

    def __init__(self, array: Any) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype


@pytest.fixture
def tracing(monkeypatch: pytest.MonkeyPatch) -> type[Tracer]:
    """The class of arrays that are taken for traced ones."""
    monkeypatch.setitem(sys.modules, "jax.core", SimpleNamespace(Tracer=Tracer))
    return Tracer
