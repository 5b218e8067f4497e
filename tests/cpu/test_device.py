"""What the host offers, and what of it a lowered device may use."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from paths import ROOT

from tilefold.backends.cpu import device

AVX512 = {"sse2", "avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"}
ON_X86 = platform.machine().lower() in ("x86_64", "amd64")


def test_the_host_is_described() -> None:
    host = device.host()
    assert host.kind == "cpu"
    assert host.name.strip() == host.name != ""
    assert host.isa in (("amx", "avx512", "avx2", "sse2") if ON_X86 else ("neon",))
    assert 1 <= host.cores <= (os.cpu_count() or 1)
    assert host.vector_bytes in (16, 32, 64)
    assert host == device.host()
    hash(host)


@pytest.mark.skipif(not ON_X86, reason="only x86 has levels to go down")
def test_a_lowered_device_may_use_nothing_of_the_levels_above() -> None:
    host = device.host()
    levels = ["amx", "avx512", "avx2", "sse2"]
    seen = []
    for isa in levels[levels.index(host.isa) :]:
        lowered = host.lowered(isa)
        assert lowered.isa == isa
        assert lowered.has("amx-tile") == (isa == "amx")
        assert lowered.has("avx512f") == (isa in ("amx", "avx512"))
        assert lowered.has("avx2") == (isa != "sse2")
        assert lowered.has("sse2")
        assert set(lowered.features.split(",")) <= set(host.features.split(","))
        seen.append(lowered.vector_bytes)
    assert seen == [64, 64, 32, 16][-len(seen) :]
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
            AVX512,
            ["avx512", "avx2", "sse2"],
        ),
        ({*AVX512, "amx-tile", "amx-bf16"}, ["avx512", "avx2", "sse2"]),  # no vectors of bfloat16
        (
            {*AVX512, "avx512bf16", "amx-tile", "amx-bf16"},
            ["amx", "avx512", "avx2", "sse2"],
        ),
        ({*AVX512, "avx512bf16", "amx-tile"}, ["avx512", "avx2", "sse2"]),
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
    monkeypatch.setattr(device, "_first_quota", lambda: None)
    assert device.usable_cores() == 4
    monkeypatch.setattr(device, "_first_quota", lambda: 2.5)
    assert device.usable_cores() == 2
    monkeypatch.setattr(device, "_first_quota", lambda: 0.1)
    assert device.usable_cores() == 1


@pytest.mark.skipif(platform.system() != "Linux", reason="sysfs is Linux")
def test_cache_sizes_of_sysfs(tmp_path: Path) -> None:
    caches = [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2048K")]
    caches.append(("3", "Unified", "32M"))
    for index, (level, kind, size) in enumerate(caches):
        files = {"level": level, "type": kind, "size": size}
        write(tmp_path, {f"index{index}/{name}": f"{text}\n" for name, text in files.items()})
    assert device._cache_bytes(tmp_path) == (48 * 1024, 2048 * 1024, 32 * 1024 * 1024)
    assert device._cache_bytes(tmp_path / "absent") == (0, 0, 0)


# AMX ------------------------------------------------------------------------------------------

REQUEST, QUESTION = 0x1023, 0x1022
AMX = {*AVX512, "avx512bf16", "amx-tile", "amx-bf16"}


class System:
    """A system that answers a request for tile state; `asked` counts the requests.

    `answer` is an error's number, or 0; `grants` tells whether the process really gets the state.
    """

    def __init__(self, answer: int = 0, *, grants: bool | None = None) -> None:
        self.answer = answer
        self.grants = answer == 0 if grants is None else grants
        self.asked = 0

    def arch_prctl(self, code: int, argument: int) -> int:
        if code == REQUEST:
            assert argument == 18
            self.asked += 1
            return self.answer
        assert code == QUESTION
        bits = ctypes.c_uint64.from_address(argument)
        bits.value = 0b111 | (self.grants << 18)
        return 0


@pytest.fixture
def amx_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[System], None]]:
    """Make this a machine of Linux with AMX, whose system answers as given."""

    def forget() -> None:
        device._host.cache_clear()
        device._tile_state_refused.cache_clear()

    def install(system: System) -> None:
        monkeypatch.setattr(platform, "system", lambda: "Linux")
        monkeypatch.setattr(device, "_present", lambda: set(AMX))
        monkeypatch.setattr(device, "_arch_prctl", system.arch_prctl)
        forget()

    yield install
    monkeypatch.undo()
    forget()


def test_a_granted_request_makes_the_level_amx(amx_machine: Callable[[System], None]) -> None:
    system = System()
    amx_machine(system)
    host = device.host()
    assert host.isa == "amx" and host.has("amx-bf16")
    assert device.amx() == "ready"
    for _ in range(3):
        device.host()
    assert system.asked == 1
    assert not host.lowered("avx512").has("amx-tile")
    with pytest.raises(ValueError, match="isa must be one of"):
        host.lowered("avx512").lowered("amx")


@pytest.mark.parametrize(
    ("system", "why"),
    [
        (System(errno.EINVAL), "EINVAL"),  # an old Linux does not know the question
        (System(errno.EPERM), "EPERM"),  # a container's filter
        (System(errno.ENOSPC), "ENOSPC"),  # a signal stack that is too small
        (System(0, grants=False), "EPERM"),  # a filter that answers instead of Linux
        (System(4095), "error 4095"),
    ],
    ids=["old", "filtered", "small stack", "filtered with success", "unnamed"],
)
def test_a_refusal_leaves_the_vectors(
    system: System, why: str, amx_machine: Callable[[System], None]
) -> None:
    amx_machine(system)
    host = device.host()
    assert host.isa == "avx512" and host.has("avx512bf16")
    assert "amx" not in host.features
    assert device.amx().startswith(f"the processor has it, the system refuses tile state ({why}: ")
    assert system.asked == 1


def test_what_the_system_refuses_cannot_be_asked_for(
    amx_machine: Callable[[System], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    amx_machine(System(errno.EPERM))
    monkeypatch.setenv("TILEFOLD_CPU_ISA", "amx")
    with pytest.raises(ValueError, match=r"^TILEFOLD_CPU_ISA must be one of avx512.*not 'amx'$"):
        device.host()


def test_nothing_is_asked_where_the_environment_says_no(
    amx_machine: Callable[[System], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    system = System()
    amx_machine(system)
    monkeypatch.setenv("TILEFOLD_CPU_ISA", "avx512")
    assert device.host().isa == "avx512"
    assert "amx" not in device.host().features
    assert device.amx() == "off, since TILEFOLD_CPU_ISA=avx512"
    assert system.asked == 0


def test_other_systems_have_no_amx(
    amx_machine: Callable[[System], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    system = System()
    amx_machine(system)
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    assert device.host().isa == "avx512"
    assert "ENOSYS" in device.amx()
    assert system.asked == 0


def test_nothing_is_asked_where_the_processor_has_none(
    amx_machine: Callable[[System], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    system = System()
    amx_machine(system)
    monkeypatch.setattr(device, "_present", lambda: AVX512)
    assert device.host().isa == "avx512"
    assert device.amx() == "not on this processor"
    assert system.asked == 0


@pytest.mark.skipif(
    platform.system() != "Linux" or not ON_X86, reason="a system call of Linux on x86-64"
)
def test_the_system_call_itself() -> None:
    # Part 2 of the extended state (AVX) is every process's; part 63 does not exist.
    granted = ctypes.c_uint64()
    assert device._arch_prctl(QUESTION, ctypes.addressof(granted)) in (0, errno.EINVAL)
    assert device._arch_prctl(REQUEST, 63) in (errno.EINVAL, errno.EOPNOTSUPP)


@pytest.mark.slow
@pytest.mark.skipif(
    platform.system() != "Linux" or not ON_X86, reason="a filter of system calls of Linux on x86-64"
)
@pytest.mark.parametrize("answer", [errno.EPERM, 0])
def test_a_real_filter_of_system_calls(answer: int) -> None:
    code = f"""
import ctypes, errno, struct
from tilefold.backends.cpu import device
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
# Load the number of the system call; arch_prctl is answered with an error, all others pass.
program = b"".join(
    struct.pack("=HBBI", *line)
    for line in [(0x20, 0, 0, 0), (0x15, 0, 1, 158), (0x06, 0, 0, 0x50000 | {answer}),
                 (0x06, 0, 0, 0x7FFF0000)]
)
kept = ctypes.create_string_buffer(program, len(program))
descriptor = ctypes.create_string_buffer(struct.pack("=H6xQ", 4, ctypes.addressof(kept)))
assert libc.prctl(38, 1, 0, 0, 0) == 0  # no new privileges: anyone may set a filter then
assert libc.prctl(22, 2, ctypes.addressof(descriptor), 0, 0) == 0, ctypes.get_errno()
assert device._tile_state_refused() == errno.EPERM
import numpy as np, tilefold
q = np.ones((1, 1, 70, 32), np.float32)
assert (tilefold.attention(q, q, q) == 1).all()
print(device.host().isa)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if "Operation not permitted" in done.stderr or "assert libc.prctl" in done.stderr:
        pytest.skip("filters of system calls cannot be set here")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("avx512", "avx2", "sse2")
