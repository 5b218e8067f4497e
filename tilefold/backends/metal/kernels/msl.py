"""Metal Shading Language as text: lines and blocks, and how numbers lie in memory and registers.

Text is ASCII, since `torch.mps.compile_shader` takes nothing else. What is written here compiles
as it stands; whoever reads it should not see that a program wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

UNROLL = "#pragma clang loop unroll(full)"

WIDEN = """
// bfloat16 is the upper half of a float. GPUs before Apple9 emulate it, slower than this.
static inline float widen(const ushort bits) {
    return as_type<float>(uint(bits) << 16);
}

// To the nearest, ties to even; a NaN stays one.
static inline ushort narrow(const float x) {
    const uint bits = as_type<uint>(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return ushort((bits >> 16) | 0x40u);
    }
    return ushort((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
""".strip()


class Text:
    """The text of a kernel on its way.

    >>> text = Text()
    >>> with text.block("if (x)"):
    ...     text("y = 1;")
    >>> print(text)
    if (x) {
        y = 1;
    }
    """

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._depth = 0

    def __call__(self, *lines: str) -> None:
        """Add lines at the present depth; a string of several lines keeps its own indentation."""
        for part in lines:
            for line in part.split("\n"):
                self._lines.append("    " * self._depth + line if line.strip() else "")

    def note(self, *lines: str) -> None:
        """Add a comment."""
        self(*(f"// {line}" if line else "//" for line in lines))

    @contextmanager
    def block(self, head: str, end: str = "}") -> Iterator[None]:
        """A block under its head, such as `if (x)`; `end` closes it."""
        self(f"{head} {{" if head else "{")
        self._depth += 1
        yield
        self._depth -= 1
        self(end)

    @contextmanager
    def either(self, condition: str) -> Iterator[Callable[[], None]]:
        """An `if` with an `else`, which begins where what it yields is called."""
        self(f"if ({condition}) {{")
        self._depth += 1

        def otherwise() -> None:
            self._depth -= 1
            self("} else {")
            self._depth += 1

        yield otherwise
        self._depth -= 1
        self("}")

    @contextmanager
    def loop(self, name: str, stop: int, step: int = 1, *, unroll: bool = True) -> Iterator[None]:
        """A loop over 0 <= name < stop, both known: unrolled where arrays of registers need it."""
        if unroll:
            self(UNROLL)
        advance = f"++{name}" if step == 1 else f"{name} += {step}"
        with self.block(f"for (ushort {name} = 0; {name} < {stop}; {advance})"):
            yield

    def __str__(self) -> str:
        text = "\n".join(self._lines)
        assert text.isascii(), "Metal text must be ASCII"
        return text


@dataclass(frozen=True)
class Element:
    """A number of an array: its type in memory, and the type that it is multiplied in."""

    memory: str
    compute: str

    def read(self, value: str, to: str = "") -> str:
        """The text of a number read from memory, as `to` or the type that is multiplied."""
        to = to or self.compute
        if self.memory == "ushort":
            value, found = f"widen({value})", "float"
        else:
            found = self.memory
        return value if found == to else f"{to}({value})"

    def write(self, value: str) -> str:
        """The text of a float as it is written to memory."""
        if self.memory == "ushort":
            return f"narrow({value})"
        return value if self.memory == "float" else f"{self.memory}({value})"


FLOAT = Element("float", "float")

BYTES = {"float": 4, "half": 2, "bfloat": 2, "ushort": 2}
"""Bytes of a number in Metal."""


def element(dtype: str, bfloat: bool) -> Element:
    """How numbers of a type are held; without `bfloat` those of bfloat16 are widened to float.

    >>> element("bfloat16", bfloat=False)
    Element(memory='ushort', compute='float')
    """
    if dtype == "bfloat16" and not bfloat:
        return Element("ushort", "float")
    name = {"float32": "float", "float16": "half", "bfloat16": "bfloat"}[dtype]
    return Element(name, name)


HEADERS = "#include <metal_stdlib>\nusing namespace metal;\n"
"""The one header of kernels on fragments."""


def kernel_head(entry: str, threads: int) -> str:
    """A kernel up to its parameters, and how many threads its groups have at most.

    The attribute stands before the word `kernel`: so do all that Apple and others publish.
    """
    return f"[[max_total_threads_per_threadgroup({threads})]]\nkernel void {entry}("


def open_text(
    text: Text, title: str, algorithm: Sequence[str], *, widens: bool, headers: str = HEADERS
) -> None:
    """The start of every text: what it computes and how, and the headers that it needs."""
    text.note(title, "", *algorithm)
    text(headers)
    if widens:
        text(WIDEN, "")
