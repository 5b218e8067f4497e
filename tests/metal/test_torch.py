"""Tensors on an Apple GPU, as far as a machine without one can show it.

The frontend, the operators and the dispatch are those of a Mac. In the place of
`torch.mps.compile_shader` stands one that checks torch's rules and runs the text on the CPU, so the
tensors are on the CPU too. Nothing here has run on an Apple GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from metal import needs
from metal_rules import Compiler
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import tilefold
import tilefold.frontends.torch  # gives the operators their derivatives
from tilefold import attention, attention_backward
from tilefold.backends.metal.runtime import Mps
from tilefold.frontends import operators
from tilefold.frontends import tensors as below
from tilefold.problems import reference
from tilefold.problems.request import LAYOUTS, Request

MASK = tilefold.causal()
TOLERANCES = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    """One for all tests, so that each kernel is compiled once."""
    needs()
    return Compiler()


@pytest.fixture(scope="module")
def machine(compiler: Compiler) -> Mps:
    return Mps(torch.device("cpu"), compiler, "apple9")


@pytest.fixture(autouse=True)
def on_it(machine: Mps, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls on tensors go where those on "mps" go."""
    monkeypatch.setattr(below, "machine_of", lambda tensor: machine)
    yield


def tensors(dtype: torch.dtype = torch.float32, layout: str = "bhnd") -> list[Tensor]:
    """q, k, v that require gradients: grouped heads, other lengths and dims than blocks have."""
    torch.manual_seed(0)
    shapes = (1, 4, 21, 12), (1, 2, 35, 12), (1, 2, 35, 9)
    drawn = [torch.randn(shape).to(dtype).permute(LAYOUTS[layout]) for shape in shapes]
    return [tensor.contiguous().requires_grad_() for tensor in drawn]


def expected(inputs: list[Tensor], do: Tensor, layout: str = "bhnd", **options: Any) -> list[Any]:
    """o, dq, dk, dv and lse by the definition, in the canonical order of axes."""
    axes = LAYOUTS[layout]
    q, k, v, outer = (x.detach().permute(axes).double().numpy() for x in (*inputs, do))
    o, lse = reference.attention(q, k, v, **options)
    return [o, *reference.attention_backward(outer, q, k, v, o, lse, **options), lse]


