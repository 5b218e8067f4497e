"""One attention problem on a GPU: its tensors, tilefold and its rivals as calls, and the check.

A call launches on tensors that are there, in the layout (batch, heads, sequence, dim), and returns
its results. Whether these are right is asked once, before anything is timed: on the last head of
the last batch, against the definition in float64.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gpu_parts.section import Here, Row, Stage
from gpu_parts.timing import Call
from tilefold.backends.triton.dispatch import is_aligned16, prepare
from tilefold.backends.triton.launch import TritonPlan
from tilefold.backends.triton.plan import FORMS, plan
from tilefold.masks.position_rules import causal, full
from tilefold.measuring.baselines import TOLERANCE
from tilefold.problems.attention import STATISTICS, Problem

if TYPE_CHECKING:
    from torch import Tensor

Tensors = dict[str, Any]
Maker = Callable[[], Call]

RESULTS = {"forward": ("o",), "backward": ("dq", "dk", "dv")}
"""What is compared, in the order in which calls return it."""

BACKENDS = {
    "torch flash": "FLASH_ATTENTION",
    "torch cuDNN": "CUDNN_ATTENTION",
    "torch efficient": "EFFICIENT_ATTENTION",
}
"""Backends of `scaled_dot_product_attention` by their names in tables."""

FLEX, PLAIN = "torch flex", "Triton plain"


def forms(operation: str) -> tuple[str, ...]:
    """The forms of an operation that are measured: all that a plan may be told."""
    return tuple(form for form in FORMS[operation] if form not in ("auto", "decode"))


def named(form: str) -> str:
    """A form of tilefold's in tables."""
    return f"tilefold {form}"


def tensors(stage: Stage, problem: Problem, seed: int = 0) -> Tensors:
    """q, k, v and do of normal numbers."""
    import torch

    p = problem
    source = torch.Generator(stage.device).manual_seed(seed)
    shapes = {
        "q": (p.batch, p.heads_q, p.len_q, p.dim),
        "k": (p.batch, p.heads_kv, p.len_k, p.dim),
        "v": (p.batch, p.heads_kv, p.len_k, p.dim_v),
        "do": (p.batch, p.heads_q, p.len_q, p.dim_v),
    }
    options: dict[str, Any] = {"device": stage.device, "dtype": getattr(torch, p.dtype)}
    return {name: torch.randn(s, generator=source, **options) for name, s in shapes.items()}


# tilefold --------------------------------------------------------------------------------------


def planned(stage: Stage, problem: Problem, operation: str, form: str) -> TritonPlan:
    """The plan of a form on this machine. Raises NotImplementedError for one that is left out."""
    if form in stage.without:
        raise NotImplementedError(f"form {form!r} is not possible here: {stage.without[form]}")
    return plan(problem, stage.machine.architecture, operation, form=form)


def own(stage: Stage, problem: Problem, given: Tensors, operation: str, form: str) -> Call:
    """tilefold's kernels of a form, with the results made ahead; scratch is made in the call."""
    made = planned(stage, problem, operation, form)
    operands = dict(given) if operation == "backward" else {n: given[n] for n in ("q", "k", "v")}
    if operation == "backward":
        operands |= {"o": given["o"], "lse": given["lse"]}
        operands |= {f"d{n}": stage.machine.empty(given[n].shape, problem.dtype) for n in "qkv"}
    else:
        shape = (problem.batch, problem.heads_q, problem.len_q)
        operands["o"] = stage.machine.empty((*shape, problem.dim_v), problem.dtype)
        operands["lse"] = stage.machine.empty(shape, STATISTICS[problem.dtype])
    strides = {name: tuple(tensor.stride()) for name, tensor in operands.items()}
    with stage.machine.active():
        ready = prepare(made, stage.machine, strides, is_aligned16(operands))
    results = ("o", "lse") if operation == "forward" else RESULTS[operation]

    def call() -> tuple[Tensor, ...]:
        with stage.machine.active():
            ready.run(operands)
        return tuple(operands[name] for name in results)

    return call


def with_forward(stage: Stage, problem: Problem, given: Tensors) -> Tensors:
    """The tensors with o and lse, for backward passes; by the plain kernel."""
    o, lse = own(stage, problem, given, "forward", "tiled")()
    return {**given, "o": o, "lse": lse}


def kernels(made: TritonPlan) -> list[str]:
    """What a plan launches, and in which blocks."""
    return [
        f"{launch.spec.entry}: {launch.spec.blocks}, {launch.programs} programs"
        for launch in made.launches
    ]


# Rivals ----------------------------------------------------------------------------------------


def native(problem: Problem, given: Tensors, operation: str, backend: str) -> Call:
    """`scaled_dot_product_attention` held to one backend."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if problem.mask not in (full(), causal()):
        raise NotImplementedError("no flag of torch says this mask")
    options: dict[str, Any] = {"is_causal": problem.mask == causal()}
    if problem.heads_q != problem.heads_kv:
        options["enable_gqa"] = True
    attend: Any = torch.nn.functional.scaled_dot_product_attention
    kind = getattr(SDPBackend, backend)

    def run(*inputs: Tensor) -> Tensor:
        with sdpa_kernel(kind):
            found: Tensor = attend(*inputs, **options)
        return found

    return _differentiated(run, given, operation)


def flex(problem: Problem, given: Tensors, operation: str, block_mask: Any = None) -> Call:
    """FlexAttention, compiled for these shapes."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    options: dict[str, Any] = {} if block_mask is None else {"block_mask": block_mask}
    if problem.heads_q != problem.heads_kv:
        options["enable_gqa"] = True
    attend: Any = torch.compile(flex_attention, dynamic=False)
    return _differentiated(lambda q, k, v: attend(q, k, v, **options), given, operation)


