"""The output of commands: tables that fit 80 columns, numbers with three digits, JSON for programs.

Results go to the standard output. Progress and notes go to the standard error, so that results can
be piped. Without a terminal nothing moves and nothing is coloured.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from rich.console import Console, Group
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

__all__ = [
    "EXIT_CODES",
    "Failure",
    "Parser",
    "digits",
    "escape",
    "facts",
    "grid",
    "notes",
    "out",
    "print_json",
    "progress",
    "rate",
    "seconds",
    "shorten",
    "size",
    "table",
]

EXIT_CODES = "exit codes: 0 success, 1 a check failed, 2 bad input, 130 interrupted"


class Failure(Exception):
    """A check of a command failed; the program ends with exit code 1."""


class Parser(argparse.ArgumentParser):
    """A parser that reports bad usage in one line on the standard error, with exit code 2.

    It names the nearest option, command or choice where a word is mistyped.
    """

    def error(self, message: str) -> NoReturn:
        """See `argparse.ArgumentParser.error`."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """See `argparse.ArgumentParser.parse_known_args`; unknown arguments are errors."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            hint = _nearest(rest[0].partition("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        return found, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            hint = _nearest(str(value), map(str, action.choices or ()))
            raise argparse.ArgumentError(action, f"{error.message}{hint}") from None


def _nearest(word: str, known: Iterable[str]) -> str:
    """The question that names the nearest of the known words; nothing if none is near."""
    near = difflib.get_close_matches(word, [*known], 1)
    return f"; did you mean {near[0]}?" if near else ""


def out() -> Console:
    """The console that shows results."""
    return Console(highlight=False, soft_wrap=False)


def notes() -> Console:
    """The console that shows progress and remarks."""
    return Console(stderr=True, highlight=False)


def progress() -> Progress:
    """A bar with a description, a count and the time; silent without a terminal."""
    console = notes()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def print_json(value: Any) -> None:
    """Print one JSON document on the standard output."""
    json.dump(value, sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Group:
    """A title and a table without a frame; columns named `>...` are aligned to the right."""
    made = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        justify = "right" if column.startswith(">") else "left"
        made.add_column(
            column.removeprefix(">"),
            justify=justify,  # type: ignore[arg-type]  # rich wants a literal
            header_style="dim",
            overflow="fold",
            no_wrap=number > 0,
        )
    for row in rows:
        made.add_row(*row)
    return Group(f"[bold]{escape(title)}[/]", made)


def grid() -> Table:
    """Columns side by side without a header; the last one takes the remaining width."""
    made = Table.grid(padding=(0, 2, 0, 0))
    made.add_column(justify="right", style="bold", no_wrap=True)
    made.add_column(style="cyan", no_wrap=True)
    made.add_column(ratio=1)
    return made


def facts() -> Table:
    """A table of facts, each with a name and a value."""
    made = Table.grid(padding=(0, 2, 0, 0))
    made.add_column(style="bold", no_wrap=True, min_width=10)
    made.add_column(ratio=1, overflow="fold")
    return made


def shorten(text: str, letters: int) -> str:
    """The beginning of a text, cut at a space, safe to print."""
    return escape(textwrap.shorten(text, letters, placeholder=" ..."))


def seconds(value: float) -> str:
    """A time with its unit: `4.21 ms`."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * factor >= 1:
            return f"{digits(value * factor)} {unit}"
    return f"{digits(value * 1e9)} ns"


def rate(per_second: float, unit: str) -> str:
    """Billions or millions per second: `412 GFLOP/s`."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if per_second >= factor:
            return f"{digits(per_second / factor)} {prefix}{unit}/s"
    return f"{digits(per_second)} {unit}/s"


def size(number_bytes: float) -> str:
    """Bytes with a binary unit: `1.50 MiB`."""
    for factor, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if number_bytes >= factor:
            return f"{digits(number_bytes / factor)} {unit}"
    return f"{int(number_bytes)} bytes"


def digits(value: float) -> str:
    """Three significant digits, never in powers of ten: `4.21`, `42.1`, `421`, `4210`."""
    for limit, places in ((10, 2), (100, 1)):
        if abs(value) < limit:
            return f"{value:.{places}f}"
    return f"{value:,.0f}"
