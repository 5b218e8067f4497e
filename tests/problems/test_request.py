"""The options of a call as one value: checked once, equal by what they ask, with a kept hash."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

import tilefold
from tilefold.problems.request import Request


def test_equal_options_are_one_request() -> None:
    first, again = (Request(tilefold.causal() & tilefold.local(4), 1.0) for _ in range(2))
    assert first is again
    whole = Request(tilefold.causal() & tilefold.local(4), np.int64(1))  # type: ignore[arg-type]
    assert whole == first and hash(whole) == hash(first)
    assert Request() == Request(tilefold.full(), None, "bhnd", "highest")


@pytest.mark.parametrize(
    "other",
    [
        Request(tilefold.causal("start"), 0.5, "bnhd", "high"),
        Request(tilefold.causal(), 0.25, "bnhd", "high"),
        Request(tilefold.causal(), 0.5, "bhnd", "high"),
        Request(tilefold.causal(), 0.5, "bnhd", "medium"),
    ],
    ids=["mask", "scale", "layout", "precision"],
)
def test_other_options_are_other_requests(other: Request) -> None:
    assert Request(tilefold.causal(), 0.5, "bnhd", "high") != other


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_a_copy_is_equal_and_changes_no_other(copied: Any) -> None:
    request = Request(tilefold.lengths([3, 2]), 0.5, "bhdn", "medium")
    made = copied(request)
    assert made == request and hash(made) == hash(request)
    assert Request() == Request(tilefold.full()), "the request without options is as it was"


def test_a_scale_that_may_change_is_read_each_time() -> None:
    scale = np.zeros(())
    for value in (0.5, 0.25):
        scale[...] = value
        assert Request(None, scale).scale == value  # type: ignore[arg-type]  # it becomes a float


@pytest.mark.parametrize("sinks", [np.zeros(4), "ab", -1, 0.5], ids=str)
def test_the_number_of_sinks_is_no_array(sinks: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^sinks must be an integer >= 0, got"):
        tilefold.Problem.of((1, 4, 8, 8), sinks=sinks)


def test_requests_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Request().scale = 1.0  # type: ignore[misc]  # the point
