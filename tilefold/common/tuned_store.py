"""Values tuned on this machine, in one file beside the kernels: read once, replaced as a whole.

Tuned blocks change the speed of a call, and its results only by rounding. So a damaged file or
entry is ignored, and `tilefold doctor` says why. Replacing the file begins a new generation, so
plans that were made before are never found again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from tilefold.common import disk_cache, generation
from tilefold.common.files import write_atomically
from tilefold.common.first_use import imported

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


@imported
def _json() -> ModuleType:
    import json  # where there is something to read; a first call counts its milliseconds

    return json


UNUSABLE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
"""Errors that are expected when an entry of a foreign or damaged file is read."""


def is_kept(file: str, module: str) -> bool:
    """True where values were measured on this machine: a module has read the file, or there is one.

    Without a file the module is not imported: a first call counts its 3 milliseconds.
    """
    if module in sys.modules:
        return True
    # Path.exists raises where the folder's parents are closed to this user.
    return os.path.exists(disk_cache.default().directory / file)  # noqa: PTH110


@dataclass(frozen=True)
class TunedFile(Generic[Key, Value]):
    """The content of a file: its usable entries, and a description of the unusable ones."""

    entries: Mapping[Key, Value] = field(default_factory=dict)
    problem: str | None = None


class TunedStore(Generic[Key, Value]):
    """One file of tuned values. `noun` is their name in the file and in messages.

    A file is a JSON document with its `form` ("tilefold winners 1") and a list under `noun`. The
    number in `form` goes up when kernels change so much that older measurements mean nothing.
    `parse` makes a key and a value of an entry, and raises one of `UNUSABLE`; `entry` is its
    inverse.
    """

    def __init__(
        self,
        file: str,
        form: str,
        noun: str,
        parse: Callable[[Any], tuple[Key, Value]],
        entry: Callable[[Key, Value], dict[str, Any]],
    ) -> None:
        self._file, self._form, self._noun = file, form, noun
        self._parse, self._entry = parse, entry
        self._read: TunedFile[Key, Value] | None = None

    @property
    def path(self) -> Path:
        """The path of the file, in the folder of the kernel cache."""
        return disk_cache.default().directory / self._file

    def load(self) -> TunedFile[Key, Value]:
        """The content of the file, which is read at the first call in this process."""
        found = self._read
        if found is None:
            found = self._read = self._load()
        return found

    def check(self) -> None:
        """Raises OSError if the file cannot be written."""
        if problem := disk_cache.default().problem():
            raise OSError(f"{self._noun} cannot be kept: {problem}")

    def keep(self, new: Mapping[Key, Value]) -> None:
        """Add entries to the file; they replace older ones with the same keys. Raises OSError."""
        self.check()
        merged = {**self._load().entries, **new}  # another process may have written since
        entries = [self._entry(key, value) for key, value in merged.items()]
        document = {"format": self._form, self._noun: entries}
        write_atomically(self.path, (_json().dumps(document, indent=1) + "\n").encode())
        self.reread()

    def forget(self) -> int:
        """Remove the file and return the number of entries it had. Raises OSError."""
        count = len(self._load().entries)
        self.path.unlink(missing_ok=True)
        self.reread()
        return count

    def reread(self) -> None:
        """Read the file again at its next use, as a new process would."""
        self._read = None
        generation.advance()

    def _load(self) -> TunedFile[Key, Value]:
        path = self.path
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return TunedFile()
        except OSError as error:
            return TunedFile(problem=f"{path} cannot be read: {error.strerror or error}")
        try:
            document = _json().loads(content)
            listed = document[self._noun] if document["format"] == self._form else None
        except UNUSABLE:
            listed = None
        if not isinstance(listed, list):
            return TunedFile(problem=f"{path} is not a file of this version's {self._noun}")
        entries: dict[Key, Value] = {}
        wrong = 0
        for each in listed:
            try:
                key, value = self._parse(each)
            except UNUSABLE:
                wrong += 1
            else:
                entries[key] = value
        problem = f"{wrong} of the {self._noun} in {path} cannot be used" if wrong else None
        return TunedFile(entries, problem)
