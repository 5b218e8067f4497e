"""Numbers as bfloat16 pairs: what AVX512-BF16 and AMX multiply.

A 32-bit word holds two numbers that follow each other in the contraction. Left operands are lines
of bfloat16 numbers, so that a word is where two of them lie; right operands are rows of words, one
for each two rows of numbers:

    lines:       left[i, c]   = array[i, c]                      contraction along the line
    interleave:  right[c, j]  = (rows[2 c, j], rows[2 c + 1, j])

Contiguous rows have shorter ways, the first one of bfloat16 numbers only, the others for AMX:

    zip_rows:    words[c, d]  = (array[2 c, d], array[2 c + 1, d])
    turn:        left[d, c]   = array[c, d]                  squares of words, turned in registers
    along:       left[c, d]   = array[c, d]                  rounded or split in registers

A float32 is the sum of three bfloat16 numbers and nearly that of two, a float16 number exactly that
of two. With `parts` = 2 each operand is kept as such a sum, and a product takes three: high high,
high low, low high (Henry, Tang and Heinecke, 2019, arXiv:1904.06376).
"""

from __future__ import annotations

from tilefold.backends.cpu.kernels import pack
from tilefold.backends.cpu.kernels.ir import Body, Module, Operand, Value, vector
from tilefold.backends.cpu.kernels.microkernel import Shape
from tilefold.backends.cpu.kernels.storage import Storage

LANES = 16
"""Float32 numbers of a 512-bit register: pairs exist there only."""


def split(body: Body, value: Value, parts: int, *, short: bool = False) -> list[Value]:
    """Vectors of float that sum to `value`, each but the last exact in bfloat16.

    The first is rounded (halves away from 0), or cut off where rounding would make it infinite,
    which `short` elements (of float16) never are. Cutting all of them off would save one addition
    and make the product of the low parts, which is left out, four times as large.
    An infinity is 1 and an infinity: with 0 as one of its parts, products with it would be NaN.
    """
    if parts == 1:
        return [value]
    bits = body.cast("bitcast", value, vector(value.lanes, "i32"), "bits")
    sign, upper = -(1 << 31), 0xFFFF0000 - (1 << 32)
    kept = body.binary("and", body.add(bits, 0x8000), upper)
    if not short:
        overflow = _infinite(body, body.cast("bitcast", kept, value.type))
        kept = body.select(overflow, body.binary("and", bits, upper), kept)
    one = body.binary("or", body.binary("and", bits, sign), 0x3F800000)
    kept = body.select(_infinite(body, value), one, kept)
    high = body.cast("bitcast", kept, value.type, "high")
    return [high, body.binary("fsub", value, high, "low")]


def _infinite(body: Body, value: Value) -> Value:
    """A truth per lane, by one instruction."""
    name, truths = "llvm.x86.avx512.fpclass.ps.512", vector(value.lanes, "i1")
    return body.call(name, truths, [value, Value(str(0x08 | 0x10), "i32")], "infinite")


def join(body: Body, first: Value, second: Value) -> Value:
    """Words of two rows of floats, `first` in the low halves; rounded, denormals to 0."""
    both = narrow_both(body, first, second)
    order = [half * LANES + lane for lane in range(LANES) for half in (0, 1)]
    return body.cast("bitcast", body.shuffle(both, both, order), vector(LANES, "i32"), "pair")


def narrow_both(body: Body, first: Value, second: Value) -> Value:
    """Two vectors of floats one after the other as bfloat16 numbers; rounded, denormals to 0."""
    name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
    return body.call(name, vector(2 * LANES, "bfloat"), [second, first], "both")


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
    body: Body,
    target: Value,
    part_stride: Value,
    first: Value,
    second: Value,
    parts: int,
    *,
    finite: bool = False,
) -> None:
    """Two rows as words at `target`, each further part `part_stride` words on."""
    for part, word in enumerate(words_of(body, first, second, parts, finite=finite)):
        place = target if not part else body.offset(target, "i32", part_stride)
        body.store(word, place)


def words_of(
    body: Body,
    first: Value,
    second: Value,
    parts: int,
    *,
    finite: bool = False,
    short: bool = False,
) -> list[Value]:
    """Two rows as words, part by part. `finite` promises that no number gets infinite if rounded.

    Then the high parts can be read back from their words: 9 instructions less for a vector.
    """
    if parts == 1 or not finite:
        rows = (split(body, value, parts, short=short) for value in (first, second))
        return [join(body, *pair) for pair in zip(*rows, strict=True)]
    high = join(body, first, second)
    upper = body.binary("and", high, 0xFFFF0000 - (1 << 32))
    rests = [
        body.binary("fsub", value, body.cast("bitcast", bits, value.type, "high"), "low")
        for value, bits in ((first, body.binary("shl", high, 16)), (second, upper))
    ]
    return [high, join(body, *rests)]


