"""One problem with its own data: laid out in memory, run through the engine, compared.

Tests of memory layouts, machines and threads, which do not test precision, share this data, these
layouts and this comparison.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes  # noqa: F401  # NumPy knows the name "bfloat16" from it
import numpy as np
from compare import assert_near
from numpy.typing import NDArray
from operands import FORMS

from tilefold import Rule, causal, full, local
from tilefold.backends.cpu import dispatch
from tilefold.backends.cpu.device import Device, host
from tilefold.backends.cpu.heuristics import DEFAULT, Heuristics
from tilefold.backends.cpu.plan import CpuPlan, plan
from tilefold.problems import dropout, reference
from tilefold.problems.attention import STATISTICS, Problem, default_scale
from tilefold.problems.buffer import Buffer
from tilefold.scores.score import Score

Array = NDArray[Any]
Shape = tuple[int, ...]

SEED = 0x5EED_0123_4567_89AB
"""The seed of trials with dropout: both of its words matter."""

PASSES = (("forward", "auto"), *(("backward", form) for form in FORMS))
"""All operations in all forms."""

INPUTS = {"forward": ("q", "k", "v"), "backward": ("do", "q", "k", "v", "o", "lse")}
OUTPUTS = {"forward": ("o", "lse"), "backward": ("dq", "dk", "dv")}
MORE = {"forward": ("max",), "backward": ("dsinks",)}
"""Further outputs of trials with sinks."""

TOLERANCE = {"float32": 5e-4, "float64": 1e-10, "float16": 4e-3, "bfloat16": 3e-2}
"""The largest error by type, relative to the largest element of an array, but at least to 1.

It tells wrong from right; other tests compare the precision with float32.
"""


@dataclass(frozen=True)
class Layout:
    """A memory layout: axes from the outermost to the innermost, innermost stride, gaps, direction.

    `gap` elements lie between the entries of every axis. With `shared`, all heads are one.
    """

    order: Shape = (0, 1, 2, 3)
    step: int = 1
    gap: int = 0
    backwards: bool = False
    shared: bool = False

    def strides(self, shape: Shape) -> Shape:
        """The strides of an array of a canonical shape, in elements."""
        strides = [0] * len(shape)
        size = self.step
        for axis in reversed([axis for axis in self.order if axis < len(shape)]):
            if not (self.shared and axis == 1):
                strides[axis] = size
                size = size * shape[axis] + self.gap
        if self.backwards:
            strides = [-step if axis in (1, 2) else step for axis, step in enumerate(strides)]
        return tuple(strides)


LAYOUTS = {
    "bhnd": Layout(),
    "bnhd": Layout((0, 2, 1, 3)),
    "bhdn": Layout((0, 1, 3, 2)),
    "padded bhnd": Layout(gap=3),
    "padded bhdn": Layout((0, 1, 3, 2), gap=5),
    "no unit stride": Layout(step=2, gap=1),
    "backwards": Layout(gap=1, backwards=True),
    "shared heads": Layout(shared=True),
}


@dataclass(frozen=True)
class Trial:
    """A problem, the layout of its arrays, and whether elements that are never read hold NaN.

    `score` is the problem's with its arrays.
    """

    problem: Problem
    layout: str = "bhnd"
    poisoned: bool = False
    score: Score | None = None

    @property
    def arrays(self) -> dict[str, Array]:
        """The arrays that the score reads."""
        held = self.score.form.arrays if self.score else ()
        return {f"input{number}": array for number, array in enumerate(held)}

    def __str__(self) -> str:
        p = self.problem
        sizes = f"{p.batch}x{p.heads_q}/{p.heads_kv} {p.len_q}x{p.len_k} dim {p.dim}/{p.dim_v}"
        also = " poisoned" * self.poisoned + " dropout" * bool(p.dropout)
        also += f" {p.score}" * bool(p.score) + f" sinks {p.sinks}" * bool(p.sinks)
        return f"{sizes} {p.dtype} {p.mask} {self.layout}{also}"


def problem(
    len_q: int,
    len_k: int,
    dim: int,
    mask: Rule | None = None,
    dtype: str = "float32",
    *,
    dim_v: int | None = None,
    batch: int = 1,
    heads: tuple[int, int] = (2, 1),
    dropout: float = 0.0,
    score: Score | None = None,
    sinks: int = 0,
) -> Problem:
    """A problem with defaults for the values that most trials do not depend on."""
    sizes = (batch, *heads, len_q, len_k, dim, dim_v or dim)
    rule = full() if mask is None else mask
    form = score and score.form.score
    more = {"score": form, "sinks": sinks, "dropout": dropout}
    return Problem(*sizes, dtype, default_scale(dim), rule, **more)


DROPPED = [
    ((37, 71), (16, 5), causal(), "bhnd"),
    ((3, 301), (8, 8), local(207), "padded bhdn"),
    ((150, 133), (8, 8), local(33, stride=3), "backwards"),
]


def dropped(dtype: str) -> list[Trial]:
    """Trials with dropout: grouped queries, runs of keys that begin anywhere, decoding, blocks."""
    found = []
    for (len_q, len_k), (dim, dim_v), mask, layout in DROPPED:
        sizes = problem(len_q, len_k, dim, mask, dtype, dim_v=dim_v, batch=2, heads=(4, 2))
        found.append(Trial(replace(sizes, dropout=0.3), layout))
    return found


def numbers(trial: Trial) -> dict[str, Array]:
    """The arguments in the problem's type, and the results of the definition in float64."""
    p = trial.problem
    random = np.random.default_rng(p.len_q * 1000 + p.len_k)
    given = {}
    for name in ("q", "k", "v", "do"):
        given[name] = random.normal(size=shape_of(p, name)).astype(p.dtype)
        if LAYOUTS[trial.layout].shared:
            given[name][...] = given[name][:, :1]
    if trial.poisoned:
        _poison(p, given)
    options: dict[str, Any] = {"mask": p.mask, "scale": p.scale, "score": trial.score}
    given |= trial.arrays
    if p.sinks:
        given["sinks"] = random.normal(size=shape_of(p, "sinks")).astype(dtype_of(p, "sinks"))
        options["sinks"] = given["sinks"]
    if p.dropout:
        given["seed"] = np.array([SEED])
        shape = (p.batch, p.heads_q, p.len_q, p.len_k)
        options["keep"] = dropout.factors(SEED, p.dropout, *shape)
    o, lse = reference.attention(given["q"], given["k"], given["v"], **options)
    given["o"], given["lse"] = o.astype(p.dtype), lse.astype(dtype_of(p, "lse"))
    arguments = [given[name] for name in ("do", "q", "k", "v", "o", "lse")]
    gradients = reference.attention_backward(*arguments, **options)
    names = ("o", "lse", "dq", "dk", "dv", *[f"d{name}" for name in trial.arrays])
    names += ("dsinks",) * bool(p.sinks)
    expected = dict(zip(names, (o, lse, *gradients), strict=True))
    expected["max"] = reference.largest(given["q"], given["k"], p.mask, p.scale, trial.score)
    return given | {f"expected {name}": array for name, array in expected.items()}


