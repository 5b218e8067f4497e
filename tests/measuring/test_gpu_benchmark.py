"""`benchmarks/gpu.py` as far as a machine without a GPU can show it.

Its sections run on Triton's interpreter, at sizes where that takes seconds; what processes do that
hang or die is shown with sections made for it. No figure of this file is one of a GPU.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from interpreted import needs
from paths import ROOT

torch = pytest.importorskip("torch", reason="the benchmark measures through torch")
needs()

import gpu  # noqa: E402  # only where there is Triton
import sections  # noqa: E402
from cases import Case  # noqa: E402
from gpu_parts import (  # noqa: E402
    attend,
    checks,
    conformance,
    decode,
    document,
    masks,
    one,
    plot,
    speed,
    timing,
    tools,
)
from gpu_parts.section import INTERPRETED, Here, Section, Settings, Stage  # noqa: E402

from tilefold.backends.triton.heuristics import DEFAULT  # noqa: E402
from tilefold.backends.triton.spec import KERNELS  # noqa: E402
from tilefold.problems.attention import Problem  # noqa: E402


def here(**changes: Any) -> Here:
    return Here(replace(INTERPRETED, **changes))


# The command -----------------------------------------------------------------------------------


def test_without_a_gpu_it_ends_with_a_line_and_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1 and said.err.startswith("gpu.py: nothing to measure on: ")


def test_help_names_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        gpu.main(["--help"])
    assert raised.value.code == 0
    said = "".join(capsys.readouterr().out.split())
    assert ",".join(gpu.SECTIONS) in said
    asked = "conformance forward backward masks decode sanitizer counters"
    assert list(gpu.SECTIONS) == asked.split()


def test_options() -> None:
    read = gpu.parser(gpu.SECTIONS).parse_args
    assert read([]).sections == list(gpu.SECTIONS)
    found = read(["--sections", "masks, forward", "--minutes", "2.5", "--quick", "--save", "x"])
    assert found.sections == ["forward", "masks"]
    assert (found.minutes, found.quick, found.save) == (2.5, True, Path("x"))


@pytest.mark.parametrize("words", [["--sections", "speed"], ["--sections", ""], ["--minutes", "x"]])
def test_bad_options_are_a_line_and_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        gpu.main(words)
    assert raised.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


# Processes -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_fails_in_a_section_is_text_and_the_others_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--interpreter", "--save", str(tmp_path), "--minutes", "1"]
    assert gpu.main(words, sections.FAKES, sections.QUIET) == 1
    (path,) = tmp_path.iterdir()
    assert path.name == "gpu_triton_s_interpreter.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    ran = found["sections"]
    assert list(ran) == ["canary", *sections.FAKES]
    for section in ran.values():
        assert section["seconds"] < 60 and section["date"] and "reason" in section["clocks"]
    assert [row["value"] for row in ran["fine"]["rows"]] == [3, 3]
    reasons = {"one | ahead": "ValueError: one | ahead cannot be"}
    assert ran["fine"]["ahead"]["reasons"] == reasons
    assert [row["job"] for row in ran["fine"]["rows"]] == ["one", "two"]
    assert [row["reason"] for row in ran["raises"]["rows"]] == [
        f"ValueError: {job} cannot be" for job in ("one", "two")
    ]
    assert ran["no jobs"]["reason"] == "RuntimeError: there are no jobs"
    first, second = ran["dies"]["rows"]
    assert first["ran_parts"] == second["ran_parts"] == ["first", "third"]
    assert "its process ended with 7: a last word" in first["reasons"]["second"]
    assert "left out, since it ended 1 processes" in second["reasons"]["second"]
    (hung,) = ran["hangs"]["rows"]
    assert "nothing was heard for 1 s" in hung["reasons"]["loop"]
    endless = ran["endless"]
    assert endless["rows"] and len(endless["rows"]) + len(endless["undone"]) == 10_000
    said = capfd.readouterr()
    assert "raises: 2 rows" in said.err and "wrong: no jobs: RuntimeError" in said.out


@pytest.mark.slow
def test_a_later_run_replaces_its_own_sections_alone(tmp_path: Path) -> None:
    some = {name: sections.FAKES[name] for name in ("fine", "raises")}
    words = ["--interpreter", "--save", str(tmp_path), "--minutes", "0.5"]
    assert gpu.main(words, some, sections.QUIET) == 0
    fewer: dict[str, Section] = {"fine": replace(some["fine"], jobs=sections.one)}
    assert gpu.main(words, fewer, sections.QUIET) == 0
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text(encoding="utf-8"))["sections"]
    assert (len(found["fine"]["rows"]), len(found["raises"]["rows"])) == (1, 2)


@pytest.mark.slow
def test_what_the_canary_does_not_survive_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One form hangs, one is wrong, one ends its process. After that the first rows of all sections
    come before the others, and each finds those before it in the document.
    """
    monkeypatch.setenv("FOLDER", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    words = ["--interpreter", "--save", str(tmp_path), "--minutes", "1"]
    assert gpu.main(words, sections.AFTER, sections.CANARY) == 1
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text(encoding="utf-8"))["sections"]
    rows = {name: found[name]["rows"] for name in sections.AFTER}
    done = [row["rows"] for row in (*rows["left"], *rows["right"])]
    assert [(each.get("left", []), each.get("right", [])) for each in done] == [
        ([], []),
        (["one"], ["one"]),
        (["one"], []),
        (["one", "two"], ["one"]),
    ]
    for row in (*rows["left"], *rows["right"]):
        assert (row["hopper"], row["threads"], list(row["said"])) == ("0", "1", ["hopper"])
        assert "not possible here: the canary, forward hopper: it hung" in row["said"]["hopper"]
    jobs = sections.all_forms(INTERPRETED)
    lost = gpu.canary.without(found["canary"]["rows"], jobs)
    assert list(lost) == ["hopper", "split", "fused"]
    assert "it is wrong" in lost["split"] and "its process ended with 7" in lost["fused"]
    assert gpu.canary.without([], jobs)["tiled"].endswith("there was no time for it")


