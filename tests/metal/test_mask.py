"""A mask as Metal text: compiled as C++, it says of every pair what the exact fold says."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cases import RULES, Sizes, random_rule

from tilefold import Rule, causal, dense, documents, full, local, rule
from tilefold.backends.metal.kernels import mask
from tilefold.masks.evaluate import index_bits
from tilefold.masks.expression import Table, split

SIZES = Sizes(batch=2, heads=3, len_q=60, len_k=84)

METAL = """\
#include <cstdlib>
using std::abs;
using uchar = unsigned char;
#define device
#define constant const
"""

PAIRS = """
extern "C" void pairs{number}(const long* n, constant long* sizes, void** tables, bool* out) {{
    {tables}
    for (long b = 0; b < n[0]; b++)
        for (long h = 0; h < n[1]; h++)
            for (long q = 0; q < n[2]; q++)
                for (long k = 0; k < n[3]; k++) *out++ = {call};
}}
"""


def compiler() -> str:
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None:
        reason = "no C++ compiler (c++, g++, clang++) is there to compile the text of masks"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return found


def sized(given: Rule) -> tuple[Any, ...]:
    """Skeleton, integer width, numbers and tables of a rule at the sizes of this file."""
    expression = given.bind(SIZES.len_q, SIZES.len_k)
    bits = index_bits(expression, SIZES.batch, SIZES.heads, SIZES.len_q, SIZES.len_k)
    skeleton, parameters, tables = split(expression)
    return skeleton, bits, parameters, tables


def position(skeleton: Any) -> Callable[[str], int]:
    """As in a kernel, where other words stand before those of the mask."""
    numbers = [parameter.name for parameter in skeleton.parameters]
    strides = [stride for slot in skeleton.slots for stride in slot.strides]
    return lambda name: 7 + [*numbers, *strides].index(name)


def words(parameters: tuple[int, ...], tables: tuple[Table, ...]) -> list[int]:
    strides = [n // t.array.itemsize for t in tables for n in t.array.strides]
    return [*[-(10**12)] * 7, *parameters, *strides]


def chain() -> Rule:
    """Many rules in a row make no line too long, and a rule used twice is folded once."""
    window = local(9) & ~local(3)
    found = window
    for n in range(2, 30):
        found = (found & rule(lambda q, k, n=n: (q * n - k) % (n + 2) != 1)) | (window & local(n))
    return found


ALL: dict[str, Rule] = {
    **{name: make(SIZES) for name, make in RULES.items()},
    **{f"composed-{seed}": random_rule(random.Random(seed), SIZES, 3) for seed in range(100, 130)},
    "chain": chain(),
    "negative": rule(lambda q, k: (-abs(q - k) // 7 + -(7 - k) % 5) * 3 >= -(q - 50) // 9),
    "order": rule(lambda q, k: q - (k - 3) - (q - k) * 2 % 5 // 2 * (q + 1) < k * 5 // 3 % 7),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Every rule in one file, in 32-bit numbers where they hold it and in 64-bit ones."""
    folder = tmp_path_factory.mktemp("mask")
    parts = [METAL]
    for number, given in enumerate(ALL.values()):
        skeleton, bits, _, _ = sized(given)
        for width in (32, 64)[bits == 64 :]:
            casts = " ".join(
                f"{declared} = ({declared.rsplit(' ', 1)[0]})tables[{n}];"
                for n, declared in enumerate(mask.tables(skeleton))
            )
            call = mask.call(skeleton, b="b", h="h", q="q", k="k")
            text = mask.visible(skeleton, width, position(skeleton))
            pairs = PAIRS.format(number=f"{number}_{width}", tables=casts, call=call)
            parts.append(f"namespace rule{number}_{width} {{\n{text}{pairs}}}\n")
    source, binary = folder / "mask.cpp", folder / "mask.so"
    source.write_text("".join(parts), encoding="ascii")
    flags = ["-std=c++17", "-O0", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    command = [compiler(), *flags, "-Wno-unused-parameter", str(source), "-o", str(binary)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]
    return ctypes.CDLL(str(binary))


@pytest.mark.slow
@pytest.mark.feature("M15", "A05")
def test_the_text_says_of_every_pair_what_the_rule_says(library: ctypes.CDLL) -> None:
    shape = (SIZES.batch, SIZES.heads, SIZES.len_q, SIZES.len_k)
    for number, (name, given) in enumerate(ALL.items()):
        want = given.to_dense(SIZES.len_q, SIZES.len_k, SIZES.batch, SIZES.heads)
        _, bits, parameters, tables = sized(given)
        sizes = np.array(words(parameters, tables), np.int64)
        pointers = (ctypes.c_void_p * max(1, len(tables)))(*(t.array.ctypes.data for t in tables))
        for width in (32, 64)[bits == 64 :]:
            got = np.zeros(shape, np.bool_)
            n = (ctypes.c_long * 4)(*shape)
            places = [ctypes.c_void_p(array.ctypes.data) for array in (sizes, got)]
            library[f"pairs{number}_{width}"](n, places[0], pointers, places[1])
            wrong = np.argwhere(got != want)
            assert not len(wrong), f"{name}, {width} bits: pair (b, h, q, k) {wrong[0]}"


def text(given: Rule) -> str:
    skeleton, bits, _, _ = sized(given)
    return mask.visible(skeleton, bits, position(skeleton))


@pytest.mark.feature("M15")
def test_the_text_reads_like_the_rule() -> None:
    grids = {"grid_q": (6, 10), "grid_k": (7, 12)}
    assert text(local(3, stride=2, causal=True, **grids)) == (
        """\
static inline bool visible(const int b, const int h, const int q, const int k,
                           constant long* sizes) {
    const int p0 = int(sizes[7]);
    const int p1 = int(sizes[8]);
    const int p2 = int(sizes[9]);
    const int p3 = int(sizes[10]);
    const int p4 = int(sizes[11]);
    const int p5 = int(sizes[12]);
    const int p6 = int(sizes[13]);
    const int p7 = int(sizes[14]);
    const int number0 = abs(q / 10 + p0 - k / 12);
    const int number1 = abs(q % 10 + p3 - k % 12);
    const bool truth2 = number0 < p1 && number0 % 2 == p2 && number1 < p4;
    return truth2 && number1 % 2 == p5 && q + p6 + q / 10 * p7 >= k;
}
"""
    )
    ids = np.arange(2 * 60).reshape(2, 60), np.arange(2 * 84).reshape(2, 84)
    assert text(documents(*ids) | rule(lambda q, k: (q - k) % 3 == 0)) == (
        """\
static inline int floor_remainder(const int x, const int y) {
    return x % y + (x % y < 0 ? y : 0);
}

static inline bool visible(const int b, const int h, const int q, const int k,
                           constant long* sizes, device const int* t0, device const int* t1) {
    const int p0 = int(sizes[7]);
    const int number0 = t0[b * sizes[8] + q * sizes[9]];
    const int number1 = t1[b * sizes[10] + k * sizes[11]];
    return number0 == number1 || floor_remainder(q - k, 3) == p0;
}
"""
    )


@pytest.mark.feature("M15", "A05")
def test_rules_that_differ_in_their_numbers_share_a_text() -> None:
    assert text(local(5)) == text(local(50))
    data = np.random.default_rng(0).random((3, 60, 84)) < 0.5
    assert text(dense(data)) == text(dense(~data))
    assert text(local(5)) != text(local(5, causal=True))
    assert text(rule(lambda q, k: q % 3 == 0)) != text(rule(lambda q, k: q % 4 == 0))


def test_a_mask_that_is_the_same_everywhere_is_no_function() -> None:
    for given, call in ((full(), "true"), (rule(lambda q, k: False), "false")):
        skeleton, bits, _, _ = sized(given)
        assert mask.visible(skeleton, bits, position(skeleton)) == ""
        assert mask.call(skeleton, b="b", h="h", q="q", k="k") == call


def test_no_line_is_long() -> None:
    for name, given in ALL.items():
        longest = max(map(len, ["", *text(given).splitlines()]))
        assert longest <= 110, f"{name}: a line of {longest} characters"
    assert text(causal()).isascii()
