"""Tensors on a GPU of NVIDIA's or AMD's, as far as a machine without one can show it.

The frontend, the operators, the plans and the launches are those of a GPU. In the place of the
device stands Triton's interpreter, so the tensors are on the CPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from interpreted import needs

import tilefold
from tilefold import attention, attention_backward
from tilefold.backends.triton import interpreter, runtime
from tilefold.problems import reference
from tilefold.problems.request import LAYOUTS

torch = pytest.importorskip("torch", reason="there are no tensors without torch")
from torch import Tensor  # noqa: E402  # only where there is torch
from torch._subclasses import FakeTensorMode  # noqa: E402

from tilefold.frontends import tensors as below  # noqa: E402

MASK = tilefold.causal()
TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-11, torch.float16: 5e-3, torch.bfloat16: 4e-2}

pytestmark = pytest.mark.slow


class Watched(interpreter.Interpreted):
    """The interpreter, and which kernels it was asked for."""

    entries: list[str]

    def function(self, text: str, entry: str) -> Any:
        self.entries.append(entry)
        return super().function(text, entry)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """Calls on tensors go where those on "cuda" go."""
    needs()
    found = Watched("sm_90")
    object.__setattr__(found, "entries", [])
    monkeypatch.setattr(below, "machine_of", lambda tensor: found)
    yield found


def tensors(dtype: Any = torch.float32, layout: str = "bhnd") -> list[Tensor]:
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
        (torch.float64, "bnhd"),
        (torch.float32, "bhdn"),
        (torch.float16, "bhnd"),
        (torch.bfloat16, "bnhd"),
    ],
    ids=str,
)
def test_forward_and_gradients_agree_with_the_reference(
    dtype: Any, layout: str, machine: Watched
) -> None:
    inputs = tensors(dtype, layout)
    o, lse = attention(*inputs, mask=MASK, layout=layout, return_lse=True)
    do = torch.randn_like(o)
    gradients = torch.autograd.grad(o, inputs, do)
    *want, rows = expected(inputs, do, layout, mask=MASK)
    check([o, *gradients], want, layout)
    assert all(tensor.dtype == dtype for tensor in (o, *gradients))
    assert not lse.requires_grad
    np.testing.assert_allclose(lse.numpy(), rows, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    names = ["tilefold_forward", "tilefold_backward_dq", "tilefold_backward_dkv"]
    assert machine.entries == names


def test_a_second_call_prepares_nothing(machine: Watched) -> None:
    for _ in range(3):
        attention(*tensors(), mask=MASK)
    assert machine.entries == ["tilefold_forward"]


@pytest.mark.feature("T09")
def test_compile(machine: Watched) -> None:
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


def test_gradients_of_a_broadcast_sum(machine: Watched) -> None:
    """`sum().backward()` hands over a do of strides zero."""
    inputs = tensors()
    o, lse = attention(*inputs, mask=MASK, return_lse=True)
    gradients = torch.autograd.grad(o.sum(), inputs)
    explicit = attention_backward(torch.ones_like(o), *inputs, o, lse, mask=MASK)
    for one, other in zip(gradients, explicit, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    *want, _ = expected(inputs, torch.ones_like(o), mask=MASK)
    check([o, *gradients], want)


@pytest.mark.feature("T15")
@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4)])
def test_empty_axes_launch_nothing(shape: tuple[int, ...], machine: Watched) -> None:
    inputs = [torch.ones(shape, requires_grad=True) for _ in range(3)]
    o, lse = attention(*inputs, return_lse=True)
    o.sum().backward()
    assert o.shape == shape and lse.shape == shape[:3] and not machine.entries
    assert all(tensor.grad is not None and tensor.grad.shape == shape for tensor in inputs)


def test_the_public_functions_take_a_machine() -> None:
    needs()
    on = tilefold.triton.interpreted()
    inputs = tensors()
    o, lse = tilefold.triton.attention(*inputs, mask=MASK, machine=on)
    do = torch.ones_like(o)
    gradients = tilefold.triton.attention_backward(do, *inputs, o, lse, mask=MASK, machine=on)
    *want, rows = expected(inputs, do, mask=MASK)
    check([o, *gradients], want)
    np.testing.assert_allclose(lse.numpy(), rows, rtol=2e-5)
    with pytest.raises(NotImplementedError, match="GPU"):
        tilefold.triton.attention(*inputs, mask=MASK)


def on_cuda(*shape: int) -> Tensor:
    """A tensor without data, of the device that is not here; for a FakeTensorMode."""
    return torch.empty(shape, device="cuda")


def test_tensors_on_cuda_without_data_go_all_the_way() -> None:
    """torch's own stand-ins say "cuda" on every machine: what a compiler of graphs sees."""
    with FakeTensorMode():
        q, k = on_cuda(2, 4, 16, 8), on_cuda(2, 2, 20, 8)
        o, lse = attention(q, k, k, mask=MASK, return_lse=True)
        gradients = attention_backward(o, q, k, k, o, lse, mask=MASK)
        for tensor, shape in zip((o, lse), ((2, 4, 16, 8), (2, 4, 16)), strict=True):
            assert tensor.is_cuda and tensor.shape == shape
        assert [tensor.shape for tensor in gradients] == [q.shape, k.shape, k.shape]
        here = torch.empty(2, 2, 20, 8)
        message = "v is on cpu and others are on cuda:0: pass v.to('cuda:0'), or the others on cpu"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            attention(q, k, here)
    for name in ("tilefold::attention", "tilefold::attention_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


Q = torch.zeros(1, 2, 3, 4)

ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
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
    "wide heads": (
        lambda: attention(*[torch.zeros(1, 1, 2, 513)] * 3),
        NotImplementedError,
        "heads of up to 512 numbers are implemented for GPUs, got dim 513 and dim_v 513: use the"
        " CPU, or impl='composed'",
    ),
}


@pytest.mark.feature("T15")
@pytest.mark.parametrize("case", ERRORS)
def test_message(case: str, machine: Watched) -> None:
    call, kind, message = ERRORS[case]
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        call()


def test_a_tensor_elsewhere_than_the_machine() -> None:
    needs()
    meta = torch.empty(1, 2, 3, 4, device="meta")
    with pytest.raises(TypeError, match="q must be a tensor on the CPU, got meta"):
        tilefold.triton.attention(meta, meta, meta, machine=interpreter.Interpreted())
    with pytest.raises(TypeError, match="q must be a tensor, got a list"):
        tilefold.triton.attention([1.0], meta, meta)  # type: ignore[arg-type]  # the point


@pytest.mark.feature("T15", "J13")
def test_without_a_gpu_the_reason_is_given() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    runtime.gpu.cache_clear()
    with pytest.raises(NotImplementedError, match=r"finds no GPU of NVIDIA or AMD"):
        runtime.gpu()