@pytest.mark.slow
def test_the_canary_sings_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    for job in gpu.canary.jobs(INTERPRETED):
        row = gpu.canary.measure(job, here())
        assert not row["failures"] and (row["absent"] if "hopper" in job else row["ran"]), row
    monkeypatch.setattr(attend, "TOLERANCE", {"float16": 1e-9})
    assert "is something else" in gpu.canary.measure(job, here())["failures"][job]


def test_tools_look_at_no_form_that_is_left_out() -> None:
    settings = Settings(without={"hopper": "it hung", "fused": "it is wrong"})
    assert tools.counter_jobs(settings) == ["plain"]
    assert not any("hopper" in job for job in tools.sanitizer_jobs(settings))
    assert all("fused" not in case for case in tools.kept(tools.SMALL, settings)["backward"])


def test_a_damaged_document_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "gpu_x.json"
    fresh = {"device": {"name": "x"}, "sections": {}}
    for text in ("", "[]", "{}", '{"device": {"name": "y"}, "sections": {"forward": {}}}'):
        path.write_text(text, encoding="utf-8")
        assert document.continued(fresh, path) == fresh
    path.write_text('{"device": {"name": "x"}, "sections": {"forward": {}}}', encoding="utf-8")
    assert document.continued(fresh, path)["sections"] == {"forward": {}}


# Counts ----------------------------------------------------------------------------------------


def test_flops_are_those_of_the_usual_count() -> None:
    square = Problem.of((2, 16, 8192, 128), dtype="bfloat16")
    assert speed.flops(square, "forward") == 4 * 2 * 16 * 8192**2 * 128
    assert speed.flops(square, "backward") == 2.5 * speed.flops(square, "forward")
    causal = replace(square, mask=speed.MASKS["causal"])
    assert speed.flops(causal, "forward") == speed.flops(square, "forward") / 2


def test_the_cases_are_those_that_are_asked_for() -> None:
    found = speed.cases(Settings())
    assert len(found) == 2 * 6 * 3 * 2
    for problem in found.values():
        assert problem.batch * problem.len_q == 16384
        assert problem.heads_q * problem.dim == 2048
    assert all(section.first <= len(section.jobs(Settings())) for section in gpu.SECTIONS.values())
    first = list(found)[:6]
    assert {figure.job for figure in document.FIGURES} <= {*first[: gpu.SECTIONS["forward"].first]}
    assert all(name.startswith("bfloat16") and "n8192" in name for name in first)
    assert list(speed.cases(Settings(quick=True))) == first


def test_every_job_of_a_section_has_a_name_of_its_own() -> None:
    for section in gpu.SECTIONS.values():
        for quick in (False, True):
            jobs = section.jobs(Settings(quick=quick))
            assert jobs and len(set(jobs)) == len(jobs)
            assert section.ready is None or section.ready(Settings(quick=quick)) is not None
    assert len(gpu.SECTIONS["conformance"].jobs(Settings())) > 2 * len(conformance.CASES)


