"""diffusers: its newer models ask a registry for "tilefold"."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec("diffusers"), reason="diffusers is not installed"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def close(found: Any, expected: Any) -> None:
    import torch

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["none", "causal", "keys", "bool", "additive", "groups"])
def test_a_call_says_what_the_native_backend_says(kind: str) -> None:
    import torch
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    import tilefold.diffusers

    tilefold.diffusers.register()
    tilefold.diffusers.register()
    generator = torch.Generator().manual_seed(0)
    heads = 2 if kind == "groups" else 4
    sizes = ((5, 4), (7, heads), (7, heads))
    q, k, v = (torch.randn(2, n, h, 8, generator=generator) for n, h in sizes)
    seen = torch.rand(2, 1, 5, 7, generator=generator) < 0.7
    seen[..., 0] = True
    masks = {"bool": seen, "additive": torch.randn(2, 4, 5, 7, generator=generator)}
    masks["keys"] = seen[:, 0, 0]
    mask = masks.get(kind)
    given: dict[str, Any] = {"is_causal": kind == "causal", "enable_gqa": kind == "groups"}
    native = mask[:, None, None] if kind == "keys" and mask is not None else mask
    expected = dispatch_attention_fn(q, k, v, native, scale=0.3, backend="native", **given)
    close(dispatch_attention_fn(q, k, v, mask, scale=0.3, backend="tilefold", **given), expected)


def test_lse_lies_as_diffusers_wants_it_and_what_is_not_there_is_refused() -> None:
    import torch

    from tilefold.diffusers import attend

    q = torch.randn(1, 5, 4, 8)
    o, lse = attend(q, q, q, return_lse=True)
    scores = torch.einsum("bqhd,bkhd->bqhk", q, q) * 8**-0.5
    close(lse, scores.logsumexp(3))
    assert o.shape == q.shape
    with pytest.raises(NotImplementedError, match="choose the backend 'native'"):
        attend(q, q, q, _parallel_config=object())
    with pytest.raises(TypeError, match="attn_mask must be of bool or of floats, got"):
        attend(q, q, q, torch.ones(1, 5, dtype=torch.int64))


def test_a_flux_transformer_runs_on_it() -> None:
    import torch
    from diffusers import FluxTransformer2DModel

    import tilefold.diffusers

    tilefold.diffusers.register()
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 2, 2),
    ).eval()
    given = {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "pooled_projections": torch.randn(1, 16),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(6, 3),
    }
    found = []
    for backend in ("native", "tilefold"):
        model.zero_grad()
        model.set_attention_backend(backend)
        made = model(**given).sample
        made.square().sum().backward()
        found.append(
            (made.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None])
        )
    for ours, theirs in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_older_models_run_by_enable() -> None:
    import torch
    from diffusers import UNet2DConditionModel

    import tilefold.torch

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()
    given = torch.randn(1, 4, 8, 8), torch.tensor([1]), torch.randn(1, 6, 16)
    with torch.inference_mode():
        expected = model(*given).sample
        before = tilefold.torch.stats()["hits"]
        with tilefold.torch.enabled():
            found = model(*given).sample
    assert tilefold.torch.stats()["hits"] >= before + 8
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
