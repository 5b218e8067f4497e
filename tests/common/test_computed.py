"""Properties that are computed once, without a lock that a forked child could inherit."""

from __future__ import annotations

import doctest
import threading
from concurrent.futures import ThreadPoolExecutor

from tilefold.common import computed


def test_while_one_is_computed_another_thread_computes_that_of_another_instance() -> None:
    begun, go = threading.Event(), threading.Event()

    class Slow:
        def __init__(self, slow: bool) -> None:
            self.slow = slow

        @computed.computed
        def value(self) -> int:
            if self.slow:
                begun.set()
                assert go.wait(30)
            return 1

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: Slow(True).value)
        assert begun.wait(30)
        second = pool.submit(lambda: Slow(False).value)
        try:
            assert second.result(20) == 1
        finally:
            go.set()
        assert first.result(30) == 1


def test_examples() -> None:
    outcome = doctest.testmod(computed, raise_on_error=False)
    assert outcome.attempted and not outcome.failed
