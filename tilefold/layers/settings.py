"""Rules and scores as strings, as `get_config` keeps them, and read again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tilefold.masks.parse import parse
from tilefold.masks.position_rules import Rule
from tilefold.problems.request import as_rule
from tilefold.scores.parse import parse_score
from tilefold.scores.score import Score, as_score


def rule_of(mask: Rule | str | None) -> Rule | None:
    """The rule of an argument `mask`. Raises TypeError or ValueError for what is none."""
    if mask is None or isinstance(mask, str):
        return None if mask is None else parse(mask)
    return as_rule(mask)


def score_of(score: Score | Sequence[Score] | str | None) -> Score | None:
    """The score of an argument `score`. Raises TypeError or ValueError for what is none."""
    return parse_score(score) if isinstance(score, str) else as_score(score)


def text_of(name: str, value: Rule | Score | None) -> str | None:
    """A rule or a score as a string that is read as an equal one.

    Raises ValueError where there is none: it carries arrays.
    """
    if value is None:
        return None
    read: Callable[[str], Any] = parse if isinstance(value, Rule) else parse_score
    try:
        equal = read(str(value)) == value
    except (TypeError, ValueError):
        equal = False
    if not equal:
        raise ValueError(
            f"{name} must have a string to be saved, and {value} carries arrays; give the layer"
            f" a {name} without arrays, or make the arrays part of each call"
        )
    return str(value)
