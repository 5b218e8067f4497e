"""Reading a kernel source: its entries, their parameters, and code that Metal would refuse.

A C++ compiler accepts more than Metal's compiler. This file looks for such code in the source
without its comments.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tilefold.backends.metal.emulator.fault import Fault

MOST_BUFFERS = 31
MOST_THREADS = 1024
"""The largest number of threads of a threadgroup, on every Apple GPU."""
MOST_THREADGROUP_BYTES = 32768

POSITIONS = {
    "threadgroup_position_in_grid": "group",
    "thread_position_in_threadgroup": "inside",
    "thread_position_in_grid": "place",
    "threadgroups_per_grid": "groups",
    "threads_per_threadgroup": "size",
    "threads_per_grid": "threads",
    "dispatch_threads_per_threadgroup": "full_size",
    "thread_index_in_simdgroup": "lane",
    "simdgroup_index_in_threadgroup": "simdgroup",
    "thread_index_in_threadgroup": "index",
    "simdgroups_per_threadgroup": "simdgroups",
    "threads_per_simdgroup": "width",
}
"""The fields of `Position` in lanes.h by the attributes of parameters that locate a thread."""

_VECTORS = ("group", "inside", "place", "groups", "size", "threads", "full_size")

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_ENTRY = re.compile(
    r"(?P<before>(?:\[\[[^\]]*\]\]\s*)*)\bkernel\b(?P<after>(?:\s*\[\[[^\]]*\]\])*)"
    r"\s*void\s+(?P<name>\w+)\s*\("
)
_PROMISE = re.compile(r"max_total_threads_per_threadgroup\s*\(\s*(\d+)\s*\)")
_PARAMETER = re.compile(
    r"(?P<type>.+?)(?P<name>\w+)\s*\[\[\s*(?P<attribute>\w+)\s*(?:\(\s*(?P<number>\d+)\s*\))?\s*\]\]",
    re.DOTALL,
)
_DOUBLE = re.compile(
    r"(?<![\w.])(?:\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)(?![\w.])"
)
_ELEMENT = re.compile(r"thread_elements\(\)\s*\[\s*(?P<index>[^\]]*?)\s*\]")
_REFUSED = (
    (re.compile(r"\bdouble\b"), "Metal has no double"),
    (re.compile(r"\bthreadgroup\s+(?:const\s+)?[\w:]+(?:\s*<[^;{}()]*>)?\s*(?:const\s*)?[*&]"),
     "only arrays of threadgroup memory are emulated: index them, without pointers to them"),
    (re.compile(r"\b(?:__asm|asm|__builtin_\w+)\b"), "this is no public Metal"),
    (re.compile(r"\b(?:try|catch|throw|dynamic_cast|new|delete|goto|virtual)\b"),
     "Metal lacks this part of C++"),
)  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel: the buffer with number `buffer`, or a position if that is None."""

    name: str
    type: str
    buffer: int | None
    position: str

    @property
    def written(self) -> bool:
        """True if the kernel may write to the buffer."""
        return "const" not in re.findall(r"\w+", self.type) and "constant" not in self.type

    @property
    def element(self) -> str:
        """The type behind the pointer or the reference."""
        words = re.findall(r"\w+", self.type)
        return " ".join(word for word in words if word not in ("device", "constant", "const"))

    def given(self) -> str:
        """The C++ expression of its argument, from `buffers` and `position`."""
        if self.buffer is not None:
            pointer = f"({self.type.replace('&', '*')})buffers[{self.buffer}]"
            return f"*{pointer}" if self.type.endswith("&") else pointer
        if self.position == "width":
            return "32"
        reference = "" if self.position in _VECTORS else "&"
        return f"emulator::Given<{self.type}>::of({reference}position->{self.position})"


@dataclass(frozen=True)
class Entry:
    """A kernel that can be launched, with its name and its parameters."""

    name: str
    parameters: tuple[Parameter, ...]
    promised: int | None
    """The value of [[max_total_threads_per_threadgroup]]; None without this attribute."""

    @property
    def buffers(self) -> tuple[Parameter, ...]:
        """The parameters that are buffers, in the order of their numbers."""
        bound = [each for each in self.parameters if each.buffer is not None]
        return tuple(sorted(bound, key=lambda each: each.buffer or 0))

    def enter(self) -> str:
        """The C++ function through which the runtime calls the kernel."""
        given = ",\n        ".join(each.given() for each in self.parameters)
        return (
            f'extern "C" void tilefold_enter_{self.name}(\n'
            "        void* const* buffers, const emulator::Position* position) {\n"
            f"    {self.name}(\n        {given});\n}}\n"
        )


