"""Numbers as bfloat16 pairs: what AVX512-BF16 and AMX multiply.

A 32-bit word holds two numbers that follow each other in the contraction. Left operands are lines
of bfloat16 numbers, so that a word is where two of them lie; right operands are rows of words, one
for each two rows of numbers:

    lines:       left[i, c]   = array[i, c]                      contraction along the line
    interleave:  right[c, j]  = (rows[2 c, j], rows[2 c + 1, j])

Arrays of bfloat16 with contiguous rows have two shorter ways to the words of their columns:

    zip_rows:    words[c, d]  = (array[2 c, d], array[2 c + 1, d])
    turn:        left[d, c]   = array[c, d]                  squares of words, turned in registers

A float32 is the sum of three bfloat16 numbers and nearly that of two, a float16 number exactly that
of two. With `parts` = 2 each operand is kept as such a sum, and a product takes three: high high,
high low, low high (Henry, Tang and Heinecke, 2019, arXiv:1904.06376).
"""

from __future__ import annotations

from tilefold.backends.cpu.kernels import pack
from tilefold.backends.cpu.kernels.convert import Storage
from tilefold.backends.cpu.kernels.ir import Body, Module, Value, vector
from tilefold.backends.cpu.kernels.microkernel import Shape

LANES = 16
"""Float32 numbers of a 512-bit register: pairs exist there only."""


def split(body: Body, value: Value, parts: int) -> list[Value]:
    """Vectors of float that sum to `value`, each but the last exact in bfloat16.

    The first is rounded (halves away from 0), or cut off where rounding would make it infinite.
    An infinity is 1 and an infinity: with 0 as one of its parts, products with it would be NaN.
    """
    if parts == 1:
        return [value]
    integers = vector(value.lanes, "i32")
    bits = body.cast("bitcast", value, integers, "bits")
    infinity = body.constant(0x7F800000, integers)
    upper, magnitude, sign = 0xFFFF0000 - (1 << 32), 0x7FFFFFFF, -(1 << 31)
    rounded = body.binary("and", body.add(bits, 0x8000), upper)
    overflow = body.compare("eq", body.binary("and", rounded, magnitude), infinity)
    kept = body.select(overflow, body.binary("and", bits, upper), rounded)
    infinite = body.compare("eq", body.binary("and", bits, magnitude), infinity)
    one = body.binary("or", body.binary("and", bits, sign), 0x3F800000)
    high = body.cast("bitcast", body.select(infinite, one, kept), value.type, "high")
    return [high, body.binary("fsub", value, high, "low")]


def join(body: Body, first: Value, second: Value) -> Value:
    """Words of two rows of floats, `first` in the low halves; rounded, denormals to 0."""
    name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
    both = body.call(name, vector(2 * LANES, "bfloat"), [second, first], "both")
    order = [half * LANES + lane for lane in range(LANES) for half in (0, 1)]
    return body.cast("bitcast", body.shuffle(both, both, order), vector(LANES, "i32"), "pair")


def narrow(body: Body, value: Value) -> Value:
    """A vector of floats as bfloat16 numbers; rounded, denormals to 0."""
    name = "llvm.x86.avx512bf16.cvtneps2bf16.512"
    return body.call(name, vector(LANES, "bfloat"), [value], "narrow")


def interleave(module: Module, shape: Shape, parts: int) -> str:
    """`(right, rows in scratch, pairs, words between the parts)`: its name."""
    name = f"interleave_{shape.vectors}_{parts}"
    if module.defines(name):
        return name
    parameters = [Value("%right", "ptr"), Value("%rows", "ptr")]
    parameters += [Value("%pairs", "i64"), Value("%part_stride", "i64")]
    right, rows, pairs, part_stride = parameters
    with (
        module.function(name, parameters, internal=True) as body,
        body.loop("c", 0, pairs) as c,
    ):
        for j in range(shape.vectors):
            row = body.mul(c, 2)
            first, second = (
                body.load(shape.at(body, rows, body.add(row, i), j, shape.width), shape.vector)
                for i in (0, 1)
            )
            target = shape.at(body, right, c, j, shape.width)
            store_words(body, target, part_stride, first, second, parts)
    return name


def store_words(
    body: Body, target: Value, part_stride: Value, first: Value, second: Value, parts: int
) -> None:
    """Two rows as words at `target`, each further part `part_stride` words on."""
    low, high = split(body, first, parts), split(body, second, parts)
    for part, (a, b) in enumerate(zip(low, high, strict=True)):
        place = target if not part else body.offset(target, "i32", part_stride)
        body.store(join(body, a, b), place)


