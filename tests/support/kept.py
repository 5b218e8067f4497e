"""The kept calls, for tests of prepared calls and of their plans."""

from __future__ import annotations

from typing import Any

from tilefold.backends.calls import calls


def kept_plans() -> list[Any]:
    """The plans of all kept calls, from the least to the most recently used."""
    found: list[Any] = []
    for key in calls.keys():  # noqa: SIM118  # a method of ours, not of a mapping
        call = calls.get(key)
        assert call is not None and call.prepared is not None
        found.append(call.prepared)
    return [prepared.plan for prepared in found]
