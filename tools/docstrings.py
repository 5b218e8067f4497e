"""An extension of griffe for the API page: docstrings as they are written here, turned to Markdown.

Markdown would take an example's `>>>` for a quotation and join the lines of a list of arguments. An
example reaches from its first `>>>` to the next empty line, as doctest reads it; a section is a
line such as `Arguments:` and the indented lines below it.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"(Arguments|Returns|Raises):$")
ENTRY = re.compile(r" {4}([\w, ]+): (.*)")


class DocstringsToMarkdown(griffe.Extension):
    """Rewrites every docstring that griffe finds, and hides parameters as `help()` does."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
        if isinstance(obj, griffe.Function):  # see `without_unknown` in problems/keywords.py
            shown = [each for each in obj.parameters if each.name != "unknown"]
            obj.parameters = griffe.Parameters(*shown)


def markdown(text: str) -> str:
    """The docstring with its examples fenced and its sections as lists."""
    lines: list[str] = []
    kind = "text"
    for line in [*text.splitlines(), ""]:
        if kind == "text" and line.startswith(">>>"):
            lines.append("```pycon")
            kind = "example"
        elif kind == "example" and not line.strip():
            lines.append("```")
            kind = "text"
        elif section := SECTION.match(line):
            lines += [f"**{section[1]}**", ""]
            kind = "section"
            continue
        elif kind == "section" and not line.startswith(" "):
            kind = "text"
        if kind == "section":
            line = _item(line)
        lines.append(line)
    return "\n".join(lines[:-1])


def _item(line: str) -> str:
    """A line of a section: the beginning of an entry, what continues it, or plain text."""
    if entry := ENTRY.match(line):
        return f"- `{entry[1]}`: {entry[2]}"
    return f"  {line.strip()}" if line.startswith(" " * 5) else line.strip()
