"""Products by the names of BLAS: its arguments, their order, and leading dimensions.

    >>> import numpy as np
    >>> from tilefold import blas
    >>> a = np.array([1, 2, 3, 4], np.float32)  # two columns of two elements: (1, 2) and (3, 4)
    >>> blas.sgemm("N", "T", 2, 2, 2, 1.0, a, 2, a, 2, 0.0, np.empty(4, np.float32), 2)
    array([10., 14., 14., 20.], dtype=float32)

The first letter is the type: s is float32, d float64, h float16 and b bfloat16. h and b have the
meaning of s, since BLAS has no such routines; sums are float32 there. A matrix is columns one
after the other, as in Fortran: element (i, j) of A with the leading dimension lda is a[i + j lda].
Arrays of NumPy and tensors of PyTorch on the CPU are such buffers if their memory is one piece,
whatever their shape. A result is written in place, and returned. Tensors carry no gradients here.

Checks are those of BLAS, in its order: an error names the argument and its number, as XERBLA does.
A buffer that ends too early for its sizes is refused too, and so is a result that overlaps an
operand. `strict=False` is for callers that try one library after another: where there is no kernel,
a routine then does nothing and returns its result as it was, in place of NotImplementedError.
"""

from __future__ import annotations

import functools
import inspect
import operator
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np

from tilefold.backends.arrays import numpy as arrays
from tilefold.backends.cpu.matmul.spec import ITEM_BYTES
from tilefold.common.check import number, shown, whole
from tilefold.frontends import registry
from tilefold.products import plans
from tilefold.products.places import Form, OverlapError
from tilefold.products.plans import Options

__all__ = [
    *("bgemm", "bgemv", "dgemm", "dgemv", "dger", "hgemm", "hgemv", "sgemm", "sgemv", "sger"),
]

Function = TypeVar("Function", bound=Callable[..., Any])

_NAMES = {
    "gemm": [
        "transa",
        "transb",
        "m",
        "n",
        "k",
        "alpha",
        "a",
        "lda",
        "b",
        "ldb",
        "beta",
        "c",
        "ldc",
    ],
    "gemv": ["trans", "m", "n", "alpha", "a", "lda", "x", "incx", "beta", "y", "incy"],
    "ger": ["m", "n", "alpha", "x", "incx", "y", "incy", "a", "lda"],
}
"""The arguments in their order."""

_TYPES = {"s": "float32", "d": "float64", "h": "float16", "b": "bfloat16"}


def sgemm(
    transa: str,
    transb: str,
    m: int,
    n: int,
    k: int,
    alpha: float,
    a: Any,
    lda: int,
    b: Any,
    ldb: int,
    beta: float,
    c: Any,
    ldc: int,
    *,
    strict: bool = True,
) -> Any:
    """C = alpha op(A) op(B) + beta C in float32.

    Arguments:
        transa, transb: "N" for a matrix as it is, "T" or "C" for its transpose, in either case
        m, n, k: op(A) is m x k, op(B) is k x n, and C is m x n; 0 is allowed
        alpha, beta: numbers. A and B are not read where alpha is 0, nor C where beta is 0
        a: at least lda columns elements, float32; the columns are k for "N", else m
        lda: at least the rows of A: m for "N", else k
        b, ldb: the same for B, of k rows for "N", else n
        c, ldc: the same for C, of m rows; it is overwritten. Elements between columns stay
        strict: False to do nothing where there is no kernel

    Returns:
        c

    Raises:
        ValueError: an argument that BLAS refuses, a buffer that is too short, or C that overlaps
            an operand
        TypeError: elements of another type, or arguments of another kind
        NotImplementedError: no kernel takes these buffers, and `strict` is True
    """
    given = transa, transb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc
    return _gemm("sgemm", given, strict)


def sgemv(
    trans: str,
    m: int,
    n: int,
    alpha: float,
    a: Any,
    lda: int,
    x: Any,
    incx: int,
    beta: float,
    y: Any,
    incy: int,
    *,
    strict: bool = True,
) -> Any:
    """y = alpha op(A) x + beta y in float32, where A is m x n; y is returned.

    A sum of no terms is 0, so y is then beta y; some libraries leave it as it was. Elements of x
    lie incx apart, and those of y incy; neither is 0. With a negative number the first element is
    the last one in memory. Errors are those of `sgemm`.
    """
    return _gemv("sgemv", (trans, m, n, alpha, a, lda, x, incx, beta, y, incy), strict)


def sger(
    m: int,
    n: int,
    alpha: float,
    x: Any,
    incx: int,
    y: Any,
    incy: int,
    a: Any,
    lda: int,
    *,
    strict: bool = True,
) -> Any:
    """A = alpha x y^T + A in float32, where A is m x n; a is returned. See `sgemv`."""
    return _ger("sger", (m, n, alpha, x, incx, y, incy, a, lda), strict)