def entries(text: str) -> dict[str, Entry]:
    """The kernels of a source, by name. Raises `Fault` for code that Metal would refuse."""
    bare = without_comments(text)
    found = {}
    for match in _ENTRY.finditer(bare):
        line = bare.count("\n", 0, match.start("name")) + 1
        name = match["name"]
        promise = _PROMISE.search(match["before"] + match["after"])
        parameters = tuple(
            _parameter(part, name, line) for part in _parts(bare, match.end(), name, line)
        )
        entry = Entry(name, parameters, int(promise[1]) if promise else None)
        _check_buffers(entry, line)
        found[name] = entry
    if not found:
        raise Fault("refused", "the source has no kernel")
    return found


def check_text(text: str) -> None:
    """Raise `Fault` if a source has code that C++ accepts and Metal refuses."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.isascii():
            column, sign = next((i, c) for i, c in enumerate(line, 1) if not c.isascii())
            raise Fault(
                "refused",
                f"line {number}, column {column}: {sign!a} is not ASCII, and"
                " torch.mps.compile_shader takes nothing else",
            )
    bare = without_comments(text)
    for pattern, why in _REFUSED:
        if match := pattern.search(bare):
            _refuse(bare, match, why)
    if match := _DOUBLE.search(bare):
        _refuse(bare, match, f"a double in C++, a float in Metal: write {match[0]}f")
    for match in _ELEMENT.finditer(bare):
        _check_element(bare, match)


def _check_element(bare: str, match: re.Match[str]) -> None:
    """Raise `Fault` unless the index of a lane's element is known when the kernel is compiled.

    Apple's header keeps the elements in a vector of 64, of which a lane has two.
    """
    index = match["index"]
    if index in ("0", "1"):
        return
    before, loop, _ = bare[: match.start()].rpartition(f"for (ushort {index} = 0; {index} < 2;")
    if not loop or not before.rstrip().endswith("#pragma clang loop unroll(full)"):
        _refuse(
            bare,
            match,
            "an index at run time: take 0, 1 or the variable of a loop over both under"
            " `#pragma clang loop unroll(full)`",
        )


def without_comments(text: str) -> str:
    """The source with its comments blanked; all other code keeps its line and column."""
    return _COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def _refuse(bare: str, match: re.Match[str], why: str) -> None:
    line = bare.count("\n", 0, match.start()) + 1
    raise Fault("refused", f"line {line}: `{' '.join(match[0].split())}`: {why}")


def _parts(bare: str, start: int, name: str, line: int) -> list[str]:
    """The parameters in a list; `start` is the place after its opening parenthesis."""
    parts, depth, begin = [], 1, start
    for place in range(start, len(bare)):
        sign = bare[place]
        depth += (sign in "([<") - (sign in ")]>")
        if depth == 0 or (sign == "," and depth == 1):
            parts.append(bare[begin:place].strip())
            begin = place + 1
        if depth == 0:
            return [part for part in parts if part]
    raise Fault("refused", f"line {line}: the parameters of {name} do not end")


def _parameter(text: str, kernel: str, line: int) -> Parameter:
    match = _PARAMETER.fullmatch(text)
    if match is None:
        raise Fault("refused", f"line {line}: {kernel}: `{' '.join(text.split())}` needs [[...]]")
    type_, name, attribute = " ".join(match["type"].split()), match["name"], match["attribute"]
    if attribute == "buffer" and match["number"]:
        if type_[-1] not in "*&" or type_.split()[0] not in ("device", "constant"):
            raise Fault(
                "refused",
                f"line {line}: {kernel}: {name} must be a pointer or a reference to device or"
                f" constant memory, not `{type_}`",
            )
        return Parameter(name, type_, int(match["number"]), "")
    if attribute not in POSITIONS:
        raise Fault("refused", f"line {line}: {kernel}: {name} has the attribute [[{attribute}]]")
    return Parameter(name, type_, None, POSITIONS[attribute])


def _check_buffers(entry: Entry, line: int) -> None:
    numbers = [each.buffer for each in entry.buffers]
    if len(set(numbers)) != len(numbers):
        raise Fault("refused", f"line {line}: {entry.name}: two buffers share a number")
    if numbers and (numbers[-1] or 0) >= MOST_BUFFERS:
        raise Fault(
            "refused",
            f"line {line}: {entry.name}: buffer({numbers[-1]}) where {MOST_BUFFERS - 1} is the"
            " last there is",
        )
    if entry.promised is not None and not 1 <= entry.promised <= MOST_THREADS:
        raise Fault(
            "refused", f"line {line}: {entry.name}: a threadgroup of {entry.promised} threads"
        )
