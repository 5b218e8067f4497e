"""Products of torch tensors with a quantised matrix, and the gradient of x and of a bias.

The gradient of x is dy wᵀ, with the matrix widened some panels at a time. A quantised matrix has no
gradient. Where a gradient is wanted, bias and activation are torch's own, so that it knows theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilefold.backends.arrays.numpy import pointer
from tilefold.backends.arrays.torch import check_place
from tilefold.backends.cpu import threads
from tilefold.backends.cpu.device import host
from tilefold.backends.cpu.matmul.quantized_calls import Prepared, arranged, as_they_are
from tilefold.backends.protocols import Machine
from tilefold.common.foreign_arrays import dtype_name
from tilefold.frontends.torch.observed import PLAIN
from tilefold.products.quantized import QuantizedMatrix
from tilefold.products.quantized_calls import Rows, kept, prepared, product, result_type
from tilefold.products.schemes import PANEL
from tilefold.products.torch import machine_of

_AT_ONCE = 1 << 21  # weights that are widened at once in a gradient; not tuned

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def multiply(
    x: Tensor,
    w: QuantizedMatrix,
    bias: Tensor | None,
    activation: str | None,
    out: Tensor | None,
    wanted: str | None,
    dynamic: bool = False,
) -> Tensor:
    """The product of tensors; see `tilefold.qgemm`."""
    key = None
    if out is None and type(x) in PLAIN and not torch.is_grad_enabled():
        # all but addresses may be known from a call before, which saves two thirds of 100 us
        form = None if bias is None else (bias.shape, bias.dtype, bias.device, bias.stride())
        own = (x.shape, x.dtype, x.device, x.layout, x.is_neg())
        key = (*own, form, activation, wanted, dynamic, host(), threads.number())
        ready: _Ready | None = kept(w).get(key)
        if ready is not None:
            return ready.run(x, bias)
    for name, tensor in (("x", x), ("bias", bias), ("out", out)):
        if tensor is not None:
            check_place(name, tensor, x.device)
    if x.is_meta:
        raise NotImplementedError("x is on meta, where no kernel runs")
    shape, dtype = result_type(w, x, bias, out, wanted)
    recorded = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, bias, out)
    )
    if not recorded:
        y = _product(x, w, bias, activation, out, shape, dtype, dynamic)
        if key is not None and x.device.type == "cpu" and y.numel():
            kept(w)[key] = _Ready.of(x, w, bias, activation, y, dynamic)
        return y
    if out is not None:
        raise NotImplementedError("out cannot be given where a gradient is wanted: leave it out")
    y = _Product.apply(x, w)  # type: ignore[no-untyped-call]
    if bias is not None:
        y = y + bias.float()
    if activation is not None:
        y = _ACTIVATIONS[activation](y)
    return y.to(getattr(torch, dtype))


class _Ready(NamedTuple):
    """A call whose tensors were checked; `direct`: a kernel reads x where it lies."""

    prepared: Prepared
    scheme: str
    direct: bool
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        x: Tensor,
        w: QuantizedMatrix,
        bias: Tensor | None,
        activation: str | None,
        y: Tensor,
        dynamic: bool,
    ) -> _Ready:
        k, n = w.shape
        m = x.numel() // k
        lines = None if bias is None else Rows(dtype_name(bias), 0, 0, bias.stride(0))
        found = prepared(w, m, lines, activation, Rows(dtype_name(y), 0, n, 1), dynamic)
        return cls(found, w.scheme, as_they_are(w.scheme, m, k, dynamic), y.shape, y.dtype)

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product."""
        y = torch.empty(self.shape, dtype=self.dtype)
        rows = x.float().contiguous()
        if self.direct:
            address = rows.data_ptr()
        else:
            lines = arranged(self.scheme, rows.detach().view(-1, x.shape[-1]).numpy())
            address = pointer(lines)
        self.prepared.run(address, y.data_ptr(), 0 if bias is None else bias.data_ptr())
        return y


class _Product(torch.autograd.Function):
    """x w in float32, of which x has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: QuantizedMatrix) -> Tensor:
        ctx.w, ctx.dtype = w, x.dtype
        return _product(x, w, None, None, None, (*x.shape[:-1], w.shape[1]), "float32")

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None]:
        dx: Tensor = _Gradient.apply(dy, ctx.w)  # type: ignore[no-untyped-call]
        return dx.to(ctx.dtype), None


class _Gradient(torch.autograd.Function):
    """dy wᵀ in float32, of which dy has a gradient."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, w: QuantizedMatrix) -> Tensor:
        ctx.w, ctx.dtype = w, dy.dtype
        k, n = w.shape
        rows = dy.detach().float().reshape(-1, n)
        dx = torch.zeros(len(rows), k, device=rows.device)
        step = max(1, _AT_ONCE // (PANEL * k))
        for first in range(0, w.panels, step):
            columns = rows[:, first * PANEL : (first + step) * PANEL]
            part = torch.from_numpy(w.widened(first, min(first + step, w.panels))).to(dx.device)
            dx.addmm_(columns, part[:, : columns.shape[1]].T)
        return dx.reshape(*dy.shape[:-1], k)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, None]:
        ddy: Tensor = _Product.apply(ddx, ctx.w)  # type: ignore[no-untyped-call]
        return ddy.to(ctx.dtype), None


def _product(
    x: Tensor,
    w: QuantizedMatrix,
    bias: Tensor | None,
    activation: str | None,
    out: Tensor | None,
    shape: tuple[int, ...],
    dtype: str,
    dynamic: bool = False,
) -> Tensor:
    k, n = w.shape
    if out is not None:
        _check_written(out, {"x": x, "bias": bias})
    if (machine := machine_of(x)) is not None:
        if dynamic:
            raise NotImplementedError("dynamic has kernels for the CPU alone: pass dynamic=False")
        return _run_on_gpu(machine, x, w, bias, activation, out, shape, dtype)
    rows = x.detach().reshape(-1, k).float().numpy()
    made = None if out is None else _lines(out, n)
    target = torch.empty(len(rows), n, dtype=getattr(torch, dtype)) if made is None else made
    if target.numel():
        lines = None
        if bias is not None:
            bias = bias.detach()
            lines = Rows(dtype_name(bias), bias.data_ptr(), 0, bias.stride(0))
        target_rows = Rows(dtype, target.data_ptr(), *target.stride())
        product(rows, w, lines, activation, target_rows, dynamic)
    if out is None:
        return target.reshape(shape)
    if made is None:
        out.copy_(target.reshape(shape))
    return out


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
    """A result as a view (rows, n); None where its strides do not allow one."""
    try:
        return out.view(-1, n) if out.numel() else None
    except RuntimeError:
        return None


def _check_written(out: Tensor, read: dict[str, Tensor | None]) -> None:
    """Raises ValueError unless the result may be written, and lies apart from what is read."""
    if any(step == 0 < length - 1 for step, length in zip(out.stride(), out.shape, strict=True)):
        raise ValueError("out is written, so no axis of it may be broadcast")
    begin, end = _extent(out)
    for name, tensor in read.items():
        if tensor is not None and out.numel() and tensor.numel():
            low, high = _extent(tensor)
            if begin < high and low < end:
                raise ValueError(f"out must not overlap {name}")


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first and the last address of a tensor's elements."""
    steps = zip(tensor.stride(), tensor.shape, strict=True)
    length = sum(step * (count - 1) for step, count in steps) + 1
    return tensor.data_ptr(), tensor.data_ptr() + length * tensor.element_size()