def dtype_of(p: Problem, name: str) -> str:
    """The type of an argument or a result."""
    if name in ("lse", "max", "sinks", "dsinks"):
        return STATISTICS[p.dtype]
    return {"seed": "int64"}.get(name, p.dtype)


def shape_of(p: Problem, name: str) -> Shape:
    """The canonical shape of an argument or a result."""
    q_side, k_side = (p.batch, p.heads_q, p.len_q), (p.batch, p.heads_kv, p.len_k)
    alone = {"lse": q_side, "max": q_side, "seed": (1,)}
    alone |= dict.fromkeys(("sinks", "dsinks"), (p.heads_q, p.sinks))
    if name in alone:
        return alone[name]
    side = k_side if name in ("k", "v", "dk", "dv") else q_side
    return (*side, p.dim if name in ("q", "k", "dq", "dk") else p.dim_v)


def _poison(p: Problem, given: dict[str, Array]) -> None:
    """Write NaN to keys that no query sees and to queries that see no key."""
    seen = p.mask.to_dense(p.len_q, p.len_k, batch=p.batch, heads=p.heads_q)
    seen = np.broadcast_to(seen, (p.batch, p.heads_q, p.len_q, p.len_k))
    blind = ~seen.any(axis=3)
    groups = seen.reshape(p.batch, p.heads_kv, -1, p.len_q, p.len_k)
    unseen = ~groups.any(axis=(2, 3))
    for name, rows in (("q", blind), ("do", blind), ("k", unseen), ("v", unseen)):
        given[name][rows] = np.nan


class Memory:
    """The memory of arrays; this class uses NumPy's own memory."""

    def allocate(self, name: str, elements: int, dtype: str) -> Array:
        """An array of `elements` elements with all bits set: floats are NaN."""
        item = np.dtype(dtype).itemsize
        return np.full(elements * item, 0xFF, np.uint8).view(dtype)

    def freeze(self, names: Iterable[str]) -> None:
        """Make arrays read-only from now on."""

    def address(self, name: str, array: Array) -> int:
        """The address of an array that a kernel is given."""
        return int(array.__array_interface__["data"][0])

    def move(self, plan: CpuPlan) -> CpuPlan:
        """The plan with its own arrays in this memory."""
        return plan


