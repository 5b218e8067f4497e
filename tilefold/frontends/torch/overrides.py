"""tilefold in the place of `scaled_dot_product_attention`, for tensors on the processor.

Torch's attention is two operators here. `aten::scaled_dot_product_attention` is what programs call.
It chooses `aten::_scaled_dot_product_flash_attention_for_cpu`, which has a formula for autograd and
a place in the graphs of compilers, or plain products of matrices, which store all pairs. Both get
kernels of tilefold under the dispatch key of the processor:

- the flash operator and its backward pass: results lie in memory as torch promises to compilers. It
  serves compiled graphs, transforms, and plain calls that want gradients
- the whole operator: calls without gradients at once, and what the flash operator does not take:
  other numbers of axes, dropout, values of another width than keys, gradients of a mask, and masks
  of bool, which torch would make additive before anything else sees them

What tilefold cannot do goes to torch's own kernels, which stay reachable. A warning says so once
for each reason. Packed sequences, `torch_attn::_varlen_attn` and its backward pass, will be two
more `_ROWS`.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tilefold.frontends.torch import direct, masked, sdpa
from tilefold.frontends.torch.recognised import rule_of
from tilefold.masks.rule import Rule

NAME = "tilefold"
"""The name in torch's registry of implementations of flash attention."""

_WHOLE = "scaled_dot_product_attention"
_FLASH = "_scaled_dot_product_flash_attention_for_cpu"

_grad_enabled: Any = torch.is_grad_enabled
_allowed: Any = torch._C._get_flash_sdp_enabled


_MOST_REASONS = 64


class _Counts:
    """How many calls were served here, and why others were not."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.hits = itertools.count()  # `next` is one step of the interpreter, and takes 0.03 us
        self.reasons: dict[str, int] = {}
        self.said: set[str] = set()

    @property
    def hit(self) -> int:
        """The number of hits, which a count only tells in its text."""
        return int(repr(self.hits)[len("count(") : -1])

    def miss(self, reason: str) -> None:
        """Count a call that torch computed, and say so once for each reason."""
        with self.lock:
            if len(self.reasons) >= _MOST_REASONS:  # they may hold numbers
                reason = "reasons of many kinds"
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
            new = reason not in self.said
            self.said.add(reason)
        if new:
            warnings.warn(
                f"tilefold leaves a call of {_WHOLE} to torch's own kernels: {reason}",
                RuntimeWarning,
                stacklevel=5,
            )


_counts = _Counts()
_originals: dict[tuple[str, str], Any] = {}


def stats() -> dict[str, Any]:
    """See `tilefold.torch.stats`."""
    with _counts.lock:
        reasons = dict(_counts.reasons)
        return {"hits": _counts.hit, "misses": sum(reasons.values()), "reasons": reasons}


# ---------------------------------------------------------------------------- the whole operator


def _whole(
    keys: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`aten::scaled_dot_product_attention` of tensors on the processor."""
    if not dropout_p and keys.raw_repr() in _PLAIN and _allowed():
        try:
            if _grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
                if attn_mask is None and q.shape == k.shape == v.shape and q.ndim == 4:
                    o: Tensor = _flash_operator(q, k, v, 0.0, is_causal, scale=scale)[0]
                    return o
            elif forward_ad._current_level < 0 and not (
                attn_mask is not None and attn_mask.requires_grad
            ):
                known = direct.output(q, k, v, is_causal, scale, enable_gqa, attn_mask)
                if known is not None:
                    next(_counts.hits)
                    return known
        except _REFUSALS as error:
            options = attn_mask, dropout_p, is_causal, scale, enable_gqa
            return _theirs(str(error), keys, q, k, v, *options)
    return _other(keys, q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa)


_KINDS = torch._C.DispatchKey
_CPU = torch._C.DispatchKeySet(_KINDS.CPU)
_PLAIN = (_CPU.add(_KINDS.AutogradCPU).raw_repr(), _CPU.raw_repr())
"""The dispatch keys of calls that no compiler, transform, mode or subclass sees, by their bits.

Inference tensors have no key of autograd.
"""

_REFUSALS = (TypeError, ValueError, IndexError, RuntimeError)  # NotImplementedError is one


