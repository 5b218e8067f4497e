"""Kernels for AVX-512 on a machine without it.

LLVM splits vectors of 512 bits into what the machine has. It cannot split the instructions of
AVX-512 that kernels name: these are written out here, element by element.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tilefold.backends.cpu.device import Device, host

WIDE: Device = replace(host(), isa="avx512")
"""This machine, as if its registers were those of AVX-512."""


def written_out(source: Callable[[Any], str]) -> Callable[[Any], str]:
    """`source(spec)`, with functions in the place of instructions that are not here."""

    def write(spec: Any) -> str:
        text = source(spec)
        for name, function in FUNCTIONS.items():
            if name in text:
                lines = [x for x in text.split("\n") if not (x.startswith("declare") and name in x)]
                text = re.sub(rf'@"?{re.escape(name)}"?', f"@{function.name}", "\n".join(lines))
                text += f"\n{function.text}\n"
        assert "llvm.x86.avx512" not in text, "an instruction that is not written out"
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


def _lanes(first: int) -> str:
    return ", ".join(f"i32 {2 * lane + first}" for lane in range(16))


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
