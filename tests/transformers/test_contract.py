"""What transformers asks of an attention function, line by line, and what is easily got wrong."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hugging import MODELS, needs

pytestmark = needs


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    import tilefold.transformers

    tilefold.transformers.register()
    yield
    tilefold.transformers.unregister()


def drawn(len_q: int, len_k: int, heads_kv: int = 2) -> list[Any]:
    """q, k and v as a model has them: views of (batch, length, heads, dim)."""
    import torch

    generator = torch.Generator().manual_seed(3)
    sizes = ((len_q, 4), (len_k, heads_kv), (len_k, heads_kv))
    made = [torch.randn(2, n, heads, 8, generator=generator) for n, heads in sizes]
    return [x.transpose(1, 2) for x in made]


def called(q: Any, k: Any, v: Any, mask: Any = None, module: Any = None, **given: Any) -> Any:
    from tilefold.frontends.transformers.attention import attention

    o, weights = attention(module or SimpleNamespace(), q, k, v, mask, **given)
    assert weights is None
    assert o.is_contiguous()
    assert o.shape == (k.shape[0], q.shape[2], q.shape[1], v.shape[3])
    return o.transpose(1, 2)


def plain(q: Any, k: Any, v: Any, mask: Any = None, **given: Any) -> Any:
    import torch

    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, attn_mask=mask, enable_gqa=True, **given)


def close(found: Any, expected: Any) -> None:
    import torch

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def llama(attention: str = "tilefold", **more: Any) -> Any:
    return MODELS["llama"].build(attention, **more)


def ids_of(batch: int = 2) -> Any:
    return MODELS["llama"].inputs()["input_ids"][:batch]


def test_causality_is_the_caller_s_then_the_module_s_then_true() -> None:
    q, k, v = drawn(5, 5)
    past, all_keys = plain(q, k, v, is_causal=True), plain(q, k, v)
    one_way, both_ways = (SimpleNamespace(is_causal=flag) for flag in (True, False))
    close(called(q, k, v), past)
    close(called(q, k, v, module=one_way), past)
    close(called(q, k, v, module=both_ways), all_keys)
    close(called(q, k, v, module=both_ways, is_causal=True), past)
    close(called(q, k, v, module=one_way, is_causal=False), all_keys)


def test_one_query_sees_all_keys_without_a_mask() -> None:
    q, k, v = drawn(1, 6)
    close(called(q, k, v), plain(q, k, v))


def test_a_cache_that_is_not_full_yet_is_seen_from_its_start() -> None:
    import torch

    q, k, v = drawn(4, 9)
    bias = torch.randn(1, 4, 4, 9)
    close(called(q, k, v), plain(q, k[:, :, :4], v[:, :, :4], is_causal=True))
    seen = bias[..., :4].masked_fill(~torch.ones(4, 4, dtype=torch.bool).tril(), -torch.inf)
    close(called(q, k, v, position_bias=bias), plain(q, k[:, :, :4], v[:, :, :4], seen))


def test_more_queries_than_keys_stand_at_the_start() -> None:
    q, k, v = drawn(6, 4)
    close(called(q, k, v), plain(q, k, v, is_causal=True))


def test_scaling_may_be_none_or_any_number() -> None:
    q, k, v = drawn(5, 5)
    close(called(q, k, v, scaling=None), plain(q, k, v, is_causal=True))
    close(called(q, k, v, scaling=1.0), plain(q, k, v, is_causal=True, scale=1.0))


def test_a_batch_of_one_query_meets_a_batch_of_keys() -> None:
    q, k, v = drawn(5, 5)
    expected = plain(q[:1].expand(2, -1, -1, -1), k, v)
    close(called(q[:1], k, v, is_causal=False), expected)


@pytest.mark.parametrize("kind", ["bool", "additive", "lowest", "keys", "longer"])
def test_a_mask_of_the_caller_s_own_reaches_the_layer_as_it_is(kind: str) -> None:
    import torch

    q, k, v = drawn(5, 7)
    generator = torch.Generator().manual_seed(4)
    seen = torch.rand(2, 1, 5, 7, generator=generator) < 0.6
    seen[..., 0] = True
    if kind == "keys":
        seen = seen[:, :, :1]
    mask = seen
    if kind == "additive":
        mask = torch.randn(2, 4, 5, 7, generator=generator)
    elif kind == "lowest":
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    elif kind == "longer":
        mask = torch.nn.functional.pad(seen, (0, 3))
    expected = mask[..., :7]
    close(called(q, k, v, mask), plain(q, k, v, expected))


def test_a_mask_of_integers_is_refused() -> None:  # 1 would be added to scores
    import torch

    with pytest.raises(TypeError, match="attention_mask must be of bool or of floats, got"):
        called(*drawn(5, 7), torch.ones(2, 1, 5, 7, dtype=torch.int64))


@pytest.mark.parametrize("dtype", ["bool", "float32"])
def test_a_model_takes_masks_with_four_axes(dtype: str) -> None:
    import torch

    seen = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    seen[:, :, 5:, 2] = False
    if dtype == "float32":
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    else:
        mask = seen
    rows = [llama(it)(ids_of(), attention_mask=mask).logits for it in ("sdpa", "tilefold")]
    close(rows[1], rows[0])


def test_padding_changes_the_result() -> None:
    inputs = MODELS["llama"].inputs()
    shown = inputs["attention_mask"].bool()
    model = llama()
    padded, full = model(**inputs).logits, model(inputs["input_ids"]).logits
    assert bool(((padded - full)[0][shown[0]].abs() > 1e-3).any())
    close(padded[1], full[1])


def test_packed_positions_separate_sequences() -> None:
    import torch

    ids, model = ids_of(1), llama()
    cuts = [0, 3, 7, 9]
    pairs = [*pairwise(cuts)]
    positions = torch.cat([torch.arange(b - a) for a, b in pairs])[None]
    alone = torch.cat([model(ids[:, a:b]).logits for a, b in pairs], 1)
    close(model(ids, position_ids=positions, use_cache=False).logits, alone)
    # Transformers looks for packed positions only where there is no cache. Lengths always count.
    cu = torch.tensor(cuts, dtype=torch.int32)
    given = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 4, "max_length_k": 4}
    close(model(ids, position_ids=positions, **given).logits, alone)
    with pytest.raises(ValueError, match="a batch of 1; got one of 2"):
        model(ids_of(), **given)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences_are_aligned_at_their_ends(window: int | None, causal: bool) -> None:
    from tilefold.frontends.transformers.packed import packed

    queries, keys = [2, 0, 3, 1], [5, 2, 3, 4]
    cu_q, cu_k = (np.cumsum([0, *sizes]) for sizes in (queries, keys))
    expected = np.zeros((8, 16), bool)
    for i, (n, m) in enumerate(zip(queries, keys, strict=True)):
        q, k = np.ogrid[m - n : m, :m]
        seen = (k <= q if causal else k < m) & (True if window is None else k > q - window)
        expected[cu_q[i] : cu_q[i + 1], cu_k[i] : cu_k[i + 1]] = seen
    import torch

    rule = packed(torch.tensor(cu_q), torch.tensor(cu_k), 8, 16, causal, window)
    np.testing.assert_array_equal(rule.to_dense(8, 16), expected)


@pytest.mark.parametrize(
    ("cu_q", "cu_k", "says"),
    [
        ([0, 3, 2], [0, 3, 4], "cu_seq_lens_q must rise from 0 to at most 4, got"),
        ([0, 4], [0, 9], "cu_seq_lens_k must rise from 0 to at most 8, got"),
        ([0, 4], [0, 3, 8], "as many sequences, got 1 and 2"),
    ],
)
def test_lengths_of_packed_sequences_that_do_not_fit_are_refused(
    cu_q: list[int], cu_k: list[int], says: str
) -> None:
    import torch

    from tilefold.frontends.transformers.packed import packed

    with pytest.raises(ValueError, match=says):
        packed(torch.tensor(cu_q), torch.tensor(cu_k), 4, 8, True, None)


def test_weights_are_not_there_and_a_line_says_so() -> None:
    with pytest.warns(UserWarning, match="attn_implementation='eager' to get them"):
        made = llama()(ids_of(), output_attentions=True)
    assert not any(x is not None for x in made.attentions or ())


def test_dropout_is_that_of_tilefold_and_follows_from_torch_s_seed() -> None:
    import torch

    import tilefold

    q, k, v = drawn(6, 6, heads_kv=4)
    torch.manual_seed(5)
    found = called(q, k, v, dropout=0.4)
    torch.manual_seed(5)
    close(found, tilefold.attention(q, k, v, mask=tilefold.causal(), dropout=0.4))
    model = llama(attention_dropout=0.5).train()
    losses = []
    for seed in (6, 6, 7):
        torch.manual_seed(seed)
        losses.append(model(ids_of(), labels=ids_of()).loss.item())
    assert losses[0] == losses[1] != losses[2]


def test_soft_caps_sinks_and_biases_have_gradients_beside_padding() -> None:
    import torch

    shown = torch.tensor([[False, True, True, True, True], [True] * 5])
    q, k, v = drawn(5, 5, heads_kv=4)
    sinks, bias = torch.randn(4), torch.randn(1, 4, 5, 5)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, sinks, bias)]

    def scores(q: Any, k: Any, v: Any, sinks: Any, bias: Any) -> Any:
        s = torch.tanh(q @ k.transpose(2, 3) * 8**-0.5 / 2) * 2 + bias
        s = s.masked_fill(~shown[:, None, None], -torch.inf)
        column = sinks.view(1, 4, 1, 1).expand(2, 4, 5, 1)
        return torch.cat([s, column], 3).softmax(3)[..., :-1] @ v

    def ours(q: Any, k: Any, v: Any, sinks: Any, bias: Any) -> Any:
        mask = masked(shown)
        return called(q, k, v, mask, softcap=2.0, s_aux=sinks, position_bias=bias)

    rows = []
    for function in (scores, ours):
        o = function(*leaves)
        rows.append((o, *torch.autograd.grad(o.square().sum(), leaves)))
    for found, expected in zip(rows[1], rows[0], strict=True):
        close(found, expected)


def masked(shown: Any) -> Any:
    """The mask of padding that an encoder's layers get."""
    from transformers.masking_utils import bidirectional_mask_function

    from tilefold.frontends.transformers.sight import mask_of

    return mask_of(
        batch_size=len(shown),
        q_length=shown.shape[1],
        kv_length=shown.shape[1],
        q_offset=0,
        kv_offset=0,
        mask_function=bidirectional_mask_function,
        attention_mask=shown,
        device=shown.device,
    )


