"""Masks in functions that torch compiles and exports: what changes is an input of the graph."""

from __future__ import annotations

import copy
import io
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import tilefold  # noqa: E402
from tilefold import attention, causal, dense, documents, lengths, local, rule  # noqa: E402

pytestmark = pytest.mark.slow

Q = torch.randn(2, 2, 12, 8, generator=torch.Generator().manual_seed(0))
X = torch.tensor([0.5, 0.25])
attention(Q, Q, Q)  # the first call of a process compiles a graph of its own


def ids(step: int) -> Any:
    return torch.randint(0, 4, (12,), generator=torch.Generator().manual_seed(step)).sort()[0]


def hidden(step: int) -> Any:
    return torch.rand(12, 12, generator=torch.Generator().manual_seed(step)) > 0.4


def made(mask: Callable[[Any], Any]) -> Callable[..., Any]:
    """Attention with a rule that is made inside of the compiled function, and given outside."""
    return lambda q, x: attention(q, q, q, mask=mask(x)) * 2


def given(q: Any, mask: Any) -> Any:
    return attention(q, q, q, mask=mask) * 2


WINDOW = 5
STEPS = range(4)
CASES: dict[str, tuple[Callable[..., Any], Callable[[int], Any], int]] = {
    "lengths, given": (given, lambda i: lengths([i + 1, 12 - i]), 1),
    "documents, given": (given, lambda i: documents(ids(i)) & causal(), 1),
    "documents of int64 numbers, given": (given, lambda i: documents(ids(i) * 2**40), 1),
    "ids of queries and keys, given": (given, lambda i: documents(ids(i), ids(i + 1)), 1),
    "dense, given": (given, lambda i: dense(hidden(i)), 1),
    "a piece, given": (given, lambda i: documents([i] * 9 + [0] * 9).window(18, 18, q0=3, k0=i), 2),
    "windows, given": (given, lambda i: local(i + 1), 2),
    "rules of a user's own, given": (given, lambda i: rule(lambda q, k: q - k < 3 + i % 2), 2),
    "lengths": (made(lengths), lambda i: torch.tensor([i + 1, 12 - i]), 1),
    "lengths, left": (made(lambda n: lengths(n, side="left")), lambda i: torch.tensor([i, 9]), 1),
    "causal(lengths)": (made(lambda n: causal(lengths=n)), lambda i: torch.tensor([5 + i, 12]), 1),
    "documents": (made(lambda x: documents(x) & causal()), ids, 1),
    "documents, causal": (made(lambda x: documents(x, x, causal=True)), ids, 1),
    "dense": (made(dense), hidden, 1),
    "windows": (made(local), lambda i: i + 1, 2),
    "lists": (made(lambda _: lengths([5, 8]) & documents([0] * 6 + [1] * 6)), ids, 1),
    "a rule of a user's own": (made(lambda _: rule(lambda q, k: abs(q - k) < WINDOW)), ids, 1),
}


