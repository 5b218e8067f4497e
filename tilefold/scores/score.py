"""The base of all modifications of scores, and modifications in order.

A modification knows no sizes. Bound to sizes it becomes a real expression of the score `s` and the
indices, as a rule of a mask becomes a truth: see `tilefold.masks.expression`. Float arrays that it
reads are `Input`s. A call takes a modification apart: its form, without arrays, is a part of the
key of every cache; the arrays travel with the call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, NoReturn

from tilefold.common.check import shown
from tilefold.common.computed import computed
from tilefold.masks.expression import Real, ScoreValue
from tilefold.masks.rule import Rule
from tilefold.masks.tables import Input

Renamed = Callable[[Input], Input]


class Sizes(NamedTuple):
    """The sizes of a problem that a modification meets; `heads` are those of the queries."""

    batch: int
    heads: int
    len_q: int
    len_k: int


class Score(ABC):
    """A modification of scores: what becomes of the score of a pair, whatever the sizes.

    >>> from tilefold import alibi, softcap
    >>> softcap(30.0) == softcap(30)
    True
    >>> InOrder((softcap(50.0), alibi()))
    [softcap(50), alibi()]
    """

    @abstractmethod
    def bind(self, s: Real, sizes: Sizes) -> Real:
        """The new score of a pair whose score is `s`; raises ValueError if it does not fit."""

    @abstractmethod
    def __repr__(self) -> str: ...

    def __eq__(self, other: object) -> bool:
        """True for the same structure and arrays: scores are frozen dataclasses."""
        return NotImplemented

    @computed
    def _hash(self) -> int:
        return hash(repr(self))

    def __hash__(self) -> int:
        return self._hash

    def _joined(self, other: Any) -> NoReturn:
        raise TypeError(
            f"scores have no arithmetic, got {self!r} and {shown(other)}: write several in order as"
            f" a list, [{self!r}, ...], or a formula as tilefold.score(function)"
        )

    __add__ = __radd__ = __sub__ = __mul__ = __rmul__ = __truediv__ = __and__ = __or__ = _joined

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: what was computed belongs to a process, or to its arrays."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]  # every score is a dataclass

    def renamed(self, rename: Renamed) -> Score:
        """The same modification with other inputs."""
        named = {}
        for field in fields(self):  # type: ignore[arg-type]  # every score is a dataclass
            value = getattr(self, field.name)
            if isinstance(value, Input):
                named[field.name] = rename(value)
        return changed_fields(self, named) if named else self

    @computed
    def inputs(self) -> tuple[Input, ...]:
        """The float arrays that a form reads, each once, by their numbers: all held ones have 0."""
        found: dict[int, Input] = {}

        def see(given: Input) -> Input:
            found[given.number] = given
            return given

        self.renamed(see)
        return tuple([found[number] for number in sorted(found)])

    @computed
    def form(self) -> Form:
        """The modification without its arrays, and the arrays in order of appearance."""
        return self.new_form()

    def new_form(self) -> Form:
        """The `form`, made anew: what a compiler traces is not to be changed."""
        arrays: list[Any] = []

        def rename(given: Input) -> Input:
            if given.held is None:
                return given
            for number, array in enumerate(arrays):
                if array is given.held:
                    return Input(number, given.dtype, given.shape)
            arrays.append(given.held)
            return Input(len(arrays) - 1, given.dtype, given.shape)

        return Form(self.renamed(rename), tuple(arrays))

    def expression(self, sizes: Sizes) -> Real:
        """The modification of `s` at these sizes."""
        return self.bind(ScoreValue(), sizes)


class Form(NamedTuple):
    """A modification whose inputs hold nothing, and the arrays that they stand for."""

    score: Score
    arrays: tuple[Any, ...]


def changed_fields(score: Any, named: dict[str, Any]) -> Any:
    """A copy of a frozen dataclass with other values of some fields, made without its checks."""
    copy = object.__new__(type(score))
    for field in fields(score):  # one by one: PyTorch's compiler before 2.12 knows no other way
        name = field.name
        object.__setattr__(copy, name, named[name] if name in named else getattr(score, name))
    return copy


@dataclass(frozen=True, repr=False)
class InOrder(Score):
    """Modifications one after the other: each takes what the one before has made."""

    scores: tuple[Score, ...]

    def bind(self, s: Real, sizes: Sizes) -> Real:
        """The last one's score."""
        for score in self.scores:
            s = score.bind(s, sizes)
        return s

    def renamed(self, rename: Renamed) -> Score:
        """The same modifications with other inputs."""
        return InOrder(tuple([score.renamed(rename) for score in self.scores]))

    def __repr__(self) -> str:
        return f"[{', '.join(map(repr, self.scores))}]"

    __hash__ = Score.__hash__


def as_score(score: Any) -> Score | None:
    """The modification of a `score` argument: one, several in order, or None.

    Raises TypeError for other values.
    """
    if score is None or isinstance(score, Score):
        return score
    if isinstance(score, (list, tuple)):
        parts = [as_score(part) for part in score]
        return InOrder(tuple([part for part in parts if part is not None])) if parts else None
    hint = "wrap a function as tilefold.score(function)"
    if hasattr(score, "shape"):
        hint = "wrap an array that is added as tilefold.bias(array)"
    elif isinstance(score, Rule):
        hint = "pass a rule as mask="
    elif isinstance(score, str):
        hint = "make a score of a string with tilefold.scores.parse.parse_score(string)"
    raise TypeError(f"score must be one such as tilefold.softcap(30), got {shown(score)}; {hint}")


def shape_text(given: Input) -> str:
    """An input as scores print it: `array[2x7]`."""
    return f"array[{'x'.join(map(str, given.shape))}]"
