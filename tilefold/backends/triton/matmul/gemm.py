"""The kernel of a matrix product, in any of its types, transposed or not, in batches.

    C = activation(alpha A B + bias + beta C),  a block of C for each program
    C = activation(alpha A B + bias) (alpha A G),  with a gate G

    sums = 0                                    float32, or float64
    for each block of the contraction:
        sums = sums + A B                       what lies beyond the edges is 0; with a gate both
    C = activation(alpha sums + bias + beta C)  C is read only where beta is not 0

A transposed matrix is one with other strides, so no source knows of it, unless a GPU has a unit
that moves whole tiles (Hopper's TMA) and they lie so that it can: then A and B are *tensor
descriptors*, which say once where a matrix is, and their tiles are turned where they are
multiplied.

Triton compiles a source anew where lengths and strides become multiples of 16, or 1, since that
decides how much a thread moves at once; all other sizes are alike to it.

Programs run about in the order of their numbers, and neighbours share rows of A and columns of B.
So blocks of C are numbered in bands of a few block rows, down the columns of a band: programs that
run together then read about as many rows as columns, which the L2 cache holds.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilefold.backends.matmul import Codes, addends, results
from tilefold.backends.triton.kernels.frame import HEADERS
from tilefold.backends.triton.kernels.storage import storage
from tilefold.backends.triton.kernels.text import ELEMENTS, Text
from tilefold.backends.triton.matmul import activation, codes
from tilefold.backends.triton.spec import FLOAT32_MODES, LEAST
from tilefold.common.check import choice
from tilefold.problems.matmul import ACTIVATIONS, BIAS_AXES, multiplied

ENTRY = "tilefold_gemm"
DTYPES = ("float32", "float16", "bfloat16", "float64")

STRIDES = (
    *("a_m", "a_k", "a_h", "a_b"),
    *("b_k", "b_n", "b_h", "b_b"),
    *("c_m", "c_n", "c_h", "c_b"),
)
"""Strides by axis, in elements, h and b being the two axes of a batch."""

BIAS_STRIDES = ("bias_step", "bias_h", "bias_b")
"""Strides of a bias: from element to element, then of the batch."""


GATE_STRIDES = ("g_k", "g_n", "g_h", "g_b")
"""Strides of a gate, as those of B."""

OLD_STRIDES = ("old_m", "old_n", "old_h", "old_b")
"""Strides of C where it lies beside the result."""


@dataclass(frozen=True)
class GemmBlocks:
    """Sides of a block of C and of the contraction at a time; warps, stages, block rows of a band.

    How blocks lie in the banks of shared memory is no choice here: Triton's compiler swizzles them
    itself, and descriptors ask the unit that moves tiles for its own pattern.

    >>> print(GemmBlocks(128, 256, 64, warps=8, stages=3))
    128 x 256 x 64, 8 warps, 3 stages
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    band: int = 8

    def __post_init__(self) -> None:
        for name in "mnk":
            value = getattr(self, name)
            if not isinstance(value, int) or value < LEAST or value & (value - 1):
                raise ValueError(f"{name} must be a power of two from {LEAST}, got {value}")
        choice("warps", self.warps, (1, 2, 4, 8, 16))
        choice("stages", self.stages, (1, 2, 3, 4, 5, 6, 7, 8))
        if self.band < 1:
            raise ValueError(f"band must be at least 1, got {self.band}")

    def __str__(self) -> str:
        return f"{self.m} x {self.n} x {self.k}, {self.warps} warps, {self.stages} stages"


