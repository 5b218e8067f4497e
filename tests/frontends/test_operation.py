"""Operations as text, and calls of them that run without Python."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cases import RULES, Sizes
from paths import ROOT, finding
from tracing import Tracer, tracing  # noqa: F401  # a fixture

import tilefold
from tilefold import (
    bias,
    causal,
    dense,
    documents,
    full,
    lengths,
    local,
    prefix,
    rule,
    score,
    softcap,
)
from tilefold.backends.cpu import native, threads
from tilefold.backends.extra import Extra, names_of
from tilefold.backends.protocols import BACKWARD, FORWARD, Pass
from tilefold.frontends.operation import Holding, Operation, extended_request, request_of, taken
from tilefold.problems.request import LAYOUTS, Request

SHAPE = (2, 4, 100, 16)

_run = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)


def run(operation: Operation, *given: Any) -> tuple[Any, ...]:
    """The results of an operation that travelled as text, by its record."""
    operation = Operation.read(operation.text)
    described = [(array.shape, array.dtype.name) for array in given]
    call = operation.native(described)
    results = [np.empty(shape, dtype) for shape, dtype in operation.results(described)]
    every = [*given, *results]
    addresses = (ctypes.c_int64 * len(every))(*[array.ctypes.data for array in every])
    assert _run(native.runner())(call.address, ctypes.addressof(addresses)) == 0
    return tuple(results)


def arrays(number: int = 4, shape: tuple[int, ...] = SHAPE, dtype: str = "float32") -> Any:
    return np.random.default_rng(0).standard_normal((number, *shape)).astype(dtype)


@pytest.mark.feature("A03")
@pytest.mark.parametrize(
    "mask",
    [
        full(),
        pytest.param(causal() & local(16), marks=pytest.mark.slow),
        pytest.param(documents([0] * 50 + [1] * 50), marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_a_record_computes_what_a_call_computes(mask: tilefold.Rule) -> None:
    do, q, k, v = arrays()
    o, lse = run(Operation(FORWARD, Request(mask)), q, k, v)
    expected = tilefold.attention(q, k, v, mask=mask, return_lse=True)
    gradients = run(Operation(BACKWARD, Request(mask)), do, q, k, v, o, lse)
    wanted = tilefold.attention_backward(do, q, k, v, o, lse, mask=mask)
    for found, array in zip((o, lse, *gradients), (*expected, *wanted), strict=True):
        np.testing.assert_array_equal(found, array)


def test_every_rule_is_the_same_after_a_way_through_text() -> None:
    for name, make in RULES.items():
        operation = Operation(FORWARD, Request(make(Sizes(2, 4, 64, 64))))
        assert Operation.read(operation.text).request == operation.request, name


@pytest.mark.parametrize(
    "given",
    [
        [softcap(30.0), bias(np.zeros((4, 1, 100), np.float32))],
        score(lambda s, q, k: tilefold.where(q > k, s * 0.3, -np.inf)),
        score(lambda s, h: s * tilefold.table(np.arange(4))[h]),
        tilefold.alibi(),
        tilefold.relative_bias(np.zeros((4, 32), np.float32)),
    ],
    ids=["several", "own", "table", "alibi", "t5"],
)
def test_every_score_is_the_same_after_a_way_through_text(given: Any) -> None:
    form = tilefold.scores.score.as_score(given).form.score
    request = Request(rule(lambda q, k: (q - k) % 3 == 0), score=form, sinks=1, dropout=0.25)
    wanted = FORWARD.plus(names_of(request, len(form.inputs) + 2))
    assert Operation.read(Operation(wanted, request).text).request == request


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[1]", '{"tilefold":1}', '{"tilefold":1,"operation":"sum","given":[],"results":[]}'],
)
def test_another_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no text of an operation"):
        Operation.read(text)


def test_a_text_of_another_version_is_refused() -> None:
    text = Operation(FORWARD, Request()).text.replace('"tilefold":1', '"tilefold":99')
    with pytest.raises(ValueError, match="format 99"):
        Operation.read(text)


def test_a_text_runs_no_code_of_its_own() -> None:
    text = Operation(FORWARD, Request(causal())).text.replace("Causal", "eval")
    with pytest.raises(ValueError, match="no request of tilefold"):
        Operation.read(text)


def _hostile(mask: str, given: str = '"q","k","v"', score: str = "null", sinks: str = "0") -> str:
    return (
        f'{{"tilefold":1,"operation":"forward","given":[{given}],"results":["o","lse"],'
        f'"request":[{mask},null,"bhnd","highest",{score},{sinks},0.0]}}'
    )


_INDEX = '{"node":["Index",["q"],[]]}'
_TABLE = '{"table":["int32",[1],"AAAAAA=="]}'
_FAR = f'{{"node":["Lookup",[{_TABLE}],[{_INDEX}]]}}'
_FLAGS = '{"table":["bool",[4],"AAAAAA=="]}'
_FULL = '{"Full":[]}'

HOSTILE = {
    "a table of another type": _hostile(f'{{"Documents":[{_FLAGS},{_FLAGS},false]}}'),
    "a table of another rank": _hostile(
        f'{{"Lengths":[{_TABLE.replace("[1]", "[1,1]")},"right"]}}'
    ),
    "bounds that are not true": _hostile(
        '{"Rule":[{"node":["Compare",[">="],[{"node":["Lookup",[{"given":[[4],"int32",0,0,0]}],'
        f'[{_INDEX}]]}},{_INDEX}]]}},["q"]]}}',
        '"q","k","v","data0"',
    ),
    "entries of flags as numbers": _hostile(
        _FULL,
        score='{"Traced":[{"node":["FromInteger",[],['
        + _FAR.replace(_TABLE, _FLAGS)
        + ']]},["q"]]}',
    ),
    "a fraction of an index": _hostile(
        f'{{"Rule":[{{"node":["Compare",[">="],[{{"node":["Constant",[1.5],[]]}},{_INDEX}]]}},["q"]]}}'
    ),
    "a division by 0": _hostile(
        f'{{"Rule":[{{"node":["Compare",["=="],[{{"node":["Binary",["//"],[{_INDEX},'
        f'{{"node":["Constant",[0],[]]}}]]}},{_INDEX}]]}},["q"]]}}'
    ),
    "another operator": _hostile(
        f'{{"Rule":[{{"node":["Compare",["; ret"],[{_INDEX},{_INDEX}]]}},["q"]]}}'
    ),
    "a side that there is not": _hostile('{"Lengths":[5,7]}'),
    "a parameter": _hostile(
        f'{{"Rule":[{{"node":["Compare",[">="],[{{"node":["Parameter",[0,"int"],[]]}},{_INDEX}]]}},["q"]]}}'
    ),
    "sinks that are not given": _hostile(_FULL, sinks="5"),
    "arrays that nobody reads": _hostile(_FULL, '"q","k","v","input0"'),
    "an operand of another name": _hostile(_FULL, '"q","k","v","foo"'),
    "results of another name": _hostile(_FULL).replace('"lse"]', '"lse","zzz"]'),
    "a deep text": "[" * 100_000,
    "deep rules": _hostile('{"Not":[' * 2000 + _FULL + "]}" * 2000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_text_that_tilefold_would_not_write_is_refused(name: str) -> None:
    with pytest.raises(ValueError) as caught:
        Operation.read(HOSTILE[name])
    assert "\n" not in str(caught.value)


def test_a_rule_that_reads_beyond_a_table_is_refused_when_it_meets_sizes() -> None:
    rule = f'{{"Rule":[{{"node":["Compare",[">="],[{_FAR},{_INDEX}]]}},["q"]]}}'
    operation = Operation.read(_hostile(rule))
    with pytest.raises(IndexError, match=r"the mask reads the entries .* of axis 0 of a table"):
        operation.native([((1, 1, 8, 8), "float32")] * 3)


def test_as_many_sinks_as_the_request_says_are_read() -> None:
    operation = Operation(FORWARD.plus(("sinks",)), Request(sinks=5))
    given = [((1, 1, 8, 8), "float32")] * 3
    with pytest.raises(ValueError, match=r"sinks must have 5 columns, got shape \(1, 1\)"):
        operation.native([*given, ((1, 1), "float32")])


def test_a_rule_of_a_class_of_ones_own_has_no_text() -> None:
    class Mine(tilefold.Rule):
        def bind(self, len_q: int, len_k: int) -> Any:
            return causal().bind(len_q, len_k)

        def __repr__(self) -> str:
            return "mine"

    with pytest.raises(TypeError, match="which no graph can hold"):
        _ = Operation(FORWARD, Request(Mine())).text


def test_results_are_described_without_a_plan() -> None:
    operation = Operation(FORWARD.plus((), ("max",)), Request(layout="bnhd"))
    described = [
        ((2, 9, 4, 8), "bfloat16"),
        ((2, 5, 2, 8), "bfloat16"),
        ((2, 5, 2, 16), "bfloat16"),
    ]
    expected = (((2, 9, 4, 16), "bfloat16"), ((2, 4, 9), "float32"), ((2, 4, 9), "float32"))
    assert operation.results(described) == expected
    with pytest.raises(ValueError, match="the batch of k must be 2"):
        operation.results([described[0], ((3, 5, 2, 8), "bfloat16"), described[2]])


def test_a_record_without_keys_fills_its_results() -> None:
    q, none = arrays(1, (1, 2, 3, 8))[0], np.empty((1, 2, 0, 8), np.float32)
    for dtype in ("float32", "float64", "float16"):
        given = [array.astype(dtype) for array in (q, none, none)]
        o, lse = run(Operation(FORWARD, Request()), *given)
        assert not o.any()
        assert (lse == -np.inf).all()
        gradients = run(Operation(BACKWARD, Request()), o, *given, o, lse)
        assert not any(array.any() for array in gradients)
    call = Operation(FORWARD, Request()).native([(x.shape, x.dtype.name) for x in (q, none, none)])
    assert ctypes.c_int64.from_address(call.address + 48).value == 0, "it asks for Python"


def test_records_follow_the_number_of_threads() -> None:
    q, k, v = arrays(3)
    expected = tilefold.attention(q, k, v)
    before = tilefold.get_num_threads()
    for number in (1, 3):
        tilefold.set_num_threads(number)
        np.testing.assert_array_equal(run(Operation(FORWARD, Request()), q, k, v)[0], expected)
        assert threads._process.shared[0] == number
    tilefold.set_num_threads(before)


FORKED = """
import os
import test_operation as here
q, k, v = here.arrays(3)
operation = here.Operation(here.FORWARD, here.Request())
expected = here.run(operation, q, k, v)[0]
child = os.fork()
if not child:
    os._exit(0 if (here.run(operation, q, k, v)[0] == expected).all() else 1)
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_records_run_in_a_forked_child() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED],
        env=finding(__file__),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.returncode) == ("0\n", 0), done.stderr


