"""The public calls: attention, its gradients, and the merge of partial results.

The class of the arrays chooses the frontend. A framework is looked up among the modules that the
program has already imported, so tilefold never imports a framework to find out that it is unused.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, Final, NoReturn

from tilefold.backends.extra import Extra, taken_apart
from tilefold.common.check import flag
from tilefold.frontends import registry
from tilefold.implementations import KERNEL, find
from tilefold.masks.position_rules import Rule
from tilefold.problems.keywords import refusal, without_unknown
from tilefold.problems.request import Request
from tilefold.scores.score import Score

NO_DROPOUT: Final = 0.0
"""The default: a call that leaves `dropout` out is known by this very object."""


@without_unknown
def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Rule | None = None,
    scale: float | None = None,
    score: Score | Sequence[Score] | None = None,
    sinks: Any = None,
    dropout: float = NO_DROPOUT,
    seed: int | None = None,
    layout: str = "bhnd",
    precision: str = "highest",
    return_lse: bool = False,
    return_max: bool = False,
    impl: str = KERNEL,
    **unknown: NoReturn,
) -> Any:
    """Exact attention: o = softmax(scale * q k^T) v, where `mask` says which keys each query sees.

    >>> import numpy as np
    >>> import tilefold
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 1, 2, 5, 8))
    >>> o = tilefold.attention(q, k, v, mask=tilefold.causal())
    >>> bool(np.allclose(o[:, :, 0], v[:, :, 0]))  # the first query sees only the first key
    True
    >>> o, lse = tilefold.attention(q, k, v, return_lse=True)
    >>> o.shape, lse.shape
    ((1, 2, 5, 8), (1, 2, 5))

    The scores are computed tile by tile and folded into a running softmax. So memory grows with
    the lengths and not with their product. Tiles that the mask hides are skipped.

    Arguments:
        q: queries, (batch, heads_q, len_q, dim)
        k: keys, (batch, heads_kv, len_k, dim). heads_q is a multiple of heads_kv, and query head h
            reads key head h // (heads_q // heads_kv)
        v: values, (batch, heads_kv, len_k, dim_v)
            q, k and v are NumPy arrays, objects with `__array_interface__` or `__dlpack__`, torch
            tensors, JAX arrays, or TensorFlow tensors and variables. All have one type: float32,
            float64, float16 or bfloat16 (in NumPy, the bfloat16 of the package ml_dtypes). JAX and
            TensorFlow have the CPU. Torch tensors may lie on the CPU, on an Apple GPU
            ("mps", without float64) or on a GPU of NVIDIA or AMD ("cuda"). All strides are allowed.
            The arrays are read in place and never modified. Only misaligned arrays, and NumPy
            arrays that are byte-swapped or have strides that are no multiples of the item size,
            are copied first.
        mask: the rule that says which query sees which key, such as `causal() & local(256)`; None
            means `full()`
        score: what becomes of the scaled scores before the softmax, such as `softcap(30)`, or
            several in order, `[softcap(50), alibi()]`
        sinks: logits of each query head, (heads_q,) or (heads_q, number), of any type of floats;
            integers and nested lists are converted to float64. They are scores of keys without a
            value: exp(sink) is a part of the sum by which weights are divided. None means no sink
        scale: the factor of the scores, a finite number; None means 1 / sqrt(dim). It takes no
            gradient: a tensor that wants one is refused
        dropout: the probability that a weight is dropped, in [0, 1). The other weights are
            multiplied by 1 / (1 - dropout). lse is that of all weights. The seed and the indices of
            a pair alone decide whether it is dropped: `dropout_mask` shows it
        seed: the seed of dropout, an integer of 64 bits, which is not used without dropout. NumPy
            arrays need one. For torch tensors None means one from torch's generator, so that
            `torch.manual_seed` repeats it
        layout: the order of the axes of q, k, v and o. "bhnd" is the order above, "bnhd" is
            (batch, sequence, heads, dim), "bhdn" is (batch, heads, dim, sequence)
        precision: the least precision of products of float32 arrays, in the words of
            `torch.set_float32_matmul_precision`. "highest": float32. "high": each factor has about
            16 significant bits, as the sum of two bfloat16 values has. "medium": each factor is
            rounded to bfloat16. A machine without fast bfloat16 products computes more exactly
            than asked. The argument has no effect on other types. Torch's own setting is not read.
        return_lse: if True, also return the log-sum-exp of each query's scores
        return_max: if True, also return the largest score of each query
        impl: the implementation, one of the four below; the default is "kernel". If the chosen one
            cannot do a call, an error says why; no other one takes its place

    Returns:
        o: (batch, heads_q, len_q, dim_v) in the layout and type of q, contiguous. If q is a torch
            tensor, o is one too and is differentiable with respect to q, k, v, the arrays of score,
            and sinks, any number of times and in forward mode. If an array is of a library that
            follows the array API standard (`__array_namespace__`), such as MLX, all results are
            arrays of that library; NumPy arrays may stand beside it. Otherwise o is a NumPy array
        lse: only with return_lse: (batch, heads_q, len_q) in every layout, as natural logarithm,
            float64 for float64 arrays and float32 for all others. A torch tensor is differentiable

        max: only with return_max: (batch, heads_q, len_q), of the type of lse: the largest score,
            scaled and modified, of the keys that the query sees, without sinks. It has no gradient.
            The sum of the exponentials that softmax divides by is exp(lse - max)

    The results stand in the order o, lse, max. A query that sees no key has o = 0, max = -inf, and
    the lse of its sinks, which is -inf without any. Hidden keys and values never influence a
    query, even if they hold NaN or infinity. Visible ones follow IEEE arithmetic.

    The implementations, by the value of `impl`:

    - "kernel": tilefold's own kernels. Their memory is linear in the lengths
    - "composed": two matrix products and a softmax of NumPy or torch, in the type of lse. They
      store the scores, the weights and the mask of all len_q x len_k pairs. Torch tensors may be on
      any device
    - "native": torch's `scaled_dot_product_attention`, on any device. It also serves NumPy arrays
      if torch is installed. It computes no lse, so return_lse adds the scores of "composed"
    - "tensorops": tilefold's forward kernel on the matrix units of Metal 4, on Apple GPUs with them

    "kernel" and "composed" take `score`, `sinks`, `dropout` and `return_max`; the others refuse
    them.

    With "composed" and "native", torch computes the gradients, torch's own setting replaces
    `precision`, and NaN or infinity in a hidden key can reach a query, since it is multiplied by 0.

    Under `torch.compile` a rule is a constant of the graph, and so is the form of a score; the
    arrays of a score are inputs of the graph. Make rules that carry data, `rule(...)`,
    `score(...)` and `relative_bias(...)` outside the compiled function. Only "kernel" can be part
    of a graph.

    Raises:
        TypeError: q, k or v is not an array, their types differ or are not allowed, mask is not a
            rule, score is no score, dropout is no number, or seed is no integer
        ValueError: the shapes do not fit together or do not fit mask, score or sinks, or scale,
            dropout, seed, layout, precision or impl is not allowed
        IndexError: a score reads beyond one of its arrays
        NotImplementedError: the arrays lie on another device, JAX or TensorFlow traces an array
            beside q, k and v that are not its own, or `impl` cannot do it
        tf.errors.InvalidArgumentError: what ValueError and IndexError are above, where TensorFlow
            finds it when the call runs: in eager calls, and for shapes that its graph did not know
        ImportError: impl is "native", the arrays are NumPy arrays, and torch does not import

    The algorithm is FlashAttention-2 (Dao, 2023, arXiv:2307.08691); the running softmax is by
    Milakov and Gimelshein (2018, arXiv:1805.02867).
    """
    if unknown:
        raise refusal(attention, unknown)
    if return_lse is not False and return_lse is not True:
        return_lse = flag("return_lse", return_lse)
    if return_max is not False and return_max is not True:
        return_max = flag("return_max", return_max)
    frontend = registry.find(q=q, k=k, v=v)
    request = frontend.request_of(mask, scale, layout, precision)
    more = dropout is not NO_DROPOUT or return_max or impl != KERNEL
    if score is None and sinks is None and not more:
        o, lse = frontend.attention(q, k, v, request)
        return (o, lse) if return_lse else o
    request, extra = _taken(frontend, request, score, sinks, dropout, seed, q)
    further = ("max",) if return_max else ()
    if impl == KERNEL:
        o, lse, *largest = frontend.attention(q, k, v, request, extra, further)
    else:
        run = find(impl, frontend.__name__.split(".")[2])
        o, lse, *largest = run(q, k, v, request, return_lse, extra, further)
    return (o, *(lse,) * return_lse, *largest) if return_lse or return_max else o


@without_unknown
def attention_backward(
    do: Any,
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    lse: Any,
    *,
    dlse: Any = None,
    mask: Rule | None = None,
    scale: float | None = None,
    score: Score | Sequence[Score] | None = None,
    sinks: Any = None,
    dropout: float = NO_DROPOUT,
    seed: int | None = None,
    layout: str = "bhnd",
    precision: str = "highest",
    **unknown: NoReturn,
) -> tuple[Any, ...]:
    """The gradients dq, dk and dv of sum(do * o) + sum(dlse * lse) with respect to q, k and v.

    >>> import numpy as np
    >>> import tilefold
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 1, 2, 5, 8))
    >>> o, lse = tilefold.attention(q, k, v, mask=tilefold.causal(), return_lse=True)
    >>> do = np.ones_like(o)
    >>> dq, dk, dv = tilefold.attention_backward(do, q, k, v, o, lse, mask=tilefold.causal())
    >>> bool(np.allclose(dv.sum(axis=2), do.sum(axis=2)))  # the weights of each query sum to 1
    True

    This function serves frameworks without automatic differentiation. On torch tensors
    `attention` is differentiable, so only a custom autograd function needs this one.

    Arguments:
        do: the gradient with respect to o, (batch, heads_q, len_q, dim_v)
        q, k, v: the arrays that were given to `attention`
        o, lse: the results of `attention(..., return_lse=True)`
        dlse: the gradient with respect to lse, of its shape and type; None means 0
        mask, scale, score, sinks, dropout, seed, layout: the values that were given to `attention`;
            q, k, v, o and do are in the layout. With dropout there must be a seed
        precision: the least precision of products of float32 arrays, as for `attention`

    Returns:
        dq, dk, dv, each of the shape and type of its input. The gradient of a query that sees no
        key, and of a key that no query sees, is 0. With a score the gradients of its arrays follow,
        in their order of appearance, and with sinks theirs is the last.

    Raises:
        The errors of `attention`, and ValueError if the shape of do, o, lse or dlse does not fit
        q, k and v

    The probabilities are computed again from lse, tile by tile (Dao et al., 2022,
    arXiv:2205.14135, Algorithm 4). So each has a relative error of at least |lse| times half a unit
    in the last place: 6e-8 |lse| in float32. Autograd of torch tensors on the CPU keeps what
    rounding took from lse, and has no such error. The results are the same, bit for bit, in every
    run.
    """
    if unknown:
        raise refusal(attention_backward, unknown)
    frontend = registry.find(q=q, k=k, v=v, do=do, o=o, lse=lse)
    request = frontend.request_of(mask, scale, layout, precision)
    options: dict[str, Any] = {}
    if score is not None or sinks is not None or dropout is not NO_DROPOUT:
        request, options["extra"] = _taken(
            frontend, request, score, sinks, dropout, seed, q, draw=False
        )
    gradients: tuple[Any, ...] = frontend.attention_backward(
        do, q, k, v, o, lse, request, dlse=dlse, **options
    )
    return gradients


def _taken(
    frontend: ModuleType,
    request: Request,
    score: Any,
    sinks: Any,
    dropout: Any,
    seed: Any,
    q: Any,
    *,
    draw: bool = True,
) -> tuple[Request, Extra]:
    """The request with score, sinks and dropout, and the arrays beside q, k and v.

    `draw`: a frontend may draw a seed where there is none.
    """
    chance: float = 0.0 if dropout is NO_DROPOUT else frontend.chance_of(dropout)
    if chance and seed is None and not draw:
        raise ValueError("seed must be the one that was given to attention, got None")
    drawn = frontend.seed_of(seed, q) if chance else None
    return taken_apart(request, score, sinks, chance, drawn, frontend.extended_request)


def merge(o1: Any, lse1: Any, o2: Any, lse2: Any, *, layout: str = "bhnd") -> tuple[Any, Any]:
    """Attention over two disjoint sets of keys, from the results over each set.

    >>> import numpy as np
    >>> import tilefold
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 1, 2, 6, 8))
    >>> first = tilefold.attention(q, k[:, :, :4], v[:, :, :4], return_lse=True)
    >>> second = tilefold.attention(q, k[:, :, 4:], v[:, :, 4:], return_lse=True)
    >>> o, lse = tilefold.merge(*first, *second)
    >>> bool(np.allclose(o, tilefold.attention(q, k, v)))
    True

    Use it when the keys come in pieces: from several machines, or as a prompt that many queries
    share and the tokens that follow the prompt. The order of the two parts changes the results by
    rounding only. To merge more than two parts, merge them one after the other.

    Arguments:
        o1, o2: (batch, heads, len_q, dim_v) in the layout, as `attention` returned them
        lse1, lse2: (batch, heads, len_q), as `attention(..., return_lse=True)` returned them:
            float64 if o1 is float64, otherwise float32
            All four are NumPy arrays (or objects that NumPy can view), or all four are torch
            tensors, on any device. Results are of the kind that `attention` gives.
        layout: the order of the axes of o1, o2 and o, as for `attention`

    Returns:
        o, lse: of the shapes and types of o1 and lse1. A query that saw no key in one part
            (lse = -inf) has the result of the other part. A query that saw no key in either part
            has o = 0 and lse = -inf.

    For the gradients, call `attention_backward(do, q, k1, v1, o, lse)` for each part, with its keys
    and values and the merged o and lse. It returns dk and dv of that part; dq is the sum of the dq
    of all parts. On torch tensors the results are differentiable with respect to all four
    arguments, and so to the q, k and v that `attention` made them of.

    Raises:
        TypeError: an argument is not an array, or the types do not fit together
        ValueError: the shapes do not fit together, or layout is not allowed

    The weight of each part is its share of the sum of exponentials (Milakov and Gimelshein, 2018,
    arXiv:1805.02867, section 3.1).
    """
    frontend = registry.find(o1=o1, lse1=lse1, o2=o2, lse2=lse2)
    merged: tuple[Any, Any] = frontend.merge(o1, lse1, o2, lse2, layout)
    return merged
