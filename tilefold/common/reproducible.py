"""How far results are the same bits: the scope that a program chose.

Planners read it. A change begins a new generation, so no call that was prepared before is found.
"""

from __future__ import annotations

from tilefold.common import generation, settings

_chosen: str | None = None


def get_reproducible() -> str:
    """How far results are the same bits: "anywhere" or "machine".

    It is the scope given to `set_reproducible`, else TILEFOLD_REPRODUCIBLE, else "anywhere".

    >>> import tilefold
    >>> tilefold.get_reproducible()
    'anywhere'

    Raises:
        ValueError: TILEFOLD_REPRODUCIBLE is neither "anywhere" nor "machine"
    """
    return _chosen or settings.REPRODUCIBLE.get()


def set_reproducible(scope: str) -> None:
    """Set how far the results of later calls in this process are the same bits.

    >>> import tilefold
    >>> before = tilefold.get_reproducible()
    >>> tilefold.set_reproducible("machine")
    >>> tilefold.get_reproducible()
    'machine'
    >>> tilefold.set_reproducible(before)

    Arguments:
        scope: "anywhere": the results of a batch entry and a key head, with its query heads, do
            not depend on what else is in the call, nor on the number of cores. "machine": they
            may, which is faster for a few heads on many cores. Both give the same bits run after
            run, on any number of threads.

    Raises:
        ValueError: scope is neither "anywhere" nor "machine"
    """
    global _chosen
    if scope not in settings.SCOPES:
        allowed = " or ".join(map(repr, settings.SCOPES))
        raise ValueError(f"scope must be {allowed}, not {scope!r}")
    if scope != _chosen:
        _chosen = scope
        generation.advance()
