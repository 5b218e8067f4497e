"""Kernels on disk: what was kept comes back, and nothing else ever does."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from paths import ROOT

from tilefold.backends.cpu import runtime
from tilefold.backends.cpu.device import host
from tilefold.common import disk_cache

TEXT = "define void @kernel() {\n  ret void\n}\n"
TOOLCHAIN = "a compiler, version 1"
BINARY = bytes(range(256)) * 20


@pytest.fixture
def store(tmp_path: Path) -> disk_cache.Cache:
    return disk_cache.Cache(tmp_path / "kernels", 1 << 20)


def entry(store: disk_cache.Cache) -> Path:
    (path,) = store.directory.glob("*.bin")
    return path


def test_what_was_put_comes_back(store: disk_cache.Cache) -> None:
    assert store.get(TEXT, TOOLCHAIN) is None
    store.put(TEXT, TOOLCHAIN, BINARY)
    assert store.get(TEXT, TOOLCHAIN) == BINARY
    assert store.count() == 1
    assert store.size() == sum(path.stat().st_size for path in store.directory.iterdir())
    assert store.problem() is None


def test_the_text_stands_beside_the_binary(store: disk_cache.Cache) -> None:
    store.put(TEXT, TOOLCHAIN, BINARY, suffix=".ll")
    assert entry(store).with_suffix(".ll").read_text() == TEXT
    assert len(list(store.directory.iterdir())) == 2


def test_only_this_user_may_enter(store: disk_cache.Cache) -> None:
    store.put(TEXT, TOOLCHAIN, BINARY)
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in store.directory.iterdir()} == {0o600}


@pytest.mark.feature("M14")
def test_another_text_or_toolchain_is_another_kernel(store: disk_cache.Cache) -> None:
    store.put(TEXT, TOOLCHAIN, BINARY)
    assert store.get(TEXT + " ", TOOLCHAIN) is None
    assert store.get(TEXT, TOOLCHAIN + "1") is None
    # What ends one part must not be able to begin the other.
    assert store.get(TEXT[1:], TOOLCHAIN + TEXT[0]) is None


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def keep_the_header_alone(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:58])


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def grow_beyond_memory(path: Path) -> None:
    os.truncate(path, 1 << 40)


def flip_a_bit_of_the_code(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1000] ^= 4
    path.write_bytes(content)


def flip_a_bit_of_the_checksum(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[30] ^= 1
    path.write_bytes(content)


def flip_a_bit_of_the_length(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[51] ^= 1
    path.write_bytes(content)


def another_format(path: Path) -> None:
    path.write_bytes(b"x" + path.read_bytes()[1:])


def world_writable(path: Path) -> None:
    path.chmod(0o602)


def group_writable(path: Path) -> None:
    path.chmod(0o620)


def symbolic_link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def named_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def directory_world_writable(path: Path) -> None:
    path.parent.chmod(0o707)


def directory_group_writable(path: Path) -> None:
    path.parent.chmod(0o770)


def directory_symbolic_link(path: Path) -> None:
    real = path.parent.with_name("elsewhere")
    path.parent.rename(real)
    path.parent.symlink_to(real)


@pytest.mark.feature("M14")
def test_what_was_noted_comes_back(store: disk_cache.Cache) -> None:
    assert store.note("why") is None
    store.put_note("why", b"because")
    assert store.note("why") == b"because"
    assert store.note("why not") is None
    store.put_note("why", b"therefore")
    assert store.note("why") == b"therefore"
    store.put("why", "a question", BINARY)  # the same name, and yet another file
    assert store.note("why") == b"therefore"
    assert store.get("why", "a question") == BINARY


def test_notes_are_no_kernels_but_take_room_and_go_with_them(store: disk_cache.Cache) -> None:
    store.put(TEXT, TOOLCHAIN, BINARY)
    before = store.size()
    store.put_note("why", b"because")
    assert store.count() == 1 and store.size() > before
    assert store.clear() == 1
    assert store.note("why") is None and list(store.directory.iterdir()) == []


DAMAGE = [
    truncate,
    empty,
    keep_the_header_alone,
    append,
    grow_beyond_memory,
    flip_a_bit_of_the_code,
    flip_a_bit_of_the_checksum,
    flip_a_bit_of_the_length,
    another_format,
    world_writable,
    group_writable,
    symbolic_link,
    named_pipe,
]
DIRECTORY_DAMAGE = [
    directory_world_writable,
    directory_group_writable,
    directory_symbolic_link,
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_entry_is_never_loaded_but_replaced(
    damage: Callable[[Path], None], store: disk_cache.Cache
) -> None:
    store.put(TEXT, TOOLCHAIN, BINARY)
    damage(entry(store))
    assert store.get(TEXT, TOOLCHAIN) is None
    store.put(TEXT, TOOLCHAIN, BINARY)
    assert store.get(TEXT, TOOLCHAIN) == BINARY


@pytest.mark.parametrize(
    "damage", [d for d in DAMAGE if d is not keep_the_header_alone], ids=lambda d: d.__name__
)
def test_a_damaged_note_is_never_believed_but_replaced(
    damage: Callable[[Path], None], store: disk_cache.Cache
) -> None:
    store.put_note("why", BINARY)
    (path,) = store.directory.glob("*.note")
    damage(path)
    assert store.note("why") is None
    store.put_note("why", BINARY)
    assert store.note("why") == BINARY


@pytest.mark.parametrize(
    "damage", [*DIRECTORY_DAMAGE, directory], ids=lambda damage: damage.__name__
)
def test_an_entry_in_a_wrong_place_is_never_loaded(
    damage: Callable[[Path], None], store: disk_cache.Cache
) -> None:
    store.put(TEXT, TOOLCHAIN, BINARY)
    damage(entry(store))
    assert store.get(TEXT, TOOLCHAIN) is None
    store.put(TEXT, TOOLCHAIN, BINARY)
    assert store.get(TEXT, TOOLCHAIN) is None


@pytest.mark.parametrize("damage", DIRECTORY_DAMAGE, ids=lambda damage: damage.__name__)
def test_a_wrong_directory_is_explained_and_left_alone(
    damage: Callable[[Path], None], store: disk_cache.Cache
) -> None:
    store.put(TEXT, TOOLCHAIN, BINARY)
    path = entry(store)
    damage(path)
    problem = store.problem()
    assert problem is not None
    assert problem.startswith(f"{store.directory}: ")
    assert "\n" not in problem
    assert (store.size(), store.count(), store.clear()) == (0, 0, 0)
    assert path.exists()


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a path foreign: by changing its owner, or, where we may not, by changing who we are."""
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)


