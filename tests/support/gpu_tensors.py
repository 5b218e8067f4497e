"""Small tensors for calls on a GPU, the results of the definition, and the comparison."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tilefold.problems import reference
from tilefold.problems.request import LAYOUTS

TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-11, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def tensors(dtype: torch.dtype = torch.float32, layout: str = "bhnd") -> list[Tensor]:
    """q, k, v that require gradients: grouped heads, other lengths and dims than blocks have."""
    torch.manual_seed(0)
    shapes = (1, 4, 21, 12), (1, 2, 35, 12), (1, 2, 35, 9)
    drawn = [torch.randn(shape).to(dtype).permute(LAYOUTS[layout]) for shape in shapes]
    return [tensor.contiguous().requires_grad_() for tensor in drawn]


def expected(inputs: list[Tensor], do: Tensor, layout: str = "bhnd", **options: Any) -> list[Any]:
    """o, dq, dk, dv and lse by the definition, in the canonical order of axes."""
    axes = LAYOUTS[layout]
    q, k, v, outer = (x.detach().permute(axes).double().numpy() for x in (*inputs, do))
    o, lse = reference.attention(q, k, v, **options)
    return [o, *reference.attention_backward(outer, q, k, v, o, lse, **options), lse]


def check(got: list[Tensor], want: list[Any], layout: str = "bhnd") -> None:
    """Raises unless o and the gradients are contiguous and near the definition."""
    for name, tensor, array in zip(("o", "dq", "dk", "dv"), got, want, strict=True):
        tolerance = TOLERANCES[tensor.dtype]
        values = tensor.detach().permute(LAYOUTS[layout]).double().numpy()
        assert tensor.is_contiguous(), name
        np.testing.assert_allclose(values, array, rtol=tolerance, atol=tolerance, err_msg=name)
