"""The kernel of a matrix product by Metal 4's `matmul2d`, a tile of C for each threadgroup.

    C = activation(alpha op(A) op(B) + bias + beta C)

    sum <- 0                                    a cooperative tensor: in registers
    for each step of the contraction:
        sum += A B                              views of device memory, as long as there is any
    C -> memory                                 element by element, wherever each of them is

The caller gives the tile: its sides, precision and number of simdgroups. What of it follows from
the arrays, its types and transposes, is taken from them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tilefold.backends.metal.kernels import matmul2d
from tilefold.backends.metal.kernels.matmul2d import Matmul2d
from tilefold.backends.metal.kernels.msl import Text, kernel_head, open_text
from tilefold.backends.metal.kernels.storage import Storage, storage
from tilefold.backends.metal.matmul import activation
from tilefold.backends.metal.matmul.gemm import SIZES
from tilefold.backends.metal.spec import SIMD
from tilefold.problems.matmul import Product

ENTRY = "tilefold_gemm_tiles"

STEP = 32
"""Elements of the contraction that are multiplied at once, where a tile does not say it."""


@dataclass(frozen=True)
class TileSpec:
    """All that changes the source: the tile, and what is done to the result, as in `GemmSpec`."""

    tile: Matmul2d
    c: str
    bias: str | None = None
    activation: str | None = None
    bias_type: str | None = None
    old: str | None = None

    @classmethod
    def of(cls, product: Product, tile: Matmul2d, besides: bool) -> TileSpec:
        """The kernel of a product, whose C lies beside the result, and is read, if `besides`.

        Raises ValueError or NotImplementedError for what no tile serves.
        """
        for name, each, kind in (("a", product.a, tile.left), ("b", product.b, tile.right)):
            if each.dtype != kind:
                raise ValueError(f"{name} must be {kind} for these tiles, got {each.dtype}")
            if not each.axes.unit:
                raise NotImplementedError(
                    f"tiles are views with adjacent elements along an axis, and {name} has none:"
                    " pass a copy, or blocks of fragments"
                )
            if max(map(abs, (*each.axes.strides[-2:], *each.axes.lengths[-2:]))) >= 2**31:
                raise NotImplementedError(f"tiles count with 31 bits, and {name} has longer steps")
            if min(each.axes.strides[-2:]) < 0:
                raise NotImplementedError(f"tiles walk forwards, and {name} is reversed: copy it")
        if tile.result != "float32" or tile.mode != "multiply_accumulate":
            raise ValueError(
                "blocks must be tiles that accumulate in float32, got"
                f" {tile.result} and {tile.mode}"
            )
        if (tile.left_space, tile.right_space) != ("device", "device"):
            raise ValueError("blocks must be tiles that read device memory")
        if product.gate is not None:
            raise NotImplementedError("tiles have one product: pass blocks of fragments for a gate")
        tile.check_length(product.k)
        turned = product.a.axes.transposed, product.b.axes.transposed
        bias = product.bias
        return cls(
            tile=replace(tile, transpose_left=turned[0], transpose_right=turned[1]),
            c=product.dtype,
            bias=product.bias_axis,
            activation=product.activation,
            bias_type=bias.dtype if bias and bias.dtype != product.dtype else None,
            old=product.c.dtype if product.c and besides else None,
        )

    @property
    def threads(self) -> int:
        """Threads of a threadgroup."""
        return SIMD * self.tile.simdgroups

    @property
    def storage(self) -> dict[str, Storage]:
        """How the arrays lie in memory, in the order of the kernel's buffers."""
        types = {"a": self.tile.left, "b": self.tile.right}
        types |= {"bias": self.bias_type or self.c} if self.bias else {}
        types |= {"old": self.old} if self.old else {}
        return {name: storage(kind, bfloat=True) for name, kind in {**types, "c": self.c}.items()}


def emit(spec: TileSpec) -> str:
    """The source of a product by tiles."""
    text, tile = Text(), spec.tile
    title, *algorithm = _algorithm(spec)
    open_text(text, title, algorithm, [], headers=matmul2d.HEADERS)
    if spec.activation:
        activation.define(text, spec.activation)
    with text.block(f"{kernel_head(ENTRY, spec.threads)}{_parameters(spec)})"):
        _place(text, spec)
        text.note("Views of a first step, for the types of their elements.")
        step = str(tile.k or STEP)
        for name, view, turned, ends in (
            ("a", tile.left_tile, tile.transpose_left, (step, "rows")),
            ("b", tile.right_tile, tile.transpose_right, ("columns", step)),
        ):
            ends = ends[::-1] if turned else ends
            text(view.declare(f"some_{name}", f"{name}_first", ends, stride=f"{name}_stride"))
        text(tile.declare("multiply"), tile.destination("sum", "multiply", "some_a", "some_b"))
        matmul2d.fill(text, "sum")
        tile.walk(
            text,
            "multiply",
            "sum",
            left=("a_first", "a_stride"),
            right=("b_first", "b_stride"),
            rows="rows",
            columns="columns",
            length="k_all",
            step=STEP,
        )
        _finish(text, spec)
    return f"{text}\n"


