"""From a spec to its source: `emit`, which works on every machine."""

from __future__ import annotations

from tilefold.backends.metal.kernels import tensorops
from tilefold.backends.metal.spec import MetalSpec
from tilefold.planning.kernels import emitter


def emit(spec: MetalSpec) -> str:
    """The Metal Shading Language of a kernel: one source, whose entry is `spec.entry`."""
    if spec.tensor_ops:
        return tensorops.emit(spec)
    return emitter(spec.row, "tilefold.backends.metal.kernels")(spec)
