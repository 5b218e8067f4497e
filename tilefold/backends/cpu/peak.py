"""The peak rates of this processor, measured: multiply-adds, exponentials and reads.

Three small kernels, written with the same generator as attention, run on the same threads:

    multiply-add:  acc[i] += a * b              on as many independent registers as there are, of
                                                elements, words of 2 or 4 numbers, or tiles of words
    exponential:   x[i] = exp2(x[i] - 1)        the exp2 of `softmax`, several chains at once
    read:          acc[i] += memory[...]        over more memory than the caches hold

The fastest run counts, since a disturbance only makes a run slower. Results are kept in the kernel
cache, for this device, type and number of threads. A busy machine may have measured them, so they
are measured again when they are old, when the runs differed much, and when a result beats them;
the best rates ever seen count.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.cpu import runtime, threads
from tilefold.backends.cpu.device import Device
from tilefold.backends.cpu.kernels import amx, microkernel
from tilefold.backends.cpu.kernels.ir import Body, Module, Value, Variable, alignment, vector
from tilefold.backends.cpu.kernels.softmax import EXP2_COARSE, FORMATS, Rate, exp2_scaled
from tilefold.backends.cpu.kernels.storage import SCALARS
from tilefold.backends.cpu.matmul import quantized_fours
from tilefold.backends.cpu.matmul.tile import add_product
from tilefold.backends.cpu.spec import FMA, Multiplier
from tilefold.common import disk_cache
from tilefold.planning.roofline import Rates
from tilefold.problems.attention import ITEM_BYTES, STATISTICS

Run = Callable[[], None]
Writer = Callable[[Body, Value, Value, Value, str], None]
"""A function that emits the work of one item.

