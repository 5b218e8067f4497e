"""Compiled programs: what they hold, other processes, threads, and what is refused."""

from __future__ import annotations

import doctest
import gc
import inspect
import os
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from jaxed import jax, jnp, needs
from paths import ROOT

import tilefold
from tilefold import attention, causal, lengths, local

pytestmark = needs


def three(*shape: int) -> list[Any]:
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=shape or (1, 2, 9, 8)), jnp.float32) for _ in range(3)]


SCRIPT = """
import sys, jax, jax.numpy as jnp
import tilefold.jax
from tilefold import attention, causal
for name, value in {
    "jax_compilation_cache_dir": sys.argv[1],
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}.items():
    jax.config.update(name, value)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
q = jnp.arange(144.0).reshape(1, 2, 9, 8) / 100
f = jax.jit(jax.grad(lambda q: (attention(q, q, q, mask=causal()) ** 2).sum()))
if sys.argv[2] == "write":
    shape = jax.ShapeDtypeStruct(q.shape, q.dtype)
    made = jax.export.export(f, disabled_checks=tilefold.jax.EXPORT_CHECKS)(shape)
    open(sys.argv[1] + "/exported", "wb").write(made.serialize())
    print(repr(float(f(q).sum())))
else:
    made = jax.export.deserialize(bytearray(open(sys.argv[1] + "/exported", "rb").read()))
    found = float(made.call(q).sum())
    hits.clear()
    again = float(f(q).sum())
    print(repr(found), repr(again), any("cache_hits" in event for event in hits))
"""


@pytest.mark.feature("A03")
def test_programs_of_another_process(tmp_path: Path) -> None:
    """One that was exported, and one of JAX's cache on disk."""

    def run(what: str) -> list[str]:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), what]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    (want,) = run("write")
    assert run("read") == [want, want, "True"]


def test_a_program_holds_text_and_no_address() -> None:
    q, k, v = three()
    lowered = jax.jit(lambda *x: attention(*x, mask=causal() & local(5))).lower(q, k, v)
    text = lowered.as_text()
    assert "tilefold_attention" in text and "\\22Local\\22" in text
    assert (
        text == jax.jit(lambda *x: attention(*x, mask=causal() & local(5))).lower(q, k, v).as_text()
    )


def test_a_text_of_another_version_is_an_error_of_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    from tilefold.frontends import operation
    from tilefold.frontends.jax import calls  # noqa: F401  # it registers the handler

    q, k, v = three()
    lowered = jax.jit(lambda *x: attention(*x, mask=causal() & local(6))).lower(q, k, v)
    monkeypatch.setattr(operation, "_VERSION", 99)
    operation._read_kept.cache_clear()
    with pytest.raises(Exception, match=r"INVALID_ARGUMENT.*another version of tilefold"):
        lowered.compile()
    operation._read_kept.cache_clear()


def test_calls_of_programs_that_are_gone_are_let_go() -> None:
    from tilefold.frontends import xla

    q, k, v = three(1, 2, 11, 8)
    for _ in range(3):
        function = jax.jit(lambda *x: attention(*x, mask=causal()))
        function(q, k, v)
        before = len(xla._instances)
        del function
        jax.clear_caches()
        gc.collect()
        assert any(instance.words[1] for instance in xla._instances)
    assert len(xla._instances) == before


def test_eager_calls_compile_no_program_for_each_mask() -> None:
    from tilefold.frontends import xla

    q, k, v = (jax.device_put(x, jax.devices()[1]) for x in three(1, 2, 12, 8))
    compiled = jax.jit(lambda n: attention(q, k, v, mask=lengths(n)))
    before = len(xla._instances)
    for n in range(1, 6):
        o, pull = jax.vjp(lambda *x, n=n: attention(*x, mask=lengths(n)), q, k, v)
        assert {x.device for x in (o, *pull(o))} == {q.device}
        assert len(xla._instances) == before or n > 1
        np.testing.assert_array_equal(o, compiled(jnp.array(n, jnp.int32)))
        before = len(xla._instances) if n == 1 else before


def test_without_jit() -> None:
    q, k, v = three()
    slopes = jax.grad(lambda *x: (attention(*x, mask=causal()) ** 2).sum(), (0, 1, 2))
    with jax.disable_jit():
        found = slopes(q, k, v)
    for one, other in zip(found, jax.jit(slopes)(q, k, v), strict=True):
        assert isinstance(one, jax.Array)
        np.testing.assert_array_equal(one, other)


def test_threads_that_call_at_once() -> None:
    q, k, v = three(2, 4, 64, 8)
    function = jax.jit(lambda *x: attention(*x, mask=causal()))
    want = np.asarray(attention(q, k, v, mask=causal()))
    found: list[bool] = []

    def run() -> None:
        for _ in range(20):
            found.append(bool((np.asarray(function(q, k, v)) == want).all()))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 80


