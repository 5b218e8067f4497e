"""Products of torch tensors with a quantised matrix, and the gradient of x and of a bias.

The gradient of x is dy wᵀ, with the matrix widened some panels at a time. A quantised matrix has no
gradient. Where a gradient is wanted, bias and activation are torch's own, so that it knows theirs.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tilefold.backends.arrays.torch import check_held, check_place
from tilefold.backends.cpu.matmul.quantized_calls import Prepared
from tilefold.backends.protocols import Machine
from tilefold.common.foreign_arrays import dtype_name
from tilefold.frontends.torch import outside
from tilefold.frontends.torch.observed import lifted, recorded, traced, unobserved
from tilefold.products.derivatives import VALUES
from tilefold.products.places import Form, Place, check_apart, check_single
from tilefold.products.quantized import QuantizedMatrix, panels_at_once
from tilefold.products.quantized_calls import Rows, product, remember, result_type
from tilefold.products.repeated import Asked, key_of
from tilefold.products.schemes import PANEL
from tilefold.products.torch import count_change, lies_of, machine_of


def multiply(
    x: Tensor,
    w: QuantizedMatrix,
    bias: Tensor | None,
    activation: str | None,
    out: Tensor | None,
    wanted: str | None,
    dynamic: bool,
    asked: Asked,
) -> Tensor:
    """The product of tensors; see `tilefold.qgemm`. `asked` are its options as they came."""
    given = [("x", x), *((name, y) for name, y in (("bias", bias), ("out", out)) if y is not None)]
    for name, tensor in given:
        check_place(name, tensor, x.device)
    if x.is_meta:
        raise NotImplementedError("x is on meta, where no kernel runs")
    check_untraced()
    shape, dtype = result_type(w, x, bias, out, wanted)
    if not lifted() and not recorded(*[tensor for _, tensor in given]):
        y, ready = _product(x, w, bias, activation, out, shape, dtype, dynamic)
        if ready is not None and out is None and unobserved(*[tensor for _, tensor in given]):
            _remember(x, w, bias, y, ready, asked)
        return y
    if out is not None:
        raise NotImplementedError(
            "out cannot be given where a gradient is wanted, or in a transform of torch.func: leave"
            " it out"
        )
    y = _times(x, w)
    if bias is not None:
        y = y + bias.float()
    return VALUES[activation](y).to(getattr(torch, dtype))


outside.keep("quantized", multiply)


def check_untraced() -> None:
    """Raises NotImplementedError where a graph is made, of which products cannot be a part."""
    if traced():
        raise NotImplementedError(
            "qgemm is no operator, so nothing traces it: torch.compile leaves its graph for it, and"
            " torch.export and torch.jit.trace cannot"
        )


def _remember(
    x: Tensor, w: QuantizedMatrix, bias: Tensor | None, y: Tensor, ready: Prepared, asked: Asked
) -> None:
    """Keep the way to a product on the processor."""

    def arrange(x: Tensor) -> Tensor:
        rows = x.detach().float()
        if ready.reads_rows:
            return rows.contiguous()
        return torch.from_numpy(ready.arranged(rows.reshape(-1, ready.k).numpy()))

    reads = ready.reads_rows and x.dtype == torch.float32 and x.is_contiguous()
    lines = None if bias is None else Rows(dtype_name(bias), 0, 0, bias.stride(0))
    key = key_of(lies_of((x, None, None, bias, None)), asked)
    dtype = None if y.dtype == x.dtype else y.dtype
    remember(w, key, ready, tuple(y.shape), dtype, lines, None, None if reads else arrange)


def _times(x: Tensor, w: QuantizedMatrix, turned: bool = False) -> Tensor:
    """x w in float32, or x wᵀ where it is `turned`; x has a gradient."""
    kind = _Mapped if lifted() else _Times
    found: Tensor = kind.apply(x, w, turned)  # type: ignore[no-untyped-call]
    return found


def _computed(x: Tensor, w: QuantizedMatrix, turned: bool) -> Tensor:
    k, n = w.shape
    if not turned:
        return _product(x, w, None, None, None, (*x.shape[:-1], n), "float32")[0]
    rows = x.detach().float().reshape(-1, n)
    found = torch.zeros(len(rows), k, device=rows.device)
    step = panels_at_once(k)
    for first in range(0, w.panels, step):
        columns = rows[:, first * PANEL : (first + step) * PANEL]
        part = torch.from_numpy(w.widened(first, min(first + step, w.panels))).to(found.device)
        found.addmm_(columns, part[:, : columns.shape[1]].T)
    return found.reshape(*x.shape[:-1], k)


class _Times(torch.autograd.Function):
    """See `_times`, where only autograd observes a call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: QuantizedMatrix, turned: bool) -> Tensor:
        ctx.own = x.dtype, w, turned
        return _computed(x, w, turned)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        dtype, w, turned = ctx.own
        return _times(slope, w, not turned).to(dtype), None, None


