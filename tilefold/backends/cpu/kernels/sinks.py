"""Sinks: logits of a head that take their share of the sum, and have no value.

    m_new <- max(m, sinks);  l <- 2^((m - m_new) c) l + sum of exp(sink - rest m_new)      `take`
    dsink <- - sum over queries of exp(sink - lse) delta                            `gradients`

Sinks are natural, so their differences with `rest m` are computed in double. The sum of a gradient
has one owner and one order: batch entries, then queries, a sum in double per lane.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tilefold.backends.cpu.kernels.arguments import Arguments
from tilefold.backends.cpu.kernels.block import Block, emit
from tilefold.backends.cpu.kernels.ir import Body, Value, overload, vector
from tilefold.backends.cpu.kernels.scale import Scale
from tilefold.backends.cpu.kernels.softmax import LOG2_E, exp2_cut, exp2_scaled
from tilefold.backends.cpu.kernels.storage import SCALARS
from tilefold.backends.cpu.spec import KernelSpec


def take(
    body: Body,
    spec: KernelSpec,
    arguments: Arguments,
    scale: Scale,
    h: Value,
    m: Value,
    total: Value,
) -> tuple[Value, Value, Value]:
    """The maximum and the sum with the sinks of query head `h`; and the factor of older sums."""
    body.comment("m_new <- max(m, sinks);  l <- alpha l + sum of exp(sink - rest m_new)")
    lowest = body.constant(float("-inf"), m.type)
    top = body.variable(m.type, lowest, "top")
    with _sinks(body, spec, arguments, h) as (_, sink):
        body.write(top, body.larger(sink, body.read(top), "top"))
    new = body.larger(scale.in_scores(body.read(top)), m, "m.new")
    nothing = body.compare("oeq", new, lowest)
    safe = body.select(nothing, body.constant(0.0, m.type), new, "m.safe")
    alpha = exp2_scaled(body, body.binary("fsub", m, safe), scale.rate(), hint="alpha")
    running = body.variable(m.type, body.binary("fmul", total, alpha, "l"), "l")
    with _sinks(body, spec, arguments, h) as (_, sink):
        weight = exp2_cut(body, _exponent(body, scale, sink, safe))
        body.write(running, body.binary("fadd", body.read(running), weight, "l"))
    return new, body.read(running), alpha


@contextmanager
def _sinks(
    body: Body, spec: KernelSpec, arguments: Arguments, h: Value
) -> Iterator[tuple[Value, Value]]:
    """For each sink of a head: its number, and it in all lanes."""
    scalar = SCALARS[spec.dtype]
    rows = body.offset(arguments["sinks"], scalar, body.mul(h, arguments["sinks_h"]), "sinks")
    with body.loop("sink", 0, spec.sinks) as number:
        place = body.offset(rows, scalar, body.mul(number, arguments["sinks_n"]))
        yield number, body.splat(body.load(place, scalar, "sink"), spec.lanes, "sink")


def _exponent(body: Body, scale: Scale, sink: Value, m: Value) -> Value:
    """log2 of exp(sink - rest m)."""
    difference = scale.natural_difference(sink, m)
    return body.binary("fmul", difference, body.constant(LOG2_E, m.type), "e")


def gradients(spec: KernelSpec) -> str:
    """The source of the kernel that sums the gradients of sinks."""
    title = """
for each head, for each of its sinks:                    one owner
    dsink <- - sum of exp(sink - lse) delta              over batch entries and queries, in order"""
    return emit(spec, title.strip(), _write_gradients)


def _write_gradients(block: Block) -> None:
    body, spec, arguments, shape = block.body, block.spec, block.arguments, block.shape
    wide = vector(shape.lanes, "double")
    rows = body.offset(
        arguments["dsinks"], shape.scalar, body.mul(block.h, arguments["dsinks_h"]), "dsinks"
    )
    with _sinks(body, spec, arguments, block.h) as (number, sink):
        total = body.variable(wide, body.constant(0.0, wide), "dsink")
        with (
            body.loop("b", 0, arguments["block_rows"]) as block.b,
            body.loop("row", 0, arguments["len_q"], shape.width) as first,
        ):
            block.at_row(body.binary("udiv", first, shape.width))
            m, r, delta = (block.pack(name, 1, block.scalar(1.0)) for name in ("m", "r", "delta"))
            for j in range(shape.vectors):
                places = [block.at(region, 0, j) for region in (m, r, delta)]
                own, low, change = (body.load(place, shape.vector) for place in places)
                none = body.constant(float("-inf"), low.type)
                empty = body.compare("oeq", low, body.constant(float("inf"), low.type))
                low = body.select(empty, none, low, "r")  # lse is -inf: all sinks are
                exponent = _exponent(body, block.scale, sink, own)
                weight = exp2_cut(body, body.binary("fadd", exponent, low, "e"))
                term = body.binary("fmul", weight, change, "term")
                term = body.cast("fpext", term, wide, "term")
                body.write(total, body.binary("fsub", body.read(total), term, "dsink"))
        lanes = body.read(total, "dsink")
        name = f"llvm.vector.reduce.fadd.{overload(wide)}"
        found = body.call(name, "double", [body.constant(-0.0, "double"), lanes], "dsink")
        place = body.offset(rows, shape.scalar, body.mul(number, arguments["dsinks_n"]))
        body.store(body.cast("fptrunc", found, shape.scalar, "dsink"), place)
