"""From a spec to its text: `emit`, which works on every machine."""

from __future__ import annotations

from collections.abc import Callable

from tilefold.backends.triton.kernels import backward, decode, forward, fused, hopper
from tilefold.backends.triton.spec import TritonSpec

EMITTERS: dict[str, Callable[[TritonSpec], str]] = {
    "forward": forward.emit,
    "backward_dq": backward.emit_dq,
    "backward_dkv": backward.emit_dkv,
    "delta": backward.emit_delta,
    "backward": fused.emit,
    "reduce_dq": fused.emit_reduce,
    "decode": decode.emit,
    "merge": decode.emit_merge,
}
"""Who writes a kernel, by its operation."""


def emit(spec: TritonSpec) -> str:
    """The module of a kernel: Python that Triton compiles; its entry is `spec.entry`."""
    return hopper.emit(spec) if spec.gluon else EMITTERS[spec.kernel](spec)
