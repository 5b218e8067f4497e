"""Compiled kernels on disk, so that a program's second start compiles nothing.

An entry's name is the SHA-256 of the kernel source and of the toolchain that compiled it, so no
field of a key can be forgotten. The source is kept beside the binary for people to read.

Emitting a source takes longer than reading a binary. So the cache also keeps *notes*: small files
that answer a question, such as "which source does this kernel spec lead to?". The name of a note is
the hash of its question. Notes are checked before use, exactly as binaries are.

Machine code is only loaded from where nobody else could have put it: the directory and the file
must be real (no symbolic links), belong to this user, and be writable by nobody else. A header
holds the length and a checksum. An entry that fails one of these checks counts as absent, and the
kernel is compiled again. A directory that cannot be used costs time, never correctness. Entries are
written under a temporary name and renamed, so any number of processes may share a directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from tilefold.common import settings
from tilefold.common.first_use import imported

_NOTE = "a question"
"""This word takes the toolchain's place in the names of notes, so no kernel has the same name."""
_MAGIC = b"tilefold kernel 1\n"
_HEADER_BYTES = len(_MAGIC) + 32 + 8
_OURS = re.compile(r"[0-9a-f]{64}\.[a-z]{1,8}(?P<unfinished>\.[0-9a-f]{16})?")
_room: dict[tuple[Path, int], int] = {}
"""Bytes that this process may still write, by directory and limit, before it counts files again."""
_ABANDONED_SECONDS = 3600
"""A file that a writer has not finished for so long has no writer any more: it was killed."""


@dataclass(frozen=True)
class Cache:
    """A directory of compiled kernels below a size limit; the least recently used are removed."""

    directory: Path
    limit_bytes: int

    def get(self, source: str, toolchain: str) -> bytes | None:
        """Return the binary that a toolchain made of a source; None if no trusted one is there."""
        return self.binary(key(source, toolchain))

    def binary(self, key: str) -> bytes | None:
        """Return the binary under a key; None if no trusted one is there."""
        return self._load(key, ".bin")

    def note(self, question: str) -> bytes | None:
        """Return the noted answer to a question; None if no trusted one is there."""
        return self._load(key(question, _NOTE), ".note")

    def _load(self, key: str, suffix: str) -> bytes | None:
        try:
            with _opened(self.directory) as directory:
                content = _read(f"{key}{suffix}", directory)
        except OSError:
            return None
        rest = content[_HEADER_BYTES:]
        return rest if content == _header(key, rest) + rest else None

    def put(self, source: str, toolchain: str, binary: bytes, suffix: str = ".ll") -> None:
        """Keep a binary and its source. A directory that cannot be written to stays as it is."""
        name = key(source, toolchain)
        content = _header(name, binary) + binary
        self._keep({f"{name}{suffix}": source.encode(), f"{name}.bin": content})

    def put_note(self, question: str, answer: bytes) -> None:
        """Keep the answer to a question, as `put` keeps binaries."""
        name = key(question, _NOTE)
        self._keep({f"{name}.note": _header(name, answer) + answer})

    def _keep(self, files: Mapping[str, bytes]) -> None:
        if max(map(len, files.values())) > self.limit_bytes:
            return
        # Nothing depends on the entry being there, so no failure to write one is an error.
        with contextlib.suppress(OSError):
            _make(self.directory)
            with _opened(self.directory) as directory:
                for name, content in files.items():
                    _write(name, content, directory)
                self._make_room(directory, next(iter(files)), sum(map(len, files.values())))

    def size(self) -> int:
        """Return the total size of all kernels, their sources and the notes, in bytes."""
        return sum(entry.bytes for entry in self._entries())

    def count(self) -> int:
        """Return the number of kernels that are kept."""
        return sum(entry.kernel for entry in self._entries())

    def clear(self) -> int:
        """Remove every kernel and note. Other files stay. Returns the number of kernels."""
        entries = self._entries()
        with contextlib.suppress(OSError), _opened(self.directory) as directory:
            for entry in entries:
                entry.remove(directory)
        return sum(entry.kernel for entry in entries)

    def problem(self) -> str | None:
        """Return why this directory cannot be used, in one line, or None if it can."""
        if self.limit_bytes == 0:
            return f"{settings.CACHE_MIB.name} is 0"
        try:
            _make(self.directory)
            with _opened(self.directory) as directory:
                name = f"{os.urandom(32).hex()}.bin"
                _write(name, b"", directory)
                os.unlink(name, dir_fd=directory)
        except OSError as error:
            return f"{self.directory}: {error.strerror or error}"
        return None

    def _entries(self) -> list[_Entry]:
        try:
            with _opened(self.directory) as directory:
                return _entries(directory)
        except OSError:
            return []

    def _make_room(self, directory: int, name: str, written: int) -> None:
        """Evict when this process may have filled the directory since it last counted its files.

        Counting takes 6 to 15 us a file, 50 ms in a full directory. So a process counts again only
        after it has written the space that was free at its last count, or 1/16 of the limit if that
        is less. Whether it counts for the first time is drawn by the file's name, which is a hash:
        once for every 1/16 of the limit, on average over all processes. Each further process that
        writes in the meantime can pass the limit by 1/16.
        """
        place, step = (self.directory, self.limit_bytes), self.limit_bytes // 16
        drawn = int(name[:16], 16) * step < written << 64
        left = _room.get(place, written - 1 if drawn else None)
        if left is None:
            return
        left -= written
        if left < 0:
            left = min(self.limit_bytes - self._evict(directory), step)
        _room[place] = left

    def _evict(self, directory: int) -> int:
        """Remove what killed writers left, and the least recently used kernels until the rest fits.

        Returns the size of the rest in bytes.
        """
        _sweep(directory)
        entries = _entries(directory)
        total = sum(entry.bytes for entry in entries)
        for entry in sorted(entries, key=lambda entry: entry.used):
            if total <= self.limit_bytes:
                break
            entry.remove(directory)
            total -= entry.bytes
        return total


