"""What workers take from the counters of an argument block: a number, and items of a list."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from tilefold.backends.cpu.kernels.ir import Body, Value


class Words(Protocol):
    """An argument block as a body reads it."""

    def address(self, name: str) -> Value:
        """Where a counter lies."""

    def __getitem__(self, name: str) -> Value:
        """A word that is no counter."""


def number_of_worker(body: Body, words: Words) -> Value:
    """The number of this worker, from 0."""
    return _take(body, words, "next_worker")


def scratch_of_worker(body: Body, words: Words, worker: Value | None = None) -> Value:
    """The address of this worker's own part of the workspace."""
    worker = worker or number_of_worker(body, words)
    before = body.mul(worker, words["workspace_bytes"])
    return body.offset(words["workspace"], "i8", before, "scratch")


@contextmanager
def single(body: Body, words: Words) -> Iterator[Value]:
    """Until the list is empty: take the next item."""
    with body.forever("item") as end:
        item = _take(body, words, "next_item")
        body.leave_unless(body.compare("slt", item, words["items"]), end, "work")
        yield item


@contextmanager
def several(body: Body, words: Words) -> Iterator[Value]:
    """The same, with `items_per_claim` items at a time."""
    with body.forever("claim") as end:
        first = _take(body, words, "next_item", words["items_per_claim"])
        body.leave_unless(body.compare("slt", first, words["items"]), end, "work")
        last = body.minimum(body.add(first, words["items_per_claim"]), words["items"], "last")
        with body.loop("ticket", first, last) as item:
            yield item


def _take(body: Body, words: Words, name: str, many: Value | None = None) -> Value:
    """The value of a counter, to which `many` or 1 are added."""
    address, step = words.address(name), many or Value("1", "i64")
    return body.result("ticket", "i64", f"atomicrmw add {address.typed}, {step.typed} monotonic")
