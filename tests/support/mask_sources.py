"""The source of a mask in Metal and in Triton, and its answers for every pair when it runs.

The Metal source is compiled as C++, all rules in one file. The Triton source is interpreted.
"""

from __future__ import annotations

import ctypes
import functools
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from cases import RULES, Sizes, random_graph, random_rule
from interpreted import needs
from numpy.typing import NDArray

from tilefold import Rule, local, rule
from tilefold.backends.launching import plain, unbroadcast
from tilefold.backends.metal.kernels import mask as metal_mask
from tilefold.backends.triton import module
from tilefold.backends.triton.kernels import mask as triton_mask
from tilefold.backends.triton.kernels.frame import HEADERS
from tilefold.masks.evaluate import index_bits
from tilefold.masks.expression import Table
from tilefold.masks.skeleton import split

SIZES = Sizes(batch=2, heads=3, len_q=60, len_k=84)
SHAPE = (SIZES.batch, SIZES.heads, SIZES.len_q, SIZES.len_k)


def chain() -> Rule:
    """Many rules in a row make no line too long, and a rule used twice is folded once."""
    window = local(9) & ~local(3)
    found = window
    for n in range(2, 30):
        found = (found & rule(lambda q, k, n=n: (q * n - k) % (n + 2) != 1)) | (window & local(n))
    return found


def graphs() -> Rule:
    """Three functions, one for each head, whose parts are shared many times."""
    made = [random_graph(random.Random(seed)) for seed in (3, 5, 8)]
    return rule(
        lambda b, h, q, k: reduce(
            or_, [(h == head) & graph(b, h, q, k) for head, graph in enumerate(made)]
        )
    )


