"""A call of a product without its arrays: what its arguments mean, and its kernel made ready.

    arguments -> Options and Forms -> Product -> Plan: a prepared kernel, the shape of its result

A plan is kept under its options and the forms of its arrays, so a repeated call makes none of this.
What only addresses tell, such as whether the result overlaps an operand, is checked in every call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from tilefold.backends.cpu import guard as guarded
from tilefold.backends.cpu.device import host
from tilefold.backends.cpu.guard import ABSENT, APART, SAME_OR_APART, Guard
from tilefold.backends.cpu.matmul import calls as kernels
from tilefold.backends.cpu.matmul.plan import pack_spec
from tilefold.backends.cpu.matmul.spec import PackSpec
from tilefold.backends.cpu.records import Recorded
from tilefold.common import generation
from tilefold.common.check import choice, flag, number
from tilefold.common.computed import computed
from tilefold.common.lru import LruCache
from tilefold.problems.matmul import (
    ACTIVATIONS,
    INTEGERS,
    Accepted,
    Operand,
    Product,
    common_type,
    sums,
)
from tilefold.problems.request import check_precision
from tilefold.products.places import Form, Place, check_apart, check_single

FLOATS: Final = ("float32", "float64", "float16", "bfloat16")

FACTORS: Final = (*FLOATS, *INTEGERS)
"""The types that are multiplied, each with any other."""

GIVEN: Final = ("a", "b", "c", "bias", "gate")
"""The operands of a product, in the order of their addresses."""

_FACTORS: Final = Accepted(FACTORS, empty=True, most=64)
_TERMS: Final = Accepted((*FLOATS, "int32"), empty=True, most=64)

RESULTS: Final = {
    "int32": ("int32", "float32"),
    "float32": ("float32", "float16", "bfloat16"),
    "float64": ("float64", "float32"),
}
"""The types that a result may have, by the type of the sums."""


class Options(NamedTuple):
    """The arguments of a product that are no arrays; `dtype` is that of the result, or None."""

    alpha: float = 1.0
    beta: float = 0.0
    transpose_a: bool = False
    transpose_b: bool = False
    activation: str | None = None
    dtype: str | None = None
    precision: str = "highest"

    @classmethod
    def of(
        cls,
        alpha: Any,
        beta: Any,
        transpose_a: Any,
        transpose_b: Any,
        activation: Any,
        dtype: str | None,
        precision: Any,
    ) -> Options:
        """The options of a call. Raises TypeError or ValueError for what is none."""
        if precision != "highest":
            check_precision(precision)
        if activation is not None:
            choice("activation", activation, ACTIVATIONS)
        return cls(
            alpha if type(alpha) is float else number("alpha", alpha),
            beta if type(beta) is float else number("beta", beta),
            transpose_a if type(transpose_a) is bool else flag("transpose_a", transpose_a),
            transpose_b if type(transpose_b) is bool else flag("transpose_b", transpose_b),
            *(activation, dtype, precision),
        )


@dataclass(frozen=True)
class Plan:
    """A call made ready: the shape and type of its result, and what computes it.

    `prepared` is None where the result has no elements. `places` are those of the operands that the
    kernel reads, and of "out" where the caller gives it: c is not read where beta is 0. `onto` is
    True if c lies as out does, so that they may be one array.
    """

    shape: tuple[int, ...]
    dtype: str
    places: Mapping[str, Place]
    onto: bool
    prepared: kernels.Prepared | None

    def run(self, addresses: Mapping[str, int], out: int) -> None:
        """Compute the result at an address, from aligned operands at addresses.

        Raises OverlapError if it overlaps an operand.
        """
        at = [addresses.get(name, 0) for name in GIVEN]
        if self.start(*at, out):
            return
        if "out" in self.places:
            check_apart(self.places, self.onto, addresses)
        if self.prepared is not None:
            a, b, *others = at
            self.prepared.run(a, b, out, *others)

    def start(self, *addresses: int) -> bool:
        """Run on addresses, in the order of `kernels.OPERANDS`; False where `run` must look."""
        prepared = self.prepared
        if prepared is None or not guarded.HERE or not prepared.recorded.is_native:
            return False
        return self.guard.run(*addresses)

    @computed
    def guard(self) -> Guard:
        """What looks at addresses and runs the kernel, if the result has elements."""
        assert self.prepared is not None
        return guard_of(self.prepared.recorded, self.places, self.onto)


def guard_of(recorded: Recorded, places: Mapping[str, Place], onto: bool = False) -> Guard:
    """What looks at the addresses of `kernels.OPERANDS` and runs a record: see `Plan`."""
    every = []
    for name in kernels.OPERANDS:
        place = places.get(name)
        if place is None:  # a new result needs no look
            every.append(guarded.Operand(role=APART if name == "out" else ABSENT))
        else:
            role = SAME_OR_APART if name == "c" and onto else APART
            every.append(guarded.Operand(place.low, place.end, place.mask, role))
    result = kernels.OPERANDS.index("out") if "out" in places else -1
    return Guard.of(recorded.call, every, result, alone=recorded.alone)


def places(product: Product, forms: Mapping[str, Form]) -> dict[str, Place]:
    """The places of "out", if it is given, and of the operands that a kernel reads."""
    read = [name for name in GIVEN if getattr(product, name) is not None]
    return {name: Place.of(form) for name, form in forms.items() if name in (*read, "out")}


_kept: LruCache[Plan] = LruCache(most=256, most_bytes=2**24)
"""Plans of calls. A large batch has 48 bytes for each of its matrices."""


def kept(key: Hashable, options: Options, forms: Callable[[], Mapping[str, Form]]) -> Plan:
    """The plan under a key, which says how the arrays lie; made of their forms if there is none."""
    whole = generation.number, options, key
    found = _kept.get(whole)
    if found is None:
        found = plan(options, forms())
        _kept.put(whole, found, found.prepared.nbytes if found.prepared else 0)
    return found


class Described(NamedTuple):
    """A call in the words of kernels, and the shape and the form of its result."""

    product: Product
    out: Form
    written: Operand


def described(options: Options, forms: Mapping[str, Form]) -> Described:
    """The description of a call from the forms of its operands and, as "out", of its result.

    Raises TypeError or ValueError for types, shapes and options that do not fit together.
    """
    vector_a, vector_b = (len(forms[name].shape) == 1 for name in ("a", "b"))
    given = {
        name: _operand(name, form, vector_a, vector_b)
        for name, form in forms.items()
        if name != "out"
    }
    a, b, c, out = forms["a"].dtype, forms["b"].dtype, forms.get("c"), forms.get("out")
    dtype = result_type(options.dtype, a, b, c and c.dtype, out and out.dtype)
    summed = tuple(dict.fromkeys((dtype, sums(a, b))))
    if c is not None and c.dtype not in summed:
        known = " or ".join(summed)
        raise TypeError(f"c must be {known}, as the result or its sums are, got {c.dtype}")
    product = Product.of(
        given,
        alpha=options.alpha,
        beta=options.beta,
        transpose_a=options.transpose_a and not vector_a,
        transpose_b=options.transpose_b and not vector_b,
        bias_axis=None,
        activation=options.activation,
        dtype=dtype,
        biases=summed,
    )
    shape = _shape(product, vector_a, vector_b)
    if product.c is not None:
        _check_broadcast(forms["c"].shape, shape)
    if not options.beta:
        product = replace(product, c=None)
    _check_integers(product)
    out = out or Form(dtype, shape, _dense(shape))
    if out.shape != shape:
        raise ValueError(f"out must be of shape {shape}, got {out.shape}")
    check_single(out.shape, out.strides)
    written = _operand("out", out, vector_a, vector_b).padded(len(product.a.axes.lengths))
    return Described(product, out, written)


def plan(options: Options, forms: Mapping[str, Form]) -> Plan:
    """The plan of a call on the processor from the forms of its arrays: see `described`."""
    product, out, written = described(options, forms)
    pair = product.a.dtype, product.b.dtype
    panels = _panels(forms, options)
    if panels is not None and panels != pack_spec(*pair, host()):
        raise NotImplementedError(
            f"b, of {pair[1]}, is packed for other products than those with {pair[0]}:"
            f" pack it with a_dtype={pair[0]!r}, convert a, or pass the matrix itself"
        )
    prepared = None
    if 0 not in out.shape:
        prepared = kernels.prepare(product, written, packed=panels is not None)
    onto = out == forms.get("c")
    return Plan(out.shape, out.dtype, places(product, forms), onto, prepared)


def _panels(forms: Mapping[str, Form], options: Options) -> PackSpec | None:
    """How b and the gate lie in panels, or None."""
    b = forms["b"]
    gate = forms.get("gate", b)
    if gate.packed != b.packed:
        raise TypeError("gate must be packed as b is, and in the same way")
    if b.packed and options.transpose_b:
        raise ValueError("transpose_b must be False where b is packed: use pack(w, transpose=True)")
    return b.packed


def factor(name: str, form: Form) -> Operand:
    """The operand of an array that is multiplied."""
    return _FACTORS.operand(name, form.dtype, form.shape, form.strides, 1)


def _operand(name: str, form: Form, vector_a: bool, vector_b: bool) -> Operand:
    """The operand of an array, whose vectors are matrices of one row or column."""
    dtype, shape, strides, _ = form
    if name == "a" and vector_a:
        shape, strides = (1, *shape), (0, *strides)
    elif name in ("b", "gate"):
        if vector_b and len(shape) == 1:
            shape, strides = (*shape, 1), (*strides, 0)
    elif name != "a":  # of the axes of the result
        if vector_b and shape:
            shape, strides = (*shape, 1), (*strides, 0)
        if vector_a and shape:
            shape, strides = (*shape[:-1], 1, shape[-1]), (*strides[:-1], 0, strides[-1])
    accepted = _FACTORS if name in ("a", "b", "gate") else _TERMS
    least = {"a": 1, "b": 1, "bias": 1}.get(name, 0)
    found = accepted.operand(name, dtype, shape, strides, least)
    return found._replace(shape=form.shape)


def result_type(wanted: str | None, a: str, b: str, c: str | None, out: str | None) -> str:
    """The type of the result: that of out, or out_dtype, or that of c, or the common type."""
    if out is not None and wanted not in (None, out):
        raise TypeError(f"out must be {wanted} as out_dtype says, got {out}")
    named = {"out": out, "out_dtype": wanted, "c": c, "the type of the result": common_type(a, b)}
    name, dtype = next((name, dtype) for name, dtype in named.items() if dtype is not None)
    allowed = RESULTS[sums(a, b)]
    if dtype not in allowed:
        known = ", ".join(allowed)
        raise TypeError(f"{name} must be one of {known} for products of {a} and {b}, got {dtype}")
    return dtype


def _check_integers(product: Product) -> None:
    """Raises ValueError for what has no meaning in a result of integers."""
    if product.dtype != "int32":
        return
    if product.activation is not None:
        raise ValueError(
            f"activation must be None where the result is int32, got {product.activation!r}; pass"
            " out_dtype='float32'"
        )
    if product.gate is not None:
        raise ValueError("gate must be None where the result is int32; pass out_dtype='float32'")
    for name, value in (("alpha", product.alpha), ("beta", product.beta)):
        if not float(value).is_integer() or not -(2**31) <= value < 2**31:
            raise ValueError(
                f"{name} must be a whole number of 32 bits where the result is int32, got {value};"
                " pass out_dtype='float32'"
            )


def _check_broadcast(c: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Raises ValueError unless c has the shape of the result, or broadcasts to it."""
    last = shape[len(shape) - len(c) :]
    if len(c) > len(shape) or any(one not in (1, two) for one, two in zip(c, last, strict=True)):
        raise ValueError(f"c must broadcast to the result, {shape}, got {c}")


def _shape(product: Product, vector_a: bool, vector_b: bool) -> tuple[int, ...]:
    """The shape of the result: vectors have no axis in it."""
    axes = max(len(product.a.shape), len(product.b.shape), 2) - 2
    batch = product.batch[len(product.batch) - axes :]
    return (*batch, *(() if vector_a else (product.m,)), *(() if vector_b else (product.n,)))


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous array."""
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(length, 1)
    return tuple(reversed(strides))
