"""An interrupt (Ctrl-C) at one line of a file, so that a test can try all of them in turn."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def interrupted_at(line: int, file: str) -> Iterator[list[int]]:
    """A context that an interrupt leaves before the n-th line of a file that this thread runs.

    Yields a list, which is empty if so few lines ran that no interrupt came. None comes at a `with`
    statement: when its body has ended, Python releases a lock before it looks for signals.
    """
    left, came = line, list[int]()

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        nonlocal left
        if frame.f_code.co_filename != file:
            return None
        source = linecache.getline(file, frame.f_lineno)
        left -= event == "line" and not source.lstrip().startswith("with ")
        if left == 0 and not came:
            came.append(frame.f_lineno)
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield came
    except KeyboardInterrupt:
        assert came
    finally:
        sys.settrace(before)
