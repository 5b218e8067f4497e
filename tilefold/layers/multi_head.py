"""Attention with projections, of the weights of Keras' layer of the same name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from tilefold.common.check import whole
from tilefold.layers.attention import Attention, Shape, masks_of
from tilefold.layers.settings import rule_of, text_of
from tilefold.layers.tensors import Hidden
from tilefold.masks.position_rules import Rule, causal
from tilefold.scores.score import Score

_OF_WEIGHTS = ("initializer", "regularizer", "constraint")


@keras.saving.register_keras_serializable(package="tilefold")
class MultiHeadAttention(keras.layers.Layer):  # type: ignore[misc]  # mypy does not follow Keras
    """Multi-head attention with a rule, scores, learned sinks and dropout in tilefold's kernels.

    >>> import keras
    >>> import tilefold
    >>> import tilefold.keras
    >>> layer = tilefold.keras.MultiHeadAttention(2, 4, mask=tilefold.causal(), dropout=0.1)
    >>> x = keras.random.normal((1, 5, 8))
    >>> tuple(layer(x, x).shape)
    (1, 5, 8)

    Its weights are those of `keras.layers.MultiHeadAttention` of the same arguments, in the same
    order: `get_weights` of one fits `set_weights` of the other. Sinks, if any, are the first.

    Arguments:
        num_heads: the number of heads of queries
        key_dim: the size of each head of queries and keys
        value_dim: the size of each head of values; None means `key_dim`
        num_key_heads: the number of heads of keys and values, which divides `num_heads`; None
            means `num_heads`
        mask, score, sinks, scale, dropout, precision, seed: as for `Attention`. With dropout the
            weights are not stored, and training stays linear in the lengths
        use_bias: whether projections add a bias
        output_shape: the size of the last axis of the output, an integer or a tuple of one; None
            means that of the query
        kwargs: `kernel_initializer`, `bias_initializer`, the same with `regularizer` and
            `constraint`, and further arguments of `keras.layers.Layer`

    The layer is called with

        query: (batch, len_q, size)
        value: (batch, len_k, size)
        key: (batch, len_k, size); None means `value`
        query_mask: (batch, len_q) of bool; key_mask, value_mask: (batch, len_k) of bool
        attention_mask: bool, (batch, len_q, len_k) or with an axis of heads before the last two,
            in addition to the rule. It is an array: no tile is skipped for it
        training: whether weights are dropped
        use_causal_mask: whether `causal(align="start")` is joined to the rule

    Raises TypeError or ValueError for other arguments, as `Attention` does.
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        num_key_heads: int | None = None,
        *,
        mask: Rule | str | None = None,
        score: Score | Sequence[Score] | str | None = None,
        sinks: int = 0,
        scale: float | None = None,
        dropout: float = 0.0,
        precision: str = "highest",
        seed: int | None = None,
        use_bias: bool = True,
        output_shape: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        given = {
            f"{what}_{kind}": kwargs.pop(f"{what}_{kind}", None)
            for what in ("kernel", "bias")
            for kind in _OF_WEIGHTS
        }
        super().__init__(**kwargs)
        sizes = {
            "num_heads": num_heads,
            "key_dim": key_dim,
            "value_dim": key_dim if value_dim is None else value_dim,
            "num_key_heads": num_heads if num_key_heads is None else num_key_heads,
        }
        sizes = {name: whole(name, size, 1) for name, size in sizes.items()}
        heads, groups = sizes["num_heads"], sizes["num_key_heads"]
        if heads % groups:
            raise ValueError(f"num_key_heads must divide num_heads, which is {heads}, got {groups}")
        self.sizes, self.use_bias = sizes, use_bias
        self.out = None if output_shape is None else _size_of(output_shape)
        self.mask = rule_of(mask)
        self.of_weights = _of_weights(given)
        self.core = Attention(
            None, score, sinks, scale, dropout, precision, seed, dtype=self.dtype_policy
        )
        self.supports_masking = True

    def build(self, query_shape: Shape, value_shape: Shape, key_shape: Shape | None = None) -> None:
        """Make the projections and the sinks."""
        key_shape = key_shape or value_shape
        for name, shape in {"query": query_shape, "value": value_shape, "key": key_shape}.items():
            if len(shape) != 3:
                raise ValueError(
                    f"{name} must have three axes, (batch, sequence, size), got shape {shape}"
                )
        heads, groups = self.sizes["num_heads"], self.sizes["num_key_heads"]
        dim, dim_v = self.sizes["key_dim"], self.sizes["value_dim"]
        self.query_dense = self._projection("query", query_shape, heads, dim)
        self.key_dense = self._projection("key", key_shape, groups, dim)
        self.value_dense = self._projection("value", value_shape, groups, dim_v)
        self.output_dense = self._dense(
            "attention_output", "abcd,cde->abe", (None, self.out or query_shape[2]), "e"
        )
        self.output_dense.build((*query_shape[:2], heads, dim_v))
        lengths = query_shape[:2], value_shape[:2]
        self.core.build(
            (*lengths[0], heads, dim), (*lengths[1], groups, dim), (*lengths[1], groups, dim_v)
        )

    def _projection(self, name: str, shape: Shape, heads: int, dim: int) -> Any:
        dense = self._dense(name, "abc,cde->abde", (None, heads, dim), "de")
        dense.build(shape)
        return dense

    def _dense(self, name: str, equation: str, shape: Shape, bias_axes: str) -> Any:
        made = keras.layers.EinsumDense(
            equation,
            output_shape=shape,
            bias_axes=bias_axes if self.use_bias else None,
            name=name,
            dtype=self.dtype_policy,
            **_of_weights(self._written()),
        )
        made.supports_masking = True
        return made

    def call(
        self,
        query: Any,
        value: Any,
        key: Any = None,
        query_mask: Any = None,
        value_mask: Any = None,
        key_mask: Any = None,
        attention_mask: Any = None,
        training: bool = False,
        use_causal_mask: bool = False,
    ) -> Any:
        """The attention; see the class."""
        rule, masks = self.mask, masks_of(query_mask, key_mask, value_mask)
        if use_causal_mask:
            start = causal(align="start")
            rule = start if rule is None else rule & start
        if attention_mask is not None:
            given = ops.cast(attention_mask, "bool")
            masks = (*masks, ops.expand_dims(given, 1) if len(given.shape) == 3 else given)
        heads = self.core.attention(
            self.query_dense(query),
            self.key_dense(value if key is None else key),
            self.value_dense(value),
            Hidden(rule, masks),
            training,
        )
        return self.output_dense(heads)

    def compute_output_shape(
        self, query_shape: Shape, value_shape: Shape, key_shape: Shape | None = None
    ) -> Shape:
        """The shape of the output."""
        return (*query_shape[:2], self.out or query_shape[2])

    def get_config(self) -> dict[str, Any]:
        """The arguments of the layer, a rule and a score as strings."""
        core = self.core.get_config()
        shared = ("score", "sinks", "scale", "dropout", "precision", "seed")
        return {
            **super().get_config(),
            **self.sizes,
            "mask": text_of("mask", self.mask),
            **{name: core[name] for name in shared},
            "use_bias": self.use_bias,
            "output_shape": self.out,
            **self._written(),
        }

    def _written(self) -> dict[str, Any]:
        """Initializers, regularizers and constraints as `get_config` keeps them.

        Each projection gets its own copy: an initializer that is used twice gives the same numbers.
        """
        return {name: keras.saving.serialize_keras_object(x) for name, x in self.of_weights.items()}


def _size_of(output_shape: int | Sequence[int]) -> int:
    """The size of the last axis. Raises TypeError or ValueError for other values."""
    if isinstance(output_shape, (tuple, list)) and len(output_shape) == 1:
        output_shape = output_shape[0]
    return whole("output_shape", output_shape, 1)


def _of_weights(given: dict[str, Any]) -> dict[str, Any]:
    """Initializers, regularizers and constraints, of their names or configurations."""
    usual = {"kernel_initializer": "glorot_uniform", "bias_initializer": "zeros"}
    made = {}
    for name, value in given.items():
        module = getattr(keras, f"{name.partition('_')[2]}s")
        made[name] = module.get(usual.get(name) if value is None else value)
    return made
