"""Products of PyTorch tensors: `tilefold.gemm` with gradients, in compilers and in transforms."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tilefold.backends.arrays import torch as arrays
from tilefold.backends.arrays.torch import check_held, check_place, dtype_of
from tilefold.backends.protocols import Machine
from tilefold.frontends.torch import outside, tensors
from tilefold.frontends.torch.observed import PLAIN, lifted, recorded, unobserved
from tilefold.frontends.torch.tensors import LOWEST
from tilefold.products import derivatives, plans
from tilefold.products.derivatives import Given, named
from tilefold.products.packed import PackedMatrix
from tilefold.products.places import Form, check_apart
from tilefold.products.plans import GIVEN, Options
from tilefold.products.repeated import REPEATED, Asked, Ways, key_of, remember


def multiply(given: Mapping[str, Any], options: Options, asked: Asked | None = None) -> Tensor:
    """The product of tensors, by the names of the arguments; `asked` are these as they came."""
    if type(given["b"]) is PackedMatrix or type(given.get("gate")) is PackedMatrix:
        return _multiply_packed(given, options)
    every = tuple(given.values())
    out: Tensor | None = given.get("out")
    simple, observed = unobserved(*every), recorded(*every)
    if not simple or not every[0].is_cpu:
        _check_places(given)
    if out is not None and observed:
        raise ValueError("out takes no gradients: leave it out, or call under torch.no_grad()")
    if simple and not observed:
        return run(given, options, asked)
    if out is None:
        return _observed(given, options)
    found = _observed({name: x for name, x in given.items() if name != "out"}, options)
    return out.copy_(found)


def again(
    ways: Ways, a: Tensor, b: Any, c: Any, bias: Any, gate: Any, out: Any, asked: Asked
) -> Tensor | None:
    """See `repeated.REPEATED`: where nothing observes plain tensors on the CPU."""
    every = (a, b, c, bias, gate)
    given = [x for x in every if x is not None]
    if out is not None or not unobserved(*given) or not a.is_cpu or recorded(*given):
        return None
    try:
        way = ways.get(key_of(lies_of(every), asked))
    except (TypeError, RuntimeError):  # an argument has no hash, or a nested tensor no shape
        return None
    if way is None or not way.recorded.is_native:
        return None
    addresses = [LOWEST if x is None else x.data_ptr() for x in every]
    if min(addresses) < LOWEST:  # freed memory
        return None
    if way.arrange is not None:
        rows = way.arrange(a)
        addresses[0] = rows.data_ptr()
    shape, dtype = way.shape, way.dtype
    made = a.new_empty(*shape) if dtype is None and shape else a.new_empty(shape, dtype=dtype)
    return made if way.guard.run(*addresses, made.data_ptr()) else None


def lies_of(given: Sequence[Any]) -> Hashable:
    """How operands lie, as a part of a key; some may be None."""
    return tuple([x if x is None else _lie(x) for x in given])


def _lie(x: Any) -> Hashable:
    return x.form if type(x) is PackedMatrix else (x.shape, x.stride(), x.dtype)


REPEATED.update(dict.fromkeys(PLAIN, again))


def _multiply_packed(given: Mapping[str, Any], options: Options) -> Tensor:
    """The product with a packed matrix, which is no tensor; a compiler leaves its graph for it."""
    if torch.compiler.is_compiling():
        found: Tensor = outside.products_packed(given, options)
        return found
    every = [x for x in given.values() if isinstance(x, Tensor)]
    if recorded(*every):
        raise NotImplementedError(
            "a packed matrix carries no gradients, and another operand wants one: pass the matrix"
            " itself, or call under torch.no_grad()"
        )
    if not unobserved(*every) or machine_of(given["a"]) is not None:
        raise NotImplementedError(
            "a packed matrix is multiplied by plain tensors on the CPU: pass the matrix itself"
        )
    return run(given, options)


outside.keep("products_packed", _multiply_packed)


def matrix_of(name: str, w: Tensor) -> tuple[Form, int]:
    """How a tensor lies that is packed, and where."""
    if recorded(w):
        raise ValueError(f"{name} wants a gradient, which a packed matrix has not: detach it")
    _check_plain(name, w)
    return _form(name, w), w.data_ptr()


def _check_plain(name: str, x: Tensor) -> None:
    """Raises unless the memory of a tensor can be read: on the CPU, where nothing observes it."""
    check_place(name, x, x.device)
    if x.is_meta or machine_of(x) is not None:
        raise NotImplementedError(f"{name} must be a tensor on the CPU, got one on {x.device}")
    if not unobserved(x):
        raise NotImplementedError(
            f"{name} must be a plain tensor, whose memory is read: not within a transform or a"
            " compiler, of no class of its own, and no negated view"
        )


def _check_places(given: Mapping[str, Tensor]) -> None:
    """Raises unless tensors lie where there are kernels, in a way that these read."""
    device = given["a"].device
    for name, tensor in given.items():
        check_place(name, tensor, device)


def machine_of(tensor: Tensor) -> Machine | None:
    """The GPU that runs kernels for a tensor; None is the processor."""
    return None if tensor.is_cpu else tensors.machine_of(tensor)


def run(given: Mapping[str, Any], options: Options, asked: Asked | None = None) -> Tensor:
    """The product of plain tensors, below autograd. `asked` are the options as they came."""
    a = given["a"]
    machine = machine_of(a)
    if machine is not None:
        return _run_on_gpu(given, options, machine)
    out: Tensor | None = given.get("out")
    try:
        lies, written = lies_of([given.get(name) for name in GIVEN]), lies_of([out])
    except RuntimeError:  # a nested tensor has no shape
        _check_places(given)
        raise
    plan = plans.kept(
        (lies, written), options, lambda: {name: _form(name, x) for name, x in given.items()}
    )
    addresses = {name: _address(x) for name, x in given.items()}
    if min(addresses.values()) < LOWEST:  # no elements, or freed ones
        for name, x in given.items():
            _form(name, x)
    if out is None:
        dtype = arrays.native_dtype(a, plan.dtype)
        (made,) = arrays.empty(a, [(plan.shape, dtype)])
        plan.run(addresses, made.data_ptr())
        if asked is not None:
            remember(key_of(lies, asked), plan, dtype)
        return made
    plan.run(addresses, out.data_ptr())
    count_change(out)
    return out


def _run_on_gpu(given: Mapping[str, Tensor], options: Options, machine: Machine) -> Tensor:
    """The product by the kernels of a GPU."""
    forms = {name: _form(name, x) for name, x in given.items()}
    product, form, _ = plans.described(options, forms)
    out = given.get("out")
    if out is None:
        out = given["a"].new_empty(form.shape, dtype=getattr(torch, form.dtype))
    else:
        addresses = {name: x.data_ptr() for name, x in given.items()}
        check_apart(plans.places(product, forms), form == forms.get("c"), addresses)
    (a, b, c, bias, gate), axes = _matrices(given)
    result = out
    for axis in reversed(axes):
        result = result.unsqueeze(axis)
    alpha, beta, transpose_a, transpose_b, activation, _, precision = options
    more: dict[str, Any] = {"precision": precision} if machine.backend == "triton" else {}
    kernels = import_module(f"tilefold.backends.{machine.backend}.matmul.calls")
    if out.numel():
        kernels.gemm(
            *(a, b, c if beta else None),
            alpha=alpha,
            beta=beta,
            transpose_a=transpose_a,
            transpose_b=transpose_b,
            bias=bias,
            activation=activation,
            gate=gate,
            out=result,
            machine=machine,
            **more,
        )
    return out


def _address(x: Any) -> int:
    return x.address if type(x) is PackedMatrix else x.data_ptr()


def _form(name: str, x: Any) -> Form:
    if isinstance(x, PackedMatrix):
        return x.form
    check_held(name, x)
    return Form(dtype_of(x), tuple(x.shape), x.stride())


def count_change(out: Tensor) -> None:
    """Tell autograd that a tensor was written."""
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)


def buffer_of(name: str, value: Tensor) -> tuple[str, int, int, bool, Callable[[], None]]:
    """Type, address and elements of a tensor in one piece, True, and what counts a change of it."""
    _check_plain(name, value)
    if recorded(value):
        raise ValueError(f"{name} takes no gradients: pass {name}.detach()")
    if not (value.is_contiguous() or value.permute(*range(value.dim())[::-1]).is_contiguous()):
        raise ValueError(f"{name} must be one piece of memory, got strides {value.stride()}")
    check_held(name, value)
    return dtype_of(value), value.data_ptr(), value.numel(), True, lambda: count_change(value)


def _observed(given: Mapping[str, Tensor], options: Options) -> Tensor:
    """The product of tensors that autograd, a compiler or a transform observes."""
    matrices, axes = _matrices(given)
    found: Tensor
    if unobserved(*given.values()):
        found = _Gemm.apply(options, *matrices)  # type: ignore[no-untyped-call]
    elif lifted():
        found = _Transformed.apply(options, *matrices)  # type: ignore[no-untyped-call]
    else:
        found = gemm(*matrices, *options)
    for axis in axes:
        found = found.squeeze(axis)
    return found


def _matrices(given: Mapping[str, Tensor]) -> tuple[Given, tuple[int, ...]]:
    """The operands with vectors as matrices, and the axes of the result that this makes."""
    a, b, c, bias, gate = (given.get(name) for name in GIVEN)
    assert a is not None and b is not None
    axes: tuple[int, ...] = ()
    if b.dim() == 1:
        b, axes = b.unsqueeze(1), (-1,)
        gate = gate.unsqueeze(1) if gate is not None and gate.dim() == 1 else gate
        c, bias = (x.unsqueeze(-1) if x is not None and x.dim() else x for x in (c, bias))
    if a.dim() == 1:
        a, axes = a.unsqueeze(0), (*axes, -1 if axes else -2)
        c, bias = (x.unsqueeze(-2) if x is not None and x.dim() else x for x in (c, bias))
    return (a, b, c, bias, gate), axes


@torch.library.custom_op("tilefold::gemm", mutates_args=(), device_types=("cpu", "mps", "cuda"))
def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    alpha: float,
    beta: float,
    transpose_a: bool,
    transpose_b: bool,
    activation: str | None,
    dtype: str | None,
    precision: str,
) -> Tensor:
    """The product that compilers and tracers see; its arguments are those of `tilefold.gemm`."""
    options = Options(alpha, beta, transpose_a, transpose_b, activation, dtype, precision)
    return run(named(a, b, c, bias, gate), options)


@gemm.register_fake
def _(
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    alpha: float,
    beta: float,
    transpose_a: bool,
    transpose_b: bool,
    activation: str | None,
    dtype: str | None,
    precision: str,
) -> Tensor:
    kind = plans.result_type(
        dtype, dtype_of(a), dtype_of(b), None if c is None else dtype_of(c), None
    )
    broadcast: Any = torch.broadcast_shapes
    batch = broadcast(a.shape[:-2], b.shape[:-2])
    m, k = (a.shape[-1], a.shape[-2]) if transpose_a else (a.shape[-2], a.shape[-1])
    n, inner = (b.shape[-2], b.shape[-1]) if transpose_b else (b.shape[-1], b.shape[-2])
    if k != inner:
        raise ValueError(f"op(a) is {m} x {k} and op(b) {inner} x {n}: the inner two must be equal")
    return a.new_empty((*batch, m, n), dtype=getattr(torch, kind))


def _save(ctx: Any, options: Options, given: Sequence[Any], y: Tensor) -> tuple[Any, ...]:
    """Save what derivatives need: c and bias only where z is computed again."""
    a, b, c, bias, gate = given
    again = derivatives.anew(options, gate)
    ctx.options, ctx.result = options, (tuple(y.shape), y.dtype)
    ctx.like = tuple([None if x is None else (tuple(x.shape), x.dtype) for x in (c, bias)])
    c, bias = (c, bias) if again else (None, None)
    saved = a, b, c, bias, gate, None if again or options.activation is None else y
    ctx.save_for_backward(*saved)
    return saved


class _Gemm(torch.autograd.Function):
    """`tilefold::gemm` where only autograd observes a call."""

    @staticmethod
    def forward(ctx: Any, options: Options, *given: Any) -> Tensor:
        y = run(named(*given), options)
        _save(ctx, options, given, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        wants = tuple(ctx.needs_input_grad[1:])
        saved = tuple(ctx.saved_tensors)
        return (None, *derivatives.gradients(multiply, dy, saved, ctx.options, ctx.like, wants))


class _Transformed(torch.autograd.Function):
    """The same in transforms of torch.func and in forward mode; torch calls it more slowly."""

    @staticmethod
    def forward(options: Options, *given: Any) -> Tensor:
        return run(named(*given), options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        options, *given = inputs
        ctx.save_for_forward(*_save(ctx, options, given, output))

    backward = _Gemm.backward

    @staticmethod
    def jvp(ctx: Any, _: None, *slopes: Tensor | None) -> Tensor:
        saved = tuple(ctx.saved_tensors)
        found: Tensor = derivatives.tangent(multiply, slopes, saved, ctx.options, ctx.result)
        return found

    @staticmethod
    def vmap(info: Any, in_dims: Any, options: Options, *given: Any) -> tuple[Tensor, int]:
        batched = _with_batch(info.batch_size, in_dims[1:], given)
        return _Transformed.apply(options, *batched), 0  # type: ignore[no-untyped-call]


def _with_batch(
    size: int, dims: Sequence[int | None], given: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Operands whose mapped axes are the first axis of a batch."""
    ranks = [
        0 if x is None else x.dim() - (axis is not None)
        for x, axis in zip(given, dims, strict=True)
    ]
    rank = max(ranks[:2])
    alike = dims[4] is not None or dims[1] is not None  # a gate has the shape of b
    every = [dims[0] is None and dims[1] is None and dims[4] is None, alike, False, False, alike]
    found = []
    for x, axis, own, needed in zip(given, dims, ranks, every, strict=True):
        if x is not None and (axis is not None or needed):
            x = x.expand(size, *x.shape) if axis is None else x.movedim(axis, 0)
            x = x.reshape(size, *(1,) * (rank - own), *x.shape[1:])
        found.append(x)
    return found


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save(ctx, Options(*inputs[5:]), inputs[:5], output)


def _operator_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    wants = tuple(ctx.needs_input_grad[:5])
    saved = tuple(ctx.saved_tensors)
    found = derivatives.gradients(multiply, dy, saved, ctx.options, ctx.like, wants)
    return (*found, *(None for _ in Options._fields))


def _operator_vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Tensor, int]:
    given = _with_batch(info.batch_size, in_dims[:5], inputs[:5])
    return gemm(*given, *inputs[5:]), 0


gemm.register_autograd(_operator_gradients, setup_context=_setup)
gemm.register_vmap(_operator_vmap)
