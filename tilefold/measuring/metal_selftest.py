"""Tests of every Metal kernel on a machine, against the dense definition in float64.

An Apple GPU and the emulator run the same trials. The emulator runs fewer of them, since compiling
takes its time. Gradients start from the definition's o and lse, so a wrong forward pass does not
show as a wrong gradient. One problem of each type has modified scores and sinks. A problem whose
rule hides rows from all others is tried once more with NaN and infinities in them, which must
change nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.metal import gated
from tilefold.backends.metal.dispatch import Machine, execute
from tilefold.backends.metal.matmul import calls
from tilefold.backends.metal.plan import MetalPlan, plan
from tilefold.common.array_files import element_type
from tilefold.common.check import one_line
from tilefold.masks.data_rules import lengths
from tilefold.masks.position_rules import Rule, causal, chunked, full, local
from tilefold.measuring.agreement import error
from tilefold.problems import reference
from tilefold.problems.attention import Problem
from tilefold.scores.modifications import bias, softcap
from tilefold.scores.relative import relative_bias
from tilefold.scores.score import Score, as_score

Array = NDArray[Any]

TOLERANCES = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}
"""The largest allowed error by type, relative to the largest element of the exact result."""

MASKS: dict[str, Callable[[], Rule]] = {
    "full": full,
    "causal": causal,
    "window": lambda: causal() & local(20),
    "chunks": lambda: local(9) | chunked(24),
    "lengths": lambda: lengths([30, 0]),
}
"""Rules by name. In three of them, some queries see nothing."""

Sizes = tuple[int, int, int, int, str]
"""The sizes of a trial: dim, dim_v, len_q, len_k and the name of a mask."""

SMALL: tuple[tuple[str, Sizes], ...] = (
    ("float32", (24, 16, 40, 33, "window")),
    ("bfloat16", (200, 200, 24, 40, "lengths")),
)
"""The trials on the emulator. In the second one the sums are too wide for registers and spill."""

LARGE: tuple[Sizes, ...] = (
    (1, 1, 3, 5, "full"),
    (8, 8, 64, 64, "causal"),
    (24, 16, 40, 33, "window"),
    (64, 64, 130, 200, "chunks"),
    (77, 90, 113, 203, "causal"),
    (128, 128, 256, 256, "lengths"),
    (256, 256, 100, 140, "window"),
    (384, 384, 72, 96, "full"),
)
"""The trials on a GPU, each in every type: small, odd and large dims."""


@dataclass(frozen=True)
class Trial:
    """One kernel on one case.

    `error` is relative; it is None if the kernel did not run, and `reason` then says why. `absent`
    is True if this machine has no such kernel, which is no failure.
    """

    kernel: str
    case: str
    dtype: str
    error: float | None = None
    seconds: float = 0.0
    reason: str | None = None
    absent: bool = False

    @property
    def passed(self) -> bool:
        """True if the error is small enough."""
        return self.error is not None and self.error < TOLERANCES[self.dtype]


@dataclass(frozen=True)
class Place:
    """Functions that copy arrays into the memory of a machine's kernels, and back."""

    there: Callable[[Array], Any] = lambda array: array
    back: Callable[[Any], Array] = np.asarray


def trials(machine: Machine, place: Place, missing: str | None, *, few: bool) -> Iterator[Trial]:
    """Run the trials one by one; with `few`, only the trials that the emulator does in seconds.

    `missing` says why the machine has no tensor operations; None means that it has them.
    """
    dtypes = []
    for dtype in TOLERANCES:
        try:
            element_type(dtype)
        except ModuleNotFoundError as error:
            yield Trial("all kernels", "", dtype, reason=str(error), absent=True)
        else:
            dtypes.append(dtype)
    cases = SMALL if few else [(dtype, sizes) for dtype in dtypes for sizes in LARGE]
    for dtype, (dim, dim_v, len_q, len_k, mask) in cases:
        if dtype in dtypes:
            shapes = (2, 4, len_q, dim), (2, 2, len_k, dim), (2, 2, len_k, dim_v)
            problem = Problem.of(*shapes, dtype=dtype, mask=MASKS[mask]())
            yield from _Attention(machine, place, problem).tiled()
    for dtype in ("float16",) if few else dtypes:
        decoded = Problem.of((2, 4, 3, 64), (2, 2, 600, 64), dtype=dtype, mask=causal())
        yield _Attention(machine, place, decoded).decoded()
        yield _gemm(machine, place, dtype)
        yield _softmax(machine, place, dtype)
        square = Problem.of((2, 4, 70, 64), (2, 2, 90, 64), dtype=dtype, mask=causal())
        yield from _scored(machine, place, dtype)
        yield _Attention(machine, place, square).by_tensor_operations(missing)


