"""The device that CPU kernels run on: its instruction sets, cores and caches.

Instruction sets come from LLVM's host *feature* flags, never from the CPU's name: under a
hypervisor the name is often wrong, while processor and system really report the flags.

AMX is more than a flag. A process may touch tiles only after it asked Linux for their state, and
Linux, a container's filter or an old version may refuse. The process asks once, before a `Device`
first has AMX; after a refusal, kernels use vectors. On other systems AMX is not used.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tilefold.common import settings
from tilefold.common.first_use import imported, undisturbed

_ALLOWED = {
    "sse2": "sse2",
    "avx2": "sse2 sse3 ssse3 sse4.1 sse4.2 popcnt lzcnt bmi bmi2 movbe xsave avx avx2 fma f16c",
    "neon": "neon fp-armv8 lse crc rdm fullfp16 fp16fml dotprod bf16 i8mm",
}
_ALLOWED["avx512"] = (
    _ALLOWED["avx2"] + " avx512f avx512cd avx512bw avx512dq avx512vl avx512ifma avx512vbmi "
    "avx512vbmi2 avx512vnni avx512bitalg avx512vpopcntdq avx512bf16 avx512fp16 gfni vaes "
    "vpclmulqdq"
)
_ALLOWED["amx"] = _ALLOWED["avx512"] + " amx-tile amx-bf16 amx-int8 amx-fp16"
"""The features that each level may use, if the machine has them."""

_AVX512 = ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl")
_REQUIRED: dict[str, tuple[str, ...]] = {
    "amx": (*_AVX512, "avx512bf16", "amx-tile", "amx-bf16"),
    "avx512": _AVX512,
    "avx2": ("avx2", "fma"),
    "sse2": ("sse2",),
    "neon": ("neon",),
}
"""The features that a machine must have for a level; the widest level comes first."""

_VECTOR_BYTES = {"amx": 64, "avx512": 64, "avx2": 32, "sse2": 16, "neon": 16}
_VECTOR_REGISTERS = {"amx": 32, "avx512": 32, "avx2": 16, "sse2": 16, "neon": 32}

_SYS_ARCH_PRCTL = 158
_ARCH_GET_XCOMP_PERM, _ARCH_REQ_XCOMP_PERM = 0x1022, 0x1023
_XTILEDATA = 18
"""The number of the tile data among the components of a processor's extended state."""


@dataclass(frozen=True)
class Device:
    """One machine, by the properties that kernels depend on.

    `features` is LLVM's feature string: it enables exactly what kernels of level `isa` may use.
    Cache sizes are in bytes and per instance (`l3_bytes` may be shared); 0: none or unknown.
    """

    kind: str
    name: str
    isa: str
    triple: str
    features: str
    cores: int
    l1_bytes: int = 0
    l2_bytes: int = 0
    l3_bytes: int = 0

    @property
    def clock(self) -> str:
        """What kernels read that count the time of their stages: see `kernels.stages`."""
        return "cntvct_el0" if self.isa == "neon" else "rdtsc"

    @property
    def vector_bytes(self) -> int:
        """The width of a vector register in bytes."""
        return _VECTOR_BYTES[self.isa]

    @property
    def vector_registers(self) -> int:
        """The number of vector registers of the instruction set."""
        return _VECTOR_REGISTERS[self.isa]

    @property
    def converts_float16(self) -> bool:
        """True if there are instructions that convert between float16 and float32."""
        return self.isa == "neon" or self.has("f16c")

    def has(self, feature: str) -> bool:
        """True if kernels may use a feature, by LLVM's name, as in `device.has("amx-bf16")`."""
        return f"+{feature}" in self.features.split(",")

    def lowered(self, isa: str) -> Device:
        """Return this device restricted to a narrower instruction set of the same family."""
        present = {name[1:] for name in self.features.split(",") if name.startswith("+")}
        levels = _levels(present)
        if isa not in levels:
            raise ValueError(f"isa must be one of {', '.join(levels)} on this device, not {isa!r}")
        return replace(self, isa=isa, features=_features(isa, present))


def host() -> Device:
    """Return the device that this process runs on, restricted by TILEFOLD_CPU_ISA."""
    return _host(settings.CPU_ISA.get())


@imported
def _llvm() -> Any:
    """LLVM, and its shared library, which the first function loads."""
    import llvmlite.binding as llvm

    llvm.get_process_triple()
    return llvm


@functools.lru_cache(maxsize=8)
def _host(isa: str | None) -> Device:
    triple = undisturbed(_llvm().get_process_triple)
    present = undisturbed(_present)
    # The process does not ask if AMX is off, since tile state needs larger signal stacks.
    vectors_only = {name for name in present if not name.startswith("amx-")}
    if present != vectors_only and (isa in _levels(vectors_only) or _tile_state_refused()):
        present = vectors_only
    levels = _levels(present)
    if isa is not None and isa not in levels:
        allowed = ", ".join(levels)
        raise ValueError(
            f"{settings.CPU_ISA.name} must be one of {allowed} on this machine, not {isa!r}"
        )
    level = isa or levels[0]
    l1_bytes, l2_bytes, l3_bytes = _cache_bytes()
    return Device(
        kind="cpu",
        name=_name(),
        isa=level,
        triple=triple,
        features=_features(level, present),
        cores=usable_cores(),
        l1_bytes=l1_bytes,
        l2_bytes=l2_bytes,
        l3_bytes=l3_bytes,
    )


