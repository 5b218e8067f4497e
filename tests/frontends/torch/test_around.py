"""What PyTorch puts around a call: checkpoints, subclasses, modes, tensors without data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import tilefold
from tilefold import attention, attention_backward, causal, merge
from tilefold.frontends.torch import tensors

SHAPE = 2, 4, 6, 8
RANDOM = torch.Generator().manual_seed(0)
Q, K, V = (torch.randn(SHAPE, generator=RANDOM) for _ in range(3))
BIAS = torch.randn(4, 6, 6, generator=RANDOM)
SINKS = torch.randn(4, generator=RANDOM)


def plain(*given: Tensor) -> Tensor:
    made: Tensor = attention(*given[:3], mask=causal())
    return made


def everything(*given: Tensor) -> Tensor:
    q, k, v, bias, sinks = given
    score = [tilefold.bias(bias), tilefold.softcap(5.0)]
    made: Tensor = attention(q, k, v, mask=causal(), score=score, sinks=sinks, dropout=0.2)
    return made


WAYS = [plain, everything]


def with_gradients(function: Callable[..., Tensor]) -> list[Tensor | None]:
    """The result of a function, and its gradients; dropout begins with the same numbers."""
    torch.manual_seed(0)
    given = [x.clone().requires_grad_() for x in (Q, K, V, BIAS, SINKS)]
    o = function(*given)
    o.square().sum().backward()
    return [o.detach(), *[x.grad for x in given]]


def same(found: list[Tensor | None], want: list[Tensor | None]) -> None:
    for one, other in zip(found, want, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert torch.equal(one, other)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """ "forward" or "backward" for each pass from now on."""
    seen: list[str] = []
    real = tensors.run

    def run(wanted: Any, *rest: Any) -> Any:
        seen.append("backward" if "dq" in wanted.results else "forward")
        return real(wanted, *rest)

    monkeypatch.setattr(tensors, "run", run)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("function", WAYS)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_checkpoint_computes_it_again(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., Tensor], reentrant: bool
) -> None:
    """The same pairs fall out: a seed is drawn from torch's generator, which is set back."""
    want = with_gradients(function)
    passes = counted(monkeypatch)
    found = with_gradients(lambda *x: checkpoint(function, *x, use_reentrant=reentrant))
    same(found, want)
    assert passes == ["forward", "forward", "backward"]


@pytest.mark.slow
@pytest.mark.parametrize("function", WAYS)
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "computed again"])
def test_a_selective_checkpoint_may_keep_results(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., Tensor], keep: bool
) -> None:
    def policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        ours = str(operator).startswith("tilefold.attention")
        choice = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
        return choice[0] if keep and ours else choice[1]

    contexts = partial(create_selective_checkpoint_contexts, policy)
    want = with_gradients(function)
    passes = counted(monkeypatch)
    found = with_gradients(
        lambda *x: checkpoint(function, *x, use_reentrant=False, context_fn=contexts)
    )
    same(found, want)
    assert passes == ["forward"] * (2 - keep) + ["backward"]


class Wrapped(Tensor):
    """A subclass that holds another tensor, and notes what is done with it."""

    seen: ClassVar[list[str]] = []
    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Wrapped:
        made: Wrapped = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(func))
        args, kwargs = tree_map(lambda x: x.held if isinstance(x, cls) else x, (args, kwargs or {}))
        return tree_map(lambda x: cls(x) if isinstance(x, Tensor) else x, func(*args, **kwargs))


@pytest.mark.slow
@pytest.mark.parametrize("function", WAYS)
def test_a_subclass_that_wraps_a_tensor_sees_one_operator_for_each_pass(
    function: Callable[..., Tensor],
) -> None:
    want = with_gradients(function)
    torch.manual_seed(0)
    given = [Wrapped(x.clone()).requires_grad_() for x in (Q, K, V, BIAS, SINKS)]
    Wrapped.seen.clear()
    o = function(*given)
    o.square().sum().backward()
    found = [o, *[x.grad for x in given]]
    assert all(x is None or isinstance(x, Wrapped) for x in found)
    same([x.held if isinstance(x, Wrapped) else None for x in found], want)
    operators = [name for name in Wrapped.seen if name.startswith("tilefold")]
    assert len(operators) == 2 and "backward" in operators[1] and "backward" not in operators[0]