@pytest.mark.parametrize("name", masks.MASKS)
def test_a_mask_says_the_same_to_flexattention(name: str) -> None:
    length, mask = 64, masks.MASKS[name]
    seen = mask.seen(length, torch.from_numpy)
    at = torch.arange(length)
    found = seen(0, 0, at[:, None], at[None, :])
    assert (found.numpy() == mask.rule(length).to_dense(length, length)).all()


@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_the_live_share_counts_the_tiles_of_a_plan(operation: str) -> None:
    settings = Settings()
    for name, least, most in (("full", 1.0, 1.0), ("causal", 0.5, 0.53), ("window", 0.11, 0.15)):
        problem = speed.problem_of(settings, "bfloat16", 8192, 128, "full")
        if name != "full":
            problem = replace(problem, mask=masks.MASKS[name].rule(8192))
        made = attend.plan(problem, "sm_90", operation)
        assert least <= masks.live_share(made.launches, problem) <= most


# Sections in the interpreter -------------------------------------------------------------------

TINY = {
    "float32 padded": (Case((21, 33), 20, "window-and-prefix", "bnhd", "gqa", "padded"), "float32"),
    "float16 misaligned": (Case((70, 16), 16, "causal", memory="misaligned"), "float16"),
    "bfloat16 decode": (Case((3, 40), 16, "local", heads="mqa", memory="reversed"), "bfloat16"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_conformance_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformance, "cases", lambda settings: TINY)
    row = conformance.measure(name, here())
    assert row["failures"] == {}
    assert {"forward tiled", "backward split", "backward fused"} <= {*row["ran"]}
    assert ("forward decode" in row["ran"]) == (TINY[name][0].shape[0] <= DEFAULT.packed_queries)
    assert "forward hopper" in row["absent"]


@pytest.mark.slow
def test_conformance_shows_the_worst_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformance, "cases", lambda settings: TINY)
    right = conformance.run

    def wrong(*given: Any) -> Any:
        found, placed = right(*given)
        if "dk" in found:
            found["dk"][0, 1, 3, 2] += 1
        return found, placed

    monkeypatch.setattr(conformance, "run", wrong)
    row = conformance.measure("float16 misaligned", here())
    assert list(row["failures"]) == ["backward split", "backward fused"]
    for text in row["failures"].values():
        assert "dk: 1 of" in text and "worst at (0, 1, 3, 2)" in text
    found = {"sections": {"conformance": {"rows": [{"job": "a", **row}]}}}
    assert len(document.failures(found)) == 2


@pytest.mark.slow
def test_bits_are_compared() -> None:
    row = checks.measure("the same bits every time", here())
    assert row["failures"] == {} and "backward fused" in row["ran"]
    with pytest.raises(AssertionError, match="result 1: 1 of 3 differ"):
        ones = torch.ones(3)
        checks._same("x", (ones, ones), (ones, torch.tensor([1.0, 2.0, 1.0])))


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_speed_measures_what_is_right(operation: str) -> None:
    on = here()
    for job in [job for job in speed.ready(on.settings, operation) if "hopper" not in job][:2]:
        assert speed.prepare(job, here(), operation)["first_call_seconds"] > 0
    row = speed.measure("float16 d16 n64 causal", on, operation)
    found = row["implementations"]
    names = ["Triton plain", "torch flash", *map(attend.named, attend.forms(operation))]
    for name in names[operation == "backward" :]:
        if "hopper" in name:
            assert "is not possible" in found[name]["reason"]
            continue
        assert found[name]["relative_error"] < 1e-2
        assert found[name]["low_seconds"] <= found[name]["median_seconds"]
        tflops = row["flops"] / found[name]["median_seconds"] / 1e12
        assert math.isclose(found[name]["tflops"], tflops)
    assert "No viable backend" in found["torch cuDNN"]["reason"]
    json.dumps(document.plain(row), allow_nan=False)


