"""Dropout on processors: results of every level of instructions, whatever blocks and threads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from backends import on_cpu
from levels import device, here
from operands import FORMS, Array, inputs
from trial import PASSES, SEED, dropped, numbers, run

from tilefold import dropout_mask, full, get_num_threads, set_num_threads
from tilefold.backends.cpu import runtime
from tilefold.backends.cpu.kernel import emit
from tilefold.backends.cpu.plan import plan
from tilefold.backends.cpu.tables import RegisterTile
from tilefold.problems.attention import ITEM_BYTES, Problem


@pytest.mark.slow
@pytest.mark.feature("M01", "M04")
@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_results_in_every_form(dtype: str) -> None:
    """All passes in float32; in another type one pass of each trial."""
    first = [*ITEM_BYTES].index(dtype)
    for number, trial in enumerate(dropped(dtype)):
        given = numbers(trial)
        every = dtype == "float32" and number == 0
        for operation, form in PASSES if every else [PASSES[(first + number) % len(PASSES)]]:
            run(trial, given, operation, form)


P = Problem(1, 2, 2, 45, 75, 4, 75, "float32", 0.5, full(), dropout=0.25)


def kept() -> Array:
    """Which pairs of P stay."""
    return dropout_mask(SEED, 0.25, batch=1, heads=2, rows=45, columns=75)


def weights(setting_options: dict[str, object], form: str | None = None) -> Array:
    """The weights of all pairs that a forward or, in a form, a backward pass uses."""
    given = inputs(P, "bhnd", "packed") | {"seed": np.array([SEED])}
    for name in ("v", "do"):
        given[name][...] = np.eye(*given[name].shape[2:])
    setting = on_cpu("float32")
    found = setting.forward(P, given, **({} if form else setting_options))
    if form is None:
        return found["o"]
    dv = setting.backward(P, {**given, **found}, form, **setting_options)["dv"]
    return dv[..., :45].swapaxes(2, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tile", "block_traverse"),
    [(RegisterTile(6, 2), 7), (RegisterTile(1, 1), 64), (RegisterTile(3, 3), 33)],
)
def test_pairs_do_not_depend_on_blocks(tile: RegisterTile, block_traverse: int) -> None:
    for level in here():
        options = {"tile": tile, "block_traverse": block_traverse, "device": level}
        assert ((weights(options) > 0) == kept()).all()
        for form in FORMS:
            assert ((weights(options, form) > 0) == kept()).all(), form


@pytest.mark.slow
def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    before = get_num_threads()
    try:
        set_num_threads(1)
        alone = [weights({}).tobytes(), *(weights({}, form).tobytes() for form in FORMS)]
        set_num_threads(3)
        assert alone == [weights({}).tobytes(), *(weights({}, form).tobytes() for form in FORMS)]
    finally:
        set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx512", "avx2", "sse2", "neon"])
def test_words_are_multiplied_by_one_instruction(isa: str) -> None:
    """A product of two words of 32 bits: not the product of 64 bits, which takes three or more."""
    (launch,) = plan(replace(P, len_q=512, len_k=512, dim_v=4), device(isa), "forward").launches
    text = runtime.assembly(emit(launch.spec), device(isa))
    made = text[text.index("keep_queries:") :].partition("func_end")[0]
    name, wide = ("umull", "mul\t") if isa == "neon" else ("pmuludq", "pmullq")
    assert made.count(name) >= 20
    assert isa == "neon" or wide not in made
