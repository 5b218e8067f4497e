"""What the emulator counts, and the model of instructions that the page shows."""

from __future__ import annotations

import copy
import json

import metal_model
import pytest
from metal import needs

from tilefold.backends.metal import model
from tilefold.backends.metal.model import MODELLED, WEIGHTS, Model
from tilefold.backends.metal.spec import KERNELS
from tilefold.planning.roofline import SOFTMAX_INSTRUCTIONS, instruction_count


@pytest.mark.slow
@pytest.mark.feature("M10")
@pytest.mark.parametrize("operation", MODELLED)
@pytest.mark.parametrize("family", ["apple7", "apple9"])
def test_kernels_make_the_products_that_are_counted_and_no_other(
    family: str, operation: str
) -> None:
    """8 x 8 x 8 multiply-adds in each product of fragments: 2 D for a pair, 3 D or 4 D."""
    needs("fast")
    made = model.model(family, operation, "float16", 64, check="fast")
    useful = (
        instruction_count(KERNELS[operation], made.pairs, 64) - SOFTMAX_INSTRUCTIONS * made.pairs
    )
    assert 512 * made.counts["multiplies"] == useful
    assert made.pairs <= made.counts["exponentials"] <= 1.1 * made.pairs


@pytest.mark.slow
def test_accesses_to_memory_are_counted() -> None:
    """K and V of a tile, 2 D numbers of a key, are read once for 8 rows, one or two at a time."""
    needs("count")
    made = model.model("apple9", "forward", "float16", 64)
    assert 64 / 8 <= made.counts["device_loads"] / made.pairs < 2 * 64 / 8 + 0.2
    assert made.counts["device_stores"] == made.counts["threadgroup_stores"] == 0
    staged = model.model("apple7", "forward", "float16", 64)
    copied = staged.counts["threadgroup_stores"] / staged.pairs
    assert 2 * 64 / 32 <= copied < 2 * 64 / 32 + 0.01  # by 4 simdgroups for 32 rows


def test_shares_are_weighed_counts() -> None:
    counts = dict.fromkeys(WEIGHTS, 0) | {"multiplies": 2 * 64, "exponentials": 512}
    made = Model("forward", 64, 512, counts)
    assert made.shares["multiplies"] == 128 / 133 and made.shares["exponentials"] == 4 / 133
    assert made.issued == 132 / 133


@pytest.mark.slow
def test_the_page_is_checked_against_texts_counts_and_plans() -> None:
    kept = json.loads(metal_model.KEPT.read_text(encoding="utf-8"))
    page = f"before\n{metal_model.BEGIN}\n{metal_model.END}\nafter"
    for row, case in zip(kept, metal_model.cases(), strict=True):  # as if all were up to date
        row["case"], row["text"] = case, metal_model.digest(*case)
    written = metal_model.replaced(page, metal_model.block(kept))
    assert metal_model.stale(kept, written) == []
    assert metal_model.stale(kept, page) == ["metal.md is out of date"]

    other = copy.deepcopy(kept)
    other[3]["text"] = "0" * 64
    assert metal_model.stale(other, written) == [
        "the text of apple7 float16 128 forward is another one"
    ]
    other = copy.deepcopy(kept)
    other[0]["counts"]["multiplies"] *= 2
    assert metal_model.stale(other, written) == ["metal.md is out of date"]
