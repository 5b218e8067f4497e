"""Tensors that torch places on "cuda", and machines; `backends/test_torch.py` has the rest."""

from __future__ import annotations

import re

import numpy as np
import pytest
from interpreted import needs

import tilefold
from tilefold import attention, attention_backward
from tilefold.backends.triton import interpreter, runtime

torch = pytest.importorskip("torch", reason="there are no tensors without torch")
from gpu_tensors import tensors  # noqa: E402  # only where there is torch
from torch import Tensor  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402

MASK = tilefold.causal()

pytestmark = pytest.mark.slow


def test_the_public_functions_take_a_machine_scores_sinks_and_dropout() -> None:
    needs()
    on = tilefold.triton.interpreted()
    inputs = tensors()
    slopes, sinks = torch.rand(2, inputs[0].shape[1])
    options = {
        "score": [tilefold.softcap(2.0), tilefold.alibi(slopes)],
        "sinks": sinks,
        "mask": MASK,
        "dropout": 0.25,
        "seed": 7,
    }
    with np.errstate(all="ignore"):  # lanes past the end divide by 0 too
        o, lse = tilefold.triton.attention(*inputs, machine=on, **options)
        do = torch.ones_like(o)
        got = tilefold.triton.attention_backward(do, *inputs, o, lse, machine=on, **options)
    want = tilefold.attention(*inputs, return_lse=True, **options)
    gradients = tilefold.attention_backward(do, *inputs, *want, **options)
    for found, exact in zip((o, lse, *got), (*want, *gradients), strict=True):
        torch.testing.assert_close(found, exact, rtol=2e-4, atol=2e-4)
    options["score"] = [tilefold.softcap(2.0), tilefold.alibi(slopes.numpy())]
    options["sinks"] = sinks.numpy()
    with np.errstate(all="ignore"):
        same, _ = tilefold.triton.attention(*inputs, machine=on, **options)
    assert torch.equal(same, o)
    with pytest.raises(NotImplementedError, match="GPU"):
        tilefold.triton.attention(*inputs, mask=MASK)
    with pytest.raises(TypeError, match="seed must be an integer from"):
        tilefold.triton.attention(*inputs, machine=on, dropout=0.25)


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
