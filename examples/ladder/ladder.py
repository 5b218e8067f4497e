"""Softmax and matrix products from naive to fast: checks every rung, and measures it on a GPU.

    python examples/ladder/ladder.py              on a GPU: check and measure
    python examples/ladder/ladder.py --interpret  on a CPU: check in Triton's interpreter

Rungs are files of their own, `softmax_1_naive.py` to `matmul_6_descriptors.py`; each says at its
top what it changes, why that should gain, and how much it is predicted to. Each is compared with
float64 before it is timed. Rungs are timed in turn, several times over, each for some milliseconds
at a stretch by the device's own clock, and the median counts: what slows a GPU down for a while
slows all of them.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from torch import Tensor

TURNS = 7
STRETCH_SECONDS = 0.005
"""How often each rung is timed, and for how long."""

PEAKS = {
    "B200": (8000, 2250),
    "H200": (4800, 989),
    "H100 NVL": (3900, 835),
    "H100 PCIe": (2000, 756),
    "H100": (3350, 989),
    "A100-SXM4-80GB": (2039, 312),
    "A100 80GB PCIe": (1935, 312),
    "A100": (1555, 312),
    "L40S": (864, 362),
    "L4": (300, 121),
    "RTX 5090": (1792, 209.5),
    "RTX 4090": (1008, 165.2),
    "T4": (320, 65),
}
"""GB/s of memory and TFLOP/s of dense float16 products summed in float32, by the vendor's data
sheets; the first name that is part of the device's name counts."""

SMALL = [(5, 300), (9, 64), (2, 5000), (3, 1)], [(1100, 8, 40), (33, 136, 24), (1, 8, 8)]
"""Sizes that are checked: rows and width, then m, k and n. Tiles do not divide them."""

LARGE = [(1024, 1024), (32768, 1024), (1024, 131072)], [(1024,) * 3, (4096,) * 3]
"""Sizes that are measured, too."""

SOFTMAX = ("naive", "one_pass", "warps", "vectors", "online")
MATMUL = ("naive", "tiles", "shared", "pipelined", "grouped", "descriptors")


@dataclass(frozen=True)
class Rung:
    """A file of the ladder, and the function in it."""

    name: str
    module: ModuleType

    @property
    def run(self) -> Callable[..., Tensor]:
        """The function."""
        found: Callable[..., Tensor] = getattr(self.module, self.name.partition("_")[0])
        return found

    def missing(self, lengths: Sequence[int], interpreted: bool) -> str | None:
        """Why it cannot run on matrices of such lengths here; None where it can."""
        least = getattr(self.module, "GPU", None)
        widest, multiple = (getattr(self.module, name, None) for name in ("WIDEST", "MULTIPLE"))
        if least and interpreted:
            return "Gluon: needs a GPU"
        if least and capability() < least:
            return f"needs NVIDIA's compute capability {least[0]}.{least[1]}"
        if widest and lengths[-1] > widest:
            return f"rows have at most {widest} numbers"
        if multiple and any(length % multiple for length in lengths[1:]):
            return f"k and n must be multiples of {multiple}"
        return None


@dataclass(frozen=True)
class Case:
    """One problem: its rungs, operands, what is right, and what torch has for it."""

    title: str
    rungs: tuple[Rung, ...]
    operands: tuple[Tensor, ...]
    torch: Callable[..., Tensor]
    definition: Callable[..., tuple[Tensor, Tensor]]
    lengths: tuple[int, ...]
    work: float
    """Bytes that must move at least, or floating-point operations: 2 for each multiply-add."""
    unit: str

    @property
    def interpreted(self) -> bool:
        """Whether its operands lie on the CPU."""
        return self.operands[0].is_cpu

    def check(self, run: Callable[..., Tensor]) -> float:
        """The largest error in units of what is allowed. Raises unless that is at most 1."""
        want, allowed = self.definition(*self.operands)
        got = run(*self.operands)
        assert got.shape == want.shape, f"got shape {tuple(got.shape)}, want {tuple(want.shape)}"
        error = float(((got.double() - want).abs() / allowed).max())
        if not error <= 1:
            raise AssertionError(f"the error is {error:.3g} times what is allowed")
        return error


