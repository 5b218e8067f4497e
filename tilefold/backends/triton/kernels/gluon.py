"""The parts of kernels in Gluon: their imports, barriers, copies, and functions.

Gluon is Triton's language in which layouts, shared memory and barriers are the program's. Its texts
are split into functions, one for each part of a program that runs by itself, and a part takes all
that it names as arguments; so a function here knows what it takes from its own text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from textwrap import wrap

from tilefold.backends.launching import AXES
from tilefold.backends.triton.kernels.text import Text

HEAD = """\
from triton.experimental import gluon
from triton.experimental.gluon import language as tl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Its name before and since Triton 3.8.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
"""

HELPERS = '''\
@gluon.jit
def order_warpgroups(instruction: tl.constexpr):
    """An instruction on one of the barriers 14 and 15, of which Triton has no use itself."""
    tl.inline_asm_elementwise(instruction, "=r", [], tl.int32, is_pure=False, pack=1)


@gluon.jit
def wait_turn(warpgroup: tl.constexpr):
    """Wait until the other warpgroup has issued its products."""
    if warpgroup == 0:
        order_warpgroups("bar.sync 14, 256; mov.b32 $0, 0;")
    else:
        order_warpgroups("bar.sync 15, 256; mov.b32 $0, 0;")


@gluon.jit
def pass_turn(warpgroup: tl.constexpr):
    """Let the other warpgroup issue its products."""
    if warpgroup == 0:
        order_warpgroups("bar.arrive 15, 256; mov.b32 $0, 0;")
    else:
        order_warpgroups("bar.arrive 14, 256; mov.b32 $0, 0;")


@gluon.jit
def release(free):
    """Free a slot: all warps of this warpgroup meet, then one thread arrives at the barrier."""
    mbarrier.arrive(free, count=1)


@gluon.jit
def fill(tiles, b, h, row, full, slot):
    """Have the TMA unit load a tile."""
    mbarrier.expect(full, tiles.block_type.nbytes)
    load_tile(tiles, [b, h, row, 0], full, slot)


@gluon.jit
def place_in(round):
    """The place of this program in a round; every other round runs backwards."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    return round * programs + program + round % 2 * (programs - 1 - 2 * program)


@gluon.jit
def rounds_of(places):
    """The rounds in which this program has a place; only the last one may be short."""
    whole = places // tl.num_programs(0)
    return whole + (place_in(whole) < places).to(tl.int32)


@gluon.jit
def position(place, order, places, near, block_rows, heads):
    """Block row, head and batch of a place: near heads together, the heaviest blocks first."""
    first = place // (near * block_rows) * near
    together = tl.minimum(near, places // block_rows - first)
    within = place - first * block_rows
    plane = first + within % together
    return tl.load(order + within // together), plane % heads, plane // heads


@gluon.jit
def rows_at(operand, b, h, row, column, stride_b, stride_h, stride_n, stride_d):
    """The addresses of rows of an operand, or of one."""
    head = operand + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
    return head + row.to(tl.int64) * stride_n + column.to(tl.int64) * stride_d
'''


@dataclass(frozen=True)
class Function:
    """A function of the text, and what it takes."""

    name: str
    given: tuple[str, ...]
    text: str

    def call(self, text: Text, result: str = "") -> None:
        """Call it with the variables that bear the names of what it takes."""
        listed(text, f"{result}{self.name}(", self.given)


def listed(text: Text, head: str, names: Iterable[str]) -> None:
    """Names in parentheses, in lines that can be indented."""
    text(head, *(f"    {line}" for line in wrap(", ".join(names) + ",", 80)), ")")


def function(name: str, title: str, body: Text, known: Iterable[str]) -> Function:
    """A function around its body: it takes what the body names of what is known there."""
    words = set(re.findall(r"[A-Za-z_]\w*", str(body)))
    inner = set(re.findall(r"^ *(?:for )?([\w, ]+?) (?:=|in) ", str(body), re.MULTILINE))
    own = {word for words in inner for word in words.split(", ")}
    given = tuple(word for word in known if word in words - own)
    text = Text()
    text("@gluon.jit")
    typed = ["warpgroup: tl.constexpr" if word == "warpgroup" else word for word in given]
    text.listed(f"def {name}(", typed, "):")
    text(f'    """{title}"""', *(f"    {line}".rstrip() for line in str(body).splitlines()))
    return Function(name, given, str(text))


def row_of(operand: str, head: str, at: str, column: str) -> str:
    """The addresses of one row, or of a column of rows."""
    strides = ", ".join(f"{operand}_{axis}" for axis in AXES)
    return f"rows_at({operand}, b, {head}, {at}, {column}, {strides})"


@contextmanager
def keys(text: Text, begin: str) -> Iterator[None]:
    """The walk over single keys of runs."""
    with text.block(f"for run in range({begin}, end)"):
        text("first, last = tl.load(runs + 2 * run), tl.load(runs + 2 * run + 1)")
        with text.block("for key in range(first, last)"):
            yield
