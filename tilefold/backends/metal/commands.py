"""Lists of calls that are prepared one by one and launched together.

Preparing a call (checking, planning, at first compiling) takes longer than encoding its launches.
A list prepares all of its calls first. Then the GPU gets kernel after kernel and does not wait for
Python between them; torch puts them into one encoder. The interface of Metal FlashAttention
(Turner, 2023) was built around such lists, with 8 or more commands in each.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np

from tilefold.backends import calls
from tilefold.backends.extra import beside, sinks_as_given
from tilefold.backends.metal import runtime
from tilefold.backends.metal.dispatch import Machine
from tilefold.backends.protocols import BACKWARD, FORWARD, Array, Arrays, Pass
from tilefold.masks.position_rules import Rule
from tilefold.problems.request import Request


class Commands:
    """A list of recorded calls. `launch` runs them in order, and so does the end of a `with` block.

    The methods return the arrays that will hold the results; their elements are not defined before
    `launch`. Gradients do not flow through the calls. If `strict` is False, calls that the machine
    cannot do are left out, their results stay as they are, and `refused` lists the reasons.
    """

    def __init__(self, machine: Machine | None = None, *, strict: bool = True) -> None:
        self._machine = machine
        self._strict = strict
        self._bound: list[calls.Bound] = []
        self.refused: list[str] = []
        if strict:
            self._find()

    def __len__(self) -> int:
        """The number of recorded calls."""
        return len(self._bound)

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        mask: Rule | None = None,
        scale: float | None = None,
        score: Any = None,
        sinks: Array | None = None,
        dropout: float = 0.0,
        seed: int | None = None,
        layout: str = "bhnd",
        out: Array | None = None,
        lse: Array | None = None,
    ) -> tuple[Array, Array]:
        """Record a call of `tilefold.attention`; return o and lse: `out` and `lse` if given."""
        options = score, sinks, dropout, seed
        request, extra = beside(q, Request(mask, scale, layout), *options)
        wanted, given = FORWARD.plus(extra.names), (q, k, v, *extra.arrays)
        o, lse = self._record(wanted, given, request, (out, lse))
        return o, lse

    def attention_backward(
        self,
        do: Array,
        q: Array,
        k: Array,
        v: Array,
        o: Array,
        lse: Array,
        *,
        mask: Rule | None = None,
        scale: float | None = None,
        score: Any = None,
        sinks: Array | None = None,
        dropout: float = 0.0,
        seed: int | None = None,
        layout: str = "bhnd",
        dq: Array | None = None,
        dk: Array | None = None,
        dv: Array | None = None,
    ) -> tuple[Array, ...]:
        """Record a call of `tilefold.attention_backward`; return dq, dk and dv, given or new.

        After these come new arrays: the gradients of the arrays of `score` in their order, and of
        `sinks`.
        """
        options = score, sinks, dropout, seed
        request, extra = beside(q, Request(mask, scale, layout), *options)
        wanted = BACKWARD.plus(extra.names, extra.gradients)
        given = (do, q, k, v, o, lse, *extra.arrays)
        into = (dq, dk, dv, *[None] * len(extra.gradients))
        return sinks_as_given(sinks, wanted, self._record(wanted, given, request, into))

    def launch(self) -> None:
        """Run all recorded calls in order, without waiting between them, and forget them."""
        bound, self._bound = self._bound, []
        for one in bound:
            one.run()

    def __enter__(self) -> Commands:
        """Record the calls of a block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Launch what the block recorded, unless it raised."""
        if error is None:
            self.launch()

    def _record(
        self,
        wanted: Pass,
        given: tuple[Array, ...],
        request: Request,
        results: Sequence[Array | None],
    ) -> Sequence[Any]:
        try:
            machine = self._find()
            arrays = _arrays(machine, wanted, given, results)
            bound = calls.bind(machine, arrays, wanted, given, request, results)
        except NotImplementedError as error:
            if self._strict:
                raise
            self.refused.append(str(error))
            return results
        self._bound.append(bound)
        return bound.results

    def _find(self) -> Machine:
        """The given machine, else the GPU of this Mac. Raises NotImplementedError without one."""
        if self._machine is None:
            self._machine = runtime.gpu()
        return self._machine


def _arrays(
    machine: Machine, wanted: Pass, given: tuple[Array, ...], results: Sequence[Array | None]
) -> Arrays:
    """The module of the arrays' framework. Raises TypeError if the frameworks differ."""
    tensor = getattr(sys.modules.get("torch"), "Tensor", ())
    # What is no array at all among the results is refused by its name later.
    every = (*given, *[array for array in results if isinstance(array, (np.ndarray, tensor))])
    if all(isinstance(array, tensor) for array in every):
        from tilefold.backends.arrays import torch

        return torch
    from tilefold.backends.arrays import numpy

    if not all(isinstance(array, np.ndarray) for array in every):
        machine.check(**dict(zip(wanted.given, given, strict=True)))
        raise TypeError("all arrays of a call must be of NumPy, or all tensors")
    return numpy


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Rule | None = None,
    scale: float | None = None,
    score: Any = None,
    sinks: Array | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    layout: str = "bhnd",
    out: Array | None = None,
    lse: Array | None = None,
    machine: Machine | None = None,
    strict: bool = True,
) -> tuple[Any, Any]:
    """Exact attention by Metal kernels on a machine, without gradients.

    >>> import numpy as np
    >>> import tilefold
    >>> machine = tilefold.metal.emulated()  # on a Mac: nothing, and tensors on "mps"
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 5, 8), np.float32)
    >>> o, lse = tilefold.metal.attention(q, k, v, mask=tilefold.causal(), machine=machine)
    >>> bool(np.allclose(o, tilefold.attention(q, k, v, mask=tilefold.causal()), atol=1e-6))
    True

    Arguments:
        q, k, v, mask, scale, score, sinks, dropout, seed, layout: as for `tilefold.attention`; the
            arrays are float32, float16 or bfloat16, and sinks are float32. Dropout needs a seed
        out: an array for o, (batch, heads_q, len_q, dim_v) in the layout, of the type of q; None
            makes a new array
        lse: an array for lse, (batch, heads_q, len_q), float32, contiguous; None makes a new array
        machine: the machine that runs the kernels; None means the GPU of this Mac
        strict: if False, a call that the machine cannot do raises nothing and returns `out` and
            `lse` as they are

    Returns:
        o, lse: the arrays with the results

    Raises:
        The errors of `tilefold.attention`; with `strict`, NotImplementedError without Metal
    """
    with Commands(machine, strict=strict) as commands:
        return commands.attention(
            q,
            k,
            v,
            mask=mask,
            scale=scale,
            score=score,
            sinks=sinks,
            dropout=dropout,
            seed=seed,
            layout=layout,
            out=out,
            lse=lse,
        )