def _typed(letter: str, model: Function) -> Function:
    """The routine of another type, with the same arguments."""
    signature, routine = inspect.signature(model), letter + model.__name__[1:]
    count, run = len(signature.parameters) - 1, globals()[f"_{model.__name__[1:]}"]

    @functools.wraps(model)
    def call(*given: Any, strict: bool = True, **named: Any) -> Any:
        if named or len(given) != count:
            given = signature.bind(*given, **named).args
        return run(routine, given, strict)

    call.__name__ = call.__qualname__ = routine
    call.__doc__ = f"`{model.__name__}` of {_TYPES[letter]} arrays: see there."
    return call  # type: ignore[return-value]


class _Arguments:
    """The arguments of a routine by name. Its checks raise errors with a name and a number."""

    def __init__(self, routine: str, given: tuple[Any, ...]) -> None:
        self.routine, self.dtype = routine, _TYPES[routine[0]]
        self.given = dict(zip(_NAMES[routine[1:]], given, strict=True))

    def turned(self, name: str) -> bool:
        """True if an argument asks for a transpose."""
        value = self.given[name]
        if not isinstance(value, str) or value.upper() not in ("N", "T", "C"):
            raise ValueError(f"{self._called(name)} must be 'N', 'T' or 'C', got {shown(value)}")
        return value.upper() != "N"

    def length(self, name: str, least: int = 0) -> int:
        """An integer that is at least `least`."""
        value = self.given[name]
        if type(value) is int and value >= least:
            return value
        return whole(self._called(name), value, least)

    def step(self, name: str) -> int:
        """An integer that is not 0."""
        value = self.given[name]
        try:
            found = 0 if isinstance(value, bool) else operator.index(value)
        except TypeError:
            found = 0
        if found == 0:
            kind = ValueError if type(value) is int else TypeError
            line = f"{self._called(name)} must be an integer that is not 0, got {shown(value)}"
            raise kind(line)
        return found

    def factor(self, name: str) -> float:
        """A number."""
        value = self.given[name]
        return value if type(value) is float else number(self._called(name), value)

    def buffer(self, name: str, needed: int) -> _Buffer:
        """The memory of an argument, of at least `needed` elements."""
        called, value = self._called(name), self.given[name]
        tensors = getattr(sys.modules.get("torch"), "Tensor", ())
        if isinstance(value, tensors):
            found = _of_tensor(called, name, value)
        else:
            found = _of_array(called, value)
        if found.dtype != self.dtype:
            raise TypeError(f"{called} must be {self.dtype}, got {found.dtype}")
        if found.elements < needed:
            raise ValueError(
                f"{called} must have at least {needed} elements for its sizes, got {found.elements}"
            )
        return found

    def matrix(self, name: str, size: tuple[int, int], leading: int) -> _Part:
        """Columns that begin `leading` elements apart."""
        rows, columns = size
        needed = (columns - 1) * leading + rows if rows and columns else 0
        across = leading if needed > rows else 1  # of one column it may be any number
        return self.buffer(name, needed).part(size, (1, across))

    def vector(self, name: str, length: int, step: int) -> _Part:
        """Elements that are `step` apart."""
        needed = (length - 1) * abs(step) + 1 if length else 0
        return self.buffer(name, needed).part((length,), (step if length > 1 else 1,))

    def multiply(
        self, parts: Callable[[], dict[str, _Part]], result: str, strict: bool, options: Options
    ) -> Any:
        """Compute a product in the memory of a result, which is returned."""
        found = self.given[result]
        try:
            given = parts()
            out = given["c"]
            if not out.buffer.writable:
                raise ValueError(f"{self._called(result)} is written, so it must not be read-only")
            given["out"] = out
            key = tuple([(name, part.form) for name, part in given.items()])
            forms = {name: part.form for name, part in given.items()}
            plan = plans.kept(key, options, lambda: forms)
            plan.run({name: part.address for name, part in given.items()}, out.address)
            out.buffer.changed()
        except OverlapError as error:
            raise ValueError(f"{self._called(result)} must not overlap an operand") from error
        except NotImplementedError:
            if strict:
                raise
        return found

    def _called(self, name: str) -> str:
        return f"{self.routine}: parameter {[*self.given].index(name) + 1} ({name})"


class _Buffer(NamedTuple):
    """Memory in one piece; `changed` says to its owner that it was written."""

    dtype: str
    address: int
    elements: int
    writable: bool
    changed: Callable[[], None]

    def part(self, shape: tuple[int, ...], strides: tuple[int, ...]) -> _Part:
        """Elements of it as an array. With a negative stride the first one lies last."""
        address = self.address
        if strides[0] < 0 < shape[0]:
            address += (shape[0] - 1) * -strides[0] * ITEM_BYTES[self.dtype]
        return _Part(Form(self.dtype, shape, strides), address, self)