@pytest.mark.parametrize("what", ["entry", "directory"])
def test_what_belongs_to_another_user_is_never_loaded(
    what: str, store: disk_cache.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(TEXT, TOOLCHAIN, BINARY)
    give_away(entry(store) if what == "entry" else store.directory, monkeypatch)
    assert store.get(TEXT, TOOLCHAIN) is None


def test_an_entry_under_another_name_is_never_loaded(store: disk_cache.Cache) -> None:
    store.put(TEXT, TOOLCHAIN, BINARY)
    first = entry(store)
    store.put(TEXT + "; another", TOOLCHAIN, BINARY[::-1])
    (second,) = set(store.directory.glob("*.bin")) - {first}
    second.replace(first)
    assert store.get(TEXT, TOOLCHAIN) is None


@pytest.mark.parametrize("place", ["below a file", "no permission", "relative", "long"])
def test_a_directory_that_cannot_be_written_only_costs_speed(place: str, tmp_path: Path) -> None:
    if place == "below a file":
        (tmp_path / "file").write_text("")
        folder = tmp_path / "file" / "kernels"
    elif place == "no permission":
        # Root writes wherever it likes, except here.
        folder = Path("/proc/tilefold/kernels") if os.geteuid() == 0 else tmp_path / "kernels"
        if os.geteuid() != 0:
            tmp_path.chmod(0o500)
    elif place == "relative":
        folder = Path("kernels-in-the-working-directory")
    else:
        folder = Path("/" + "long" * 1500)
    store = disk_cache.Cache(folder, 1 << 20)
    store.put(TEXT, TOOLCHAIN, BINARY)
    assert store.get(TEXT, TOOLCHAIN) is None
    assert (store.size(), store.count(), store.clear()) == (0, 0, 0)
    assert not os.path.exists(folder)  # noqa: PTH110  # Path.exists raises for a long name
    assert str(store.problem()).startswith(f"{folder}: ")


def test_a_full_disk_only_costs_speed(
    store: disk_cache.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        store.put(TEXT, TOOLCHAIN, BINARY)
        assert "No space left" in str(store.problem())
    assert list(store.directory.iterdir()) == []


def use(store: disk_cache.Cache, name: str, minutes_ago: float) -> None:
    """Put an entry that was last used some time ago."""
    before = set(store.directory.glob("*"))
    store.put(name, TOOLCHAIN, BINARY)
    then = time.time() - 60 * minutes_ago
    for path in set(store.directory.glob("*")) - before:
        os.utime(path, (then, then))


def test_a_process_alone_never_passes_the_limit_though_it_seldom_looks(tmp_path: Path) -> None:
    store = disk_cache.Cache(tmp_path / "cache", 100_000)
    for number in range(60):
        store.put(f"text {number}", "toolchain", bytes(1000 + 700 * (number % 7)))
        assert store.size() <= store.limit_bytes
        assert store.get(f"text {number}", "toolchain") is not None
    assert store.size() > store.limit_bytes // 2


def test_the_first_file_of_a_process_is_kept_without_a_look_at_all_others(
    store: disk_cache.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: looks.append(path) or listed(path))
    roomy = disk_cache.Cache(store.directory, 1 << 40)
    for number in range(50):
        monkeypatch.setattr(disk_cache, "_room", {})  # a new process
        roomy.put_note(f"question {number}", b"answer")
    assert not looks


def test_many_short_processes_stay_near_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = disk_cache.Cache(tmp_path / "cache", 100_000)
    largest = 0
    for number in range(400):
        monkeypatch.setattr(disk_cache, "_room", {})  # a new process
        store.put_note(f"question {number}", bytes(1000))
        largest = max(largest, number % 10 == 0 and store.size())
    assert store.limit_bytes // 2 < largest < store.limit_bytes * 5 // 4


def test_what_killed_writers_left_is_swept(tmp_path: Path) -> None:
    store = disk_cache.Cache(tmp_path / "kernels", 16 * len(BINARY))
    store.put(TEXT, TOOLCHAIN, BINARY)
    old, new, other = (
        store.directory / name
        for name in (f"{entry_name(store)}.{'0' * 16}", f"{entry_name(store)}.{'1' * 16}", "mine.0")
    )
    for path in (old, new, other):
        path.write_bytes(b"half")
    for path in (old, other):
        os.utime(path, (time.time() - 7200,) * 2)
    for number in range(3):  # each takes 1/16 of the limit, so the second counts at the latest
        store.put(f"{TEXT}; {number}", TOOLCHAIN, BINARY)
    assert [path.exists() for path in (old, new, other)] == [False, True, True]
    assert store.get(TEXT, TOOLCHAIN) == BINARY


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    room_for_three = 3 * (len(BINARY) + 100)
    store = disk_cache.Cache(tmp_path / "kernels", room_for_three)
    use(store, "one", 30)
    use(store, "two", 20)
    use(store, "three", 10)
    assert store.count() == 3
    assert store.get("one", TOOLCHAIN) == BINARY  # used just now
    store.put("four", TOOLCHAIN, BINARY)
    assert store.size() <= room_for_three
    kept = [name for name in ("one", "two", "three", "four") if store.get(name, TOOLCHAIN)]
    assert kept == ["one", "three", "four"]
    assert len(list(store.directory.glob("*.ll"))) == 3


def test_no_room_keeps_nothing(tmp_path: Path) -> None:
    store = disk_cache.Cache(tmp_path / "kernels", 0)
    store.put(TEXT, TOOLCHAIN, BINARY)
    assert not store.directory.exists()
    assert store.problem() == "TILEFOLD_CACHE_MIB is 0"


def test_clear_removes_kernels_and_nothing_else(store: disk_cache.Cache) -> None:
    for name in ("one", "two"):
        store.put(name, TOOLCHAIN, BINARY)
    unfinished = f"{entry_name(store)}.0123456789abcdef"
    (store.directory / unfinished).write_bytes(b"half")
    (store.directory / "notes.txt").write_text("mine")
    (store.directory / ("a" * 64)).mkdir()
    assert store.clear() == 2
    assert {path.name for path in store.directory.iterdir()} == {"notes.txt", "a" * 64}


def entry_name(store: disk_cache.Cache) -> str:
    return sorted(store.directory.glob("*.bin"))[0].name


def test_the_place_and_the_size_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TILEFOLD_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TILEFOLD_CACHE_MIB", "3")
    assert disk_cache.default() == disk_cache.Cache(tmp_path, 3 << 20)
    monkeypatch.delenv("TILEFOLD_CACHE_DIR")
    assert "tilefold" in disk_cache.default().directory.parts


@pytest.mark.parametrize(
    ("named", "place"), [("/some/cache", "/some/cache"), ("relative", "/home/one/.cache")]
)
def test_without_platformdirs_the_rule_of_xdg_holds(
    named: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    anew = disk_cache._platformdirs.__wrapped__  # type: ignore[attr-defined]  # `imported` keeps it
    monkeypatch.setattr(disk_cache, "_platformdirs", anew)
    monkeypatch.delenv("TILEFOLD_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", named)
    monkeypatch.setenv("HOME", "/home/one")
    assert disk_cache.default().directory == Path(place, "tilefold", "kernels")


COMPILE_MANY = """
import sys
from tilefold.backends.cpu import runtime
from tilefold.backends.cpu.device import host
for number in range(12):
    text = f"define i64 @kernel(ptr %x) {{\\n  ret i64 {number}\\n}}\\n"
    loaded = runtime.kernel(text, "kernel", host())
    import ctypes
    result = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(loaded.address)(None)
    assert result == number, (result, number)
print("done")
"""


@pytest.mark.slow
def test_several_processes_compile_at_once(fresh_cache: Path) -> None:
    running = [
        subprocess.Popen(
            [sys.executable, "-c", COMPILE_MANY],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for _ in range(4)
    ]
    for process in running:
        out, err = process.communicate(timeout=60)
        assert (out, err, process.returncode) == ("done\n", "", 0)
    store = disk_cache.default()
    assert store.directory == fresh_cache
    assert store.count() == 12
    toolchain = runtime.toolchain(host())
    for number in range(12):
        text = f"define i64 @kernel(ptr %x) {{\n  ret i64 {number}\n}}\n"
        assert store.get(text, toolchain) is not None
    assert len(list(fresh_cache.iterdir())) == 24  # no temporary file is left
