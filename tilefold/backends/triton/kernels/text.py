"""Lines and blocks of Triton's Python."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

WIDTH = 100
"""Characters in a line; lists of names are broken there."""

ELEMENTS = {
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float64": "fp64",
    "int32": "i32",
    "int64": "i64",
    "int8": "i8",
    "uint8": "u8",
}
"""Triton's short names of types, as signatures have them."""


class Text:
    """A text that grows line by line, indented by the blocks that are open."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._depth = 0

    def __call__(self, *lines: str) -> None:
        """Add lines; one with line breaks is several."""
        for line in "\n".join(lines).split("\n"):
            self._lines.append("    " * self._depth + line if line else "")

    def note(self, *lines: str) -> None:
        """Add comments."""
        self(*(f"# {line}".rstrip() for line in lines))

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        """A block under its head, such as `for x in y`."""
        self(f"{head}:")
        self._depth += 1
        yield
        self._depth -= 1

    def listed(self, head: str, names: Sequence[str], end: str) -> None:
        """Names between a head and an end, as many to a line as fit."""
        line = "    "
        self(head)
        for name in names:
            if len(line) + len(name) + 1 > WIDTH:
                self(line.rstrip())
                line = "    "
            line += f"{name}, "
        if line.strip():
            self(line.rstrip())
        self(end)

    def __str__(self) -> str:
        return "\n".join(self._lines) + "\n"
