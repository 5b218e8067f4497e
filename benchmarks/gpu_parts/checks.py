"""What calls on a GPU promise beside right numbers: bits, graphs, streams, autograd, compilers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from gpu_parts import attend
from gpu_parts.section import Here, Row, Stage
from tilefold.backends.triton import calls
from tilefold.backends.triton.dispatch import execute
from tilefold.masks.position_rules import causal
from tilefold.problems.attention import Problem, default_scale

if TYPE_CHECKING:
    from torch import Tensor

MASK = causal()


def _problem(stage: Stage, len_q: int = 1000) -> Problem:
    """Grouped heads and lengths that are no whole blocks; few for the interpreter."""
    length = 1200 if stage.on_gpu else 40
    return Problem(
        batch=2,
        heads_q=4,
        heads_kv=2,
        len_q=min(len_q, length),
        len_k=length,
        dim=64,
        dim_v=64,
        dtype="float16",
        scale=default_scale(64),
        mask=MASK,
    )


def _same(name: str, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """Raises AssertionError unless all bits agree."""
    import torch

    for number, (one, other) in enumerate(zip(got, want, strict=True)):
        if not torch.equal(one, other):
            apart = int((one != other).sum())
            raise AssertionError(f"{name}: result {number}: {apart} of {one.numel()} differ")


def _twice(stage: Stage, operation: str, form: str) -> None:
    """Two runs with the same operands give the same bits."""
    problem = _problem(stage, 3 if form == "decode" else 1000)
    given = attend.tensors(stage, problem)
    if operation == "backward":
        given = attend.with_forward(stage, problem, given)
    call = attend.own(stage, problem, given, operation, form)
    first = tuple(tensor.clone() for tensor in call())
    for _ in range(3):
        _same(form, call(), first)


def _both(stage: Stage, given: attend.Tensors) -> tuple[Tensor, ...]:
    """o, lse, dq, dk and dv by the calls of the backend."""
    q, k, v, do = (given[name] for name in ("q", "k", "v", "do"))
    on: dict[str, Any] = {"mask": MASK, "machine": stage.machine}
    o, lse = calls.attention(q, k, v, **on)
    return (o, lse, *calls.attention_backward(do, q, k, v, o, lse, **on))


def _graph(stage: Stage) -> None:
    """A recorded graph gives, on other numbers, what the same calls give."""
    import torch

    given = attend.tensors(stage, _problem(stage))
    _both(stage, given)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        recorded = _both(stage, given)
    for name, tensor in attend.tensors(stage, _problem(stage), seed=1).items():
        given[name].copy_(tensor)
    graph.replay()
    replayed = tuple(tensor.clone() for tensor in recorded)
    _same("graph", replayed, _both(stage, given))


def _stream(stage: Stage) -> None:
    """On a stream of one's own, after work on that stream alone, the results are the same."""
    import torch

    given = attend.tensors(stage, _problem(stage))
    want = _both(stage, given)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        late = {name: tensor.clone() for name, tensor in given.items()}
        got = _both(stage, late)
    side.synchronize()
    _same("stream", got, want)


def _frontend(given: attend.Tensors, compiled: bool) -> tuple[Tensor, ...]:
    """o, dq, dk and dv by `tilefold.attention` and autograd."""
    import torch

    from tilefold import attention

    def model(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attention(q, k, v, mask=MASK)

    run: Any = torch.compile(model, fullgraph=True) if compiled else model
    inputs = [given[name].detach().requires_grad_() for name in ("q", "k", "v")]
    o = run(*inputs)
    return (o.detach(), *torch.autograd.grad(o, inputs, given["do"]))


def _differentiated(stage: Stage, compiled: bool) -> None:
    """Autograd, through a compiled model or not, gives the bits of the calls."""
    given = attend.tensors(stage, _problem(stage))
    o, _, *slopes = _both(stage, given)
    _same("autograd", _frontend(given, compiled), (o, *slopes))


def _far(stage: Stage) -> None:
    """Rows further apart than 2**31 numbers; untouched memory lies between them (17 GB)."""
    import torch

    problem = Problem.of((1, 2, 3, 2), dtype="float16")
    near = attend.tensors(stage, problem)
    want = attend.exact(problem, near)
    far = 2**31 + 16
    base = torch.empty(4 * far, dtype=torch.float16, device=stage.device)
    strides = {"q": (1, far, 1, 16), "k": (1, 16, far, 1), "v": (1, 16, 1, far)}
    given: attend.Tensors = {}
    for number, (name, steps) in enumerate(strides.items()):
        given[name] = base.as_strided((1, 2, 3, 2), steps, 100 * number)
        given[name].copy_(near[name])
    given["o"] = base.as_strided((1, 2, 3, 2), (1, 16, far, 1), 300)
    given["lse"] = stage.machine.empty((1, 2, 3), "float32")
    with stage.machine.active():
        execute(attend.planned(stage, problem, "forward", "tiled"), stage.machine, given)
    attend.error(problem, "forward", (given["o"],), want)


REFUSED = ("is not possible", "multiplies no tiles", "tensors need PyTorch")
"""What errors say of which nobody promises that it works: forms that do not fit, old versions."""

BITS = "the same bits every time"

PROMISES: dict[str, dict[str, Callable[[Stage], None]]] = {
    BITS: {
        **{
            f"forward {form}": functools.partial(_twice, operation="forward", form=form)
            for form in (*attend.forms("forward"), "decode")
        },
        **{
            f"backward {form}": functools.partial(_twice, operation="backward", form=form)
            for form in attend.forms("backward")
        },
    },
    "a CUDA graph": {"graph": _graph},
    "a stream of one's own": {"stream": _stream},
    "autograd": {"autograd": functools.partial(_differentiated, compiled=False)},
    "torch.compile": {"compile": functools.partial(_differentiated, compiled=True)},
    "strides past 31 bits": {"far": _far},
}
"""What is tried, by name: parts of a row, which raise where a promise is broken."""


def measure(name: str, here: Here) -> Row:
    """Whether a promise is kept."""
    if not here.stage.on_gpu and name != BITS:
        reason = "is not possible in the interpreter"
        return {"case": name, "ran": [], "failures": {}, "absent": {name: reason}}
    parts = {part: functools.partial(run, here.stage) for part, run in PROMISES[name].items()}
    return {"case": name, **tried(parts.items(), here)}


def tried(parts: Iterable[tuple[str, Callable[[], None]]], here: Here) -> Row:
    """Parts that were run, those that failed, and those that a plan or a version rules out."""
    row: Row = {"ran": [], "failures": {}, "absent": {}}
    for part, run in parts:
        reasons: dict[str, str] = {}
        here.attempt(part, run, reasons)
        reason = reasons.get(part)
        if reason and any(word in reason for word in REFUSED):
            row["absent"][part] = reason
            continue
        row["ran"].append(part)
        if reason:
            row["failures"][part] = reason
    return row
