"""The functions of the package flash_attn, by name and layout: (batch, sequence, heads, dim).

Their meaning is that of flash_attn 2.1 and later: the last query meets the last key, in causal
masks, in windows, and in ALiBi. The package needs an NVIDIA or AMD GPU; these have tilefold's
kernels.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from tilefold.backends.extra import taken_apart
from tilefold.common.check import flag, shown, whole
from tilefold.frontends.torch import calls
from tilefold.masks import position_rules as rules
from tilefold.masks.position_rules import Rule
from tilefold.scores import modifications
from tilefold.scores.score import Score

Window = tuple[int, int]
EVERYTHING = (-1, -1)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = EVERYTHING,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """`flash_attn.flash_attn_func` by tilefold's kernels: the same arguments and results.

    >>> import torch
    >>> import tilefold.torch
    >>> q = torch.randn(2, 16, 8, 32)  # batch, sequence, heads, dim
    >>> k = v = torch.randn(2, 20, 2, 32)
    >>> tilefold.torch.flash_attn_func(q, k, v, causal=True, window_size=(8, 0)).shape
    torch.Size([2, 16, 8, 32])

    Arguments:
        q: (batch, queries, heads, dim), of float32, float64, float16 or bfloat16
        k, v: (batch, keys, key heads, dim); heads is a multiple of key heads
        dropout_p: the probability that a weight is dropped; `torch.manual_seed` repeats it
        softmax_scale: the factor of the scores; None means 1 / sqrt(dim)
        causal: the last query sees all keys, the one before all but the last
        window_size: (left, right): how many keys before and after its own a query sees; -1 has no
            end. What a window hides is skipped
        softcap: scores stay within (-softcap, softcap); 0 leaves them
        alibi_slopes: floats, (heads,) or (batch, heads); they get a gradient
        deterministic: no effect: gradients are the same in every run
        return_attn_probs: False; the weights are never stored

    Returns:
        o, (batch, queries, heads, dim), in the type of q, differentiable any number of times. A
        query that sees no key gets 0.

    Raises:
        TypeError, ValueError: the arguments do not fit together
        NotImplementedError: return_attn_probs is True, or the tensors lie on a device that has no
            kernels
    """
    if return_attn_probs:
        raise NotImplementedError(
            "return_attn_probs: the weights are never stored; tilefold.attention(...,"
            ' layout="bnhd", return_lse=True) returns lse, which gives each of them'
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor) or tensor.ndim != 4:
            raise ValueError(
                f"{name} must be a tensor (batch, sequence, heads, dim), got {_form(tensor)}"
            )
    mask = _window_rule(flag("causal", causal), window_size, q.shape[1], k.shape[1])
    scores: list[Score] = [modifications.softcap(softcap)] if softcap else []
    if alibi_slopes is not None:
        scores = [*scores, modifications.alibi(alibi_slopes)]
    chance = calls.chance_of(dropout_p) if dropout_p else 0.0
    seed = calls.seed_of(None, q) if chance else None
    request = calls.request_of(mask, softmax_scale, "bnhd", "highest")
    request, extra = taken_apart(request, scores, None, chance, seed, calls.extended_request)
    return calls.attention(q, k, v, request, extra)[0]


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *given: Any, **options: Any) -> Tensor:
    """`flash_attn_func` of one tensor with k and v, (batch, keys, 2, key heads, dim).

    >>> import torch
    >>> import tilefold.torch
    >>> q, kv = torch.randn(1, 4, 2, 8), torch.randn(1, 6, 2, 2, 8)
    >>> tilefold.torch.flash_attn_kvpacked_func(q, kv, causal=True).shape
    torch.Size([1, 4, 2, 8])

    The other arguments, results and errors are those of `flash_attn_func`.
    """
    k, v = _parts_of("kv", kv, 2)
    return flash_attn_func(q, k, v, *given, **options)


def flash_attn_qkvpacked_func(qkv: Tensor, *given: Any, **options: Any) -> Tensor:
    """`flash_attn_func` of one tensor with q, k and v, (batch, sequence, 3, heads, dim).

    >>> import torch
    >>> import tilefold.torch
    >>> tilefold.torch.flash_attn_qkvpacked_func(torch.randn(1, 4, 3, 2, 8), causal=True).shape
    torch.Size([1, 4, 2, 8])

    The other arguments, results and errors are those of `flash_attn_func`.
    """
    q, k, v = _parts_of("qkv", qkv, 3)
    return flash_attn_func(q, k, v, *given, **options)


def flash_attn_varlen_func(*_: Any, **__: Any) -> NoReturn:
    """Raises NotImplementedError: packed sequences are not here yet."""
    _not_packed("flash_attn_varlen_func")


def flash_attn_varlen_kvpacked_func(*_: Any, **__: Any) -> NoReturn:
    """Raises NotImplementedError: packed sequences are not here yet."""
    _not_packed("flash_attn_varlen_kvpacked_func")


def flash_attn_varlen_qkvpacked_func(*_: Any, **__: Any) -> NoReturn:
    """Raises NotImplementedError: packed sequences are not here yet."""
    _not_packed("flash_attn_varlen_qkvpacked_func")


def flash_attn_with_kvcache(*_: Any, **__: Any) -> NoReturn:
    """Raises NotImplementedError: caches that the function writes to are not here yet."""
    _not_paged("flash_attn_with_kvcache")


def _window_rule(is_causal: bool, window_size: Window, len_q: int, len_k: int) -> Rule:
    """The rule of a window of keys to the left and to the right of the query; -1 has no end.

    Raises TypeError or ValueError for another window.
    """
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise ValueError(f"window_size must be (left, right), got {shown(window_size)}")
    left, right = (whole("window_size", end, -1) for end in window_size)
    if (left < 0 and right < 0) or (is_causal and left < 0):
        return rules.causal() if is_causal else rules.full()
    right = 0 if is_causal else right
    if left >= 0 and right in (0, left):
        return rules.local(left + 1, causal=right == 0)
    if left < 0 and right == 0:
        return rules.causal()
    end = len_k - len_q
    if left < 0:
        return rules.rule(lambda q, k: k <= q + (end + right))
    if right < 0:
        return rules.rule(lambda q, k: k >= q + (end - left))
    return rules.rule(lambda q, k: (k >= q + (end - left)) & (k <= q + (end + right)))


def _parts_of(name: str, packed: Tensor, number: int) -> tuple[Tensor, ...]:
    """The tensors that are packed on the third axis. Raises ValueError for another shape."""
    if not isinstance(packed, Tensor) or packed.ndim != 5 or packed.shape[2] != number:
        raise ValueError(
            f"{name} must be a tensor (batch, sequence, {number}, heads, dim), got {_form(packed)}"
        )
    return packed.unbind(2)


def _form(given: Any) -> Any:
    return tuple(given.shape) if isinstance(given, Tensor) else shown(given)


def _not_packed(name: str) -> NoReturn:
    """Raises NotImplementedError: sequences of several lengths in a row."""
    raise NotImplementedError(
        f"{name}: packed sequences (cu_seqlens) are not here yet; pass one row to"
        ' tilefold.attention(..., layout="bnhd", mask=tilefold.documents(ids)), with the number of'
        " the sequence of each token as ids, or a padded batch with mask=tilefold.lengths(n)"
    )


def _not_paged(name: str) -> NoReturn:
    """Raises NotImplementedError: keys and values in a cache that the function writes to."""
    raise NotImplementedError(
        f"{name}: caches that the function writes to, and pages of them, are not here yet; write"
        " keys and values into the cache yourself, and call tilefold.attention(...,"
        ' layout="bnhd", mask=tilefold.causal(lengths=cache_seqlens))'
    )
