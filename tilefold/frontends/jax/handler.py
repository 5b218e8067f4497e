"""The registration of `frontends.xla` with the XLA of JAX."""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path
from typing import Any

import jax

from tilefold.frontends import xla


@functools.cache
def version() -> tuple[int, int] | None:
    """The version of XLA's interface in the installed JAX; None where it does not say."""
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    try:
        text = header.read_text(encoding="utf-8")
    except OSError:
        return None
    found = [re.search(rf"XLA_FFI_API_{part}\s+(\d+)", text) for part in ("MAJOR", "MINOR")]
    major, minor = (int(each[1]) if each else -1 for each in found)
    return major, minor


def register() -> bool:
    """Tell XLA about the handler, once. False where the version of its interface is not known.

    XLA keeps what it is told until it starts, so this starts nothing.
    """
    if version() not in xla.KNOWN:
        return False
    _register()
    return True


@functools.cache
def _register() -> None:
    handler = xla.Handler()
    kind = {"type_id": _capsule(handler.type_id), "type_info": _capsule(handler.type_info)}
    jax.ffi.register_ffi_type(xla.TARGET, kind, platform="cpu")
    stages = {"instantiate": _capsule(handler.instantiate), "execute": _capsule(handler.execute)}
    jax.ffi.register_ffi_target(xla.TARGET, stages, platform="cpu")


def _capsule(address: int) -> Any:
    return jax.ffi.pycapsule(ctypes.c_void_p(address))
