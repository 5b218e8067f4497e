"""Quantised matrices in files: round trips, other readers, and files that lie."""

from __future__ import annotations

import doctest
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch

import tilefold
from tilefold.products import files
from tilefold.products.schemes import SCHEMES


def matrices() -> dict[str, tilefold.QuantizedMatrix]:
    draw = np.random.default_rng(0)
    found = {
        f"layer.{scheme}": tilefold.quantize(
            draw.standard_normal((48, 33), np.float32), scheme, scale_dtype=dtype
        )
        for scheme, dtype in zip(SCHEMES, ("float32", "float16") * 3, strict=False)
    }
    w = draw.standard_normal((50, 7))
    return found | {"ü": tilefold.quantize(w, "palette6"), "": tilefold.quantize(w, "int8")}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "weights.safetensors"
    tilefold.save_quantized(path, matrices())
    return path


def test_a_file_gives_back_what_was_saved(path: Path, tmp_path: Path) -> None:
    want, got = matrices(), tilefold.load_quantized(path)
    assert repr(got) == repr(want)
    for name, matrix in want.items():
        assert got[name].arrays.keys() == matrix.arrays.keys()
        for part, array in matrix.arrays.items():
            np.testing.assert_array_equal(got[name].arrays[part], array, strict=True)
    tilefold.save_quantized(tmp_path / "none", {})
    assert tilefold.load_quantized(tmp_path / "none") == {}


def test_the_package_safetensors_reads_the_same(path: Path) -> None:
    arrays = {
        f"{name}.{part}": array
        for name, matrix in matrices().items()
        for part, array in matrix.arrays.items()
    }
    read = safetensors.numpy.load_file(path)
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array, strict=True)
    tensors = safetensors.torch.load_file(path)
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensors[name].numpy(), array, strict=True)
    with safetensors.safe_open(path, "np") as file:
        assert "layer.int4" in json.loads(file.metadata()[files.KIND])


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The file with another header."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def entry(name: str, **change: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(change)


def about(name: str, **change: Any) -> Callable[[dict[str, Any]], None]:
    def change_metadata(header: dict[str, Any]) -> None:
        described = json.loads(header["__metadata__"][files.KIND])
        described.setdefault(name, {}).update(change)
        header["__metadata__"][files.KIND] = json.dumps(described)

    return change_metadata


CODES = "layer.int4.codes"  # uint32 (2, 6, 32): 1536 bytes
HEADERS = {
    "must be of I8, U8, U32, F32, F16, got 'F64'": entry(CODES, dtype="F64"),
    r"must be of I8, .* got \['I8'\]": entry(CODES, dtype=["I8"]),
    "must have at most 4 axes of at least 1, got .*-6": entry(CODES, shape=[-2, -6, 32]),
    "must have at most 4 axes .* got True": entry(CODES, shape=True),
    "must have at most 4 axes .* got .*1.5": entry(CODES, shape=[1.5, 256]),
    "must have two data_offsets": entry(CODES, data_offsets=[0]),
    "must have two data_offsets, got .*-8": entry(CODES, data_offsets=[-8, 1528]),
    "of 1536 bytes lies at .*, of": entry(CODES, data_offsets=[10**12, 10**12 + 1536]),
    "of 6442450944000000000000 bytes lies": entry(CODES, shape=[2, 6, 2**27 * 10**12]),
    "its arrays overlap or leave a gap": entry(CODES, data_offsets=[64, 1600]),
    "codes must be contiguous, of shape": entry(CODES, shape=[6, 2, 32]),
    "codes must be an array of uint32, got float32": entry(CODES, dtype="F32"),
    "'layer.int4.codes' needs dtype, shape and": lambda header: header[CODES].pop("dtype"),
    "'layer.int4.codes' needs dtype, .* and": lambda header: header.update({CODES: 1}),
    "the matrix 'layer.int4' has no codes": lambda header: header.update(x=header.pop(CODES)),
    "scales must be of shape": lambda header: header.update(x=header.pop("layer.int8.scales")),
    "the array 'x' belongs to no matrix": lambda header: (
        header.update(x=header.pop("layer.int4.zeros")),
        about("layer.int4", scheme="int4_symmetric")(header),
    ),
    "the matrix 'other' needs scheme": about("other"),
    "codes must be contiguous": about("layer.int4", shape=[48, 2**40]),
    "needs whole numbers as its sizes": about("layer.int4", shape=[48.0, 33]),
    "needs whole numbers as its .izes": about("layer.int4", group_size=None),
    "group_size must be 48": about("layer.int4", group_size=5),
    "shape must be": about("layer.int4", shape=[48]),
    "scheme must be": about("layer.int4", scheme=["int4"]),
    "it holds no matrices of tilefold": lambda header: header.pop("__metadata__"),
    "it holds no .* of tilefold": lambda header: header.update(__metadata__=[]),
    "its metadata cannot be read": lambda header: header["__metadata__"].update({files.KIND: "{"}),
    "its metadata is no JSON object": lambda header: header["__metadata__"].update(
        {files.KIND: "[]"}
    ),
}


