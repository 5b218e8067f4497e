"""Codes of a quantised matrix, widened in registers: what a weight is, short of its scale.

    scheme           a vector holds             from a vector of codes
    int8             code                       signed bytes, converted
    float8_e4m3      number / 256               the bits of a float16, whose exponents begin 8 lower
    int4             code                       4 bits of a word of each lane, by a table of 16
    int4_symmetric   code - 8                   likewise
    palette6         table[code]                4 bits of a word, 2 of another, by a table of 64

`tilefold/products/schemes.py` draws how codes lie. With AVX-512 a table is one or four registers.
Without it codes of 4 bits are converted from integers; few rows do not move each of them to the low
bits first. With AVX2 the bytes of a palette's numbers are looked up 32 at a time.
"""

from __future__ import annotations

from collections.abc import Callable

from tilefold.backends.cpu.kernels.ir import Body, Value, overload, vector
from tilefold.backends.cpu.kernels.storage import storage
from tilefold.backends.cpu.matmul.spec import QuantizedSpec

STEPS = {"int4": 8, "int4_symmetric": 8, "palette6": 16, "int8": 8, "float8_e4m3": 8}
"""Inputs of one step of a kernel; those of words are the inputs of a block of words."""

WORDS = ("int4", "int4_symmetric", "palette6")
"""Schemes whose codes lie in words of 32 bits."""

FACTORS = {"float8_e4m3": 256.0}
"""What a scale is multiplied by, where it is not 1."""

NIBBLE = 16.0
"""Where codes of 4 bits are taken out of words by masks, those of each place are so much larger."""

Weights = Callable[[Value, int], list[Value]]
"""(address of the first codes of a step, input in the step) -> vectors of the part of a panel."""


def masked(spec: QuantizedSpec) -> bool:
    """True if few rows take codes of 4 bits by masks; their zeros are subtracted from sums."""
    return spec.bits == 4 and not spec.permutes and not spec.shared


def looked_up(spec: QuantizedSpec) -> bool:
    """True if bytes of a palette's float16 are looked up 32 at a time (AVX2)."""
    return spec.scheme == "palette6" and not spec.permutes and spec.lanes == 8


def order(spec: QuantizedSpec, places: int = 1) -> tuple[int, ...]:
    """The order in which the inputs of a step are made: some are made two at a time.

    By masks, those of one place follow each other, so that few masks are in registers.
    """
    if masked(spec):
        return tuple(t for place in range(places) for t in range(place, 8, places))
    if looked_up(spec):
        return tuple(first + t for first in (0, 1, 8, 9) for t in (0, 2, 4, 6))
    if spec.scheme == "palette6" and spec.permutes:
        return tuple(first + half for first in (0, 1, 2, 3, 8, 9, 10, 11) for half in (0, 4))
    return tuple(range(STEPS[spec.scheme]))


def table(body: Body, spec: QuantizedSpec, address: Value) -> list[Value]:
    """The table of a palette, read before all loops.

    With AVX-512 these are the upper halves of its floats in two registers, and the lower ones in
    two. With AVX2 they are the low bytes of its float16 in four registers, 16 in each half, and the
    high ones in four. Otherwise it is the address of its floats.
    """
    if spec.scheme != "palette6":
        return []
    if looked_up(spec):
        return _bytes_of_halves(body, address)
    store, lanes = storage("float16", spec.native_half), spec.lanes
    parts = [
        store.load(body, store.at(body, address, first), lanes, "table")
        for first in range(0, 64, lanes)
    ]
    if not spec.permutes:
        wide = Value(body.variable("[64 x float]", hint="table").address, "ptr")
        for number, part in enumerate(parts):
            body.store(part, body.offset(wide, "float", number * lanes))
        return [wide]
    found = []
    for half in (16, 0):
        bits = [body.cast("bitcast", part, vector(lanes, "i32")) for part in parts]
        bits = [body.binary("lshr", each, half) if half else each for each in bits]
        halves = [body.cast("trunc", each, vector(lanes, "i16")) for each in bits]
        for first in (0, 2):
            found.append(body.shuffle(halves[first], halves[first + 1], range(2 * lanes), "table"))
    return found


