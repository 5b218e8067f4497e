"""Environment variables: typed values, defaults, and one clear line for what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tilefold.common import settings


@pytest.mark.parametrize("setting", settings.ALL, ids=lambda setting: setting.name)
def test_unset_or_empty_means_the_default(
    setting: settings.Setting[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(setting.name, raising=False)
    assert setting.get() == setting.default
    monkeypatch.setenv(setting.name, "  ")
    assert setting.get() == setting.default


@pytest.mark.parametrize(
    ("setting", "text", "value"),
    [
        (settings.NUM_THREADS, "3", 3),
        (settings.NUM_THREADS, " 1024 ", 1024),
        (settings.CPU_ISA, "AVX2", "avx2"),
        (settings.METAL_FAMILY, "Apple8", "apple8"),
        (settings.CACHE_DIR, "/somewhere/else", Path("/somewhere/else")),
        (settings.HOPPER, "0", 0),
        (settings.REPRODUCIBLE, "Machine", "machine"),
        (settings.CACHE_MIB, "0", 0),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_text_becomes_a_value(
    setting: settings.Setting[object], text: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(setting.name, text)
    assert setting.get() == value


@pytest.mark.feature("T15")
@pytest.mark.parametrize(
    ("setting", "text", "message"),
    [
        (
            settings.NUM_THREADS,
            "0",
            "TILEFOLD_NUM_THREADS must be an integer from 1 to 1024, not '0'",
        ),
        (
            settings.NUM_THREADS,
            "1025",
            "TILEFOLD_NUM_THREADS must be an integer from 1 to 1024, not '1025'",
        ),
        (
            settings.NUM_THREADS,
            "many",
            "TILEFOLD_NUM_THREADS must be an integer from 1 to 1024, not 'many'",
        ),
        (
            settings.CPU_ISA,
            "mmx",
            "TILEFOLD_CPU_ISA must be one of amx, avx512, avx2, sse2, neon, not 'mmx'",
        ),
        (
            settings.METAL_FAMILY,
            "m1",
            "TILEFOLD_METAL_FAMILY must be one of apple7, apple8, apple9, apple10, not 'm1'",
        ),
        (
            settings.CACHE_DIR,
            "here/below",
            "TILEFOLD_CACHE_DIR must be an absolute path, not 'here/below'",
        ),
        (
            settings.CACHE_DIR,
            "~nobody-of-this-name/cache",
            "TILEFOLD_CACHE_DIR must be an absolute path, not '~nobody-of-this-name/cache'",
        ),
        (
            settings.REPRODUCIBLE,
            "always",
            "TILEFOLD_REPRODUCIBLE must be one of anywhere, machine, not 'always'",
        ),
        (
            settings.CACHE_MIB,
            "-1",
            "TILEFOLD_CACHE_MIB must be an integer (MiB), 0 to keep nothing, not '-1'",
        ),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_bad_value_is_named_in_one_line(
    setting: settings.Setting[object], text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(setting.name, text)
    with pytest.raises(ValueError) as raised:
        setting.get()
    assert str(raised.value) == message
