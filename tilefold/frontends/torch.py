"""PyTorch CPU tensors: two operators that autograd, `torch.compile` and `opcheck` understand.

`tilefold::attention` has a derivative, `tilefold::attention_backward` has none (so second
derivatives raise). Both take the mask as a `Rule`: it is registered as an opaque value, a constant
of the compiled graph that is guarded by equality, so another rule compiles another graph. Rules
over positions may be made and joined inside a compiled function; rules that carry data, and
`rule(...)`, are made outside of it and used inside.

Tensors are read where they lie, whatever their strides. lse carries no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilefold import engine
from tilefold.buffer import Buffer
from tilefold.coordinates import Coordinates
from tilefold.mask import Rule
from tilefold.problem import (
    ITEM_BYTES,
    LAYOUTS,
    STATISTICS,
    Problem,
    check_layout,
    check_lse,
    check_shape,
    common_dtype,
    describe,
    shape_lse,
    shape_o,
)

# 2.12 and 2.13 pass all tests, 2.15 (a CUDA build) all but its own opcheck, which trips over a
# warning of its own; 2.11 takes opaque values of its own classes alone.
if torch.__version__ < "2.12":  # a TorchVersion, which compares releases
    raise ImportError(
        f"tensors need PyTorch 2.12 or newer, found {torch.__version__}; upgrade it, or pass"
        " arrays (tensor.numpy())"
    )

_LSE_AXES = (0, 1, 2)
_constants: dict[str, object] = {}


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Rule, scale: float | None, layout: str
) -> tuple[Tensor, Tensor]:
    """Return o and lse; see `tilefold.attention`."""
    check_layout(layout)
    _check(q=q, k=k, v=v)
    result: tuple[Tensor, Tensor] = _attention(q, k, v, mask, scale, layout)
    return result


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mask: Rule,
    scale: float | None,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv; see `tilefold.attention_backward`."""
    check_layout(layout)
    dtype = _check(q=q, k=k, v=v, do=do, o=o)
    _check_place("lse", lse)
    check_lse(_name(lse), dtype)
    result: tuple[Tensor, Tensor, Tensor] = _backward(do, q, k, v, o, lse, mask, scale, layout)
    return result


def _constant(key: str) -> object:
    """The value that a compiled graph names."""
    return _constants[key]


def _write(value: object) -> tuple[str, dict[str, Any]]:
    """A value as the code of a compiled graph spells it, and the names in that spelling."""
    key = repr(value)
    while _constants.setdefault(key, value) != value:  # data is not part of what a rule prints
        key += "'"
    return f"_constant({key!r})", {"_constant": _constant}


def _register(kind: Any) -> None:
    """Make values of a class constants of compiled graphs."""
    from torch._library import opaque_object

    kind.__fx_repr__ = _write
    if hasattr(opaque_object, "register_custom_class"):  # its name in PyTorch 2.15
        opaque_object.register_custom_class(kind, typ="constant")
    else:
        opaque_object.register_opaque_type(kind, typ="value")


_register(Coordinates)
_register(Rule)


@torch.library.custom_op("tilefold::attention", mutates_args=(), device_types="cpu")
def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Rule, scale: float | None, layout: str
) -> tuple[Tensor, Tensor]:
    problem = _problem(q, k, v, scale, mask, layout)
    o = q.new_empty(shape_o(problem, layout))
    lse = q.new_empty(shape_lse(problem), dtype=_statistics(q))
    if problem.empty:
        return o.zero_(), lse.fill_(-torch.inf)
    axes = LAYOUTS[layout]
    operands = [_buffer(tensor, problem.dtype, axes) for tensor in (q, k, v, o)]
    operands.append(_buffer(lse, STATISTICS[problem.dtype], _LSE_AXES))
    engine.forward(problem, *operands)
    return o, lse


@_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Rule, scale: float | None, layout: str
) -> tuple[Tensor, Tensor]:
    axes = LAYOUTS[layout]
    sizes = [q.shape[axes[0]], q.shape[axes[1]], q.shape[axes[2]], v.shape[axes[3]]]
    lse = q.new_empty(sizes[:3], dtype=_statistics(q))
    return q.new_empty([sizes[axis] for axis in axes]), lse


@torch.library.custom_op("tilefold::attention_backward", mutates_args=(), device_types="cpu")
def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mask: Rule,
    scale: float | None,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = _problem(q, k, v, scale, mask, layout)
    check_shape("do", tuple(do.shape), shape_o(problem, layout))
    check_shape("o", tuple(o.shape), shape_o(problem, layout))
    check_shape("lse", tuple(lse.shape), shape_lse(problem))
    dq, dk, dv = (tensor.new_empty(tensor.shape) for tensor in (q, k, v))
    if problem.empty:
        return dq.zero_(), dk.zero_(), dv.zero_()
    axes = LAYOUTS[layout]
    operands = [_buffer(tensor, problem.dtype, axes) for tensor in (do, q, k, v, o, dq, dk, dv)]
    operands.insert(5, _buffer(lse, STATISTICS[problem.dtype], _LSE_AXES))
    engine.backward(problem, *operands)
    return dq, dk, dv


@_backward.register_fake
def _(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mask: Rule,
    scale: float | None,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.rest = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, o, lse)


def _gradients(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(do, *ctx.saved_tensors, *ctx.rest), None, None, None)


def _refuse(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    raise NotImplementedError(
        "second derivatives of tilefold.attention are not implemented: do not pass"
        " create_graph=True, or use torch's own attention where you need them"
    )


_attention.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(_refuse)


def _check(**tensors: Tensor) -> str:
    """The one type of dense CPU tensors. Raises for others; a compiler's stand-ins pass too."""
    for name, tensor in tensors.items():
        _check_place(name, tensor)
    return common_dtype({name: _name(tensor) for name, tensor in tensors.items()})


def _check_place(name: str, tensor: Tensor) -> None:
    if tensor.device.type not in ("cpu", "meta"):
        raise NotImplementedError(
            f"{name} is on {tensor.device}, and only the CPU is implemented so far; pass"
            f" {name}.cpu()"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(
            f"{name} must be a strided tensor, got {tensor.layout}; pass {name}.to_dense()"
        )


def _name(tensor: Tensor) -> str:
    """The name of a tensor's type."""
    return str(tensor.dtype).removeprefix("torch.")


def _statistics(tensor: Tensor) -> torch.dtype:
    """The type of lse where q is a tensor of this type."""
    kind: torch.dtype = getattr(torch, STATISTICS[_name(tensor)])
    return kind


def _problem(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Rule, layout: str
) -> Problem:
    return describe(tuple(q.shape), tuple(k.shape), tuple(v.shape), _name(q), scale, mask, layout)


def _buffer(tensor: Tensor, dtype: str, axes: tuple[int, ...]) -> Buffer:
    """A tensor's memory, or that of a copy where it is misaligned; `axes` as in `LAYOUTS`."""
    if tensor.data_ptr() % ITEM_BYTES[dtype]:
        tensor = tensor.clone()
    shape, strides = tensor.shape, tensor.stride()
    return Buffer(
        tensor.data_ptr(),
        tuple([shape[axis] for axis in axes]),
        tuple([strides[axis] for axis in axes]),
        dtype,
        tensor,
    )