def check(got: list[Tensor], want: list[Any], layout: str = "bhnd") -> None:
    """Raises where o or a gradient is not of its type, contiguous or near the definition."""
    for name, tensor, array in zip(("o", "dq", "dk", "dv"), got, want, strict=True):
        tolerance = TOLERANCES[tensor.dtype]
        values = tensor.detach().permute(LAYOUTS[layout]).double().numpy()
        assert tensor.is_contiguous(), name
        np.testing.assert_allclose(values, array, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.feature("M03", "T01", "T02")
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.float32, "bhnd"),
        (torch.float32, "bnhd"),
        (torch.float32, "bhdn"),
        (torch.float16, "bhnd"),
        (torch.bfloat16, "bhnd"),
    ],
    ids=str,
)
def test_forward_and_gradients_agree_with_the_reference(
    dtype: torch.dtype, layout: str, compiler: Compiler
) -> None:
    inputs = tensors(dtype, layout)
    compiler.calls.clear()
    o, lse = attention(*inputs, mask=MASK, layout=layout, return_lse=True)
    do = torch.randn_like(o)
    gradients = torch.autograd.grad(o, inputs, do)
    *want, rows = expected(inputs, do, layout, mask=MASK)
    check([o, *gradients], want, layout)
    assert all(tensor.dtype == dtype for tensor in (o, *gradients))
    assert lse.dtype == torch.float32 and not lse.requires_grad
    np.testing.assert_allclose(lse.numpy(), rows, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    assert compiler.calls == ["tilefold_forward", "tilefold_backward_dq", "tilefold_backward_dkv"]


def test_one_kernel_serves_other_lengths_batches_and_strides(compiler: Compiler) -> None:
    attention(*tensors(), mask=MASK)
    compiled = len(compiler.texts)
    base = torch.randn(2, 50, 3, 12)  # (batch, sequence, q and k and v, dim) of one head
    q, k, v = (
        base[:, ::2, part, None].transpose(1, 2)[..., : 12 - 3 * (part == 2)] for part in (0, 1, 2)
    )
    assert not q.is_contiguous()
    o = attention(q, k, v, mask=MASK, scale=0.3)
    assert len(compiler.texts) == compiled
    want, *_ = expected([q, k, v], torch.zeros_like(o), mask=MASK, scale=0.3)
    np.testing.assert_allclose(o.double().numpy(), want, rtol=2e-5, atol=2e-5)


def test_few_queries_split_the_keys(compiler: Compiler) -> None:
    q, k = torch.randn(1, 4, 2, 12), torch.randn(1, 2, 700, 12)
    compiler.calls.clear()
    o, lse = attention(q, k, k, mask=MASK, return_lse=True)
    assert compiler.calls == ["tilefold_decode", "tilefold_merge"]
    want, *_, rows = expected([q, k, k], torch.zeros_like(o), mask=MASK)
    np.testing.assert_allclose(o.double().numpy(), want, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(lse.numpy(), rows, rtol=2e-5, atol=2e-5)


def test_gradients_of_a_broadcast_sum_and_explicit_ones() -> None:
    """`sum().backward()` hands over a do of strides zero; a strided lse is packed first."""
    inputs = tensors()
    o, lse = attention(*inputs, mask=MASK, return_lse=True)
    gradients = torch.autograd.grad(o.sum(), inputs)
    spread = torch.stack((lse, lse), dim=-1)[..., 0]
    assert not spread.is_contiguous()
    explicit = attention_backward(torch.ones_like(o), *inputs, o, spread, mask=MASK)
    assert all(torch.equal(a, b) for a, b in zip(gradients, explicit, strict=True))
    *want, _ = expected(inputs, torch.ones_like(o), mask=MASK)
    check([o, *gradients], want)


@pytest.mark.feature("T09")
def test_compile() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, lse = attention(2 * q, k, v, mask=MASK, return_lse=True)
        return o * lse.isfinite()[..., None]

    def both(function: Callable[..., Tensor]) -> list[Tensor]:
        inputs = tensors()
        o = function(*inputs)
        weights = torch.linspace(-1, 1, o.numel()).reshape(o.shape)
        return [o, *torch.autograd.grad((o * weights).sum(), inputs)]

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for got, want in zip(both(compiled), both(model), strict=True):
        assert torch.equal(got, want)


def test_compile_with_lengths_that_change() -> None:
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, mask=MASK),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    q, k, v = (tensor.detach() for tensor in tensors())
    for length in (21, 7, 16):
        given = q[:, :, :length].contiguous(), k, v
        assert torch.equal(compiled(*given), attention(*given, mask=MASK))


def test_opcheck() -> None:
    inputs = tensors()
    request = Request(MASK)
    torch.library.opcheck(operators.attention, (*inputs, request))
    o, lse = attention(*inputs, mask=MASK, return_lse=True)
    saved = [tensor.detach() for tensor in (o, *inputs, o, lse)]
    torch.library.opcheck(operators.attention_backward, (*saved, request))


def test_parts_merge() -> None:
    q, k, v = (tensor.detach() for tensor in tensors())
    parts = [
        attention(q, k[:, :, :0], v[:, :, :0], return_lse=True),
        attention(q, k, v, mask=MASK, return_lse=True),
    ]
    o, lse = tilefold.merge(*parts[0], *parts[1])
    assert torch.equal(o, parts[1][0]) and torch.equal(lse, parts[1][1])


def on_mps(*shape: int) -> Tensor:
    """A tensor without data, of the device that is not here; for a FakeTensorMode."""
    return torch.empty(shape, device="mps")


def test_tensors_on_mps_without_data_go_all_the_way() -> None:
    """torch's own stand-ins say "mps" on every machine: what a compiler of graphs sees."""
    with FakeTensorMode():
        q, k = on_mps(2, 4, 16, 8), on_mps(2, 2, 20, 8)
        o, lse = attention(q, k, k, mask=MASK, return_lse=True)
        gradients = attention_backward(o, q, k, k, o, lse, mask=MASK)
        merged = tilefold.merge(o, lse, o, lse)
        for tensor, shape in zip((o, lse), ((2, 4, 16, 8), (2, 4, 16)), strict=True):
            assert tensor.is_mps and tensor.shape == shape
        assert [tensor.shape for tensor in gradients] == [q.shape, k.shape, k.shape]
        assert all(tensor.is_mps for tensor in (*gradients, *merged))
        traced = make_fx(lambda q, k: attention(2 * q, k, k, mask=MASK))(q, k)
    assert "torch.ops.tilefold.attention.default" in traced.code
    for name in ("tilefold::attention", "tilefold::attention_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "MPS")


@pytest.mark.feature("T15")
def test_tensors_on_two_devices_are_refused() -> None:
    with FakeTensorMode():
        q, here = on_mps(1, 2, 3, 4), torch.empty(1, 2, 3, 4)
        message = "v is on cpu and others are on mps:0: pass v.to('mps:0'), or the others on cpu"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            attention(q, q, here)
        message = "k is on mps:0 and others are on cpu: pass k.to('cpu'), or the others on mps:0"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            attention(here, q, q)
        with pytest.raises(ValueError, match=r"^lse is on cpu and others are on mps:0"):
            attention_backward(q, q, q, q, q, here[..., 0])


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4)])
def test_empty_axes_launch_nothing(shape: tuple[int, ...], compiler: Compiler) -> None:
    compiler.calls.clear()
    inputs = [torch.ones(shape, requires_grad=True) for _ in range(3)]
    o, lse = attention(*inputs, return_lse=True)
    o.sum().backward()
    assert o.shape == shape and lse.shape == shape[:3] and not compiler.calls
    assert all(tensor.grad is not None and tensor.grad.shape == shape for tensor in inputs)


def test_second_derivatives_raise() -> None:
    q, k, v = tensors()
    (dq,) = torch.autograd.grad(attention(q, k, v, mask=MASK).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^second derivatives of tilefold\.attention"):
        dq.sum().backward()


Q = torch.zeros(1, 2, 3, 4)


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "float64": (
        lambda: attention(Q.double(), Q.double(), Q.double()),
        NotImplementedError,
        "q is of float64, which Apple GPUs do not have: pass float32, or NumPy arrays or tensors on"
        " the CPU to tilefold.attention",
    ),
    "integers": (
        lambda: attention(Q.int(), Q, Q),
        TypeError,
        "q must be of float32, float64, float16 or bfloat16, got int32",
    ),
    "shape of lse": (
        lambda: attention_backward(Q, Q, Q, Q, Q, Q),
        ValueError,
        "lse must have shape (1, 2, 3) to go with q, k and v, got (1, 2, 3, 4)",
    ),
}


@pytest.mark.feature("T15")
@pytest.mark.parametrize("case", ERRORS)
def test_message(case: str) -> None:
    call, kind, message = ERRORS[case]
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        call()
