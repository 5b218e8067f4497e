"""Tensors on a GPU, as far as a machine without one can show it.

The frontend, the operators, the plans and the dispatch are those of a GPU. In the place of
`torch.mps.compile_shader` stands one that checks torch's rules and runs the source on the CPU, and
in the place of a GPU of NVIDIA's or AMD's stands Triton's interpreter: the tensors are on the CPU.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import interpreted
import metal
import numpy as np
import pytest

import tilefold
from tilefold import attention, attention_backward
from tilefold.backends.metal.runtime import Mps
from tilefold.backends.triton import interpreter
from tilefold.problems.request import Request

torch = pytest.importorskip("torch", reason="there are no tensors without torch")
from gpu_tensors import TOLERANCES, check, expected, tensors  # noqa: E402  # where torch is
from metal_rules import Compiler  # noqa: E402
from opchecks import opcheck  # noqa: E402  # where torch is
from torch import Tensor  # noqa: E402

from tilefold.frontends.torch import tensors as below  # noqa: E402

MASK = tilefold.causal()
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

pytestmark = pytest.mark.slow


@dataclass(frozen=True, eq=False)
class Watched(interpreter.Interpreted):
    """The interpreter, and which kernels it was asked for."""

    entries: list[str] = field(default_factory=list)

    def function(self, text: str, entry: str) -> Any:
        """A kernel of a source."""
        self.entries.append(entry)
        return super().function(text, entry)


@dataclass(frozen=True)
class Gpu:
    """Where calls on tensors go: `kernels` are the entries of kernels that it ran or prepared."""

    backend: str
    machine: Any
    kernels: list[str]

    @property
    def sources(self) -> int:
        """The number of sources that were compiled, or for Triton of kernels that were prepared."""
        if self.backend == "triton":
            return len(self.kernels)
        return len(_compiler().texts)


@functools.cache
def _compiler() -> Compiler:
    """One for all tests, so that each kernel is compiled once."""
    metal.needs()
    return Compiler()


@functools.cache
def _mps() -> Mps:
    return Mps(torch.device("cpu"), _compiler(), "apple9")


@pytest.fixture(params=["metal", "triton"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """Calls on tensors go where those on "mps" or "cuda" go."""
    if request.param == "metal":
        found = Gpu("metal", _mps(), _compiler().calls)
        found.kernels.clear()
    else:
        interpreted.needs()
        watched = Watched("sm_90")
        found = Gpu("triton", watched, watched.entries)
    monkeypatch.setattr(below, "machine_of", lambda tensor: found.machine)
    yield found


AGREEING = [
    *(("metal", dtype, layout) for dtype, layout in [(F32, "bhnd"), (F32, "bnhd"), (F32, "bhdn")]),
    *(("metal", dtype, "bhnd") for dtype in (F16, BF16)),
    *(("triton", dtype, layout) for dtype, layout in [(F32, "bhnd"), (F64, "bnhd"), (F32, "bhdn")]),
    *(("triton", dtype, layout) for dtype, layout in [(F16, "bhnd"), (BF16, "bnhd")]),
]


@pytest.mark.feature("M03", "T01", "T02")
@pytest.mark.parametrize(("gpu", "dtype", "layout"), AGREEING, ids=str, indirect=["gpu"])
def test_tensors_and_their_gradients_agree_with_reference(
    gpu: Gpu, dtype: Any, layout: str
) -> None:
    inputs = tensors(dtype, layout)
    o, lse = attention(*inputs, mask=MASK, layout=layout, return_lse=True)
    do = torch.randn_like(o)
    gradients = torch.autograd.grad(o, inputs, do)
    *want, rows = expected(inputs, do, layout, mask=MASK)
    check([o, *gradients], want, layout)
    assert all(tensor.dtype == dtype for tensor in (o, *gradients))
    assert lse.dtype == (F64 if dtype == F64 else F32)
    lse_rows = lse.detach().numpy()
    np.testing.assert_allclose(lse_rows, rows, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    names = ["tilefold_forward", "tilefold_backward_dq", "tilefold_backward_dkv"]
    assert gpu.kernels == names


@pytest.mark.parametrize("gpu", ["metal"], indirect=True)
def test_gradients_reach_the_arrays_of_a_score_and_sinks(gpu: Gpu) -> None:
    inputs = tensors()
    learned = [torch.randn(4, 21, 35), 1 + torch.rand(4, 1, 1), torch.randn(4)]
    learned = [tensor.requires_grad_() for tensor in learned]

    def options(more: Any, heat: Any, sinks: Any) -> dict[str, Any]:
        score = [tilefold.bias(more), tilefold.temperature(heat), tilefold.softcap(3.0)]
        return {"mask": MASK, "score": score, "sinks": sinks}

    o = attention(*inputs, **options(*learned))
    do = torch.randn_like(o)
    got = torch.autograd.grad(o, [*inputs, *learned], do)
    arrays = [tensor.detach().numpy() for tensor in learned]
    want = expected(inputs, do, **options(*arrays[:2], arrays[2][:, None]))
    for tensor, array in zip((o, *got), want[:-1], strict=True):
        found = tensor.detach().double().numpy()
        np.testing.assert_allclose(found, array.reshape(found.shape), rtol=3e-5, atol=3e-5)
    names = ["forward", "backward_dq", "backward_dkv", "backward_sinks", *["backward_inputs"] * 2]
    assert gpu.kernels == [f"tilefold_{name}" for name in names]


def test_a_second_call_prepares_nothing(gpu: Gpu) -> None:
    attention(*tensors(), mask=MASK)
    prepared = gpu.sources
    for _ in range(2):
        attention(*tensors(), mask=MASK)
    assert gpu.sources == prepared and {*gpu.kernels} == {"tilefold_forward"}
    if gpu.backend == "triton":
        assert prepared == 1


@pytest.mark.parametrize("gpu", ["metal"], indirect=True)
def test_one_kernel_serves_other_lengths_batches_and_strides(gpu: Gpu) -> None:
    attention(*tensors(), mask=MASK)
    compiled = gpu.sources
    base = torch.randn(2, 50, 3, 12)  # (batch, sequence, q and k and v, dim) of one head
    q, k, v = (
        base[:, ::2, part, None].transpose(1, 2)[..., : 12 - 3 * (part == 2)] for part in (0, 1, 2)
    )
    assert not q.is_contiguous()
    o = attention(q, k, v, mask=MASK, scale=0.3)
    assert gpu.sources == compiled
    want, *_ = expected([q, k, v], torch.zeros_like(o), mask=MASK, scale=0.3)
    np.testing.assert_allclose(o.double().numpy(), want, rtol=2e-5, atol=2e-5)


def test_few_queries_split_the_keys(gpu: Gpu) -> None:
    q, k = torch.randn(1, 4, 2, 12), torch.randn(1, 2, 700, 12)
    o, lse = attention(q, k, k, mask=MASK, return_lse=True)
    assert gpu.kernels == ["tilefold_decode", "tilefold_merge"]
    want, *_, rows = expected([q, k, k], torch.zeros_like(o), mask=MASK)
    np.testing.assert_allclose(o.double().numpy(), want, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(lse.numpy(), rows, rtol=2e-5, atol=2e-5)


def test_gradients_of_a_broadcast_sum_and_explicit_ones(gpu: Gpu) -> None:
    """`sum().backward()` hands over a do of strides zero; a strided lse is packed first."""
    inputs = tensors()
    o, lse = attention(*inputs, mask=MASK, return_lse=True)
    gradients = torch.autograd.grad(o.sum(), inputs)
    spread = torch.stack((lse, lse), dim=-1)[..., 0]
    assert not spread.is_contiguous()
    for rows in (lse, spread):
        explicit = attention_backward(torch.ones_like(o), *inputs, o, rows, mask=MASK)
        for one, other in zip(gradients, explicit, strict=True):
            exact = {"rtol": 0, "atol": 0} if gpu.backend == "metal" else {}
            assert torch.allclose(one, other, **({"rtol": 1e-5, "atol": 1e-6} | exact))
    *want, _ = expected(inputs, torch.ones_like(o), mask=MASK)
    check([o, *gradients], want)


@pytest.mark.feature("T09")
def test_compile(gpu: Gpu) -> None:
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


def test_compile_with_lengths_that_change(gpu: Gpu) -> None:
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


def test_opcheck(gpu: Gpu) -> None:
    opcheck(tensors(), Request(MASK))


def test_parts_merge(gpu: Gpu) -> None:
    q, k, v = (tensor.detach() for tensor in tensors())
    parts = [
        attention(q, k[:, :, :0], v[:, :, :0], return_lse=True),
        attention(q, k, v, mask=MASK, return_lse=True),
    ]
    o, lse = tilefold.merge(*parts[0], *parts[1])
    assert torch.equal(o, parts[1][0]) and torch.equal(lse, parts[1][1])


@pytest.mark.feature("T15")
@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4)])
def test_empty_axes_launch_nothing(shape: tuple[int, ...], gpu: Gpu) -> None:
    inputs = [torch.ones(shape, requires_grad=True) for _ in range(3)]
    o, lse = attention(*inputs, return_lse=True)
    o.sum().backward()
    assert o.shape == shape and lse.shape == shape[:3] and not gpu.kernels
    assert all(tensor.grad is not None and tensor.grad.shape == shape for tensor in inputs)


def test_second_derivatives_on_gpus_are_made_of_torchs_products(gpu: Gpu) -> None:
    q, k, v = tensors()
    (dq,) = torch.autograd.grad(attention(q, k, v, mask=MASK).sum(), q, create_graph=True)
    dq.square().sum().backward()
    assert q.grad is not None and q.grad.isfinite().all() and q.grad.any()


Q = torch.zeros(1, 2, 3, 4)

INTEGERS = (
    lambda: attention(Q.int(), Q, Q),
    TypeError,
    "q must be of float32, float64, float16 or bfloat16, got int32",
)
SHAPE_OF_LSE = (
    lambda: attention_backward(Q, Q, Q, Q, Q, Q),
    ValueError,
    "lse must have shape (1, 2, 3) to go with q, k and v, got (1, 2, 3, 4)",
)
DOUBLES = (
    lambda: attention(Q.double(), Q.double(), Q.double()),
    NotImplementedError,
    "q is of float64, which Apple GPUs do not have: pass float32, or NumPy arrays or tensors on"
    " the CPU to tilefold.attention",
)
WIDE_HEADS = (
    lambda: attention(*[torch.zeros(1, 1, 2, 513)] * 3),
    NotImplementedError,
    "heads of up to 512 numbers are implemented for GPUs, got dim 513 and dim_v 513: use the"
    " CPU, or impl='composed'",
)


@pytest.mark.feature("T15")
@pytest.mark.parametrize(
    ("gpu", "call", "kind", "message"),
    [
        pytest.param(backend, *case, id=f"{backend}-{name}")
        for backend, name, case in [
            ("metal", "integers", INTEGERS),
            ("metal", "shape of lse", SHAPE_OF_LSE),
            ("metal", "float64", DOUBLES),
            ("triton", "integers", INTEGERS),
            ("triton", "shape of lse", SHAPE_OF_LSE),
            ("triton", "wide heads", WIDE_HEADS),
        ]
    ],
    indirect=["gpu"],
)
def test_message(gpu: Gpu, call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        call()
