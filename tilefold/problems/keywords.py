"""The names that other libraries have for arguments of attention, and what they are here.

A call with an unknown name is refused by the message that a user of PyTorch, FlashAttention or JAX
needs. A table is enough: names are looked up only where a call fails.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

_CAUSAL = (
    "write mask=tilefold.causal(), where the last query meets the last key, or"
    ' mask=tilefold.causal("start"), where the first query meets the first key as in PyTorch'
)
_WINDOW = (
    "write mask=tilefold.local(n), whose n keys on each side include the query's own, or"
    " tilefold.causal() & tilefold.local(n)"
)
_ARRAY = (
    "write mask=tilefold.dense(array) for an array of bool where True is seen (array == 0 if 0 is"
    " seen and -inf hidden)"
)
_PADDING = "write mask=tilefold.lengths(n), where n is the number of keys of each batch entry"
_DOCUMENTS = "write mask=tilefold.documents(ids), where ids is the document of each position"
_RULE = "write mask=tilefold.rule(lambda b, h, q, k: ...), a comparison of indices"
_SOFTCAP = "write score=tilefold.softcap(cap)"
_BIAS = "write score=tilefold.bias(array) for an array of floats that is added to the scores"
_SCORE = "write score=tilefold.score(lambda s, b, h, q, k: ...), a formula of the score s"

OTHER_NAMES = {
    "attention_mask": _ARRAY,
    "attn_bias": f"{_BIAS}, or {_ARRAY[6:]}",
    "attn_mask": _ARRAY,
    "alibi_slopes": "write score=tilefold.alibi(slopes)",
    "bias": f"{_BIAS}, or {_ARRAY[6:]}",
    "block_mask": _RULE,
    "causal": _CAUSAL,
    "cu_seqlens_k": _DOCUMENTS,
    "cu_seqlens_q": _DOCUMENTS,
    "deterministic": "leave it out: results are the same bits in every run",
    "dropout_p": "write dropout=",
    "dropout_rate": "write dropout=",
    "enable_gqa": "leave it out: heads_q may be any multiple of heads_kv",
    "implementation": "write impl=",
    "is_causal": _CAUSAL,
    "key": "write k=",
    "key_padding_mask": _PADDING,
    "key_value_seq_lengths": _PADDING,
    "learnable_sink": "write sinks=",
    "local_window_size": _WINDOW,
    "logits_soft_cap": _SOFTCAP,
    "mask_mod": _RULE,
    "query": "write q=",
    "return_attn_probs": "write return_lse=True: probabilities are never stored",
    "return_softmax_lse": "write return_lse=True",
    "s_aux": "write sinks=",
    "score_mod": _SCORE,
    "segment_ids": _DOCUMENTS,
    "sliding_window": _WINDOW,
    "sm_scale": "write scale=",
    "softcap": _SOFTCAP,
    "softmax_scale": "write scale=",
    "value": "write v=",
    "window": _WINDOW,
    "window_size": _WINDOW,
}
"""What to write for an argument of another library, by its name."""


def refusal(function: Callable[..., Any], unknown: Iterable[str]) -> TypeError:
    """The error of a call with unknown arguments: what to write for the first of them."""
    name = next(iter(unknown))
    known = [*inspect.signature(function).parameters]
    near = difflib.get_close_matches(name, known, 1)
    advice = f"did you mean {near[0]}=?" if near else f"its arguments are {', '.join(known)}"
    return TypeError(
        f"{function.__name__} has no argument {name!r}: {OTHER_NAMES.get(name, advice)}"
    )


def without_unknown(function: Function) -> Function:
    """The function, whose signature does not show the parameter that takes unknown names."""
    signature = inspect.signature(function)
    shown = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    vars(function)["__signature__"] = signature.replace(parameters=shown)
    return function
