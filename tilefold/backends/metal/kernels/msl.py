"""Metal Shading Language as text: lines and blocks of kernel source.

The source is ASCII, since `torch.mps.compile_shader` takes nothing else. What is written here
compiles as it stands; whoever reads it should not see that a program wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tilefold.backends.metal.kernels.storage import Storage
from tilefold.backends.metal.spec import SIMD

UNROLL = "#pragma clang loop unroll(full)"


class Text:
    """The source of a kernel while it is written.

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


HEADERS = "#include <metal_stdlib>\nusing namespace metal;\n"
"""The one header of kernels on fragments."""

SAFE_MATH = """\
#if __METAL_VERSION__ >= 320
#pragma METAL fp math_mode(safe)
#endif"""
"""Arithmetic that keeps NaN and infinities, whatever the options of the compiler: from Metal 3.2 on
(macOS 15). Before, the options decide; `torch.mps` chooses safe ones."""


def kernel_head(entry: str, threads: int) -> str:
    """A kernel up to its parameters, and how many threads its groups have at most.

    The attribute stands before the word `kernel`: so do all that Apple and others publish. It never
    promises one simdgroup: with a bound of 32 threads Apple's compiler has made wrong code of
    kernels that copy to threadgroup memory and multiply fragments (tracel-ai/cubecl#1636).
    """
    most = max(threads, 2 * SIMD)
    return f"[[max_total_threads_per_threadgroup({most})]]\nkernel void {entry}("


def open_text(
    text: Text,
    title: str,
    algorithm: Sequence[str],
    storages: Sequence[Storage],
    *,
    headers: str = HEADERS,
) -> None:
    """The start of every kernel source: what it computes and how, and what it needs before it."""
    text.note(title, "", *algorithm)
    text(headers, SAFE_MATH, "")
    for conversions in dict.fromkeys(storage.conversions for storage in storages):
        if conversions:
            text(conversions, "")
