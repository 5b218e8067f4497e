"""The merge: the states that the splits of a query's keys left, folded in ascending order.

    for each query of a head:
        M <- max of m;  l <- sum of 2^((m - M) c) l;  O <- sum of 2^((m - M) c) O
        O <- O / l;  lse <- rest M + ln l                    empty rows: 0 and -inf

A split that saw no key has m = -inf, and adds nothing. The order is fixed, so results depend on how
keys were split and on nothing else.
"""

from __future__ import annotations

from tilefold.backends.cpu.kernels.ir import Value
from tilefold.backends.cpu.kernels.softmax import exp2_scaled
from tilefold.backends.cpu.kernels.state import Frame


class Merge:
    """All splits of the rows of one query head."""

    def __init__(self, frame: Frame, h: Value) -> None:
        self.frame, self.body, self.h = frame, frame.body, h

    def write(self) -> None:
        """Write o and lse of all queries."""
        frame, body, arguments, h = self.frame, self.body, self.frame.arguments, self.h
        length = arguments["len_q"]
        parts = arguments.rows_of("part", frame.shape.scalar, frame.item.b, h)
        state = frame.region("state")
        with body.loop("i", 0, length) as i:
            first = frame.at(parts, body.mul(i, arguments["part_s"]), "first")
            step = body.mul(length, arguments["part_s"], "step")
            top = body.variable(frame.vector, frame.lowest, "m")
            with body.loop("split", 0, arguments["block_rows"]) as split:
                part = frame.at(first, body.mul(split, step))
                m = frame.load(frame.maximum_place(part), "m")
                body.write(top, body.larger(m, body.read(top)))
            frame.begin(state)
            body.store(body.read(top), frame.maximum_place(state))
            safe_m = frame.subtrahend(body.read(top))
            with body.loop("split", 0, arguments["block_rows"]) as split:
                self._add(state, frame.at(first, body.mul(split, step), "part"), safe_m)
            frame.finish(state, h, i)

    def _add(self, state: Value, part: Value, safe_m: Value) -> None:
        frame, body, spec = self.frame, self.body, self.frame.spec
        change = body.binary("fsub", frame.load(frame.maximum_place(part), "m"), safe_m)
        alpha = exp2_scaled(body, change, frame.rate, hint="alpha")
        places = [(frame.sum_place(part), frame.sum_place(state))]
        for first in range(0, spec.whole(spec.dim_v), spec.lanes):
            places.append((frame.at(part, first), frame.at(state, first)))
        for source, target in places:
            old = frame.load(target)
            body.store(body.multiply_add(frame.load(source), alpha, old), target)
