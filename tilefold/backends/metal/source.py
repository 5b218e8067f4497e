"""From a spec to its text: `emit`, which works on every machine."""

from __future__ import annotations

from collections.abc import Callable

from tilefold.backends.metal.kernels import backward, decode, forward, tensorops
from tilefold.backends.metal.spec import MetalSpec

EMITTERS: dict[str, Callable[[MetalSpec], str]] = {
    "forward": forward.emit,
    "backward_dq": backward.emit_dq,
    "backward_dkv": backward.emit_dkv,
    "decode": decode.emit,
    "merge": decode.emit_merge,
}
"""Who writes a kernel, by its operation."""


def emit(spec: MetalSpec) -> str:
    """The Metal Shading Language of a kernel: one text, whose entry is `spec.entry`."""
    return tensorops.emit(spec) if spec.tensor_ops else EMITTERS[spec.kernel](spec)
