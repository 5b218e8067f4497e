"""Plans of modified scores in Triton: `backends/test_variants.py` has their results."""

from __future__ import annotations

import numpy as np
import pytest

from tilefold import bias, causal, softcap
from tilefold.backends.triton.plan import plan
from tilefold.problems.attention import Problem

# Tracing Python's operations doubles the time of these tests.
pytestmark = pytest.mark.no_cover


def test_hopper_modifies_no_scores() -> None:
    """The plain kernel takes its place, and asking for it says why not."""
    problem = Problem.of((1, 2, 256, 64), dtype="bfloat16", mask=causal(), score=softcap(30.0))
    (launch,) = plan(problem, "sm_90", "forward").launches
    assert not launch.spec.gluon and launch.spec.score is not None and not launch.spec.hides
    with pytest.raises(ValueError, match="'hopper' is not possible: it does not modify scores"):
        plan(problem, "sm_90", "forward", form="hopper")
    with pytest.raises(NotImplementedError, match="no operand lse_low in a forward pass"):
        plan(problem, "sm_90", "forward", extra=("lse_low",))


def test_parts_of_the_gradient_of_an_array_are_few() -> None:
    """Units that share entries are dealt to a fixed number of parts; the others share one part."""
    sizes = {"h": 8, "q": 512, "k": 512}

    def parts(*axes: str) -> tuple[int, ...]:
        array = np.zeros([sizes.get(axis, 1) for axis in axes], np.float32)
        problem = Problem.of((16, 8, 512, 64), score=bias(array))
        made = plan(problem, "sm_80", "backward", extra=("dinput0",))
        launch = made.launches[-1]
        assert launch.added is not None and len(launch.order) % launch.added.shared == 0
        return made.buffers["dinput0_parts"].shape

    assert parts("h", "q", "k") == (4, 8, 512, 512), "16 batch entries share 4 parts"
    assert parts("q", "k") == (4, 512, 512), "and 8 heads with them"
    assert 4 < parts("h", "1", "1")[0] <= 264, "small arrays have more"
    full_bias = Problem.of((2, 8, 64, 64), score=bias(np.zeros((2, 8, 64, 64), np.float32)))
    made = plan(full_bias, "sm_80", "backward", extra=("dinput0",))
    assert made.buffers["dinput0_parts"].shape == (1, 2, 8, 64, 64)
