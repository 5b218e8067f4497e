"""The kernel of a matrix product, in any of its types, transposed or not, in batches.

    C = activation(alpha op(A) op(B) + bias + beta C),  a block of C for each threadgroup
    C = activation(alpha op(A) op(B) + bias) (alpha op(A) op(G)),  with a gate G

    C <- 0                                          in registers, float32
    for each block of the contraction:
        A, B -> threadgroup memory or registers     0 beyond the edges
        C += A B                                    fragments of 8 x 8; with a gate both sums
    C -> memory                                     C is read only where beta is not 0

Sums are float32 whatever the types. The bias is added as it is, not times alpha, and before the
activation; version 1 of Metal FlashAttention (Turner 2023) multiplied it by alpha. Before Apple9 a
simdgroup that reads device memory by itself is slow, so blocks are staged in threadgroup memory;
since then each simdgroup reads its own operands. Edges are masked rather than shifted back inside
as there, since a shifted block would add beta C twice.
"""

from __future__ import annotations

from tilefold.backends.matmul import Codes
from tilefold.backends.metal.kernels import fragment
from tilefold.backends.metal.kernels.fragment import Fragment
from tilefold.backends.metal.kernels.msl import Text, kernel_head, open_text
from tilefold.backends.metal.kernels.storage import storage
from tilefold.backends.metal.matmul import activation, codes
from tilefold.backends.metal.matmul.spec import GemmSpec
from tilefold.backends.metal.spec import SIDE, SIMD

ENTRY = "tilefold_gemm"

SIZES = (
    *("m", "n", "k", "tiles"),
    *("a_m", "a_k", "a_h", "a_b"),
    *("b_k", "b_n", "b_h", "b_b"),
    *("c_m", "c_n", "c_h", "c_b"),
    *("bias_step", "bias_h", "bias_b"),
    *("g_k", "g_n", "g_h", "g_b"),
    *("old_m", "old_n", "old_h", "old_b"),
)
"""The integers of a launch, in their order: C is m x n, sums have k terms, a row of blocks has
`tiles` of them; then strides by axis, in elements, h and b being the two axes of a batch."""

AXES = {"a": ("m", "k"), "b": ("k", "n"), "g": ("k", "n")}
"""The rows and columns of op(A), op(B) and op(G)."""

SUMS = {"b": "sum", "g": "gate"}
"""The sums of products of A by the other factor."""


def emit(spec: GemmSpec) -> str:
    """The source of a product."""
    return _Gemm(spec).write()