@dataclass(frozen=True)
class GemmSpec:
    """All that changes the source of a product: types, blocks and what is done to the result.

    `a`, `b` and `c` are types; float64 stands alone. `bias_type`: the type of the bias if it is not
    that of the result. `old`: the type of C if it lies beside the result. `gate`: a third factor G
    lies as B does, and the result is activation(A B) (A G). `codes`: B is quantised, and its tiles
    are multiplied as `b`; a tile has no inputs of two groups.
    `products` is how float32 is multiplied. `wide`: offsets inside a block may pass 31 bits.
    `descriptors`: a unit moves tiles of A and B, which have a half type and lie as `transpose_a`
    and `transpose_b` say: the elements of a column are neighbours.
    """

    a: str
    b: str
    c: str
    blocks: GemmBlocks
    bias: str | None = None
    activation: str | None = None
    products: str = "ieee"
    wide: bool = False
    descriptors: bool = False
    transpose_a: bool = False
    transpose_b: bool = False
    bias_type: str | None = None
    old: str | None = None
    gate: bool = False
    codes: Codes | None = None

    def __post_init__(self) -> None:
        assert self.descriptors or not (self.transpose_a or self.transpose_b), "strides say it"
        for name in ("a", "b"):
            choice(f"the type of {name}", getattr(self, name), DTYPES)
        if (self.a == "float64") != (self.b == "float64"):
            raise ValueError(f"a and b must both be float64 or neither, got {self.a} and {self.b}")
        choice("the type of c", self.c, results(self.a, self.b))
        choice("bias", self.bias, (None, *BIAS_AXES))
        for name in ("bias_type", "old"):
            choice(name, getattr(self, name), (None, *addends(self.c)))
        choice("activation", self.activation, ACTIVATIONS)
        choice("products", self.products, FLOAT32_MODES)
        if self.codes:
            self._check_codes(self.codes)

    def _check_codes(self, held: Codes) -> None:
        kind = codes.multiplied(held, self.a)
        if self.gate or self.descriptors or self.a == "float64" or self.b != kind:
            raise ValueError(f"codes have no gate and no descriptors, and b is {kind} beside them")
        if held.group is not None and held.group % self.blocks.k:
            raise ValueError(
                f"k of blocks must divide the groups of {held.group} inputs, got {self.blocks.k}"
            )

    @property
    def multiplied(self) -> str:
        """The type that blocks of A and B are multiplied in."""
        return multiplied(self.a, self.b)

    @property
    def sums(self) -> str:
        """The type of sums, and of all that is done to them."""
        return storage(self.a).compute

    @property
    def right(self) -> dict[str, str]:
        """The factors that A is multiplied by, and the names of these sums."""
        return {"b": "sums", "g": "gates"} if self.gate else {"b": "sums"}

    @property
    def types(self) -> dict[str, str]:
        """The types of all tensors in the order of the arguments."""
        found = {"a": self.a, **dict.fromkeys(self.right, self.b)}
        found |= {"b": codes.memory(self.codes), **self.codes.besides} if self.codes else {}
        found |= {"bias": self.bias_type or self.c} if self.bias else {}
        found |= {"old": self.old} if self.old else {}
        return found | {"c": self.c}


def names(spec: GemmSpec) -> tuple[str, ...]:
    """The arguments of the kernel in their order.

    `heads` is the length of the inner axis of the batch. alpha and beta of a product of float64 are
    integers of the same bits: Triton passes float32 alone. Beside descriptors of A and B, their
    strides of the batch count its steps: 0 where all share one matrix, else 1.
    """
    steps = BIAS_STRIDES if spec.bias else ()
    strides = (*STRIDES, *(GATE_STRIDES if spec.gate else ()))
    if spec.descriptors:
        strides = tuple([name for name in strides if name[0] == "c" or name[-1] in "hb"])
    if spec.codes:
        strides = tuple([name for name in strides if name[0] != "b"])
    old = OLD_STRIDES if spec.old else ()
    scalars = ("alpha",) if spec.gate else ("alpha", "beta")
    return (*spec.types, "m", "n", "k", "heads", *strides, *steps, *old, *scalars)


def tiles(spec: GemmSpec) -> dict[str, list[int]]:
    """The blocks of the descriptors of factors, over (batch, heads, rows, columns) in memory."""
    sides = spec.blocks
    a, b = [sides.m, sides.k], [sides.k, sides.n]
    right = [1, 1, *(b[::-1] if spec.transpose_b else b)]
    return {
        "a": [1, 1, *(a[::-1] if spec.transpose_a else a)],
        **{name: list(right) for name in spec.right},
    }


def alike(spec: GemmSpec) -> tuple[str, ...]:
    """Arguments for whose values no kernel is compiled anew."""
    return tuple(name for name in names(spec) if name in ("heads", *BIAS_STRIDES, "alpha", "beta"))


