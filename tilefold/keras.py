"""Attention of Keras 3 on the backends TensorFlow, JAX and PyTorch. Importing it imports Keras.

`enable()` makes existing models use tilefold's kernels. `Attention` and `MultiHeadAttention` are
layers with rules, scores, sinks and dropout.

    >>> import keras
    >>> import tilefold
    >>> import tilefold.keras
    >>> x = keras.random.normal((1, 5, 8))
    >>> with tilefold.keras.enabled():
    ...     y = keras.layers.MultiHeadAttention(num_heads=2, key_dim=4)(x, x, use_causal_mask=True)
    >>> layer = tilefold.keras.MultiHeadAttention(2, 4, mask=tilefold.causal(), sinks=True)
    >>> tuple(y.shape) == tuple(layer(x, x).shape)
    True
"""

from tilefold.layers.attention import Attention
from tilefold.layers.exchange import disable, enable, enabled
from tilefold.layers.multi_head import MultiHeadAttention

__all__ = ["Attention", "MultiHeadAttention", "disable", "enable", "enabled"]
