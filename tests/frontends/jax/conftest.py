"""Tests with JAX: types of 64 bits where a test asks for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from jaxed import jax


@pytest.fixture
def x64() -> Iterator[None]:
    """Types of 64 bits, which JAX has only on request."""
    with jax.enable_x64(True):
        yield