class _Mapped(torch.autograd.Function):
    """The same in transforms of torch.func and in forward mode; torch calls it more slowly."""

    @staticmethod
    def forward(x: Tensor, w: QuantizedMatrix, turned: bool) -> Tensor:
        return _computed(x, w, turned)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, turned = inputs
        ctx.own = x.dtype, w, turned

    backward = _Times.backward

    @staticmethod
    def jvp(ctx: Any, slope: Tensor, *_: None) -> Tensor:
        _, w, turned = ctx.own
        return _times(slope, w, turned)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, x: Tensor, w: QuantizedMatrix, turned: bool
    ) -> tuple[Tensor, int]:
        return _times(x.movedim(in_dims[0], 0), w, turned), 0


def _product(
    x: Tensor,
    w: QuantizedMatrix,
    bias: Tensor | None,
    activation: str | None,
    out: Tensor | None,
    shape: tuple[int, ...],
    dtype: str,
    dynamic: bool = False,
) -> tuple[Tensor, Prepared | None]:
    """The product, and what computed it if the processor did."""
    k, n = w.shape
    if out is not None:
        _check_written(out, {"x": x, "bias": bias})
    if (machine := machine_of(x)) is not None:
        if dynamic:
            raise NotImplementedError("dynamic has kernels for the CPU alone: pass dynamic=False")
        return _run_on_gpu(machine, x, w, bias, activation, out, shape, dtype), None
    ready = None
    rows = _values("x", x).reshape(-1, k).float().numpy()
    made = None if out is None else _lines(out, n)
    target = torch.empty(len(rows), n, dtype=getattr(torch, dtype)) if made is None else made
    if target.numel():
        lines = None
        if bias is not None:
            bias = _values("bias", bias)
            lines = Rows(dtype_name(bias), bias.data_ptr(), 0, bias.stride(0))
        target_rows = Rows(dtype, target.data_ptr(), *target.stride())
        ready = product(rows, w, lines, activation, target_rows, dynamic)
    if out is None:
        return target.reshape(shape), ready
    if made is None:
        out.copy_(target.reshape(shape))
    else:
        count_change(out)
    return out, ready


def _values(name: str, tensor: Tensor) -> Tensor:
    """A tensor without its gradient, whose memory has its values. Raises ValueError if freed."""
    check_held(name, tensor)
    return tensor.detach().resolve_neg()


def _run_on_gpu(
    machine: Machine,
    x: Tensor,
    w: QuantizedMatrix,
    bias: Tensor | None,
    activation: str | None,
    out: Tensor | None,
    shape: tuple[int, ...],
    dtype: str,
) -> Tensor:
    """The product by the kernels of a GPU."""
    if out is None:
        out = x.new_empty(shape, dtype=getattr(torch, dtype))
    if out.numel():
        lines, result = (each.unsqueeze(0) if each.dim() == 1 else each for each in (x, out))
        kernels = import_module(f"tilefold.backends.{machine.backend}.matmul.quantized")
        kernels.qgemm(
            lines.detach(),
            w,
            bias=None if bias is None else bias.detach(),
            activation=activation,
            out=result,
            machine=machine,
        )
    return out


def _lines(out: Tensor, n: int) -> Tensor | None:
    """A result as a view (rows, n); None where it lies otherwise, or its memory is negated."""
    try:
        return out.view(-1, n) if out.numel() and not out.is_neg() else None
    except RuntimeError:
        return None


def _check_written(out: Tensor, read: dict[str, Tensor | None]) -> None:
    """Raises ValueError unless the result may be written, and lies apart from what is read."""
    check_held("out", out)
    check_single(out.shape, out.stride())
    every = {"out": out} | {name: tensor for name, tensor in read.items() if tensor is not None}
    forms = {
        name: Form(dtype_name(each), tuple(each.shape), each.stride())
        for name, each in every.items()
    }
    places = {name: Place.of(form) for name, form in forms.items()}
    check_apart(places, False, {name: tensor.data_ptr() for name, tensor in every.items()})
