"""`matmul2d`, the matrix product of Metal 4's tensor operations, as typed text.

On GPUs of the generation of M5 it reaches matrix units that fragments do not. What it multiplies
are `Tile`s, views of device or threadgroup memory; what it makes goes to another one, or stays in
the registers of the threads that ran it: a cooperative tensor. Where an element of that lies is not
defined and differs between GPUs and versions of macOS, so text asks: how many elements a thread
has, which of them count, and which row and column each is (`elements`).

    >>> product = Matmul2d(16, 64, None, "float16", "float16", "float32", transpose_right=True)
    >>> print(product.declare("qk"))
    constexpr auto qk_descriptor = matmul2d_descriptor(
        16, 64, static_cast<int>(dynamic_extent), false, true, false,
        matmul2d_descriptor::mode::multiply_accumulate);
    matmul2d<qk_descriptor, execution_simdgroups<1>> qk;
    >>> print(product.left_tile.declare("a", "q", ("dim", 16), stride="dim"))
    tensor<device half, dextents<int, 2>, tensor_inline> a(
        q, dextents<int, 2>(dim, 16), array<int, 2>{1, int(dim)});
    >>> print(product.run("qk", "a", "b", "s"))
    qk.run(a, b, s);

Nothing here has run on hardware: see docs/metal.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tilefold.backends.metal.kernels.msl import UNROLL, Text
from tilefold.backends.metal.spec import SIMD
from tilefold.common.check import choice, whole

HEADERS = """\
#include <metal_stdlib>
#include <metal_tensor>
#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>
using namespace metal;
using namespace mpp::tensor_ops;
"""
"""The first lines of a source with tensor operations. It needs Metal 4: macOS 26."""

ELEMENTS = {
    "float32": "float",
    "float16": "half",
    "bfloat16": "bfloat",
    "int8": "int8_t",
    "uint8": "uint8_t",
    "int32": "int",
}
"""Elements of a tile. Apple's header knows 4-bit integers too, which no array of ours holds."""

_HALF, _BRAIN, _SINGLE, _BYTES = "float16", "bfloat16", "float32", ("int8", "uint8")

PRODUCTS: dict[tuple[str, str], tuple[str, ...]] = {
    (_HALF, _HALF): (_HALF, _SINGLE),
    **{pair: (_HALF, _SINGLE) for byte in _BYTES for pair in ((_HALF, byte), (byte, _HALF))},
    (_BRAIN, _BRAIN): (_BRAIN, _SINGLE),
    **{pair: (_BRAIN, _SINGLE) for byte in _BYTES for pair in ((_BRAIN, byte), (byte, _BRAIN))},
    (_BRAIN, _HALF): (_BRAIN, _HALF, _SINGLE),
    (_HALF, _BRAIN): (_BRAIN, _HALF, _SINGLE),
    (_SINGLE, _SINGLE): (_SINGLE,),
    **{
        pair: (_SINGLE,)
        for other in (_HALF, _BRAIN, *_BYTES)
        for pair in ((_SINGLE, other), (other, _SINGLE))
    },
    ("int8", "int8"): ("int32",),
    ("uint8", "uint8"): ("int32",),
}
"""The types of results for the types of left and right operands, as the header of the
macOS 26 SDK lists them. Types of results that later SDKs add are left out."""

MODES = ("multiply", "multiply_accumulate")
"""The result is a b, or a b added to what it holds. Apple's words on "multiply" can be read both
ways, so our kernels clear the result and accumulate: right under either reading."""

SPACES = ("device", "threadgroup")

MOST_RANKS = 8
"""Axes of a tile at most: the descriptor of an inline tensor holds no more."""

TILE_STEP, MOST_TILE = 8, 256
"""m and n are multiples of 8: the tiles of shipping kernels, which go up to 128 on a side."""

WHOLE_STEP = 16
"""Apple's header refuses a product unless m or n is a multiple of this."""

STATIC_STEP = 32
"""On macOS 26.1 a k known at compile time is wrong unless it is a multiple of this."""

MOST_SIMDGROUPS = 32
"""1024 threads, the most in a threadgroup."""


