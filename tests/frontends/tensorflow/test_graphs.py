"""Attention in TensorFlow's graphs, threads and processes, and where it takes no operator."""

from __future__ import annotations

import gc
import inspect
import re
import subprocess
import sys
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare import assert_near
from paths import ROOT
from tensorflow_calls import MARKS, Tensor, framework, with_gradients

import tilefold
from tilefold import causal, dense, documents, full, lengths, local, prefix
from tilefold.problems.request import LAYOUTS

pytestmark = MARKS


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Tensors of float32."""
    random = np.random.default_rng(3)
    return [framework().constant(random.normal(size=shape).astype("f4")) for shape in shapes]


def same(got: Any, want: Any, tolerance: float = 0.0) -> None:
    for a, b in zip(got, want, strict=True):
        assert_near("result", a, b, tolerance)


@pytest.fixture
def qkv() -> list[Tensor]:
    return drawn((2, 4, 12, 8), (2, 2, 15, 8), (2, 2, 15, 6))


def test_shapes_of_graphs_are_known_as_far_as_their_inputs(qkv: list[Tensor]) -> None:
    tf = framework()
    known = (
        tf.TensorSpec((2, None, None, 8)),
        tf.TensorSpec((2, 2, 15, 8)),
        tf.TensorSpec((2, 2, 15, 6)),
    )
    seen = {}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        results, gradients = with_gradients(
            lambda *x: tilefold.attention(*x, return_lse=True, return_max=True), [q, k, v], [1.0]
        )
        seen["shapes"] = [tuple(x.shape) for x in (*results, *gradients)]
        return results

    run = tf.function(call, input_signature=known)
    o, lse, largest = run(*qkv)
    rows = (2, None, None)
    assert seen["shapes"] == [
        (2, None, None, 6),
        rows,
        rows,
        (2, None, None, 8),
        (2, 2, 15, 8),
        (2, 2, 15, 6),
    ]
    same(
        (o, lse, largest),
        tilefold.attention(*map(np.asarray, qkv), return_lse=True, return_max=True),
    )


def test_python_runs_for_new_shapes_alone(
    qkv: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One node keeps the calls of its newest shapes, and drops those that it has not room for."""
    from tilefold.common import generation
    from tilefold.frontends.tensorflow import states

    tf, asked = framework(), []
    usual = states.State.prepared

    def noted(state: Any, words: tuple[int, ...], dtypes: list[str]) -> int:
        asked.append(words)
        return usual(state, words, dtypes)

    monkeypatch.setattr(states.State, "prepared", noted)
    monkeypatch.setattr(states, "MOST", 3)
    run = tf.function(
        lambda q: tilefold.attention(q, q, q, mask=local(3)),
        input_signature=[tf.TensorSpec((1, None, None, 8))],
    )
    q = qkv[0][:1]
    for length in (5, 6, 5, 6, 5):
        run(q[:, :, :length])
    assert len(asked) == 2
    for length in (7, 8, 5):
        same(
            run(q[:, :, :length]),
            tilefold.attention(*[q.numpy()[:, :, :length]] * 3, mask=local(3)),
        )
    assert len(asked) == 5
    generation.advance()  # as tuning does
    run(q[:, :, :5])
    run(q[:, :, :5])
    assert len(asked) == 6


def skip_without_xla() -> None:
    """TensorFlow has the interface of XLA that is known from 2.21 on; 2.16 has none."""
    from tilefold.frontends.tensorflow import compiled

    if reason := compiled.missing():
        pytest.skip(f"the XLA of this TensorFlow takes no function of ours: {reason}")


