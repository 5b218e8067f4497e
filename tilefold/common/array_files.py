"""Arrays in files: .npy, .npz and .safetensors, read without pickle and written atomically.

`file.npz:name` picks one array of a file that holds several. A file of Python objects is refused:
reading it would run code that its author chose.

bfloat16 is a type of ml_dtypes, not of NumPy. NumPy writes a bfloat16 array as items of two bytes
without a type name, and this module reads such items as bfloat16.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    try:
        if path.suffix == ".npy":
            return _typed(_no_name(name, place, np.load(path, allow_pickle=False)))
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return _typed(archive[_pick(archive.files, name, default, place)])
        return _load_safetensors(path, name, default, place)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file") from None
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        text = " ".join(str(error).split())
        if "pickle" in text or "Object arrays" in text:
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
    library = _safetensors()
    try:
        tensors = dict(library.deserialize(path.read_bytes()))
    except FileNotFoundError:
        raise
    except Exception as error:  # the library's own exception type derives from Exception alone
        raise ValueError(str(error)) from None
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
