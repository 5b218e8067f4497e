"""Arrays that rules are given: checked, and copied into tables that nobody can write to.

Numbers of keys, one for all or one per batch entry, are such an array too: `lengths` hides what is
past them, and coordinates may end at them.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold.common.check import shown, whole
from tilefold.common.foreign_arrays import dtype_name, is_of_torch, is_traced
from tilefold.masks.expression import Index, Lookup, Table
from tilefold.masks.tables import Given, given_table

INT32 = np.iinfo(np.int32)


def as_traced(name: str, value: Any, ranks: tuple[int, ...], dtype: str) -> Given:
    """A table of a traced array. Raises TypeError or ValueError for other types and ranks.

    PyTorch's integers may be of any type, and any values: they are read when the graph runs.
    """
    given = _of_torch if is_of_torch(value) else given_table
    table = given(name, value, dtype)
    if len(table.shape) not in ranks:
        axes = " or ".join(map(str, ranks))
        raise ValueError(f"{name} must have {axes} axes, got shape {table.shape}")
    return table


def _of_torch(name: str, value: Any, dtype: str) -> Given:
    """A table of an array that PyTorch traces; a list or an array of NumPy becomes a tensor."""
    torch: Any = sys.modules["torch"]
    tensor = value if isinstance(value, torch.Tensor) else torch.as_tensor(value)
    kind = tensor.dtype
    whole = not (kind.is_floating_point or kind.is_complex or kind == torch.bool)
    if whole != (dtype == "int32") or (dtype == "bool" and kind != torch.bool):
        wanted = "integers" if dtype == "int32" else "bool"
        raise TypeError(f"{name} must be of {wanted}, got {kind}")
    low, high = (INT32.min, INT32.max) if dtype == "int32" else (0, 1)
    # jit.trace makes tensors of sizes
    sizes = [0] * tensor.dim() if torch._C._get_tracing_state() else tensor.shape
    return Given(tuple(sizes), dtype, int(low), int(high), held=tensor)


def as_array(name: str, value: Any) -> NDArray[Any]:
    """A NumPy array for anything that is one, lies on the CPU, or nests lists."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} must be an array without a mask of its own: pass its data")
    if hasattr(value, "dtype") and is_traced(value):
        kind = f"{dtype_name(value)} of shape {value.shape}"
        raise TypeError(f"{name} must be an array with values, got one that is traced, {kind}")
    try:
        if not hasattr(value, "__array__") and hasattr(value, "__dlpack__"):
            return np.from_dlpack(value)
        return np.asarray(value)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TypeError(
            f"{name} must be an array on the CPU, got {shown(value)}: {reason}"
        ) from None


def as_integers(name: str, value: Any, ranks: tuple[int, ...]) -> NDArray[Any]:
    """A NumPy array of integers with an allowed number of axes."""
    array = as_array(name, value)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name} must be integers, got {array.dtype} {shown(value)}")
    if array.ndim not in ranks:
        axes = " or ".join(map(str, ranks))
        raise ValueError(f"{name} must have {axes} axes, got {array.ndim} in shape {array.shape}")
    return array if array.dtype.kind in "iu" else array.astype(np.int32)


def as_table(array: NDArray[Any], kind: type[np.generic]) -> Table:
    """A table of a copy that nobody can write to: a rule never changes after it was made."""
    return Table(np.asarray(array, kind))


def shape_of(table: Table | Given) -> str:
    """The shape as rules print it: `[2x7]`."""
    return f"[{'x'.join(map(str, table.shape))}]"


def check_batch(name: str, table: Table | Given, batch: int) -> None:
    """Raises ValueError unless a table has one row per batch entry."""
    if table.shape[0] != batch:
        raise ValueError(f"{name} is for a batch of {table.shape[0]}, but batch is {batch}")


def key_counts(name: str, value: Any) -> int | Table | Given:
    """Numbers of keys: one for all, or a table with one per batch entry.

    Raises TypeError or ValueError unless they are integers >= 0 in at most one axis.
    """
    if isinstance(value, int) or (hasattr(value, "__index__") and not hasattr(value, "shape")):
        return whole(name, value, 0)
    if is_traced(value):
        return as_traced(name, value, (0, 1), "int32")
    array = as_integers(name, value, (0, 1))
    if array.ndim == 0:
        return whole(name, int(array), 0)
    if array.size and array.min() < 0:
        raise ValueError(f"{name} must be integers >= 0, got {array.min()} among them")
    return as_table(np.minimum(array, INT32.max), np.int32)


def key_count(name: str, counts: int | Table | Given, len_k: int) -> int | Lookup:
    """The number of keys of a batch entry; raises ValueError if one is more than len_k.

    Numbers that come with each call are not checked.
    """
    if isinstance(counts, Given):
        return Lookup(counts, (Index("b"),) if counts.shape else ())
    most = counts if isinstance(counts, int) else int(counts.array.max(initial=0))
    if most > len_k:
        raise ValueError(f"{name} must be at most len_k={len_k}, got {most}")
    return counts if isinstance(counts, int) else Lookup(counts, (Index("b"),))