@pytest.mark.feature("A06")
def test_an_interface_that_is_not_known_calls_python_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tilefold.frontends.jax import handler, lowering

    q, k, v = three(1, 2, 12, 8)

    def found() -> Any:
        def loss(*x: Any) -> Any:
            return (attention(*x, dropout=0.3, seed=4, mask=lengths(jnp.array([9]))) ** 2).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)

    want = found()
    lowering._warn.cache_clear()
    monkeypatch.setattr(handler, "version", lambda: (0, 9))
    with pytest.warns(RuntimeWarning, match=r"version 0.9 .* up to 0.5: it calls Python"):
        got = found()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found()
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(one, other)


def test_importing_starts_no_backend() -> None:
    code = (
        "import tilefold.jax, jax;"
        "jax.config.update('jax_num_cpu_devices', 3);"
        "print(len(jax.devices('cpu')))"
    )
    command, env = [sys.executable, "-c", code], {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "3"


# What is refused --------------------------------------------------------------------------------


def ones(*shape: int, dtype: str = "float32") -> Any:
    """An array that becomes one of JAX."""
    return np.ones(shape, dtype)


INTEGERS = {name: ones(1, 2, 3, 4, dtype="int32") for name in "qkv"}

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "numpy": ({"k": 0}, TypeError, "k must be a jax array as q is, got int"),
    "types": ({"k": ones(1, 2, 3, 4, dtype="bfloat16")}, TypeError, "k must be of float32 as q is"),
    "integers": (INTEGERS, TypeError, "q must be of float32, float64"),
    "shapes": ({"v": ones(1, 2, 4, 4)}, ValueError, "the sequence of v must be 3 as in k"),
    "axes": ({"q": ones(2, 3, 4)}, ValueError, "q must have four axes"),
    "mask": ({"mask": ones(3, 3, dtype="bool")}, TypeError, "tilefold.dense"),
    "no seed": ({"dropout": 0.5}, ValueError, "jax.random.bits"),
    "seeds": ({"dropout": 0.5, "seed": ones(3, dtype="int32")}, TypeError, "jax.random.bits"),
    "sinks": ({"sinks": ones(3)}, ValueError, "sinks must have shape"),
    "score": ({"score": ones(3)}, TypeError, "tilefold.bias"),
    "layout": ({"layout": "nbhd"}, ValueError, "layout must be"),
    "impl": ({"impl": "tensorops"}, NotImplementedError, "Metal 4"),
    "native": ({"impl": "native", "return_max": True}, NotImplementedError, "takes no return_max"),
}


@pytest.mark.feature("T15")
@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("compiled", [False, True])
def test_bad_arguments(name: str, compiled: bool) -> None:
    """The same line, eager and while JAX traces."""
    options, kind, words = BAD[name]
    given = {**dict.fromkeys("qkv", ones(1, 2, 3, 4)), **options}
    given = {x: jnp.asarray(y) if isinstance(y, np.ndarray) else y for x, y in given.items()}
    q = given.pop("q")

    def call(q: Any) -> Any:
        return attention(q, given["k"], given["v"], **options_alone)

    options_alone = {x: y for x, y in given.items() if x not in "kv"}
    with pytest.raises(kind, match=words) as raised:
        jax.jit(call)(q) if compiled else call(q)
    assert "\n" not in str(raised.value)


