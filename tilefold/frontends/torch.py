"""PyTorch tensors: two operators that autograd, `torch.compile` and `opcheck` understand.

`tilefold::attention` has a derivative, `tilefold::attention_backward` has none (so second
derivatives raise). Both take the mask as a `Rule`: it is registered as an opaque value, a constant
of the compiled graph that is guarded by equality, so another rule compiles another graph. Rules
over positions may be made and joined inside a compiled function; rules that carry data, and
`rule(...)`, are made outside of it and used inside.

PyTorch takes longer to find its way to such an operator than a small call takes in all. So a call
that nobody but autograd could observe runs at once, with a `torch.autograd.Function` where
gradients are wanted; compilers, tracers, modes, transforms, profilers and subclasses meet the
operators.

Tensors are read where they lie, whatever their strides. lse carries no gradient. Those on a GPU of
Apple's ("mps"), NVIDIA's or AMD's ("cuda") meet the same operators, and inside them the kernels of
Metal or Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tilefold import engine
from tilefold.coordinates import Coordinates
from tilefold.frontends import gpu
from tilefold.mask import Rule
from tilefold.problem import (
    LAYOUTS,
    STATISTICS,
    Problem,
    check_layout,
    check_lse,
    check_parts,
    check_precision,
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

PLAIN = (Tensor, torch.nn.Parameter)
"""Types of tensors that do what they do without calling back into Python."""

_constants: dict[str, object] = {}


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Rule, scale: float | None, layout: str, precision: str
) -> tuple[Tensor, Tensor]:
    """Return o and lse; see `tilefold.attention`."""
    check_layout(layout)
    check_precision(precision)
    result: tuple[Tensor, Tensor]
    if _unobserved(q, k, v):
        run = _Attention.apply if _recorded(q, k, v) else _forward
        result = run(q, k, v, mask, scale, layout, precision)
    else:
        _check(q=q, k=k, v=v)
        _refuse_tangents(q, k, v)
        result = _attention(q, k, v, mask, scale, layout, precision)
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
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv; see `tilefold.attention_backward`."""
    check_layout(layout)
    check_precision(precision)
    given = do, q, k, v, o, lse
    if _unobserved(*given) and not _recorded(*given):
        return _slopes(*given, mask, scale, layout, precision)
    _check_all(*given)
    _refuse_tangents(*given)
    result: tuple[Tensor, Tensor, Tensor] = _backward(*given, mask, scale, layout, precision)
    return result


@torch.no_grad()
def merge(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Return o and lse; see `tilefold.merge`."""
    given = {"o1": o1, "lse1": lse1, "o2": o2, "lse2": lse2}
    shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
    axes = check_parts(shapes, {name: _name(tensor) for name, tensor in given.items()}, layout)
    lses = torch.stack((lse1, lse2))
    unseen = lses == -torch.inf
    nothing = unseen.all(0)
    top = lses.max(0).values
    weights = torch.exp(lses - top.masked_fill(nothing, 0))
    total = weights.sum(0).masked_fill(nothing, 1)
    lse = (top + total.log()).masked_fill(nothing, -torch.inf)
    parts = [
        share * part.permute(axes).to(lse.dtype).masked_fill(hidden, 0)
        for part, share, hidden in zip(
            (o1, o2),
            (weights / total).unsqueeze(-1).unbind(),
            unseen.unsqueeze(-1).unbind(),
            strict=True,
        )
    ]
    o = parts[0] + parts[1]
    return o.permute(axes).to(o1.dtype).contiguous(), lse  # each layout is its own inverse


def _unobserved(*tensors: Tensor) -> bool:
    """Whether these are plain tensors, and nothing of torch's watches what is done to them."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    ):
        return False
    here = tensors[0].is_cpu
    for tensor in tensors:
        if not (
            type(tensor) in PLAIN
            and (tensor.is_cpu if here else gpu.same(tensor, tensors[0]))
            and tensor.layout is torch.strided
            and not tensor.is_neg()
        ):
            return False
    return True


def _recorded(*tensors: Tensor) -> bool:
    """Whether autograd wants to hear of a call."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Rule, scale: float | None, layout: str, precision: str
) -> tuple[Tensor, Tensor]:
    """o and lse, below autograd."""
    machine = gpu.machine(q)
    if machine is not None:
        o, lse = gpu.run(machine, "forward", (q, k, v), mask, scale, layout, precision)
        return o, lse
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    key = ("torch forward", mask, scale, layout, precision, *_form(q), *_form(k), *_form(v))
    call = engine.recent(key)
    if call is None:
        _check(q=q, k=k, v=v)
        problem = _problem(q, k, v, scale, mask, layout, precision)
        if problem.empty:
            o = q.new_zeros(shape_o(problem, layout))
            return o, q.new_full(shape_lse(problem), -torch.inf, dtype=_statistics(q))
        strides = q.stride(), k.stride(), v.stride()
        call = engine.keep(key, engine.forward(problem, layout, *strides))
    shape, rows = call.results
    o, lse = q.new_empty(*shape), q.new_empty(*rows, dtype=_statistics(q))
    call.run(q.data_ptr(), k.data_ptr(), v.data_ptr(), o.data_ptr(), lse.data_ptr())
    return o, lse


def _slopes(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mask: Rule,
    scale: float | None,
    layout: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, below autograd."""
    machine = gpu.machine(q)
    if machine is not None:
        rest = mask, scale, layout, precision
        dq, dk, dv = gpu.run(machine, "backward", (do, q, k, v, o, lse), *rest)
        return dq, dk, dv
    do, q, k, v, o, lse = given = [_aligned(tensor) for tensor in (do, q, k, v, o, lse)]
    key = ("torch backward", mask, scale, layout, precision, *[_form(tensor) for tensor in given])
    call = engine.recent(key)
    if call is None:
        _check_all(*given)
        problem = _problem(q, k, v, scale, mask, layout, precision)
        check_shape("do", tuple(do.shape), shape_o(problem, layout))
        check_shape("o", tuple(o.shape), shape_o(problem, layout))
        check_shape("lse", tuple(lse.shape), shape_lse(problem))
        if problem.empty:
            return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
        strides = [tensor.stride() for tensor in given]
        call = engine.keep(key, engine.backward(problem, layout, *strides))
    dq, dk, dv = (q.new_empty(*shape) for shape in call.results)
    call.run(*[tensor.data_ptr() for tensor in (*given, dq, dk, dv)])
    return dq, dk, dv


def _refuse_tangents(*tensors: Tensor) -> None:
    """Raises where tensors carry forward-mode derivatives: the operators would lose them."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    unpack: Any = forward_ad.unpack_dual
    if any(unpack(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            "forward-mode derivatives of tilefold.attention are not implemented: use backward(),"
            " or torch's own attention where you need them"
        )


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one whose items lie across their natural boundaries."""
    return tensor if tensor.data_ptr() % tensor.itemsize == 0 else tensor.clone()


def _form(tensor: Tensor) -> tuple[Any, ...]:
    """All of a tensor that a prepared call depends on."""
    return tensor.shape, tensor.stride(), tensor.dtype


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


@torch.library.custom_op(
    "tilefold::attention", mutates_args=(), device_types=("cpu", "mps", "cuda")
)
def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Rule, scale: float | None, layout: str, precision: str
) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, mask, scale, layout, precision)