def forget_compiled() -> None:
    """For each row: Dynamo compiles a function eight times at most, then no longer, quietly."""
    import torch

    torch.compiler.reset()


def _differentiated(run: Callable[..., Any], given: Tensors, operation: str) -> Call:
    """The call itself, or that of its gradient, whose forward pass is made once here."""
    import torch

    inputs = [given[name].detach() for name in ("q", "k", "v")]
    if operation == "forward":
        return lambda: (run(*inputs),)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    o = run(*inputs)
    return lambda: torch.autograd.grad(o, inputs, given["do"], retain_graph=True)


def causal_blocks(stage: Stage, problem: Problem) -> Any:
    """FlexAttention's block mask of what SDPA calls causal; None for all pairs."""
    from torch.nn.attention.flex_attention import create_block_mask

    if problem.mask == full():
        return None
    assert problem.mask == causal() and problem.len_q == problem.len_k
    lengths = problem.len_q, problem.len_k
    return create_block_mask(lambda b, h, q, k: q >= k, None, None, *lengths, device=stage.device)


def rivals(stage: Stage, problem: Problem, given: Tensors, operation: str) -> dict[str, Maker]:
    """All others that may serve a problem that is full or causal, by name."""
    found: dict[str, Maker] = {
        name: functools.partial(native, problem, given, operation, backend)
        for name, backend in BACKENDS.items()
    }
    if operation == "forward":
        from gpu_parts import flash

        found[PLAIN] = functools.partial(flash.fastest, stage, problem, given)
    found[FLEX] = lambda: flex(problem, given, operation, causal_blocks(stage, problem))
    return found


# Whether it is right ---------------------------------------------------------------------------


def exact(problem: Problem, given: Tensors, visible: Tensor | None = None) -> Tensors:
    """o, dq, dk and dv of the last head of the last batch, by the definition in float64.

    dk and dv are those of that query head alone: the same where each has keys of its own.
    `visible` are the pairs; without it they follow from the mask, which is full or causal.
    """
    import torch

    q, k, v, do = (given[name][-1, -1].double() for name in ("q", "k", "v", "do"))
    s = problem.scale * (q @ k.T)
    if visible is not None:
        s.masked_fill_(~visible, -torch.inf)
    elif problem.mask == causal():
        hidden = torch.ones_like(s, dtype=torch.bool).triu_(1 + problem.len_k - problem.len_q)
        s.masked_fill_(hidden, -torch.inf)
    p = s.softmax(1).nan_to_num_(0.0)  # a query without a key
    o = p @ v
    ds = p * (do @ v.T - (do * o).sum(1, keepdim=True))
    slopes = {"dq": problem.scale * (ds @ k), "dk": problem.scale * (ds.T @ q), "dv": p.T @ do}
    return {"o": o, **slopes}


def error(problem: Problem, operation: str, found: Any, want: Mapping[str, Tensor]) -> float:
    """The largest relative error of the results. Raises ArithmeticError above the tolerance."""
    worst = 0.0
    for name, tensor in zip(RESULTS[operation], found, strict=False):
        difference = tensor[-1, -1].double() - want[name]
        apart = float(difference.norm() / want[name].norm())
        if not apart <= TOLERANCE[problem.dtype]:
            raise ArithmeticError(f"{name} is something else: relative error {apart:.1e}")
        worst = max(worst, apart)
    return worst


def part_of(name: str, problem: Problem, operation: str) -> str:
    """An implementation with what its kernels are compiled for, the length left out."""
    return f"{name}, {operation} {problem.dtype} d{problem.dim} {problem.mask}"


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Adds to a RuntimeError what was warned of before: torch tells there why it has no kernel."""
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        try:
            yield
        except RuntimeError as error:
            texts = dict.fromkeys(" ".join(str(each.message).split())[:160] for each in noted)
            if type(error) is not RuntimeError or not texts:
                raise
            raise RuntimeError(f"{error} ({'; '.join(list(texts)[:4])})") from error


def checked(
    here: Here,
    makers: Mapping[str, Maker],
    problem: Problem,
    operation: str,
    want: Mapping[str, Tensor],
) -> tuple[dict[str, Call], dict[str, Row]]:
    """The calls that are right, and a row of each maker: its error, or the reason why not.

    A part is a text of a kernel (`part_of`): one that hangs is left out wherever it would serve.
    """
    calls: dict[str, Call] = {}
    rows: dict[str, Row] = {}
    for name, make in makers.items():
        reasons: dict[str, str] = {}

        def ready(make: Maker = make) -> tuple[Call, float]:
            with explained():
                call = make()
                found = call()
            return call, error(problem, operation, found, want)

        part = part_of(name, problem, operation)
        made = here.attempt(part, ready, reasons)
        if made is None:
            rows[name] = {"reason": reasons[part]}
        else:
            calls[name], apart = made
            rows[name] = {"relative_error": apart}
    return calls, rows