def attention_backward(
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    o: Array,
    lse: Array,
    *,
    mask: Rule | None = None,
    scale: float | None = None,
    score: Any = None,
    sinks: Array | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    layout: str = "bhnd",
    machine: Machine | None = None,
) -> tuple[Array, ...]:
    """The gradients of sum(do * o) with respect to q, k and v, by Metal kernels on a machine.

    >>> import numpy as np
    >>> import tilefold
    >>> machine = tilefold.metal.emulated()  # on a Mac: nothing, and tensors on "mps"
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 5, 8), np.float32)
    >>> o, lse = tilefold.metal.attention(q, k, v, machine=machine)
    >>> do = np.ones_like(o)
    >>> dq, dk, dv = tilefold.metal.attention_backward(do, q, k, v, o, lse, machine=machine)
    >>> bool(np.allclose(dv.sum(axis=2), do.sum(axis=2)))  # the weights of each query sum to 1
    True

    Arguments:
        do, q, k, v, o, lse, mask, scale, score, sinks, dropout, seed, layout: as for
            `tilefold.attention_backward`
        machine: the machine that runs the kernels; None means the GPU of this Mac

    Returns:
        dq, dk, dv, each of the shape and type of its input; then the gradients of the arrays that
        the score reads, in their order, and of sinks

    Raises:
        The errors of `tilefold.attention_backward`, and NotImplementedError without Metal
    """
    with Commands(machine) as commands:
        return commands.attention_backward(
            do,
            q,
            k,
            v,
            o,
            lse,
            mask=mask,
            scale=scale,
            score=score,
            sinks=sinks,
            dropout=dropout,
            seed=seed,
            layout=layout,
        )