@_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Rule, scale: float | None, layout: str, precision: str
) -> tuple[Tensor, Tensor]:
    axes = LAYOUTS[layout]
    sizes = [q.shape[axes[0]], q.shape[axes[1]], q.shape[axes[2]], v.shape[axes[3]]]
    lse = q.new_empty(sizes[:3], dtype=_statistics(q))
    return q.new_empty([sizes[axis] for axis in axes]), lse


@torch.library.custom_op(
    "tilefold::attention_backward", mutates_args=(), device_types=("cpu", "mps", "cuda")
)
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
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _slopes(do, q, k, v, o, lse, mask, scale, layout, precision)


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
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.rest = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, o, lse)


def _gradients(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*attention_backward(do, *ctx.saved_tensors, *ctx.rest), None, None, None, None)


def _refuse(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    raise NotImplementedError(
        "second derivatives of tilefold.attention are not implemented: do not pass"
        " create_graph=True, or use torch's own attention where you need them"
    )


_attention.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(_refuse)


class _Attention(torch.autograd.Function):
    """`tilefold::attention` for autograd alone."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_gradients)


def _check_all(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor) -> None:
    """Raises for tensors that a backward pass cannot read."""
    dtype = _check(q=q, k=k, v=v, do=do, o=o)
    _check_place("lse", lse, do.device)
    check_lse(_name(lse), dtype)


def _check(**tensors: Tensor) -> str:
    """The one type of dense tensors on one device. A compiler's stand-ins pass too; raises."""
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():
        _check_place(name, tensor, device)
    return common_dtype({name: _name(tensor) for name, tensor in tensors.items()})


def _check_place(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device.type not in ("cpu", "mps", "cuda", "meta"):
        raise NotImplementedError(
            f"{name} is on {tensor.device}, and there are kernels for the CPU, for GPUs of"
            f" NVIDIA's and AMD's (cuda) and for Apple's (mps); pass {name}.cpu()"
        )
    if tensor.device != device:
        raise ValueError(
            f"{name} is on {tensor.device} and others are on {device}: pass"
            f" {name}.to({str(device)!r}), or the others on {tensor.device}"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(
            f"{name} must be a strided tensor, got {tensor.layout}; pass {name}.to_dense()"
        )


def _name(tensor: Tensor) -> str:
    """The name of a tensor's type."""
    return str(tensor.dtype).removeprefix("torch.")


_DTYPES = {getattr(torch, name): getattr(torch, kind) for name, kind in STATISTICS.items()}


def _statistics(tensor: Tensor) -> torch.dtype:
    """The type of lse where q is a tensor of this type."""
    kind: torch.dtype = _DTYPES[tensor.dtype]
    return kind


def _problem(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Rule, layout: str, precision: str
) -> Problem:
    shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape)
    return describe(*shapes, _name(q), scale, mask, layout, precision)
