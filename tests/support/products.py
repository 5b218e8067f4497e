"""Matrix products and the softmax of rows by the kernels of GPUs, for shared suites.

Metal kernels run on the emulator, which faults on an access outside of a view. Triton kernels run
in the interpreter, and must touch only their operands and write every element of C once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import metal
import ml_dtypes
import numpy as np
import product_cases
from bounds import Watched
from compare import UNITS, assert_near
from interpreted import array, needs, tensor
from numpy.typing import NDArray
from product_cases import Variant, given

from tilefold.backends.metal.dispatch import Emulated
from tilefold.backends.metal.matmul import calls as metal_calls
from tilefold.backends.metal.matmul import quantized as metal_quantized
from tilefold.backends.triton.interpreter import Interpreted
from tilefold.backends.triton.matmul import calls as triton_calls
from tilefold.backends.triton.matmul import quantized as triton_quantized
from tilefold.backends.triton.matmul.gemm import GemmBlocks
from tilefold.backends.triton.matmul.rows import SoftmaxBlocks

Array = NDArray[Any]

SMALL = GemmBlocks(32, 32, 16, warps=4, stages=2, band=2)
"""The blocks of Triton's products; they are small, since they are the interpreter's arrays."""


@dataclass(frozen=True, eq=False)
class ListeningEmulator(Emulated):
    """The emulator, which notes its sources."""

    sources: list[str] = field(default_factory=list)

    def compile(self, text: str) -> Any:
        """Compile a source, and note it."""
        self.sources.append(text)
        return super().compile(text)


@dataclass(frozen=True, eq=False)
class ListeningInterpreter(Watched):
    """The interpreter, which notes its sources."""

    written: tuple[str, ...] = ("c",)
    sources: list[str] = field(default_factory=list)

    def function(self, text: str, entry: str) -> Any:
        """Take a source, and note it."""
        self.sources.append(text)
        return super().function(text, entry)


@dataclass(frozen=True)
class Products:
    """The products of a backend; `family` is the family of an Apple GPU, or "" for Triton."""

    family: str = ""

    def __str__(self) -> str:
        return f"metal-{self.family}" if self.family else "triton"

    @property
    def activation_unit(self) -> float:
        """The error of an activation itself, relative to its argument."""
        return 3e-7 if self.family else 0

    def listening(self) -> ListeningEmulator | ListeningInterpreter:
        """A new machine that notes its sources."""
        if self.family:
            metal.needs()
            return ListeningEmulator(self.family)
        needs()
        return ListeningInterpreter()

    def gemm(
        self, a: Array, b: Array, c: Array | None = None, on: Any = None, **options: Any
    ) -> Array:
        """The product of two arrays, in `out` or `c` if one is given."""
        if self.family:
            got: Array = metal_calls.gemm(a, b, c, machine=on or _emulator(self.family), **options)
            into = options.get("out", c)
            assert into is None or got is into
            return got
        return multiply(a, b, c, on, **options)

    def qgemm(self, x: Array, w: Any, on: Any = None, **options: Any) -> Array:
        """The product of an array and a quantised matrix, in `out` if it is given."""
        if self.family:
            machine = on or _emulator(self.family)
            found: Array = metal_quantized.qgemm(x, w, machine=machine, **options)
            assert options.get("out") is None or found is options["out"]
            return found
        needs()
        options |= {name: tensor(options[name]) for name in ("bias", "out") if name in options}
        got = triton_quantized.qgemm(tensor(x), w, machine=on or Watched(written=("c",)), **options)
        assert options.get("out") is None or got is options["out"]
        return array(got, str(got.dtype).removeprefix("torch."))

    def check(self, got: Array, a: Array, b: Array, **options: Any) -> None:
        """Raise AssertionError unless a product is as exact as its sums allow."""
        unit = self.activation_unit
        product_cases.assert_product(got, a, b, activation_unit=unit, **options)

    def product(self, variant: Variant, shape: tuple[int, int, int], on: Any = None) -> None:
        """Raise AssertionError unless a product of random arrays is right."""
        x = given(variant, shape)
        options: dict[str, Any] = {"cores": 1} if self.family else {}
        got = self.gemm(
            x.a,
            x.b,
            x.c.copy(),
            on,
            transpose_a=variant.transpose_a,
            transpose_b=variant.transpose_b,
            bias=x.bias if variant.bias else None,
            bias_axis=variant.bias or "column",
            activation=variant.activation,
            **x.scalars,
            **options,
        )
        activation = variant.activation
        self.check(got, x.left, x.right, c=x.c, bias=x.added, activation=activation, **x.scalars)


ALL = (Products("apple7"), Products("apple9"), Products())
"""All backends: an Apple GPU that stages operands, one whose lanes read them, and Triton."""


@functools.cache
def _emulator(family: str) -> Emulated:
    metal.needs()
    return Emulated(family)


def multiply(
    a: Array, b: Array, c: Array | None = None, on: Interpreted | None = None, **options: Any
) -> Array:
    """Triton's `gemm` on arrays; its kernel touches only them, and writes all of C once."""
    needs()
    on, options = on or Watched(written=("c",)), {"blocks": SMALL, **options}
    for name in ("bias", "gate", "out"):
        if options.get(name) is not None:
            options[name] = tensor(options[name])
    old = None if c is None else tensor(c)
    got = triton_calls.gemm(tensor(a), tensor(b), old, machine=on, **options)
    into = options.get("out", old)
    assert into is None or got is into
    return array(got, str(got.dtype).removeprefix("torch."))


