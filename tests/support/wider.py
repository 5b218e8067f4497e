"""Kernels for AVX-512 and AMX on a machine without them.

LLVM splits vectors of 512 bits into what the machine has. It cannot split the instructions that
kernels name: these are written out here, element by element. Tiles are memory, of one thread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from tilefold.backends.cpu import runtime
from tilefold.backends.cpu.device import Device, host


@dataclass(frozen=True)
class _Told(Device):
    """This machine, of which a planner is told a level and features; the compiler is not."""

    told: tuple[str, ...] = ()

    def has(self, feature: str) -> bool:
        if feature.startswith(("avx512", "amx")):
            return feature in self.told
        return super().has(feature)


def _told(isa: str, *features: str) -> Device:
    return _Told(**{**vars(host()), "isa": isa, "told": features})


WIDE = _told("avx512")
"""The registers of AVX-512, and nothing newer."""

PAIRS = _told("avx512", "avx512vnni", "avx512bf16")
"""Pairs of bfloat16, and fours of integers."""

TILES = _told("amx", *PAIRS.told, "amx-tile", "amx-bf16", "amx-int8")  # type: ignore[attr-defined]
"""Tiles of both."""


@contextmanager
def written_out(module: Any) -> Iterator[None]:
    """Kernels of a module have functions in the place of instructions that are not here.

    No other call finds them by a note, and they find none.
    """
    with (
        mock.patch.object(module, "source", _written_out(module.source)),
        mock.patch.object(runtime, "recall", return_value=None),
        mock.patch.object(runtime, "note"),
    ):
        yield


def _written_out(source: Callable[[Any], str]) -> Callable[[Any], str]:
    """`source(spec)`, with functions in the place of instructions."""

    def write(spec: Any) -> str:
        text = source(spec)
        for name, function in FUNCTIONS.items():
            if name in text:
                lines = [x for x in text.split("\n") if not (x.startswith("declare") and name in x)]
                text = re.sub(rf'@"?{re.escape(name)}"?', f"@{function.name}", "\n".join(lines))
                text += f"\n{function.text}\n"
        for name, helper in HELPERS.items():
            if f"@{name}" in text:
                text += f"\n{helper}\n"
        left = re.search(r"llvm\.x86\.(avx512|t|ld)\S*", text)
        assert not left, f"an instruction that is not written out: {left}"
        return text

    return write


class _Function:
    def __init__(self, text: str) -> None:
        self.text = text
        found = re.search(r"@(\w+)\(", text)
        assert found
        self.name = found[1]


def _permuted(name: str, n: int, kind: str, index: str, two: bool) -> _Function:
    """Each lane of the result is one that its index names, of a vector or of two."""
    second = f", <{n} x {kind}> %b" if two else ""
    lines = [
        f"define internal <{n} x {kind}> @{name}(<{n} x {kind}> %a, <{n} x {index}> %i{second}) {{"
    ]
    made = "undef"
    for lane in range(n):
        lines += [
            f"  %x{lane} = extractelement <{n} x {index}> %i, i32 {lane}",
            f"  %m{lane} = and {index} %x{lane}, {n - 1}",
            f"  %v{lane} = extractelement <{n} x {kind}> %a, {index} %m{lane}",
        ]
        value = f"%v{lane}"
        if two:
            lines += [
                f"  %w{lane} = extractelement <{n} x {kind}> %b, {index} %m{lane}",
                f"  %h{lane} = and {index} %x{lane}, {n}",
                f"  %c{lane} = icmp ne {index} %h{lane}, 0",
                f"  %s{lane} = select i1 %c{lane}, {kind} %w{lane}, {kind} %v{lane}",
            ]
            value = f"%s{lane}"
        lines.append(
            f"  %r{lane} = insertelement <{n} x {kind}> {made}, {kind} {value}, i32 {lane}"
        )
        made = f"%r{lane}"
    return _Function("\n".join([*lines, f"  ret <{n} x {kind}> {made}", "}"]))


def _lanes(first: int, step: int = 2) -> str:
    return ", ".join(f"i32 {step * lane + first}" for lane in range(16))


def _fours(name: str, signs: str) -> str:
    """Sums, and the products of the four integers of their words; "u" has no sign, "s" has one."""
    one, two = ({"u": "zext", "s": "sext"}[sign] for sign in signs)
    lines = [
        f"define internal <16 x i32> @{name}(<16 x i32> %t0, <16 x i32> %a, <16 x i32> %b) {{",
        "  %c = bitcast <16 x i32> %a to <64 x i8>",
        "  %d = bitcast <16 x i32> %b to <64 x i8>",
        f"  %x = {one} <64 x i8> %c to <64 x i32>",
        f"  %y = {two} <64 x i8> %d to <64 x i32>",
        "  %p = mul <64 x i32> %x, %y",
    ]
    for n in range(4):
        lanes = f"<64 x i32> undef, <16 x i32> <{_lanes(n, 4)}>"
        lines += [
            f"  %p{n} = shufflevector <64 x i32> %p, {lanes}",
            f"  %t{n + 1} = add <16 x i32> %t{n}, %p{n}",
        ]
    return "\n".join([*lines, "  ret <16 x i32> %t4", "}"])


def _pairs(name: str, words: str) -> str:
    """Sums, and the products of the two numbers of bfloat16 of their words."""
    lines = [f"define internal <16 x float> @{name}(<16 x float> %t0, {words} %a, {words} %b) {{"]
    for side in "ab":
        lines += [
            f"  %{side}b = bitcast {words} %{side} to <32 x i16>",
            f"  %{side}i = zext <32 x i16> %{side}b to <32 x i32>",
            f"  %{side}u = shl <32 x i32> %{side}i, splat (i32 16)",
            f"  %{side}f = bitcast <32 x i32> %{side}u to <32 x float>",
        ]
    lines.append("  %p = fmul <32 x float> %af, %bf")
    for n in range(2):
        lanes = f"<32 x float> undef, <16 x i32> <{_lanes(n)}>"
        lines += [
            f"  %p{n} = shufflevector <32 x float> %p, {lanes}",
            f"  %t{n + 1} = fadd <16 x float> %t{n}, %p{n}",
        ]
    return "\n".join([*lines, "  ret <16 x float> %t2", "}"])


_TILE = "getelementptr [8 x [16 x [16 x i32]]], ptr @tiles, i64 0"


def _moved(name: str, load: bool) -> _Function:
    """The rows of a tile, from memory or into it."""
    lines = [f"define internal void @{name}(i8 %tile, ptr %memory, i64 %stride) {{"]
    for row in range(16):
        places = f"ptr %m{row}", f"ptr %t{row}"
        source, target = places if load else reversed(places)
        lines += [
            f"  %s{row} = mul i64 %stride, {row}",
            f"  %m{row} = getelementptr i8, ptr %memory, i64 %s{row}",
            f"  %t{row} = {_TILE}, i8 %tile, i64 {row}",
            f"  %v{row} = load <16 x i32>, {source}, align 4",
            f"  store <16 x i32> %v{row}, {target}, align 4",
        ]
    return _Function("\n".join([*lines, "  ret void", "}"]))


def _multiplied(name: str, helper: str, sums: str = "<16 x i32>") -> _Function:
    """A tile, and the products of two: of all words of a row by the rows of the other one."""
    return _Function(f"""\
