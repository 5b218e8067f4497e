"""Public products of tensors on GPUs, by the emulator and the interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import attention_block  # noqa: E402
import interpreted  # noqa: E402
from metal import needs as needs_emulator  # noqa: E402
from metal_rules import Compiler  # noqa: E402

import tilefold  # noqa: E402
import tilefold.torch  # noqa: E402
from tilefold.backends.metal.runtime import Mps  # noqa: E402
from tilefold.backends.triton.interpreter import Interpreted  # noqa: E402
from tilefold.frontends.torch import tensors  # noqa: E402
from tilefold.products import linear, quantized_torch  # noqa: E402
from tilefold.products import torch as products  # noqa: E402


@pytest.fixture(params=["metal", "triton"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine that stands for a GPU, where tensors on the processor go."""
    if request.param == "metal":
        needs_emulator()
        found: Any = Mps(torch.device("cpu"), Compiler(), "apple9")
    else:
        interpreted.needs()
        found = Interpreted("sm_90")
    for module in (linear, products, quantized_torch, tensors):
        monkeypatch.setattr(module, "machine_of", lambda tensor: found)
    return found


def near(got: Any, want: Any) -> None:
    assert got.shape == want.shape and (got - want).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.feature("A11")
def test_a_block_of_attention_on_a_gpu(machine: Any) -> None:
    """The heads of one batched product are those of attention, whose result is read transposed."""
    x = np.random.default_rng(2).normal(size=(2, 21, 24)).astype(np.float32)
    weights = attention_block.Weights.random(features=24, heads=2, dim=8, outputs=20)
    given = attention_block.Weights(*map(torch.from_numpy, weights))
    with np.errstate(all="ignore"):
        got = attention_block.block(torch.from_numpy(x), given, mask=tilefold.causal())
    want = attention_block.plain(x, weights, visible=np.tri(21, dtype=bool))
    assert abs(got.numpy() - want).max() < 1e-5


@pytest.mark.slow
@pytest.mark.feature("A02")
def test_qgemm_of_tensors_on_a_gpu(machine: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x, bias = (torch.randn(*n, generator=generator).requires_grad_() for n in ((2, 3, 48), (40,)))
    w = tilefold.quantize(torch.randn(48, 40, generator=generator), "int4", group_size=16)
    wide = torch.from_numpy(w.dequantize())
    got = tilefold.qgemm(x, w, bias=bias, activation="silu")
    want = torch.nn.functional.silu(x @ wide + bias)
    near(got, want)
    for mine, other in zip(
        *(torch.autograd.grad(y.sum(), (x, bias)) for y in (got, want)), strict=True
    ):
        near(mine, other)
    line, out = x.detach()[0, 0], torch.full((40,), torch.nan)
    assert tilefold.qgemm(line, w, out=out) is out
    near(out, line @ wide)
    with pytest.raises(ValueError, match="out must not overlap x"):
        tilefold.qgemm(x.detach(), w, out=x.detach()[:, :, :40])


@pytest.mark.slow
@pytest.mark.feature("A02")
def test_a_layer_on_a_gpu_multiplies_by_its_buffers(machine: Any) -> None:
    """Codes are not copied to the GPU a second time."""
    plain = torch.nn.Linear(32, 24)
    layer = tilefold.torch.QuantizedLinear.from_linear(plain, "palette6")
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(5, 32)).astype("float32"))
    object.__setattr__(machine, "upload", None)
    with torch.no_grad():
        near(layer(x), x @ layer.weight.T + plain.bias)
