"""Models of transformers on tilefold are those on eager attention: values, gradients, tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hugging import MODELS, needs

pytestmark = needs


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    import tilefold.transformers

    tilefold.transformers.register()
    yield
    tilefold.transformers.unregister()


def compared(made: Any, shown: Any) -> Any:
    """What a model says of real tokens, and of images."""
    if hasattr(made, "logits_per_text"):
        return made.logits_per_text
    first = made[0]
    real = shown is not None and first.shape[1] == shown.shape[1]
    return first[shown.bool()] if real else first


@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_those_of_eager_attention(name: str) -> None:
    import torch

    inputs = MODELS[name].inputs()
    found = []
    for attention in ("eager", "tilefold"):
        model = MODELS[name].build(attention)
        values = compared(model(**inputs), inputs.get("attention_mask"))
        direction = torch.randn(values.shape, generator=torch.Generator().manual_seed(2))
        values.mul(direction).sum().backward()
        slopes = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        found.append((values.detach(), slopes))
    (expected, wanted), (values, slopes) = found
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=2e-5)
    assert slopes.keys() == wanted.keys()
    largest = max(float(slope.abs().max()) for slope in wanted.values())
    for key, slope in wanted.items():  # those of biases of keys are 0 but for rounding
        scale = float(slope.abs().max()) + 1e-2 * largest
        torch.testing.assert_close(
            slopes[key], slope, rtol=0, atol=2e-5 * scale, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.generates])
def test_generate_gives_the_same_tokens(name: str, cache: str) -> None:
    import torch
    from transformers import GenerationConfig

    given = {k: x for k, x in MODELS[name].inputs().items() if k != "decoder_input_ids"}
    ask = GenerationConfig(
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        cache_implementation=None if cache == "dynamic" else cache,
        disable_compile=True,
        pad_token_id=0,
        decoder_start_token_id=2,
        eos_token_id=98,
    )
    rows = []
    for attention in ("eager", "tilefold"):
        model = MODELS[name].build(attention)
        rows.append(model.generate(**given, generation_config=ask))
    assert torch.equal(*rows)
    assert rows[0].shape[1] >= 6
