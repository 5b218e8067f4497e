"""`import tilefold` is light, and what it offers is documented."""

from __future__ import annotations

import doctest
import inspect
import pydoc
import subprocess
import sys
from types import ModuleType

import pytest

import tilefold
from tilefold import api, compiling
from tilefold.backends.cpu import threads
from tilefold.backends.metal import runtime
from tilefold.problems import attention, reference

HEAVY = "numpy llvmlite rich platformdirs torch jax tensorflow matplotlib"


def fresh(code: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_is_light() -> None:
    code = f"""
import sys, time
start = time.perf_counter()
import tilefold
print(time.perf_counter() - start, *[name for name in "{HEAVY}".split() if name in sys.modules])
"""
    seconds = []
    for _ in range(3):
        elapsed, *loaded = fresh(code).split()
        assert not loaded
        seconds.append(float(elapsed))
    assert min(seconds) < 0.1


@pytest.mark.slow
def test_a_call_on_numpy_arrays_imports_no_framework() -> None:
    code = """
import sys
import numpy as np
import tilefold
q = np.ones((1, 1, 2, 2))
o, lse = tilefold.attention(q, q, q, mask=tilefold.causal(), return_lse=True)
tilefold.attention_backward(o, q, q, q, o, lse)
print(*[name for name in ("torch", "jax", "tensorflow", "matplotlib") if name in sys.modules])
"""
    assert fresh(code) == ""


@pytest.mark.parametrize(("backend", "name"), [("metal", "emulate"), ("triton", "interpreted")])
def test_the_front_door_of_a_backend_is_light_too(backend: str, name: str) -> None:
    code = f"""
import sys
import tilefold
listed = dir(tilefold.{backend})
print(*[name for name in "{HEAVY} triton".split() if name in sys.modules])
assert "{backend}" in dir(tilefold) and "{name}" in listed
"""
    assert fresh(code) == ""


def test_names_are_listed_before_they_are_used() -> None:
    code = "import tilefold; print(*sorted(set(tilefold.__all__) - set(dir(tilefold))))"
    assert fresh(code) == ""
    assert all(getattr(tilefold, name).__module__ for name in tilefold.__all__)


@pytest.mark.feature("T12")
@pytest.mark.parametrize(
    "module", [api, compiling, attention, reference, runtime, threads], ids=lambda m: m.__name__
)
def test_examples(module: ModuleType) -> None:
    outcome = doctest.testmod(module, raise_on_error=False)
    assert outcome.attempted and not outcome.failed


@pytest.mark.feature("T12")
@pytest.mark.parametrize("name", tilefold.__all__)
def test_help(name: str) -> None:
    public = getattr(tilefold, name)
    text = inspect.getdoc(public)
    assert text
    assert text.partition("\n")[0].endswith((".", ":")), "one line says what it does"
    assert ">>>" in text, "an example shows it"
    if inspect.isfunction(public):
        parameters = inspect.signature(public).parameters
        assert all(parameter in text for parameter in parameters)
        assert not parameters or "Raises" in text
        assert all(parameter in pydoc.render_doc(public) for parameter in parameters)


@pytest.mark.feature("T12")
def test_help_on_attention_tells_shapes_types_and_errors() -> None:
    text = pydoc.plain(pydoc.render_doc(tilefold.attention))
    for word in (
        "(batch, heads_q, len_q, dim)",
        "(batch, heads_kv, len_k, dim_v)",
        '"bhdn" is (batch, heads, dim, sequence)',
        "float32",
        "TypeError",
        "ValueError",
        "NotImplementedError",
        "arXiv",
    ):
        assert word in text
