"""Quantised matrices in files, in the format of safetensors: 8 bytes, a header, arrays.

    length of the header, uint64 | header, JSON | the bytes of the arrays, one after another

The header has the type, the shape and the two ends of each array. An array of the matrix NAME is
called NAME.codes, NAME.scales, NAME.zeros or NAME.table. The metadata say of each matrix its
scheme, shape and group_size. Arrays begin at multiples of 32 bytes in the file.

The package safetensors reads these files. This module needs no package, and trusts no header: what
it says is compared with the size of the file before anything is read.
Format: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tilefold.common.check import one_line, shorten, shown
from tilefold.common.files import write_atomically
from tilefold.products.quantized import QuantizedMatrix, aligned

KIND = "tilefold.quantized"
"""The key of the metadata that describes the matrices, as JSON."""

_TYPES = {"int8": "I8", "uint8": "U8", "uint32": "U32", "float32": "F32", "float16": "F16"}
_NAMES = {short: name for name, short in _TYPES.items()}
_ARRAYS = ("codes", "scales", "zeros", "table")
_LONGEST = 100_000_000  # bytes of a header that the package safetensors reads
_START = 64  # the arrays begin at a multiple of this


def save_quantized(path: str | os.PathLike[str], matrices: Mapping[str, QuantizedMatrix]) -> None:
    """Write quantised matrices to a file of safetensors. Readers see all of the file or nothing.

    >>> import os, tempfile
    >>> import numpy as np
    >>> import tilefold
    >>> w = tilefold.quantize(np.eye(64, dtype=np.float32), "int8")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "weights.safetensors")
    ...     tilefold.save_quantized(path, {"layer": w})
    ...     tilefold.load_quantized(path)
    {'layer': QuantizedMatrix('int8', 64 x 64, 8.50 bits per weight)}

    Arguments:
        path: the name of the file, which is replaced if it exists
        matrices: quantised matrices by name

    Raises:
        TypeError: a name is no string, or a matrix is not quantised
        OSError: the file cannot be written
    """
    if not isinstance(matrices, Mapping):
        kind = type(matrices).__name__
        raise TypeError(f"matrices must be quantised matrices by name, got {kind}")
    for name, matrix in matrices.items():
        if not isinstance(name, str) or not isinstance(matrix, QuantizedMatrix):
            found = f"{shown(name)}: {type(matrix).__name__}"
            raise TypeError(f"matrices must be quantised matrices by name, got {found}")
    about = {
        name: {"scheme": each.scheme, "shape": each.shape, "group_size": each.group_size}
        for name, each in matrices.items()
    }
    arrays = {
        f"{name}.{part}": array
        for name, each in matrices.items()
        for part, array in each.arrays.items()
    }
    header: dict[str, Any] = {"__metadata__": {KIND: json.dumps(about)}}
    end = 0
    ordered = sorted(arrays, key=lambda name: (arrays[name].nbytes % _START, name))
    for name in ordered:
        begin, end = end, end + arrays[name].nbytes
        header[name] = {
            "dtype": _TYPES[arrays[name].dtype.name],
            "shape": arrays[name].shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _START)
    parts = [_bytes(arrays[name]) for name in ordered]
    write_atomically(Path(path), struct.pack("<Q", len(text)), text, *parts)


def load_quantized(path: str | os.PathLike[str]) -> dict[str, QuantizedMatrix]:
    """The quantised matrices of a file that `tilefold.save_quantized` wrote, by name.

    >>> import tilefold
    >>> tilefold.load_quantized("absent.safetensors")
    Traceback (most recent call last):
    FileNotFoundError: absent.safetensors: there is no such file

    Arguments:
        path: the name of the file

    Returns:
        A dict of `QuantizedMatrix`. Their arrays share the memory into which the file was read

    Raises:
        FileNotFoundError: there is no such file
        ValueError: the file is damaged, or holds something else; the message says what
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"{place}: there is no such file")
    if not place.is_file():  # a pipe would be waited for
        raise ValueError(f"{place}: it is no file but a folder, a pipe or a device")
    try:
        return _load(place)
    except (ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"{place}: {shorten(one_line(error), 300)}") from None


