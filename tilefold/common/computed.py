"""Properties that are computed once.

`functools.cached_property` does the same. But before Python 3.12 it holds one lock for all
instances meanwhile, and a child that is forked then would wait for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class computed(Generic[Value]):  # a decorator, as `property` is
    """A property that is computed at its first use and then kept in the instance.

    >>> class Square:
    ...     side = 3
    ...
    ...     @computed
    ...     def area(self) -> int:
    ...         print("computing")
    ...         return self.side**2
    >>> square = Square()
    >>> square.area + square.area
    computing
    18
    """

    def __init__(self, compute: Callable[[Any], Value]) -> None:
        self._compute = compute
        self._name = compute.__name__
        self.__doc__ = compute.__doc__

    def __get__(self, instance: Any, owner: type) -> Value:
        """The value; Python asks here until the instance has it."""
        value: Value = self._compute(instance)
        instance.__dict__[self._name] = value
        return value
