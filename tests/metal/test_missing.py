"""What is said where there is no Metal, which GPU is which, and texts for an app to take."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from metal_recorder import operands

import tilefold
from tilefold import Problem, cli, metal
from tilefold.backends.metal import emulate, runtime
from tilefold.common import settings


@pytest.mark.feature("J13")
@pytest.mark.parametrize(
    "entry",
    [
        metal.gpu,
        metal.queue,
        lambda: tilefold.compile_async([Problem.of((1, 1, 4, 8))], device="mps"),
        lambda: metal.attention(*operands()),
        lambda: metal.attention_backward(*[np.ones((1, 1, 4, 8), np.float32)] * 6),
        lambda: metal.gemm(*[np.ones((4, 4), np.float32)] * 2),
        lambda: metal.softmax(np.ones((4, 4), np.float32)),
    ],
    ids=["gpu", "queue", "compile_async", "attention", "attention_backward", "gemm", "softmax"],
)
def test_without_metal_every_entry_says_why(
    entry: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.gpu.cache_clear()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(emulate, "available", lambda: None)
    with pytest.raises(NotImplementedError) as raised:
        entry()
    assert str(raised.value) == (
        "Metal is there on macOS alone, and this is linux; tilefold.metal.emulated() runs the same"
        " kernels on the CPU"
    )


@pytest.mark.feature("J13")
def test_the_emulator_is_recommended_where_it_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs Linux, so on a Mac nobody hears of it."""
    monkeypatch.setattr(sys, "platform", "freebsd")
    assert runtime.missing() == "Metal is there on macOS alone, and this is freebsd"
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setitem(sys.modules, "torch", None)
    reason = "Metal kernels are compiled through PyTorch, which is not installed"
    assert runtime.missing() == reason
    assert runtime.missing(advice="look there") == reason
    monkeypatch.setattr(emulate, "available", lambda: None)
    assert runtime.missing(advice="look there") == f"{reason}; look there"


@pytest.mark.feature("J13", "A06")
def test_without_metal_a_list_that_is_not_strict_does_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime.gpu.cache_clear()
    monkeypatch.setattr(sys, "platform", "linux")
    q, k, v = operands()
    out = np.full((1, 4, 21, 9), 7, np.float32)
    with metal.queue(strict=False) as commands:
        assert commands.attention(q, k, v, out=out)[0] is out
    assert commands.refused == [runtime.missing()]
    assert metal.attention(q, k, v, out=out, strict=False)[0] is out
    assert (out == 7).all()


@pytest.mark.feature("J13")
def test_a_mac_whose_torch_is_old_or_has_no_mps_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="there is no torch to ask")
    monkeypatch.setattr(sys, "platform", "darwin")
    with monkeypatch.context() as older:
        older.setattr(torch, "__version__", type(torch.__version__)("2.11.1+cpu"))
        assert runtime.missing() == "Metal kernels need PyTorch 2.12 or newer, found 2.11.1+cpu"
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: False)
    assert "was built without MPS" in str(runtime.missing())
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert "finds no Apple GPU" in str(runtime.missing())
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "not installed" in str(runtime.missing())


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("Apple M1", "apple7"),
        ("Apple M1 Ultra", "apple7"),
        ("Apple A14", "apple7"),
        ("Apple M2 Pro", "apple8"),
        ("Apple M3 Max", "apple9"),
        ("Apple M4", "apple9"),
        ("Apple A18 Pro GPU", "apple9"),
        ("Apple M5", "apple10"),
        ("Apple M12 Ultra", "apple10"),
    ],
)
def test_family_by_name(name: str, family: str) -> None:
    assert runtime.family_of(name) == family


@pytest.mark.parametrize(
    "name", ["AMD Radeon Pro 555", "Apple Paravirtual device", "Apple A13 GPU"]
)
def test_a_gpu_of_no_known_family_is_named(name: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"^the GPU is called '{name}', .*FAMILY to one"):
        runtime.family_of(name)


def test_the_family_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="the name of the GPU comes from torch")
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M1 Max")
    assert runtime.family() == "apple7"
    monkeypatch.setenv("TILEFOLD_METAL_FAMILY", "apple10")
    assert runtime.family() == "apple10"
    assert tuple(metal.FAMILIES) == settings.METAL_FAMILIES