@dataclass(frozen=True)
class Tile:
    """A view of memory, an inline tensor: elements of one type along 1 to 8 axes.

    Axes stand innermost first: a matrix of r rows and c columns is (c, r). The elements of the
    innermost axis lie side by side. The pointer must not be one to const; a `const_cast` helps.
    """

    dtype: str
    rank: int = 2
    space: str = "device"

    def __post_init__(self) -> None:
        _element("dtype", self.dtype)
        choice("space", self.space, SPACES)
        if not 1 <= whole("rank", self.rank, 1) <= MOST_RANKS:
            raise ValueError(f"rank must be an integer from 1 to {MOST_RANKS}, got {self.rank}")

    @property
    def element(self) -> str:
        """The type of an element."""
        return ELEMENTS[self.dtype]

    @property
    def type(self) -> str:
        """The type in the text. That of threadgroup memory is left to the compiler to deduce."""
        if self.space == "threadgroup":
            return "tensor"
        return f"tensor<device {self.element}, dextents<int, {self.rank}>, tensor_inline>"

    def declare(
        self,
        name: str,
        pointer: str,
        extents: Sequence[int | str],
        *,
        stride: int | str | None = None,
        strides: Sequence[int | str] | None = None,
    ) -> str:
        """A view of memory from `pointer` on.

        `strides` counts elements from one place to the next of each axis, the first being 1;
        `stride` is short for that of the rows of a matrix. Without either, axes are packed.
        """
        self._check("extents", extents)
        if stride is not None:
            strides = (1, stride)
        words = [pointer, f"dextents<int, {self.rank}>({_list(extents)})"]
        if strides is not None:
            self._check("strides", strides)
            if str(strides[0]) != "1":
                raise ValueError(f"strides must begin with 1, got {strides[0]}")
            steps = ", ".join(s if s.isdigit() else f"int({s})" for s in map(str, strides))
            words.append(f"array<int, {self.rank}>{{{steps}}}")
        return f"{self.type} {name}(\n    {', '.join(words)});"

    def slice(self, name: str, source: str, origin: Sequence[int | str]) -> str:
        """A view of what lies in `source` from `origin` on."""
        self._check("origin", origin)
        return f"auto {name} = {source}.slice({_list(origin)});"

    def _check(self, name: str, given: Sequence[int | str]) -> None:
        if len(given) != self.rank:
            raise ValueError(
                f"{name} must have {self.rank} numbers, one for each axis, got {len(given)}"
            )


