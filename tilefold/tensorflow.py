"""TensorFlow: attention as an operator of its graphs, and between channel-first sequences.

The import registers tilefold's operators. A SavedModel that holds them loads after it. The names,
arguments and meanings of the six functions are those of the package tf_flash_attention.
"""

from __future__ import annotations

import inspect
from typing import Any

import tensorflow as tf

from tilefold import api
from tilefold.frontends.tensorflow import compiled, library, operators, sequences

__all__ = [
    "attention",
    "causal_1d",
    "causal_2d",
    "full_1d",
    "full_2d",
    "local_1d",
    "local_2d",
]

if library.missing() is None:
    operators.registered()
    sequences.registered()
compiled.missing()  # registers what XLA calls


def attention(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """`tilefold.attention` on TensorFlow's tensors, and on what TensorFlow makes tensors of.

    >>> import tensorflow as tf
    >>> import tilefold.tensorflow
    >>> q, k, v = (tf.random.normal((1, 2, 5, 8)) for _ in range(3))
    >>> tilefold.tensorflow.attention(q, k, v, mask=tilefold.causal()).shape
    TensorShape([1, 2, 5, 8])

    The arguments are those of `tilefold.attention`. q, k and v are tensors, variables, Keras's
    variables, or NumPy arrays. Results are tensors, and differentiable with respect to q, k, v,
    the arrays of score, and sinks.

    Raises:
        TypeError, ValueError: as `tilefold.attention`, for options, types, and shapes that are
            known while a function is traced
        tf.errors.InvalidArgumentError: for shapes that do not fit together, where they are known
            when the call runs
    """
    return api.attention(*[tf.convert_to_tensor(array) for array in (q, k, v)], **options)


attention.__signature__ = inspect.signature(api.attention)  # type: ignore[attr-defined]


def full_1d(
    Q: Any, K: Any, V: Any, sync_mode: str = "none_front", returning_l_m: bool = False
) -> Any:
    """Attention between sequences, where every query sees every key.

    >>> import tensorflow as tf
    >>> from tilefold.tensorflow import full_1d
    >>> Q, K, V = tf.zeros((8, 32, 100)), tf.zeros((8, 32, 200)), tf.zeros((8, 16, 200))
    >>> full_1d(Q, K, V).shape
    TensorShape([8, 16, 100])

    Scores are scaled by 1 / sqrt(channels).

    Arguments:
        Q: queries, (batch..., channels, queries). There is at least one batch axis.
        K: keys, (batch..., channels, keys)
        V: values, (batch..., channels of values, keys)
            All are float16, float32 or float64, of one type.
        sync_mode: has no effect here
        returning_l_m: if True, also return l and m

    Returns:
        O: (batch..., channels of values, queries), of the type of Q. Gradients go through it to Q,
            K and V.
        l: only with returning_l_m: (batch..., queries), the sum of exp(score - m) over the keys
            that a query sees. It is float32 where Q is float16, else of the type of Q.
        m: only with returning_l_m: (batch..., queries), the largest of its scores, of the type of
            Q. m + log(l) is the log-sum-exp. l and m have no gradient.

    A query that sees no key has O = 0 and l = 0. Its m is the number whose bytes are all 0xFA:
    -57152 in float16, -6.5e35 in float32, -2.5e284 in float64. Its gradients are 0.

    Raises tf.errors.InvalidArgumentError for other types, for shapes that do not fit together, for
    sequences of length 0, and for another sync_mode.
    """
    return sequences.attention((Q, K, V), returning_l_m, 1, "full", sync_mode)


def causal_1d(Q: Any, K: Any, V: Any, sync_mode: str, returning_l_m: bool = False) -> Any:
    """Attention between sequences, where a query sees the keys at its own place and before.

    >>> import tensorflow as tf
    >>> from tilefold.tensorflow import causal_1d
    >>> Q, K, V = tf.zeros((1, 8, 6)), tf.zeros((1, 8, 3)), tf.eye(3)[None]
    >>> print((causal_1d(Q, K, V, "scale_end")[0] > 0).numpy().astype(int).T)
    [[0 0 0]
     [1 0 0]
     [1 0 0]
     [1 1 0]
     [1 1 0]
     [1 1 1]]

    Places are numbers along the longer sequence, of length M. With a = M // length for each:

    - "none_front": the place of position i is i
    - "scale_front": it is i * a
    - "scale_end": it is (i + 1) * a - 1

    Arguments:
        Q, K, V, returning_l_m: as for `full_1d`
        sync_mode: one of the three

    Returns O, or (O, l, m), and raises tf.errors.InvalidArgumentError, as `full_1d`.
    """
    return sequences.attention((Q, K, V), returning_l_m, 1, "causal", sync_mode)


def local_1d(
    Q: Any,
    K: Any,
    V: Any,
    window_size: int,
    log2_stride_size: int,
    is_causal: bool,
    sync_mode: str,
    returning_l_m: bool = False,
) -> Any:
    """Attention between sequences, where a query sees keys around its own place.

    >>> import tensorflow as tf
    >>> from tilefold.tensorflow import local_1d
    >>> Q, K, V = tf.zeros((1, 8, 4)), tf.zeros((1, 8, 8)), tf.eye(8)[None]
    >>> O = local_1d(Q, K, V, 2, 1, is_causal=False, sync_mode="scale_front")
    >>> print((O[0] > 0).numpy().astype(int).T)
    [[1 0 1 0 0 0 0 0]
     [1 0 1 0 1 0 0 0]
     [0 0 1 0 1 0 1 0]
     [0 0 0 0 1 0 1 0]]

    Arguments:
        Q, K, V, returning_l_m: as for `full_1d`
        window_size: the keys on either side that a query sees, the one at its own place counted: so
            it sees 2 * window_size - 1 places. An integer >= 1
        log2_stride_size: the places that it sees are 2**log2_stride_size apart, counted from its
            own. An integer >= 0
        is_causal: if True, hides the keys that `causal_1d` hides
        sync_mode: the places of positions, as for `causal_1d`

    Returns O, or (O, l, m), as `full_1d`. Raises tf.errors.InvalidArgumentError as `full_1d`, and
    for a window of 2**31 places or more.
    """
    return sequences.attention(
        (Q, K, V),
        returning_l_m,
        1,
        "local",
        sync_mode,
        window=window_size,
        log2_stride=log2_stride_size,
        causal=is_causal,
    )


def full_2d(
    Q: Any, K: Any, V: Any, sync_mode: str = "none_front", returning_l_m: bool = False
) -> Any:
    """Attention between sequences of two dimensions, where every query sees every key.

    >>> import tensorflow as tf
    >>> from tilefold.tensorflow import full_2d
    >>> Q, K, V = tf.zeros((8, 32, 4, 5)), tf.zeros((8, 32, 6, 7)), tf.zeros((8, 16, 6, 7))
    >>> full_2d(Q, K, V).shape
    TensorShape([8, 16, 4, 5])

    Arguments:
        Q: queries, (batch..., channels, height, width). There is at least one batch axis.
        K: keys, (batch..., channels, height of keys, width of keys)
        V: values, (batch..., channels of values, height of keys, width of keys)
        sync_mode, returning_l_m: as for `full_1d`

    Returns:
        O: (batch..., channels of values, height, width)
        l, m: only with returning_l_m: (batch..., height, width)

    Types, gradients, and queries that see no key are as in `full_1d`. Raises as `full_1d`.
    """
    return sequences.attention((Q, K, V), returning_l_m, 2, "full", sync_mode)


def causal_2d(Q: Any, K: Any, V: Any, sync_mode: str, returning_l_m: bool = False) -> Any:
    """Attention between sequences of two dimensions, in the order of reading.

    >>> import tensorflow as tf
    >>> from tilefold.tensorflow import causal_2d
    >>> Q, V = tf.zeros((1, 8, 2, 2)), tf.reshape(tf.eye(4), (1, 4, 2, 2))
    >>> O = causal_2d(Q, Q, V, "none_front")
    >>> print((tf.reshape(O, (4, 4)) > 0).numpy().astype(int).T)
    [[1 0 0 0]
     [1 1 0 0]
     [1 1 1 0]
     [1 1 1 1]]

    A query sees all keys of the rows before its own, and in its own row those at its column and
    before. Rows have places as in `causal_1d`, by the two heights, and columns by the two widths.

    Arguments: Q, K, V and returning_l_m as for `full_2d`; sync_mode as for `causal_1d`. Returns and
    raises as `full_2d`.
    """
    return sequences.attention((Q, K, V), returning_l_m, 2, "causal", sync_mode)


def local_2d(
    Q: Any,
    K: Any,
    V: Any,
    window_size: int,
    log2_stride_size: int,
    is_causal: bool,
    sync_mode: str,
    returning_l_m: bool = False,
) -> Any:
    """Attention between sequences of two dimensions, where a query sees keys around its own place.

    >>> import tensorflow as tf
    >>> from tilefold.tensorflow import local_2d
    >>> Q, V = tf.zeros((1, 8, 3, 3)), tf.reshape(tf.eye(9), (1, 9, 3, 3))
    >>> O = local_2d(Q, Q, V, 2, 0, is_causal=True, sync_mode="none_front")
    >>> print((O[0, :, 1, 1] > 0).numpy().astype(int))
    [1 1 1 1 1 0 0 0 0]

    The window of `local_1d` holds for rows and for columns, with one size and one stride. With
    is_causal, it hides the keys that `causal_2d` hides: keys of earlier rows may lie to the right
    of the query.

    Arguments: Q, K, V and returning_l_m as for `full_2d`; window_size, log2_stride_size, is_causal
    and sync_mode as for `local_1d`. Returns and raises as these.
    """
    return sequences.attention(
        (Q, K, V),
        returning_l_m,
        2,
        "local",
        sync_mode,
        window=window_size,
        log2_stride=log2_stride_size,
        causal=is_causal,
    )


for _name in __all__:
    vars(globals()[_name])["autograph_info__"] = None  # so AutoGraph does not rewrite them