def lines(module: Module, shape: Shape, kept: Storage, parts: int) -> str:
    """`(left, array, staging, outer, inner, strides of both, line, numbers between the parts)`.

    The name of the function that brings array[outer, inner] to lines of `line` numbers; up to the
    next multiple of the block's width, what lies past `inner` is 0. `staging` holds `outer` rows.
    """
    name = f"lines_{kept.dtype}_{parts}"
    if module.defines(name):
        return name
    integers = ("outer", "inner", "outer_stride", "inner_stride", "line", "part_stride")
    parameters = [Value(f"%{pointer}", "ptr") for pointer in ("left", "array", "staging")]
    parameters += [Value(f"%{integer}", "i64") for integer in integers]
    left, array, staging, outer, inner, outer_stride, inner_stride, line, part_stride = parameters
    function = pack.pack(module, shape, kept)
    with (
        module.function(name, parameters, internal=True) as body,
        body.loop("chunk", 0, inner, shape.width) as chunk,
    ):
        valid = body.minimum(body.sub(inner, chunk), shape.width)
        source = kept.at(body, array, body.mul(chunk, inner_stride))
        one = body.constant(1.0, shape.scalar)
        body.invoke(function, [staging, source, inner_stride, outer_stride, valid, outer, one])
        with body.loop("i", 0, outer) as i:
            target = body.offset(left, "i16", body.add(body.mul(i, line), chunk))
            for j in range(shape.vectors):
                numbers = body.load(shape.at(body, staging, i, j, shape.width), shape.vector)
                place = body.offset(target, "i16", j * LANES)
                for part, value in enumerate(split(body, numbers, parts)):
                    there = place if not part else body.offset(place, "i16", part_stride)
                    body.store(narrow(body, value), there)
    return name


def zip_rows(module: Module) -> str:
    """`(words, array, rows, dim, row stride, line)`: its name. A last odd row goes with zeros.

    For rows of bfloat16, contiguous along `dim`; lines of `line` words.
    """
    name = "zip_rows"
    if module.defines(name):
        return name
    parameters = _rows_parameters("words")
    words, array, rows, dim, row_stride, line = parameters
    with module.function(name, parameters, internal=True) as body:
        whole = body.sub(dim, body.binary("urem", dim, LANES))
        with body.loop("row", 0, rows, 2) as row:
            first = body.offset(array, "i16", body.mul(row, row_stride))
            following = body.offset(first, "i16", row_stride)
            there = body.compare("slt", body.add(row, 1), rows)
            second = body.select(there, following, first, "second")
            target = body.offset(words, "i32", body.mul(body.binary("lshr", row, 1), line))
            with body.loop("d", 0, whole, LANES) as d:
                _zip(body, target, first, second, there, d, LANES)
            with body.loop("d", whole, dim) as d:
                _zip(body, target, first, second, there, d, 1)
    return name


def _zip(
    body: Body, target: Value, first: Value, second: Value, there: Value, d: Value, lanes: int
) -> None:
    """Words of `lanes` numbers of two rows; of the first alone where the second is not there."""
    halves, wide = vector(lanes, "i16"), vector(lanes, "i32")
    low = body.cast("zext", body.load(body.offset(first, "i16", d), halves), wide, "low")
    high = body.cast("zext", body.load(body.offset(second, "i16", d), halves), wide, "high")
    high = body.select(there, high, body.constant(0, wide), "high")
    body.store(_word(body, low, high), body.offset(target, "i32", d))


def _word(body: Body, low: Value, high: Value) -> Value:
    """Two numbers of 16 bits, as integers of 32, in one word."""
    return body.binary("or", body.binary("shl", high, 16), low, "word")


def turn(module: Module) -> str:
    """`(left, array, rows, dim, row stride, line)`: its name. Multiples of 32 rows and of 16 dims.

    For rows of bfloat16, contiguous along `dim`; lines of `line` numbers.
    """
    name = "turn"
    if module.defines(name):
        return name
    parameters = _rows_parameters("left")
    left, array, rows, dim, row_stride, line = parameters
    halves, wide = vector(LANES, "i16"), vector(LANES, "i32")
    with (
        module.function(name, parameters, internal=True) as body,
        body.loop("row", 0, rows, 2 * LANES) as row,
        body.loop("d", 0, dim, LANES) as d,
    ):
        corner = body.offset(array, "i16", body.add(body.mul(row, row_stride), d))
        lanes = []
        for i in range(2 * LANES):
            place = body.offset(corner, "i16", body.mul(row_stride, i))
            lanes.append(body.cast("zext", body.load(place, halves), wide))
        words = [_word(body, *two) for two in zip(lanes[::2], lanes[1::2], strict=True)]
        target = body.offset(left, "i16", body.add(body.mul(d, line), row))
        for i, column in enumerate(pack.transpose(body, words)):
            body.store(column, body.offset(target, "i16", body.mul(line, i)), align=2)
    return name


def _rows_parameters(target: str) -> list[Value]:
    integers = ("rows", "dim", "row_stride", "line")
    pointers = [Value(f"%{target}", "ptr"), Value("%array", "ptr")]
    return pointers + [Value(f"%{integer}", "i64") for integer in integers]
