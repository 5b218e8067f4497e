"""A quantised matrix: made from an array by `quantize`, and widened again.

`schemes.py` says what the codes mean and how they lie. Matrices are quantised some panels at a
time, so the work takes little memory beside the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold.common.array_files import element_type
from tilefold.common.check import choice, flag, shown, whole
from tilefold.common.computed import computed
from tilefold.common.foreign_arrays import dtype_name, is_of_torch, type_name
from tilefold.common.lru import LruCache
from tilefold.products import palettes
from tilefold.products.schemes import (
    E4M3_MOST,
    ENTRIES,
    PANEL,
    Scheme,
    e4m3_codes,
    e4m3_table,
    group_of,
    pack,
    scheme_of,
    unpack,
)

Array = NDArray[Any]

DTYPES = ("float32", "float64", "float16", "bfloat16")
SCALES = ("float32", "float16")

LINE = 64  # bytes

LARGEST = 3e38
"""The largest weight: half a step more is within float32."""

_AT_ONCE = 1 << 21  # weights that are quantised or widened at once: 8 MiB of float32; not tuned


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedMatrix:
    """A matrix of k inputs and n outputs in codes of few bits. `tilefold.quantize` makes one.

    >>> import numpy as np
    >>> import tilefold
    >>> w = np.random.default_rng(0).standard_normal((256, 96), np.float32)
    >>> tilefold.quantize(w, "int4")
    QuantizedMatrix('int4', 256 x 96, group_size=128, 4.50 bits per weight)

    Arguments:
        scheme: the name of its scheme
        shape: (k, n), as in x @ w
        group_size: inputs that share a scale: k, or a multiple of 16 that divides k
        codes: the codes in panels of 32 outputs, as `tilefold.products.schemes` has it
        scales: float32 or float16, (panels, k / group_size, 32); None for palette6
        zeros: the codes of weight 0, of the shape and type of scales; of int4 alone
        table: 64 numbers of float16; of palette6 alone

    Raises:
        ValueError, TypeError: an array has another shape or type than its scheme says
    """

    scheme: str
    shape: tuple[int, int]
    group_size: int
    codes: Array
    scales: Array | None = None
    zeros: Array | None = None
    table: Array | None = None

    def __post_init__(self) -> None:
        scheme = scheme_of(self.scheme)
        if len(self.shape) != 2:
            raise ValueError(f"shape must be (k, n), got {shown(self.shape)}")
        k, n = (whole("an axis of shape", length, 1) for length in self.shape)
        if group_of(scheme, k, self.group_size if scheme.grouped else None) != self.group_size:
            raise ValueError(f"group_size must be {k} for {self.scheme}, got {self.group_size}")
        scaled = scheme.scales_shape(k, n, self.group_size)
        _check("codes", self.codes, scheme.codes_shape(k, n), (scheme.dtype,))
        _check("scales", self.scales, scaled if scheme.scaled else None, SCALES)
        kind = () if self.scales is None else (self.scales.dtype.name,)
        _check("zeros", self.zeros, scaled if scheme.zeros else None, kind)
        _check("table", self.table, None if scheme.scaled else (ENTRIES,), ("float16",))

    def __repr__(self) -> str:
        k, n = self.shape
        group = f", group_size={self.group_size}" if self.group_size != k else ""
        size = f"{self.bits_per_weight:.2f} bits per weight"
        return f"QuantizedMatrix({self.scheme!r}, {k} x {n}{group}, {size})"

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}  # without `kept`

    @computed
    def kept(self) -> LruCache[Any]:
        """What was prepared for products with this matrix, by the forms of calls.

        It holds addresses of the arrays, so it is of this value alone, and ends with it.
        """
        return LruCache(most=256, most_bytes=2**24)

    @property
    def arrays(self) -> dict[str, Array]:
        """Its arrays by name: "codes", and of "scales", "zeros" and "table" those that it has."""
        found = {name: getattr(self, name) for name in ("codes", "scales", "zeros", "table")}
        return {name: array for name, array in found.items() if array is not None}

    @property
    def nbytes(self) -> int:
        """The bytes of its arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def bits_per_weight(self) -> float:
        """8 nbytes / (k n): with scales, zeros and table, and with what rounds n up to panels."""
        k, n = self.shape
        return 8 * self.nbytes / (k * n)

    @property
    def panels(self) -> int:
        """Panels of 32 outputs."""
        return len(self.codes)

    def widened(self, first: int, last: int) -> Array:
        """The weights of the panels from `first` up to `last`, float32 (k, 32 (last - first)).

        A weight is computed in float32: (code - zero) is exact, and its product with the scale is
        rounded once. Columns after n are 0.
        """
        scheme, (k, _) = scheme_of(self.scheme), self.shape
        codes = unpack(scheme, self.codes[first:last], k)
        if self.table is not None:
            found: Array = self.table.astype(np.float32)[codes]
            found[:, max(0, self.shape[1] - first * PANEL) :] = 0
            return found
        assert self.scales is not None
        found = e4m3_table()[codes] if self.scheme == "float8_e4m3" else codes.astype(np.float32)
        groups = found.reshape(k // self.group_size, self.group_size, -1)
        if self.zeros is not None:
            groups -= _lines(self.zeros[first:last])
        elif scheme.zero:
            groups -= np.float32(scheme.zero)
        groups *= _lines(self.scales[first:last])
        return found

    def dequantize(self, dtype: Any = "float32", *, transpose: bool = False) -> Array:
        """The weights as a NumPy array (k, n), or (n, k) with `transpose`.

        >>> import numpy as np
        >>> import tilefold
        >>> w = tilefold.quantize(np.eye(32, dtype=np.float32), "int8")
        >>> bool((w.dequantize("float16") == np.eye(32)).all())
        True

        Arguments:
            dtype: float32, float64, float16, or bfloat16, which needs ml_dtypes; by name, or a type
            transpose: True gives (outputs, inputs), as in torch.nn.Linear
        """
        dtype = type_name(dtype)
        choice("dtype", dtype, DTYPES)
        k, n = self.shape
        result = np.empty((n, k) if flag("transpose", transpose) else (k, n), element_type(dtype))
        turned = result.T if transpose else result
        step = panels_at_once(k)
        for first in range(0, self.panels, step):
            part = self.widened(first, min(first + step, self.panels))
            columns = slice(first * PANEL, min(n, (first + step) * PANEL))
            turned[:, columns] = part[:, : columns.stop - columns.start]
        return result


def quantize(
    w: Any,
    scheme: str,
    *,
    group_size: int | None = None,
    transpose: bool = False,
    table: Any = None,
    scale_dtype: str = "float32",
) -> QuantizedMatrix:
    """A matrix in codes of 4, 6 or 8 bits, for `tilefold.qgemm`.

    >>> import numpy as np
    >>> import tilefold
    >>> w = np.random.default_rng(0).standard_normal((256, 96), np.float32)
    >>> q = tilefold.quantize(w, "int8")
    >>> bool((abs(q.dequantize() - w) <= 0.501 * q.scales.reshape(-1)).all())  # half a step
    True
    >>> tilefold.quantize(w, "palette6").nbytes / w.nbytes  # 6 bits of 32, and the table
    0.1888...

    Arguments:
        w: (inputs, outputs), as in x @ w; (outputs, inputs) with `transpose`. A NumPy array or a
            torch tensor of float32, float64, float16 or bfloat16, of any strides
        scheme: "int8" (symmetric), "int4" (a scale and a zero for each group), "int4_symmetric",
            "palette6" (64 float16 numbers for the matrix) or "float8_e4m3"
        group_size: inputs that share a scale: a multiple of 16 that divides the number of inputs,
            or that number. None: all inputs for int8, 128 for int4, or less where 128 does not
            divide. palette6 and float8_e4m3 take none
        transpose: True if w is (outputs, inputs), as the weight of torch.nn.Linear
        table: the 64 numbers of palette6, in any order. None finds them by k-means
        scale_dtype: "float32" or "float16", the type of scales and zeros

    Returns:
        A `QuantizedMatrix` of NumPy arrays. A weight is off by half a step at most: half a scale;
        2^-4 of itself, or 2^-10 scale for float8_e4m3. The numbers of palette6 are the nearest ones
        of its table. The same w gives the same bits.

    Raises:
        ValueError: an unknown scheme, a group that does not divide, a table without 64 numbers,
            NaN and weights above 3e38, or ones that float16 does not hold where it must
        TypeError: w is no array of these types
        NotImplementedError: w is on a GPU
    """
    found = scheme_of(scheme)
    choice("scale_dtype", scale_dtype, SCALES)
    matrix = _matrix(w)
    matrix = matrix.T if flag("transpose", transpose) else matrix
    k, n = matrix.shape
    size = None if group_size is None else whole("group_size", group_size, 1)
    group = group_of(found, k, size)
    if found.scaled:
        if table is not None:
            raise ValueError(f"table must be None for {scheme}")
        parts = [_scaled(found, block, group, scale_dtype) for block in _blocks(matrix)]
        codes, scales, zeros = (list(each) for each in zip(*parts, strict=True))
        return QuantizedMatrix(
            scheme,
            (k, n),
            group,
            _joined(codes),
            _joined(scales),
            _joined(zeros) if found.zeros else None,
        )
    entries = palettes.palette(_halves(matrix)) if table is None else _table(table)
    indices = [pack(found, palettes.nearest(entries, block)) for block in _blocks(matrix)]
    return QuantizedMatrix(scheme, (k, n), k, _joined(indices), table=entries)


def aligned(shape: tuple[int, ...], dtype: str) -> Array:
    """An array that begins with a line of the cache, so that no vector lies in two lines."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + LINE, np.uint8)
    start = -memory.ctypes.data % LINE
    return memory[start : start + size].view(dtype).reshape(shape)


def _joined(parts: list[Array]) -> Array:
    """The arrays of panels, one after another."""
    panels = sum(len(part) for part in parts)
    joined = aligned((panels, *parts[0].shape[1:]), parts[0].dtype.name)
    np.concatenate(parts, out=joined)
    return joined


def _scaled(
    scheme: Scheme, block: Array, group: int, dtype: str
) -> tuple[Array, Array, Array | None]:
    """Packed codes, scales and zeros of some columns; scales have whole panels of them."""
    k, columns = block.shape
    groups = block.reshape(k // group, group, columns)
    high, low = groups.max(axis=1), groups.min(axis=1)
    zeros = None
    if scheme.zeros:  # the range has 0 in it, so a weight of 0 stays 0
        high, low = np.maximum(high, 0), np.minimum(low, 0)
        scales = _scales(high / 15 - low / 15, dtype)
        zeros = np.rint(-low / scales)
        codes = np.rint(groups / scales[:, None]) + zeros[:, None]
    else:
        # 4 bits: the largest weight is half a step beyond code 15: steps are 1/15 of the range
        steps = {"int8": 127, "int4_symmetric": 7.5, "float8_e4m3": E4M3_MOST}[scheme.name]
        scales = _scales(np.maximum(high, -low) / np.float32(steps), dtype)
        codes = groups / scales[:, None]
        codes = codes if scheme.name == "float8_e4m3" else np.rint(codes) + scheme.zero
    codes = codes.reshape(k, columns)
    if scheme.name == "float8_e4m3":
        items = e4m3_codes(codes)
    else:
        items = np.clip(codes, scheme.least, scheme.most).astype(np.int8).view(np.uint8)
    kept = None if zeros is None else _panels(zeros, dtype)
    return pack(scheme, items), _panels(scales, dtype), kept


def _scales(scales: Array, dtype: str) -> Array:
    """Scales as they are kept, float32: rounded upwards, so that all codes stay in their range."""
    about = np.finfo(dtype)
    least = about.tiny if dtype == "float32" else about.smallest_subnormal
    kept: Array = np.maximum(scales, np.float32(least))  # where all weights are 0
    if dtype == "float32":
        return kept
    if (kept > np.finfo(np.float16).max).any():
        raise ValueError(f"w needs scales up to {kept.max():.3g}, and float16 ends at 65504")
    halves = kept.astype(np.float16)
    below = halves < kept
    halves[below] = np.nextafter(halves[below], np.float16(np.inf))
    return halves.astype(np.float32)


def _panels(numbers: Array, dtype: str) -> Array:
    """Scales or zeros (groups, columns), as they lie in panels."""
    padded = np.pad(numbers, ((0, 0), (0, -numbers.shape[1] % PANEL)))
    cut = padded.reshape(len(numbers), -1, PANEL).swapaxes(0, 1)
    return np.ascontiguousarray(cut, dtype)


def _lines(panels: Array) -> Array:
    """Scales or zeros of some panels, (groups, 1, columns)."""
    return np.ascontiguousarray(panels.swapaxes(0, 1)).reshape(panels.shape[1], 1, -1)


def _matrix(w: Any) -> Array:
    """The weights as an array of NumPy, with its own memory where it can."""
    if isinstance(w, np.ma.MaskedArray) or not (isinstance(w, np.ndarray) or is_of_torch(w)):
        raise TypeError(f"w must be a NumPy array or a torch tensor, got {type(w).__name__}")
    if dtype_name(w) not in DTYPES:
        raise TypeError(f"w must be one of {', '.join(DTYPES)}, got {dtype_name(w)}")
    if is_of_torch(w):
        w = _of_torch(w)
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"w must have two axes, none of length 0, got {w.shape}")
    matrix: Array = w
    return matrix


def _of_torch(w: Any) -> Array:
    """The elements of a tensor as an array of NumPy."""
    from tilefold.backends.arrays.torch import check_held

    if w.is_meta:
        raise NotImplementedError("w is on meta, where it has no elements")
    if not w.is_cpu:
        raise NotImplementedError(f"w is on {w.device}; the CPU quantises it: pass w.cpu()")
    check_held("w", w)
    w = w.detach().resolve_neg()
    array: Array = (w.float() if dtype_name(w) == "bfloat16" else w).numpy()
    return array


def panels_at_once(k: int) -> int:
    """Panels of k inputs that are quantised or widened at once."""
    return max(1, _AT_ONCE // (PANEL * k))


def _blocks(matrix: Array) -> Iterator[Array]:
    """The weights of some panels at a time, float32. Raises ValueError for too large ones."""
    k, n = matrix.shape
    step = panels_at_once(k) * PANEL
    for first in range(0, n, step):
        with np.errstate(over="ignore"):
            block = np.ascontiguousarray(matrix[:, first : first + step], np.float32)
        if not (largest := abs(block).max()) <= LARGEST:
            raise ValueError(f"w must have weights of at most {LARGEST:g}, got {largest:.3g}")
        yield block


def _halves(matrix: Array) -> Iterator[Array]:
    """The blocks. Raises ValueError if float16 does not hold them."""
    for block in _blocks(matrix):
        if (largest := np.abs(block).max()) > np.finfo(np.float16).max:
            raise ValueError(f"w must be at most 65504, as float16, in palette6, got {largest:.3g}")
        yield block


def _table(table: Any) -> Array:
    """A table of the caller as float16, without rounding in silence to infinity."""
    try:
        given = np.asarray(table.detach().tolist() if is_of_torch(table) else table)
    except ValueError:  # rows of different lengths
        given = None
    if given is None or not (given.dtype.kind in "fiub" or given.dtype.name == "bfloat16"):
        raise TypeError(f"table must be {ENTRIES} numbers, got {shown(table)}")
    with np.errstate(over="ignore"):
        halves: Array = given.astype(np.float16)
    if halves.shape != (ENTRIES,):
        raise ValueError(f"table must have {ENTRIES} numbers, got shape {halves.shape}")
    if not np.isfinite(halves).all():
        raise ValueError("table must have finite numbers within float16")
    return halves


def _check(name: str, array: Any, shape: tuple[int, ...] | None, dtypes: tuple[str, ...]) -> None:
    """Raises unless an array has this shape and one of these types, and lies in one piece."""
    if shape is None or array is None:
        if (shape is None) != (array is None):
            wanted = "None" if shape is None else f"of shape {shape}"
            raise ValueError(f"{name} must be {wanted}, got {shown(array)}")
        return
    if not isinstance(array, np.ndarray) or array.dtype.name not in dtypes:
        kind = array.dtype.name if isinstance(array, np.ndarray) else type(array).__name__
        raise TypeError(f"{name} must be an array of {' or '.join(dtypes)}, got {kind}")
    if array.shape != shape or not (array.flags.c_contiguous and array.flags.aligned):
        raise ValueError(f"{name} must be contiguous, of shape {shape}, got {array.shape}")
    if not array.dtype.isnative:
        raise ValueError(f"{name} must have this machine's byte order")