def _load(path: Path) -> dict[str, QuantizedMatrix]:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, _LONGEST):
            raise ValueError(f"it is no file of safetensors: a header of {length} bytes of {size}")
        header = _parsed("its header", file.read(length))
        matrices = _described(header.pop("__metadata__", None))
        left = size - 8 - length
        _check_arrays(header, left)
        memory = aligned((left,), "uint8")
        if file.readinto(memory.data) != left:
            raise ValueError(f"it ended before its {left} bytes of arrays")
    found = {}
    for name, about in matrices.items():
        arrays = {
            part: _array(memory, header.pop(f"{name}.{part}"))
            for part in _ARRAYS
            if f"{name}.{part}" in header
        }
        if "codes" not in arrays:
            raise ValueError(f"the matrix {shown(name)} has no codes")
        try:
            found[name] = QuantizedMatrix(
                about["scheme"], tuple(about["shape"]), about["group_size"], **arrays
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"the matrix {shown(name)}: {error}") from None
    if header:
        raise ValueError(f"the array {shown(min(header))} belongs to no matrix")
    return found


def _parsed(what: str, text: str | bytes) -> dict[str, Any]:
    """The object of a JSON text, in which no name stands twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name stands twice")
        return found

    try:
        found = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{what} is no JSON object")
    return found


def _described(metadata: Any) -> dict[str, Any]:
    """What the metadata say of each matrix."""
    text = metadata.get(KIND) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise ValueError("it holds no matrices of tilefold.save_quantized")
    matrices = _parsed("its metadata", text)
    for name, about in matrices.items():
        if not isinstance(about, dict) or about.keys() != {"scheme", "shape", "group_size"}:
            raise ValueError(f"the matrix {shown(name)} needs scheme, shape and group_size")
        if not _whole(about["shape"], 1) or not _whole([about["group_size"]], 1):
            raise ValueError(f"the matrix {shown(name)} needs whole numbers as its sizes")
    return matrices


def _check_arrays(header: Mapping[str, Any], size: int) -> None:
    """Raises ValueError unless the arrays fill `size` bytes, without gap or overlap."""
    places = []
    for name, entry in header.items():
        what = f"the array {shown(name)}"
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{what} needs dtype, shape and data_offsets")
        kind, shape, ends = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(kind, str) or kind not in _NAMES:
            raise ValueError(f"{what} must be of {', '.join(_NAMES)}, got {shown(kind)}")
        if not _whole(shape, 1) or len(shape) > 4:
            raise ValueError(f"{what} must have at most 4 axes of at least 1, got {shown(shape)}")
        if not _whole(ends, 0) or len(ends) != 2:
            raise ValueError(f"{what} must have two data_offsets, got {shown(ends)}")
        told = math.prod(shape) * np.dtype(_NAMES[kind]).itemsize
        if ends[1] - ends[0] != told or ends[1] > size:
            raise ValueError(f"{what} of {told} bytes lies at {ends}, of {size} bytes")
        places.append(ends)
    at = 0
    for begin, end in sorted(places):
        if begin != at:
            raise ValueError(f"its arrays overlap or leave a gap at byte {min(begin, at)}")
        at = end
    if at != size:
        raise ValueError(f"its arrays end at byte {at}, and it has {size}")


def _whole(numbers: Any, least: int) -> bool:
    """True for a list of integers of at least `least`."""
    return isinstance(numbers, list) and all(type(x) is int and x >= least for x in numbers)


def _bytes(array: Any) -> memoryview:
    """The elements of an array, little-endian as the format is."""
    return memoryview(array.astype(array.dtype.newbyteorder("<"), copy=False)).cast("B")


def _array(memory: Any, entry: Mapping[str, Any]) -> Any:
    """An array in the memory of a file."""
    dtype = np.dtype(_NAMES[entry["dtype"]]).newbyteorder("<")
    begin, end = entry["data_offsets"]
    part = memory[begin:end].view(dtype).reshape(entry["shape"])
    return part.astype(dtype.newbyteorder("="), copy=False)
