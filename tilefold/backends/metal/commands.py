"""Lists of calls that are prepared one by one and launched in one go.

Preparing a call (checking, planning, at first compiling) takes longer than encoding its launches.
A list prepares all of its calls first, so that the GPU then gets kernel after kernel and does not
wait for Python between them; torch puts them into one encoder. Metal FlashAttention's interface
(Turner, 2023) was built around such lists, and asked for 8 commands or more in each.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from tilefold.backends.metal import calls, runtime
from tilefold.backends.metal.dispatch import Array, Machine
from tilefold.mask import Rule
from tilefold.problem import as_rule, as_scale


class Commands:
    """Recorded calls. `launch` runs them in order, and so does the end of a `with` block.

    Methods return the arrays that will hold the results; what they hold before `launch` is not
    said. Gradients do not flow through them. `refused` lists why calls were left out where
    `strict` is False: their results stay as they are.
    """

    def __init__(self, machine: Machine | None = None, *, strict: bool = True) -> None:
        self._machine = machine
        self._strict = strict
        self._bound: list[calls.Bound] = []
        self.refused: list[str] = []
        if strict:
            self._find()

    def __len__(self) -> int:
        """How many calls wait to be launched."""
        return len(self._bound)

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        mask: Rule | None = None,
        scale: float | None = None,
        layout: str = "bhnd",
        out: Array | None = None,
        lse: Array | None = None,
    ) -> tuple[Array, Array]:
        """Record `tilefold.attention`; returns o and lse, which are `out` and `lse` where given."""
        arguments = (q, k, v, as_rule(mask), as_scale(scale), layout)
        o, lse = self._record(calls.forward, arguments, (out, lse))
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
        layout: str = "bhnd",
        dq: Array | None = None,
        dk: Array | None = None,
        dv: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        """Record `tilefold.attention_backward`; returns dq, dk and dv, the given ones or new."""
        arguments = (do, q, k, v, o, lse, as_rule(mask), as_scale(scale), layout)
        dq, dk, dv = self._record(calls.backward, arguments, (dq, dk, dv))
        return dq, dk, dv

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
        self, bind: Any, arguments: tuple[Any, ...], results: Sequence[Array | None]
    ) -> Sequence[Any]:
        try:
            bound: calls.Bound = bind(self._find(), *arguments, results)
        except NotImplementedError as error:
            if self._strict:
                raise
            self.refused.append(str(error))
            return results
        self._bound.append(bound)
        return tuple(bound.results.values())

    def _find(self) -> Machine:
        """The machine: without one given, the GPU. Raises NotImplementedError without one."""
        if self._machine is None:
            self._machine = runtime.gpu()
        return self._machine
