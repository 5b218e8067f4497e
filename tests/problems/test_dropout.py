"""Which pairs fall out: the published numbers of Philox, how many stay, regions, bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tilefold import dropout_mask
from tilefold.problems import dropout

KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0"),
]
WORDS = [
    "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    "408f276d 41c83b0e a20bc7c6 6d5451fd",
    "d16cfe09 94fdcceb 5001e420 24126ea1",
]
"""The known answers of Philox4x32-10 that Random123 publishes (`kat_vectors`)."""


@pytest.mark.slow
@pytest.mark.parametrize(("given", "words"), [*zip(KNOWN, WORDS, strict=True)])
def test_philox_gives_the_published_numbers(given: tuple[str, str], words: str) -> None:
    counter, (low, high) = ([int(word, 16) for word in part.split()] for part in given)
    assert " ".join(f"{word:08x}" for word in dropout.philox(counter, (low, high))) == words


def test_a_pair_is_kept_by_the_word_of_its_key() -> None:
    seed, b, h, q, k = 2**63 + 12345, 3, 5, 70000, 1002
    words = dropout.philox((q, k // 4, h, b), (12345, 2**31))
    chance = int(words[k % 4]) / 2**32
    assert dropout.keep(seed, chance, b, h, q, k)
    assert not dropout.keep(seed, chance + 2.0**-32, b, h, q, k)


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 2.0**-32, 1 - 2.0**-33])
def test_as_many_pairs_stay_as_p_says(p: float) -> None:
    kept = dropout_mask(1, p, batch=2, heads=4, rows=256, columns=512)
    for axes in ((1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):
        share = kept.mean(axis=axes)
        count = kept.size / share.size
        assert (abs(share - (1 - p)) < 5 * np.sqrt(p * (1 - p) / count) + 1 / count).all()


def test_neighbours_along_each_axis_fall_out_independently() -> None:
    kept = dropout_mask(3, 0.5, batch=8, heads=8, rows=64, columns=64)
    for axis in range(4):
        pairs = kept == np.roll(kept, 1, axis)
        assert abs(pairs.mean() - 0.5) < 5 / np.sqrt(4 * kept.size)
    other = dropout_mask(3 + 2**32, 0.5, batch=8, heads=8, rows=64, columns=64)
    assert abs((kept == other).mean() - 0.5) < 5 / np.sqrt(4 * kept.size)


def test_a_region_is_a_part_of_the_whole() -> None:
    whole = dropout_mask(-7, 0.3, batch=3, heads=4, rows=40, columns=50)
    axes = {"batch": [2, 0], "heads": range(1, 4), "rows": np.arange(7, 40, 3), "columns": [49, 3]}
    part = dropout_mask(-7, 0.3, **axes)
    assert (part == whole[np.ix_(*axes.values())]).all()
    assert dropout_mask(1, 0.3, batch=0, heads=1, rows=[], columns=2).shape == (0, 1, 0, 2)


def test_a_seed_below_zero_stands_for_its_bits() -> None:
    size = {"batch": 1, "heads": 1, "rows": 16, "columns": 64}
    assert (dropout_mask(-1, 0.5, **size) == dropout_mask(2**64 - 1, 0.5, **size)).all()


NUMBER = r"^p must be a number in \[0, 1\), got "
SEED = r"^seed must be an integer from -2\*\*63 to 2\*\*64 - 1, got "
AXIS = r"^rows must be a number of indices or a sequence of indices from 0 on, got "


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"p": 1.0}, ValueError, NUMBER + "1.0$"),
        ({"p": -0.1}, ValueError, NUMBER + "-0.1$"),
        ({"p": float("nan")}, ValueError, NUMBER + "nan$"),
        ({"p": "0.5"}, TypeError, NUMBER + "'0.5'$"),
        ({"p": True}, TypeError, NUMBER + "True$"),
        ({"p": np.zeros(2)}, TypeError, NUMBER + r"array\(\[0., 0.\]\)$"),
        ({"seed": None}, TypeError, SEED + "None$"),
        ({"seed": 1.0}, TypeError, SEED + "1.0$"),
        ({"seed": 2**64}, ValueError, SEED + "18446744073709551616$"),
        ({"rows": -1}, ValueError, AXIS + "-1$"),
        ({"rows": [3, -1]}, ValueError, AXIS + r"\[3, -1\]$"),
        ({"rows": 2.0}, TypeError, AXIS + "2.0$"),
        ({"rows": [0.5]}, TypeError, AXIS + r"\[0.5\]$"),
        ({"rows": "all"}, TypeError, AXIS + "'all'$"),
    ],
    ids=str,
)
def test_bad_input_is_named(wrong: dict[str, Any], kind: type[Exception], message: str) -> None:
    given = {"seed": 1, "p": 0.5, "batch": 1, "heads": 1, "rows": 1, "columns": 1} | wrong
    with pytest.raises(kind, match=message):
        dropout_mask(**given)