def run(
    trial: Trial,
    given: dict[str, Array],
    operation: str,
    form: str = "auto",
    memory: Memory | None = None,
    device: Device | None = None,
    heuristics: Heuristics = DEFAULT,
) -> dict[str, Array]:
    """Run one operation on arrays in the trial's layout; compare and return its results.

    Raises AssertionError if a result is wrong, an argument changed or a gap was written to.
    """
    memory = memory or Memory()
    p = trial.problem
    flats: dict[str, Array] = {}
    views: dict[str, Array] = {}
    further = ("seed",) * bool(p.dropout) + ("sinks",) * bool(p.sinks)
    inputs = (*INPUTS[operation], *trial.arrays, *further)
    outputs = OUTPUTS[operation] + MORE[operation] * bool(p.sinks)
    for name in (*inputs, *outputs):
        layout = _layout_of(name, trial, operation, form)
        array = trial.arrays.get(name)
        shape = shape_of(p, name) if array is None else array.shape
        dtype = dtype_of(p, name) if array is None else array.dtype.name
        strides = layout.strides(shape)
        flats[name], views[name] = _place(memory, name, shape, strides, dtype)
        if name in inputs:
            views[name][...] = given[name]
    memory.freeze(inputs)
    before = {name: flats[name].tobytes() for name in inputs}
    buffers = {name: _buffer(memory, name, view) for name, view in views.items()}
    in_place = operation == "forward" or buffers["dq"].strides[3] == 1
    extra = MORE[operation] if p.sinks else ()
    options = {"in_place": in_place, "heuristics": heuristics, "extra": extra}
    made = planned(p, device or host(), operation, form, **options)
    dispatch.run(memory.move(made), buffers)
    for name, old in before.items():
        assert flats[name].tobytes() == old, f"{name} was modified"
    for name in outputs:
        compare(name, views[name], given[f"expected {name}"])
        _check_gaps(name, flats[name], views[name])
    return {name: views[name] for name in outputs}


def planned(p: Problem, device: Device, operation: str, form: str, **options: Any) -> CpuPlan:
    """The plan of a pass; `options` go to `plan`."""
    return plan(p, device, operation, **{**options, **FORMS.get(form, {})})


def _layout_of(name: str, trial: Trial, operation: str, form: str) -> Layout:
    """The trial's layout, but results share no heads, and fused keeps the rows of dq contiguous."""
    layout = LAYOUTS[trial.layout]
    if name in ("seed", "sinks", "dsinks", "max"):
        return LAYOUTS["bhnd"]
    if layout.shared and name not in ("q", "k", "v", "do"):
        return LAYOUTS["bhnd"]
    if name == "dq" and form == "fused" and (layout.step != 1 or layout.order[-1] != 3):
        return LAYOUTS["padded bhnd"]
    return layout


def _place(
    memory: Memory, name: str, shape: Shape, strides: Shape, dtype: str
) -> tuple[Array, Array]:
    """Memory of exactly the elements that the strides span, and the array as a view of it."""
    reach = [(size - 1) * stride for size, stride in zip(shape, strides, strict=True)]
    lowest = sum(min(0, far) for far in reach)
    highest = sum(max(0, far) for far in reach)
    flat = memory.allocate(name, highest - lowest + 1, dtype)
    in_bytes = tuple(stride * flat.itemsize for stride in strides)
    return flat, np.lib.stride_tricks.as_strided(flat[-lowest:], shape, in_bytes)


def _buffer(memory: Memory, name: str, view: Array) -> Buffer:
    strides = tuple(stride // view.itemsize for stride in view.strides)
    return Buffer(memory.address(name, view), view.shape, strides, str(view.dtype), view)


def compare(name: str, found: Array, expected: Array) -> None:
    """Raises AssertionError if a result is wrong."""
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=0)
    assert_near(name, found, expected, TOLERANCE[str(found.dtype)] * max(1, largest))


def _check_gaps(name: str, flat: Array, view: Array) -> None:
    """Assert that the gaps between the elements of a result keep their bits."""
    touched = np.zeros(flat.size, np.bool_)
    start = (view.__array_interface__["data"][0] - flat.ctypes.data) // flat.itemsize
    np.lib.stride_tricks.as_strided(
        touched[start:], view.shape, tuple(stride // flat.itemsize for stride in view.strides)
    )[...] = True
    gaps = flat.view(np.uint8).reshape(-1, flat.itemsize)[~touched]
    assert (gaps == 0xFF).all(), f"{name}: a gap between its rows was written to"
