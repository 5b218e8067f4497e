"""Tensors that torch places on "mps", without data; `backends/test_torch.py` has the rest."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import tilefold
import tilefold.frontends.torch.calls  # gives the operators their derivatives
from tilefold import attention, attention_backward

MASK = tilefold.causal()

pytestmark = pytest.mark.slow


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