@pytest.mark.feature("T09")
@pytest.mark.parametrize("case", CASES)
def test_another_mask_of_a_kind_runs_the_same_graph(case: str) -> None:
    function, argument, graphs = CASES[case]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for step in STEPS:
        assert torch.equal(compiled(Q, argument(step)), function(Q, argument(step)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_windows_may_follow_lengths_that_change() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def function(q: Any) -> Any:
        return attention(q, q, q, mask=local(q.shape[2] // 2))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for length in (12, 9, 30, 7):
        q = torch.randn(1, 1, length, 4)
        assert torch.equal(compiled(q), function(q))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_gradients_of_training_steps_with_new_documents() -> None:
    """With sinks, a bias and dropout beside them: all are inputs of one graph."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    bias, sinks = torch.randn(2, 1, 12), torch.randn(2)

    def step(q: Any, bias: Any, sinks: Any, mask: Any, seed: Any) -> Any:
        score, more = tilefold.bias(bias), {"sinks": sinks, "dropout": 0.2, "seed": seed}
        return attention(q, q, q, mask=mask, score=score, **more).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for number in STEPS:
        mask = documents(ids(number), causal=True) & local(4)
        found = []
        for run in (compiled, step):
            leaves = [x.clone().requires_grad_() for x in (Q, bias, sinks)]
            run(*leaves, mask, number).backward()
            found.append([x.grad for x in leaves])
        for got, want in zip(*found, strict=True):
            assert torch.equal(got, want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the seed, then any seed


def test_a_flag_of_a_rule_may_compare_sizes() -> None:
    torch._dynamo.reset()

    def function(q: Any, n: int) -> Any:
        return attention(q, q, q, mask=local(n, causal=n == 3))

    compiled = torch.compile(function, fullgraph=True, backend="eager", dynamic=True)
    for n in (2, 3, 4):
        assert torch.equal(compiled(Q, n), function(Q, n))


def test_scores_of_a_user_s_own_and_numbers_that_change_are_made_inside() -> None:
    torch._dynamo.reset()

    def function(q: Any, x: Any, cap: float) -> Any:
        own = tilefold.score(lambda s, h, q, k, w=cap: s - w * tilefold.table(x)[h] * abs(q - k))
        near = rule(lambda q, *, k, w=3: q - k < w)
        return attention(q, q, q, mask=near, score=[own, tilefold.softcap(cap)])

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    for cap in (1.5, 2.5, 0.5):
        assert torch.equal(compiled(Q, X, cap), function(Q, X, cap))


def test_a_mask_is_checked_when_the_graph_runs() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(made(lengths), fullgraph=True, backend="aot_eager")
    compiled(Q, torch.tensor([3, 4]))
    with pytest.raises(ValueError, match=r"n_k must be at most len_k=12, got 13"):
        compiled(Q, torch.tensor([3, 13]))
    with pytest.raises(ValueError, match=r"integers >= 0, got -1 among them"):
        compiled(Q, torch.tensor([-1, 3]))
    with pytest.raises(ValueError, match="is for a batch of 3, but batch is 2"):
        compiled(Q, torch.tensor([1, 2, 3]))


GIVEN = '{"given":[[12],"int32",0,5,%d]}'
RULE = f'{{"Documents":[{GIVEN},{GIVEN},false]}}'
BIAS = '{"Bias":[{"input":[0,"float32",[2,12,12]]}]}'
OPTIONS = 'null,"bhnd","highest"'
FORGED = {
    "an array of a mask that is too short": (
        f"[0,[{RULE % (1, 1)},{OPTIONS},null,0,0.0]]",
        [torch.arange(9, dtype=torch.int32)],
        "the array 1 of mask was int32 of shape",
    ),
    "arrays of which one is too short": (
        f"[0,[{RULE % (1, 2)},{OPTIONS},null,0,0.0]]",
        [torch.arange(12, dtype=torch.int32), torch.arange(9, dtype=torch.int32)],
        "the array 2 of mask was int32 of shape",
    ),
    "a seed without entries": (f"[0,[null,{OPTIONS},null,0,0.5]]", [torch.arange(0)], "seed must"),
    "a seed of floats": (f"[0,[null,{OPTIONS},null,0,0.5]]", [torch.ones(1)], "of int64, got"),
    "no seed": (f"[0,[null,{OPTIONS},null,0,0.5]]", [], "reads 1 extra arrays or more, got 0"),
    "no sinks": (f"[0,[null,{OPTIONS},null,3,0.0]]", [], "reads 1 extra arrays or more, got 0"),
    "no array of a score": (
        f"[0,[null,{OPTIONS},{BIAS},0,0.0]]",
        [],
        "array 0 of score is missing",
    ),
    "options by name": ('[0,{"a":1,"b":2,"c":3,"d":4,"e":5,"f":6,"g":7}]', [], "is no text"),
    "fewer arrays than none": (f"[-1,[null,{OPTIONS},null,0,0.0]]", [], "is no text"),
}


@pytest.mark.parametrize("name", FORGED)
def test_operators_read_no_arrays_but_those_that_their_text_describes(name: str) -> None:
    text, arrays, message = FORGED[name]
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.tilefold.attention_extended(Q, Q, Q, arrays, text, [0], False)


def test_rules_that_leave_their_graph_stay_rules() -> None:
    torch._dynamo.reset()

    @torch._dynamo.disable
    def eagerly(q: Any, mask: Any) -> Any:
        return attention(q, q, q, mask=mask)

    def function(q: Any, n: Any) -> Any:
        return eagerly(q, lengths(n) & rule(lambda q, k: q >= k))

    n = torch.tensor([3, 9])
    compiled = torch.compile(function, backend="aot_eager")
    assert torch.equal(compiled(Q, n), function(Q, n))


def test_an_error_outside_of_a_graph_names_the_argument() -> None:
    compiled = torch.compile(lambda q: made(documents)(q, [0.5] * 12), backend="eager")
    with pytest.raises(TypeError, match=r"^documents: ids_q must be integers, got float64"):
        compiled(Q)


class Model(torch.nn.Module):
    def forward(self, q: Any, n: Any) -> Any:
        return attention(q, q, q, mask=lengths(n) & causal() & documents([0] * 5 + [1] * 7))


@pytest.mark.feature("T09")
@pytest.mark.filterwarnings("ignore")  # torch's own: jit.trace is old, and keeps the known array
def test_exported_programs_are_saved_and_loaded(tmp_path: Path) -> None:
    logging.getLogger("torch.export").setLevel(logging.CRITICAL)
    n = torch.tensor([3, 9])
    program = torch.export.export(Model(), (Q, n))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for other in (n, torch.tensor([12, 1])):
        assert torch.equal(loaded(Q, other), Model()(Q, other))
    traced = torch.jit.trace(Model(), (Q, n), check_trace=False)
    assert torch.equal(traced(Q, torch.tensor([12, 1])), Model()(Q, torch.tensor([12, 1])))
    assert torch.equal(copy.deepcopy(loaded)(Q, n), Model()(Q, n))


@pytest.mark.filterwarnings("ignore")  # torch's own, of its serialisation
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles C++ by g++")
def test_a_package_of_aot_inductor(tmp_path: Path) -> None:
    n = torch.tensor([3, 9])
    program = torch.export.export(Model(), (Q, n))
    path = torch._inductor.aoti_compile_and_package(program, package_path=f"{tmp_path}/model.pt2")
    model = torch._inductor.aoti_load_package(path)
    for other in (n, torch.tensor([12, 1])):
        assert torch.equal(model(Q, other), Model()(Q, other))


def mapped(q: Any, n: Any, bias: Any) -> Any:
    """Each entry of an axis has lengths and a bias of its own."""
    call = torch.vmap(lambda q, n, b: attention(q, q, q, mask=lengths(n), score=tilefold.bias(b)))
    return call(q, n, bias)


def loss(q: Any) -> Any:
    return attention(q, q, q, mask=lengths([5, 12])).square().sum()


@pytest.mark.parametrize("fullgraph", [True, False])
def test_transforms_inside_of_compiled_functions(fullgraph: bool) -> None:
    """`vmap` stays in the graph; what is differentiated in it leaves, and fullgraph says so."""
    torch._dynamo.reset()
    q, n, bias = torch.stack([Q, Q + 1]), torch.tensor([[3, 4], [12, 1]]), torch.randn(2, 2, 1, 12)
    options: dict[str, Any] = {"backend": "aot_eager", "fullgraph": fullgraph}
    for got, *given in zip(torch.compile(mapped, **options)(q, n, bias), q, n, bias, strict=True):
        entry, of_entry, its = given
        score = tilefold.bias(its)
        assert torch.equal(got, attention(*[entry] * 3, mask=lengths(of_entry), score=score))
    gradient = torch.func.grad(loss)
    for function, leaf in ((gradient, Q), (torch.vmap(gradient), q)):
        compiled = torch.compile(function, **options)
        if fullgraph:
            with pytest.raises(torch._dynamo.exc.Unsupported, match="are no part of a graph"):
                compiled(leaf)
        else:
            assert torch.equal(compiled(leaf), function(leaf))


def test_frames_that_are_compiled_alone_leave_requests_to_others() -> None:
    """After many recompilations PyTorch runs a frame without its compiler, those below with it."""
    from tilefold.frontends.torch import calls

    torch._dynamo.reset()
    asked = torch.compile(
        lambda n: calls.request_of(lengths(n), None, "bhnd", "highest"), backend="eager"
    )
    found = asked(torch.tensor([3, 9]))
    assert torch.equal(calls.attention(Q, Q, Q, found)[0], given(Q, lengths([3, 9])) / 2)
    score = tilefold.softcap(2.0)
    plain = calls.whole(found)
    more = torch.compile(lambda: calls.extended_request(plain, score, 0, 0.0), backend="eager")
    assert more()[0].score == score.form.score