def signature(spec: GemmSpec) -> dict[str, str]:
    """The types of all arguments as Triton writes them, for compilation ahead of time."""
    kinds = spec.types
    found = {name: f"*{ELEMENTS[kind]}" for name, kind in kinds.items()}
    scalar = "i64" if storage(spec.sums).by_bits else "fp32"
    for name in names(spec)[len(found) :]:
        found[name] = scalar if name in ("alpha", "beta") else "i32"
    if spec.descriptors:
        for name, block in tiles(spec).items():
            found[name] = f"tensordesc<{ELEMENTS[kinds[name]]}{block}>"
    return found


def emit(spec: GemmSpec) -> str:
    """The module of a product; its entry is `ENTRY`."""
    text, blocks = Text(), spec.blocks
    title, *algorithm = _algorithm(spec)
    text(f'"""{title}', "", *(f"    {line}" for line in algorithm), '"""', "", *HEADERS, "")
    for name in "mnk":
        text(f"{name.upper()} = tl.constexpr({getattr(blocks, name)})")
    text(f"BAND = tl.constexpr({blocks.band})", "", "")
    if spec.activation:
        activation.define(text, spec.activation)
    if spec.codes:
        codes.define(text, spec.codes)
    text.listed("@triton.jit(do_not_specialize=[", [f'"{name}"' for name in alike(spec)], "])")
    text.listed(f"def {ENTRY}(", names(spec), "):")
    body = Text()
    _place(body)
    _tiles(body, spec)
    _walk(body, spec)
    _finish(body, spec)
    text(*(f"    {line}".rstrip() for line in str(body).splitlines()))
    return str(text)


def _place(text: Text) -> None:
    """The block of C that a program has, and its place in the batch."""
    text(
        "blocks_m, blocks_n = (m + M - 1) // M, (n + N - 1) // N",
        "place = tl.program_id(0)",
        "block, plane = place % (blocks_m * blocks_n), place // (blocks_m * blocks_n)",
        "h, batch = plane % heads, plane // heads",
    )
    text.note("Bands of block rows: down a column of blocks, then to the next one of the band.")
    text(
        "top = block // (BAND * blocks_n) * BAND",
        "height = tl.minimum(blocks_m - top, BAND)",
        "first_m = (top + block % (BAND * blocks_n) % height) * M",
        "first_n = block % (BAND * blocks_n) // height * N",
    )


def _plane(name: str) -> str:
    """Where an operand's matrix of the batch begins."""
    return f"{name} + batch.to(tl.int64) * {name}_b + h.to(tl.int64) * {name}_h"


def _tiles(text: Text, spec: GemmSpec) -> None:
    """Where the first blocks of A and B lie; offsets from there are short unless they are wide."""
    wide = ".to(tl.int64)" if spec.wide else ""
    text(
        f"row, column = tl.arange(0, M){wide}, tl.arange(0, N){wide}",
        "in_rows, in_columns = (first_m + row < m)[:, None], (first_n + column < n)[None, :]",
    )
    if spec.descriptors:
        return
    text(
        f"inner = tl.arange(0, K){wide}",
        f"a_tile = {_plane('a')} + first_m.to(tl.int64) * a_m",
        "a_tile += row[:, None] * a_m + inner[None, :] * a_k",
    )
    if spec.codes:
        codes.place(text, spec.codes)
        return
    for name in spec.right:
        text(
            f"{name}_tile = {_plane(name)} + first_n.to(tl.int64) * {name}_n",
            f"{name}_tile += inner[:, None] * {name}_k + column[None, :] * {name}_n",
        )


RIGHT = {"b": "right", "g": "beside"}
"""Tiles of the factors that A is multiplied by."""