@pytest.mark.parametrize("message", HEADERS)
def test_a_header_that_lies_is_one_line(message: str, path: Path, tmp_path: Path) -> None:
    target = tmp_path / "damaged"
    target.write_bytes(rewritten(path, HEADERS[message]))
    with pytest.raises(ValueError, match=message) as raised:
        tilefold.load_quantized(target)
    assert "\n" not in str(raised.value) and str(raised.value).startswith(f"{target}: ")


def test_other_files_are_refused(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    deep = b"[" * 100_000
    twice = b'{"a": 1, "a": 2}'
    number = b'{"a": ' + b"9" * 10_000 + b"}"
    for content, message in (
        (b"", "it is no file of safetensors"),
        (whole[:7], "it is no file of safetensors"),
        (struct.pack("<Q", 2**64 - 1) + whole[8:], "a header of 18446744073709551615 bytes"),
        (struct.pack("<Q", 2**40) + whole[8:], "it is no file of safetensors"),
        (struct.pack("<Q", 0) + whole[8:], "it is no file of safetensors"),
        (struct.pack("<Q", length + 1) + whole[8:], "its header cannot be read|arrays"),
        (whole[:-1], r"bytes lies at .*, of|its arrays end"),
        (whole[: 8 + length], "bytes lies at .*, of 0 bytes"),
        (whole + b"0", "its arrays end at byte"),
        (whole[:8] + b"\xff" + whole[9:], "its header cannot be read"),
        (struct.pack("<Q", 2) + b"[]", "its header is no JSON object"),
        (struct.pack("<Q", len(deep)) + deep, "its header cannot be read"),
        (struct.pack("<Q", len(twice)) + twice, "a name stands twice"),
        (struct.pack("<Q", len(number)) + number, "its header cannot be read"),
    ):
        target = tmp_path / "damaged"
        target.write_bytes(content)
        with pytest.raises(ValueError, match=message) as raised:
            tilefold.load_quantized(target)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        tilefold.load_quantized(tmp_path / "absent")
    with pytest.raises(ValueError, match="it is no file but a folder"):
        tilefold.load_quantized(tmp_path)
    foreign = tmp_path / "foreign"
    safetensors.numpy.save_file({"w": np.zeros(3, np.float32)}, foreign)
    with pytest.raises(ValueError, match="it holds no matrices of tilefold"):
        tilefold.load_quantized(foreign)


def test_any_byte_of_the_header_may_be_damaged(path: Path, tmp_path: Path) -> None:
    """A damaged byte raises ValueError, or makes a name or a number that fits too."""
    whole = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", whole[:8])
    draw = np.random.default_rng(3)
    refused = 0
    for at in draw.integers(0, 8 + length, 200):
        changed = whole.copy()
        changed[at] ^= int(draw.integers(1, 256))
        target = tmp_path / "damaged"
        target.write_bytes(changed)
        try:
            tilefold.load_quantized(target)
        except ValueError:
            refused += 1
    assert refused > 100


def test_only_quantised_matrices_are_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="by name, got 'w': ndarray"):
        tilefold.save_quantized(tmp_path / "file", {"w": np.zeros(3)})
    with pytest.raises(TypeError, match="by name, got 1: QuantizedMatrix"):
        tilefold.save_quantized(tmp_path / "file", {1: matrices()["ü"]})
    with pytest.raises(TypeError, match="by name, got list"):
        tilefold.save_quantized(tmp_path / "file", [matrices()["ü"]])
    assert not list(tmp_path.iterdir())


def test_examples() -> None:
    outcome = doctest.testmod(files)
    assert outcome.attempted and not outcome.failed