def _scored(machine: Machine, place: Place, dtype: str) -> Iterator[Trial]:
    """Scores that read two arrays in two ways, one of which hides pairs, and sinks."""
    keys, table, sinks = _normal(dtype, (4, 1, 90), (4, 32), (4, 2))
    keys[..., 7:20] = -np.inf
    score = as_score([softcap(2.0), bias(keys), relative_bias(table)])
    shapes = (2, 4, 70, 40), (2, 2, 90, 40)
    problem = Problem.of(*shapes, dtype=dtype, mask=causal(), score=score, sinks=2)
    yield from _Attention(machine, place, problem, score, sinks.astype(np.float32)).tiled()


class _Attention:
    """One problem, its operands, and the results of the definition."""

    def __init__(
        self,
        machine: Machine,
        place: Place,
        problem: Problem,
        score: Score | None = None,
        sinks: Array | None = None,
    ) -> None:
        self._machine, self._place, self._problem = machine, place, problem
        p = problem
        q, k, v, do = _normal(
            p.dtype,
            (p.batch, p.heads_q, p.len_q, p.dim),
            (p.batch, p.heads_kv, p.len_k, p.dim),
            (p.batch, p.heads_kv, p.len_k, p.dim_v),
            (p.batch, p.heads_q, p.len_q, p.dim_v),
        )
        options: dict[str, Any] = {"mask": p.mask, "score": score, "sinks": sinks}
        o, lse = reference.attention(q, k, v, **options)
        gradients = reference.attention_backward(do, q, k, v, o, lse, **options)
        arrays = score.form.arrays if score else ()
        extra = {f"input{number}": array for number, array in enumerate(arrays)}
        extra |= {} if sinks is None else {"sinks": sinks}
        self._extra = tuple([f"d{name}" for name in extra])
        self._exact = {"o": o, "lse": lse, "delta": (do * o).sum(axis=3)}
        self._exact |= dict(zip(("dq", "dk", "dv", *self._extra), gradients, strict=True))
        self._given = {"q": q, "k": k, "v": v, "do": do, "o": o.astype(q.dtype)}
        self._given |= {name: self._exact[name].astype(np.float32) for name in ("lse", "delta")}
        self._given |= extra
        self._case = f"{p.len_q}x{p.len_k} d{p.dim}/{p.dim_v} {p.mask}"
        self._case += f" {score}" if score else ""

    def tiled(self) -> Iterator[Trial]:
        """The forward kernel, the kernels of dQ and dK/dV, and those of the gradients of arrays."""
        kernels: list[tuple[str, MetalPlan, tuple[str, ...]]]
        kernels = [("forward", self._plan("forward", form="tiled"), ("o", "lse"))]
        made = self._plan("backward", extra=self._extra)
        outputs_of: list[tuple[str, ...]] = [("delta", "dq"), ("dk", "dv")]
        outputs_of += [(name,) for name in sorted(self._extra, key=lambda name: name != "dsinks")]
        for launch, outputs in zip(made.launches, outputs_of, strict=True):
            pages = {name: each for name, each in made.buffers.items() if name not in self._given}
            one = replace(made, launches=(launch,), buffers=pages)
            kernels.append((launch.spec.kernel, one, outputs))
        for kernel in kernels:
            yield self._try(*kernel)
        if not self._extra and self._spoil():
            for kernel in kernels:
                yield self._try(*kernel)

    def _spoil(self) -> bool:
        """Put NaN and infinities where no result may see them; False if there is no such row."""
        p = self._problem
        seen = p.mask.to_dense(p.len_q, p.len_k, p.batch, p.heads_q)
        seen = np.broadcast_to(seen, (p.batch, p.heads_q, p.len_q, p.len_k))
        blind = ~seen.any(axis=3)
        unseen = ~seen.reshape(p.batch, p.heads_kv, -1, p.len_k).any(axis=2)
        for name, rows in (("q", blind), ("k", unseen), ("v", unseen)):
            self._given[name][rows] = np.resize([np.nan, np.inf, -np.inf], rows.sum())[:, None]
        self._case += ", NaN where hidden"
        return bool(blind.any() or unseen.any())

    def decoded(self) -> Trial:
        """Few queries and many keys: the decode kernel on splits of the keys, and the merge."""
        return self._try("decode, merge", self._plan("forward", form="decode"), ("o", "lse"))

    def by_tensor_operations(self, missing: str | None) -> Trial:
        """The forward kernel on the matrix units of Metal 4."""
        dtype = self._problem.dtype
        if not missing:
            try:
                made = gated.plan(self._problem, self._machine.family)
            except NotImplementedError as error:  # a type that tensor operations do not take
                missing = str(error)
            else:
                return self._try("tensorops", made, ("o", "lse"))
        return Trial("tensorops", self._case, dtype, reason=missing, absent=True)

    def _run(self, made: MetalPlan, outputs: tuple[str, ...]) -> dict[str, Array]:
        """The results of a plan by their names. Elements that are not written stay NaN."""
        names = [name for name in self._given if name not in outputs]
        operands = {name: self._place.there(self._given[name]) for name in names}
        for name in outputs:
            like = self._given[name if name in self._given else name.removeprefix("d")]
            operands[name] = self._place.there(np.full_like(like, np.nan))
        execute(made, self._machine, operands)
        return {name: self._place.back(operands[name]) for name in outputs}

    def _plan(self, operation: str, **options: Any) -> MetalPlan:
        return plan(self._problem, self._machine.family, operation, **options)

    def _try(self, kernel: str, made: MetalPlan, outputs: tuple[str, ...]) -> Trial:
        dtype = self._problem.dtype
        return _judge(kernel, self._case, dtype, lambda: self._run(made, outputs), self._exact)