def softmax_definition(x: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax in float64, and what float32 may be off by: 16 units, one more for each of x."""
    x = x.double()
    want = x.softmax(1)
    depth = x.amax(1, keepdim=True) - x
    return want, (16 + depth) * 2**-23 * want + 1e-37


def matmul_definition(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The product in float64, and what sums in float32, rounded to float16, may be off by."""
    a, b = a.double(), b.double()
    want, terms = a @ b, a.abs() @ b.abs()
    return want, a.shape[1] * 2**-23 * terms + 2**-10 * want.abs() + 2**-24


def capability() -> tuple[int, int]:
    """The compute capability of the GPU; (0, 0) of one that is not NVIDIA's."""
    import torch

    return (0, 0) if torch.version.hip else torch.cuda.get_device_capability()


def rungs(name: str, titles: Sequence[str]) -> tuple[Rung, ...]:
    """The rungs of a ladder, from the lowest."""
    names = [f"{name}_{number}_{title}" for number, title in enumerate(titles, 1)]
    return tuple(Rung(each, importlib.import_module(each)) for each in names)


def cases(device: str, sizes: Sequence[Sequence[Sequence[int]]]) -> list[Case]:
    """The problems of such sizes: rows and width, then m, k and n."""
    import torch

    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    widths, sides = sizes
    found = []
    softmax, matmul = rungs("softmax", SOFTMAX), rungs("matmul", MATMUL)
    for rows, width in widths:
        found.append(
            Case(
                title=f"softmax of {rows} rows of {width}, float32",
                rungs=softmax,
                operands=(random(rows, width),),
                torch=lambda x: torch.softmax(x, 1),
                definition=softmax_definition,
                lengths=(rows, width),
                work=2 * 4 * rows * width,
                unit="GB/s",
            )
        )
    for m, k, n in sides:
        found.append(
            Case(
                title=f"product of {m} x {k} and {k} x {n}, float16",
                rungs=matmul,
                operands=(random(m, k).half(), random(k, n).half()),
                torch=torch.matmul,
                definition=matmul_definition,
                lengths=(m, k, n),
                work=2.0 * m * k * n,
                unit="TFLOP/s",
            )
        )
    return found


def captured(run: Callable[[], object], launches: int) -> Callable[[], object]:
    """So many calls as one CUDA graph: to launch a small kernel takes the CPU longer than to run it
    takes the GPU, and a graph leaves that out.
    """
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            run()
    return graph.replay


def seconds(run: Callable[[], object]) -> float:
    """The device's time from the begin of a call to its end."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def measure(runs: Sequence[Callable[[], object]]) -> list[float]:
    """The median time of one call of each, in seconds; all take turns."""
    counts, graphs = [], []
    for run in runs:
        run()  # compiles it
        counts.append(max(1, min(200, int(STRETCH_SECONDS / seconds(run)))))
        graphs.append(captured(run, counts[-1]))
        graphs[-1]()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(TURNS):
        for found, graph, count in zip(times, graphs, counts, strict=True):
            found.append(seconds(graph) / count)
    return [statistics.median(found) for found in times]


def peak(unit: str) -> float | None:
    """What the data sheet of this GPU says, in such units."""
    import torch

    name = torch.cuda.get_device_name()
    found = next((rates for part, rates in PEAKS.items() if part in name), None)
    return found[unit == "TFLOP/s"] if found else None


def show(case: Case, console: Console, *, timed: bool) -> None:
    """Check a case's rungs, time them, and print the table."""
    table = Table(title=case.title, title_justify="left")
    table.add_column("rung")
    table.add_column("error / allowed", justify="right")
    columns = ("time, us", case.unit, "of peak", "torch = 1", "rung below = 1") if timed else ()
    for title in columns:
        table.add_column(title, justify="right")
    reasons = {rung.name: rung.missing(case.lengths, case.interpreted) for rung in case.rungs}
    ready = {rung.name: rung.run for rung in case.rungs if reasons[rung.name] is None}
    if timed:
        ready["torch"] = case.torch
    errors = {name: case.check(run) for name, run in ready.items()}
    rows: dict[str, list[str]] = {}
    if timed:
        calls = [lambda run=run: run(*case.operands) for run in ready.values()]
        rows = figures(case, dict(zip(ready, measure(calls), strict=True)))
    for name in dict.fromkeys((*reasons, *ready)):
        if name in errors:
            table.add_row(name, f"{errors[name]:.2f}", *rows.get(name, []))
        else:
            table.add_row(f"{name}: {reasons[name]}")
    console.print(table)


def figures(case: Case, times: dict[str, float]) -> dict[str, list[str]]:
    """The columns of each rung: time, rate, share of the peak, beside torch and the rung below."""
    scale = 1e12 if case.unit == "TFLOP/s" else 1e9
    most, below, found = peak(case.unit), None, {}
    for name, time in times.items():
        rate = case.work / time / scale
        found[name] = [
            f"{time * 1e6:.1f}",
            f"{rate:.3g}",
            f"{rate / most:.0%}" if most else "-",
            f"{times['torch'] / time:.2f}",
            f"{below / time:.2f}" if below and name != "torch" else "-",
        ]
        below = time
    return found


def main() -> None:
    """Run the ladder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interpret", action="store_true", help="check on a CPU, without a GPU")
    interpret = parser.parse_args().interpret
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
        warnings.simplefilter("ignore", RuntimeWarning)  # of rows that are not there
    try:
        import torch
        import triton
    except ImportError as error:
        sys.exit(f"the ladder needs PyTorch and Triton: {error}")
    if not interpret and not torch.cuda.is_available():
        sys.exit("torch finds no GPU here; --interpret checks the ladder on a CPU")
    console = Console()
    place = "Triton's interpreter" if interpret else torch.cuda.get_device_name()
    console.print(f"{place}, Triton {triton.__version__}, PyTorch {torch.__version__}")
    device = "cpu" if interpret else "cuda"
    for case in cases(device, SMALL):
        show(case, console, timed=False)
    if not interpret:
        for case in cases(device, LARGE):
            show(case, console, timed=True)
        console.print("Of peak: of the vendor's data sheet. Small sizes stay in the L2 cache.")


if __name__ == "__main__":
    main()