def test_records_run_on_several_threads_at_once() -> None:
    q, k, v = arrays(3)
    operation, found = Operation(FORWARD, Request(causal())), []
    expected = tilefold.attention(q, k, v, mask=causal())

    def work() -> None:
        for _ in range(20):
            found.append(np.array_equal(run(operation, q, k, v)[0], expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 80


_rng = np.random.default_rng(1)
_IDS = np.sort(_rng.integers(0, 4, (2, 100)), axis=1).astype(np.int32)
_COUNTS = np.array([30, 99], np.int32)
_SEEN = _rng.random((2, 1, 100, 100)) < 0.3

TRACED: dict[str, tuple[Callable[[Any], tilefold.Rule], tuple[Any, ...]]] = {
    "documents": (documents, (_IDS,)),
    "documents of all": (lambda ids: documents(ids) & causal(), (_IDS[0],)),
    "causal documents": (lambda ids: documents(ids, causal=True), (_IDS,)),
    "lengths": (lengths, (_COUNTS,)),
    "one length": (lengths, (np.array(37, np.int32),)),
    "lengths left": (lambda n: lengths(n, side="left"), (_COUNTS,)),
    "dense": (dense, (_SEEN,)),
    "causal lengths": (lambda n: causal(lengths=n), (_COUNTS,)),
    "several": (lambda m, n: (~dense(m) | prefix(3)) & lengths(n) & causal(), (_SEEN, _COUNTS)),
    "twice": (lambda n: lengths(n) & (lengths(n) | causal()), (_COUNTS,)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRACED)
def test_traced_arrays_of_masks_come_with_the_call(name: str, tracing: type[Tracer]) -> None:  # noqa: F811
    make, data = TRACED[name]
    q, k, v = arrays(3)
    holding = request_of(make(*map(tracing, data)), None, "bhnd", "highest")
    assert isinstance(holding, Holding)
    request, extra = taken(holding, Extra((), ()))
    wanted: Pass = FORWARD.plus(extra.names)
    given = [array.array for array in extra.arrays]
    expected, expected_lse = tilefold.attention(q, k, v, mask=make(*data), return_lse=True)
    o, lse = run(Operation(wanted, request), q, k, v, *given)
    np.testing.assert_allclose(o, expected, atol=2e-6)
    do = np.ones_like(o)
    found = run(Operation(BACKWARD.plus(extra.names), request), do, q, k, v, o, lse, *given)
    gradients = tilefold.attention_backward(do, q, k, v, expected, expected_lse, mask=make(*data))
    for one, other in zip(found, gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["bnhd", "bhdn"])
def test_arrays_of_masks_have_no_layout(layout: str, tracing: type[Tracer]) -> None:  # noqa: F811
    axes = LAYOUTS[layout]
    q, k, v = (np.ascontiguousarray(array.transpose(axes)) for array in arrays(3))
    holding = request_of(dense(tracing(_SEEN)), None, layout, "highest")
    request, extra = taken(holding, Extra((), ()))
    o, _ = run(Operation(FORWARD.plus(extra.names), request), q, k, v, _SEEN)
    expected = tilefold.attention(q, k, v, mask=dense(_SEEN), layout=layout)
    np.testing.assert_allclose(o, expected, atol=2e-6)


def test_an_array_of_a_mask_and_of_a_score_travel_together(tracing: type[Tracer]) -> None:  # noqa: F811
    q, k, v = arrays(3)
    added = arrays(1, (4, 1, 100))[0]
    holding = request_of(lengths(tracing(_COUNTS)), None, "bhnd", "highest")
    both, inputs = extended_request(holding, bias(added), 0, 0.0)
    request, extra = taken(both, Extra(("input0",), inputs))
    assert extra.names == ("data0", "input0")
    o, _ = run(Operation(FORWARD.plus(extra.names), request), q, k, v, _COUNTS, added)
    expected = tilefold.attention(q, k, v, mask=lengths(_COUNTS), score=bias(added))
    np.testing.assert_allclose(o, expected, atol=2e-6)


def test_traced_arrays_are_refused_where_they_mean_nothing(tracing: type[Tracer]) -> None:  # noqa: F811
    q, k, v = arrays(3)
    counts = tracing(_COUNTS)
    with pytest.raises(TypeError, match="q, k and v must be arrays of the same framework"):
        tilefold.attention(q, k, v, mask=lengths(counts))
    with pytest.raises(TypeError, match="n_k is traced, so it must be of int32, got int64"):
        lengths(tracing(_COUNTS.astype(np.int64)))
    with pytest.raises(ValueError, match="dense: array must have 0 or 1 or 2 or 3 or 4 axes"):
        dense(tracing(np.ones((1,) * 5, bool)))
    with pytest.raises(ValueError, match="documents: ids_k must fit 32 bits"):
        documents(tracing(_IDS), np.array([0, 2**32]))
    with pytest.raises(NotImplementedError, match="pass one ids for both"):
        documents(tracing(_IDS), tracing(_IDS), causal=True)