TRACED: dict[str, tuple[Any, str, type[Exception], str]] = {
    "integer sinks": (
        lambda x: {"sinks": x[0]},
        "int32",
        TypeError,
        "sinks is traced, so it must be of floats, got int32",
    ),
    "integer bias": (
        lambda x: {"score": tilefold.bias(x)},
        "int32",
        TypeError,
        "bias: array is traced, so it must be of floats, got int32",
    ),
    "floats for dense": (
        lambda x: {"mask": tilefold.dense(x)},
        "float32",
        TypeError,
        "array is traced, so it must be of bool, got float32",
    ),
    "integers for dense": (
        lambda x: {"mask": tilefold.dense(x)},
        "int32",
        TypeError,
        "array is traced, so it must be of bool, got int32",
    ),
    "bool for lengths": (
        lambda x: {"mask": lengths(x[0])},
        "bool",
        TypeError,
        "n_k is traced, so it must be of int32, got bool",
    ),
    "to_dense": (
        lambda x: {"mask": tilefold.documents(x[0]).to_dense(2, 2)},
        "int32",
        ValueError,
        "array that is traced .int32.2.., so its entries are not known here",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRACED)
def test_traced_arrays_of_a_wrong_type(name: str) -> None:
    """One line, which says the type that is wanted."""
    make, dtype, kind, words = TRACED[name]
    q = jnp.ones((1, 2, 2, 4))
    with pytest.raises(kind, match=words) as raised:
        jax.eval_shape(lambda x: attention(q, q, q, **make(x)), jnp.ones((2, 2), dtype))
    assert "\n" not in str(raised.value)


def test_sizes_that_are_symbols() -> None:
    import tilefold.jax

    b, n = jax.export.symbolic_shape("b, n")
    for call, shape in (
        (attention, (b, 2, 3, 4)),
        (lambda q, k, v: attention(q, k, v, mask=causal()), (1, 2, n, 4)),
        (tilefold.jax.dot_product_attention, (1, n, 2, 4)),
        (tilefold.jax.attention_fn(), (b, 3, 2, 4)),
    ):
        with pytest.raises(NotImplementedError, match="export one program for each") as raised:
            jax.export.export(jax.jit(call))(*[jax.ShapeDtypeStruct(shape, "float32")] * 3)
        assert "\n" not in str(raised.value)


def test_what_is_traced_and_cannot_be() -> None:
    q, k, v = three()
    with pytest.raises(NotImplementedError, match="scale is traced by JAX"):
        jax.jit(lambda x: attention(q, k, v, scale=x))(0.3)
    with pytest.raises(NotImplementedError, match="key_mass of arrays that JAX traces"):
        jax.jit(lambda q: tilefold.key_mass(q, k))(q)
    with pytest.raises(NotImplementedError, match="make them some with"):
        numbers = [np.asarray(x) for x in (q, k, v)]
        jax.jit(lambda x: attention(*numbers, score=tilefold.bias(x)))(jnp.ones((9, 9)))


def test_another_place_is_refused() -> None:
    """An array there, before anything is compiled; and a program for another place."""
    from tilefold.frontends.jax import calls

    q, k, v = three()
    there = SimpleNamespace(devices=lambda: [SimpleNamespace(platform="cuda")], shape=q.shape)
    with pytest.raises(NotImplementedError, match=r"k is on cuda, .* jax.device_put\(x, "):
        calls.attention(q, there, v, calls.request_of(None, None, "bhnd", "highest"))
    with pytest.raises(NotImplementedError, match="on the CPU alone so far"):
        jax.export.export(jax.jit(attention), platforms=["cuda"])(q, k, v)


# Other functions --------------------------------------------------------------------------------


def test_backward_and_merge_and_maps_of_jax_arrays() -> None:
    q, k, v = three(2, 4, 12, 8)
    options = {"mask": causal(), "score": tilefold.alibi(jnp.ones(4)), "sinks": jnp.zeros(4)}
    o, lse = attention(q, k, v, **options, return_lse=True)
    found = tilefold.attention_backward(o, q, k, v, o, lse, dlse=lse, **options)
    _, pull = jax.vjp(lambda *x: attention(*x, **options, return_lse=True), q, k, v)
    for got, want in zip(found, pull((o, lse)), strict=False):
        np.testing.assert_allclose(got, want, atol=1e-5)
    assert [x.shape for x in found[3:]] == [(4,), (4,)]
    halves = [
        attention(q, x[0], x[1], return_lse=True)
        for x in zip(jnp.split(k, 2, 2), jnp.split(v, 2, 2), strict=True)
    ]
    both = attention(q, k, v, return_lse=True)
    for got, want in zip(tilefold.merge(*halves[0], *halves[1]), both, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    mass = tilefold.key_mass(q, k, mask=causal())
    assert isinstance(mass, jax.Array)
    np.testing.assert_allclose(mass.sum(2), np.full((2, 4), 12), rtol=1e-5)


@pytest.mark.feature("J01", "J02")
@pytest.mark.parametrize(
    ("layout", "mask"),
    [("bhnd", causal()), ("bnhd", lengths([0, 5])), ("bhdn", tilefold.full())],
    ids=repr,
)
def test_other_implementations(layout: str, mask: tilefold.Rule) -> None:
    q, k, v = three(2, 12, 12, 12)
    options = {"mask": mask, "layout": layout, "return_lse": True}

    def every(*given: Any) -> Any:
        return [attention(*given, impl=x, **options) for x in ("kernel", "composed", "native")]

    want, *others = jax.jit(every)(q, k, v)
    for found in others:
        for got, expected in zip(found, want, strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.feature("T12")
def test_examples_and_help() -> None:
    import tilefold.jax

    outcome = doctest.testmod(tilefold.jax, raise_on_error=False)
    assert outcome.attempted and not outcome.failed
    for name in ("attention", "dot_product_attention", "attention_fn"):
        public = getattr(tilefold.jax, name)
        names = [x for x in inspect.signature(public).parameters if x != "unknown"]
        assert all(name in public.__doc__ for name in names)
    numbers = np.ones((1, 2, 3, 4), np.float32)
    assert isinstance(tilefold.jax.attention(numbers, numbers, numbers), jax.Array)
    with pytest.raises(TypeError, match=r"attn_mask.*mask"):
        tilefold.jax.attention(numbers, numbers, numbers, attn_mask=None)


@pytest.mark.feature("T12")
def test_the_page_runs() -> None:
    pytest.importorskip("flax.nnx", reason="flax is not installed")
    page = (ROOT / "docs" / "jax.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, Any] = {}  # later blocks go on from earlier ones
    for block in blocks:
        exec(block.replace("2048", "64").replace("512", "16"), names)
    np.testing.assert_allclose(
        names["again"].call(names["q"], names["ids"]), names["packed"](names["q"], names["ids"])
    )
    assert names["several"].shape == (2, 1, 64, 8, 64) and names["product"].any()