def lines(module: Module, shape: Shape, storage: Storage, parts: int) -> str:
    """`(left, array, staging, outer, inner, strides of both, line, numbers between the parts)`.

    The name of the function that brings array[outer, inner] to lines of `line` numbers; up to the
    next multiple of the block's width, what lies past `inner` is 0. `staging` holds `outer` rows.
    """
    name = f"lines_{storage.dtype}_{parts}"
    if module.defines(name):
        return name
    integers = ("outer", "inner", "outer_stride", "inner_stride", "line", "part_stride")
    parameters = [Value(f"%{pointer}", "ptr") for pointer in ("left", "array", "staging")]
    parameters += [Value(f"%{integer}", "i64") for integer in integers]
    left, array, staging, outer, inner, outer_stride, inner_stride, line, part_stride = parameters
    function = pack.pack(module, shape, storage)
    with (
        module.function(name, parameters, internal=True) as body,
        body.loop("chunk", 0, inner, shape.width) as chunk,
    ):
        valid = body.minimum(body.sub(inner, chunk), shape.width)
        source = storage.at(body, array, body.mul(chunk, inner_stride))
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


def turn(module: Module, storage: Storage, parts: int, dim: int) -> str:
    """`(left, array, rows, row stride, line, numbers between the parts)`: its name.

    For rows contiguous along `dim`, a multiple of 32 of them; lines of `line` numbers. Up to the
    next multiple of 16, lines past `dim` are 0.
    """
    name = f"turn_{storage.dtype}_{parts}_{dim}"
    if module.defines(name):
        return name
    parameters = _left_parameters()
    left, array, rows, row_stride, line, part_stride = parameters
    with (
        module.function(name, parameters, internal=True) as body,
        body.loop("row", 0, rows, 2 * LANES) as row,
    ):
        whole = dim - dim % LANES

        def square(d: Operand, exist: int) -> None:
            corner = storage.at(body, array, body.add(body.mul(row, row_stride), d))
            places = [storage.at(body, corner, body.mul(row_stride, i)) for i in range(2 * LANES)]
            target = body.offset(left, "i16", body.add(body.mul(line, d), row))
            pairs = zip(places[::2], places[1::2], strict=True)
            rows_of_words = [_words_at(body, storage, pair, parts, exist) for pair in pairs]
            for part, words in enumerate(zip(*rows_of_words, strict=True)):
                start = target if not part else body.offset(target, "i16", part_stride)
                for i, column in enumerate(pack.transpose(body, list(words))):
                    body.store(column, body.offset(start, "i16", body.mul(line, i)), align=2)

        with body.loop("d", 0, whole, LANES) as d:
            square(d, LANES)
        if whole < dim:
            square(whole, dim - whole)
    return name


def _words_at(
    body: Body, storage: Storage, places: tuple[Value, Value], parts: int, exist: int
) -> list[Value]:
    """Two vectors of an array as words, part by part: bfloat16 numbers as they are."""
    if storage.pairs:
        halves, wide = vector(LANES, "i16"), vector(LANES, "i32")
        bits = [
            body.load(at, halves)
            if exist == LANES
            else storage.bits_of_first(body, at, LANES, exist)
            for at in places
        ]
        return [_word(body, *(body.cast("zext", each, wide) for each in bits))]
    low, high = (_numbers_at(body, storage, at, exist) for at in places)
    return words_of(body, low, high, parts, short=storage.short)


def _numbers_at(body: Body, storage: Storage, place: Value, exist: int) -> Value:
    """A vector of an array, of which `exist` elements are there; the rest is 0."""
    if exist >= LANES:
        return storage.load(body, place, LANES)
    return storage.load_first(body, place, LANES, exist)


def along(module: Module, storage: Storage, parts: int, dim: int) -> str:
    """`(left, array, rows, row stride, line, numbers between the parts)`: its name.

    For rows contiguous along `dim`; up to the next multiple of 32, what lies past it is 0. This is
    `lines` without a way through staging.
    """
    name = f"along_{storage.dtype}_{parts}_{dim}"
    if module.defines(name):
        return name
    parameters = _left_parameters()
    left, array, rows, row_stride, line, part_stride = parameters
    with (
        module.function(name, parameters, internal=True) as body,
        body.loop("row", 0, rows) as row,
    ):
        whole = dim - dim % (2 * LANES)
        source = storage.at(body, array, body.mul(row, row_stride))
        target = body.offset(left, "i16", body.mul(row, line))

        def two(d: Operand, exist: int) -> None:
            short = storage.short
            place = storage.at(body, source, d)
            first = split(body, _numbers_at(body, storage, place, exist), parts, short=short)
            second = [body.constant(0.0, first[0].type)] * parts
            if exist > LANES:
                place = storage.at(body, place, LANES)
                numbers = _numbers_at(body, storage, place, exist - LANES)
                second = split(body, numbers, parts, short=short)
            for part, both in enumerate(zip(first, second, strict=True)):
                there = body.offset(target, "i16", d)
                there = there if not part else body.offset(there, "i16", part_stride)
                body.store(narrow_both(body, *both), there)

        with body.loop("d", 0, whole, 2 * LANES) as d:
            two(d, 2 * LANES)
        if whole < dim:
            two(whole, dim - whole)
    return name


def _left_parameters() -> list[Value]:
    integers = ("rows", "row_stride", "line", "part_stride")
    pointers = [Value("%left", "ptr"), Value("%array", "ptr")]
    return pointers + [Value(f"%{integer}", "i64") for integer in integers]


def _rows_parameters(target: str) -> list[Value]:
    integers = ("rows", "dim", "row_stride", "line")
    pointers = [Value(f"%{target}", "ptr"), Value("%array", "ptr")]
    return pointers + [Value(f"%{integer}", "i64") for integer in integers]
