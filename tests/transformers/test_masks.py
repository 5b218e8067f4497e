"""Masks of transformers as rules: they say of every pair what transformers' own tensors say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hugging import needs

pytestmark = needs

BATCH = 2


def functions() -> dict[str, Callable[..., Any]]:
    """Mask functions of positions below 12, as transformers' own code joins them."""
    import torch
    from transformers import masking_utils as m

    causal, full = m.causal_mask_function, m.bidirectional_mask_function
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3], [*range(7), *range(5)]])
    ids = torch.tensor([[0] * 3 + [1] * 5 + [2] * 4, [0] * 7 + [1] * 5])
    blocks = torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1, 1, 1, -1, -1], [-1] * 10 + [0, 0]])
    window, padding = m.sliding_window_causal_mask_function(3), torch.tensor([0, 2])
    packed = m.packed_sequence_mask_function(ids)

    def anew(function: Callable[..., Any]) -> Callable[..., Any]:
        return m.remap_positions_for_packed_sequence(function, positions)

    return {
        "causal": causal,
        "full": full,
        "window": window,
        "wide window": m.sliding_window_causal_mask_function(50),
        "no window": m.sliding_window_causal_mask_function(0),  # Qwen 2 MoE without windows has it
        "window alone": m.sliding_window_overlay(3),
        "both sides": m.sliding_window_bidirectional_mask_function(2),
        "chunks": m.chunked_causal_mask_function(4, torch.tensor([0, 0])),
        "chunks after padding": m.chunked_causal_mask_function(4, padding),
        "packed": m.and_masks(anew(causal), packed),
        "packed windows": m.and_masks(anew(window), packed),
        "packed chunks": m.and_masks(anew(m.chunked_causal_mask_function(2, padding)), packed),
        "images": m.or_masks(causal, m.blockwise_overlay(blocks)),
        "images in windows": m.or_masks(window, m.blockwise_overlay(blocks)),
        "packed images": m.and_masks(m.or_masks(anew(causal), m.blockwise_overlay(blocks)), packed),
        "positions of no sequence": m.and_masks(anew(causal), causal),
        "a user's own": m.and_masks(causal, lambda b, h, q, k: (q + k) % 3 != b),
        "or of a user's own": m.or_masks(causal, lambda b, h, q, k: k == 7),
    }


PLACES = {
    "whole": (12, 12, 0, 0),
    "one query": (1, 12, 11, 0),
    "chunk of a prompt": (4, 12, 8, 0),
    "rolling window": (1, 4, 10, 7),
    "rolling chunk": (3, 6, 9, 6),
    "static cache": (4, 12, 3, 0),
    "empty static cache": (5, 12, 0, 0),
    "more keys than queries": (3, 9, 0, 0),
}
"""Queries, keys, and the positions of the first ones."""

NAMES = [
    *("causal", "full", "window", "wide window", "no window", "window alone", "both sides"),
    *("chunks", "chunks after padding", "packed", "packed windows", "packed chunks", "images"),
    *("images in windows", "packed images", "positions of no sequence", "a user's own"),
    "or of a user's own",
]
OWN = ("a user's own", "or of a user's own")

PADDINGS = {
    "none": None,
    "full": [[1] * 12, [1] * 12],
    "left": [[0, 0] + [1] * 10, [1] * 12],
    "right": [[1] * 12, [1] * 8 + [0] * 4],
    "holes": [[1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0, 1], [0] + [1] * 10 + [0]],
    "short": [[0] + [1] * 8, [1] * 9],
}


def said(name: str, place: str, padding: str, tensor_offset: bool = False) -> tuple[Any, Any]:
    """The mask that tilefold makes, and transformers' tensor."""
    import torch
    from transformers import masking_utils

    from tilefold.frontends.transformers.sight import mask_of

    len_q, len_k, q, k = PLACES[place]
    rows = PADDINGS[padding]
    given = {
        "batch_size": BATCH,
        "q_length": len_q,
        "kv_length": len_k,
        "q_offset": torch.tensor(q) if tensor_offset else q,
        "kv_offset": k,
        "mask_function": functions()[name],
        "attention_mask": None if rows is None else torch.tensor(rows, dtype=torch.bool),
        "allow_is_causal_skip": name == "causal",
        "allow_is_bidirectional_skip": name == "full",
        "use_vmap": name in OWN,
        "device": torch.device("cpu"),
    }
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return mask_of(**given), masking_utils.sdpa_mask(**{**given, **skips}).numpy()


