"""Copies of frozen values with other fields, where a call counts microseconds."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


def changed(value: T, **fields: Any) -> T:
    """A copy of a frozen dataclass with other fields, which are not checked.

    `dataclasses.replace` checks them, and takes 5 us for ten fields where this takes 1.
    """
    copy = object.__new__(type(value))
    copy.__dict__.update(value.__dict__, **fields)
    return copy
