"""Checks of single arguments. An error names the argument, its value and what is allowed."""

from __future__ import annotations

import numbers
import operator
from typing import Any

import numpy as np


def whole(name: str, value: Any, least: int) -> int:
    """The value as an int. Raises unless it is an integer of at least `least`.

    >>> whole("window", 0, 1)
    Traceback (most recent call last):
    ValueError: window must be an integer >= 1, got 0
    """
    if isinstance(value, bool):
        raise TypeError(_no_whole(name, value, least))
    number: int = value
    if not isinstance(value, int):
        try:
            number = operator.index(value)
        except Exception:
            raise TypeError(_no_whole(name, value, least)) from None
    if number < least:  # a compiler that traces it knows no text of a number
        raise ValueError(_no_whole(name, value, least))
    return number


def _no_whole(name: str, value: Any, least: int) -> str:
    return f"{name} must be an integer >= {least}, got {shown(value)}"


def flag(name: str, value: Any) -> bool:
    """The value as a bool. Raises TypeError unless it is True or False, of Python or of NumPy.

    >>> flag("causal", 1)
    Traceback (most recent call last):
    TypeError: causal must be True or False, got 1
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def number(name: str, value: Any) -> float:
    """The value as a float. Raises TypeError unless it is a real number, of Python or of NumPy.

    >>> number("alpha", "1")
    Traceback (most recent call last):
    TypeError: alpha must be a number, got '1'
    """
    real = isinstance(value, (numbers.Real, np.generic)) and not isinstance(value, (bool, np.bool_))
    try:
        return float(value if real else None)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {shown(value)}") from None
    except OverflowError:
        raise ValueError(f"{name} must fit in float64, got {shown(value)}") from None


def choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raises ValueError unless the value is an allowed one.

    >>> choice("align", "front", ("end", "start"))
    Traceback (most recent call last):
    ValueError: align must be 'end' or 'start', got 'front'
    >>> choice("backend", "gpu", ("cpu",))
    Traceback (most recent call last):
    ValueError: backend must be 'cpu', got 'gpu'
    """
    if not any(
        value is option or (type(value) is type(option) and value == option) for option in allowed
    ):
        *head, tail = map(repr, allowed)
        known = f"{', '.join(head)} or {tail}" if head else tail
        raise ValueError(f"{name} must be {known}, got {shown(value)}")


def shown(value: Any, width: int = 60) -> str:
    """The value in one short line.

    >>> shown(list(range(99)), 12)
    '[0, 1, 2,...'
    """
    return shorten(repr(value), width)


def shorten(text: str, width: int) -> str:
    """A text as one line of at most `width` characters.

    >>> shorten("one line\\nand another", 12)
    'one line ...'
    """
    line = one_line(text)
    return line if len(line) <= width else f"{line[: width - 3]}..."


def one_line(value: object) -> str:
    """A text, or the message of an error, as one line.

    >>> one_line(ValueError("two\\n  lines"))
    'two lines'
    """
    return " ".join(str(value).split())