define internal void @{name}(i8 %c, i8 %a, i8 %b) {{
entry:
  br label %next
next:
  %i = phi i64 [ 0, %entry ], [ %i1, %next ]
  %m = lshr i64 %i, 4
  %k = and i64 %i, 15
  %at_a = {_TILE}, i8 %a, i64 %m, i64 %k
  %at_b = {_TILE}, i8 %b, i64 %k
  %at_c = {_TILE}, i8 %c, i64 %m
  %word = load i32, ptr %at_a
  %row = load <16 x i32>, ptr %at_b, align 4
  %old = load {sums}, ptr %at_c, align 4
  %one = insertelement <16 x i32> undef, i32 %word, i32 0
  %words = shufflevector <16 x i32> %one, <16 x i32> undef, <16 x i32> zeroinitializer
  %new = call {sums} @{helper}({sums} %old, <16 x i32> %words, <16 x i32> %row)
  store {sums} %new, ptr %at_c, align 4
  %i1 = add i64 %i, 1
  %more = icmp ult i64 %i1, 256
  br i1 %more, label %next, label %done
done:
  ret void
}}""")


def _bit(name: str, is_set: int) -> str:
    return name if is_set else f"n{name}"


FUNCTIONS = {
    "llvm.x86.avx512.permvar.sf.512": _permuted("permuted_floats", 16, "float", "i32", False),
    "llvm.x86.avx512.vpermi2var.hi.512": _permuted("permuted_words", 32, "i16", "i16", True),
    "llvm.x86.avx512.pmaddw.d.512": _Function(f"""\