def weights(body: Body, spec: QuantizedSpec, table: list[Value], places: int = 1) -> Weights:
    """How a body makes weights. By masks, input t of a step is 16^(t mod places) times as large."""
    if masked(spec):
        return _masked(body, spec, places)
    if looked_up(spec):
        return _looked_up_palette(body, spec, table)
    if spec.scheme == "palette6":
        return (_permuted_palette if spec.permutes else _palette)(body, spec, table)
    if spec.scheme in ("int4", "int4_symmetric"):
        return _int4(body, spec)
    together = spec.vectors if spec.scheme == "float8_e4m3" else 1
    convert = _int8 if spec.scheme == "int8" else _e4m3

    def read(at: Value, t: int) -> list[Value]:
        found = []
        for j in range(0, spec.vectors, together):
            place = body.offset(at, "i8", t * spec.width + j * spec.lanes)
            codes = body.load(place, vector(together * spec.lanes, "i8"), "codes")
            found += convert(body, spec, codes)
        return found

    return read


def _int8(body: Body, spec: QuantizedSpec, codes: Value) -> list[Value]:
    wide = body.cast("sext", codes, vector(spec.lanes, "i32"))
    return [body.cast("sitofp", wide, vector(spec.lanes, "float"), "w")]


def _e4m3(body: Body, spec: QuantizedSpec, codes: Value) -> list[Value]:
    """Sign, exponent and mantissa of all vectors, moved to their places in a float16."""
    wide = body.cast("sext", codes, vector(codes.lanes, "i16"))
    bits = body.binary("and", body.binary("shl", wide, 7), 0xBF80 - 0x10000)
    halves = body.cast("bitcast", bits, vector(codes.lanes, "half"))
    store, lanes = storage("float16", spec.native_half), spec.lanes
    parts = (
        body.shuffle(halves, halves, range(first, first + lanes))
        for first in range(0, codes.lanes, lanes)
    )
    return [store.widen(body, part, "w") for part in parts]


def _words(body: Body, spec: QuantizedSpec, at: Value, line: int) -> list[Value]:
    """The words of a line of a block: one for each column."""
    type_ = vector(spec.lanes, "i32")
    places = (line * spec.width + j * spec.lanes for j in range(spec.vectors))
    return [body.load(body.offset(at, "i32", place), type_, "words") for place in places]


def _shifted(body: Body, words: Value, left: int) -> Value:
    if left == 0:
        return words
    return body.binary("shl" if left > 0 else "lshr", words, abs(left))


def _int4(body: Body, spec: QuantizedSpec) -> Weights:
    zero = 8 if spec.scheme == "int4_symmetric" else 0
    type_ = vector(spec.lanes, "float")
    words: dict[str, list[Value]] = {}

    def read(at: Value, t: int) -> list[Value]:
        if at.text not in words:
            words.clear()
            words[at.text] = _words(body, spec, at, 0)
        return [number(_shifted(body, word, -4 * t)) for word in words[at.text]]

    def number(index: Value) -> Value:
        if spec.permutes:  # the instruction takes the low 4 bits of each lane
            entries = ", ".join(f"float {code - zero}.0" for code in range(16))
            table = Value(f"<{entries}>", type_)
            return body.call("llvm.x86.avx512.permvar.sf.512", type_, [table, index], "w")
        code = body.binary("and", index, 15)
        code = body.sub(code, zero) if zero else code
        return body.cast("sitofp", code, type_, "w")

    return read


def _masked(body: Body, spec: QuantizedSpec, places: int) -> Weights:
    """Codes of 4 bits with what lies around them set to 0. Words are moved for several at once."""
    words: dict[tuple[str, int], list[Value]] = {}

    def read(at: Value, t: int) -> list[Value]:
        if (at.text, 0) not in words:
            words.clear()
            words[at.text, 0] = _words(body, spec, at, 0)
        place = t % places
        moved = at.text, t - place
        if moved not in words:
            words[moved] = [_shifted(body, word, -4 * (t - place)) for word in words[at.text, 0]]
        codes = [body.binary("and", word, 15 << 4 * place) for word in words[moved]]
        return [body.cast("sitofp", code, vector(spec.lanes, "float"), "w") for code in codes]

    return read


