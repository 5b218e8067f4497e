"""What the host offers, and what of it a lowered device may use."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from tilefold import device

ON_X86 = platform.machine().lower() in ("x86_64", "amd64")


def test_the_host_is_described() -> None:
    host = device.host()
    assert host.kind == "cpu"
    assert host.name.strip() == host.name != ""
    assert host.isa in (("avx512", "avx2", "sse2") if ON_X86 else ("neon",))
    assert 1 <= host.cores <= (os.cpu_count() or 1)
    assert host.vector_bytes in (16, 32, 64)
    assert host == device.host()
    hash(host)


@pytest.mark.skipif(not ON_X86, reason="only x86 has levels to go down")
def test_a_lowered_device_may_use_nothing_of_the_levels_above() -> None:
    host = device.host()
    levels = ["avx512", "avx2", "sse2"]
    seen = []
    for isa in levels[levels.index(host.isa) :]:
        lowered = host.lowered(isa)
        assert lowered.isa == isa
        assert lowered.has("avx512f") == (isa == "avx512")
        assert lowered.has("avx2") == (isa != "sse2")
        assert lowered.has("sse2")
        assert set(lowered.features.split(",")) <= set(host.features.split(","))
        seen.append(lowered.vector_bytes)
    assert seen == [64, 32, 16][-len(seen) :]
    assert host.lowered("sse2").features == "+sse2"


@pytest.mark.feature("T15")
def test_a_device_cannot_be_raised_or_changed_in_kind() -> None:
    lowest = device.host().lowered("sse2" if ON_X86 else "neon")
    with pytest.raises(ValueError, match=r"^isa must be one of \w+ on this device, not 'avx512'$"):
        lowest.lowered("avx512")


@pytest.mark.skipif(not ON_X86, reason="names x86 levels")
def test_the_environment_lowers_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILEFOLD_CPU_ISA", "sse2")
    assert device.host().isa == "sse2"
    assert not device.host().has("avx")
    monkeypatch.setenv("TILEFOLD_CPU_ISA", "neon")
    with pytest.raises(ValueError, match=r"^TILEFOLD_CPU_ISA must be one of .*sse2 .*not 'neon'$"):
        device.host()


@pytest.mark.parametrize(
    ("present", "levels"),
    [
        ({"sse2"}, ["sse2"]),
        ({"sse2", "avx", "avx2"}, ["sse2"]),  # no fused multiply-add
        ({"sse2", "avx", "avx2", "fma"}, ["avx2", "sse2"]),
        ({"sse2", "avx2", "fma", "avx512f"}, ["avx2", "sse2"]),  # the first AVX-512 machines
        (
            {"sse2", "avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
            ["avx512", "avx2", "sse2"],
        ),
        ({"neon", "bf16"}, ["neon"]),
    ],
    ids=lambda value: "+".join(sorted(value)),
)
def test_a_level_needs_all_that_its_kernels_use(present: set[str], levels: list[str]) -> None:
    assert device._levels(present) == levels


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2.0),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "100000 100000\n"}, 1.0),
        ("3:cpu,cpuacct:/job\n1:memory:/x\n", {}, None),
        (
            "3:cpu,cpuacct:/job\n",
            {
                "cpu,cpuacct/job/cpu.cfs_quota_us": "300000\n",
                "cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
            },
            3.0,
        ),
        (
            "1:cpu:/\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            None,
        ),
        ("nonsense\n", {"cpu.max": "garbage"}, None),
    ],
    ids=[
        "v2 unlimited",
        "v2 root",
        "v2 of the parent",
        "v2 the smaller one",
        "v1 absent",
        "v1 quota",
        "v1 unlimited",
        "unreadable",
    ],
)
def test_the_quota_of_control_groups(
    membership: str, files: dict[str, str], cores: float | None, tmp_path: Path
) -> None:
    write(tmp_path / "cgroup", files)
    write(tmp_path, {"membership": membership})
    assert device._quota(tmp_path / "cgroup", tmp_path / "membership") == cores


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity masks here")
def test_cores_are_those_of_the_affinity_mask_and_the_quota(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2, 5, 6})
    monkeypatch.setattr(device, "_quota", lambda: None)
    assert device._cores() == 4
    monkeypatch.setattr(device, "_quota", lambda: 2.5)
    assert device._cores() == 2
    monkeypatch.setattr(device, "_quota", lambda: 0.1)
    assert device._cores() == 1


@pytest.mark.skipif(platform.system() != "Linux", reason="sysfs is Linux")
def test_cache_sizes_of_sysfs(tmp_path: Path) -> None:
    caches = [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2048K")]
    caches.append(("3", "Unified", "32M"))
    for index, (level, kind, size) in enumerate(caches):
        files = {"level": level, "type": kind, "size": size}
        write(tmp_path, {f"index{index}/{name}": f"{text}\n" for name, text in files.items()})
    assert device._cache_bytes(tmp_path) == (48 * 1024, 2048 * 1024, 32 * 1024 * 1024)
    assert device._cache_bytes(tmp_path / "absent") == (0, 0, 0)
