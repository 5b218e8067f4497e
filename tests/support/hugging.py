"""Small models of Hugging Face transformers, built from their configurations, for tests.

Transformers is imported when a test runs: it takes seconds, and few tests need it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import pytest

needs = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec("transformers"), reason="transformers is not installed"),
    # Configurations so small are not what transformers expects, and it says so.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
"""The marks of a file of tests with transformers."""

_TOKENS = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 98}
_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
_SMALL = {**_TOKENS, **_SIZES, "num_attention_heads": 4, "max_position_embeddings": 64}
_GROUPED = {**_SMALL, "num_key_value_heads": 2}
_WINDOW = {"head_dim": 8, "sliding_window": 4}
_VISION = {**_SIZES, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
_NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
_SEQ2SEQ = {
    **_NO_DROPOUT,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}


@dataclass(frozen=True)
class Model:
    """A model to build: the names of its classes, its options, and what it takes."""

    config: str
    kind: str
    options: dict[str, Any] = field(hash=False)
    takes: str = "text"
    """What it takes: text padded on the left ("text") or right ("right"), pairs of texts
    ("pairs"), images, sound, or images with text ("both")."""
    generates: bool = True

    def build(self, attention: str, **more: Any) -> Any:
        """The model with its weights, which follow from a seed; in its mode of inference."""
        import torch
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.options, **more)
        made = getattr(transformers, self.kind)._from_config(config, attn_implementation=attention)
        return made.eval()

    def inputs(self) -> dict[str, Any]:
        """A batch of 2, the first entry with padding."""
        import torch

        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, 97, (2, 9), generator=generator)
        shown = torch.ones(2, 9, dtype=torch.long)
        shown[0, slice(6, 9) if self.takes in ("right", "both") else slice(3)] = 0
        images = {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
        text = {"input_ids": ids, "attention_mask": shown}
        given = {
            "pairs": {**text, "decoder_input_ids": ids},
            "images": images,
            "sound": {
                "input_features": torch.randn(2, 8, 40, generator=generator),
                "decoder_input_ids": ids,
            },
            "both": {**text, **images},
        }
        return given.get(self.takes, text)


MODELS = {
    "llama": Model("LlamaConfig", "LlamaForCausalLM", _GROUPED),
    "mistral": Model("MistralConfig", "MistralForCausalLM", {**_GROUPED, "sliding_window": 4}),
    "qwen3": Model("Qwen3Config", "Qwen3ForCausalLM", {**_GROUPED, "head_dim": 8}),
    "gemma2": Model(
        "Gemma2Config", "Gemma2ForCausalLM", {**_GROUPED, **_WINDOW, "query_pre_attn_scalar": 8}
    ),
    "gemma3": Model(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**_GROUPED, **_WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt_oss": Model(
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            **_GROUPED,
            **_WINDOW,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "gpt2": Model(
        "GPT2Config",
        "GPT2LMHeadModel",
        {**_TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "deepseek_v3": Model(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            **_SMALL,
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 2,
        },
    ),
    "bert": Model("BertConfig", "BertModel", _SMALL, "right", False),
    "modernbert": Model(
        "ModernBertConfig",
        "ModernBertModel",
        {**_SMALL, "local_attention": 4, "cls_token_id": 1, "sep_token_id": 2},
        "right",
        False,
    ),
    "t5": Model(
        "T5Config",
        "T5ForConditionalGeneration",
        {
            **_TOKENS,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        "pairs",
    ),
    "bart": Model(
        "BartConfig",
        "BartForConditionalGeneration",
        {
            **_TOKENS,
            **_SEQ2SEQ,
            "max_position_embeddings": 64,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": 2,
        },
        "pairs",
    ),
    "whisper": Model(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {
            **_TOKENS,
            **_SEQ2SEQ,
            "max_source_positions": 20,
            "max_target_positions": 32,
            "num_mel_bins": 8,
            "decoder_start_token_id": 1,
            "begin_suppress_tokens": None,
            "suppress_tokens": None,
        },
        "sound",
    ),
    "vit": Model("ViTConfig", "ViTModel", _VISION, "images", False),
    "clip": Model(
        "CLIPConfig",
        "CLIPModel",
        {
            "text_config": {**_SMALL, "projection_dim": 16},
            "vision_config": {**_VISION, "projection_dim": 16},
            "projection_dim": 16,
        },
        "both",
        False,
    ),
}
"""A model of each kind: grouped heads, windows, soft caps, sinks, biases, other widths of values,
encoders, pairs of texts, sound and images."""
