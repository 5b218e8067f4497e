"""What a caller asks of attention beside the arrays: mask, scale, layout and precision.

A `Request` is made and checked once, where a call enters. From there it travels as one value: it is
a part of every key under which something is kept, and the one option of PyTorch's operators. A new
option of attention becomes a field here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

from tilefold.common.check import choice, shown
from tilefold.masks.position_rules import Rule, full

# Where the canonical axes (batch, heads, sequence, dim) stand in each layout, and, each being its
# own inverse, which canonical axis each axis of the layout is.
LAYOUTS: Final[dict[str, tuple[int, int, int, int]]] = {
    "bhnd": (0, 1, 2, 3),
    "bnhd": (0, 2, 1, 3),
    "bhdn": (0, 1, 3, 2),
}

PRECISIONS: Final = ("highest", "high", "medium")
"""How exact the products of float32 arrays are, with the meaning of torch's own setting."""

_FULL = full()


@dataclass(frozen=True, init=False)
class Request:
    """The options of a call, checked: equal requests ask for the same.

    >>> from tilefold import causal
    >>> Request(causal(), 1) == Request(causal(), 1.0)
    True
    >>> Request()
    Request(mask=full(), scale=None, layout='bhnd', precision='highest')

    Raises TypeError or ValueError for what `tilefold.attention` does not allow. The newest requests
    are kept, so that a repeated call finds its own with the hash that was computed once.
    """

    mask: Rule
    """Which query sees which key."""
    scale: float | None
    """The factor of the scores; None is 1 / sqrt(dim)."""
    layout: str
    """The order of the arrays' axes: see `LAYOUTS`."""
    precision: str
    """How exact products of float32 are at least: see `PRECISIONS`."""
    _hash: int = field(repr=False, compare=False)

    def __new__(
        cls,
        mask: Rule | None = None,
        scale: float | None = None,
        layout: str = "bhnd",
        precision: str = "highest",
    ) -> Request:
        """The request of these options, as `tilefold.attention` takes them."""
        if scale is not None and type(scale) is not float:
            scale = as_scale(scale)
        try:
            return _kept(mask, scale, layout, precision)
        except TypeError:  # something has no hash, or is wrong in a way that is now named
            return _made(mask, scale, layout, precision)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is made as the first one was, with the hash of its own process."""
        return Request, (self.mask, self.scale, self.layout, self.precision)


def _made(mask: Any, scale: float | None, layout: Any, precision: Any) -> Request:
    """A new request of options whose scale has its type. Raises TypeError or ValueError."""
    rule = as_rule(mask)
    if scale is not None:
        check_scale(scale)
    check_layout(layout)
    check_precision(precision)
    request = object.__new__(Request)
    request.__dict__.update(
        mask=rule,
        scale=scale,
        layout=layout,
        precision=precision,
        _hash=hash((rule, scale, layout, precision)),
    )
    return request


# Typed: a str that is no plain one equals a layout. Few: the masks may hold arrays.
_kept = lru_cache(maxsize=16, typed=True)(_made)


def as_rule(mask: Any) -> Rule:
    """The rule of a `mask` argument, None being full(). Raises TypeError for what is no rule."""
    if mask is None:
        return _FULL
    if isinstance(mask, Rule):
        return mask
    hint = "write tilefold.rule(function) or combine tilefold's rules with & | ~"
    if hasattr(mask, "shape") or isinstance(mask, (list, tuple)):
        hint = "wrap an array of bool as tilefold.dense(array)"
    raise TypeError(f"mask must be a rule such as tilefold.causal(), got {shown(mask)}; {hint}")


def as_scale(scale: Any) -> float | None:
    """The value of a `scale` argument. Raises TypeError for what is neither None nor a number."""
    if scale is None or type(scale) is float:
        return scale
    try:
        if isinstance(scale, (str, bytes, bool)):
            raise TypeError
        return float(scale)
    except (TypeError, ValueError, OverflowError):
        allowed = "a finite number, or None for 1 / sqrt(dim)"
        raise TypeError(f"scale must be {allowed}, got {shown(scale)}") from None


def check_scale(scale: float) -> None:
    """Raises ValueError for a scale that is infinite or NaN."""
    if not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale}")


def check_layout(layout: Any) -> None:
    """Raises ValueError for a layout that is not one of `LAYOUTS`."""
    if type(layout) is not str or layout not in LAYOUTS:
        choice("layout", layout, tuple(LAYOUTS))


def check_precision(precision: Any) -> None:
    """Raises ValueError for a precision that is not one of `PRECISIONS`."""
    if type(precision) is not str or precision not in PRECISIONS:
        choice("precision", precision, PRECISIONS)