def definition(x: Array) -> tuple[Array, Array]:
    """Softmax and log-sum-exp in float64; a row that holds only -inf has 0 and -inf."""
    x = x.astype(np.float64)
    lowest = -float(np.finfo("float64").max)
    with np.errstate(invalid="ignore", divide="ignore"):
        m = x.max(-1, keepdims=True, initial=lowest)
        m = np.where(np.isneginf(x).all(-1, keepdims=True), 0, m)
        e = np.exp(x - m)
        total = e.sum(-1, keepdims=True)
        p = np.where(total == 0, 0, e / np.where(total == 0, 1, total))
        return p, (m + np.log(total))[..., 0]


@dataclass(frozen=True)
class Softmax:
    """The softmax of rows on a backend, and the threads that have a row.

    Metal: a simdgroup of 32 threads, or a threadgroup if `shared`, for every width. Triton: a block
    that holds a row if `blocks` is None, else a block that walks the row.
    """

    family: str = ""
    shared: bool = False
    blocks: SoftmaxBlocks | None = None

    def __str__(self) -> str:
        if self.family:
            return f"metal-{self.family}-{'threadgroup' if self.shared else 'simdgroup'}"
        return f"triton-{f'{self.blocks.rows} rows walked' if self.blocks else 'one pass'}"

    def __call__(self, x: Array, p: Array | None = None) -> tuple[Array, Array]:
        """The weights of rows, in `p` if it is given, and their log-sum-exp."""
        if self.family:
            on = _emulator(self.family)
            got, lse = metal_calls.softmax(x, p, return_lse=True, machine=on)
            assert p is None or got is p
            return got, lse
        return weigh(x, p, blocks=self.blocks)

    def check(self, x: Array, p: Array | None = None) -> None:
        """Raise AssertionError unless weights and lse are as exact as their sums allow."""
        assert_weights(x, *self(x, p))


def weigh(x: Array, p: Array | None = None, **options: Any) -> tuple[Array, Array]:
    """Triton's `softmax` on arrays, with lse; its kernel touches only its operands."""
    needs()
    into = None if p is None else tensor(p)
    on = Watched(written=("p", "lse"))
    got, lse = triton_calls.softmax(tensor(x), into, return_lse=True, machine=on, **options)
    assert into is None or got is into
    return array(got, str(x.dtype)), lse.numpy()


def assert_weights(x: Array, p: Array, lse: Array) -> None:
    """Raise AssertionError unless weights and lse are as exact as the type of the sums allows.

    A sum of `width` terms is off by at most `width` units. x - m is off by one unit of itself, and
    its exponential has the same error. Weights below the smallest normal number may be 0. In
    float64 the definition has the same error itself.
    """
    got, lse = np.atleast_1d(p), np.atleast_1d(lse)
    want, want_lse = map(np.atleast_1d, definition(x))
    kept = str(x.dtype)
    unit = 2 * UNITS["float64"] if kept == "float64" else UNITS["float32"]
    assert lse.dtype == ("float64" if kept == "float64" else "float32")
    with np.errstate(invalid="ignore"):
        depth = np.where(want > 0, -np.log(np.maximum(want, 1e-45)), 0)
    exact = (x.shape[-1] + 8 + depth) * unit * want
    least = max(1.2e-38, float(ml_dtypes.finfo(kept).smallest_subnormal))
    assert_near("p", got, want, exact + 1.01 * UNITS[kept] * want + least)
    assert_near("lse", lse, want_lse, unit * (x.shape[-1] + 8 + abs(np.nan_to_num(want_lse))))