def _walk(text: Text, spec: GemmSpec) -> None:
    """The sums over the contraction."""
    left, *rights = (
        tile if kind == spec.multiplied else storage(spec.multiplied).write(tile)
        for tile, kind in (("left", spec.a), *((RIGHT[name], spec.b) for name in spec.right))
    )
    how = storage(spec.multiplied).product.format(mode=spec.products)
    step = "tl.cast(K, tl.int64)" if spec.wide else "K"
    for sums in spec.right.values():
        text(f"{sums} = tl.full([M, N], 0.0, tl.{spec.sums})")
    with text.block("for first in tl.range(0, k, K)"):
        if spec.descriptors:
            text(_moved(spec, "left", "a", "first_m, first", "M, K"))
            for name in spec.right:
                text(_moved(spec, RIGHT[name], name, "first, first_n", "K, N"))
        else:
            text(
                "in_k = inner < k - first",
                "left = tl.load(a_tile, mask=in_rows & in_k[None, :], other=0.0)",
            )
            if spec.codes:
                codes.read(text, spec.codes, spec.b)
            for name in () if spec.codes else spec.right:
                mask = "in_k[:, None] & in_columns"
                text(f"{RIGHT[name]} = tl.load({name}_tile, mask={mask}, other=0.0)")
        if spec.codes and spec.codes.group is not None:  # each group has scales of its own
            text(f"sums += tl.dot({left}, {rights[0]}{how}) * scale[None, :]")
        else:
            for right, sums in zip(rights, spec.right.values(), strict=True):
                text(f"{sums} = tl.dot({left}, {right}, {sums}{how})")
        for name in () if spec.descriptors else ("a",) if spec.codes else ("a", *spec.right):
            text(f"{name}_tile += {step} * {name}_k")
        if spec.codes:
            codes.advance(text, spec.codes)
    if spec.codes and spec.codes.scales and spec.codes.group is None:
        text("sums *= scale[None, :]")


def _moved(spec: GemmSpec, tile: str, name: str, corner: str, sides: str) -> str:
    """A tile that is moved whole, turned if it lies so; what is beyond the edges is 0."""
    turned = spec.transpose_a if name == "a" else spec.transpose_b
    if turned:
        corner, sides = (", ".join(pair.split(", ")[::-1]) for pair in (corner, sides))
    moved = f"{name}.load([batch * {name}_b, h * {name}_h, {corner}]).reshape({sides})"
    return f"{tile} = {moved}{'.trans()' if turned else ''}"


def _finish(text: Text, spec: GemmSpec) -> None:
    """From sums to C."""
    kind = spec.sums
    if storage(kind).by_bits:
        for name in ("alpha",) if spec.gate else ("alpha", "beta"):
            text(f"{name} = tl.cast({name}, tl.int64).to(tl.float64, bitcast=True)")
    text("x = alpha * sums")
    if spec.bias:
        index, inside, first, axis = {
            "column": ("column", "in_columns", "first_n", "[None, :]"),
            "row": ("row", "in_rows", "first_m", "[:, None]"),
        }[spec.bias]
        text(
            f"at = ({first} + {index}){axis}.to(tl.int64) * bias_step",
            f"numbers = tl.load(bias + batch * bias_b + h * bias_h + at, mask={inside}, other=0.0)",
            f"x += numbers.to(tl.{kind})",
        )
    text(
        "here = in_rows & in_columns",
        f"c_tile = {_plane('c')}",
        "c_tile += first_m.to(tl.int64) * c_m + first_n.to(tl.int64) * c_n",
        "c_tile += row[:, None] * c_m + column[None, :] * c_n",
    )
    result = activation.apply(spec.activation, "x")
    if spec.gate:
        result = f"({result} * (alpha * gates))"
    else:
        old = "c_tile"
        if spec.old:
            old = "old_tile"
            text(
                f"old_tile = {_plane('old')}",
                "old_tile += first_m.to(tl.int64) * old_m + first_n.to(tl.int64) * old_n",
                "old_tile += row[:, None] * old_m + column[None, :] * old_n",
            )
        with text.block("if beta != 0.0"):
            text(f"x += beta * tl.load({old}, mask=here, other=0.0).to(tl.{kind})")
    text(f"tl.store(c_tile, {storage(spec.c).write(result)}, mask=here)")


def _algorithm(spec: GemmSpec) -> list[str]:
    """The lines that open the source."""
    value = "alpha sums"
    if spec.bias:
        value += f" + bias of the {spec.bias}"
    value += "" if spec.gate else " + beta C"
    result = f"{spec.activation}({value})" if spec.activation else value
    if spec.gate:
        result = f"{result if spec.activation else f'({value})'} (alpha gates)"
    both = "gates = gates + A G, " if spec.gate else ""
    return [
        f"A product of matrices, {spec.a} x {spec.codes.scheme if spec.codes else spec.b} ->"
        f" {spec.c}.",
        f"sums = 0 for a block of C, {spec.sums}",
        f"for each {spec.blocks.k} of the contraction:",
        f"    {both}sums = sums + A B   beyond the edges is 0",
        f"C = {result}",
    ]
