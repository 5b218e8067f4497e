"""A plain eager call skips PyTorch's dispatcher; whoever could see the difference sees none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kept import kept_plans
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import tilefold
import tilefold.frontends.torch.calls  # gives the operators their derivatives
from tilefold.backends import calls
from tilefold.backends.cpu import dispatch
from tilefold.frontends.torch import operators
from tilefold.problems.request import Request

MASK = tilefold.causal()
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def direct(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    result: Tensor = tilefold.attention(q, k, v, mask=MASK)
    return result


def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    result: Tensor = operators.run(Request(MASK), q, k, v)[0]
    return result


def tensors() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, 2, 4, 3, dtype=torch.float64) for _ in range(3)]


def leaf() -> list[Tensor]:
    q, k, v = tensors()
    return [q.requires_grad_(), k, v]


class Names(TorchDispatchMode):
    """Notes the operators that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """Notes the functions that are called on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Tagged(Tensor):
    """A subclass."""


def in_no_mode(function: Function) -> Any:
    return function(*tensors())


def without_gradients(function: Function) -> Any:
    with torch.no_grad():
        o = function(*leaf())
    return o, o.requires_grad


def with_gradients(function: Function) -> Any:
    inputs = [tensor.requires_grad_() for tensor in tensors()]
    o = function(*inputs)
    (o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o)).sum().backward()
    state = o.requires_grad, o.is_leaf, o._is_view(), o._version
    return o, *[tensor.grad for tensor in inputs], state


def of_a_parameter(function: Function) -> Any:
    q, k, v = tensors()
    parameter = torch.nn.Parameter(q)
    o = function(parameter, k, v)
    o.sum().backward()
    return o, parameter.grad, type(o)


def of_views_changed_later(function: Function) -> Any:
    q, k, v = leaf()
    o = function(q, k, v)
    with torch.no_grad():
        q.mul_(2)
    o.sum().backward()


def twice_differentiated(function: Function) -> Any:
    q, k, v = leaf()
    (dq,) = torch.autograd.grad(function(q, k, v).sum(), q, create_graph=True)
    dq.sum().backward()
    return q.grad


def hessian_product(function: Function) -> Any:
    q, k, v = tensors()
    return torch.autograd.functional.hvp(lambda q: function(q, k, v).sum(), q, torch.ones_like(q))


def with_an_undefined_gradient(function: Function) -> Any:
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> None:
            return None

    q, k, v = leaf()
    Stop.apply(function(q, k, v)).sum().backward()
    return q.grad


def with_batched_gradients(function: Function) -> Any:
    q, k, v = leaf()
    o = function(q, k, v)
    return torch.autograd.grad(o, q, torch.stack([o, -o]), is_grads_batched=True)


def in_a_checkpoint(function: Function) -> Any:
    q, k, v = leaf()
    checkpoint(function, q, k, v, use_reentrant=False).sum().backward()
    return q.grad


def with_hooks_on_what_is_saved(function: Function) -> Any:
    packed = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tuple(tensor.shape))
        return tensor.clone()

    q, k, v = leaf()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        o = function(q, k, v)
    o.sum().backward()
    return q.grad, packed


def in_inference_mode(function: Function) -> Any:
    with torch.inference_mode():
        o = function(*tensors())
    return o.clone(), o.is_inference()


def of_inference_tensors_and_gradients(function: Function) -> Any:
    with torch.inference_mode():
        q, k, v = tensors()
    return function(q.clone().requires_grad_(), k, v)


def in_autocast(function: Function) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return function(*tensors())


def in_a_dispatch_mode(function: Function) -> Any:
    with Names() as mode:
        o = function(*tensors())
    assert "tilefold.attention.default" in mode.seen
    return o


def in_a_dispatch_mode_backward(function: Function) -> Any:
    q, k, v = leaf()
    o = function(q, k, v)
    with Names() as mode:
        o.sum().backward()
    assert "tilefold.attention_backward.default" in mode.seen
    return q.grad


def in_a_function_mode(function: Function) -> Any:
    with Functions() as mode:
        o = function(*tensors())
    assert "tilefold.attention.default" in mode.seen
    return o


def of_a_subclass(function: Function) -> Any:
    q, k, v = tensors()
    o = function(q.as_subclass(Tagged), k, v)
    return o.as_subclass(Tensor), type(o)


def of_fake_tensors(function: Function) -> Any:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        return function(*[mode.from_tensor(tensor) for tensor in tensors()]).shape


def of_real_tensors_in_a_fake_mode(function: Function) -> Any:
    from torch._subclasses import FakeTensorMode

    inputs = tensors()
    with FakeTensorMode():
        return function(*inputs)


def of_lazily_negated_tensors(function: Function) -> Any:
    q, k, v = tensors()
    return function(torch.complex(torch.zeros_like(q), q).conj().imag, k, v)


def traced_by_make_fx(function: Function) -> Any:
    from torch.fx.experimental.proxy_tensor import make_fx

    traced = make_fx(function)(*tensors())
    assert "torch.ops.tilefold.attention.default" in traced.code
    return traced(*tensors())


def traced_by_jit(function: Function) -> Any:
    return torch.jit.trace(function, tensors())(*tensors())


def in_vmap(function: Function) -> Any:
    return torch.func.vmap(function)(*[tensor[None] for tensor in tensors()])


def in_a_profiler(function: Function) -> Any:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(*tensors())
    return [event.key for event in profile.key_averages() if "tilefold" in event.key]


CASES = [
    in_no_mode,
    without_gradients,
    with_gradients,
    of_a_parameter,
    of_views_changed_later,
    twice_differentiated,
    hessian_product,
    with_an_undefined_gradient,
    with_batched_gradients,
    in_a_checkpoint,
    with_hooks_on_what_is_saved,
    in_inference_mode,
    of_inference_tensors_and_gradients,
    in_autocast,
    in_a_dispatch_mode,
    in_a_dispatch_mode_backward,
    in_a_function_mode,
    of_a_subclass,
    of_fake_tensors,
    of_real_tensors_in_a_fake_mode,
    of_lazily_negated_tensors,
    traced_by_make_fx,
    traced_by_jit,
    in_vmap,
    in_a_profiler,
]


def outcome(case: Callable[[Function], Any], function: Function) -> Any:
    """What a case returns, or the error that it raises."""
    try:
        return case(function)
    except AssertionError as error:
        assert "FakeTensor" in str(error), error
        return type(error), str(error)
    except Exception as error:
        return type(error), str(error)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, of its tracers and of vmap
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_direct_call_is_what_the_operator_is(case: Callable[[Function], Any]) -> None:
    got, want = outcome(case, direct), outcome(case, operator)
    assert type(got) is type(want)
    if isinstance(want, Tensor):
        got, want = [got], [want]
    for a, b in zip(got, want, strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        else:
            assert a == b


@pytest.mark.slow
def test_a_plain_call_meets_no_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("the operator was called")

    with monkeypatch.context() as patch:
        patch.setattr(operators, "attention", never)
        patch.setattr(operators, "attention_backward", never)
        o, lse = tilefold.attention(*tensors(), return_lse=True)
        tilefold.attention_backward(o, *tensors(), o, lse)
        inputs = leaf()
        direct(*inputs).sum().backward()
    assert inputs[0].grad is not None


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The operations that are prepared meanwhile."""
    seen: list[str] = []
    real = dispatch.prepare

    def prepare(plan: Any, *rest: Any) -> dispatch.Call:
        seen.append(plan.operation)
        return real(plan, *rest)

    calls.calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "prepare", prepare)
        yield seen


