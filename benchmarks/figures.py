"""The figures that the CPU backend is to reach, measured in one run: ratios, shares and verdicts.

    python benchmarks/figures.py [--seconds 2] [--save benchmarks/results] [--only decode]

Each row is a floor: how many times as fast as the best peer, by turns in processes of their own on
the same random data, warm; a share of the read bandwidth of the same minute; how well threads
scale; how long a kernel compiles. A row that cannot be measured here says why. `share` is that of
the roofline at the rates that this machine reached in this run, and may have a floor too.
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
from tilefold.measuring.apart import Apart
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
    the floor does not hold, by LLVM's name; `keys` the length of keys where queries are fewer;
    `heads_kv` the heads of keys where they are fewer. `peer` is a key of `BASELINES`, or "best":
    the fastest of `RIVALS`. `share_floor` is asked of the share of the roofline.
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
    heads_kv: int | None = None
    share_floor: float | None = None

    @property
    def case(self) -> Case:
        """What is timed."""
        batch, heads, length, dim = (int(part) for part in self.shape.split(","))
        problem = Problem(
            batch=batch,
            heads_q=heads,
            heads_kv=self.heads_kv or heads,
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
    """What was found: `value` is compared with the floor. `reason`: why there is no verdict.

    `other` is the peer that was the fastest, and `cold_value` the ratio of cold calls.
    """

    figure: Figure
    value: float | None = None
    seconds: float | None = None
    other_seconds: float | None = None
    share: float | None = None
    binding: str | None = None
    reason: str | None = None
    notes: dict[str, float] = field(default_factory=dict)
    other: str | None = None
    cold_value: float | None = None

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
        floor, least = self.figure.floor, self.figure.share_floor
        kept = self.value <= floor if self.figure.kind == "compile" else self.value >= floor
        full = least is None or self.share is None or self.share >= least
        return "reached" if kept and full else "not reached"


BEST = "best"
RIVALS = ("torch", "onnxruntime", "openvino")
"""The peers whose best is "best"."""


def figures() -> Iterator[Figure]:
    """All rows, in the order in which they are shown."""
    yield from _forward()
    yield from _short()
    yield from _halves()
    for dtype, floor, share in (("float32", 4.5, 0.78), ("bfloat16", 10, 0.65)):
        shape = "1,8,16384,64"
        yield Figure(
            "window 256", floor, shape, "all", dtype, WINDOW, peer="flex", share_floor=share
        )
    for dtype, floor, share in (("float32", 2.9, 0.92), ("bfloat16", 3.3, 0.86)):
        for shape in (D64, LONG):
            row = Figure("backward", floor, shape, "all", dtype, share_floor=share)
            yield replace(row, operation="backward", peer="torch")
    yield Figure("window 256, both passes", 10, "1,8,4096,64", mask=WINDOW, operation=BOTH)
    yield from _decoding()
    for frontend in ("NumPy", "torch"):
        yield Figure(f"whole call, {frontend}", 1.0, "1,12,64,32", kind=f"call {frontend}")
    yield Figure("1 to 4 threads", 3.6, D64, peer=None, kind="scaling")
    yield Figure("first compile", 0.6, D64, "1", peer=None, kind="compile")


def _forward() -> Iterator[Figure]:
    """Long sequences in float32."""
    for mask, rows in (
        ("full()", ((D64, 1.25, 0.92), (D128, 1.2, 0.93))),
        ("causal()", ((D64, 1.25, 0.88), (D128, 1.2, 0.9), (LONG, 1.25, 0.88))),
    ):
        for shape, floor, share in rows:
            for number in ("1", "all"):
                yield Figure(
                    "forward", floor, shape, number, mask=mask, peer=BEST, share_floor=share
                )
    grouped = Figure("grouped, forward", 1.2, "1,32,2048,128", mask="causal()", heads_kv=8)
    yield replace(grouped, share_floor=0.9)
    for number in ("1", "all"):
        yield Figure('forward, precision="high"', 2.0, D64, number, precision="high")


def _short() -> Iterator[Figure]:
    """Short sequences in float32, one thread."""
    for shape, full, causal in (
        ("1,8,512,64", (1.3, 0.92), (1.3, 0.87)),
        ("8,12,128,64", (1.5, 0.88), (2.3, 0.7)),
        ("32,12,64,64", (2.2, 0.75), (2.8, 0.48)),
    ):
        for mask, (floor, share) in (("full()", full), ("causal()", causal)):
            yield Figure("forward", floor, shape, "1", mask=mask, peer=BEST, share_floor=share)


def _halves() -> Iterator[Figure]:
    """bfloat16 and float16; the floors of AMX where there is AMX."""
    for mask, floor, share in (("full()", 1.45, 0.86), ("causal()", 1.9, 0.8)):
        yield Figure("forward", floor, D64, "all", "bfloat16", mask, peer=BEST, share_floor=share)
    yield Figure("forward", 2.1, "8,12,128,64", dtype="bfloat16", peer=BEST, share_floor=0.8)
    grouped = Figure("grouped, forward", 2.3, "1,32,2048,128", "all", "bfloat16", "causal()")
    for keys in (None, 4096):
        shape = "1,32,256,128" if keys else grouped.shape
        yield replace(grouped, shape=shape, keys=keys, heads_kv=8, share_floor=0.85)
    amx = "amx-bf16"
    for dtype, floors in (("bfloat16", (2.5, 2.0)), ("float16", (3.0, 3.0))):
        for shape, floor in zip((D64, D128), floors, strict=True):
            for number in ("1", "all"):
                yield Figure("forward beside torch", floor, shape, number, dtype, needs=amx)


def _decoding() -> Iterator[Figure]:
    """One query each: shares of reading."""
    halves = ("bfloat16", "float16")
    for shape, keys, floors in (
        ("1,8,1,64", 32768, (0.96, 0.92, 0.92)),
        ("1,1,1,64", 131072, (0.93, 0.88, 0.88)),
    ):
        for dtype, floor in zip(("float32", *halves), floors, strict=True):
            yield Figure("decode", floor, shape, dtype=dtype, keys=keys, kind="reading")
    for heads, dtype, floor in (
        (8, "float32", 0.91),
        (32, "float32", 0.83),
        (32, "bfloat16", 0.67),
        (64, "bfloat16", 0.5),
    ):
        row = Figure("decode, 8 requests", floor, f"8,{heads},1,128", "all", dtype, kind="reading")
        yield replace(row, keys=4096, heads_kv=8)
    for heads, floor in ((8, 0.95), (16, 0.93), (32, 0.84), (64, 0.71)):
        row = Figure("decode, grouped", floor, f"1,{heads},1,64", "1", keys=32768, kind="reading")
        yield replace(row, heads_kv=8)


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
    if figure.peer == BEST:
        return None if rivals() else "none of its peers is installed"
    return BASELINES[figure.peer].unusable if figure.peer else None


@functools.cache
def rivals() -> tuple[str, ...]:
    """Those of `RIVALS` that are installed."""
    return tuple(name for name in RIVALS if BASELINES[name].unusable is None)


@functools.cache
def processes() -> Apart:
    """The processes of tilefold and of all peers that rows name; they end with this one."""
    return Apart(["tilefold", *rivals(), *(["flex"] if "torch" in rivals() else [])])


# Kinds -----------------------------------------------------------------------------------------


def _ratio(figure: Figure, seconds: float) -> Result:
    """Against the fastest of the peers, each in a process of its own."""
    assert figure.peer
    names = rivals() if figure.peer == BEST else (figure.peer,)
    found = processes().measure(figure.case, seconds=seconds, names=["tilefold", *names])
    own, able = found[0], [row for row in found[1:] if row.reason is None]
    share, binding = SHARES.of(own.case, own.median, own.pairs)
    result = Result(figure, None, own.median, None, share, binding)
    if not able:
        return replace(result, reason=found[1].reason)
    best = min(able, key=lambda row: row.median)
    notes = {f"{row.name}_seconds": row.median for row in able}
    notes |= {f"{row.name}_cold_seconds": row.cold_median for row in [own, *able]}
    notes |= {
        "peer_prepare_seconds": best.prepare_seconds,
        "peer_first_call_seconds": best.first_call_seconds,
    }
    return replace(
        result,
        value=best.median / own.median,
        other_seconds=best.median,
        other=best.name,
        cold_value=min(row.cold_median for row in able) / own.cold_median,
        notes=notes,
    )


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
    ">cold",
    ">floor",
    ">roofline",
    "verdict",
)


def cells(result: Result) -> list[str]:
    """A row as text."""
    figure = result.figure
    shape = figure.shape + (f" x {figure.keys}" if figure.keys else "")
    if figure.heads_kv:
        shape += f" ({figure.heads_kv})"
    mask = f" {figure.mask}" if figure.mask == "causal()" else ""
    other = "" if result.other_seconds is None else terminal.seconds(result.other_seconds)
    share = "" if result.share is None else f"{result.share:.0%}"
    if figure.share_floor is not None and figure.kind == "ratio":
        share += f" of {100 * figure.share_floor:.0f}"
    return [
        f"{figure.what}{mask}, {figure.dtype}",
        shape,
        figure.threads,
        "" if result.seconds is None else terminal.seconds(result.seconds),
        f"{other} {result.other or figure.peer}" if other and figure.peer else other,
        "" if result.value is None else _value(figure, result.value),
        "" if result.cold_value is None else _value(figure, result.cold_value),
        _value(figure, figure.floor),
        share,
        result.verdict,
    ]


def shown(result: Result) -> list[str]:
    """A row as text for a terminal of 80 columns."""
    what, shape, number, own, other, value, _, floor, share, verdict = cells(result)
    mark = {"reached": "*", "not reached": " "}.get(verdict, "-")
    return [f"{mark} {what} {shape}", number, own, other, f"{value or '-'} of {floor}", share]


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


def save(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows, with where and when they were measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(environment() | {"rows": rows}, indent=1) + "\n"
    write_atomically(path, text.encode())


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
    columns = ("", ">thr", ">tilefold", ">other", ">value", ">roofline")
    console.print(terminal.table(title, columns, (shown(result) for result in results)))
    console.print(
        "* reached, - not measured; value: other / tilefold, and its floor; decode: share of the"
        " bandwidth that reading memory reached; (8): heads of keys"
    )
    for line in reasons(results):
        console.print(terminal.escape(line))
    if options.save:
        save(options.save / "figures.json", [record(result) for result in results])


if __name__ == "__main__":
    main()
