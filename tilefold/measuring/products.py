"""Products as cases of measurements: sizes and options without arrays, and their lower bounds.

A product cannot take less time than its multiply-adds at the measured peak rate of what multiplies,
or its operands through memory once. Operations are counted 2 per multiply-add, of a gate too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tilefold.backends.cpu.device import Device
from tilefold.backends.cpu.matmul.plan import Plan, plan
from tilefold.backends.cpu.matmul.quantized_calls import Sizes, spec_of
from tilefold.backends.cpu.matmul.quantized_integers import LONGEST, STEP
from tilefold.backends.cpu.matmul.spec import ITEM_BYTES, FewRowsSpec, GemmSpec, QuantizedSpec
from tilefold.backends.cpu.spec import FMA, Multiplier
from tilefold.common.check import choice, whole
from tilefold.planning.roofline import Bounds, Rates
from tilefold.products.places import Form
from tilefold.products.plans import Described, Options, described
from tilefold.products.quantized_calls import FLOATS, takes_integers
from tilefold.products.schemes import group_of, scheme_of

OPERATIONS = ("gemm", "qgemm")
DTYPES = ("float32", "float64", "float16", "bfloat16", "int8")


@dataclass(frozen=True)
class ProductCase:
    """A product of A (m, k) and B (k, n), both of `dtype`, and the number of threads.

    `transpose_a`: A lies as (k, m). `transpose_b`: B lies as (n, k). `gate`: there is a second B.
    "qgemm" has a quantised B, of a `scheme`, and a `group_size` or None for the usual one;
    `dynamic` rounds rows of A to 8 bits. Raises ValueError for what does not fit together.
    """

    operation: str
    m: int
    n: int
    k: int
    dtype: str = "float32"
    threads: int = 1
    transpose_a: bool = False
    transpose_b: bool = False
    activation: str | None = None
    gate: bool = False
    scheme: str | None = None
    group_size: int | None = None
    dynamic: bool = False

    def __post_init__(self) -> None:
        choice("operation", self.operation, OPERATIONS)
        if self.operation == "gemm":
            _ = self.described
            return
        choice("dtype of qgemm", self.dtype, FLOATS)
        if self.dynamic and not takes_integers(self.scheme or "", self.k, self.group):
            raise ValueError(
                f"dynamic needs int8 without groups, and K a multiple of {STEP} up to {LONGEST},"
                f" got {self.scheme} in groups of {self.group}, K {self.k}"
            )

    @property
    def size(self) -> str:
        """The sizes as text: `1024x1024x512`."""
        return f"{self.m}x{self.n}x{self.k}"

    @property
    def label(self) -> str:
        """The case in a line, without its threads."""
        words = [self.operation, self.size, self.dtype]
        words += [self.scheme] if self.scheme else []
        words += [f"groups of {self.group}"] if self.scheme and self.group != self.k else []
        for name in ("dynamic", "transpose_a", "transpose_b", "gate"):
            words += [name.replace("_", " ")] if getattr(self, name) else []
        return " ".join([*words, *([self.activation] if self.activation else [])])

    @cached_property
    def described(self) -> Described:
        """A gemm in the words of kernels; all arrays are contiguous."""
        m, n, k = self.m, self.n, self.k
        b = Form(self.dtype, (n, k), (k, 1)) if self.transpose_b else None
        b = b or Form(self.dtype, (k, n), (n, 1))
        a = Form(self.dtype, (k, m), (m, 1)) if self.transpose_a else None
        forms = {"a": a or Form(self.dtype, (m, k), (k, 1)), "b": b}
        forms |= {"gate": b} if self.gate else {}
        turned = self.transpose_a, self.transpose_b
        return described(Options(1.0, 0.0, *turned, self.activation), forms)

    def plan(self, device: Device) -> Plan:
        """The plan of a gemm."""
        product, _, written = self.described
        return plan(product, written, device)

    @property
    def group(self) -> int:
        """Inputs that share a scale in a quantised B."""
        given = self.group_size
        size = None if given is None else whole("group_size", given, 1)
        return group_of(scheme_of(self.scheme), self.k, size)

    @property
    def sizes(self) -> Sizes:
        """A qgemm in the words of kernels."""
        scales = "float32" if scheme_of(self.scheme).scaled else None
        given = (self.m, self.n, self.k, self.group, scales)
        lines = (self.dtype, self.n, 1)
        return Sizes(str(self.scheme), *given, *lines, None, 0, self.activation, self.dynamic)

    def spec(self, device: Device) -> FewRowsSpec | GemmSpec | QuantizedSpec:
        """The kernel of the product."""
        return self.plan(device).spec if self.operation == "gemm" else spec_of(self.sizes, device)

    @property
    def flops(self) -> int:
        """Operations, 2 per multiply-add."""
        return 2 * self.m * self.n * self.k * (2 if self.gate else 1)

    @property
    def b_bytes(self) -> int:
        """Bytes of B, and of the gate; with scales, zeros and table where B is quantised."""
        if self.operation == "gemm":
            return self.k * self.n * ITEM_BYTES[self.dtype] * (2 if self.gate else 1)
        scheme = scheme_of(self.scheme)
        codes, scales = scheme.codes_shape(self.k, self.n), (0, 0, 0)
        if scheme.scaled:
            scales = scheme.scales_shape(self.k, self.n, self.group)
        numbers = _count(scales) * (2 if scheme.zeros else 1)
        table = 0 if scheme.scaled else 128
        return _count(codes) * (4 if scheme.words else 1) + 4 * numbers + table

    @property
    def bytes(self) -> int:
        """Bytes of all operands and of the result, each once."""
        dtype = self.dtype if self.operation == "qgemm" else self.described.out.dtype
        around = self.m * self.k * ITEM_BYTES[self.dtype] + self.m * self.n * ITEM_BYTES[dtype]
        return around + self.b_bytes

    def bounds(self, rates: Rates) -> Bounds:
        """Seconds that the product takes at least."""
        arithmetic = self.flops / rates.flops_per_second
        return Bounds(arithmetic, 0.0, self.bytes / rates.bytes_per_second)


def rated(spec: object) -> tuple[str, Multiplier]:
    """The type and the multiplier whose rates bound a kernel."""
    if isinstance(spec, GemmSpec):
        dtype = "bfloat16" if spec.unit.of_bfloat16 else spec.sums
        return dtype, Multiplier(spec.unit.name)
    if isinstance(spec, QuantizedSpec) and spec.integers:
        units = {"vnni": spec.vnni, "fours": spec.fours, "madd": spec.pairs}
        return "int32", Multiplier(next((unit for unit, yes in units.items() if yes), "fma"))
    return getattr(spec, "sums", "float32"), FMA


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