def amx() -> str:
    """Return a description of whether kernels may use AMX in this process, and why not."""
    if "amx-tile" not in _present():
        return "not on this processor"
    isa = settings.CPU_ISA.get()
    if isa not in (None, "amx"):
        return f"off, since {settings.CPU_ISA.name}={isa}"
    if refused := _tile_state_refused():
        name = errno.errorcode.get(refused, f"error {refused}")
        return (
            f"the processor has it, the system refuses tile state ({name}: {os.strerror(refused)})"
        )
    return "ready"


def _present() -> set[str]:
    """The features that the processor and the system report, by LLVM's names."""
    llvm = _llvm()
    triple = llvm.get_process_triple()
    baseline = {"sse2"} if triple.startswith(("x86_64", "amd64")) else {"neon"}
    try:
        return {name for name, on in llvm.get_host_cpu_features().items() if on} | baseline
    except RuntimeError:
        return baseline


@functools.cache
def _tile_state_refused() -> int:
    """Ask the system for tile state; return 0, or the number of the error.

    LLVM's flags only say that the system can save tiles, not that this process may use them. Linux
    grants them to all threads, also to running ones, and to forked children. It refuses with ENOSPC
    if a thread has a signal stack that is too small for tiles.
    """
    if platform.system() != "Linux":
        return errno.ENOSYS
    if refused := _arch_prctl(_ARCH_REQ_XCOMP_PERM, _XTILEDATA):
        return refused
    # A filter of system calls may return 0 for a call that it blocks.
    granted = ctypes.c_uint64()
    refused = _arch_prctl(_ARCH_GET_XCOMP_PERM, ctypes.addressof(granted))
    return refused or (0 if granted.value >> _XTILEDATA & 1 else errno.EPERM)


def _arch_prctl(code: int, argument: int) -> int:
    """Linux's system call `arch_prctl` on x86-64; returns 0, or the number of the error."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    libc.syscall.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_ulong]
    failed = libc.syscall(_SYS_ARCH_PRCTL, code, argument) != 0
    return ctypes.get_errno() if failed else 0


def _levels(present: set[str]) -> list[str]:
    """The levels that a machine with these features can run, widest first."""
    return [level for level, needed in _REQUIRED.items() if present.issuperset(needed)]


def _features(isa: str, present: set[str]) -> str:
    return ",".join(f"+{name}" for name in _ALLOWED[isa].split() if name in present)


def usable_cores() -> int:
    """The number of cores that this process may use now.

    They are those of its affinity mask, within the quota that its control group had at first.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = _first_quota()
    return max(1, cores if quota is None else min(cores, int(quota)))


@functools.lru_cache(maxsize=1)
def _first_quota() -> float | None:
    return _quota()


def _quota(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> float | None:
    """The smallest CPU quota of this process's control group and its parents, in cores."""
    quotas: list[float] = []
    for line in _read(membership).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        relative = Path(path.lstrip("/"))
        for folder in (relative, *relative.parents):
            if not controllers:
                value, _, period = _read(root / folder / "cpu.max").partition(" ")
                quotas += _ratio(value, period)
                continue
            for mount in ("cpu", "cpu,cpuacct"):
                value = _read(root / mount / folder / "cpu.cfs_quota_us")
                period = _read(root / mount / folder / "cpu.cfs_period_us")
                quotas += _ratio(value, period)
    return min(quotas, default=None)


def _ratio(quota: str, period: str) -> list[float]:
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:
        return []
    return [int(quota) / int(period)]


def _name() -> str:
    """The processor's name, from the operating system."""
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    name = _sysctl("machdep.cpu.brand_string") if platform.system() == "Darwin" else ""
    return name or platform.processor() or platform.machine()


def _cache_bytes(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> tuple[int, int, int]:
    """The sizes of the data caches of the first core, level 1 to 3, in bytes."""
    sizes = {1: 0, 2: 0, 3: 0}
    if platform.system() == "Darwin":
        for level, name in ((1, "l1dcachesize"), (2, "l2cachesize"), (3, "l3cachesize")):
            # "perflevel0" names the fast cores of Apple's processors.
            text = _sysctl(f"hw.perflevel0.{name}") or _sysctl(f"hw.{name}")
            sizes[level] = int(text) if text.isdigit() else 0
        return sizes[1], sizes[2], sizes[3]
    for entry in sorted(root.glob("index*")):
        level_text = _read(entry / "level")
        size_text = _read(entry / "size")
        if _read(entry / "type") == "Instruction" or not level_text.isdigit():
            continue
        unit = {"K": 1024, "M": 1024 * 1024}.get(size_text[-1:], 1)
        digits = size_text.rstrip("KM")
        sizes[int(level_text)] = int(digits) * unit if digits.isdigit() else 0
    return sizes[1], sizes[2], sizes[3]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _sysctl(name: str) -> str:
    import subprocess  # on macOS alone; a first call counts its milliseconds

    try:
        done = subprocess.run(
            ["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