class _Gemm:
    """The kernel on its way."""

    def __init__(self, spec: GemmSpec) -> None:
        self.spec, self.blocks, self.text = spec, spec.blocks, Text()
        self.rows, self.columns = spec.fragments
        self.tile = Fragment(spec.multiplied)
        self.sums = Fragment("float32")
        types = {name: getattr(spec, name) for name in "abc"}
        types |= {"g": spec.b, "bias": spec.bias_type or spec.c, "old": spec.old or spec.c}
        self.storage = {name: storage(each, spec.bfloat) for name, each in types.items()}
        self.right = ("b", "g") if spec.gate else ("b",)
        self.beside = spec.codes.besides if spec.codes else {}
        self.storage |= {name: storage(kind, spec.bfloat) for name, kind in self.beside.items()}
        self.added = [name for name in ("bias", "old") if getattr(spec, name)]

    def write(self) -> str:
        text, spec = self.text, self.spec
        title, *algorithm = _algorithm(spec)
        open_text(text, title, algorithm, [*self.storage.values()])
        if spec.activation:
            activation.define(text, spec.activation)
        if spec.codes:
            codes.define(text, spec.codes)
        head = kernel_head(ENTRY, self.blocks.threads)
        with text.block(f"{head}{self._parameters()})"):
            self._place()
            count = self.rows * self.columns
            for name in self.right:
                text(self.sums.declare(SUMS[name], count))
            with text.loop("i", count):
                for name in self.right:
                    text(self.sums.fill(f"{SUMS[name]}[i]"))
            text("")
            if spec.staged:
                self._staged()
            else:
                self._direct()
            text("")
            self._finish()
        return f"{text}\n"

    def _parameters(self) -> str:
        read = ("a", *self.right, *self.beside, *self.added)
        types = {name: self.storage[name].memory for name in read}
        types |= {"b": codes.memory(self.spec.codes)} if self.spec.codes else {}
        declared = [f"device const {kind}* {name}" for name, kind in types.items()]
        declared += [
            f"device {self.storage['c'].memory}* c",
            "constant long* sizes",
            "constant float& alpha",
        ]
        if not self.spec.gate:
            declared.append("constant float& beta")
        lines = [f"{each} [[buffer({n})]]" for n, each in enumerate(declared)]
        lines.append("uint3 group [[threadgroup_position_in_grid]]")
        if self.blocks.threads > SIMD:
            lines.append("ushort simdgroup [[simdgroup_index_in_threadgroup]]")
        if self.spec.staged:
            lines.append("ushort thread_index [[thread_index_in_threadgroup]]")
        lines.append("ushort lane [[thread_index_in_simdgroup]]")
        return "\n    " + ",\n    ".join(lines)

    def _place(self) -> None:
        """Sizes, the block of the threadgroup, and the lane's place in it."""
        text, blocks = self.text, self.blocks
        moved = ("a",) if self.spec.codes else ("a", *self.right)
        used = {*moved, "c", *[name for name in self.added if name == "old"]}
        unused = {"tiles", *self._ones()}
        unused |= {name for name in SIZES if "_" in name and name.split("_")[0] not in used}
        for number, name in enumerate(SIZES):
            if name not in unused and name[-2:] not in ("_h", "_b"):
                text(f"const long {name} = sizes[{number}];")
        text("", "// The batch, and the block of C.")
        for name in (*moved, *self.added, "c"):
            h, b = (SIZES.index(f"{name}_{axis}") for axis in "hb")
            text(f"{name} += group.y * sizes[{h}] + group.z * sizes[{b}];")
        tiles = SIZES.index("tiles")
        text(
            f"const long block_row = {blocks.m} * (group.x / sizes[{tiles}]);",
            f"const long block_column = {blocks.n} * (group.x % sizes[{tiles}]);",
            "",
            *fragment.PLACE,
        )
        rows, columns = blocks.m // blocks.split[0], blocks.n // blocks.split[1]
        if blocks.threads > SIMD:
            text(
                f"const ushort inner_row = {rows} * (simdgroup / {blocks.split[1]});",
                f"const ushort inner_column = {columns} * (simdgroup % {blocks.split[1]});",
            )
        for axis in ("row", "column"):
            text(f"const long {axis} = block_{axis} + {self._inner(axis)}fragment_{axis};")
        text("")

    def _inner(self, axis: str) -> str:
        """The simdgroup's place in the block, to be added to another."""
        return f"inner_{axis} + " if self.blocks.threads > SIMD else ""

    def _turned(self, name: str) -> bool:
        """True if what lies side by side in a factor is a column of it."""
        return self.spec.transpose_a if name == "a" else self.spec.transpose_b

    def _ones(self) -> tuple[str, ...]:
        """The strides that are known to be 1."""
        if not self.spec.unit:
            return ()
        return tuple([f"{x}_{AXES[x][0 if self._turned(x) else 1]}" for x in ("a", *self.right)])

    def _times(self, index: str, stride: str) -> str:
        """The expression of an index times a stride."""
        if stride in self._ones():
            return index
        return f"({index}) * {stride}" if " " in index else f"{index} * {stride}"

    def _number(self, name: str, place: str) -> str:
        """The expression of an element of A or B in the type that is multiplied."""
        return self.storage[name].read(place, self.tile.element)

    def _staged(self) -> None:
        text, spec, blocks = self.text, self.spec, self.blocks
        (rows_a, stride_a), (rows_b, stride_b) = spec.stages
        kind = self.tile.element
        text(f"threadgroup {kind} stage_a[{rows_a * stride_a}];")
        for name in self.right:
            text(f"threadgroup {kind} stage_{name}[{rows_b * stride_b}];")
        self._tiles()
        text(
            f"const ushort height = ushort(min(m - block_row, long({blocks.m})));",
            f"const ushort width = ushort(min(n - block_column, long({blocks.n})));",
        )
        with text.block(f"for (long first = 0; first < k; first += {blocks.k})"):
            text(f"const ushort depth = ushort(min(k - first, long({blocks.k})));")
            text("threadgroup_barrier(mem_flags::mem_threadgroup);")
            self._copy("a", stride_a)
            for name in self.right:
                self._copy(name, stride_b)
            text("threadgroup_barrier(mem_flags::mem_threadgroup);")
            with text.loop("s", blocks.k, SIDE):
                with text.loop("i", self.rows):
                    self._take("a", "i", f"{self._inner('row')}8 * i", "s", stride_a)
                with text.loop("j", self.columns):
                    for name in self.right:
                        self._take(name, "j", "s", f"{self._inner('column')}8 * j", stride_b)
                self._multiply()

    def _tiles(self) -> None:
        """Fragments of A and of the other factors."""
        self.text(self.tile.declare("a_tile", self.rows))
        for name in self.right:
            self.text(self.tile.declare(f"{name}_tile", self.columns))

    def _take(self, name: str, i: str, far: str, near: str, stride: int) -> None:
        """A fragment from a stage; a transposed one lies there as it does in memory."""
        turned, text = self._turned(name), self.text
        if self.blocks.banks == "padding":
            if turned:
                far, near = near, far
            row = f"({far})" if " " in far else far
            place = f"stage_{name} + {row} * {stride} + {near}"
            text(self.tile.load(f"{name}_tile[{i}]", place, stride, transpose=turned))
            return
        far, near = f"{far} + fragment_row", f"{near} + fragment_column + e"
        if turned:
            far, near = near, far
        with text.loop("e", 2):
            at = f"({far}) * {stride} + {self.spec.exchanged(far, near, stride)}"
            text(f"{fragment.at(f'{name}_tile[{i}]', 'e')} = stage_{name}[{at}];")

    def _copy(self, name: str, stride: int) -> None:
        """All threads copy a block of A or B to its stage, neighbours from neighbouring places."""
        if name == "b" and self.spec.codes:
            self._widen(self.spec.codes, stride)
            return
        text, blocks = self.text, self.blocks
        sides = {  # elements of a block, how many of them there are, and where it starts
            "m": (blocks.m, "height", "block_row"),
            "n": (blocks.n, "width", "block_column"),
            "k": (blocks.k, "depth", "first"),
        }
        far, near = AXES[name]
        if self._turned(name):
            far, near = near, far
        rows, row_limit, top = sides[far]
        width, limit, left = sides[near]
        together = min(width & -width, blocks.threads)  # a power of two, so that no thread is idle
        others = blocks.threads // together
        with text.block(f"for (ushort r = thread_index / {together}; r < {rows}; r += {others})"):
            text(f"const long from = {self._times(f'{top} + r', f'{name}_{far}')};")
            head = f"for (ushort e = thread_index % {together}; e < {width}; e += {together})"
            with text.block(head):
                at = f"from + {self._times(f'{left} + e', f'{name}_{near}')}"
                value = self._number(name, f"{name}[{at}]")
                text(f"const bool inside = r < {row_limit} && e < {limit};")
                zero = f"{self.tile.element}(0)"
                place = self.spec.exchanged("r", "e", stride)
                text(f"stage_{name}[r * {stride} + {place}] = inside ? {value} : {zero};")

    def _widen(self, held: Codes, stride: int) -> None:
        """All threads write weights to their stage, a line of inputs of a column each."""
        text, blocks = self.text, self.blocks
        count = blocks.k // codes.LINE * blocks.n
        with text.block(f"for (ushort p = thread_index; p < {count}; p += {blocks.threads})"):
            text(
                f"const ushort r = {codes.LINE} * (p / {blocks.n});",
                f"const ushort e = p % {blocks.n};",
            )
            with text.loop("t", codes.LINE):
                text("const bool inside = r + t < depth && e < width;")
                place = self.spec.exchanged("r + t", "e", stride)
                value = codes.weight(held, f"(first + r) / {codes.LINE}", "t", "block_column + e")
                text(f"stage_b[(r + t) * {stride} + {place}] =\n    inside ? {value} : 0.0f;")

    def _direct(self) -> None:
        """Each lane reads its own elements; at an edge it asks whether each of them exists."""
        text, blocks = self.text, self.blocks
        self._tiles()
        text("long first = 0;")
        with text.block(f"if (block_row + {blocks.m} <= m && block_column + {blocks.n} <= n)"):
            moved = ("a",) if self.spec.codes else ("a", *self.right)
            for name in moved:
                ends = ("row", "fragment_column") if name == "a" else ("fragment_row", "column")
                strides = [f"{name}_{axis}" for axis in AXES[name]]
                far, near = (self._times(*pair) for pair in zip(ends, strides, strict=True))
                kind = self.storage[name].memory
                text(f"device const {kind}* {name}_lane = {name} + {far} + {near};")
            with text.block(f"for (; first + {blocks.k} <= k; first += {blocks.k})"):
                with text.loop("s", blocks.k, SIDE):
                    self._read("a_lane", ("8 * i", "s"), guarded=False)
                    for name in self.right:
                        self._read(f"{name}_lane", ("s", "8 * j"), guarded=False)
                    self._multiply()
                for name in moved:
                    text(f"{name}_lane += {self._times(str(blocks.k), f'{name}_k')};")
        text.note("At an edge of C, and what is left of the contraction.")
        with text.block(f"for (; first < k; first += {SIDE})"):
            text("const long k_a = first + fragment_column;")
            text("const long k_b = first + fragment_row;")
            self._read("a", ("row + 8 * i", "k_a"), guarded=True)
            for name in self.right:
                self._read(name, ("k_b", "column + 8 * j"), guarded=True)
            self._multiply()

    def _read(self, source: str, indices: tuple[str, str], *, guarded: bool) -> None:
        """Fragments of A or B, the two elements of a lane are neighbours in a row."""
        text, name = self.text, source[0]
        row, column = indices[0], f"{indices[1]} + e"
        strides = [f"{name}_{axis}" for axis in AXES[name]]
        at = f"{self._times(row, strides[0])} + {self._times(column, strides[1])}"
        value, gap = self._number(name, f"{source}[{at}]"), " "
        if name == "b" and self.spec.codes:
            line = f"first / {codes.LINE}" if guarded else f"(first + {row}) / {codes.LINE}"
            j = column if guarded else f"column + {column}"
            value = codes.weight(self.spec.codes, line, "fragment_row", j)
            gap = "\n    "  # the line would be long
        i, count = ("i", self.rows) if name == "a" else ("j", self.columns)
        with text.loop(i, count), text.loop("e", 2):
            if guarded:
                ends = zip((row, column), AXES[name], strict=True)
                text(f"const bool inside = {' && '.join(f'{x} < {end}' for x, end in ends)};")
                value = f"inside ? {value} : {self.tile.element}(0)"
            text(f"{fragment.at(f'{name}_tile[{i}]', 'e')} ={gap}{value};")

    def _multiply(self) -> None:
        text = self.text
        with text.loop("i", self.rows), text.loop("j", self.columns):
            for name in self.right:
                total = f"{SUMS[name]}[{self.columns} * i + j]"
                text(fragment.multiply_accumulate(total, "a_tile[i]", f"{name}_tile[j]"))

    def _finish(self) -> None:
        text, spec, own = self.text, self.spec, self.storage["c"]
        with (
            text.loop("i", self.rows),
            text.loop("j", self.columns),
            text.loop("e", 2),
            text.block("if (row + 8 * i < m && column + 8 * j + e < n)"),
        ):
            text("const long at = (row + 8 * i) * c_m + (column + 8 * j + e) * c_n;")
            place = f"[{self.columns} * i + j]"
            text(f"float x = alpha * {fragment.at(f'sum{place}', 'e')};")
            if spec.bias:
                index = "column + 8 * j + e" if spec.bias == "column" else "row + 8 * i"
                step = f"sizes[{SIZES.index('bias_step')}]"
                value = self.storage["bias"].read(f"bias[({index}) * {step}]", "float")
                text(f"x += {value};")
            result = activation.apply(spec.activation, "x")
            if spec.gate:
                result = f"{result} * (alpha * {fragment.at(f'gate{place}', 'e')})"
            else:
                with text.block("if (beta != 0.0f)"):
                    text(f"x += beta * {self._old()};")
            text(f"c[at] = {own.write(result)};")

    def _old(self) -> str:
        """The element of C that beta multiplies."""
        if not self.spec.old:
            return self.storage["c"].read("c[at]", "float")
        at = "(row + 8 * i) * old_m + (column + 8 * j + e) * old_n"
        return self.storage["old"].read(f"old[{at}]", "float")


def _algorithm(spec: GemmSpec) -> list[str]:
    """The lines that open the source."""
    a, b = (f"{name}^T" if getattr(spec, f"transpose_{name}") else name for name in "ab")
    value = f"alpha {a.upper()} {b.upper()}"
    if spec.bias:
        value += f" + bias of the {spec.bias}"
    value += "" if spec.gate else " + beta C"
    result = f"{spec.activation}({value})" if spec.activation else value
    if spec.gate:
        g = "G^T" if spec.transpose_b else "G"
        result = f"{result if spec.activation else f'({value})'} (alpha {a.upper()} {g})"
    factors = "A, B, G" if spec.gate else "A, B"
    where = "threadgroup memory, 0 beyond the edges" if spec.staged else "registers"
    blocks = spec.blocks
    return [
        f"C = {result}, {spec.a} x {spec.codes.scheme if spec.codes else spec.b} -> {spec.c}",
        f"{blocks.m} x {blocks.n} of C for a threadgroup of {blocks.threads}:",
        "",
        "    C <- 0",
        f"    for each {blocks.k} of the contraction:",
        f"        {factors} -> {where}",
        "        C += A B" + (", gate += A G" if spec.gate else ""),
        f"    C -> {result}",
    ]
