"""A call without its arrays: shapes, types, scale and mask, checked once where a call enters.

Every frontend reduces its arrays to shapes and calls `describe`. All later code may rely on the
checks of `Problem`. An error names the argument, the allowed values and the given value.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tilefold.common.check import choice, shown
from tilefold.masks.evaluate import index_bits
from tilefold.masks.position_rules import Rule
from tilefold.problems.dropout import check_probability
from tilefold.problems.request import LAYOUTS, PRECISIONS, Request, check_layout, check_scale
from tilefold.scores.score import Score, Sizes, as_score

Shape = tuple[int, ...]

AXES: Final = ("batch", "heads", "sequence", "dim")
ITEM_BYTES: Final = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
STATISTICS: Final = {
    "float32": "float32",
    "float64": "float64",
    "float16": "float32",
    "bfloat16": "float32",
}
"""The type of lse and of the computation, by the type of the arrays."""

LIMIT: Final = 2**31 - 2**10
"""Lengths, dims and batch * heads are below this limit, so that 32 bits can count to the end of the
last block.
"""


@dataclass(frozen=True)
class Problem:
    """One problem of attention: the sizes, type, scale and mask of a call, without its arrays.

    >>> import tilefold
    >>> tilefold.Problem.of((1, 8, 2048, 64), (1, 2, 512, 64), mask=tilefold.causal()).len_k
    512

    Lengths count tokens, and dims count elements. Query head h reads key head
    h // (heads_q // heads_kv) (grouped queries). `precision` is the least precision of products of
    float32 arrays; for other types it is always "highest". `Problem.of` makes a problem from
    shapes. Raises ValueError if a value is not allowed or the values do not fit together.
    """

    batch: int
    heads_q: int
    heads_kv: int
    len_q: int
    len_k: int
    dim: int
    dim_v: int
    dtype: str
    scale: float
    mask: Rule
    precision: str = "highest"
    score: Score | None = None
    sinks: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        choice("dtype", self.dtype, tuple(ITEM_BYTES))
        choice("precision", self.precision, PRECISIONS if self.dtype == "float32" else ("highest",))
        check_scale(self.scale)
        check_probability(self.dropout)
        self._check_sizes()
        self.mask.check(self.batch, self.heads_q, self.len_q, self.len_k)
        if self.score is not None:
            index_bits(self.score.expression(self.score_sizes), *self.score_sizes)

    @property
    def score_sizes(self) -> Sizes:
        """The sizes that a score is bound to."""
        return Sizes(self.batch, self.heads_q, self.len_q, self.len_k)

    @classmethod
    def of(
        cls,
        q: Shape,
        k: Shape | None = None,
        v: Shape | None = None,
        *,
        dtype: str = "float32",
        mask: Rule | None = None,
        scale: float | None = None,
        layout: str = "bhnd",
        precision: str = "highest",
        score: Any = None,
        sinks: int = 0,
        dropout: float = 0.0,
    ) -> Problem:
        """The problem of a call of `attention` with arrays of these shapes and this type.

        Without `k`, k has the shape of q; without `v`, v has the shape of k. `sinks` is the number
        of sinks of each head. The other arguments are as for `tilefold.attention`.
        Raises TypeError or ValueError, as that call does.
        """
        shape_q = _sizes("q", q)
        shape_k = shape_q if k is None else _sizes("k", k)
        shape_v = shape_k if v is None else _sizes("v", v)
        modified = as_score(score)
        form = None if modified is None else modified.form.score
        request = Request(mask, scale, layout, precision, form, sinks, dropout)
        return describe(shape_q, shape_k, shape_v, dtype, request)

    def _check_sizes(self) -> None:
        sizes = (self.batch, self.heads_q, self.heads_kv, self.len_q, self.len_k)
        least, most = min(sizes), max(*sizes, self.dim, self.dim_v)
        heads = self.batch * max(self.heads_q, self.heads_kv)
        fits = least >= 0 and min(self.dim, self.dim_v) >= 1 and max(most, heads) < LIMIT
        fits = fits and hasattr(sum(sizes, self.dim + self.dim_v), "__index__")  # no fraction
        if not fits or (self.heads_q and (not self.heads_kv or self.heads_q % self.heads_kv)):
            self._explain_sizes()

    def _explain_sizes(self) -> None:
        """Raises the error that names the size which is not allowed."""
        for name in ("batch", "heads_q", "heads_kv", "len_q", "len_k", "dim", "dim_v"):
            size, least = getattr(self, name), 1 if name.startswith("dim") else 0
            if isinstance(size, bool) or not hasattr(size, "__index__"):
                raise TypeError(f"{name} must be an integer, got {shown(size)}")
            if not least <= size < LIMIT:
                raise ValueError(f"{name} must be from {least} to {LIMIT - 1}, got {size}")
        most = self.batch * max(self.heads_q, self.heads_kv)
        if most >= LIMIT:
            raise ValueError(f"batch * heads must be below {LIMIT}, got {most}")
        if self.heads_q and (not self.heads_kv or self.heads_q % self.heads_kv):
            raise ValueError(
                "the heads of q must be a multiple of the heads of k and v, "
                f"got {self.heads_q} and {self.heads_kv}"
            )

    @property
    def empty(self) -> bool:
        """True where no query meets a key: then o and all gradients are 0 and lse is -inf."""
        return not (self.batch and self.heads_q and self.len_q and self.len_k)

    @property
    def pairs(self) -> int:
        """The number of (query, key) pairs over batch and query heads, including masked pairs."""
        return self.batch * self.heads_q * self.len_q * self.len_k

    def flops(self, operation: str, pairs: int | None = None) -> int:
        """Floating-point operations of the products of `operation`, 2 per multiply-add.

        "forward" has two products (Q K^T, P V), "backward" five (Q K^T, dO V^T, dV, dQ, dK).
        `pairs` is the number of computed pairs; None means all pairs, including masked ones.

        >>> Problem.of((1, 8, 1024, 64)).flops("forward")
        2147483648
        """
        widths = {
            "forward": self.dim + self.dim_v,
            "backward": 3 * self.dim + 2 * self.dim_v,
            "key_mass": self.dim,
        }
        return 2 * widths[operation] * (self.pairs if pairs is None else pairs)

    def bytes(self, operation: str) -> int:
        """Bytes of all inputs and outputs of `operation`, "forward" or "backward", each once."""
        q = self.batch * self.heads_q * self.len_q * self.dim
        k = self.batch * self.heads_kv * self.len_k * self.dim
        v = self.batch * self.heads_kv * self.len_k * self.dim_v
        o = self.batch * self.heads_q * self.len_q * self.dim_v
        lse = self.batch * self.heads_q * self.len_q
        elements = {
            "forward": q + k + v + o,
            "backward": 2 * (q + k + v + o),
            "key_mass": q + k,
        }[operation]
        return elements * ITEM_BYTES[self.dtype] + lse * ITEM_BYTES[STATISTICS[self.dtype]]


def describe(
    shape_q: Shape,
    shape_k: Shape,
    shape_v: Shape,
    dtype: str,
    request: Request,
) -> Problem:
    """The Problem of arrays of these shapes and this type. Raises ValueError.

    The precision of the request has an effect on float32 only.
    """
    layout, scale = request.layout, request.scale
    raw = {"q": shape_q, "k": shape_k, "v": shape_v}
    q, k, v = (_canonical(name, shape, layout) for name, shape in raw.items())
    for axis, name, shape, other, expected in (
        (0, "k", k, "q", q),
        (3, "k", k, "q", q),
        (0, "v", v, "k", k),
        (1, "v", v, "k", k),
        (2, "v", v, "k", k),
    ):
        if shape[axis] != expected[axis]:
            raise ValueError(
                f"the {AXES[axis]} of {name} must be {expected[axis]} as in {other}, got "
                f"{shape[axis]}: {other} is {raw[other]} and {name} {raw[name]} in layout {layout}"
            )
    return Problem(
        batch=q[0],
        heads_q=q[1],
        heads_kv=k[1],
        len_q=q[2],
        len_k=k[2],
        dim=q[3],
        dim_v=v[3],
        dtype=dtype,
        scale=default_scale(q[3]) if scale is None else scale,
        mask=request.mask,
        precision=request.precision if dtype == "float32" else "highest",
        score=request.score,
        sinks=request.sinks,
        dropout=request.dropout,
    )


def _sizes(name: str, shape: Any) -> Shape:
    """The shape as a tuple of int. Raises TypeError unless it is a sequence of integers."""
    try:
        if isinstance(shape, str) or any(isinstance(size, bool) for size in shape):
            raise TypeError
        return tuple([operator.index(size) for size in shape])
    except TypeError:
        hint = f"; pass {name}.shape" if hasattr(shape, "shape") else ""
        raise TypeError(
            f"{name} must be a shape of integers such as (1, 8, 2048, 64), got {shown(shape)}{hint}"
        ) from None


def _canonical(name: str, shape: Shape, layout: str) -> Shape:
    if len(shape) != 4:
        order = ", ".join(AXES[axis] for axis in LAYOUTS[layout])
        raise ValueError(
            f"{name} must have four axes, ({order}) in layout {layout}, got shape {shape}"
        )
    return tuple(shape[axis] for axis in LAYOUTS[layout])


def check_problem(problem: object, name: str = "problem must be a tilefold.Problem") -> None:
    """Raises TypeError unless the value is a `Problem`."""
    if not isinstance(problem, Problem):
        raise TypeError(
            f"{name} such as Problem.of((1, 8, 2048, 64)), got {type(problem).__name__}"
        )


def default_scale(dim: int) -> float:
    """The default factor of the scores, 1 / sqrt(dim)."""
    return 1 / math.sqrt(max(1, dim))


def common_dtype(dtypes: Mapping[str, str]) -> str:
    """The common type of all arguments. Raises TypeError if they differ or are not allowed."""
    first, expected = next(iter(dtypes.items()))
    for name, dtype in dtypes.items():
        if dtype not in ITEM_BYTES:
            allowed = ", ".join([*ITEM_BYTES][:-1]) + f" or {[*ITEM_BYTES][-1]}"
            raise TypeError(f"{name} must be of {allowed}, got {dtype}")
        if dtype != expected:
            raise TypeError(f"{name} must be of {expected} as {first} is, got {dtype}")
    return expected


def check_lse(dtype: str, expected: str, name: str = "lse") -> None:
    """Raises TypeError unless lse, or its gradient, has the type that `STATISTICS` names."""
    if dtype != STATISTICS[expected]:
        raise TypeError(
            f"{name} must be of {STATISTICS[expected]} where q is {expected}, got {dtype}"
        )


def check_shape(name: str, shape: Shape, expected: Shape) -> None:
    """Raises ValueError unless do, o or lse has the shape that goes with q, k and v."""
    if shape != expected:
        raise ValueError(f"{name} must have shape {expected} to go with q, k and v, got {shape}")


def check_rows_of_sinks(rows: int, heads: int) -> None:
    """Raises ValueError unless there are as many rows of sinks as query heads."""
    if rows != heads:
        raise ValueError(
            f"sinks must have shape ({heads},) or ({heads}, number), one row for each head of q,"
            f" got {rows} rows"
        )


def check_sinks(shape: Shape, dtype: str, problem: Problem) -> None:
    """Raises ValueError or TypeError unless sinks have a row for each query head, and the type."""
    check_rows_of_sinks(shape[0], problem.heads_q)
    if shape[1:] != (problem.sinks,):
        raise ValueError(f"sinks must have {problem.sinks} columns, got shape {shape}")
    wanted = STATISTICS[problem.dtype]
    if dtype != wanted:
        raise TypeError(f"sinks must be of {wanted} where q is {problem.dtype}, got {dtype}")


def check_seeds(shape: Shape, dtype: str) -> None:
    """Raises ValueError or TypeError unless an array holds the one seed that kernels read."""
    if math.prod(shape) != 1:
        raise ValueError(f"seed must be one integer, got an array of shape {shape}")
    if dtype != "int64":
        raise TypeError(f"an array of the seed must be of int64, got {dtype}")


def shapes_qkv(problem: Problem, layout: str) -> tuple[Shape, Shape, Shape]:
    """The shapes of q, k and v, and of their gradients, in a layout."""
    axes, keys = LAYOUTS[layout], (problem.batch, problem.heads_kv, problem.len_k)
    q = (problem.batch, problem.heads_q, problem.len_q, problem.dim)
    k, v = (*keys, problem.dim), (*keys, problem.dim_v)
    return tuple(q[a] for a in axes), tuple(k[a] for a in axes), tuple(v[a] for a in axes)


def check_parts(
    shapes: Mapping[str, Shape], dtypes: Mapping[str, str], layout: str
) -> tuple[int, int, int, int]:
    """Check partial results o1, lse1, o2 and lse2; return the canonical axes of o1.

    Raises TypeError or ValueError unless they fit together.
    """
    check_layout(layout)
    dtype = common_dtype({name: dtypes[name] for name in ("o1", "o2")})
    rows = _canonical("o1", shapes["o1"], layout)[:3]
    for name, expected in (("o2", shapes["o1"]), ("lse1", rows), ("lse2", rows)):
        if shapes[name] != expected:
            raise ValueError(
                f"{name} must have shape {expected} to go with o1, which is {shapes['o1']} in"
                f" layout {layout}, got {shapes[name]}"
            )
        if name != "o2" and dtypes[name] != STATISTICS[dtype]:
            kind = STATISTICS[dtype]
            raise TypeError(f"{name} must be of {kind} where o1 is {dtype}, got {dtypes[name]}")
    return LAYOUTS[layout]


def shape_o(problem: Problem, layout: str) -> Shape:
    """The shape of o and do in a layout."""
    canonical = (problem.batch, problem.heads_q, problem.len_q, problem.dim_v)
    return tuple(canonical[axis] for axis in LAYOUTS[layout])


def shape_mass(problem: Problem) -> Shape:
    """The shape of the mass of keys, the same in every layout."""
    return (problem.batch, problem.heads_q, problem.len_k)


def shape_lse(problem: Problem) -> Shape:
    """The shape of the log-sum-exp, the same in every layout."""
    return (problem.batch, problem.heads_q, problem.len_q)


def contiguous(shape: Shape) -> tuple[int, ...]:
    """The strides of a contiguous array of this shape, in elements."""
    strides = [1]
    for length in reversed(shape[1:]):
        strides.insert(0, strides[0] * length)
    return tuple(strides)
