"""The calls that are kept, for tests that ask what was prepared and how it was planned."""

from __future__ import annotations

from typing import Any

from tilefold.backends.calls import calls


def kept_plans() -> list[Any]:
    """The plans of all calls that are kept, the one that was used last at the end."""
    found: list[Any] = []
    for key in calls.keys():  # noqa: SIM118  # a method of ours, not of a mapping
        call = calls.get(key)
        assert call is not None and call.prepared is not None
        found.append(call.prepared)
    return [prepared.plan for prepared in found]