def _at(name: str) -> int:
    """The place of a number among the sizes."""
    return SIZES.index(name)


def _parameters(spec: TileSpec) -> str:
    kinds = {name: each.memory for name, each in spec.storage.items()}
    declared = [
        f"device {'' if name in 'abc' else 'const '}{kind}* {name}" for name, kind in kinds.items()
    ]
    declared += ["constant long* sizes", "constant float& alpha", "constant float& beta"]
    lines = [f"{each} [[buffer({n})]]" for n, each in enumerate(declared)]
    lines.append("uint3 group [[threadgroup_position_in_grid]]")
    return "\n    " + ",\n    ".join(lines)


def _place(text: Text, spec: TileSpec) -> None:
    """The batch, the tile of C, and where the first views begin."""
    m, n = spec.tile.m, spec.tile.n
    for name in spec.storage:
        text(
            f"{name} += group.y * sizes[{_at(f'{name}_h')}] + group.z * sizes[{_at(f'{name}_b')}];"
        )
    text(
        f"const long tiles = sizes[{_at('tiles')}];",
        f"const long first_row = {m} * (group.x / tiles), first_column = {n} * (group.x % tiles);",
        f"const int rows = int(min(sizes[{_at('m')}] - first_row, long({m})));",
        f"const int columns = int(min(sizes[{_at('n')}] - first_column, long({n})));",
        f"const int k_all = int(sizes[{_at('k')}]);",
    )
    kinds = {name: each.memory for name, each in spec.storage.items()}
    turned = spec.tile.transpose_left, spec.tile.transpose_right
    far = "a_k" if turned[0] else "a_m", "b_n" if turned[1] else "b_k"
    text(
        f"device {kinds['a']}* a_first = a + first_row * sizes[{_at('a_m')}];",
        f"device {kinds['b']}* b_first = b + first_column * sizes[{_at('b_n')}];",
        f"const long a_stride = max(sizes[{_at(far[0])}], 1l);  // one row has a step of 0",
        f"const long b_stride = max(sizes[{_at(far[1])}], 1l);",
    )


def _finish(text: Text, spec: TileSpec) -> None:
    """From the sums to C."""
    own = spec.storage

    def index(name: str) -> str:
        places = zip(("row", "column"), ("m", "n"), strict=True)
        return " + ".join(
            f"(first_{axis} + {axis}) * sizes[{_at(f'{name}_{end}')}]" for axis, end in places
        )

    with matmul2d.elements(text, "sum"), text.block("if (row < rows && column < columns)"):
        text(f"const long at = {index('c')};", "float x = alpha * sum[i];")
        if spec.bias:
            place = f"(first_{spec.bias} + {spec.bias}) * sizes[{_at('bias_step')}]"
            text(f"x += {own['bias'].read(f'bias[{place}]', 'float')};")
        old = f"old[{index('old')}]" if spec.old else "c[at]"
        with text.block("if (beta != 0.0f)"):
            text(f"x += beta * {own['old' if spec.old else 'c'].read(old, 'float')};")
        text(f"c[at] = {own['c'].write(activation.apply(spec.activation, 'x'))};")


def _algorithm(spec: TileSpec) -> list[str]:
    """The lines that open the source."""
    tile = spec.tile
    a, b = ("A^T" if tile.transpose_left else "A"), ("B^T" if tile.transpose_right else "B")
    value = f"alpha {a} {b}{f' + bias of the {spec.bias}' if spec.bias else ''} + beta C"
    result = f"{spec.activation}({value})" if spec.activation else value
    return [
        f"C = {result}, {tile.left} x {tile.right} -> {spec.c}",
        f"{tile.m} x {tile.n} of C for a threadgroup of {spec.threads}, by matmul2d",
        "",
        "    sum <- 0",
        f"    for each {tile.k or STEP} of the contraction:",
        "        sum += A B",
        f"    C -> {result}",
    ]