def _gemm(machine: Machine, place: Place, dtype: str) -> Trial:
    """A matrix product with alpha, beta and a bias; the second factor is transposed."""
    a, b, c, bias = _normal(dtype, (2, 70, 50), (2, 90, 50), (2, 70, 90), (90,))
    wide = [array.astype(np.float64) for array in (a, b, c, bias)]
    exact = 0.5 * wide[0] @ wide[1].swapaxes(1, 2) + wide[3] - 2.0 * wide[2]

    def run() -> dict[str, Array]:
        left, right, into, added = (place.there(array) for array in (a, b, c, bias))
        options: dict[str, Any] = {"alpha": 0.5, "beta": -2.0, "transpose_b": True}
        made = calls.gemm(left, right, into, bias=added, machine=machine, **options)
        return {"c": place.back(made)}

    return _judge("gemm", "2x70x90 k50", dtype, run, {"c": exact})


def _softmax(machine: Machine, place: Place, dtype: str) -> Trial:
    """The softmax of rows whose length is no multiple of a vector."""
    (x,) = _normal(dtype, (2, 9, 301))
    weights = np.exp(x.astype(np.float64))
    total = weights.sum(axis=2, keepdims=True)
    exact = {"p": weights / total, "lse": np.log(total[..., 0])}

    def run() -> dict[str, Array]:
        p, lse = calls.softmax(place.there(x), return_lse=True, machine=machine)
        return {"p": place.back(p), "lse": place.back(lse)}

    return _judge("softmax", "18 rows of 301", dtype, run, exact)


def _normal(dtype: str, *shapes: tuple[int, ...]) -> list[Array]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(element_type(dtype)) for shape in shapes]


def _judge(
    kernel: str,
    case: str,
    dtype: str,
    run: Callable[[], Mapping[str, Array]],
    exact: Mapping[str, Array],
) -> Trial:
    """The trial of a call; an exception becomes its reason."""
    start = time.perf_counter()
    try:
        found = run()
    except Exception as raised:  # every error on this machine is shown
        text = f"{type(raised).__name__}: {one_line(raised)}"
        return Trial(kernel, case, dtype, None, time.perf_counter() - start, text)
    seconds = time.perf_counter() - start
    worst = max(error(array, exact[name]) for name, array in found.items())
    return Trial(kernel, case, dtype, worst, seconds)