@pytest.mark.feature("M03", "M13")
@pytest.mark.parametrize("kernel", ["forward", "backward_dq", "backward_dkv"])
def test_inspect_prints_a_file_that_an_app_can_take(kernel: str, capsys: Any) -> None:
    operation = kernel.partition("_")[0]
    arguments = ["inspect", "--backend", "metal", "--family", "apple7", "--shape", "2,4,100,24"]
    code = cli.main([*arguments, "--operation", operation, "--kernel", kernel])
    said = capsys.readouterr().out
    assert code == 0 and said.isascii()
    problem = Problem.of((2, 4, 100, 24))
    made = metal.plan(problem, "apple7", operation)
    spec = next(launch.spec for launch in made.launches if launch.spec.kernel == kernel)
    comment, _, text = said.partition("//\n")
    assert text == metal.emit(spec)
    assert comment.startswith(f"// tilefold_{kernel}: float32, dim 24, dim_v 24")
    assert all(line.startswith("// ") for line in comment.splitlines())
    assert f"have {spec.threads} threads; for this shape there are 4 x 4 x 2." in comment
    words = " ".join(comment.replace("//", "").split())
    assert "innermost strides 1, one element moved at a time: any alignment" in words
    assert "len_q=100, len_k=100, heads_q=4, group=1, row_b=0, row_h=0" in words
    assert "block row; the threadgroups with the most work come" in words
    choice = next(x.choice for x in made.launches if x.spec.kernel == kernel)
    assert all(f"//   {line}\n" in comment for line in choice.explain())


def test_inspect_prints_the_kernels_that_decode(capsys: Any) -> None:
    arguments = ["inspect", "--backend", "metal", "--shape", "2,4,100,24", "--form", "decode"]
    for kernel, ordered in (("decode", True), ("merge", False)):
        assert cli.main([*arguments, "--kernel", kernel]) == 0
        comment, _, text = capsys.readouterr().out.partition("//\n")
        assert f"void tilefold_{kernel}(" in text and "splits=1," in comment
        assert ("`order`" in comment) == ordered, "merge has no such buffer"


def test_inspect_says_what_the_numbers_of_a_rule_are(capsys: Any) -> None:
    """Those of this mask and shape, at the places where the text reads them."""
    shape = ["--shape", "1,4,100,24", "--len-k", "130", "--mask", "causal() & local(70)"]
    assert cli.main(["inspect", "--backend", "metal", *shape]) == 0
    said = capsys.readouterr().out
    comment = " ".join(said.partition("//\n")[0].replace("//", "").split())
    numbers = comment.partition("for this mask and shape: ")[2].partition(".")[0].split(", ")
    assert numbers[:2] == ["len_q=100", "len_k=130"] and "q_n" in numbers
    rule = Problem.of((1, 4, 100, 24), (1, 4, 130, 24), mask=tilefold.causal() & tilefold.local(70))
    found = [number.partition("=")[2] for number in numbers if number.startswith("p")]
    assert found == [str(p) for p in metal.plan(rule, "apple9", "forward").parameters]
    assert f"int p0 = int(sizes[{numbers.index(f'p0={found[0]}')}]);" in said


@pytest.mark.feature("J10")
def test_inspect_prints_tensor_operations_for_gpus_that_have_them(capsys: Any) -> None:
    arguments = ["inspect", "--backend", "metal", "--shape", "1,4,100,24", "--kernel", "tensorops"]
    assert cli.main(arguments) == 0
    said = " ".join(capsys.readouterr().out.replace("//", "").split())
    assert "for GPUs of apple10 (A19, M5) with macOS 26.2 or later." in said
    assert cli.main([*arguments, "--family", "apple9"]) == 2
    assert capsys.readouterr().err == (
        "tilefold inspect: --kernel tensorops needs --family apple10, not apple9\n"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json"], "--json goes with --backend cpu"),
        (["--asm"], "--asm goes with --backend cpu"),
        (["--isa", "avx2"], "--isa goes with --backend cpu"),
        (["--kernel", "decode"], "--kernel must be one of forward, not 'decode'"),
        (["--dtype", "float64"], "float64 is not a type of Apple's GPUs"),
        (["--form", "fused"], "form must be 'auto', 'tiled' or 'decode'"),
        (["--form", "decode", "--operation", "backward"], "form must be 'auto' or 'tiled'"),
        (["--form", "decode", "--kernel", "tensorops"], "form must be 'auto' or 'tiled'"),
    ],
)
def test_inspect_says_what_a_metal_kernel_has_not(
    options: list[str], message: str, capsys: Any
) -> None:
    assert cli.main(["inspect", "--backend", "metal", *options]) == 2
    assert message in capsys.readouterr().err