@dataclass(frozen=True)
class Matmul2d:
    """A product of m x k by k x n elements, run by one simdgroup or by all of a threadgroup.

    Arguments:
        m, n: rows and columns of the result, multiples of 8 up to 256, one of them of 16.
        k: None to read it from the operands' extents, as a kernel for any k must; or a multiple
            of 32.
        left, right, result: types of elements, one of `PRODUCTS`.
        transpose_left, transpose_right: a left operand is (k, m) innermost first, transposed it is
            (m, k); a right one is (n, k), transposed (k, n).
        relaxed_precision: lets the GPU round float32 operands to fewer bits.
        mode: one of `MODES`.
        simdgroups: how many run one product together: 1, or all of a threadgroup. Another number
            is undefined on the GPU, with no message: `check_threads` raises instead.
        left_space, right_space: where the operands lie, "device" or "threadgroup" memory.

    Raises TypeError for types that Metal does not multiply, ValueError for other values.
    """

    m: int
    n: int
    k: int | None
    left: str
    right: str
    result: str
    transpose_left: bool = False
    transpose_right: bool = False
    relaxed_precision: bool = False
    mode: str = "multiply_accumulate"
    simdgroups: int = 1
    left_space: str = "device"
    right_space: str = "device"

    def __post_init__(self) -> None:
        for name in ("m", "n"):
            _multiple(name, getattr(self, name), TILE_STEP, MOST_TILE)
        if self.m % WHOLE_STEP and self.n % WHOLE_STEP:
            raise ValueError(
                f"m or n must be a multiple of {WHOLE_STEP}, got m = {self.m} and n = {self.n}"
            )
        if self.k is not None:
            _multiple("k", self.k, STATIC_STEP, hint="; None reads it from the operands")
        for name in ("left", "right", "result"):
            _element(name, getattr(self, name))
        results = PRODUCTS.get((self.left, self.right))
        if results is None:
            pairs = ", ".join(right for left, right in PRODUCTS if left == self.left)
            allowed = f"with {self.left} on the left it is one of {pairs}" if pairs else _LEFTS
            raise TypeError(f"right must not be {self.right}: {allowed}")
        if self.result not in results:
            raise TypeError(
                f"result must be {' or '.join(results)} for {self.left} by {self.right}, "
                f"got {self.result}"
            )
        for name in ("transpose_left", "transpose_right", "relaxed_precision"):
            choice(name, getattr(self, name), (True, False))
        for name in ("left_space", "right_space"):
            choice(name, getattr(self, name), SPACES)
        choice("mode", self.mode, MODES)
        if not 1 <= whole("simdgroups", self.simdgroups, 1) <= MOST_SIMDGROUPS:
            raise ValueError(
                f"simdgroups must be an integer from 1 to {MOST_SIMDGROUPS}, got {self.simdgroups}"
            )

    @property
    def left_tile(self) -> Tile:
        """The left operand."""
        return Tile(self.left, 2, self.left_space)

    @property
    def right_tile(self) -> Tile:
        """The right operand."""
        return Tile(self.right, 2, self.right_space)

    def check_threads(self, threads: int) -> None:
        """Raises ValueError unless threadgroups of `threads` threads may run the product."""
        if threads % SIMD or self.simdgroups not in (1, threads // SIMD):
            raise ValueError(
                f"the product is written for {self.simdgroups} simdgroups, {SIMD} threads each, "
                f"but a threadgroup has {threads} threads"
            )

    def check_length(self, k: int) -> None:
        """Raises ValueError unless steps of `self.k` make up k; any k goes where that is None."""
        if self.k is not None and k % self.k:
            raise ValueError(
                f"k must be a multiple of {self.k}, got {k}; or make the product's None"
            )

    def declare(self, name: str) -> str:
        """The product as an object of the text, under its descriptor."""
        k = "static_cast<int>(dynamic_extent)" if self.k is None else str(self.k)
        flags = (self.transpose_left, self.transpose_right, self.relaxed_precision)
        words = ", ".join([str(self.m), str(self.n), k, *(str(flag).lower() for flag in flags)])
        return (
            f"constexpr auto {name}_descriptor = matmul2d_descriptor(\n"
            f"    {words},\n"
            f"    matmul2d_descriptor::mode::{self.mode});\n"
            f"matmul2d<{name}_descriptor, execution_simdgroups<{self.simdgroups}>> {name};"
        )

    def destination(self, name: str, product: str, left: str, right: str) -> str:
        """A cooperative tensor for the result of `product`; its elements are not set.

        `left` and `right` are views of the operands, already declared, or others of their types.
        """
        types = f"decltype({left}), decltype({right}), {ELEMENTS[self.result]}"
        return f"auto {name} = {product}.get_destination_cooperative_tensor<\n    {types}>();"

    def run(self, product: str, left: str, right: str, result: str) -> str:
        """Multiply. Every thread of the simdgroups that run the product must arrive here."""
        return f"{product}.run({left}, {right}, {result});"

    def walk(
        self,
        text: Text,
        product: str,
        result: str,
        *,
        left: tuple[str, str],
        right: tuple[str, str],
        rows: str,
        columns: str,
        length: str,
        step: int | None = None,
    ) -> None:
        """Fold over k: `result` plus the product of a left and a right operand of `length`.

        Operands are (pointer, stride of a row); `rows` and `columns` may be fewer than m and n. A
        last step that is not whole is read up to its end where k is None; else see
        `check_length`. How often the loop turns must not be known to the compiler: unrolled, it
        becomes many calls of `run`, and Apple's compiler has crashed on those.
        """
        assert self.mode == "multiply_accumulate", self.mode
        stride = self.k or step or STATIC_STEP
        part = str(self.k)
        with text.block(f"for (int k = 0; k < {length}; k += {stride})"):
            if self.k is None:
                text(f"const int part = min({stride}, {length} - k);")
                part = "part"
            sides = (
                ("left_part", self.left_tile, left, self.transpose_left, rows),
                ("right_part", self.right_tile, right, not self.transpose_right, columns),
            )
            for name, tile, (pointer, row), across, others in sides:
                start = f"{pointer} + long(k) * {row}" if across else f"{pointer} + k"
                extents = (others, part) if across else (part, others)
                text(tile.declare(name, start, extents, stride=row))
            text(self.run(product, "left_part", "right_part", result))


@contextmanager
def elements(text: Text, tensor: str, *, i: str = "i") -> Iterator[None]:
    """A loop over the elements of a cooperative tensor that this thread holds.

    Inside, `tensor[i]` is the element, and `row` and `column` say which it is.
    """
    text(UNROLL)
    with (
        text.block(f"for (ushort {i} = 0; {i} < {tensor}.get_capacity(); ++{i})"),
        text.block(f"if ({tensor}.is_valid_element({i}))"),
    ):
        text(f"const auto index = {tensor}.get_multidimensional_index({i});")
        text("const int column = index[0], row = index[1];")
        yield


def fill(text: Text, tensor: str, value: str = "0", *, i: str = "i") -> None:
    """Set every element of a cooperative tensor: it starts with none set."""
    text(UNROLL)
    with (
        text.block(f"for (ushort {i} = 0; {i} < {tensor}.get_capacity(); ++{i})"),
        text.block(f"if ({tensor}.is_valid_element({i}))"),
    ):
        text(f"{tensor}[{i}] = {value};")


_LEFTS = "left is one of " + ", ".join(dict.fromkeys(left for left, _ in PRODUCTS))


def _element(name: str, dtype: str) -> None:
    if dtype not in ELEMENTS:
        raise TypeError(f"{name} must be one of {', '.join(ELEMENTS)}, got {dtype}")


def _multiple(name: str, value: int, step: int, most: int | None = None, hint: str = "") -> None:
    if whole(name, value, 1) % step or (most is not None and value > most):
        upto = "" if most is None else f" up to {most}"
        raise ValueError(f"{name} must be a multiple of {step}{upto}, got {value}{hint}")


def _list(numbers: Sequence[int | str]) -> str:
    return ", ".join(map(str, numbers))