def drawn(mask: Any, len_q: int, len_k: int) -> Any:
    """The rule as an array (batch, 1, queries, keys), with what its keys leave out."""
    from tilefold.masks.given import renamed
    from tilefold.masks.tables import Table

    def known(table: Any) -> Any:
        return Table(mask.arrays[table.number].numpy())

    first, end = mask.keys or (0, len_k)
    seen = np.zeros((BATCH, 1, len_q, len_k), bool)
    rule = renamed(mask.rule, known)
    seen[..., first:end] = rule.to_dense(len_q, end - first, batch=BATCH, heads=1)
    return seen


WHOLE = [name for name in NAMES if "packed" in name or "sequence" in name]
"""Transformers packs whole sequences alone."""


@pytest.mark.parametrize(
    ("name", "place"),
    [(name, at) for name in NAMES for at in PLACES if at == "whole" or name not in WHOLE],
)
def test_rules_say_what_tensors_say(name: str, place: str) -> None:
    for number, padding in enumerate(PADDINGS):
        mask, dense = said(name, place, padding, tensor_offset=bool(number % 2))
        if mask is None:  # a layer then sees all, or the past
            square = np.tri(*dense.shape[2:], k=dense.shape[3] - dense.shape[2], dtype=bool)
            expected = square if name == "causal" else np.ones_like(square)
            assert (dense == expected).all()
            continue
        assert mask.shape == dense.shape
        assert mask.ndim == dense.ndim
        np.testing.assert_array_equal(drawn(mask, *dense.shape[2:]), dense, err_msg=padding)
        np.testing.assert_array_equal(mask.dense().numpy(), dense)


@pytest.mark.parametrize("name", sorted({*NAMES} - {*OWN} - {"positions of no sequence"}))
def test_known_functions_make_no_array_of_all_pairs(name: str) -> None:
    from tilefold.masks.graph import ordered
    from tilefold.masks.tables import Table

    mask, _ = said(name, "whole", "holes")
    values = [value for rule, _ in ordered(mask.rule) for value in vars(rule).values()]
    tables = [value for value in values if isinstance(value, Table)]
    assert all(x.array.size <= 2 * 12 for x in tables)
    assert all(x.numel() <= 2 * 12 for x in mask.arrays)
    assert mask.arrays


def test_the_rule_of_left_padding_does_not_change_while_a_cache_grows() -> None:
    import torch
    from transformers.masking_utils import causal_mask_function

    from tilefold.frontends.transformers.sight import mask_of

    rules = []
    for seen in (70000, 70001):
        shown = torch.ones(2, seen, dtype=torch.bool)
        shown[0, :5] = False
        mask = mask_of(
            batch_size=2,
            q_length=1,
            kv_length=seen,
            q_offset=seen - 1,
            kv_offset=0,
            mask_function=causal_mask_function,
            attention_mask=shown,
            device="cpu",
        )
        rules.append(mask.rule)
    assert rules[0] == rules[1]


def test_code_of_a_model_that_computes_with_a_mask_gets_the_tensor() -> None:
    import torch

    mask, dense = said("window", "whole", "left")
    expected = torch.from_numpy(dense)
    assert torch.equal(mask[:, :, :3], expected[:, :, :3])
    assert torch.equal(torch.where(mask, 1.0, 2.0), torch.where(expected, 1.0, 2.0))
    assert mask.dtype == torch.bool
    assert torch.equal(mask.to(torch.float32), expected.float())
    assert not hasattr(mask, "_no_attribute")
    with pytest.raises(NotImplementedError, match="this model adds it to scores"):
        torch.zeros(2, 1, 12, 12) + mask
