"""The options of a call of attention, beside the arrays: mask, scale, layout, score, and others.

A `Request` is made and checked once, where a call enters. From there it travels as one value. It is
a part of the key of every cache, and the one option of PyTorch's operators. A new option of
attention becomes a field of `Request`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

from tilefold.common.check import choice, shown, whole
from tilefold.masks.position_rules import Rule, full
from tilefold.problems.dropout import check_probability
from tilefold.scores.score import Score

# The positions of the canonical axes (batch, heads, sequence, dim) in each layout. Each permutation
# is its own inverse, so it also says which canonical axis each axis of the layout is.
LAYOUTS: Final[dict[str, tuple[int, int, int, int]]] = {
    "bhnd": (0, 1, 2, 3),
    "bnhd": (0, 2, 1, 3),
    "bhdn": (0, 1, 3, 2),
}

PRECISIONS: Final = ("highest", "high", "medium")
"""The precisions of products of float32 arrays; the words mean the same as in torch's setting."""

_FULL = full()


@dataclass(frozen=True, init=False)
class Request:
    """The checked options of a call; equal requests ask for the same.

    >>> from tilefold import causal
    >>> Request(causal(), 1) == Request(causal(), 1.0)
    True
    >>> Request()
    Request(mask=full(), scale=None, layout='bhnd', precision='highest', score=None, sinks=0, \
dropout=0.0)

    Raises TypeError or ValueError for options that `tilefold.attention` does not allow. The newest
    requests are kept, so that a repeated call finds its request and the hash computed before.
    """

    mask: Rule
    """The rule that says which query sees which key."""
    scale: float | None
    """The factor of the scores; None means 1 / sqrt(dim)."""
    layout: str
    """The order of the arrays' axes: see `LAYOUTS`."""
    precision: str
    """The least precision of products of float32 arrays: see `PRECISIONS`."""
    score: Score | None
    """The form of the modification of scores, without its arrays; None without one."""
    sinks: int
    """The number of sinks of each head."""
    dropout: float
    """The probability that a weight is dropped."""
    _hash: int = field(repr=False, compare=False)

    def __new__(
        cls,
        mask: Rule | None = None,
        scale: float | None = None,
        layout: str = "bhnd",
        precision: str = "highest",
        score: Score | None = None,
        sinks: int = 0,
        dropout: float = 0.0,
    ) -> Request:
        """The request of these options, as `tilefold.attention` takes them.

        But `score` is a form without arrays, and `sinks` is a number.
        """
        if scale is not None and type(scale) is not float:
            scale = as_scale(scale)
        try:
            return _kept(mask, scale, layout, precision, score, sinks, dropout)
        except TypeError:  # an option has no hash or is not allowed: the checks name it
            return _made(mask, scale, layout, precision, score, sinks, dropout)

    def __hash__(self) -> int:
        return self._hash

    def changed(self, **options: Any) -> Request:
        """The request with other values of some options.

        >>> Request(scale=2, sinks=1).changed(sinks=0) == Request(scale=2)
        True
        """
        return Request(*[options.get(name, getattr(self, name)) for name in OPTIONS])

    def __reduce__(self) -> tuple[Any, ...]:
        """Make a copy as the first one was made, with the hash of its own process."""
        return Request, tuple([getattr(self, name) for name in OPTIONS])


OPTIONS = ("mask", "scale", "layout", "precision", "score", "sinks", "dropout")
"""The options in the order in which `Request` takes them."""


def _made(
    mask: Any,
    scale: float | None,
    layout: Any,
    precision: Any,
    score: Score | None,
    sinks: int,
    dropout: float,
) -> Request:
    """A new request; `scale` is a float or None. Raises TypeError or ValueError."""
    rule = as_rule(mask)
    if scale is not None:
        check_scale(scale)
    check_layout(layout)
    check_precision(precision)
    whole("sinks", sinks, 0)
    chance = check_probability(dropout)
    request = object.__new__(Request)
    request.__dict__.update(
        mask=rule,
        scale=scale,
        layout=layout,
        precision=precision,
        score=score,
        sinks=sinks,
        dropout=chance,
        _hash=hash((rule, scale, layout, precision, score, sinks, chance)),
    )
    return request


# Typed, since a str of a subclass equals a layout. Few, because masks may hold arrays.
_kept = lru_cache(maxsize=16, typed=True)(_made)


def as_rule(mask: Any) -> Rule:
    """The rule of a `mask` argument; None means full(). Raises TypeError unless it is a rule."""
    if mask is None:
        return _FULL
    if isinstance(mask, Rule):
        return mask
    hint = "write tilefold.rule(function) or combine tilefold's rules with & | ~"
    if hasattr(mask, "shape") or isinstance(mask, (list, tuple)):
        hint = "wrap an array of bool as tilefold.dense(array)"
    elif isinstance(mask, str):
        hint = "make a rule of a string with tilefold.masks.parse.parse(string)"
    elif callable(mask):
        from tilefold.masks.parse import RULES

        made = RULES.get(getattr(mask, "__name__", "")) is mask
        hint = f"call it: {mask.__name__}(...)" if made else "wrap it: tilefold.rule(function)"
    raise TypeError(f"mask must be a rule such as tilefold.causal(), got {shown(mask)}; {hint}")


def as_scale(scale: Any) -> float | None:
    """The value of a `scale` argument. Raises TypeError unless it is None or a number."""
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