class _Part(NamedTuple):
    """An array in a buffer."""

    form: Form
    address: int
    buffer: _Buffer

    def as_matrix(self, shape: tuple[int, int], axis: int) -> _Part:
        """A vector as the matrix of one column or row along an axis, or of none."""
        (step,) = self.form.strides
        strides = (step, 0) if axis == 0 else (0, step)
        return self._replace(form=Form(self.form.dtype, shape, strides))


def _of_array(called: str, value: Any) -> _Buffer:
    if not isinstance(value, np.ndarray):
        line = f"{called} must be a NumPy array or a torch tensor, got {type(value).__name__}"
        other = registry.find(value=value).__name__.split(".")[2] != "numpy"
        raise NotImplementedError(line) if other else TypeError(line)
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{called} must be an array without a mask of its own: pass its data")
    flags = value.flags
    if not (flags.c_contiguous or flags.f_contiguous):
        raise ValueError(f"{called} must be one piece of memory, got strides {value.strides}")
    if not flags.aligned:
        size = value.itemsize
        raise ValueError(f"{called} must lie at a multiple of its {size} bytes in memory")
    if not value.dtype.isnative:
        raise TypeError(f"{called} must be in native byte order, got {value.dtype}")
    name: str = arrays.NAMES.get(value.dtype) or value.dtype.name
    return _Buffer(name, arrays.pointer(value), value.size, flags.writeable, _nothing)


def _nothing() -> None:
    """NumPy counts no changes."""


def _of_tensor(called: str, name: str, value: Any) -> _Buffer:
    from tilefold.products.torch import buffer_of

    try:
        return _Buffer(*buffer_of(name, value))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise type(error)(called + str(error).removeprefix(name)) from None


def _gemm(routine: str, given: tuple[Any, ...], strict: bool) -> Any:
    its = _Arguments(routine, given)
    turned_a, turned_b = its.turned("transa"), its.turned("transb")
    m, n, k = (its.length(name) for name in "mnk")
    matrices = {
        "a": (k, m) if turned_a else (m, k),
        "b": (n, k) if turned_b else (k, n),
        "c": (m, n),
    }
    leading = {name: its.length(f"ld{name}", max(1, rows)) for name, (rows, _) in matrices.items()}
    alpha, beta = its.factor("alpha"), its.factor("beta")
    if alpha == 0:  # no element of A and B is read
        k, turned_a, turned_b = 0, False, False
        matrices |= {"a": (m, 0), "b": (0, n)}

    def parts() -> dict[str, _Part]:
        return {name: its.matrix(name, size, leading[name]) for name, size in matrices.items()}

    return its.multiply(parts, "c", strict, Options(alpha, beta, turned_a, turned_b))


def _gemv(routine: str, given: tuple[Any, ...], strict: bool) -> Any:
    its = _Arguments(routine, given)
    turned, m, n = its.turned("trans"), its.length("m"), its.length("n")
    lda, incx, incy = its.length("lda", max(1, m)), its.step("incx"), its.step("incy")
    alpha, beta = its.factor("alpha"), its.factor("beta")
    k, rows = (m, n) if turned else (n, m)
    size = (m, n)
    if alpha == 0:
        k, turned, size = 0, False, (rows, 0)

    def parts() -> dict[str, _Part]:
        a, x = its.matrix("a", size, lda), its.vector("x", k, incx)
        return {"a": a, "b": x, "c": its.vector("y", rows, incy)}

    return its.multiply(parts, "y", strict, Options(alpha, beta, turned, False))


def _ger(routine: str, given: tuple[Any, ...], strict: bool) -> Any:
    its = _Arguments(routine, given)
    m, n, alpha = its.length("m"), its.length("n"), its.factor("alpha")
    incx, incy, lda = its.step("incx"), its.step("incy"), its.length("lda", max(1, m))
    k = int(alpha != 0)

    def parts() -> dict[str, _Part]:
        x, y = its.vector("x", m, incx), its.vector("y", n, incy)
        columns, rows = x.as_matrix((m, k), 0), y.as_matrix((k, n), 1)
        return {"a": columns, "b": rows, "c": its.matrix("a", (m, n), lda)}

    return its.multiply(parts, "a", strict, Options(alpha, 1.0))


dgemm = _typed("d", sgemm)
"""`sgemm` in float64."""

hgemm = _typed("h", sgemm)
"""`sgemm` of float16 arrays, with sums in float32."""

bgemm = _typed("b", sgemm)
"""`sgemm` of bfloat16 arrays, with sums in float32."""

dgemv = _typed("d", sgemv)
"""`sgemv` in float64."""

hgemv = _typed("h", sgemv)
"""`sgemv` of float16 arrays, with sums in float32."""

bgemv = _typed("b", sgemv)
"""`sgemv` of bfloat16 arrays, with sums in float32."""

dger = _typed("d", sger)
"""`sger` in float64."""