def test_large_batches_skip_padding_and_small_ones_read_it() -> None:
    import torch

    for length, arrays in ((8, 1), (300, 0)):
        shown = torch.arange(length)[None] < torch.tensor([[length], [length // 2]])
        assert len(masked(shown).arrays) == arrays


def test_a_mask_of_other_keys_is_refused() -> None:
    import torch

    q, k, v = drawn(5, 5)
    mask = masked(torch.tensor([[True, False, True, True]] * 2))
    with pytest.raises(ValueError, match="was made for 4 keys, and the layer has 5"):
        called(q, k, v, mask)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "t5"])
def test_training_with_gradient_checkpointing(name: str) -> None:
    import torch

    inputs = MODELS[name].inputs()
    slopes = []
    for checkpoints in (False, True):
        model = MODELS[name].build("tilefold")
        if checkpoints:
            model.gradient_checkpointing_enable()
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        model.train()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        slopes.append([p.grad for p in model.parameters() if p.grad is not None])
    for found, expected in zip(*slopes, strict=True):
        close(found, expected)


def test_beams_and_bfloat16() -> None:
    import torch

    inputs = MODELS["mistral"].inputs()
    ask = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    rows = [MODELS["mistral"].build(it).generate(**inputs, **ask) for it in ("eager", "tilefold")]
    assert torch.equal(*rows)
    with torch.autocast("cpu", torch.bfloat16):
        values = [llama(it)(**inputs).logits.float() for it in ("sdpa", "tilefold")]
    torch.testing.assert_close(values[1][1], values[0][1], rtol=0.05, atol=0.05)
    low = [llama(it).bfloat16()(**inputs).logits.float() for it in ("sdpa", "tilefold")]
    torch.testing.assert_close(low[1][1], low[0][1], rtol=0.05, atol=0.05)


def test_an_implementation_may_change_later_and_for_a_part() -> None:
    import torch

    model = llama("sdpa")
    expected = model(ids_of()).logits
    for wanted in ("tilefold", {"": "tilefold"}):
        model.set_attn_implementation(wanted)
        assert model.config._attn_implementation == "tilefold"
        close(model(ids_of()).logits, expected)
    assert torch.isfinite(expected).all()


@pytest.mark.parametrize("name", ["gpt_oss", "modernbert"])
def test_a_compiled_model_takes_a_new_padding_without_another_graph(name: str) -> None:
    import torch
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, other = MODELS[name].build("tilefold"), MODELS[name].build("eager")
    step = torch.compile(model, backend=counter, fullgraph=True)
    inputs = MODELS[name].inputs()
    if name == "gpt_oss":
        inputs["use_cache"] = False
    for _ in range(2):
        shown = inputs["attention_mask"].bool()
        rows = []
        for function, whose in ((step, model), (other, other)):
            whose.zero_grad()
            values = function(**inputs)[0][shown]
            values.square().sum().backward()
            rows.append([values, *[p.grad for p in whose.parameters() if p.grad is not None]])
        for found, expected in zip(*rows, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)
        inputs["attention_mask"] = inputs["attention_mask"].flip(0)
    assert counter.frame_count == 1


def test_a_compiled_model_takes_packed_sequences() -> None:
    import torch

    torch._dynamo.reset()
    ids, model = ids_of(1), llama()
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    cu = torch.tensor([0, 3, 7, 9], dtype=torch.int32)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]])
    expected = model(ids, position_ids=positions, use_cache=False).logits
    given = {"position_ids": positions, "use_cache": False}
    close(step(ids, **given).logits, expected)
    close(step(ids, **given, cu_seq_lens_q=cu, cu_seq_lens_k=cu).logits, expected)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="pass one tensor as cu_seq_lens_q"):
        step(ids, **given, cu_seq_lens_q=cu, cu_seq_lens_k=cu + 0)


