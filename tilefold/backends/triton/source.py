"""From a spec to its source: `emit`, which works on every machine."""

from __future__ import annotations

from tilefold.backends.triton.kernels import hopper
from tilefold.backends.triton.spec import TritonSpec
from tilefold.planning.kernels import emitter


def emit(spec: TritonSpec) -> str:
    """The module of a kernel: Python that Triton compiles; its entry is `spec.entry`."""
    if spec.gluon:
        return hopper.emit(spec)
    return emitter(spec.row, "tilefold.backends.triton.kernels")(spec)
