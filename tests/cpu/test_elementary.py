"""Functions of real numbers in modified scores: right over the whole range of their type."""

from __future__ import annotations

import pytest
from elementary import check_functions

pytestmark = pytest.mark.slow  # kernels are compiled


def test_functions_are_right_for_all_numbers() -> None:
    check_functions()
