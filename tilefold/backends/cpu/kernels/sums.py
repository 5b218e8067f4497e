"""Sums over the lanes of several vectors at once, side by side in the lanes of one vector.

As many vectors as there are lanes are folded in pairs, like the transpose of a square whose columns
are then added: 3 instructions for each vector instead of log2(lanes) + 1 shuffles and additions.
"""

from __future__ import annotations

from tilefold.backends.cpu.kernels.ir import Body, Value


def push(body: Body, sums: list[tuple[int, Value]], value: Value) -> None:
    """Add the sums of one more key; vectors of equally many keys are folded into one.

    A vector of 2^t keys holds, for each of them, as many partial sums as fill it. Neighbours are
    folded as soon as both are there, so that few vectors are held at a time.
    """
    level = 0
    while sums and sums[-1][0] == level:
        _, before = sums.pop()
        value = _fold(body, before, value, 1 << level)
        level += 1
    sums.append((level, value))


def _fold(body: Body, left: Value, right: Value, keys: int) -> Value:
    """Two vectors of the partial sums of `keys` keys each as one of both, half as many for each.

    Within 128 bits the keys alternate first, which takes one instruction on every machine; beyond
    that, whole groups of 128 bits change places.
    """
    lanes = left.lanes
    unit = min(lanes, 16 // (4 if left.element == "float" else 8))
    picks: list[list[int]] = [[], []]
    if keys < unit:
        partials = unit // keys
        for start in range(0, lanes, unit):
            for half, pick in enumerate(picks):
                for p in range(half * partials // 2, (half + 1) * partials // 2):
                    for source in (0, lanes):
                        pick += [source + start + p * keys + key for key in range(keys)]
    else:
        partials = lanes // keys
        for half, pick in enumerate(picks):
            for source in (0, lanes):
                for group in range(keys // unit):
                    for p in range(half * partials // 2, (half + 1) * partials // 2):
                        start = source + (group * partials + p) * unit
                        pick += range(start, start + unit)
    first, second = (body.shuffle(left, right, pick) for pick in picks)
    return body.binary("fadd", first, second, "s")