def test_a_compiled_step_decodes_from_a_static_cache() -> None:
    import torch
    from transformers import StaticCache

    torch._dynamo.reset()
    inputs, rows = MODELS["llama"].inputs(), []
    for attention in ("eager", "tilefold"):
        model = llama(attention)
        cache = StaticCache(config=model.config, max_cache_len=14)
        shown = torch.nn.functional.pad(inputs["attention_mask"], (0, 5), value=1)
        with torch.no_grad():
            made = model(inputs["input_ids"], attention_mask=shown[:, :9], past_key_values=cache)
            step = model if attention == "eager" else torch.compile(model, backend="aot_eager")
            found = []
            for n in range(10, 13):
                made = step(
                    made.logits[:, -1:].argmax(-1),
                    attention_mask=shown * (torch.arange(14) < n),
                    past_key_values=cache,
                )
                found.append(made.logits)
        rows.append(torch.cat(found))
    close(rows[1], rows[0])


def test_continuous_batching_runs_where_tilefold_replaces_sdpa(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch
    from transformers import ContinuousBatchingConfig, GenerationConfig

    import tilefold.transformers
    from tilefold.frontends.transformers import attention as room

    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    ask = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # Its buffers are for all the memory of the machine by default, and filling them takes a minute.
    buffers = ContinuousBatchingConfig(page_size=16, num_blocks=8, max_batch_tokens=32)
    calls: list[int] = []
    inner = room.packed
    monkeypatch.setattr(room, "packed", lambda *given: calls.append(1) or inner(*given))
    for name in ("llama", "mistral"):
        model = MODELS[name].build("sdpa")
        alone = [
            model.generate(torch.tensor([it]), max_new_tokens=6, do_sample=False, eos_token_id=-1)
            for it in prompts
        ]
        tilefold.transformers.register(replace_sdpa=True)
        try:
            made = model.generate_batch(
                inputs=prompts, generation_config=ask, continuous_batching_config=buffers
            )
        finally:
            tilefold.transformers.unregister()
            tilefold.transformers.register()
        tokens = sorted(row.generated_tokens for row in made.values())
        assert tokens == sorted(row[0, -6:].tolist() for row in alone)
        assert calls
        calls.clear()


def test_models_that_compute_their_attention_themselves_are_refused_or_left_alone() -> None:
    import torch
    import transformers

    import tilefold.transformers

    ids, sizes = ids_of(), {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4}
    bloom = transformers.BloomConfig(**sizes, n_layer=1)  # it adds a mask of floats to scores
    own = transformers.BloomForCausalLM._from_config(bloom, attn_implementation="tilefold")
    with pytest.raises(
        NotImplementedError, match="the model of BloomConfig computes its attention"
    ):
        own(ids)
    falcon = transformers.FalconConfig(**sizes, num_hidden_layers=1)  # it calls torch's attention
    model = transformers.FalconForCausalLM._from_config(falcon, attn_implementation="sdpa").eval()
    shown = torch.ones_like(ids)
    shown[0, :2] = 0
    expected = model(ids, attention_mask=shown).logits
    tilefold.transformers.register(replace_sdpa=True)
    try:
        close(model(ids, attention_mask=shown).logits, expected)
    finally:
        tilefold.transformers.unregister()
        tilefold.transformers.register()


def test_a_decoder_that_says_it_is_not_causal_is_so_by_its_mask() -> None:
    import torch
    from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration

    sides = {
        f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "ffn_dim")
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = NllbMoeConfig(vocab_size=99, d_model=16, num_experts=2, dropout=0.0, **sides, **heads)
    rows = []
    for attention in ("eager", "tilefold"):
        torch.manual_seed(0)
        model = NllbMoeForConditionalGeneration._from_config(config, attn_implementation=attention)
        rows.append(model.eval()(input_ids=ids_of(), decoder_input_ids=ids_of()).logits)
    close(rows[1], rows[0])


def test_masks_of_models_on_torch_s_attention_are_recognised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    import tilefold.torch
    from tilefold.frontends.torch import masked

    model, ids = MODELS["mistral"].build("sdpa"), torch.randint(3, 97, (2, 448))
    shown = torch.ones_like(ids)
    shown[0, :100] = 0
    rules, inner = [], masked.rule_of
    monkeypatch.setattr(masked, "rule_of", lambda *given: rules.append(inner(*given)) or rules[-1])
    with torch.inference_mode():
        expected = model(ids, attention_mask=shown).logits
        before = tilefold.torch.stats()
        with tilefold.torch.enabled():
            made = model(ids, attention_mask=shown).logits
    after = tilefold.torch.stats()
    assert (after["hits"] - before["hits"], after["misses"]) == (2, before["misses"])
    assert "intervals(bq" in str(rules[-1])  # in the second layer: they came before
    close(made[shown == 1], expected[shown == 1])


def test_register_is_undone() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    import tilefold.transformers

    interfaces = AttentionInterface(), AttentionMaskInterface()
    tilefold.transformers.unregister()
    before = [dict(interface) for interface in interfaces]
    assert not any("tilefold" in table for table in before)
    for _ in range(2):
        tilefold.transformers.register(replace_sdpa=True)
    assert all(interface["sdpa"] is interface["tilefold"] for interface in interfaces)
    tilefold.transformers.unregister()
    assert [dict(interface) for interface in interfaces] == before
    tilefold.transformers.register()
    with pytest.raises(TypeError, match="replace_sdpa must be True or False, got 'sdpa'"):
        tilefold.transformers.register(replace_sdpa="sdpa")  # type: ignore[arg-type]