class Logging(Tensor):
    """A subclass that notes the functions of torch that it meets."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.slow
@pytest.mark.parametrize("function", WAYS)
def test_a_subclass_with_a_torch_function_sees_the_operator(
    function: Callable[..., Tensor],
) -> None:
    want = with_gradients(function)
    torch.manual_seed(0)
    given = [x.clone().as_subclass(Logging).requires_grad_() for x in (Q, K, V, BIAS, SINKS)]
    Logging.seen.clear()
    o = function(*given)
    o.square().sum().backward()
    assert type(o) is Logging
    assert any("tilefold" in name for name in Logging.seen)
    found = [o.detach(), *[x.grad for x in given]]
    same([x if x is None else x.as_subclass(Tensor) for x in found], want)


@pytest.mark.parametrize("place", ["meta", "fake"])
def test_tensors_without_data_have_shapes_and_gradients(place: str) -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() if place == "fake" else torch.device("meta"):
        q = torch.empty(SHAPE, dtype=torch.bfloat16, requires_grad=True)
        k = torch.empty(2, 2, 5, 8, dtype=torch.bfloat16)
        v = torch.empty(2, 2, 5, 3, dtype=torch.bfloat16)
        bias = torch.empty(4, 6, 5, requires_grad=True)
        options: dict[str, Any] = {"score": tilefold.bias(bias), "sinks": torch.empty(4)}
        o, lse = attention(q, k, v, return_lse=True, **options)
        o.sum().backward()
        parts = merge(o, lse, o, lse)
        gradients = attention_backward(o, q, k, v, o, lse, **options)
    assert q.grad is not None and bias.grad is not None
    assert (o.shape, o.dtype) == ((2, 4, 6, 3), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 4, 6), torch.float32)
    assert [x.shape for x in parts] == [o.shape, lse.shape]
    assert [x.shape for x in gradients] == [x.shape for x in (q, k, v, bias, options["sinks"])]
    assert q.grad.shape == q.shape and bias.grad.shape == bias.shape


def test_inference_mode_gives_inference_tensors() -> None:
    torch.manual_seed(0)
    want = everything(Q, K, V, BIAS, SINKS)
    with torch.inference_mode():
        torch.manual_seed(0)
        o = everything(Q, K, V, BIAS, SINKS)
        again = plain(o, o, o)
    assert o.is_inference() and again.is_inference() and torch.equal(o, want)


def test_deterministic_algorithms_are_what_runs_anyway() -> None:
    want = with_gradients(everything)
    try:
        torch.use_deterministic_algorithms(True)
        found = with_gradients(everything)
    finally:
        torch.use_deterministic_algorithms(False)
    same(found, want)


def jagged() -> Tensor:
    rows = [torch.zeros(n, 4, 8) for n in (3, 5)]
    return torch.nested.nested_tensor(rows, layout=torch.jagged).transpose(1, 2)


REFUSED: dict[str, tuple[Callable[[], Tensor], str]] = {
    "sparse": (lambda: Q.to_sparse(), r"got torch\.sparse_coo; pass {}\.to_dense\(\)"),
    "oneDNN": (lambda: Q.to_mkldnn(), r"got torch\._mkldnn; pass {}\.to_dense\(\)"),
    "jagged": (jagged, r"nested one: pass {}\.to_padded_tensor\(0\.0\), with mask="),
    "quantised": (lambda: torch.quantize_per_tensor(Q, 0.1, 0, torch.qint8), "got qint8"),
    "complex": (lambda: Q + 0j, "got complex64"),
    "8 bits": (lambda: Q.to(torch.float8_e4m3fn), "got float8_e4m3fn"),
    "integers": (lambda: Q.long(), "got int64"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore:.*quantiz")  # torch's own, of types that it will remove
@pytest.mark.filterwarnings("ignore:.*[Nn]ested tensors")
def test_other_kinds_of_tensors_are_refused_in_one_line(kind: str) -> None:
    make, words = REFUSED[kind]
    x = make()
    row = Q[..., 0]
    calls: dict[str, Callable[[], Any]] = {
        "q": lambda: attention(x, x, x),
        "v": lambda: attention(Q, Q, x),
        "do": lambda: attention_backward(x, Q, Q, Q, Q, row),
        "o1": lambda: merge(x, row, Q, row),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"^{name} must be .*{words.format(name)}") as caught:
            call()
        assert "\n" not in str(caught.value)