@pytest.mark.slow
def test_an_implementation_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attend.native
    monkeypatch.setattr(attend, "native", lambda *given: lambda: (1.1 * right(*given)()[0],))
    row = speed.measure("float16 d16 n32 full", here(), "forward")
    assert "o is something else" in row["implementations"]["torch flash"]["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_masks_have_a_cost_and_a_share(operation: str) -> None:
    row = masks.measure(f"{operation} d16 window", here())
    form = attend.named("tiled" if operation == "forward" else "split")
    found = row["implementations"][form]
    whole = row["implementations"][f"{form} full"]
    cost = found["median_seconds"] / whole["median_seconds"]
    assert math.isclose(found["excess"], cost / found["live_share"])
    assert found["mask_seconds"] > 0 and 0 < row["visible_share"] < 0.2


@pytest.mark.slow
def test_decoding_is_a_share_of_a_copy() -> None:
    on = here()
    row = decode.measure(decode.jobs(on.settings)[0], on)
    found = row["implementations"]
    assert row["bytes"] == 8 * 600 * 2 * 16 * 2
    share = found["copy"]["median_seconds"] / found["tilefold decode"]["median_seconds"]
    assert math.isclose(found["tilefold decode"]["share_of_copy"], share)


# Tools -----------------------------------------------------------------------------------------


def test_a_tool_that_is_absent_says_where_it_was_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="neither on PATH nor in CUDA_HOME"):
        tools.find("no-such-sanitizer")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    tool = tmp_path / "compute-sanitizer" / "no-such-sanitizer"
    tool.parent.mkdir()
    tool.touch(0o755)
    assert tools.find("no-such-sanitizer") == str(tool)


def test_what_the_sanitizer_says_is_counted() -> None:
    clean = "========= COMPUTE-SANITIZER\nx: sum 1\n========= ERROR SUMMARY: 0 errors\n"
    assert tools.verdict(0, clean) == {"errors": 0, "summary": "ERROR SUMMARY: 0 errors"}
    racy = "========= Race\n========= RACECHECK SUMMARY: 2 hazards displayed (2 errors)\n"
    row = tools.verdict(tools.FOUND, racy)
    assert row["errors"] == 2 and row["first"].startswith("Race | ")
    assert "not supported" in tools.verdict(1, "Device not supported")["reason"]
    assert "exit code 0" in tools.verdict(0, "nothing")["reason"]


def test_counters_are_read_from_csv() -> None:
    text = (
        '==PROF== Connected\nforward: sum 1\n"ID","Kernel Name","Section Name","Metric Name",'
        '"Metric Unit","Metric Value"\n"0","tilefold_forward","GPU Speed Of Light Throughput",'
        '"Duration","ms","2.18"\n==PROF== Disconnected\n'
    )
    name = "GPU Speed Of Light Throughput: Duration"
    assert tools.metrics_of(text) == {"0 tilefold_forward": {name: "2.18 ms"}}
    assert tools.metrics_of("==ERROR== ERR_NVGPUCTRPERM") == {}


def fake(folder: Path, name: str, text: str) -> None:
    """A tool that says something instead of looking at a program."""
    path = folder / name
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\n$@\nEND\n", encoding="utf-8")
    path.chmod(0o755)


def test_tools_are_called_and_heard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake(tmp_path, "compute-sanitizer", "========= ERROR SUMMARY: 3 errors")
    header = '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'
    fake(tmp_path, "ncu", f'{header}\n"0","tilefold_decode","S","Registers","","96"')
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    row = tools.sanitize("memcheck forward", here())
    assert (row["errors"], row["cases"]) == (3, tools.SMALL["forward"])
    row = tools.count("plain", here())
    assert row["metrics"] == {"0 tilefold_decode": {"S: Registers": "96"}}
    fake(tmp_path, "ncu", "==ERROR== ERR_NVGPUCTRPERM - no permission")
    assert "ERR_NVGPUCTRPERM" in tools.count("hopper", here())["reason"]


