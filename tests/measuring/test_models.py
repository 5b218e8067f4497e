"""The shapes of models: what is timed of each, and how a row is shown."""

from __future__ import annotations

import math

import models
import pytest
import results

from tilefold.measuring.roofline_share import RooflineShares
from tilefold.measuring.timing import Row


def test_each_of_ten_models_is_a_case() -> None:
    assert len({model.name for model in models.MODELS}) == len(models.MODELS) == 10
    for model in models.MODELS:
        first, *more = model.cases()
        assert (first.operation, len(more)) == ("forward", int(model.trained))
        assert first.problem.heads_q % first.problem.heads_kv == 0


@pytest.mark.slow
def test_a_row_names_the_best_peer_warm_and_cold() -> None:
    (model, *_) = models.MODELS
    (case, *_) = model.cases()

    def row(name: str, warm: float, cold: float, reason: str | None = None) -> Row:
        return Row(case, name, (warm,), 10, 0.1, reason, cold=(cold,))

    rows = [row("tilefold", 1e9, 2e9), row("torch", 2e9, 3e9), row("openvino", 3e9, 2.5e9)]
    rows.append(row("onnxruntime", math.nan, math.nan, "it cannot"))
    made = models.record(model, rows, RooflineShares())
    assert (made["ratio"], made["ratio_peer"]) == (2, "torch")
    assert (made["cold_ratio"], made["cold_ratio_peer"]) == (1.25, "openvino")
    assert made["reasons"] == {"onnxruntime": "it cannot"}
    _, _, peer, ratio, cold, _ = models.cells(made)
    assert (peer.split()[-1], ratio, cold) == ("torch", "2.00", "1.25")

    alone = models.record(model, rows[:1], RooflineShares())
    assert models.cells(alone)[2:5] == ["-", "-", "-"]
    page = results.shapes({"date": "2026-12-01", "commit": "c", "rows": [made]})
    assert page[-1].startswith("| BERT base, 8 texts of 128 tokens |")