def key(source: str, toolchain: str) -> str:
    """Return the name of the entry for a source and a toolchain."""
    name = toolchain.encode()
    return hashlib.sha256(b"%d\n%s%s" % (len(name), name, source.encode())).hexdigest()


def default() -> Cache:
    """Return this user's cache: TILEFOLD_CACHE_DIR, else the system's usual place for caches."""
    directory = settings.CACHE_DIR.get() or _usual_place() / "kernels"
    return Cache(directory, settings.CACHE_MIB.get() * 1024 * 1024)


def _usual_place() -> Path:
    """This system's place for our cache; that of the XDG rule where platformdirs is missing."""
    platformdirs = _platformdirs()
    if platformdirs is None:
        named = Path(os.environ.get("XDG_CACHE_HOME", ""))
        return (named if named.is_absolute() else Path("~/.cache").expanduser()) / "tilefold"
    return Path(platformdirs.user_cache_path("tilefold", appauthor=False))


@imported
def _platformdirs() -> ModuleType | None:
    """Platformdirs, which is imported here since a first call counts its milliseconds, or None."""
    try:
        import platformdirs
    except ModuleNotFoundError:
        return None
    return platformdirs


@dataclass
class _Entry:
    """The files of one kernel (binary, source) or one note, with files of unfinished writers."""

    names: list[str] = field(default_factory=list)
    bytes: int = 0
    used: float = 0.0

    @property
    def kernel(self) -> bool:
        return not all(".note" in name for name in self.names)

    def remove(self, directory: int) -> None:
        for name in self.names:
            with contextlib.suppress(OSError):  # another process was faster, or it is a directory
                os.unlink(name, dir_fd=directory)


def _entries(directory: int) -> list[_Entry]:
    entries: dict[str, _Entry] = defaultdict(_Entry)
    for name in os.listdir(directory):
        if not _OURS.fullmatch(name):
            continue
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            entry = entries[name[:64]]
            entry.names.append(name)
            entry.bytes += status.st_size
            entry.used = max(entry.used, status.st_mtime)
    return list(entries.values())


def _sweep(directory: int) -> None:
    """Remove the files that killed writers did not finish."""
    oldest = time.time() - _ABANDONED_SECONDS
    for name in os.listdir(directory):
        ours = _OURS.fullmatch(name)
        if ours and ours["unfinished"]:
            with contextlib.suppress(OSError):
                if os.stat(name, dir_fd=directory, follow_symlinks=False).st_mtime < oldest:
                    os.unlink(name, dir_fd=directory)


def _header(key: str, binary: bytes) -> bytes:
    """The header of a binary. It depends on the key, so it is not valid under another name."""
    size = len(binary).to_bytes(8, "little")
    return _MAGIC + hashlib.sha256(key.encode() + size + binary).digest() + size


def _make(path: Path) -> None:
    if not path.is_absolute():  # "~/.cache", where the user has no home
        raise OSError("not an absolute path")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A directory that only this user can write to; it stays open, so nobody can replace it."""
    if os.open not in os.supports_dir_fd:
        raise OSError("this system does not open files relative to a directory")
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _check(directory, stat.S_ISDIR)
        yield directory
    finally:
        os.close(directory)


def _read(name: str, directory: int) -> bytes:
    """The content of a file that only this user can have written."""
    # Non-blocking: a named pipe must not hold us up before it is recognised as one.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(name, flags, dir_fd=directory)
    try:
        size = _check(descriptor, stat.S_ISREG).st_size
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            header = file.read(_HEADER_BYTES)
            if size != _HEADER_BYTES + int.from_bytes(header[-8:], "little"):
                raise OSError("not of the size that its header tells")
            os.utime(descriptor)  # the time of the last use
            return header + file.read()
    finally:
        os.close(descriptor)


def _write(name: str, content: bytes, directory: int) -> None:
    """Write under a temporary name, then rename: readers see all of a file or nothing."""
    temporary = f"{name}.{os.urandom(8).hex()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(temporary, flags, 0o600, dir_fd=directory), "wb") as file:
        try:
            file.write(content)
            file.flush()
            os.replace(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        except OSError:
            os.unlink(temporary, dir_fd=directory)
            raise


def _check(descriptor: int, is_expected_kind: Callable[[int], bool]) -> os.stat_result:
    status = os.fstat(descriptor)
    if not is_expected_kind(status.st_mode):
        raise OSError("not of the expected kind")
    if status.st_uid != os.geteuid():
        raise OSError(f"belongs to user {status.st_uid}, not to {os.geteuid()}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError("others may write to it")
    return status
