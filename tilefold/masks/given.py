"""Rules whose arrays come with each call: taken apart into a form and the arrays.

The form has a number for each array, and is a part of every key. The arrays travel with the call,
as those of a score do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

from tilefold.masks.coordinates import Coordinates
from tilefold.masks.graph import ordered
from tilefold.masks.repeated import Repeated
from tilefold.masks.rule import Composed, Rule
from tilefold.masks.tables import Given

Renamed = Callable[[Given], Given]


class RuleForm(NamedTuple):
    """A rule that holds no traced array, and the arrays that it stands for, by their numbers."""

    rule: Rule
    arrays: tuple[Any, ...]


def form_of(rule: Rule) -> RuleForm:
    """The rule without its traced arrays, and these arrays, each once."""
    arrays: list[Any] = []
    numbers: dict[int, int] = {}

    def rename(given: Given) -> Given:
        if given.held is None:
            return given
        number = numbers.setdefault(id(given.held), len(arrays))
        if number == len(arrays):
            arrays.append(given.held)
        return Given(given.shape, given.dtype, given.low, given.high, number)

    if not given_of(rule):
        return RuleForm(rule, ())
    return RuleForm(renamed(rule, rename), tuple(arrays))


def given_of(rule: Rule) -> tuple[Given, ...]:
    """The tables of a rule that come with each call."""
    found: list[Given] = []

    def see(given: Given) -> Given:
        found.append(given)
        return given

    for part, _ in ordered(rule):
        if not isinstance(part, Composed):
            _changed(part, see)
    return tuple(found)


class Operand(NamedTuple):
    """What a rule says of an array that comes with each call; a shape of None may be any."""

    dtype: str
    shape: tuple[int, ...] | None


def operands_of(rule: Rule) -> dict[int, Operand]:
    """The arrays that come with each call, by number.

    Rules that are repeated over batches insist on shapes: an array may have an axis of copies.
    """
    found: dict[int, Operand] = {}
    for part, _ in ordered(rule):
        if isinstance(part, Repeated):
            inner = {
                table.number: Operand(table.dtype, table.shape) for table in given_of(part.rule)
            }
            inner |= {
                n: each for n, each in operands_of(part.rule).items() if each.shape is not None
            }
            for number, (dtype, shape) in inner.items():
                copies = (part.copies,) if number in part.own else ()
                found[number] = Operand(dtype, (*copies, *(shape or ())))
        elif not isinstance(part, Composed):
            found |= {table.number: Operand(table.dtype, None) for table in given_of(part)}
    return found


def renamed(rule: Rule, rename: Renamed) -> Rule:
    """The same rule with other tables of those that come with each call."""
    made: dict[int, Rule] = {}
    for part, children in ordered(rule):
        if isinstance(part, Composed):
            below = tuple([made[id(child)] for child in children])
            made[id(part)] = part.made(part.label, below)
        else:
            made[id(part)] = _changed(part, rename)
    return made[id(rule)]


def _changed(rule: Any, rename: Renamed) -> Any:
    """A rule that is not made of others, or coordinates, with other tables."""
    named = {}
    for field in fields(rule) if is_dataclass(rule) else ():
        value = getattr(rule, field.name)
        if isinstance(value, Given):
            named[field.name] = rename(value)
        elif isinstance(value, Coordinates):
            named[field.name] = _changed(value, rename)
    return replace(rule, **named) if named else rule