def test_strides_and_types_are_part_of_a_prepared_call(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors()
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    with counted(monkeypatch) as prepared:
        for _ in range(2):
            expected = direct(q, k, v)
            assert torch.equal(direct(turned, k, v), expected)
            assert torch.equal(direct(q.clone(), k.clone(), v), expected)
            single = direct(q.float(), k.float(), v.float())
            torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-5)
    assert prepared == ["forward"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_precision_reaches_the_planner(compiled: bool) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result: Tensor = tilefold.attention(q, k, v, precision="medium")
        return result

    calls.calls.clear()
    function = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    q, k, v = (tensor.float() for tensor in tensors())
    function(q.requires_grad_(), k, v).sum().backward()
    seen = {(made.operation, made.problem.precision) for made in kept_plans()}
    assert seen == {("forward", "medium"), ("backward", "medium")}


def test_arrays_and_tensors_of_one_form_are_not_mixed_up() -> None:
    """NumPy counts strides in bytes, torch in elements."""
    q = torch.randn(1, 1, 2, 64, dtype=torch.float64)
    wide = torch.as_strided(torch.randn(2000, dtype=torch.float64), q.shape, (1024, 1024, 512, 8))
    expected = tilefold.attention(q, q, q)
    assert torch.equal(tilefold.attention(q, wide, q), tilefold.attention(q, wide.clone(), q))
    assert (tilefold.attention(q.numpy(), q.numpy(), q.numpy()) == expected.numpy()).all()


def test_a_dual_level_alone_is_no_reason_to_raise() -> None:
    with forward_ad.dual_level():
        o = direct(*tensors())
    assert torch.equal(o, direct(*tensors()))
