"""The two calls: attention and its gradients, on whatever arrays they are given.

The arrays choose the frontend. A framework is looked for among the modules that the program has
already imported, so none is ever imported for its absence.
"""

from __future__ import annotations

from typing import Any

from tilefold.frontends import registry
from tilefold.implementations import KERNEL, find
from tilefold.masks.position_rules import Rule


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Rule | None = None,
    scale: float | None = None,
    layout: str = "bhnd",
    precision: str = "highest",
    return_lse: bool = False,
    impl: str = KERNEL,
) -> Any:
    """Exact attention: softmax(scale * q k^T) v, each query over the keys that `mask` lets it see.

    >>> import numpy as np
    >>> import tilefold
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 1, 2, 5, 8))
    >>> o = tilefold.attention(q, k, v, mask=tilefold.causal())
    >>> bool(np.allclose(o[:, :, 0], v[:, :, 0]))  # the first query sees the first key alone
    True
    >>> o, lse = tilefold.attention(q, k, v, return_lse=True)
    >>> o.shape, lse.shape
    ((1, 2, 5, 8), (1, 2, 5))

    The scores are made a tile at a time and folded into a running softmax, so memory grows with
    the lengths and not with their product; tiles that the mask hides are skipped.

    Arguments:
        q: (batch, heads_q, len_q, dim)
        k: (batch, heads_kv, len_k, dim); heads_q is a multiple of heads_kv, and query head h reads
            key head h // (heads_q // heads_kv)
        v: (batch, heads_kv, len_k, dim_v)
            All three are NumPy arrays, or objects with `__array_interface__` or `__dlpack__`, or
            torch tensors; on the CPU, all float32, float64, float16 or bfloat16 (in NumPy, that
            of ml_dtypes). Torch tensors may also lie on an Apple GPU ("mps"), where there is no
            float64. They are read where they lie, whatever their strides, and never modified.
            (Arrays that are byte-swapped, misaligned or have strides between their items are
            copied first.)
        mask: which query sees which key, a rule such as `causal() & local(256)`; None is `full()`
        scale: a finite number; None is 1 / sqrt(dim)
        layout: the order of the axes of q, k, v and o. "bhnd" is as above; "bnhd" is (batch,
            sequence, heads, dim); "bhdn" is (batch, heads, dim, sequence)
        precision: how exact the products of float32 arrays must be at least, in the words of
            `torch.set_float32_matmul_precision`: "highest", all in float32; "high", as if the
            factors had about the 16 bits of two bfloat16 numbers; "medium", one bfloat16 number.
            A machine without fast products of bfloat16 computes more exactly than asked. Other
            types accept it, and it has no effect there. Torch's own setting is never read.
        return_lse: also return the log-sum-exp of each query's scores
        impl: who computes it, for comparison and trust (see below); none stands in for another.
            The default is "kernel"

    Returns:
        o: (batch, heads_q, len_q, dim_v) in the layout and type of q, contiguous; a torch tensor
            where q is one (differentiable with respect to q, k and v), else a NumPy array
        lse: with return_lse, (batch, heads_q, len_q) in any layout, natural logarithm, float64 for
            float64 and float32 for all others; gradients do not flow through it

    A query that sees no key gets o = 0 and lse = -inf. What a query may not see never reaches it,
    whatever it holds, NaN and infinity included; what it sees follows IEEE arithmetic.

    The same answer in four ways, by the name that `impl` gives:

    - "kernel": tilefold's own kernels, whose memory is linear in the lengths
    - "composed": two products and a softmax of NumPy's or torch's own, in the type of lse. They
      hold len_q x len_k scores, weights and a mask. Torch tensors may be on any device
    - "native": torch's `scaled_dot_product_attention`, on any device, and for NumPy arrays too
      where torch is installed. It has no lse: with return_lse composed scores are added
    - "tensorops": tilefold's forward kernel on Metal 4's matrix units, on Apple GPUs that have them

    With "composed" and "native" gradients are torch's, its own setting stands for `precision`, and
    NaN or infinity in what a query may not see can reach it, multiplied by 0.

    Under `torch.compile` a rule is a constant of the graph. Rules that carry data, and `rule(...)`,
    are made outside the compiled function. Only "kernel" can be part of a graph.

    Raises:
        TypeError: q, k or v is not an array, their types are mixed or are not floating point, or
            mask is not a rule
        ValueError: shapes do not fit together or to the mask, or scale, layout, precision or impl
            is not allowed
        NotImplementedError: arrays on other devices than these, or what an `impl` has no way to do
        ModuleNotFoundError: impl is "native" on NumPy arrays, and torch is not installed

    The algorithm is FlashAttention-2 (Dao, 2023, arXiv:2307.08691); the running softmax is by
    Milakov and Gimelshein (2018, arXiv:1805.02867).
    """
    frontend = registry.find(q=q, k=k, v=v)
    request = frontend.request_of(mask, scale, layout, precision)
    if impl == KERNEL:
        o, lse = frontend.attention(q, k, v, request)
    else:
        run = find(impl, frontend.__name__.rpartition(".")[2])
        o, lse = run(q, k, v, request, return_lse)
    return (o, lse) if return_lse else o