def _palette(body: Body, spec: QuantizedSpec, table: list[Value]) -> Weights:
    """Numbers of the table one by one."""
    type_ = vector(spec.lanes, "float")
    words: dict[str, list[list[Value]]] = {}

    def read(at: Value, t: int) -> list[Value]:
        if at.text not in words:
            words.clear()
            words[at.text] = [_words(body, spec, at, line) for line in range(3)]
        lines = words[at.text]
        found = []
        for low, high in zip(lines[t // 8], lines[2], strict=True):
            index = body.binary("and", _shifted(body, low, -4 * (t % 8)), 15)
            upper = body.binary("and", _shifted(body, high, 4 - 2 * t), 48)
            found.append(number(body.binary("or", index, upper, "index")))
        return found

    def number(index: Value) -> Value:
        wide = body.cast("zext", index, vector(spec.lanes, "i64"))
        places = body.offset(table[0], "float", wide)
        every = Value("splat (i1 true)", vector(spec.lanes, "i1"))
        arguments = [places, Value("4", "i32"), every, body.constant(0.0, type_)]
        name = f"llvm.masked.gather.{overload(type_)}.{overload(places.type)}"
        return body.call(name, type_, arguments, "w")

    return read


def _bytes_of_halves(body: Body, address: Value) -> list[Value]:
    """The low bytes of 64 numbers of 16 bits, then the high ones, in both halves of registers."""
    found = []
    for shift in (0, 8):
        for first in range(0, 64, 16):
            halves = body.load(body.offset(address, "i16", first), vector(16, "i16"), "table")
            halves = body.binary("lshr", halves, shift) if shift else halves
            part = body.cast("trunc", halves, vector(16, "i8"))
            found.append(body.shuffle(part, part, [*range(16)] * 2, "table"))
    return found


def _looked_up_palette(body: Body, spec: QuantizedSpec, table: list[Value]) -> Weights:
    """Numbers of the table by their bytes: four tables of 16, of which the high bits choose one.

    The 8 columns of a vector have words of 8 inputs. Their bytes are put in the order of inputs, so
    that 32 codes are those of 4 inputs: with the even ones first, then the odd ones. A product of
    one row takes a quarter of the time that gathers take (AMD Zen 3, 2048 x 2048).
    """
    kept: dict[str, dict[int, list[Value]]] = {}
    words, codes = vector(8, "i32"), vector(32, "i8")

    def read(at: Value, t: int) -> list[Value]:
        if at.text not in kept:
            kept.clear()
            kept[at.text] = {}
        made = kept[at.text]
        if t not in made:
            first = t // 8 * 8 + t % 2
            lines = zip(_words(body, spec, at, t // 8), _words(body, spec, at, 2), strict=True)
            vectors = [four(low, high, t // 8, t % 2) for low, high in lines]
            for number in range(4):
                made[first + 2 * number] = [each[number] for each in vectors]
        return made.pop(t)

    def ordered(word: Value, bytes_: tuple[int, ...]) -> Value:
        """Bytes of the words of 8 columns side by side."""
        picks = [4 * column + byte for byte in bytes_ for column in range(8)]
        word = body.cast("bitcast", word, codes)
        return body.cast("bitcast", body.shuffle(word, word, picks), words)

    def moved(word: Value, left: int) -> Value:
        """A bit of the codes of 4 inputs as the highest one of each byte."""
        shifts = ", ".join(f"i32 {left - 4 * (lane // 2 % 2)}" for lane in range(8))
        return body.cast("bitcast", body.binary("shl", word, Value(f"<{shifts}>", words)), codes)

    def four(low: Value, high: Value, line: int, odd: int) -> list[Value]:
        """Vectors of 4 inputs."""
        index = _shifted(body, ordered(low, (0, 1, 2, 3)), -4 * odd)
        index = body.cast("bitcast", body.binary("and", index, 0x0F0F0F0F), codes)
        upper = ordered(high, (2 * line, 2 * line, 2 * line + 1, 2 * line + 1))
        one, two = (moved(upper, 7 - bit - 2 * odd) for bit in (0, 1))
        low_bytes, high_bytes = (
            looked_up_bytes(table[first : first + 4], index, one, two) for first in (0, 4)
        )
        found = []
        places = [column + plane for column in range(8) for plane in (0, 32)]
        for first in range(0, 32, 8):
            number = body.shuffle(low_bytes, high_bytes, [first + place for place in places])
            halves = body.cast("bitcast", number, vector(8, "half"))
            found.append(storage("float16", spec.native_half).widen(body, halves, "w"))
        return found

    def looked_up_bytes(tables: list[Value], index: Value, one: Value, two: Value) -> Value:
        """Bytes of four tables by 4 bits; two more bits choose the table."""
        parts = [body.call("llvm.x86.avx2.pshuf.b", codes, [each, index]) for each in tables]
        return chosen(two, chosen(one, parts[0], parts[1]), chosen(one, parts[2], parts[3]))

    def chosen(bit: Value, no: Value, yes: Value) -> Value:
        return body.call("llvm.x86.avx2.pblendvb", codes, [no, yes, bit])

    return read


def _permuted_palette(body: Body, spec: QuantizedSpec, table: list[Value]) -> Weights:
    """Numbers of the table by permutations of words of 16 bits, which take 6 bits of each.

    The 16 columns of a vector have two words each, so that inputs t and t + 4 are made at once: the
    upper halves of their floats, then the lower ones.
    """
    kept: dict[str, list[list[Value]]] = {}
    pairs: dict[int, list[Value]] = {}
    integers, floats = vector(spec.lanes, "i32"), vector(spec.lanes, "float")
    halves = vector(2 * spec.lanes, "i16")

    def lines_of(at: Value) -> list[list[Value]]:
        """Two lines of low bits, and two of high bits, with input t + 4 in the upper half."""
        if at.text not in kept:
            kept.clear()
            low, more, high = (_words(body, spec, at, line) for line in range(3))
            first = [joined(word, 0, 8) for word in high]
            second = [joined(word, -16, -8) for word in high]
            kept[at.text] = [low, more, first, second]
        return kept[at.text]

    def joined(word: Value, one: int, two: int) -> Value:
        lower = body.binary("and", _shifted(body, word, one), 0xFF)
        upper = body.binary("and", _shifted(body, word, two), 0xFF0000)
        return body.binary("or", lower, upper)

    def read(at: Value, t: int) -> list[Value]:
        if t % 8 >= 4:
            return pairs.pop(t)
        lines = lines_of(at)
        found = [
            pair(_shifted(body, low, -4 * (t % 8)), _shifted(body, high, 4 - 2 * (t % 8)))
            for low, high in zip(lines[t // 8], lines[2 + t // 8], strict=True)
        ]
        pairs[t + 4] = [each[1] for each in found]
        return [each[0] for each in found]

    def mixed(one: Value, two: Value, mask: int, table: int) -> Value:
        """A function of three bits; written out, LLVM makes slower permutations of it."""
        three = body.constant(mask, integers)
        arguments = [one, two, three, Value(str(table), "i32")]
        return body.call("llvm.x86.avx512.pternlog.d.512", integers, arguments)

    def pair(low: Value, high: Value) -> tuple[Value, Value]:
        index = mixed(low, high, 0x000F000F, 0xE4)  # low where the mask is 1, else high
        index = body.cast("bitcast", index, halves)  # of which the low 6 bits count
        name = "llvm.x86.avx512.vpermi2var.hi.512"
        upper, lower = (
            body.cast("bitcast", body.call(name, halves, [one, index, two]), integers)
            for one, two in (table[:2], table[2:])
        )
        first = mixed(body.binary("shl", upper, 16), lower, 0xFFFF, 0xF8)  # one | two & mask
        second = mixed(body.binary("lshr", lower, 16), upper, -0x10000, 0xF8)
        return body.cast("bitcast", first, floats, "w"), body.cast("bitcast", second, floats, "w")

    return read
