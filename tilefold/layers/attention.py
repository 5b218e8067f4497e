"""Attention of queries, keys and values as a layer of Keras, with sinks as weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from tilefold.common.check import whole
from tilefold.layers.settings import rule_of, score_of, text_of
from tilefold.layers.tensors import Hidden, attend, drawn, tensor_of
from tilefold.masks.position_rules import Rule
from tilefold.problems.dropout import check_probability, check_seed
from tilefold.problems.request import as_scale, check_precision, check_scale
from tilefold.scores.score import Score

Shape = tuple[int | None, ...]


@keras.saving.register_keras_serializable(package="tilefold")
class Attention(keras.layers.Layer):  # type: ignore[misc]  # mypy does not follow Keras
    """Exact attention of queries, keys and values in tilefold's kernels.

    >>> import keras
    >>> import tilefold
    >>> import tilefold.keras
    >>> layer = tilefold.keras.Attention(mask=tilefold.causal() & tilefold.local(3), sinks=True)
    >>> q = keras.random.normal((1, 5, 2, 4))
    >>> tuple(layer(q, q, q).shape)
    (1, 5, 2, 4)

    Arguments:
        mask: a rule such as `causal() & local(256)`, or its string; None means `full()`
        score: a modification of scores such as `softcap(30)`, several in a list, or their string
        sinks: the number of sinks of each head, which are weights of the layer and begin with 0.
            True means 1, and False none
        scale: the factor of the scores; None means 1 / sqrt(dim)
        dropout: the probability that a weight is dropped in training, in [0, 1)
        precision: as for `tilefold.attention`
        seed: an integer that seeds the dropout; None means one of chance
        kwargs: further arguments of `keras.layers.Layer`, such as `name` and `dtype`

    The layer is called with

        query: (batch, len_q, heads_q, dim)
        key: (batch, len_k, heads_kv, dim), where heads_kv divides heads_q
        value: (batch, len_k, heads_kv, dim_v)
        query_mask: (batch, len_q) of bool; a query that is False gets 0
        key_mask, value_mask: (batch, len_k) of bool; keys that are False are hidden
        training: whether weights are dropped

    and returns (batch, len_q, heads_q, dim_v). Masks that earlier layers made, such as `Embedding`
    with `mask_zero`, reach it by themselves.

    Raises TypeError or ValueError for other arguments, and ValueError when a layer is saved whose
    mask or score carries arrays, which no string holds.
    """

    def __init__(
        self,
        mask: Rule | str | None = None,
        score: Score | Sequence[Score] | str | None = None,
        sinks: int = 0,
        scale: float | None = None,
        dropout: float = 0.0,
        precision: str = "highest",
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_precision(precision)
        self.mask, self.score = rule_of(mask), score_of(score)
        self.number_of_sinks = int(sinks) if isinstance(sinks, bool) else whole("sinks", sinks, 0)
        self.scale = as_scale(scale)
        if self.scale is not None:
            check_scale(self.scale)
        self.dropout, self.precision = check_probability(dropout), precision
        self.seed = None if seed is None else check_seed(seed)
        self.sinks: Any = None
        self.generator = keras.random.SeedGenerator(self.seed) if self.dropout else None
        self.supports_masking = True

    def build(self, query_shape: Shape, key_shape: Shape, value_shape: Shape) -> None:
        """Make the weights: sinks, (heads_q, number)."""
        for name, shape in {"query": query_shape, "key": key_shape, "value": value_shape}.items():
            if len(shape) != 4:
                raise ValueError(
                    f"{name} must have four axes, (batch, sequence, heads, dim), got shape {shape}"
                )
        heads, groups = query_shape[2], key_shape[2]
        if heads and groups and heads % groups:
            raise ValueError(
                f"the heads of key must divide those of query, got {groups} and {heads}: query is"
                f" {query_shape} and key {key_shape}"
            )
        if self.number_of_sinks:
            shape = query_shape[2], self.number_of_sinks
            self.sinks = self.add_weight(
                shape=shape, initializer="zeros", name="sinks", autocast=False
            )

    def call(
        self,
        query: Any,
        key: Any,
        value: Any,
        query_mask: Any = None,
        key_mask: Any = None,
        value_mask: Any = None,
        training: bool = False,
    ) -> Any:
        """The attention; see the class."""
        hidden = Hidden(self.mask, masks_of(query_mask, key_mask, value_mask))
        return self.attention(query, key, value, hidden, training)

    def attention(
        self, query: Any, key: Any, value: Any, hidden: Hidden, training: bool | None
    ) -> Any:
        """Attention with the score, sinks and dropout of the layer, and another mask."""
        options = {"scale": self.scale, "precision": self.precision}
        if self.sinks is not None:
            options["sinks"] = tensor_of(self.sinks)
        if self.generator is not None and training:
            options |= {"dropout": self.dropout, "seed": drawn(self.generator)}
        scores = () if self.score is None else (self.score,)
        return attend(query, key, value, hidden, scores, **options)

    def compute_output_shape(
        self, query_shape: Shape, key_shape: Shape, value_shape: Shape
    ) -> Shape:
        """The shape of the output."""
        return (*query_shape[:3], value_shape[3])

    def get_config(self) -> dict[str, Any]:
        """The arguments of the layer, a rule and a score as strings."""
        return {
            **super().get_config(),
            "mask": text_of("mask", self.mask),
            "score": text_of("score", self.score),
            "sinks": self.number_of_sinks,
            "scale": self.scale,
            "dropout": self.dropout,
            "precision": self.precision,
            "seed": self.seed,
        }


def masks_of(query_mask: Any, key_mask: Any, value_mask: Any) -> tuple[Any, ...]:
    """Keras' masks of sequences as arrays that broadcast to (batch, heads, q, k)."""
    found = []
    if query_mask is not None:
        found.append(ops.cast(query_mask, "bool")[:, None, :, None])
    keys = [mask for mask in (key_mask, value_mask) if mask is not None]
    if len(keys) == 2 and keys[0] is keys[1]:
        keys.pop()
    return (*found, *[ops.cast(mask, "bool")[:, None, None, :] for mask in keys])