def _fits(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> bool:
    """True for tensors as kernels take them: nothing broadcasts, and no axis is absent."""
    a, b, c = q.shape, k.shape, v.shape
    if not (len(a) == len(b) == len(c) == 4 and a[0] == b[0] == c[0] and b[1] == c[1]):
        return False
    return a[1] == b[1] or (enable_gqa and b[1] > 0 and a[1] % b[1] == 0)


def _other(keys: Any, *given: Any) -> Tensor:
    """A call that is new, or not the usual one.

    What a compiler, a transform or a mode sees is torch's flash operator, which comes back here.
    """
    q, k, v, mask, dropout_p, is_causal, scale, enable_gqa = given
    plain = keys.raw_repr() in _PLAIN
    o: Tensor | None = None
    try:
        if not _allowed():
            raise NotImplementedError("torch.nn.attention.sdpa_kernel excludes flash attention")
        if not plain:
            if _takes_flash(q, k, v, mask, dropout_p, enable_gqa):
                return _redispatched(keys, *given)
            if torch._C._are_functorch_transforms_active():
                raise NotImplementedError("transforms of torch.func take torch's flash operator")
        elif not dropout_p and forward_ad._current_level < 0 and _fits(q, k, v, enable_gqa):
            wants = _grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
            if not wants and mask is None:
                o = direct.forward(q, k, v, is_causal, scale, enable_gqa)[0]
            elif not wants and _is_usual(mask, q, k):
                asked = _asked(q, k, v, 0.0, is_causal, mask, scale)
                known_as = is_causal, scale, enable_gqa, mask
                o = direct.forward_masked(q, k, v, asked, known_as)[0]
            elif q.shape[3] == v.shape[3] and (mask is None or _is_usual(mask, q, k)):
                rule = None if mask is None else _rule(q, k, v, mask)
                if rule is None:  # the flash operator counts itself
                    added = None if mask is None else masked.additive(mask, q.dtype)
                    o, _ = _flash_operator(q, k, v, 0.0, is_causal, attn_mask=added, scale=scale)
                    return o
                o = sdpa.attended(q, k, v, masked.joined(is_causal, rule), scale=scale)
        if o is None:
            o = sdpa.scaled_dot_product_attention(
                q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
    except _REFUSALS as error:
        return _theirs(str(error), keys, *given)
    if plain:
        next(_counts.hits)
    return o


def _rule(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Rule | None:
    pairs = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    return rule_of(masked.four(mask), pairs, q.shape[3] + v.shape[3])


def _is_usual(mask: Tensor, q: Tensor, k: Tensor) -> bool:
    """True for a mask of at most four axes that fits, and whose gradient nobody wants."""
    if mask.ndim > 4 or (mask.requires_grad and _grad_enabled()):
        return False
    if mask.dtype not in (torch.bool, torch.float32, q.dtype):
        return False
    pairs = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    sizes = zip(reversed(mask.shape), reversed(pairs), strict=False)
    return all(a in (1, b) for a, b in sizes)


def _takes_flash(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, enable_gqa: bool
) -> bool:
    """True where torch takes its flash operator, as its source decides it."""
    if dropout_p or not _fits(q, k, v, enable_gqa) or (mask is not None and mask.requires_grad):
        return False
    shapes = all(x.shape[2] > 0 and x.stride(3) == 1 for x in (q, k, v))
    return (
        shapes and q.shape[3] == k.shape[3] == v.shape[3] and (mask is None or mask.ndim in (2, 4))
    )


def _theirs(reason: str, keys: Any, *given: Any) -> Tensor:
    """A call by torch's own kernels; what torch refuses too is no miss."""
    _local.leaves = True
    try:
        o = _redispatched(keys, *given)
    finally:
        _local.leaves = False
    _counts.miss(reason)
    return o


class _Local(threading.local):
    leaves = False
    """Whether this thread leaves a call to torch, its flash operator too."""


_local = _Local()


def _redispatched(keys: Any, *given: Any) -> Tensor:
    *five, scale, enable_gqa = given
    kernel = _originals[_WHOLE, "CPU"]
    o: Tensor = kernel.call_boxed(keys, *five, scale=scale, enable_gqa=enable_gqa)
    return o


# ---------------------------------------------------------------------------- the flash operator

_flash_operator: Any = getattr(torch, _FLASH)
"""Torch's binding in C++: `torch.ops.aten` takes 1 us more."""


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """The flash operator, below autograd."""
    try:
        if _local.leaves:
            raise NotImplementedError
        if attn_mask is None and not dropout_p:
            made = direct.forward(q, k, v, is_causal, scale)
        else:
            asked = _asked(q, k, v, dropout_p, is_causal, attn_mask, scale)
            made = direct.forward_masked(q, k, v, asked)
            made[1].masked_fill_(
                made[1] == -torch.inf, 0.0
            )  # as torch has it of a query without keys
    except _REFUSALS as error:
        options = {"attn_mask": attn_mask, "scale": scale}
        return _their_flash(_FLASH, str(error), q, k, v, dropout_p, is_causal, **options)
    next(_counts.hits)
    return made


def _flash_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """The backward pass of the flash operator."""
    given = grad_out, q, k, v, out, logsumexp
    try:
        asked = _asked(q, k, v, dropout_p, is_causal, attn_mask, scale)
        return direct.backward(given, asked)
    except _REFUSALS as error:
        options = {"attn_mask": attn_mask, "scale": scale}
        name = _FLASH + "_backward"
        return _their_flash(name, str(error), *given, dropout_p, is_causal, **options)


def _their_flash(name: str, reason: str, *given: Any, **options: Any) -> tuple[Tensor, ...]:
    """A call of torch's own flash operator."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    made: tuple[Tensor, ...] = _originals[name, "CPU"].call_boxed(keys, *given, **options)
    if not _local.leaves:
        _counts.miss(reason)
    return made


def _asked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    is_causal: bool,
    mask: Tensor | None,
    scale: float | None,
) -> masked.Asked:
    """The request of the flash operator's arguments."""
    if dropout_p:
        raise NotImplementedError("the flash operator has no dropout")
    if mask is None:
        return masked.Asked(masked.plain_request(is_causal, scale), None)
    pairs = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    return masked.asked(masked.four(mask), pairs, q.shape[3] + v.shape[3], is_causal, scale)


# ------------------------------------------------------------------------------- on and off

_ROWS = (
    (_WHOLE, "CPU", _whole),
    (_WHOLE, "AutogradCPU", _whole),
    (_FLASH, "CPU", _flash),
    (_FLASH + "_backward", "CPU", _flash_backward),
)
"""The operators, the dispatch keys, and the functions that take their places."""


class _Installed:
    """Kernels in the places of torch's, until `remove`; torch's registry holds it meanwhile."""

    def __init__(self) -> None:
        for name, key, _ in _ROWS:
            if (name, key) not in _originals:
                _originals[name, key] = torch.library.get_kernel(f"aten::{name}", key)
        library: Any = torch.library
        self._library = library.Library("aten", "IMPL")
        with warnings.catch_warnings():  # torch says that a kernel is replaced
            warnings.simplefilter("ignore")
            for name, key, function in _ROWS:
                keys = name == _WHOLE
                self._library.impl(name, function, key, with_keyset=keys, allow_override=True)
        mha = torch.backends.mha
        self._fast = mha.get_fastpath_enabled()
        mha.set_fastpath_enabled(False)  # torch's own layers leave out the operator there

    def remove(self) -> None:
        """Give torch's kernels their places back."""
        self._library._destroy()
        torch.backends.mha.set_fastpath_enabled(self._fast)


class _Switch:
    """Whether tilefold is on: by `enable`, or in the blocks of `enabled` that run."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.on = False
        self.blocks = 0
        self.installed: _Installed | None = None
        """What is installed where torch has no registry."""

    def change(self, on: bool | None = None, blocks: int = 0) -> None:
        with self.lock:
            self.on = self.on if on is None else on
            self.blocks += blocks
            self._apply(self.on or self.blocks > 0)

    def _apply(self, wanted: bool) -> None:
        if _registry is not None:
            active = _registry.current_flash_attention_impl() == NAME
            if wanted and not active:
                _registry.activate_flash_attention_impl(NAME)
            elif active and not wanted:
                _registry.restore_flash_attention_impl()
        elif wanted and self.installed is None:
            self.installed = _Installed()
        elif self.installed is not None and not wanted:
            self.installed.remove()
            self.installed = None


_switch = _Switch()
_registry: Any = torch.nn.attention
if hasattr(_registry, "restore_flash_attention_impl"):  # older ones have it without a way back
    _registry.register_flash_attention_impl(NAME, register_fn=_Installed)
else:
    _registry = None


def enable() -> None:
    """See `tilefold.torch.enable`."""
    _switch.change(on=True)


def disable() -> None:
    """See `tilefold.torch.disable`."""
    _switch.change(on=False)


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """See `tilefold.torch.enabled`."""
    _switch.change(blocks=1)
    try:
        yield
    finally:
        _switch.change(blocks=-1)
