"""How Metal kernels are compiled, bound and launched."""

from __future__ import annotations

import doctest
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from metal import needs
from metal_recorder import Array, Recorder, forward, operands
from paths import ROOT

import tilefold
from tilefold import Problem, bias, metal, softcap, temperature
from tilefold.backends.metal import commands as listed
from tilefold.backends.metal import dispatch, runtime
from tilefold.backends.metal.dispatch import CompileError, Emulated
from tilefold.backends.metal.kernels import frame
from tilefold.backends.metal.kernels.arguments import arrays, sizes
from tilefold.backends.metal.matmul import calls as matmul_calls
from tilefold.problems import reference

MASK = tilefold.causal()


@pytest.fixture(scope="module")
def emulated() -> Emulated:
    """The emulator; one for all tests, so that each kernel is compiled once."""
    needs()
    return Emulated()


@pytest.mark.feature("M03")
def test_a_launch_binds_what_the_text_declares() -> None:
    machine = Recorder()
    q, k, v = operands()
    o, lse = forward(machine, q, k, v, mask=MASK, scale=0.5)
    ((name, given, grid),) = machine.launched
    (launch,) = metal.plan(
        Problem.of(q.shape, k.shape, v.shape, mask=MASK, scale=0.5), "apple9", "forward"
    ).launches
    names = [argument.name for argument in arrays(launch.spec)]
    bound = dict(zip(names, given, strict=False))
    assert name == "tilefold_forward"
    assert bound["q"] is q and bound["v"] is v and bound["o"] is o and bound["lse"] is lse
    *_, numbers, scale = given
    assert scale == 0.5 and len(given) == len(names) + 2
    assert all(type(number) is int for number in numbers), "torch takes Python's own numbers alone"
    known = dict(zip(sizes(launch.spec), numbers, strict=True))
    assert (known["len_q"], known["len_k"], known["heads_q"], known["group"]) == (21, 35, 4, 2)
    assert [known[f"v_{axis}"] for axis in "bhnd"] == [2 * 35 * 9, 35 * 9, 9, 1]
    threads = launch.spec.threads
    assert grid == {
        "threads": (-(-21 // launch.spec.blocks.parallel) * threads, 4, 1),
        "group_size": (threads, 1, 1),
    }


@pytest.mark.feature("A05")
def test_one_text_serves_all_lengths_and_data_are_copied_once() -> None:
    machine = Recorder()
    for length in (21, 33, 21):
        forward(
            machine,
            *operands(len_q=length),
            mask=tilefold.documents(np.arange(length) // 7, np.arange(35) // 7),
        )
    assert len(machine.texts) == 1 and len(machine.launched) == 3
    copied = len(machine.copied)
    forward(machine, *operands(), mask=tilefold.documents(np.arange(21) // 7, np.arange(35) // 7))
    assert len(machine.copied) == copied
    forward(machine, *operands(dtype="float16"))
    assert len(machine.texts) == 2, "another type is another text"
    fortran = [np.asfortranarray(array) for array in operands(dtype="float16")]
    forward(machine, *fortran)
    assert len(machine.texts) == 3, "and so are rows whose numbers lie apart"


def test_arrays_without_numbers_are_bound_to_something() -> None:
    machine = Recorder()
    hides_all = tilefold.rule(lambda q, k: q + 100 < k)
    forward(machine, *operands(), mask=hides_all)
    assert all(array.size for array in machine.copied)


@pytest.mark.parametrize("backward", [False, True])
def test_kernels_of_a_call_are_launched_in_order(backward: bool) -> None:
    machine = Recorder()
    q, k, v = operands()
    with metal.queue(machine) as commands:
        o, lse = commands.attention(q, k, v)
        if backward:
            dq, dk, dv = commands.attention_backward(o, q, k, v, o, lse)
            assert [x.shape for x in (dq, dk, dv)] == [q.shape, k.shape, v.shape]
        assert not machine.launched, "nothing runs before the end of the block"
    names = [name.removeprefix("tilefold_") for name, _, _ in machine.launched]
    assert names == ["forward", *(["backward_dq", "backward_dkv"] if backward else [])]


@pytest.mark.feature("M14")
def test_a_text_that_metal_rejects_is_one_clear_error() -> None:
    log = "program_source:7:5: error: unknown type name 'flaot'\n    flaot x;\n    ^"
    machine = Recorder(error=log)
    with pytest.raises(CompileError) as raised:
        forward(machine, *operands())
    message = str(raised.value)
    assert "\n" not in message
    found = re.fullmatch(
        r"Metal rejected an emitted kernel: program_source:7:5: error: unknown type name 'flaot';"
        r" the source is (\S+), the log beside it",
        message,
    )
    assert found, message
    text = Path(found[1])
    assert "kernel" in text.read_text() and (text.parent / "kernel.log").read_text() == log
    machine.error = ""
    forward(machine, *operands())
    assert len(machine.launched) == 1, "an error is not kept"


@pytest.mark.feature("M14")
def test_a_kernel_that_gets_no_pipeline_keeps_its_text_and_log() -> None:
    """The back end of Metal's compiler runs when torch's library is asked for a kernel."""
    log = "Failed to created pipeline state object, error: Compiler encountered an internal error"
    machine = Recorder(pipeline_error=log)
    with pytest.raises(CompileError, match=f"^Metal rejected an emitted kernel: {log}; the source"):
        forward(machine, *operands())
    with pytest.raises(CompileError) as raised:
        matmul_calls.softmax(np.ones((2, 3), np.float32), machine=machine)
    text = Path(str(raised.value).split("source is ")[1].split(",")[0])
    assert "kernel void tilefold_softmax(" in text.read_text()
    assert (text.parent / "kernel.log").read_text() == log
    machine.pipeline_error = ""
    forward(machine, *operands())
    assert len(machine.launched) == 1, "an error is not kept"


@pytest.mark.slow
@pytest.mark.feature("M14", "M03")
def test_a_bad_word_in_a_generator_is_found_and_its_repair_too(
    emulated: Emulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = operands()
    want, _ = forward(emulated, *given)
    written = frame.written
    with monkeypatch.context() as broken:
        broken.setattr(
            frame, "written", lambda *parts: written(*parts).replace("fast::exp2(", "fast::expp2(")
        )
        with pytest.raises(CompileError, match="expp2"):
            forward(Emulated(), *given)
    assert np.array_equal(forward(Emulated(), *given)[0], want)


@pytest.mark.slow
@pytest.mark.feature("A07")
def test_a_list_of_commands_gives_what_the_calls_give(emulated: Emulated) -> None:
    q, k, v = operands()
    do = np.random.default_rng(1).standard_normal((1, 4, 21, 9)).astype(np.float32)
    commands = metal.queue(emulated)
    first = commands.attention(q, k, v, mask=MASK)
    slopes = commands.attention_backward(do, q, k, v, *first, mask=MASK)
    out = np.empty_like(first[0])
    second = commands.attention(q, k, v, scale=0.1, out=out)
    assert len(commands) == 3 and second[0] is out
    commands.launch()
    assert len(commands) == 0
    eager = forward(emulated, q, k, v, mask=MASK)
    assert all(np.array_equal(a, b) for a, b in zip(first, eager, strict=True))
    assert np.array_equal(out, forward(emulated, q, k, v, scale=0.1)[0])
    want = reference.attention(*(x.astype(np.float64) for x in (q, k, v)), mask=MASK)
    np.testing.assert_allclose(first[0], want[0], rtol=2e-5, atol=2e-5)
    exact = reference.attention_backward(
        *(x.astype(np.float64) for x in (do, q, k, v)), *want, mask=MASK
    )
    for got, array in zip(slopes, exact, strict=True):
        np.testing.assert_allclose(got, array, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.feature("A07")
@pytest.mark.parametrize("tensors", [False, True])
def test_commands_take_scores_sinks_and_dropout(emulated: Emulated, tensors: bool) -> None:
    q, k, v = operands()
    random = np.random.default_rng(1)
    do = random.standard_normal((1, 4, 21, 9)).astype(np.float32)
    given = [random.uniform(1, 2, shape).astype(np.float16) for shape in ((4, 1, 35), (21, 1))]
    sinks = random.standard_normal(4).astype(np.float32)
    arrays: list[Any] = [do, q, k, v, *given, sinks]
    if tensors:
        torch = pytest.importorskip("torch", reason="there is no torch to make tensors")
        arrays = [torch.from_numpy(array) for array in arrays]

    def score(a: Any, b: Any) -> Any:
        return [softcap(2.0), bias(a), temperature(b)]

    own_do, *own, a, b, own_sinks = arrays
    dropout = {"dropout": 0.25, "seed": 7}
    options = {"mask": MASK, "score": score(a, b), "sinks": own_sinks, **dropout}
    with metal.queue(emulated) as commands:
        o, lse = commands.attention(*own, **options)
        got = commands.attention_backward(own_do, *own, o, lse, **options)
    options = {"mask": MASK, "score": score(*given), "sinks": sinks, **dropout}
    wide = [array.astype(np.float64) for array in (do, q, k, v)]
    want = tilefold.attention(*wide[1:], return_lse=True, **options)
    np.testing.assert_allclose(o, want[0], rtol=2e-5, atol=2e-5)
    exact = tilefold.attention_backward(*wide, *want, **options)
    shapes = [q.shape, k.shape, v.shape, (4, 1, 35), (21, 1), (4,)]
    assert [tuple(array.shape) for array in got] == shapes
    for found, array in zip(got, exact, strict=True):
        within = 2e-3 if "16" in str(found.dtype) else 4e-5
        np.testing.assert_allclose(found, array, rtol=within, atol=within)


@pytest.mark.slow
@pytest.mark.feature("A07")
def test_lists_of_1_8_and_64_commands_are_timed(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the script measures calls on tensors")
    script = ROOT / "benchmarks" / "metal_commands.py"
    file = tmp_path / "rows.json"
    command = [sys.executable, str(script), "--rounds", "2", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = json.loads(file.read_text())
    assert content["without_gpu"] == runtime.missing()
    assert [row["commands"] for row in content["rows"]] == [1, 8, 64]
    assert all(value > 0 for row in content["rows"] for value in row.values())


@pytest.mark.feature("A06")
def test_what_is_not_supported_raises_or_leaves_the_output_alone() -> None:
    machine = Recorder()
    q, k, v = operands(dtype="float64")
    out, lse = np.full((1, 4, 21, 9), 7.0), np.full((1, 4, 21), 7.0, np.float32)
    with pytest.raises(NotImplementedError, match="float64"), metal.queue(machine) as commands:
        commands.attention(q, k, v, out=out, lse=lse)
    with metal.queue(machine, strict=False) as commands:
        got = commands.attention(q, k, v, out=out, lse=lse)
        commands.attention(*operands())
    assert got == (out, lse) or (got[0] is out and got[1] is lse)
    assert (out == 7).all() and (lse == 7).all()
    assert len(machine.launched) == 1, "the other command of the list runs"
    (reason,) = commands.refused
    assert reason.startswith("q is of float64, which Apple GPUs do not have: ")
    with pytest.raises(TypeError), metal.queue(machine, strict=False) as commands:
        commands.attention("q", k, v)  # a mistake is no unsupported variant


def test_results_that_are_given_must_fit() -> None:
    commands = metal.queue(Recorder())
    q, k, v = operands()
    with pytest.raises(ValueError, match=r"^out must have shape \(1, 4, 21, 9\)"):
        commands.attention(q, k, v, out=q)
    tensor = pytest.importorskip("torch").empty(1, 4, 21, 9)
    with pytest.raises(TypeError, match=r"^all arrays of a call must be of NumPy, or all tensors$"):
        metal.queue(Emulated()).attention(q, k, v, out=tensor)
    with pytest.raises(TypeError, match=r"^lse must be of float32, got float64$"):
        commands.attention(q, k, v, lse=np.empty((1, 4, 21)))
    with pytest.raises(ValueError, match=r"^lse must be contiguous"):
        commands.attention(q, k, v, lse=np.empty((1, 4, 42), np.float32)[..., ::2])
    broadcast = np.broadcast_to(np.zeros(9, np.float32), (1, 4, 21, 9))
    with pytest.raises(ValueError, match=r"^out is written, so no axis of it may be broadcast$"):
        commands.attention(q, k, v, out=broadcast)
    alone = np.empty((1, 4, 21, 9), np.float32)
    alone.flags.writeable = False
    with pytest.raises(ValueError, match=r"^out is written, but it is read-only$"):
        commands.attention(q, k, v, out=alone)
    o, lse = np.zeros((1, 4, 21, 9), np.float32), np.zeros((1, 4, 21), np.float32)
    for name, given in (("dq", q), ("dk", k), ("dv", v)):
        into = {name: np.broadcast_to(np.float32(0), given.shape)}
        with pytest.raises(ValueError, match=f"^{name} is written, so no axis"):
            commands.attention_backward(o, q, k, v, o, lse, **into)
    assert not len(commands)


def test_a_tensor_that_is_broadcast_holds_no_result() -> None:
    torch = pytest.importorskip("torch", reason="there is no torch to make one")
    q, k, v = map(torch.from_numpy, operands())
    with pytest.raises(ValueError, match=r"^out is written, so no axis of it may be broadcast$"):
        forward(Recorder(), q, k, v, out=torch.zeros(1).expand(1, 4, 21, 9))
    one = torch.zeros(1, 4, 21, 9).as_strided((1, 4, 21, 9), (0, 189, 9, 1))
    assert forward(Recorder(), q, k, v, out=one)[0] is one, "an axis of length 1 has no stride"


def test_strides_are_of_whole_elements() -> None:
    """A kernel counts elements: rows of 12 floats, 49 bytes apart, have no such stride."""
    machine = Recorder()
    q, k, v = operands()

    def apart(array: Array) -> Array:
        *outer, rows, width = array.shape
        raw = np.zeros((*outer, rows, 4 * width + 1), np.uint8)
        return np.ndarray(array.shape, array.dtype, raw, strides=(*raw.strides[:3], 4))

    for name, given in (("q", (apart(q), k, v)), ("v", (q, k, apart(v)))):
        with pytest.raises(ValueError, match=f"^{name} must have strides of whole elements, got "):
            forward(machine, *given)
    out = apart(np.zeros((1, 4, 21, 9), np.float32))
    with pytest.raises(ValueError, match=r"^out must have strides of whole elements, got \("):
        forward(machine, q, k, v, out=out)
    assert not machine.launched


def test_a_block_that_raises_launches_nothing() -> None:
    machine = Recorder()
    with pytest.raises(ZeroDivisionError), metal.queue(machine) as commands:
        commands.attention(*operands())
        _ = 1 // 0
    assert not machine.launched


@pytest.mark.slow
@pytest.mark.feature("T12")
def test_examples_run(emulated: Emulated) -> None:
    for module in (metal, listed, matmul_calls, dispatch):
        outcome = doctest.testmod(module, raise_on_error=False)
        assert outcome.attempted and not outcome.failed


@pytest.mark.parametrize("machine", [Emulated(), Recorder()], ids=["emulated", "recorder"])
def test_an_array_that_is_elsewhere_is_named(machine: Any) -> None:
    q, k, _ = operands()
    with pytest.raises(TypeError, match=r"^v must be a NumPy array or a tensor on the CPU"):
        forward(machine, q, k, [1.0])


def test_the_emulator_takes_no_other_byte_order() -> None:
    q, k, v = operands()
    swapped = k.astype(k.dtype.newbyteorder())
    with pytest.raises(TypeError, match=r"^k must be in the byte order .*k\.astype\('float32'\)$"):
        forward(Emulated(), q, swapped, v)
    with pytest.raises(TypeError, match=r"^sinks must be in the byte order"):
        metal.attention(q, k, v, sinks=np.ones(2, ">f4"), machine=Emulated())


def test_an_array_beside_tensors_of_the_gpu_is_named() -> None:
    torch = pytest.importorskip("torch", reason="there is no torch to name a device")
    machine = runtime.Mps(torch.device("mps"), lambda text: None, "apple9")
    with pytest.raises(TypeError, match=r"^q must be a tensor on mps, got a ndarray$"):
        machine.check(q=np.zeros(3))
    with pytest.raises(TypeError, match=r"^q must be a tensor on mps, got cpu$"):
        machine.check(q=torch.zeros(3))


def test_a_mask_with_more_numbers_than_metal_takes_is_refused() -> None:
    def total(terms: list[Any]) -> Any:
        half = len(terms) // 2
        return total(terms[:half]) + total(terms[half:]) if half else terms[0]

    many = tilefold.rule(lambda q, k: total([abs(q - 7 * n) for n in range(600)]) > k)
    with pytest.raises(NotImplementedError, match=r"^Metal takes 512 integers"):
        forward(Recorder(), *operands(), mask=many)


def test_public_names_are_there() -> None:
    assert {*metal.__all__} <= {*dir(metal)}
    for name in metal.__all__:
        assert getattr(metal, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'gpus'"):
        metal.gpus  # noqa: B018  # the point
    assert dispatch.MOST_BUFFERS == 31
