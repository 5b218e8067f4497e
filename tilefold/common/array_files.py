"""Arrays in files: .npy, .npz and .safetensors, read without pickle and written atomically.

`file.npz:name` picks one array of a file that holds several. A file of Python objects is refused:
reading it would run code that its author chose.

bfloat16 is a type of ml_dtypes, not of NumPy. NumPy writes a bfloat16 array as items of two bytes
without a type name, and this module reads such items as bfloat16.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from tilefold.common.check import shorten
from tilefold.common.files import write_atomically

Array = NDArray[Any]

_SAFETENSORS_TYPES = {"F32": "float32", "F64": "float64", "F16": "float16", "BF16": "bfloat16"}
SUFFIXES = (".npy", ".npz", ".safetensors")


def element_type(name: str) -> np.dtype[Any]:
    """The NumPy type with this name. Raises ModuleNotFoundError for bfloat16 without ml_dtypes."""
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "bfloat16 arrays need the package ml_dtypes: pip install ml_dtypes"
        ) from None
    found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return found


def load(place: str, default: str) -> Array:
    """The array at `file` or `file:name`; among several arrays, the one called `default`.

    Raises FileNotFoundError, ModuleNotFoundError or ValueError, whose message names the place.
    """
    path, name = _split(place)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path}: it is no file but a folder, a pipe or a device")
    try:
        if path.suffix == ".npy":
            with path.open("rb") as file:
                return _typed(_no_name(name, place, _read(file, path.stat().st_size)))
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                return _typed(_load_member(archive, name, default, place))
        return _load_safetensors(path, name, default, place)
    except (ModuleNotFoundError, PermissionError):
        raise
    except MemoryError as error:
        raise ValueError(f"{path}: too little memory for it: {error}") from None
    except Exception as error:  # of the formats and of the compressions, which have their own
        text = shorten(str(error), 200) or type(error).__name__
        if any(word in text for word in ("pickle", "Object arrays", "magic string")):
            text = "it holds Python objects, or is no array file; only arrays of numbers are read"
        raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def save(place: str, arrays: Mapping[str, Array]) -> None:
    """Write arrays to a file of one of the three kinds; readers see all of the file or nothing.

    A .npy file holds one array, so `arrays` must have exactly one entry for it.
    """
    path, name = _split(place)
    if name is not None:
        raise ValueError(f"{place}: a file is written as a whole; leave out {':' + name!r}")
    if path.suffix == ".npy" and len(arrays) != 1:
        raise ValueError(f"{path}: .npy holds one array, not {len(arrays)}; use .npz")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: there is no such folder")
    content = io.BytesIO()
    if path.suffix == ".npy":
        np.save(content, next(iter(arrays.values())), allow_pickle=False)
    elif path.suffix == ".npz":
        np.savez(content, **arrays)  # type: ignore[arg-type]  # the stub takes allow_pickle for an array
    else:
        content.write(_safetensors().numpy.save(dict(arrays)))
    write_atomically(path, content.getvalue())


def _read(stream: IO[bytes], size: int) -> Array:
    """The array of a .npy stream of `size` bytes. The size that its header tells is checked first.

    Otherwise a header of a hundred bytes could ask for any amount of memory.
    """
    version = np.lib.format.read_magic(stream)
    read: Any = np.lib.format.read_array_header_1_0
    if version != (1, 0):
        read = np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    if min(shape, default=0) < 0:
        raise ValueError(f"its header tells the shape {shape}")
    told, left = math.prod(shape) * dtype.itemsize, size - stream.tell()
    if not dtype.hasobject and told > left:
        raise ValueError(f"its header tells {told} bytes of elements, and the file holds {left}")
    if told > _memory_bytes():
        raise ValueError(f"it holds {told} bytes of elements, more than this machine's memory")
    stream.seek(0)
    array: Array = np.lib.format.read_array(stream, allow_pickle=False)
    return array


def _memory_bytes() -> float:
    """The memory of this machine, as far as the system tells it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return math.inf


def _load_member(archive: zipfile.ZipFile, name: str | None, default: str, place: str) -> Array:
    members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
    member = members[_pick(members, name, default, place)]
    with archive.open(member.filename) as stream:
        return _read(stream, member.file_size)


def _typed(array: Array) -> Array:
    """The array, as bfloat16 where NumPy read items of two bytes without a type name."""
    return array.view(element_type("bfloat16")) if array.dtype.name == "void16" else array


def _split(place: str) -> tuple[Path, str | None]:
    for suffix in SUFFIXES:
        if place.endswith(suffix):
            return Path(place), None
        head, found, name = place.rpartition(f"{suffix}:")
        if found:
            return Path(head + suffix), name
    raise ValueError(f"{place}: the name must end in {', '.join(SUFFIXES)} (or in .npz:name)")


def _no_name(name: str | None, place: str, array: Array) -> Array:
    if name is not None:
        raise ValueError(f"{place}: .npy holds one array without a name; leave out {':' + name!r}")
    return array


def _pick(names: Iterable[str], name: str | None, default: str, place: str) -> str:
    found = sorted(names)
    wanted = name if name is not None else found[0] if len(found) == 1 else default
    if wanted not in found:
        raise ValueError(f"{place}: no array {wanted!r}; it holds {', '.join(found) or 'none'}")
    return wanted


def _load_safetensors(path: Path, name: str | None, default: str, place: str) -> Array:
    tensors = dict(_safetensors().deserialize(path.read_bytes()))
    wanted = _pick(tensors, name, default, place)
    kind, shape = tensors[wanted]["dtype"], tensors[wanted]["shape"]
    if kind not in _SAFETENSORS_TYPES:
        allowed = ", ".join(_SAFETENSORS_TYPES)
        raise ValueError(f"{wanted!r} must be of {allowed}, got {kind}")
    dtype = element_type(_SAFETENSORS_TYPES[kind])
    array: Array = np.frombuffer(tensors[wanted]["data"], dtype).reshape(shape)
    return array


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "reading .safetensors needs the package safetensors: pip install 'tilefold[run]'"
        ) from None
    return safetensors
