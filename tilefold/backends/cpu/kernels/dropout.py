"""The factors of dropout: 0 for a dropped pair, 1 / (1 - p) for a kept one.

    for each tile: its factors go to scratch, before its products       `Factors.tile`
    P <- factor P                                                       where P meets V or dO
    dS <- P (factor dP - delta)

`tilefold.problems.dropout` defines which pairs are kept: Philox of (q, k // 4, h, b), whose four
words serve four neighbouring keys. Words of 32 bits lie in lanes of 64. So a product of two words
is one instruction, and what lies above a word is never looked at. Two evaluations, or two words of
one, fill the lanes in the end:

    queries in the lanes    evaluations of even and of odd queries; a word of both is a row
    keys in the lanes       even lanes evaluate one line of keys, odd lanes another; the four words
                            of a lane are turned to four neighbouring keys

Factors, not bits: a multiplication keeps the marks of forbidden pairs (a weight of -0.0), and in dS
it costs no instruction.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilefold.backends.cpu.kernels.arguments import Arguments
from tilefold.backends.cpu.kernels.ir import Body, Module, Operand, Value, vector
from tilefold.backends.cpu.kernels.microkernel import Shape
from tilefold.backends.cpu.kernels.tile import padded
from tilefold.problems.dropout import MULTIPLIERS, ROUNDS, WEYL

GROUP = 4
"""Neighbouring keys of one evaluation."""

_WORD = 0xFFFFFFFF
_PARAMETERS = ("q", "k", "rows", "h", "b", "seed", "keep_from")


def line_of(lanes: int, scalar: str) -> int:
    """Pairs whose factors are made together: the words of 32 bits in a vector."""
    return lanes * (2 if scalar == "double" else 1)


def stride(width: int, lanes: int, scalar: str) -> int:
    """Elements from one row of factors to the next, for rows as wide as a block.

    A block of keys that does not begin with a group has a few factors before it.
    """
    before = 0 if width % GROUP == 0 else GROUP - 1
    return padded(width + before, line_of(lanes, scalar))


def rows(traversed: int) -> int:
    """Rows of factors of a tile of so many rows: where rows are keys, groups are whole."""
    return padded(traversed + GROUP - 1, GROUP)


@dataclass(frozen=True)
class Factors:
    """The factors of the tile that was made last.

    `first` is the first row of the tile, and the first column of the block.
    """

    body: Body
    shape: Shape
    scratch: Value
    row: Value
    column: Value
    step: int

    def at(self, row: Operand, j: int) -> Value:
        """The factors of vector `j` of a row of the tile."""
        body, shape = self.body, self.shape
        line = body.mul(body.add(self.row, row), self.step)
        place = body.add(body.add(line, self.column), j * shape.lanes)
        return body.load(body.offset(self.scratch, shape.scalar, place), shape.vector, "keep")


def of_tile(
    body: Body,
    shape: Shape,
    arguments: Arguments,
    scratch: Value,
    *,
    parallel: str,
    block: Value,
    first: Value,
    count: Value,
    h: Value,
    b: Value,
) -> Factors:
    """Make the factors of a tile: of `count` rows from `first` on, and the lanes of a block."""
    step = stride(shape.width, shape.lanes, shape.scalar)
    none = Value("0", "i64")
    body.comment("Z <- 0 where a pair falls out, else 1 / (1 - p)")
    if parallel == "q":
        before = body.binary("and", first, GROUP - 1, "before")
        start, length = body.sub(first, before), body.add(count, before)
        place = [block, start, length, h, b]
        factors = Factors(body, shape, scratch, before, none, step)
        function = _queries_in_lanes(body.module, shape, step)
    else:
        whole = shape.width % GROUP == 0
        before = none if whole else body.binary("and", block, GROUP - 1, "before")
        start = block if whole else body.sub(block, before)
        place = [first, start, count, h, b]
        factors = Factors(body, shape, scratch, none, before, step)
        function = _keys_in_lanes(body.module, shape, step)
    body.invoke(function, [scratch, *place, *_call(body, arguments, shape)])
    return factors


def of_row(
    body: Body,
    shape: Shape,
    arguments: Arguments,
    scratch: Value,
    *,
    query: Value,
    first: Value,
    count: Value,
    h: Value,
    b: Value,
) -> Value:
    """Make the factors of one query and `count` keys from `first` on; the address of the first."""
    before = body.binary("and", first, GROUP - 1, "before")
    place = [query, body.sub(first, before), body.add(count, before), h, b]
    function = _keys_of_query(body.module, shape)
    body.comment("Z <- 0 where a pair falls out, else 1 / (1 - p)")
    body.invoke(function, [scratch, *place, *_call(body, arguments, shape)])
    return body.offset(scratch, shape.scalar, before, "keep")


def _call(body: Body, arguments: Arguments, shape: Shape) -> list[Value]:
    """What is the same in all tiles of a call: the seed, the threshold and the factor."""
    seed = body.load(arguments["seed"], "i64", "seed")
    factor = body.cast("bitcast", arguments["keep_factor"], "double", "factor")
    return [seed, arguments["keep_from"], body.cast("fptrunc", factor, shape.scalar, "factor")]


class _Generator:
    """A function that makes factors, while it is written."""

    def __init__(self, body: Body, shape: Shape, parameters: list[Value]) -> None:
        self.body, self.shape = body, shape
        names = ("scratch", *_PARAMETERS, "keep_factor")
        self.given = dict(zip(names, parameters, strict=True))
        self.line = line_of(shape.lanes, shape.scalar)
        self.evaluations = self.line // 2
        self.lanes = vector(self.evaluations, "i64")
        seed = self.given["seed"]
        self._key = (body.binary("and", seed, _WORD), body.binary("lshr", seed, 32))
        threshold = body.cast("trunc", self.given["keep_from"], "i32")
        self._threshold = body.splat(threshold, self.line, "threshold")
        self._factor = body.splat(self.given["keep_factor"], self.line, "factor")

    def counting(self, steps: list[int], start: Value) -> Value:
        """`start` plus the step of each lane."""
        numbers = ", ".join(f"i64 {step}" for step in steps)
        lanes = Value(f"<{numbers}>", self.lanes)
        return self.body.add(self.body.splat(start, self.evaluations), lanes)

    def words(self, query: Value, group: Value) -> list[Value]:
        """The four words of an evaluation in each lane; what lies above a word is anything."""
        body, count = self.body, self.evaluations
        c0, c1 = query, group
        c2, c3 = (body.splat(self.given[name], count) for name in ("h", "b"))
        for number in range(ROUNDS):
            first, second = (
                body.mul(body.binary("and", word, _WORD), factor)
                for word, factor in zip((c0, c2), MULTIPLIERS, strict=True)
            )
            k0, k1 = (
                body.splat(body.add(part, number * step & _WORD), count)
                for part, step in zip(self._key, WEYL, strict=True)
            )
            c0, c1, c2, c3 = (
                self._mixed(second, c1, k0),
                second,
                self._mixed(first, c3, k1),
                first,
            )
        return [c0, c1, c2, c3]

    def _mixed(self, product: Value, word: Value, key: Value) -> Value:
        body = self.body
        high = body.binary("lshr", product, 32)
        return body.binary("xor", body.binary("xor", high, word), key)

    def joined(self, low: Value, high: Value) -> Value:
        """Lanes of 64 bits of two words each."""
        body, words = self.body, vector(self.line, "i32")
        picks = [i + side for i in range(0, self.line, 2) for side in (0, self.line)]
        left, right = (body.cast("bitcast", value, words) for value in (low, high))
        return body.cast("bitcast", body.shuffle(left, right, picks), self.lanes)

    def store(self, words: Value, place: Value) -> None:
        """The factors of a line, by its words as lanes of 64 bits."""
        body = self.body
        bits = body.cast("bitcast", words, vector(self.line, "i32"), "words")
        kept = body.compare("uge", bits, self._threshold, "kept")
        zero = body.constant(0.0, self._factor.type)
        body.store(body.select(kept, self._factor, zero, "keep"), place)

    def turned(self, words: list[Value]) -> tuple[Value, Value]:
        """Two lines of neighbouring keys: those of the even lanes, and those of the odd ones."""
        body, count = self.body, self.evaluations
        left, right = self.joined(*words[:2]), self.joined(*words[2:])
        even, odd = (
            body.shuffle(
                left, right, [i + side for i in range(first, count, 2) for side in (0, count)]
            )
            for first in (0, 1)
        )
        return even, odd


def _function(module: Module, name: str, shape: Shape) -> tuple[str, list[Value]]:
    parameters = [Value("%scratch", "ptr")]
    parameters += [Value(f"%{parameter}", "i64") for parameter in _PARAMETERS]
    return f"keep_{name}", [*parameters, Value("%keep_factor", shape.scalar)]


def _queries_in_lanes(module: Module, shape: Shape, step: int) -> str:
    """Factors of `rows` keys from `k` on, a multiple of 4, and of the block's queries from `q` on.

    The name of the function.
    """
    name, parameters = _function(module, "queries", shape)
    if module.defines(name):
        return name
    with module.function(name, parameters, internal=True) as body:
        make = _Generator(body, shape, parameters)
        scratch, first = make.given["scratch"], make.given["k"]
        evens = [2 * i for i in range(make.evaluations)]
        with body.loop("row", 0, make.given["rows"], GROUP) as row:
            key = body.add(first, row)
            group = body.splat(body.binary("lshr", key, 2), make.evaluations, "group")
            for column in range(0, step, make.line):
                start = body.add(make.given["q"], column)
                even, odd = (
                    make.words(make.counting([i + side for i in evens], start), group)
                    for side in (0, 1)
                )
                for i, pair in enumerate(zip(even, odd, strict=True)):
                    place = body.add(body.mul(body.add(row, i), step), column)
                    make.store(make.joined(*pair), body.offset(scratch, shape.scalar, place))
    return name


def _keys_in_lanes(module: Module, shape: Shape, step: int) -> str:
    """Factors of `rows` queries from `q` on, and of the keys of the block from `k` on.

    The name of the function. Two queries at a time: an odd last one has a neighbour.
    """
    name, parameters = _function(module, "keys", shape)
    if module.defines(name):
        return name
    with module.function(name, parameters, internal=True) as body:
        make = _Generator(body, shape, parameters)
        groups = [i // 2 for i in range(make.evaluations)]
        sides = [i % 2 for i in range(make.evaluations)]
        start = body.binary("lshr", make.given["k"], 2)
        with body.loop("row", 0, make.given["rows"], 2) as row:
            query = make.counting(sides, body.add(make.given["q"], row))
            for column in range(0, step, make.line):
                group = make.counting([i + column // GROUP for i in groups], start)
                for i, words in enumerate(make.turned(make.words(query, group))):
                    place = body.add(body.mul(body.add(row, i), step), column)
                    make.store(words, body.offset(make.given["scratch"], shape.scalar, place))
    return name


def _keys_of_query(module: Module, shape: Shape) -> str:
    """Factors of query `q` and of `rows` keys from `k` on, a multiple of 4.

    The name of the function. Up to two lines of keys are made past the last one.
    """
    name, parameters = _function(module, "row", shape)
    if module.defines(name):
        return name
    with module.function(name, parameters, internal=True) as body:
        make = _Generator(body, shape, parameters)
        query = body.splat(make.given["q"], make.evaluations, "query")
        half = make.evaluations // 2
        groups = [i // 2 + i % 2 * half for i in range(make.evaluations)]
        with body.loop("key", 0, make.given["rows"], 2 * make.line) as key:
            start = body.binary("lshr", body.add(make.given["k"], key), 2)
            for i, words in enumerate(make.turned(make.words(query, make.counting(groups, start)))):
                place = body.add(key, i * make.line)
                make.store(words, body.offset(make.given["scratch"], shape.scalar, place))
    return name