Its arguments are the body, the data, the item's number, the item's result, and the type.
"""

SECONDS = 0.1  # of each of the three; a run takes 0.1 ms to 10 ms
ITEMS_PER_WORKER = 4
STEPS = 20_000  # a work item takes 20 to 70 microseconds at 4.5 GHz with AVX-512 (AMD EPYC)
CHAINS = 8
READ_ITEM_BYTES = 1 << 18
READ_BYTES = (1 << 26, 1 << 28)  # at least and at most, else four times the last cache
KEPT_SECONDS = 3600.0  # a measurement is repeated at the next use after an hour
LARGEST_SPREAD = 0.25  # and at once where the median run took so much longer than the fastest
_VERSION = "rates 3"
_TERMS = {"fma": 1, "dot": 2, "madd": 2, "vnni": 4, "fours": 4, "amx": 32, "amx8": 64}
"""Products of one sum that are made together, by the unit: see `matmul.spec.Unit`. "fours" are the
three instructions of `matmul.quantized_fours`."""

_MEASURED = ("flops_per_second", "exponentials_per_second", "bytes_per_second")


def rates(
    device: Device, dtype: str, workers: int, products: Multiplier = FMA, *, again: bool = False
) -> Rates:
    """The best rates seen on this machine: a new measurement counts too, with `again` or if due.

    `products` is the multiplier of the kernels: `choice.multiplier`, or for a `dtype` of "int32"
    what multiplies integers.
    """
    kept = disk_cache.default()
    question = json.dumps([device.name, device.triple, device.features, dtype, workers, *products])
    answer = kept.get(question, _VERSION)
    known = Rates(**json.loads(answer)) if answer else None
    if known and not again and not _is_due(known):
        return known
    seen = measure(device, dtype, workers, products)
    if known:
        best = {name: max(getattr(seen, name), getattr(known, name)) for name in _MEASURED}
        seen = replace(seen, **best)
    kept.put(question, _VERSION, json.dumps(seen.__dict__).encode(), ".json")
    return seen


def _is_due(known: Rates) -> bool:
    """True where a measurement is old, or was made while the machine did other work."""
    made = datetime.fromisoformat(known.measured or "1970-01-01T00:00:00+00:00")
    age = (datetime.now(timezone.utc) - made).total_seconds()
    return not 0 <= age < KEPT_SECONDS or known.spread > LARGEST_SPREAD


def measure(device: Device, dtype: str, workers: int, products: Multiplier = FMA) -> Rates:
    """Measure all rates now, which takes about half a second."""
    computed = "float32" if dtype == "int32" else STATISTICS[dtype]
    lanes = device.vector_bytes // ITEM_BYTES[computed]
    steps = STEPS * workers * ITEMS_PER_WORKER
    items = workers * ITEMS_PER_WORKER
    small = np.full(lanes, 0.5, computed)
    writer, sums = _products(device, dtype, lanes, products.unit)
    adds, *spreads = _timed(_runner(device, workers, writer, items, small))
    coarse = products.unit != "fma" and products.parts == 1
    exponentials, spread = _timed(_runner(device, workers, _exponentials(coarse), items, small))
    spreads.append(spread)
    size = uncached_bytes(device)
    data = np.ones(size // ITEM_BYTES[computed], computed)
    reading, spread = _timed(reader(device, data, workers))
    spreads.append(spread)
    return Rates(
        device=device.name,
        dtype=dtype,
        workers=workers,
        flops_per_second=2 * sums * _TERMS[products.unit] * steps / products.terms / adds,
        exponentials_per_second=lanes * steps * CHAINS / exponentials,
        bytes_per_second=(size // READ_ITEM_BYTES) * READ_ITEM_BYTES / reading,
        measured=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        spread=max(spreads),
    )


def uncached_bytes(device: Device) -> int:
    """The size of an array of which the caches hold a part at most."""
    return min(max(4 * device.l3_bytes, READ_BYTES[0]), READ_BYTES[1])


def reader(device: Device, data: NDArray[Any], workers: int) -> Run:
    """A call that reads a contiguous array once, whatever its type.

    Raises ValueError unless its size is a multiple of `READ_ITEM_BYTES`.
    """
    items, rest = divmod(data.nbytes, READ_ITEM_BYTES)
    if rest or not data.flags.c_contiguous:
        raise ValueError(
            f"data must be contiguous and a multiple of {READ_ITEM_BYTES} bytes, got {data.nbytes}"
        )
    return _runner(device, workers, _reads, items, data.reshape(-1).view(np.float32))


def _runner(device: Device, workers: int, write: Writer, items: int, data: NDArray[Any]) -> Run:
    """A call of a kernel over `items` work items, each with one vector for its result."""
    kernel = runtime.kernel(_source(device, data.dtype.name, write), "peak", device)
    results = np.empty(items * device.vector_bytes, np.int8)
    arguments = (ctypes.c_int64 * 4)(0, items, data.ctypes.data, results.ctypes.data)

    def run(_keep_alive: object = (data, results)) -> None:
        arguments[0] = 0
        threads.run(kernel.address, ctypes.addressof(arguments), workers)

    return run


def _timed(run: Run) -> tuple[float, float]:
    """The time of the fastest run in seconds, and how much longer the median run took: 0.1 is 10 %.

    The first run, which wakes the threads, does not count.
    """
    run()
    seconds: list[float] = []
    end = time.perf_counter() + SECONDS
    while (start := time.perf_counter()) < end or not seconds:
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds), statistics.median(seconds) / min(seconds) - 1


def _source(device: Device, dtype: str, write: Writer) -> str:
    scalar = SCALARS[dtype]
    module = Module("a measurement of peak rates", device.vector_bytes * 8)
    type_ = vector(device.vector_bytes // np.dtype(dtype).itemsize, scalar)
    arguments = Value("%arguments", "ptr")
    with module.function("peak", [arguments]) as body:
        items = body.load(body.offset(arguments, "i64", 1), "i64", "items")
        data = body.load(body.offset(arguments, "i64", 2), "ptr", "data")
        results = body.load(body.offset(arguments, "i64", 3), "ptr", "results")
        with body.forever("work") as end:
            item = body.result("item", "i64", "atomicrmw add ptr %arguments, i64 1 monotonic")
            body.leave_unless(body.compare("slt", item, items), end)
            write(body, data, item, body.offset(results, type_, item, "result"), type_)
    return module.text()


def _products(device: Device, dtype: str, lanes: int, unit: str) -> tuple[Writer, int]:
    """What measures a unit, and the sums to which a step of it adds."""
    if tiles := {"amx": "tdpbf16ps", "amx8": "tdpbssd"}.get(unit):
        return _tile_products(tiles), 4 * amx.ROWS**2
    registers = device.vector_registers - 4
    if dtype == "int32":
        return _integer_products(registers, unit), lanes * registers
    write = {"fma": _multiply_adds, "dot": _pair_products}[unit]
    return write(registers), lanes * registers


def _multiply_adds(registers: int) -> Writer:
    def write(body: Body, data: Value, item: Value, result: Value, type_: str) -> None:
        factor = body.load(data, type_, "a")
        places = [body.variable(type_, factor, "acc") for _ in range(registers)]
        with body.loop("step", 0, STEPS):
            for place in places:
                body.write(place, body.multiply_add(body.read(place), factor, factor, "acc"))
        _keep(body, result, places)

    return write


def _pair_products(registers: int) -> Writer:
    def write(body: Body, data: Value, item: Value, result: Value, type_: str) -> None:
        lanes = Value("", type_).lanes
        shape = microkernel.Shape(1, 1, lanes, "float", pairs=True)
        words = body.load(data, vector(lanes, "i32"), "words")
        start = body.constant(0.0, type_)
        places = [body.variable(type_, start, "acc") for _ in range(registers)]
        with body.loop("step", 0, STEPS):
            for place in places:
                body.write(
                    place, microkernel.add_product(body, shape, words, words, body.read(place))
                )
        _keep(body, result, places)

    return write


def _integer_products(registers: int, unit: str) -> Writer:
    def write(body: Body, data: Value, item: Value, result: Value, type_: str) -> None:
        words = vector(Value("", type_).lanes, "i32")
        factor = body.load(data, words, "words")
        places = [body.variable(words, factor, "acc") for _ in range(registers)]
        with body.loop("step", 0, STEPS):
            for place in places:
                total = body.read(place)  # a factor too: a product that is the same is made once
                if unit == "fours":
                    body.write(place, quantized_fours.add_product(body, total, factor, total))
                else:
                    body.write(place, add_product(body, unit, total, factor, total))
        _keep(body, result, places)

    return write


def _tile_products(instruction: str) -> Writer:
    def write(body: Body, data: Value, item: Value, result: Value, type_: str) -> None:
        with amx.configured(body):
            amx.products(body, STEPS, instruction)
        body.store(body.constant(0.0, type_), result)

    return write


def _exponentials(coarse: bool) -> Writer:
    def write(body: Body, data: Value, item: Value, result: Value, type_: str) -> None:
        places = [body.variable(type_, body.load(data, type_), "x") for _ in range(CHAINS)]
        one = body.constant(1.0, type_)
        terms = EXP2_COARSE if coarse else None
        rate = Rate(one, body.constant(-FORMATS[one.element].bias, type_))
        with body.loop("step", 0, STEPS):
            for place in places:
                below = body.binary("fsub", body.read(place), one, "x")
                body.write(place, exp2_scaled(body, below, rate, terms=terms))
        _keep(body, result, places)

    return write


def _reads(body: Body, data: Value, item: Value, result: Value, type_: str) -> None:
    places = [body.variable(type_, body.constant(0.0, type_), "acc") for _ in range(CHAINS)]
    start = body.offset(data, "i8", body.mul(item, READ_ITEM_BYTES), "start")
    vectors = READ_ITEM_BYTES // (Value("", type_).lanes * alignment(type_))
    with body.loop("step", 0, vectors, CHAINS) as step:
        for number, place in enumerate(places):
            address = body.offset(start, type_, body.add(step, number))
            total = body.binary("fadd", body.read(place), body.load(address, type_), "acc")
            body.write(place, total)
    _keep(body, result, places)


def _keep(body: Body, result: Value, places: list[Variable]) -> None:
    """Emit a store of the sum of all registers, so that no code before it is dead."""
    total = body.read(places[0])
    add = "add" if total.element == "i32" else "fadd"
    for place in places[1:]:
        total = body.binary(add, total, body.read(place))
    body.store(total, result)
