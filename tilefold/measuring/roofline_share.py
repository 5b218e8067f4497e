"""The share of the roofline that a result reaches, and no share where the result beats its bound.

Rates are measured, and a busy machine measures them too low. So a result that is faster than its
bound makes the rates be measured again. A bound that is still beaten is not shown: it says nothing
of this machine, or the arrays stay in a cache, which is read faster than memory.
"""

from __future__ import annotations

from collections.abc import Callable

from tilefold.backends.cpu import peak
from tilefold.backends.cpu.choice import Chooser
from tilefold.backends.cpu.device import host
from tilefold.backends.cpu.spec import Multiplier
from tilefold.measuring.workload import Case
from tilefold.planning.roofline import Rates

Rated = tuple[str, int, Multiplier]
"""What has rates of its own: a type, a number of threads, and what multiplies."""

MEASUREMENTS = 2
"""How often rates are measured again for one result that beats its bound: each takes 0.3 s."""


class RooflineShares:
    """The shares of results on this machine, at rates that are measured in the same minutes."""

    def __init__(self) -> None:
        self._rates: dict[Rated, Rates] = {}

    def of(self, case: Case, seconds: float, pairs: int) -> tuple[float | None, str]:
        """The share that a time of `case` reaches, and the bound that binds it."""
        rated = (case.problem.dtype, case.threads, Chooser(case.problem, host()).products)
        return self.reached(rated, lambda rates: case.least_seconds(pairs, rates), seconds)

    def reached(
        self, rated: Rated, least_seconds: Callable[[Rates], tuple[float, str]], seconds: float
    ) -> tuple[float | None, str]:
        """The same for a bound and its name at the rates of a type, of threads, and of products."""
        for number in range(MEASUREMENTS + 1):
            if number or rated not in self._rates:
                self._rates[rated] = peak.rates(host(), *rated, again=True)
            least, binding = least_seconds(self._rates[rated])
            if not least > seconds:
                return least / seconds, binding
        return None, binding


def percent(share: float | None, binding: str = "") -> str:
    """A share as a percentage, with what binds; a dash where the bound is beaten."""
    if share is None:
        return "-"
    return f"{share:.0%} of {binding}" if binding else f"{share:.0%}"
