"""The figures that the CPU backend is to reach, measured in one run: ratios, shares and verdicts.

    python benchmarks/figures.py [--seconds 2] [--save benchmarks/results] [--only decode]

Each row is a floor: how many times as fast as a peer, turn by turn in one process on the same
random data; a share of the read bandwidth of the same minute; how well threads scale; how long a
kernel compiles. A row that cannot be measured here says why. `share` is that of the roofline at the
rates that this machine reached in this run.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tilefold.backends.cpu import peak, runtime, threads
from tilefold.backends.cpu.device import host
from tilefold.backends.cpu.kernel import emit
from tilefold.backends.cpu.plan import plan
from tilefold.commands import terminal
from tilefold.common.files import write_atomically
from tilefold.common.imports import why_not
from tilefold.masks import parse
from tilefold.measuring import timing, workload
from tilefold.measuring.baselines import BASELINES, check, tensor
from tilefold.measuring.environment import environment
from tilefold.measuring.roofline_share import RooflineShares
from tilefold.measuring.workload import BOTH, Case
from tilefold.planning.roofline import visible_pairs
from tilefold.problems.attention import Problem, default_scale

D64, D128, LONG = "1,8,2048,64", "1,8,2048,128", "1,2,8192,64"
WINDOW = "causal() & local(256)"


@dataclass(frozen=True)
class Figure:
    """What is asked: `floor` times as fast as the peer, unless `kind` says otherwise.

    `kind` is a key of `KINDS`. `threads` is "1" or "all"; `needs` an instruction set without which
    the floor does not hold, by LLVM's name; `keys` the length of keys where queries are fewer.
    """

    what: str
    floor: float
    shape: str
    threads: str = "all"
    dtype: str = "float32"
    mask: str = "full()"
    operation: str = "forward"
    peer: str | None = "torch"
    needs: str | None = None
    precision: str = "highest"
    keys: int | None = None
    kind: str = "ratio"

    @property
    def case(self) -> Case:
        """What is timed."""
        batch, heads, length, dim = (int(part) for part in self.shape.split(","))
        problem = Problem(
            batch=batch,
            heads_q=heads,
            heads_kv=heads,
            len_q=length,
            len_k=self.keys or length,
            dim=dim,
            dim_v=dim,
            dtype=self.dtype,
            scale=default_scale(dim),
            mask=parse.parse(self.mask),
            precision=self.precision,
        )
        return Case(problem, self.operation, 1 if self.threads == "1" else host().cores)


@dataclass(frozen=True)
class Result:
    """What was found: `value` is compared with the floor. `reason`: why there is no verdict."""

    figure: Figure
    value: float | None = None
    seconds: float | None = None
    other_seconds: float | None = None
    share: float | None = None
    binding: str | None = None
    reason: str | None = None
    notes: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, row: dict[str, Any]) -> Result:
        """The result that `record` made a row of."""
        fields = {name: value for name, value in row.items() if name != "verdict"}
        return cls(**fields | {"figure": Figure(**row["figure"])})

    @property
    def verdict(self) -> str:
        """`reached`, `not reached`, or `not measured` where there is a reason."""
        if self.reason or self.value is None:
            return "not measured"
        floor = self.figure.floor
        kept = self.value <= floor if self.figure.kind == "compile" else self.value >= floor
        return "reached" if kept else "not reached"


def figures() -> Iterator[Figure]:
    """All rows, in the order in which they are shown."""
    both = ("1", "all")
    for shape, floors in ((D64, (1.35, 1.35)), (D128, (1.2, 1.25))):
        for number, floor in zip(both, floors, strict=True):
            yield Figure("forward", floor, shape, number)
    for shape in (D64, D128, LONG):
        for number in both:
            yield Figure("forward", 1.6, shape, number, mask="causal()")
    for shape in (D64, D128):
        for number in both:
            yield Figure('forward, precision="high"', 2.0, shape, number, precision="high")
    amx = "amx-bf16"
    for dtype, floors in (("bfloat16", (2.5, 2.0)), ("float16", (3.0, 3.0))):
        for shape, floor in zip((D64, D128), floors, strict=True):
            for number in both:
                yield Figure("forward", floor, shape, number, dtype, needs=amx)
    for dtype, floors in (("float32", (1.25, 2.0)), ("bfloat16", (2.0, 3.0))):
        for shape, floor in zip((D64, LONG), floors, strict=True):
            yield Figure("backward", floor, shape, dtype=dtype, operation="backward")
    for dtype in ("float32", "bfloat16"):
        yield Figure("window 256", 1.5, "1,8,16384,64", "all", dtype, WINDOW, peer="flex")
    yield Figure("window 256, both passes", 10, "1,8,4096,64", mask=WINDOW, operation=BOTH)
    for shape, keys in (("1,8,1,64", 32768), ("1,1,1,64", 131072)):
        for dtype in ("float32", "bfloat16", "float16"):
            yield Figure("decode", 0.9, shape, dtype=dtype, keys=keys, kind="reading")
    for frontend in ("NumPy", "torch"):
        yield Figure(f"whole call, {frontend}", 1.0, "1,12,64,32", kind=f"call {frontend}")
    yield Figure("1 to 4 threads", 3.6, D64, peer=None, kind="scaling")
    yield Figure("first compile", 0.6, D64, "1", peer=None, kind="compile")


def measure(figure: Figure, seconds: float) -> Result:
    """Measure one row; a row that cannot be measured says why."""
    missing = _missing(figure)
    if missing:
        return Result(figure, reason=missing)
    with timing.using_threads(figure.case.threads):
        found = KINDS[figure.kind](figure, seconds)
    if found.reason is None and figure.needs and not host().has(figure.needs):
        return replace(found, reason=f"the floor is one of {figure.needs}, here {host().isa}")
    return found


def _missing(figure: Figure) -> str | None:
    """Why a row cannot be measured at all."""
    return BASELINES[figure.peer].unusable if figure.peer else None


# Kinds -----------------------------------------------------------------------------------------


def _ratio(figure: Figure, seconds: float) -> Result:
    """Against the peer, turn by turn."""
    assert figure.peer
    own, other = timing.measure(figure.case, [figure.peer], seconds=seconds)
    share, binding = SHARES.of(own.case, own.median, own.pairs)
    result = Result(figure, None, own.median, None, share, binding, other.reason)
    if other.reason:
        return result
    notes = {
        "peer_prepare_seconds": other.prepare_seconds,
        "peer_first_call_seconds": other.first_call_seconds,
    }
    ratio = other.median / own.median
    return replace(result, value=ratio, other_seconds=other.median, notes=notes)


def _reading(figure: Figure, seconds: float) -> Result:
    """Bytes of keys and values per second, as a share of what reading reaches in the same rounds.

    As many bytes are read, each time other ones; so waking the threads weighs as much in both.
    Every round also reads more than the caches hold: keys and values come from memory, as those of
    a model with many layers do.
    """
    case = figure.case
    inputs = workload.arrays(case)
    size = inputs.k.nbytes + inputs.v.nbytes
    large = np.ones(max(peak.READ_BYTES[1], size), np.int8)
    starts = range(0, large.size - size + 1, size)
    parts = itertools.cycle(
        [peak.reader(host(), large[start : start + size], case.threads) for start in starts]
    )
    own, other = workload.own(case, inputs), BASELINES["torch"].make(case, inputs)
    check("torch", case, own(), other())
    calls = {
        "all": peak.reader(host(), large, case.threads),
        "reading": lambda: next(parts)(),
        "tilefold": own,
        "torch": other,
    }
    median = _medians(calls, seconds)
    speed = {name: size / median[name] for name in ("reading", "tilefold")}
    return Result(
        figure,
        value=speed["tilefold"] / speed["reading"],
        seconds=median["tilefold"],
        other_seconds=median["torch"],
        share=speed["tilefold"] / speed["reading"],
        binding="bytes",
        notes={
            "reading_bytes_per_second": speed["reading"],
            "torch_ratio": median["torch"] / median["tilefold"],
        },
    )


def _call(figure: Figure, seconds: float, *, as_tensors: bool) -> Result:
    """A whole call so small that it is mostly overhead, from one frontend."""
    case = figure.case
    inputs = workload.arrays(case)
    other = BASELINES["torch"].make(case, inputs)
    if as_tensors:
        q, k, v = (tensor(each) for each in (inputs.q, inputs.k, inputs.v))
        inputs = replace(inputs, q=q, k=k, v=v)
    own = workload.own(case, inputs)
    check("torch", case, own(), other())
    median = _medians({"tilefold": own, "torch": other}, seconds)
    share, binding = SHARES.of(case, median["tilefold"], visible_pairs(case.problem))
    ratio = median["torch"] / median["tilefold"]
    return Result(figure, ratio, median["tilefold"], median["torch"], share, binding)


def _scaling(figure: Figure, seconds: float) -> Result:
    """One thread against four, or against as many as there are cores."""
    case, most = figure.case, min(4, host().cores)
    own = workload.own(case, workload.arrays(case))

    def with_threads(number: int) -> Callable[[], object]:
        def call() -> object:
            threads.set_num_threads(number)
            return own()

        return call

    median = _medians({str(number): with_threads(number) for number in (1, most)}, seconds)
    ratio = median["1"] / median[str(most)]
    share, binding = SHARES.of(replace(case, threads=most), median[str(most)], case.problem.pairs)
    reason = f"there are {most} cores" if most < 4 else None
    notes = {"threads": float(most)}
    return Result(figure, ratio, median[str(most)], median["1"], share, binding, reason, notes)


def _compile(figure: Figure, seconds: float) -> Result:
    """The slowest kernel of all rows, from its specification to a loaded function, uncached."""
    times = {}
    for case in dict.fromkeys(each.case for each in figures() if _missing(each) is None):
        for operation in workload.PASSES[case.operation]:
            for launch in plan(case.problem, host(), operation).launches:
                if launch.spec not in times:
                    start = time.perf_counter()
                    binary = runtime.compile(emit(launch.spec), host())
                    runtime.load(binary, launch.spec.kernel)
                    times[launch.spec] = time.perf_counter() - start
    slowest = max(times.values())
    return Result(figure, slowest, slowest, notes={"kernels": len(times)})


KINDS: dict[str, Callable[[Figure, float], Result]] = {
    "ratio": _ratio,
    "reading": _reading,
    "call NumPy": functools.partial(_call, as_tensors=False),
    "call torch": functools.partial(_call, as_tensors=True),
    "scaling": _scaling,
    "compile": _compile,
}
"""How a row is measured, and what its value is."""


def _medians(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    timing.turn_by_turn(calls, seconds=0, least=1)
    times = timing.turn_by_turn(calls, seconds=seconds)
    return {name: statistics.median(each) for name, each in times.items()}


SHARES = RooflineShares()
"""The shares of the roofline of this run, and which bound binds."""


# Tables ----------------------------------------------------------------------------------------

COLUMNS = (
    "",
    "shape",
    ">thr",
    ">tilefold",
    ">other",
    ">value",
    ">floor",
    ">roofline",
    "verdict",
)


def cells(result: Result) -> list[str]:
    """A row as text."""
    figure = result.figure
    shape = figure.shape + (f" x {figure.keys}" if figure.keys else "")
    mask = f" {figure.mask}" if figure.mask == "causal()" else ""
    other = "" if result.other_seconds is None else terminal.seconds(result.other_seconds)
    return [
        f"{figure.what}{mask}, {figure.dtype}",
        shape,
        figure.threads,
        "" if result.seconds is None else terminal.seconds(result.seconds),
        f"{other} {figure.peer}" if other and figure.peer else other,
        "" if result.value is None else _value(figure, result.value),
        _value(figure, figure.floor),
        "" if result.share is None else f"{result.share:.0%}",
        result.verdict,
    ]


def _value(figure: Figure, value: float) -> str:
    if figure.kind == "reading":
        return f"{value:.0%}"
    return f"{value:.2f} s" if figure.kind == "compile" else f"{value:.2f}"


def reasons(results: Sequence[Result]) -> list[str]:
    """Why rows were not measured, each reason once, with the rows that it holds for."""
    rows: dict[str, list[str]] = {}
    for result in results:
        if result.reason:
            rows.setdefault(result.reason, []).append(cells(result)[0])
    return [
        f"not measured: {', '.join(dict.fromkeys(names))}: {reason}"
        for reason, names in rows.items()
    ]


def record(result: Result) -> dict[str, Any]:
    """A row as plain values."""
    return asdict(result) | {"verdict": result.verdict}


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="per row (default 2)")
    parser.add_argument("--save", type=Path, help="write figures.json into this folder")
    parser.add_argument("--only", default="", help="rows whose name or type has this text")
    options = parser.parse_args()
    why_not("torch")  # imported before any call of ours, if it is there: one team for both
    wanted = [each for each in figures() if options.only in f"{each.what} {each.dtype}"]
    results = []
    with terminal.progress() as bar:
        for figure in bar.track(wanted, description="Measuring"):
            results.append(measure(figure, options.seconds))
    console = terminal.out()
    title = f"{host().name}, {host().isa}, {host().cores} cores"
    console.print(terminal.table(title, COLUMNS, (cells(result) for result in results)))
    console.print(
        "value: other / tilefold; decode: share of the bandwidth that reading memory reached"
    )
    for line in reasons(results):
        console.print(terminal.escape(line))
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        document = environment() | {"rows": [record(result) for result in results]}
        text = json.dumps(document, indent=1) + "\n"
        write_atomically(options.save / "figures.json", text.encode())


if __name__ == "__main__":
    main()