def test_turns_are_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is called of torch on a GPU is played here; tensors without data stand for memory."""
    said: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            said.append("event")

        def elapsed_time(self, other: Event) -> float:
            return 2.0

    for name, play in {
        "device": lambda device: contextlib.nullcontext(),
        "synchronize": lambda: said.append("wait"),
        "_sleep": lambda cycles: said.append("spin"),
        "Event": Event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, play)
    stage = Stage(here().stage.machine, "meta")
    calls = {name: (lambda name=name: said.append(name)) for name in "ab"}
    times = timing.turn_by_turn(stage, calls, 0.0, least=2)
    assert times == {"a": [0.002, 0.002], "b": [0.002, 0.002]}
    turn = ["spin", "event", "x", "event"]
    rounds = [
        [word.replace("x", name) for name in order for word in turn] for order in ("ab", "ba")
    ]
    assert said == ["wait", *rounds[0], "wait", *rounds[1], "wait"]
    found = timing.summary([3.0, 1.0, 2.0])
    assert (found["low_seconds"], found["median_seconds"], found["high_seconds"]) == (1.5, 2.0, 2.5)


# Documents -------------------------------------------------------------------------------------


def invented(device: str = "NVIDIA H100 80GB HBM3") -> dict[str, Any]:
    """A document whose figures are made up, for the picture and the verdicts."""
    settings, found = Settings(), {}
    for operation in ("forward", "backward"):
        rows = []
        for name, problem in speed.cases(settings).items():
            flops = speed.flops(problem, operation)
            each: dict[str, Any] = {}
            names = [*map(attend.named, attend.forms(operation)), *attend.BACKENDS, "Triton plain"]
            for number, implementation in enumerate(names):
                speeds = (700 - 60 * number) * problem.len_q / (problem.len_q + 900)
                seconds = flops / speeds / 1e12
                each[implementation] = {
                    "tflops": speeds,
                    "median_seconds": seconds,
                    "low_seconds": 0.97 * seconds,
                    "high_seconds": 1.05 * seconds,
                }
            each["torch flex"] = {"reason": "it was not there"}
            rows.append({"job": name, **speed.sizes(problem), "flops": flops})
            rows[-1]["implementations"] = each
        found[operation] = {"rows": rows, "seconds": 1.0, "undone": [], "reason": None}
    each = {"tilefold tiled": {"excess": 1.2}, "tilefold hopper": {"excess": 1.05}}
    rows = [{"job": "forward d128 window", "implementations": each}]
    found["masks"] = {"rows": rows, "seconds": 1.0, "undone": ["x"], "reason": None}
    return {
        "device": {"name": device},
        "versions": {"torch": "2.13", "triton": "3.7.1"},
        "date": "2026-11-28T00:00:00",
        "commit": "0123456789ab",
        "sections": found,
        "verdicts": [],
    }


def test_verdicts_stand_beside_what_was_asked(tmp_path: Path) -> None:
    found = invented()
    rows = {row["what"]: row for row in document.verdicts(found)}
    plain = rows["forward, plain Triton"]
    assert (plain["asked"], plain["by"], plain["verdict"]) == (450, "tilefold tiled", "reached")
    assert rows["forward, Gluon"]["verdict"] == "not reached"
    assert rows["mask: forward d128 window"]["verdict"] == "reached"
    assert rows["mask: forward d128 window"]["by"] == "tilefold hopper"
    for row in document.verdicts(invented("NVIDIA A10")):
        assert row["verdict"].startswith("not judged: the figure is one of an H100")
    found["sections"] = {}
    for row in document.verdicts(found):
        assert row["reached"] is None and row["verdict"].startswith("not measured: ")
    found["sections"] = {"forward": {"rows": [], "x": math.nan}}
    path = document.save(found, tmp_path / "new")
    assert path.name == "gpu_nvidia_h100_80gb_hbm3.json"
    assert json.loads(path.read_text(encoding="utf-8"))["sections"]["forward"]["x"] is None


@pytest.mark.slow
def test_a_document_becomes_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "gpu_x.json"
    path.write_text(json.dumps(invented()), encoding="utf-8")
    assert gpu.main(["--plot", str(path)]) == 0
    drawn = capsys.readouterr().out.split()
    assert [Path(name).name for name in drawn] == ["gpu_x.png", "gpu_x_float16.png"]
    assert all(Path(name).read_bytes().startswith(b"\x89PNG") for name in drawn)
    with pytest.raises(ValueError, match="no times of float64"):
        plot.draw(invented(), "float64")
    path.write_text("{", encoding="utf-8")
    assert gpu.main(["--plot", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# The page --------------------------------------------------------------------------------------


@pytest.mark.feature("S06", "S07")
def test_the_page_names_kernels_and_commands_that_there_are() -> None:
    page = (ROOT / "docs" / "profiling.md").read_text(encoding="utf-8")
    entries = {f"tilefold_{operation}" for operation in KERNELS}
    assert set(re.findall(r"tilefold_[a-z]\w+", page)) == entries | {"tilefold_forward_hopper"}
    commands = re.findall(r"gpu\.py (-.*?)(?: +#.*)?$", page, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        assert gpu.parser(gpu.SECTIONS).parse_args(command.split()).minutes > 0
    cases = re.findall(r"-m gpu_parts\.one (.*)$", page, re.MULTILINE)
    listed = [*cases, *(case for group in (tools.SMALL, tools.LARGE) for case in group.values())]
    words = [shlex.split(case) for each in listed for case in ([each] if each in cases else each)]
    for case in words:
        options = one.arguments().parse_args(case)
        assert options.form in (*attend.FORMS[options.operation],)


@pytest.mark.slow
def test_one_case_runs_as_often_as_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    line = "forward --form tiled --shape 1,1,20,16 -- backward --form fused --shape 1,1,9,16"
    for words in one.cases(line.split()):
        one.run(words, here().stage)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("forward --form tiled") and second.startswith("backward --form fused")
    assert math.isfinite(float(first.split()[-1]))
