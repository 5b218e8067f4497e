"""Keras' own function, exchanged for one that calls tilefold, and put back.

`keras.ops.dot_product_attention` looks up `dot_product_attention` of the backend's module at each
call. So an exchange of this one attribute reaches the operation and the layers that use it. Keras
has no registry of implementations.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from typing import Any

import keras

from tilefold.layers.tensors import Hidden, attend, obstacle, tensor_of
from tilefold.masks.position_rules import causal
from tilefold.problems.request import PRECISIONS, check_precision
from tilefold.scores.modifications import bias as biased
from tilefold.scores.modifications import softcap
from tilefold.scores.score import Score

_NAME, _CAP = "dot_product_attention", "attn_logits_soft_cap"
"""The function, and its argument that older versions of Keras do not have."""


class _State:
    """Whether Keras' function is exchanged, as `enable` and open blocks of `enabled` ask for."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.asked = False
        self.blocks = 0
        self.own: Callable[..., Any] | None = None
        self.ours: Callable[..., Any] | None = None
        self.said: set[str] = set()
        self.precision = PRECISIONS[0]

    @property
    def active(self) -> bool:
        return self.asked or self.blocks > 0

    def change(self, asked: bool | None = None, blocks: int = 0) -> None:
        """Take a wish or a block into account; what another library put there stays."""
        with self.lock:
            before = self.active
            self.asked = self.asked if asked is None else asked
            self.blocks += blocks
            if self.active is before:
                return
            module = import_module(f"keras.src.backend.{keras.backend.backend()}.nn")
            current = getattr(module, _NAME)
            if before and current is self.ours:
                setattr(module, _NAME, self.own)
            elif not before and current is not self.ours:
                self.own, self.ours = current, _in_place_of(current)
                self.said.clear()
                setattr(module, _NAME, self.ours)


_state = _State()


def enable(precision: str = "highest") -> None:
    """Make Keras' attention use tilefold's kernels, until `disable()`.

    >>> import keras
    >>> import tilefold.keras
    >>> tilefold.keras.enable()
    >>> layer = keras.layers.MultiHeadAttention(num_heads=2, key_dim=4)
    >>> x = keras.random.normal((1, 5, 8))
    >>> tuple(layer(x, x, use_causal_mask=True).shape)
    (1, 5, 8)
    >>> tilefold.keras.disable()

    It reaches `keras.ops.dot_product_attention`, and the layers `MultiHeadAttention` and
    `GroupQueryAttention` without dropout, in models that were built before or will be. What a
    framework has compiled already stays as it is. A second call changes nothing. What tilefold
    cannot do goes to Keras' own function, and a warning says so, once until the next `enable()`.

    Arguments:
        precision: the least precision of products of float32, as for `tilefold.attention`. On
            processors with fast bfloat16 products "medium" is faster. It also counts in blocks of
            `enabled()`

    A query that sees no key gets 0; Keras gives it the mean of all values.

    Raises ValueError where Keras' backend is neither "tensorflow" nor "jax" nor "torch", and for
    another precision.
    """
    check_precision(precision)
    if keras.backend.backend() not in ("tensorflow", "jax", "torch"):
        raise ValueError(
            "Keras' backend must be 'tensorflow', 'jax' or 'torch', got"
            f" {keras.backend.backend()!r}"
        )
    _state.precision = precision
    _state.change(asked=True)


def disable() -> None:
    """Put Keras' own function back, unless a block of `enabled()` still runs.

    >>> import tilefold.keras
    >>> tilefold.keras.disable()
    """
    _state.precision = PRECISIONS[0]
    _state.change(asked=False)


@contextmanager
def enabled() -> Iterator[None]:
    """`enable()` for a block; blocks may be nested, and run in several threads.

    >>> import keras
    >>> import tilefold.keras
    >>> q = keras.random.normal((1, 5, 2, 4))
    >>> with tilefold.keras.enabled():
    ...     o = keras.ops.dot_product_attention(q, q, q, is_causal=True)
    >>> tuple(o.shape)
    (1, 5, 2, 4)

    While a block runs, attention of all threads runs here.
    """
    _state.change(blocks=1)
    try:
        yield
    finally:
        _state.change(blocks=-1)


def _in_place_of(own: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(own)
    def dot_product_attention(
        query: Any,
        key: Any,
        value: Any,
        bias: Any = None,
        mask: Any = None,
        scale: Any = None,
        is_causal: bool = False,
        flash_attention: bool | None = None,
        attn_logits_soft_cap: float | None = None,
    ) -> Any:
        given = (query, key, value, bias, mask, scale, is_causal)
        if _state.active:  # another library may still hold this function
            try:
                return _attention(*given, attn_logits_soft_cap)
            except NotImplementedError as error:
                _say(str(error))
        capped = {} if attn_logits_soft_cap is None else {_CAP: attn_logits_soft_cap}
        return own(*given, flash_attention, **capped)

    return dot_product_attention


def _attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    mask: Any,
    scale: Any,
    is_causal: bool,
    soft_cap: float | None,
) -> Any:
    """Keras' function of the same arguments. Raises NotImplementedError for what is Keras' own."""
    tensors = [tensor_of(x) for x in (query, key, value)]
    dtype = keras.backend.result_type(*[x.dtype for x in tensors])
    tensors = [keras.ops.cast(x, dtype) for x in tensors]
    reason = obstacle(*tensors)
    if reason is not None:
        raise NotImplementedError(reason)
    rule = causal(align="start") if is_causal else None
    masks: tuple[Any, ...] = ()
    if mask is not None:
        masks = (keras.ops.cast(tensor_of(mask), "bool"),)
    scores: list[Score] = [] if soft_cap is None else [softcap(soft_cap)]
    if bias is not None:
        scores.append(biased(keras.ops.cast(tensor_of(bias), dtype)))
    q, k, v = tensors
    precision = _state.precision
    return attend(q, k, v, Hidden(rule, masks), scores, scale=scale, precision=precision)


def _say(reason: str) -> None:
    """Warn once of a call that Keras computes; an empty reason is not worth a word."""
    with _state.lock:
        if not reason or reason in _state.said:
            return
        _state.said.add(reason)
    warnings.warn(
        f"Keras computes this attention itself, tilefold does not: {reason}", stacklevel=5
    )