def test_xla_that_takes_no_function_is_named(
    qkv: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tilefold.frontends.tensorflow import compiled

    monkeypatch.setattr(compiled, "missing", lambda: "its interface has version 0.9")
    with pytest.raises(
        NotImplementedError, match=r"version 0\.9\): call it in a tf\.function with"
    ):
        framework().function(tilefold.attention, jit_compile=True)(*qkv)


@pytest.mark.parametrize("jit", [False, True], ids=["operators", "XLA"])
def test_masks_may_change_in_a_traced_function(qkv: list[Tensor], jit: bool) -> None:
    tf, traced = framework(), []
    if jit:
        skip_without_xla()

    @tf.function(jit_compile=jit)
    def run(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, ends: Tensor, seen: Tensor) -> Any:
        traced.append(1)
        mask = (documents(ids[:, :12], ids) & local(9)) | (lengths(ends) & dense(seen))
        return with_gradients(lambda *x: tilefold.attention(*x, mask=mask), [q, k, v], [1.0])

    random = np.random.default_rng(5)
    for _ in range(2):
        ids = np.sort(random.integers(0, 3, (2, 15))).astype("i4")
        ends, seen = random.integers(0, 15, 2).astype("i4"), random.random((12, 15)) < 0.4
        (o,), gradients = run(*qkv, *map(tf.constant, (ids, ends, seen)))
        mask = (documents(ids[:, :12], ids) & local(9)) | (lengths(ends) & dense(seen))
        call = partial(tilefold.attention, mask=mask)
        (want,), slopes = with_gradients(call, qkv, [1.0])
        same((o, *gradients), (want, *slopes), 1e-5)
    assert len(traced) == 1


@pytest.mark.feature("T02")
def test_xla_compiles_calls_with_gradients(qkv: list[Tensor]) -> None:
    import tilefold.tensorflow

    skip_without_xla()
    tf = framework()
    bias, sinks = drawn((4, 12, 15), (4,))

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> Any:
        return tilefold.attention(
            *(q, k, v),
            mask=causal(),
            score=tilefold.bias(bias),
            sinks=sinks,
            dropout=0.2,
            seed=-7,
            return_lse=True,
            return_max=True,
        )

    def step(*given: Tensor) -> Any:
        return with_gradients(call, given, [1.0, 2.0])

    (got, slopes), (want, exact) = (
        tf.function(step, jit_compile=jit)(*qkv, bias, sinks) for jit in (True, False)
    )
    same((*got, *slopes), (*want, *exact), 1e-6)
    (image,) = drawn((1, 2, 4, 3, 5))

    def two(x: Tensor) -> Any:
        function = tilefold.tensorflow.local_2d
        return function(x, x, x, 2, 0, True, "scale_end", returning_l_m=True)

    got, want = (tf.function(two, jit_compile=jit)(image) for jit in (True, False))
    same(got, want, 1e-6)
    free = tf.function(
        lambda q: tilefold.attention(q, q, q),
        jit_compile=True,
        input_signature=[tf.TensorSpec((1, 2, None, 8))],
    )
    with pytest.raises(NotImplementedError, match="shape of q must be known while it is traced"):
        free(qkv[0][:1, :2])


def test_loops_maps_and_data_sets(qkv: list[Tensor]) -> None:
    tf = framework()
    q, k, v = qkv
    want = tilefold.attention(*map(np.asarray, qkv), mask=causal())

    def one(each: Any) -> Tensor:
        return tilefold.attention(*[x[None] for x in each], mask=causal())[0]

    same(tf.map_fn(one, (q, k, v), fn_output_signature=tf.float32), want)
    same(tf.function(lambda *x: tf.map_fn(one, x, fn_output_signature=tf.float32))(*qkv), want)
    same(tf.vectorized_map(one, (q, k, v)), want)
    entries = tf.data.Dataset.from_tensor_slices((q, k, v)).repeat(8)
    mapped = entries.map(lambda *x: one(x), num_parallel_calls=4).prefetch(2)
    for number, o in enumerate(mapped):
        same(o, want[number % 2])

    @tf.function
    def looped(x: Tensor) -> Tensor:
        for _ in tf.range(3):
            x = tilefold.attention(x, k, k)
        return x

    x = q.numpy()
    for _ in range(3):
        x = tilefold.attention(x, k.numpy(), k.numpy())
    same(looped(q), x)


def test_autograph_does_not_rewrite_calls(
    qkv: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That took seconds at the first call, and functions of the standard library had warnings."""
    import tilefold.tensorflow
    from tilefold.frontends.tensorflow import operators, sequences

    tf, frames = framework(), []
    for module in (operators, sequences):
        usual = module.registered

        def noted(usual: Any = usual) -> Any:
            frames.append({frame.function for frame in inspect.stack()})
            return usual()

        monkeypatch.setattr(module, "registered", noted)

    @tf.function
    def run(q: Tensor) -> Tensor:
        mask = tilefold.rule(lambda q, k: (q - k) % 3 == 0)
        o = tilefold.tensorflow.full_1d(tilefold.attention(q, q, q, mask=mask), q, q)
        return tilefold.tensorflow.attention(o, q, q)

    assert run(qkv[0]).shape == qkv[0].shape
    assert len(frames) == 3
    for functions in frames:
        assert [name for name in functions if name.startswith("tf__")] == ["tf__run"]


def test_variables_and_an_optimizer(qkv: list[Tensor]) -> None:
    tf = framework()
    x, _, _ = qkv
    weights = [tf.Variable(w) for w in drawn((8, 8), (8, 8), (8, 8))]
    queries = tf.Variable(x)

    def loss() -> Tensor:
        q, k, v = (tf.einsum("bhnd,de->bhne", queries, w) for w in weights)
        return tf.reduce_mean(tf.square(tilefold.attention(q, k, v) - 1.0))

    @tf.function
    def step() -> Tensor:
        with tf.GradientTape() as tape:
            found = loss()
        for w, gradient in zip(weights, tape.gradient(found, weights), strict=True):
            w.assign_sub(0.3 * gradient)
        return found

    first = float(step())
    for _ in range(30):
        last = float(step())
    assert last < first / 2
    same(tilefold.attention(queries, queries, x), tilefold.attention(*[x.numpy()] * 3))


def test_threads(qkv: list[Tensor]) -> None:
    """Eager calls, graphs with branches, data sets and tapes at once, while Python is busy."""
    tf = framework()
    q, k, v = qkv
    want = tilefold.attention(*map(np.asarray, qkv))
    (_,), slopes = with_gradients(tilefold.attention, qkv, [1.0])
    wrong: list[object] = []
    ends = threading.Event()
    branches = tf.function(lambda *x: tf.stack([tilefold.attention(*x) for _ in range(4)]))

    def check(got: Any, expected: Any) -> None:
        if not np.array_equal(got, expected):
            wrong.append(got)

    def eager() -> None:
        check(tilefold.attention(q, k, v), want)

    def graph() -> None:
        check(branches(q, k, v), np.stack([want] * 4))

    def data() -> None:
        made = tf.data.Dataset.range(8).map(lambda _: tilefold.attention(q, k, v), 4)
        for o in made:
            check(o, want)

    def tape() -> None:
        _, found = with_gradients(tilefold.attention, qkv, [1.0])
        check(found[1], slopes[1])

    def new_shapes() -> None:
        length = int(np.random.default_rng().integers(1, 12))
        some = [np.asarray(x)[:, :, :length] for x in (q, k, v)]
        check(tilefold.attention(*map(tf.constant, some)), tilefold.attention(*some))

    def repeat(work: Any) -> None:
        try:
            while not ends.is_set():
                work()
        except Exception as error:
            wrong.append(error)

    works = (eager, graph, graph, data, tape, new_shapes, lambda: sum(range(1000)))
    threads = [threading.Thread(target=repeat, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    ends.wait(1.5)
    ends.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong


FRESH = """
import importlib, os, sys
import numpy as np
import tensorflow as tf
folder = sys.argv[1]
import tilefold.frontends.tensorflow.tensors
tf.config.threading.set_intra_op_parallelism_threads(1)  # possible until TensorFlow has begun
try:
    tf.saved_model.load(folder)
except Exception as error:
    assert "not registered" in str(error), error
else:
    raise AssertionError("the operators were there before their import")

from tilefold.frontends.tensorflow import compute, library
usual, checked, calls = compute.address, library.Library.checked, []

def interrupted(symbol):
    raise KeyboardInterrupt

def half(self, name, *arguments):  # the second operator is defined, and has no kernel
    calls.append(name)
    if calls.count("RegisterKernelBuilder") == 2:
        raise KeyboardInterrupt
    return checked(self, name, *arguments)

for module, name, broken, whole in (
    (compute, "address", interrupted, usual), (library.Library, "checked", half, checked)
):
    setattr(module, name, broken)
    try:
        import tilefold.tensorflow
    except KeyboardInterrupt:
        setattr(module, name, whole)
    else:
        raise AssertionError("the import did not compile and register")
import tilefold.tensorflow

def again(window):
    mask = tilefold.causal() & tilefold.local(window)
    with tf.GradientTape() as tape:
        tape.watch(given)
        o = tilefold.tensorflow.attention(*given, mask=mask)
    arrays = [x.numpy() for x in given]
    plain, lse = tilefold.attention(*arrays, mask=mask, return_lse=True)
    np.testing.assert_array_equal(o, plain)
    slopes = tilefold.attention_backward(np.ones_like(plain), *arrays, plain, lse, mask=mask)
    for got, exact in zip(tape.gradient(o, given), slopes):
        np.testing.assert_allclose(got, exact, atol=1e-5)

given = [tf.constant(x) for x in np.load(folder + "/given.npz").values()]
want = np.load(folder + "/want.npz")
model = tf.saved_model.load(folder)

def check():
    o, gradient = model.step(*given)
    np.testing.assert_array_equal(o, want["o"])
    np.testing.assert_array_equal(gradient, want["gradient"])
    np.testing.assert_array_equal(model.compiled(*[x[:1] for x in given]), want["o"][:1])
    np.testing.assert_array_equal(model.image(given[0]), want["image"])

check()
again(5)
child = os.fork()
if not child:
    code = 1
    try:
        tf.config.run_functions_eagerly(True)
        o = tilefold.attention(*given, mask=tilefold.causal())
        np.testing.assert_array_equal(o, want["o"])
        o = tilefold.attention(*[x[:1] for x in given], mask=tilefold.causal())
        np.testing.assert_array_equal(o, want["o"][:1])
        code = 0
    finally:
        os._exit(code)
assert os.waitpid(child, 0)[1] == 0
from tilefold.frontends.tensorflow import compiled, operators, registering, sequences, tensors
for module in (registering, operators, compiled, tensors, sequences, tilefold.tensorflow):
    importlib.reload(module)
check()
again(2)
for name in [name for name in sys.modules if name.split(".")[0] == "tilefold"]:
    del sys.modules[name]
import tilefold.tensorflow
again(3)
check()
again(4)
assert (tilefold.tensorflow.compiled.missing() is None) == (sys.argv[2] == "True")
"""


def test_saved_models_forks_and_copies_in_a_fresh_process(
    qkv: list[Tensor], tmp_path: Path
) -> None:
    """A SavedModel loads after the import; so it does after a reload, and with a second copy.

    The import goes on where an interrupt cut an earlier one in two.
    """
    import tilefold.tensorflow

    tf = framework()
    xla = tilefold.tensorflow.compiled.missing() is None

    class Model(tf.Module):  # type: ignore[misc, name-defined]
        @tf.function(input_signature=[tf.TensorSpec((None, None, None, x.shape[3])) for x in qkv])
        def step(self, *given: Tensor) -> Any:
            (o,), gradients = with_gradients(
                lambda *x: tilefold.attention(*x, mask=causal()), given, [1.0]
            )
            return o, gradients[0]

        @tf.function(
            input_signature=[tf.TensorSpec((1, *x.shape[1:])) for x in qkv], jit_compile=xla
        )
        def compiled(self, *given: Tensor) -> Tensor:
            return tilefold.attention(*given, mask=causal())

        @tf.function(input_signature=[tf.TensorSpec((None, None, None, None))])
        def image(self, x: Tensor) -> Tensor:
            return tilefold.tensorflow.causal_2d(x, x, x, sync_mode="scale_end")

    model = Model()
    folder = tmp_path / "model"
    o, gradient = model.step(*qkv)
    tf.saved_model.save(model, str(folder))
    np.savez(folder / "given.npz", *map(np.asarray, qkv))
    np.savez(folder / "want.npz", o=o, gradient=gradient, image=model.image(qkv[0]))
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(folder), str(xla)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_states_of_nodes_that_are_gone_are_dropped() -> None:
    from tilefold.frontends.tensorflow import operators, registering

    tf = framework()
    operators.registered()
    (q,) = drawn((1, 1, 3, 8))
    held = registering.kernels[operators.FORWARD["bhnd"].name]
    counts = []
    for _ in range(4):
        tf.function(lambda x: tilefold.attention(x, x, x))(q)
        gc.collect()
        counts.append(len(held._states))
    assert counts[-1] <= counts[0]
    for number in range(80):  # eager calls whose masks change
        with tf.GradientTape() as tape:
            tape.watch(q)
            o = tilefold.attention(q, q, q, mask=prefix(number))
        if number < 3:
            assert tape.gradient(o, q).shape == q.shape
    assert len(held._states) <= counts[0] + 1 and len(operators._held) <= 66


@pytest.mark.feature("T15")
def test_errors(qkv: list[Tensor]) -> None:
    tf = framework()
    q, k, v = qkv
    invalid = tf.errors.InvalidArgumentError
    with pytest.raises(invalid, match=r"the dim of k must be 8 as in q, got 6"):
        tilefold.attention(q, v, v)
    with pytest.raises(ValueError, match=r"the dim of k must be 8 as in q, got 6"):
        tf.function(tilefold.attention)(q, v, v)
    free = tf.function(tilefold.attention, input_signature=[tf.TensorSpec((None,) * 4)] * 3)
    with pytest.raises(invalid, match=r"the dim of k must be 8 as in q, got 6"):
        free(q, v, v)
    with pytest.raises(invalid, match="k must have four axes"):
        tilefold.attention(q, k[0], v)
    for given, line in (
        ((q, k.numpy(), v), "k must be a TensorFlow tensor as q is, got ndarray"),
        ((q.numpy(), k.numpy(), v), "q must be a TensorFlow tensor as v is, got ndarray"),
        ((q, tf.cast(k, tf.float64), v), "k must be of float32 as q is, got float64"),
        ((tf.cast(q, tf.int32), k, v), "q must be of float32, float64, float16 or bfloat16"),
    ):
        with pytest.raises(TypeError, match=f"^{re.escape(line)}"):
            tilefold.attention(*given)
    with pytest.raises(invalid, match="for a batch of 3, but batch is 2"):
        tilefold.attention(q, k, v, mask=lengths([1, 2, 3]))
    with pytest.raises(invalid, match="this is no text of an operation of tilefold"):
        from tilefold.frontends.tensorflow import operators

        operators.registered()["bhnd"](q, k, v, [], count=1, S=tf.float32, text="{}")


def test_an_interrupt_while_a_call_is_prepared_is_no_error(
    qkv: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tilefold.frontends.tensorflow import states

    def interrupted(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(states.State, "prepared", interrupted)
    q = qkv[0][:, :, :7]
    with pytest.raises(KeyboardInterrupt):
        with suppress(Exception):  # what TensorFlow makes of it
            tilefold.attention(q, q, q)
        threading.Event().wait(0.2)
        sum(range(10))
    monkeypatch.undo()
    assert tilefold.attention(q, q, q).shape == q.shape


@pytest.mark.feature("T15")
def test_asynchronous_eager_calls_are_refused(qkv: list[Tensor]) -> None:
    import tilefold.tensorflow

    config = framework().config.experimental
    config.set_synchronous_execution(False)
    try:
        with pytest.raises(NotImplementedError, match=r"set_synchronous_execution\(True\)"):
            tilefold.attention(*qkv)
        with pytest.raises(NotImplementedError, match=r"set_synchronous_execution\(True\)"):
            tilefold.tensorflow.full_1d(*[qkv[0]] * 3)
    finally:
        config.set_synchronous_execution(True)
    assert tilefold.attention(*qkv).shape == (2, 4, 12, 6)


@pytest.mark.feature("T15")
def test_gradients_that_would_be_lost_are_refused(qkv: list[Tensor]) -> None:
    import tilefold.tensorflow

    tf = framework()
    with tf.GradientTape() as tape:
        tape.watch(qkv[0])
        with tf.GradientTape() as inner:
            inner.watch(qkv[0])
            found = tf.reduce_sum(tilefold.tensorflow.full_1d(*[qkv[0]] * 3))
        with pytest.raises(NotImplementedError, match="between sequences have no gradients"):
            tape.gradient(inner.gradient(found, qkv[0]), qkv[0])
    scale = tf.Variable(0.3)
    with tf.GradientTape(), pytest.raises(NotImplementedError, match="scale is traced or watched"):
        tilefold.attention(*qkv, scale=scale)
    with pytest.raises(NotImplementedError, match="scale is traced or watched"):
        tf.function(lambda x: tilefold.attention(*qkv, scale=x))(scale)
    same(tilefold.attention(*qkv, scale=scale), tilefold.attention(*qkv, scale=float(scale)))
    (bias,) = drawn((12, 15))
    arrays = [*map(np.asarray, qkv)]
    with tf.GradientTape() as tape:
        tape.watch(bias)
        with pytest.raises(NotImplementedError, match=r"watched by a tf.GradientTape, so q, k and"):
            tilefold.attention(*arrays, score=tilefold.bias(bias))
    with pytest.raises(NotImplementedError, match=r"traced by tf.function, so q, k and v must be"):
        tf.function(lambda b: tilefold.attention(*arrays, score=tilefold.bias(b)))(bias)


@pytest.mark.feature("T09")
@pytest.mark.parametrize("layout", ["bhnd", "bhdn"])
def test_second_derivatives(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of the composed implementation, whose gradients are TensorFlow's own."""
    from tilefold.frontends.tensorflow import second as blocks

    tf = framework()
    arrays = drawn((2, 4, 39, 8), (2, 2, 15, 8), (2, 2, 15, 6), (4, 39, 15), (4, 1))
    axes = LAYOUTS[layout]
    given = [tf.cast(tf.transpose(x, axes) if len(x.shape) == 4 else x, "float64") for x in arrays]
    slopes = [tf.cast(x, tf.float64) for x in drawn(*[x.shape for x in given])]

    def second(impl: str, *given: Tensor) -> Any:
        q, k, v, bias, sinks = given
        with tf.GradientTape() as outer:
            outer.watch(given)
            with tf.GradientTape() as inner:
                inner.watch(given)
                o, lse = tilefold.attention(
                    *(q, k, v),
                    mask=causal("start") & local(4),
                    score=tilefold.bias(bias),
                    sinks=sinks,
                    dropout=0.3,
                    seed=1,
                    layout=layout,
                    return_lse=True,
                    impl=impl,
                )
                loss = tf.reduce_sum(tf.sin(o)) + tf.reduce_sum(tf.cos(lse))
            first = inner.gradient(loss, given)
            total = tf.add_n([tf.reduce_sum(x * y) for x, y in zip(first, slopes, strict=True)])
        return outer.gradient(total, given)

    want = second("composed", *given)
    same(second("kernel", *given), want, 1e-12)
    monkeypatch.setattr(blocks, "SCORES", 1)  # two blocks of 16 queries, and one of 7
    same(second("kernel", *given), want, 1e-12)
    if layout == "bhdn":
        return
    same(tf.function(second)("kernel", *given), want, 1e-12)
    unknown = [tf.TensorSpec((None, *x.shape[1:]), x.dtype) for x in given]
    with pytest.raises(NotImplementedError, match="asks for shapes that are known while"):
        tf.function(partial(second, "kernel"), input_signature=unknown)(*given)
    unknown[-1] = tf.TensorSpec((4, None), tf.float64)
    with pytest.raises(NotImplementedError, match="sinks must have a number of them"):
        tf.function(partial(second, "kernel"), input_signature=unknown)(*given)


def test_seeds_of_dropout(qkv: list[Tensor]) -> None:
    tf = framework()

    def call(seed: Any = None) -> Tensor:
        return tilefold.attention(*qkv, dropout=0.5, seed=seed)

    run = tf.function(call)
    for repeated in (call, run):
        tf.random.set_seed(4)
        first, other = repeated(), repeated()
        tf.random.set_seed(4)
        same(repeated(), first)
        assert not np.array_equal(first, other)
    want = tilefold.attention(*map(np.asarray, qkv), dropout=0.5, seed=11)
    for seed in (11, tf.constant(11), tf.constant([11], tf.int64)):
        same(call(seed), want)
        same(run(seed), want)
    for bad in (tf.constant(1.5), tf.constant([1, 2]), tf.constant("1"), tf.constant(True)):
        for function in (call, run):
            with pytest.raises(TypeError, match="seed must be one integer, got a tensor of"):
                function(bad)


@pytest.mark.feature("T09")
def test_explicit_gradients_and_parts(qkv: list[Tensor]) -> None:
    """`attention_backward` and `merge`, by TensorFlow's tensors as by NumPy's arrays."""
    tf = framework()
    q, k, v = qkv
    bias, sinks = drawn((4, 12, 15), (4,))
    options = {"mask": causal(), "score": tilefold.bias(bias), "sinks": tf.cast(sinks, tf.float16)}
    plain = {**options, "score": tilefold.bias(bias.numpy()), "sinks": options["sinks"].numpy()}
    o, lse = tilefold.attention(*qkv, return_lse=True, **options)
    found = tilefold.attention_backward(o, *qkv, o, lse, dlse=lse, **options)
    arrays = [np.asarray(x) for x in (o, *qkv, o, lse)]
    want = tilefold.attention_backward(*arrays, dlse=arrays[-1], **plain)
    assert [x.dtype.name for x in found] == [x.dtype.name for x in want]
    same(found, want)
    k1, v1, k2, v2 = k[:, :, :6], v[:, :, :6], k[:, :, 6:], v[:, :, 6:]

    def joined(*given: Tensor) -> Any:
        q, k1, v1, k2, v2 = given
        first = tilefold.attention(q, k1, v1, return_lse=True)
        return tilefold.merge(*first, *tilefold.attention(q, k2, v2, return_lse=True))

    results, slopes = with_gradients(joined, [q, k1, v1, k2, v2], [1.0, 2.0])
    whole, exact = with_gradients(
        lambda *x: tilefold.attention(*x, return_lse=True), qkv, [1.0, 2.0]
    )
    same(results, whole, 1e-6)
    same((slopes[0], tf.concat((slopes[1], slopes[3]), 2)), exact[:2], 1e-5)
    nothing, nowhere = tilefold.attention(*qkv, mask=~full(), return_lse=True)
    same(tilefold.merge(nothing, nowhere, *whole), whole)
    with pytest.raises(ValueError, match="lse2 must have shape"):
        tilefold.merge(*whole, whole[0], whole[1][:1])


def test_maps_of_tensors_with_values(qkv: list[Tensor]) -> None:
    tf = framework()
    q, k, _ = qkv
    arrays = q.numpy(), k.numpy()
    for function in (tilefold.weights, tilefold.key_mass):
        found = function(q, k, mask=causal())
        assert isinstance(found, tf.Tensor)
        same(found, function(*arrays, mask=causal()))
        with pytest.raises(NotImplementedError, match="is no part of a graph"):
            tf.function(lambda q, k, f=function: f(q, k))(q, k)
        with pytest.raises(NotImplementedError, match="has no derivatives"), tf.GradientTape() as t:
            t.watch(q)
            function(q, k)


def test_python_where_tensorflow_takes_no_operator(
    qkv: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same results, and a warning that says why, as of a library without a symbol."""
    import tilefold.tensorflow
    from tilefold.frontends.tensorflow import library, outside

    tf = framework()
    sinks, image = drawn((4,), (1, 2, 4, 3, 5))

    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Any:
        return tilefold.attention(q, k, v, mask=causal(), sinks=sinks, return_lse=True)

    def step(*given: Tensor) -> Any:
        return with_gradients(call, given, [1.0, 2.0])

    def two(x: Tensor) -> Any:
        return tilefold.tensorflow.causal_2d(x, x, x, "scale_end", returning_l_m=True)

    want, exact = step(*qkv, sinks)
    wanted = two(image)
    reason = "AttributeError: undefined symbol: TF_Dim"
    monkeypatch.setattr(library, "_found", lambda: (None, reason))
    outside._warn.cache_clear()
    with pytest.warns(RuntimeWarning, match="takes no operator of tilefold.*TF_Dim"):
        got, slopes = step(*qkv, sinks)
    same((*got, *slopes), (*want, *exact))
    got, slopes = tf.function(step)(*qkv, sinks)
    same((*got, *slopes), (*want, *exact))
    same(two(image), wanted)
    with pytest.raises(NotImplementedError, match=r"shapes of Q, K and V must be known.*Q \(\?"):
        tf.function(two, input_signature=[tf.TensorSpec((None,) * 5)])(image)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # models are saved here
    page = (ROOT / "docs" / "tensorflow.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, Any] = {}  # later blocks go on from earlier ones
    for number, block in enumerate(blocks):
        file = tmp_path / f"block{number}.py"  # AutoGraph reads the source of functions
        small = block if number == 3 else block.replace("2048", "128").replace("512", "32")
        file.write_text(small, encoding="utf-8")
        exec(compile(small, str(file), "exec"), names)
    assert names["O"].shape == (8, 16, 1024)
