"""One launch in a process of its own: arguments and results travel in a file.

So a kernel that crashes does not harm the caller's process.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tilefold.backends.metal.emulator import toolchain
from tilefold.backends.metal.emulator.arguments import Region, View, regions
from tilefold.backends.metal.emulator.fault import Fault
from tilefold.backends.metal.emulator.signature import Entry

COUNTERS = (
    "multiplies",
    "shuffles",
    "reductions",
    "simdgroup_barriers",
    "threadgroup_barriers",
    "matrix_loads",
    "matrix_stores",
    "exponentials",
    "elements",
    "tensor_multiplies",
    "device_loads",
    "device_stores",
    "threadgroup_loads",
    "threadgroup_stores",
)
"""The counters of the runtime, in the order of `Count` in lanes.h.

Loads and stores are counted only with the check "count".
"""

_HEADER = 10
_KINDS = {
    "out-of-bounds-read": "out-of-bounds read",
    "out-of-bounds-write": "out-of-bounds write",
    "unwritten": "unwritten memory",
}


@dataclass(frozen=True)
class Launch:
    """A compiled kernel on a grid of `threads` threads, in threadgroups of `group` threads."""

    text: str
    entry: Entry
    entries: Sequence[Entry]
    check: str
    threads: tuple[int, int, int]
    group: tuple[int, int, int]
    timeout_seconds: float
    tensor_layout: int

    def run(self, bound: Sequence[View | bytes]) -> dict[str, int]:
        """Run the kernel, copy its results to the caller's arrays, and return the counts."""
        library = toolchain.built(self.text, self.entries, self.check)
        places = regions(bound, self.entry.buffers)
        with tempfile.NamedTemporaryFile(prefix="tilefold-") as file:
            path = Path(file.name)
            path.write_bytes(self._packed(library, places, len(bound)))
            self._call(library, path, bound, places)
            content = path.read_bytes()
        start = (_HEADER + len(COUNTERS) + 2 * (len(places) + len(bound))) * 8
        for region in places:
            self._take(region, content[start : start + len(region.content)], bound)
            start += len(region.content)
        return dict(
            zip(COUNTERS, struct.unpack_from(f"<{len(COUNTERS)}Q", content, 80), strict=True)
        )

    def _packed(self, library: Path, places: list[Region], count: int) -> bytes:
        _, address, size = toolchain.symbols(library)[0]
        words = [*self.threads, *self.group, len(places), count, address, size]
        words += [0] * len(COUNTERS)
        start = (len(words) + 2 * (len(places) + count)) * 8
        where = {}
        for number, region in enumerate(places):
            words += [len(region.content), start]
            start += len(region.content)
            where.update({index: (number, at) for index, at in region.places.items()})
        for index in range(count):
            words += where[index]
        return struct.pack(f"<{len(words)}Q", *words) + b"".join(r.content for r in places)

    def _call(
        self, library: Path, path: Path, bound: Sequence[View | bytes], places: list[Region]
    ) -> None:
        command = [str(toolchain.runner(self.check)), str(library), str(path), self.entry.name]
        environment = dict(toolchain.CHECKS[self.check].environment)
        environment["TENSOR_LAYOUT"] = str(self.tensor_layout)
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self.timeout_seconds,
                env=environment,
            )
        except subprocess.TimeoutExpired:
            raise Fault("time", f"{self.entry.name}: no end in {self.timeout_seconds} s") from None
        if done.returncode == 0:
            return
        said = [line for line in done.stdout.splitlines() if line.startswith("fault ")]
        if not said:
            raise Fault("crash", f"{self.entry.name}: status {done.returncode}\n{done.stderr}")
        # MemorySanitizer has no function that returns its report.
        if " pc=" not in said[0] and (
            frame := re.search(rf"{re.escape(str(library))}\+0x([0-9a-f]+)", done.stderr)
        ):
            said[0] = said[0].replace(" text ", f" pc={frame[1]} text ")
        raise self._fault(said[0], bound, places, library)

    def _fault(
        self, said: str, bound: Sequence[View | bytes], places: list[Region], library: Path
    ) -> Fault:
        """The exception for a message of the runtime."""
        known = dict(re.findall(r"(\w+)=([^ ]*)", said))
        text = said.partition(" text ")[2]
        kind = _KINDS.get(known["kind"]) or known["kind"]
        where = self._where(known, text, bound, places, library)
        line = int(known.get("line", 0)) or self._line(known.get("pc", "0"))
        line = line or int(known.get("last", 0))
        parts = [f"{self.entry.name}: {where}"]
        if line:
            parts.append(f"line {line}: `{self.text.splitlines()[line - 1].strip()}`")
        if "lane" in known:
            group = known["group"].replace(",", ", ")
            parts.append(
                f"lane {known['lane']} of simdgroup {known['simdgroup']}, threadgroup ({group})"
            )
        return Fault(kind, "; ".join(parts))

    def _where(
        self,
        known: dict[str, str],
        text: str,
        bound: Sequence[View | bytes],
        places: list[Region],
        library: Path,
    ) -> str:
        """A description of the place of a fault."""
        if "region" in known:
            where = self._place(known, bound, places)
        elif "section" in known:
            where = self._array(int(known["section"]), library)
        elif "variable" in known:
            where = "variables of a thread" if known["variable"] == "1" else "the stack is full"
        elif "address" in known:
            where = f"address {known['address']}, far from any argument"
        else:
            return text.partition("what=")[2] or text
        if other := self._line(known.get("other", "0")):
            where += f", also used in line {other}"
        said = text.partition("what=")[2]
        return f"{where}: {said}" if said else where

    def _line(self, pc: str) -> int:
        """The source line at an address of the compiled kernel."""
        if int(pc, 16) == 0:
            return 0
        traced = toolchain.built(self.text, self.entries, self.check, lines=True)
        return toolchain.line_of(traced, int(pc, 16))

    def _place(
        self, known: dict[str, str], bound: Sequence[View | bytes], places: list[Region]
    ) -> str:
        """A description of an address in a region: an argument and an offset."""
        region, at = places[int(known["region"])], int(known["offset"])
        index, start = max(region.places.items(), key=lambda item: (item[1] <= max(at, 0), item[1]))
        argument = bound[index]
        size = len(argument) if isinstance(argument, bytes) else argument.size
        parameter = self.entry.buffers[index]
        return f"{parameter.name} [[buffer({index})]], byte {at - start} of {size}"

    def _array(self, at: int, library: Path) -> str:
        """A description of an address in threadgroup memory: an array and an offset."""
        (_, base, _), *arrays = toolchain.symbols(library)
        # The sizes exclude the padding that AddressSanitizer adds to each array.
        plain = toolchain.symbols(toolchain.built(self.text, self.entries, "fast"))
        sizes = {name: size for name, _, size in plain}
        for name, address, size in arrays:
            if name.endswith("tilefold_before"):
                continue
            if address <= at + base < address + size:
                place = f"byte {at + base - address} of {sizes.get(name, size)}"
                return f"threadgroup array {_plain(name)}, {place}"
        return "threadgroup memory before or between its arrays"

    def _take(self, region: Region, result: bytes, bound: Sequence[View | bytes]) -> None:
        """Copy the kernel's results to the caller's arrays. Raises `Fault` for other changes."""
        written = [
            (argument, at)
            for index, at in region.places.items()
            if isinstance(argument := bound[index], View) and self.entry.buffers[index].written
        ]
        if not written or not result:
            return
        expected = bytearray(region.content)
        for each, at in written:
            each.over(expected, at)[...] = each.over(result, at)
        if expected != result:
            old, new = (np.frombuffer(each, np.uint8) for each in (expected, result))
            at = int(np.flatnonzero(old != new)[0])
            known = {"region": "0", "offset": str(at)}
            raise Fault(
                "out-of-bounds write",
                f"{self.entry.name}: {self._place(known, bound, [region])}, which lies between the"
                " elements of the view",
            )
        for each, at in written:
            each.elements()[...] = each.over(result, at)


def _plain(symbol: str) -> str:
    """The plain name of a variable with a symbol such as `_ZZ6kernel...E5stage`."""
    match = re.search(r"E(\d+)(\w+)$", symbol)
    return match[2] if match else symbol