RULES_OF_SOURCES: dict[str, Rule] = {
    **{name: make(SIZES) for name, make in RULES.items()},
    **{f"composed-{seed}": random_rule(random.Random(seed), SIZES, 3) for seed in range(100, 130)},
    "chain": chain(),
    "graphs": graphs(),
    "negative": rule(lambda q, k: (-abs(q - k) // 7 + -(7 - k) % 5) * 3 >= -(q - 50) // 9),
    "order": rule(lambda q, k: q - (k - 3) - (q - k) * 2 % 5 // 2 * (q + 1) < k * 5 // 3 % 7),
}


def sized(given: Rule) -> tuple[Any, int, Any, Any]:
    """The skeleton, integer width, parameters and tables of a rule at the sizes of this file."""
    expression = given.bind(SIZES.len_q, SIZES.len_k)
    bits = index_bits(expression, SIZES.batch, SIZES.heads, SIZES.len_q, SIZES.len_k)
    skeleton, parameters, tables = split(expression)
    return skeleton, bits, parameters, tables


def widths(given: Rule) -> tuple[int, ...]:
    """The integer widths that hold the numbers of a rule: 32 bits where they do, and 64."""
    return (64,) if sized(given)[1] == 64 else (32, 64)


class Language(Protocol):
    """A language that masks are written in."""

    most_columns: int
    """The largest length of a line; Triton's line of parameters is long if a rule has a table."""

    def source(self, given: Rule, bits: int = 0) -> str:
        """The function of a rule, "" where it is the same everywhere; `bits` 0: what it needs."""
        ...

    def call(self, given: Rule) -> str:
        """The expression that calls the function of a rule."""
        ...

    def pairs(self, name: str, bits: int) -> NDArray[np.bool_]:
        """The rule's answer for every pair; `name` is a key of `RULES_OF_SOURCES`."""
        ...


class Metal:
    """Metal Shading Language, compiled as C++."""

    most_columns = 110

    def source(self, given: Rule, bits: int = 0) -> str:
        """See `Language`."""
        skeleton, needed, _, _ = sized(given)
        return metal_mask.visible(skeleton, bits or needed, _position(skeleton))

    def call(self, given: Rule) -> str:
        """See `Language`."""
        return metal_mask.call(sized(given)[0], b="b", h="h", q="q", k="k")

    def pairs(self, name: str, bits: int) -> NDArray[np.bool_]:
        """See `Language`."""
        _, _, parameters, tables = sized(RULES_OF_SOURCES[name])
        sizes = np.array(_words(parameters, tables), np.int64)
        pointers = (ctypes.c_void_p * max(1, len(tables)))(*(t.array.ctypes.data for t in tables))
        found = np.zeros(SHAPE, np.bool_)
        places = [ctypes.c_void_p(array.ctypes.data) for array in (sizes, found)]
        number = list(RULES_OF_SOURCES).index(name)
        shape = (ctypes.c_long * 4)(*SHAPE)
        _library()[f"pairs{number}_{bits}"](shape, places[0], pointers, places[1])
        return found


_METAL = """\
#include <cstdlib>
using std::abs;
using uchar = unsigned char;
#define device
#define constant const
"""

_METAL_PAIRS = """
extern "C" void pairs{number}(const long* n, constant long* sizes, void** tables, bool* out) {{
    {tables}
    for (long b = 0; b < n[0]; b++)
        for (long h = 0; h < n[1]; h++)
            for (long q = 0; q < n[2]; q++)
                for (long k = 0; k < n[3]; k++) *out++ = {call};
}}
"""


@functools.cache
def _library() -> ctypes.CDLL:
    """Every rule in one file, in 32-bit numbers where they hold it and in 64-bit ones."""
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None:
        reason = "no C++ compiler (c++, g++, clang++) is there to compile the source of masks"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    parts = [_METAL]
    for number, given in enumerate(RULES_OF_SOURCES.values()):
        for width in widths(given):
            casts = " ".join(
                f"{declared} = ({declared.rsplit(' ', 1)[0]})tables[{n}];"
                for n, declared in enumerate(metal_mask.tables(sized(given)[0]))
            )
            names = {"number": f"{number}_{width}", "tables": casts, "call": Metal().call(given)}
            text = Metal().source(given, width)
            pairs = _METAL_PAIRS.format(**names)
            parts.append(f"namespace rule{number}_{width} {{\n{text}{pairs}}}\n")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        source, binary = Path(folder, "mask.cpp"), Path(folder, "mask.so")
        source.write_text("".join(parts), encoding="ascii")
        flags = ["-std=c++17", "-O0", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
        command = [str(found), *flags, "-Wno-unused-parameter", str(source), "-o", str(binary)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:3000]
        return ctypes.CDLL(str(binary))


def _position(skeleton: Any) -> Callable[[str], int]:
    """The arguments of a mask as in a kernel, where other arguments come first."""
    numbers = [parameter.name for parameter in skeleton.parameters]
    strides = [stride for slot in skeleton.slots for stride in slot.strides]
    return lambda name: 7 + [*numbers, *strides].index(name)


def _words(parameters: tuple[int, ...], tables: tuple[Table, ...]) -> list[int]:
    strides = [n // t.array.itemsize for t in tables for n in t.array.strides]
    return [*[-(10**12)] * 7, *parameters, *strides]


class Triton:
    """Triton, interpreted."""

    most_columns = 130

    def source(self, given: Rule, bits: int = 0) -> str:
        """See `Language`."""
        skeleton, needed, _, _ = sized(given)
        return triton_mask.visible(skeleton, bits or needed)

    def call(self, given: Rule) -> str:
        """See `Language`."""
        return triton_mask.call(sized(given)[0], b="b", h="h", q="q", k="k")

    def pairs(self, name: str, bits: int) -> NDArray[np.bool_]:
        """See `Language`."""
        needs()
        import torch

        given = RULES_OF_SOURCES[name]
        _, _, parameters, tables = sized(given)
        out = torch.full(SHAPE, 7, dtype=torch.int8)
        arguments: list[object] = [*parameters]
        for table in tables:
            held = unbroadcast(table.array)
            strides = np.ascontiguousarray(held).strides
            spans = [
                stride // held.itemsize if length > 1 else 0
                for stride, length in zip(strides, held.shape, strict=True)
            ]
            arguments += [torch.tensor(plain(held)), *spans]
        pairs = module.load(self.kernel(given, bits), "pairs")
        pairs[(SIZES.batch * SIZES.heads,)](out, *arguments)
        found = out.numpy()
        assert np.isin(found, (0, 1)).all(), "a pair of which nothing is said"
        return found.astype(np.bool_)

    def kernel(self, given: Rule, bits: int) -> str:
        """A module with the rule and a kernel that asks it about every pair."""
        names = ["out", *triton_mask.arguments(sized(given)[0])]
        sizes = {"heads": SIZES.heads, "len_q": SIZES.len_q, "len_k": SIZES.len_k}
        pairs = _TRITON_PAIRS.format(given=", ".join(names), call=self.call(given), **sizes)
        return "\n".join([*HEADERS, "", self.source(given, bits), pairs])


_TRITON_PAIRS = """
@triton.jit
def pairs({given}):
    place = tl.program_id(0)
    h, b = place % {heads}, place // {heads}
    row, column = tl.arange(0, 64), tl.arange(0, 128)
    q = tl.minimum(row, {len_q} - 1)[:, None]
    k = tl.minimum(column, {len_k} - 1)[None, :]
    seen = {call}
    inside = (row < {len_q})[:, None] & (column < {len_k})[None, :]
    at = out + (place * {len_q} + row)[:, None] * {len_k} + column[None, :]
    tl.store(at, (inside & seen).to(tl.int8), mask=inside)
"""

LANGUAGES: dict[str, Language] = {"metal": Metal(), "triton": Triton()}
