"""JAX for tests, which are skipped where it is missing; the CPU is two devices."""

from __future__ import annotations

import os
from importlib import metadata
from typing import Any

import pytest

_FLAGS = [
    "--xla_force_host_platform_device_count=2",
    # XLA's own code runs once here: it compiles in a third of the time, and runs slower.
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
]

jax: Any
jnp: Any
try:
    if metadata.version("jaxlib").startswith("0.10."):  # others may end at a flag they do not know
        _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS])
    import jax
    import jax.numpy as jnp
except ImportError:  # PackageNotFoundError is one
    jax = jnp = None

needs = [pytest.mark.slow, pytest.mark.skipif(jax is None, reason="jax is not installed")]
"""The marks of a file of tests with JAX."""