def attention_backward(
    do: Any,
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    lse: Any,
    *,
    mask: Rule | None = None,
    scale: float | None = None,
    layout: str = "bhnd",
    precision: str = "highest",
) -> tuple[Any, Any, Any]:
    """The gradients of sum(do * attention(q, k, v)) with respect to q, k and v.

    >>> import numpy as np
    >>> import tilefold
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 1, 2, 5, 8))
    >>> o, lse = tilefold.attention(q, k, v, mask=tilefold.causal(), return_lse=True)
    >>> do = np.ones_like(o)
    >>> dq, dk, dv = tilefold.attention_backward(do, q, k, v, o, lse, mask=tilefold.causal())
    >>> bool(np.allclose(dv.sum(axis=2), do.sum(axis=2)))  # the weights of each query sum to 1
    True

    For frameworks without automatic differentiation; torch tensors need it only for their own
    autograd functions, since `attention` is differentiable there.

    Arguments:
        do: (batch, heads_q, len_q, dim_v), the gradient of the result with respect to o
        q, k, v: as given to `attention`
        o, lse: as `attention(..., return_lse=True)` returned them
        mask, scale, layout: as given to `attention`; all arrays but lse are in the layout
        precision: of the products, as for `attention`

    Returns:
        dq, dk, dv, each of the shape and type of its input. A query that sees no key, and a key
        that no query sees, have gradient 0.

    Raises:
        As `attention` does; ValueError too where do, o or lse has another shape than q, k and v ask

    The probabilities are computed again from lse, a tile at a time (Dao et al., 2022,
    arXiv:2205.14135, Algorithm 4), and results are the same from run to run.
    """
    frontend = registry.find(q=q, k=k, v=v, do=do, o=o, lse=lse)
    request = frontend.request_of(mask, scale, layout, precision)
    gradients: tuple[Any, Any, Any] = frontend.attention_backward(do, q, k, v, o, lse, request)
    return gradients


def merge(o1: Any, lse1: Any, o2: Any, lse2: Any, *, layout: str = "bhnd") -> tuple[Any, Any]:
    """Attention over two sets of keys, from the results over each: the sets share no key.

    >>> import numpy as np
    >>> import tilefold
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 1, 2, 6, 8))
    >>> first = tilefold.attention(q, k[:, :, :4], v[:, :, :4], return_lse=True)
    >>> second = tilefold.attention(q, k[:, :, 4:], v[:, :, 4:], return_lse=True)
    >>> o, lse = tilefold.merge(*first, *second)
    >>> bool(np.allclose(o, tilefold.attention(q, k, v)))
    True

    For keys that come in pieces: from several machines, or a prompt that many queries share and
    what follows it. The order of the two does not matter but for rounding, and any number of
    results merge one by one.

    Arguments:
        o1, o2: (batch, heads, len_q, dim_v) in the layout, as `attention` returned them
        lse1, lse2: (batch, heads, len_q), as `attention(..., return_lse=True)` returned them, in
            float64 where o1 is float64, else in float32
        layout: the order of the axes of o1, o2 and o, as for `attention`
            All four are NumPy arrays (or what NumPy can view), or all torch tensors, on any device.

    Returns:
        o, lse: of the shapes and types of o1 and lse1. A query that saw no key in one part
            (lse = -inf) has the result of the other; one that saw none in both has o = 0 and
            lse = -inf.

    Results carry no gradient. The gradients of the parts follow from the merged results: for each
    part, `attention_backward(do, q, k1, v1, o, lse)` is what its keys and values add, and dq is the
    sum over the parts.

    Raises:
        TypeError: an argument is not an array, or their types do not fit together
        ValueError: shapes do not fit together, or layout is not allowed

    Each part is weighed by its share of the sum of exponentials (Milakov and Gimelshein, 2018,
    arXiv:1805.02867, section 3.1).
    """
    frontend = registry.find(o1=o1, lse1=lse1, o2=o2, lse2=lse2)
    merged: tuple[Any, Any] = frontend.merge(o1, lse1, o2, lse2, layout)
    return merged
