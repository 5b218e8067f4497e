"""A tensor whose storage is smaller than its view is refused before it is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tilefold
from tilefold import attention, attention_backward
from tilefold.frontends.torch import operators
from tilefold.problems.request import Request

SHAPE = (1, 2, 40, 8)


def named() -> dict[str, Tensor]:
    """The operands of a backward pass, in the middle of larger storages."""
    sizes = dict.fromkeys(("do", "q", "k", "v", "o"), SHAPE) | {"lse": SHAPE[:3]}
    return {name: torch.zeros(3, *shape)[1] for name, shape in sizes.items()}


def freed(tensor: Tensor, size: int = 0) -> Tensor:
    tensor.untyped_storage().resize_(size)
    return tensor


def forward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Any:
    return attention(q, k, v)


def recorded(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Any:
    return attention(q.requires_grad_(), k, v)


def forward_operator(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Any:
    return operators.run(Request(), q, k, v)[:3]


def composed(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Any:
    return attention(q, k, v, impl="composed")


def backward_operator(*given: Tensor) -> Any:
    return operators.run_backward(Request(), given)[:3]


def merged(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor) -> Any:
    return tilefold.merge(o, lse, v, lse)


CALLS: dict[Callable[..., Any], str] = {
    forward: "qkv",
    recorded: "qkv",
    forward_operator: "qkv",
    composed: "qkv",
    attention_backward: "do q k v o lse",
    backward_operator: "do q k v o lse",
    merged: "v",
}
CASES = [
    (call, name)
    for call, names in CALLS.items()
    for name in (names.split() if " " in names else names)
]


@pytest.mark.feature("T15")
@pytest.mark.parametrize("first", [True, False], ids=["first", "repeated"])
@pytest.mark.parametrize(("call", "name"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_a_freed_tensor_is_refused_by_name(
    call: Callable[..., Any], name: str, first: bool
) -> None:
    given = named()
    if first:
        tilefold.backends.calls.calls.clear()
    else:
        call(*given.values())
    freed(given[name])
    needed = 2 * given[name].nbytes  # the offset, too
    called = "o2" if call is merged else name
    said = f"{called} needs {needed} bytes of memory, and its storage holds 0: it was freed or"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        call(*given.values())


@pytest.mark.feature("T15")
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[:, :, 3:], lambda x: x.mT])
def test_a_storage_cut_short_is_refused_at_the_first_call(view: Callable[[Tensor], Tensor]) -> None:
    k = view(torch.zeros(SHAPE))
    q = torch.zeros(1, 2, 5, k.shape[3])
    attention(q, freed(k, 4 * 640), k)  # to the last byte of its elements
    tilefold.backends.calls.calls.clear()
    with pytest.raises(ValueError, match=r"^k needs 2560 bytes of memory, and its storage holds"):
        attention(q, freed(k, 4 * 639), torch.zeros_like(k))


def test_broadcast_and_empty_tensors_need_little() -> None:
    q = freed(torch.zeros(1, 1, 5, 8), 160).expand(2, 3, 5, 8)
    assert attention(q, q, q).shape == (2, 3, 5, 8)
    nothing = freed(torch.zeros(2, 3, 0, 8))
    assert attention(nothing, q, q).shape == (2, 3, 0, 8)


@pytest.mark.slow
@pytest.mark.feature("T15")
def test_kernels_of_gpus_refuse_it_at_each_call() -> None:
    machine = tilefold.metal.emulated()
    for size in (0, 100):
        given = named()
        options: dict[str, Any] = {"machine": machine}
        tilefold.metal.attention(given["q"], given["k"], given["v"], **options)
        for name in ("q", "k", "v"):
            wrong = given | {name: freed(torch.zeros(SHAPE), size)}
            with pytest.raises(ValueError, match=f"^{name} needs 2560 bytes"):
                tilefold.metal.attention(wrong["q"], wrong["k"], wrong["v"], **options)
        for name, shape in (("out", SHAPE), ("lse", SHAPE[:3])):
            options[name] = freed(torch.zeros(shape), size)
            with pytest.raises(ValueError, match=f"^{name} needs"):
                tilefold.metal.attention(given["q"], given["k"], given["v"], **options)
            del options[name]
        with pytest.raises(ValueError, match=r"^b needs"):
            tilefold.metal.gemm(given["q"][0, 0], freed(torch.zeros(8, 4), size), machine=machine)
