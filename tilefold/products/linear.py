"""Linear layers of PyTorch with quantised matrices, and their place in models."""

from __future__ import annotations

from collections.abc import Callable, Collection
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tilefold.backends.matmul import hold
from tilefold.common.check import choice, flag, shown, whole
from tilefold.frontends.torch import outside
from tilefold.products.quantized import SCALES, QuantizedMatrix, quantize
from tilefold.products.quantized_calls import check_dynamic
from tilefold.products.quantized_torch import check_untraced, multiply
from tilefold.products.schemes import group_of, scheme_of
from tilefold.products.torch import again, machine_of

_ARRAYS = ("codes", "scales", "zeros", "table")


class _Kept(NamedTuple):
    """The matrix of a layer, and the tensors of which it is, with their addresses."""

    tensors: tuple[Tensor | None, ...]
    places: list[int]
    matrix: QuantizedMatrix


class QuantizedLinear(nn.Module):
    """x Wᵀ + bias as in `torch.nn.Linear`, with a quantised W.

    >>> import torch
    >>> import tilefold.torch
    >>> layer = torch.nn.Linear(256, 96)
    >>> quantized = tilefold.torch.QuantizedLinear.from_linear(layer, "int8")
    >>> quantized
    QuantizedLinear(in_features=256, out_features=96, bias=True, scheme='int8')
    >>> x = torch.randn(4, 256)
    >>> bool(torch.allclose(quantized(x), layer(x), atol=0.05))
    True

    Codes, scales, zeros and table are buffers: a state_dict holds them, codes of words as int32. A
    layer made by its constructor has weights of 0, for `load_state_dict`. `.to(dtype)` changes the
    bias alone. W has no gradient; x and the bias have theirs.

    Arguments:
        in_features: k, the length of a row of x
        out_features: n
        bias: True for a bias of n numbers, a parameter
        scheme, group_size, scale_dtype: as in `tilefold.quantize`
        dynamic: as in `tilefold.qgemm`: rows of x are rounded to 8 bits
        dtype: the type of the bias; None is torch's default type
    """

    codes: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    table: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scheme: str = "int8",
        group_size: int | None = None,
        scale_dtype: str = "float32",
        dynamic: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._take(_empty(in_features, out_features, scheme, group_size, scale_dtype), dynamic)
        zeros = torch.zeros(out_features, dtype=dtype) if bias else None
        self.bias = None if zeros is None else nn.Parameter(zeros)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        scheme: str,
        *,
        group_size: int | None = None,
        table: Any = None,
        scale_dtype: str = "float32",
        dynamic: bool = False,
    ) -> QuantizedLinear:
        """The layer with the weight of another one, quantised, and with its bias itself.

        Arguments:
            linear: a torch.nn.Linear
            scheme, group_size, table, scale_dtype: as in `tilefold.quantize`
            dynamic: as in `tilefold.qgemm`
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        matrix = quantize(
            linear.weight,
            scheme,
            group_size=group_size,
            transpose=True,
            table=table,
            scale_dtype=scale_dtype,
        )
        return cls.from_matrix(matrix, linear.bias, dynamic=dynamic).train(linear.training)

    @classmethod
    def from_matrix(
        cls, matrix: QuantizedMatrix, bias: Tensor | None = None, *, dynamic: bool = False
    ) -> QuantizedLinear:
        """The layer of a quantised matrix, whose memory it shares.

        Arguments:
            matrix: k inputs and n outputs
            bias: (n,), a parameter or a tensor that becomes one; or None
            dynamic: as in `tilefold.qgemm`
        """
        if not isinstance(matrix, QuantizedMatrix):
            raise TypeError(f"matrix must be quantised, got {type(matrix).__name__}")
        if bias is not None and not (isinstance(bias, Tensor) and bias.is_floating_point()):
            raise TypeError(f"bias must be a tensor of floats, got {shown(bias)}")
        if bias is not None and tuple(bias.shape) != (matrix.shape[1],):
            raise ValueError(f"bias must be ({matrix.shape[1]},), got {tuple(bias.shape)}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take(matrix, dynamic)
        layer.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    def _take(self, matrix: QuantizedMatrix, dynamic: bool) -> None:
        if flag("dynamic", dynamic):
            check_dynamic(matrix)
        self.dynamic = dynamic
        self.scheme, self.group_size = matrix.scheme, matrix.group_size
        self.in_features, self.out_features = matrix.shape
        for name in _ARRAYS:
            array = getattr(matrix, name)
            if array is not None and array.dtype == np.uint32:
                array = array.view(np.int32)
            self.register_buffer(name, None if array is None else torch.from_numpy(array))
        self._kept: _Kept | None = None

    @property
    def matrix(self) -> QuantizedMatrix:
        """The quantised matrix, which shares the memory of the buffers; of a GPU's it is a copy."""
        tensors = tuple(map(self._buffers.get, _ARRAYS))
        places = [x is not None and x.data_ptr() for x in tensors]  # `share_memory` changes them
        kept = self._kept
        if kept is None or kept.places != places or not all(map(is_, kept.tensors, tensors)):
            if self.codes.is_meta:
                raise NotImplementedError("the layer is on meta, where it has no codes")
            codes = self.codes.cpu().numpy()
            codes = codes.view(np.uint32) if codes.dtype == np.int32 else codes
            more = (None if each is None else each.cpu().numpy() for each in tensors[1:])
            sizes = (self.in_features, self.out_features)
            matrix = QuantizedMatrix(self.scheme, sizes, self.group_size, codes, *more)
            if (machine := machine_of(self.codes)) is not None:
                held = zip(_ARRAYS, tensors, strict=True)
                hold(machine, matrix, {name: x for name, x in held if x is not None})
            self._kept = kept = _Kept(tensors, places, matrix)
        return kept.matrix

    @property
    def weight(self) -> Tensor:
        """W widened anew, (n, k), in the type of the bias or float32; for code that reads it."""
        wide = torch.from_numpy(self.matrix.dequantize(transpose=True))
        return wide if self.bias is None else wide.to(self.bias.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ + bias, (..., n), in the type of x; autocast makes x its type.

        Arguments:
            x: (..., k), float32, float16 or bfloat16
        """
        if torch.compiler.is_compiling():
            y: Tensor = outside.quantized_linear(self, x)
            return y
        return _forward(self, x)

    def extra_repr(self) -> str:
        """What a print of the layer shows."""
        group = f", group_size={self.group_size}" if self.group_size != self.in_features else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features},"
            f" bias={self.bias is not None}, scheme={self.scheme!r}{group}"
            f"{', dynamic=True' if self.dynamic else ''}"
        )

    def get_extra_state(self) -> Tensor:
        """Scheme and group size as bytes in a tensor, which every format of files can keep."""
        return torch.tensor([*f"{self.scheme} {self.group_size}".encode()], dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Raises ValueError unless a state_dict is of this scheme and group size."""
        own, found = (bytes(x.tolist()).decode() for x in (self.get_extra_state(), state))
        if own != found:
            raise ValueError(f"the state must be of scheme and group size {own!r}, got {found!r}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        """The copy of a GPU's matrix is made anew."""
        self._kept = None
        super()._load_from_state_dict(*args, **options)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Devices of buffers may change, and their types may not."""
        before = {name: getattr(self, name) for name in _ARRAYS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = getattr(self, name)
            if old is not None and new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self


def _forward(layer: QuantizedLinear, x: Tensor) -> Tensor:
    bias: Tensor | None = layer.bias
    matrix, asked = layer.matrix, (layer.dynamic, None, None)
    kind = "cpu" if x.is_cpu else x.device.type
    if not x.is_meta and torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
        bias = bias if bias is None or bias.dtype == x.dtype else bias.float()
    found = again(matrix.kept, x, None, None, bias, None, None, asked)
    if found is not None:
        return found
    return multiply(x, matrix, bias, None, None, None, layer.dynamic, asked)


def _outside_of_graphs(layer: QuantizedLinear, x: Tensor) -> Tensor:
    check_untraced()
    return _forward(layer, x)


outside.keep("quantized_linear", _outside_of_graphs)


def quantize_(
    model: nn.Module,
    scheme: str,
    *,
    group_size: int | None = None,
    skip: Collection[str] | Callable[[str, nn.Linear], bool] = (),
    scale_dtype: str = "float32",
    dynamic: bool = False,
) -> tuple[str, ...]:
    """Replace the linear layers of a model by quantised ones, in place.

    >>> import torch
    >>> import tilefold.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 2))
    >>> tilefold.torch.quantize_(model, "int4", skip=["1"])
    ('0',)

    A layer of a class of its own that inherits from torch.nn.Linear stays as it is. So does one
    whose weight another module has too, such as an embedding, and one whose weight is computed in
    each call, as pruning and weight normalisation do. Hooks of calls move to the new layers.

    Arguments:
        model: a module of torch, on the processor; not a linear layer itself
        scheme, group_size, scale_dtype: as in `tilefold.quantize`
        dynamic: as in `tilefold.qgemm`
        skip: layers that stay as they are: their full names, or the last parts of these; or a
            function of name and layer

    Returns:
        The names of the layers that were replaced

    Raises:
        ValueError: a layer cannot be quantised so; the message names it, and no layer is replaced
        TypeError: model is no module, or a linear layer itself
        NotImplementedError: a layer is on a GPU or on meta
    """
    if not isinstance(model, nn.Module) or type(model) is nn.Linear:
        raise TypeError(
            "model must be a module that has linear layers, got"
            f" {type(model).__name__}; one layer: QuantizedLinear.from_linear(layer, scheme)"
        )
    if isinstance(skip, str):
        raise TypeError(f"skip must be names or a function, got {skip!r}: pass [{skip!r}]")
    if not callable(skip) and not isinstance(skip, Collection):
        raise TypeError(f"skip must be names or a function, got {shown(skip)}")
    scheme_of(scheme)
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    made: dict[int, QuantizedLinear] = {}
    places = []
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is not nn.Linear or len(owners.get(id(module.weight), ())) != 1:
            continue
        last = name.rpartition(".")[2]
        if skip(name, module) if callable(skip) else name in skip or last in skip:
            continue
        if id(module) not in made:
            try:
                made[id(module)] = QuantizedLinear.from_linear(
                    module,
                    scheme,
                    group_size=group_size,
                    scale_dtype=scale_dtype,
                    dynamic=dynamic,
                )
            except (ValueError, TypeError, NotImplementedError) as error:
                raise type(error)(f"{name}: {error}") from None
            _keep_hooks(made[id(module)], module)
        places.append((name, made[id(module)]))
    for name, layer in places:
        model.set_submodule(name, layer)
    return tuple(name for name, _ in places)


def _keep_hooks(new: nn.Module, old: nn.Module) -> None:
    """The hooks of calls of a layer are those of another; a handle of one removes it from both."""
    for name, hooks in vars(old).items():
        if name.startswith(("_forward_", "_backward_", "_is_full_backward_")):
            new.__dict__[name] = hooks


def _empty(
    k: int, n: int, scheme: str, group_size: int | None, scale_dtype: str
) -> QuantizedMatrix:
    """A matrix whose weights are all 0."""
    k, n = whole("in_features", k, 1), whole("out_features", n, 1)
    found = scheme_of(scheme)
    choice("scale_dtype", scale_dtype, SCALES)
    group = group_of(found, k, group_size)
    shape = found.scales_shape(k, n, group)
    return QuantizedMatrix(
        scheme,
        (k, n),
        group,
        np.zeros(found.codes_shape(k, n), found.dtype),
        np.zeros(shape, scale_dtype) if found.scaled else None,
        np.zeros(shape, scale_dtype) if found.zeros else None,
        None if found.scaled else np.zeros(64, np.float16),
    )