define internal <16 x i32> @pairs_of_words(<32 x i16> %a, <32 x i16> %b) {{
  %x = sext <32 x i16> %a to <32 x i32>
  %y = sext <32 x i16> %b to <32 x i32>
  %p = mul <32 x i32> %x, %y
  %even = shufflevector <32 x i32> %p, <32 x i32> undef, <16 x i32> <{_lanes(0)}>
  %odd = shufflevector <32 x i32> %p, <32 x i32> undef, <16 x i32> <{_lanes(1)}>
  %sums = add <16 x i32> %even, %odd
  ret <16 x i32> %sums
}}"""),
    "llvm.x86.avx512.vpdpbusd.512": _Function(_fours("fours_of_bytes", "us")),
    "llvm.x86.avx512bf16.dpbf16ps.512": _Function(_pairs("pairs_of_halves", "<32 x bfloat>")),
    "llvm.x86.ldtilecfg": _Function("define internal void @configured(ptr %a) {\n  ret void\n}"),
    "llvm.x86.tilerelease": _Function("define internal void @released() {\n  ret void\n}"),
    "llvm.x86.tileloadd64": _moved("tile_read", load=True),
    "llvm.x86.tilestored64": _moved("tile_written", load=False),
    "llvm.x86.tdpbf16ps": _multiplied("tiles_of_halves", "pairs_of_words_of", "<16 x float>"),
    **{
        f"llvm.x86.tdpb{signs}d": _multiplied(f"tiles_{signs}", f"fours_{signs}")
        for signs in ("ss", "su", "us", "uu")
    },
    # Bit (4a + 2b + c) of the table k: the product of the four bits of each case, one by one.
    "llvm.x86.avx512.pternlog.d.512": _Function(
        "define internal <16 x i32> @three_bits"
        "(<16 x i32> %a, <16 x i32> %b, <16 x i32> %c, i32 %k) {\n"
        "  %none = xor <16 x i32> %a, %a\n"
        "  %all = xor <16 x i32> %none, splat (i32 -1)\n"
        "  %na = xor <16 x i32> %a, %all\n"
        "  %nb = xor <16 x i32> %b, %all\n"
        "  %nc = xor <16 x i32> %c, %all\n"
        + "".join(
            f"  %p{case} = and <16 x i32> %{_bit('a', case & 4)}, %{_bit('b', case & 2)}\n"
            f"  %q{case} = and <16 x i32> %p{case}, %{_bit('c', case & 1)}\n"
            f"  %t{case} = and i32 %k, {1 << case}\n"
            f"  %u{case} = icmp ne i32 %t{case}, 0\n"
            f"  %v{case} = select i1 %u{case}, <16 x i32> %q{case}, <16 x i32> %none\n"
            f"  %r{case} = or <16 x i32> %{f'r{case - 1}' if case else 'none'}, %v{case}\n"
            for case in range(8)
        )
        + "  ret <16 x i32> %r7\n}"
    ),
}
"""The instructions that kernels of products name."""

HELPERS = {
    "tiles": "@tiles = internal global [8 x [16 x [16 x i32]]] zeroinitializer, align 64",
    "pairs_of_words_of": _pairs("pairs_of_words_of", "<16 x i32>"),
    **{f"fours_{signs}": _fours(f"fours_{signs}", signs) for signs in ("ss", "su", "us", "uu")},
}
"""What these functions call."""
