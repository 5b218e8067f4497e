"""Plans can be asked, overridden and edited; what they skip is not computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare import assert_near, assert_same, dense
from operands import FORMS, Array, backward, buffer, forward, inputs
from trial import PASSES, planned

import tilefold
from tilefold import Rule, causal, documents, full, local
from tilefold.backends import calls
from tilefold.backends.cpu import dispatch
from tilefold.backends.cpu.choice import Chooser
from tilefold.backends.cpu.device import Device, host
from tilefold.backends.cpu.kernel import kernel, workspace_bytes
from tilefold.backends.cpu.kernels import ir, work
from tilefold.backends.cpu.plan import plan
from tilefold.backends.cpu.runtime import CompileError
from tilefold.backends.cpu.tables import FAMILIES, RegisterTile
from tilefold.planning.visited import MASK_STEP
from tilefold.problems import reference
from tilefold.problems.attention import ITEM_BYTES, STATISTICS, Problem


def problem(mask: Rule, len_q: int = 300, len_k: int = 420, **changes: Any) -> Problem:
    sizes = {"batch": 2, "heads_q": 4, "heads_kv": 2, "dim": 24, "dim_v": 16} | changes
    sizes = {"dtype": "float32", "scale": 0.2, **sizes}
    return Problem(len_q=len_q, len_k=len_k, mask=mask, **sizes)


@pytest.fixture
def fresh_kernels(fresh_cache: Path) -> Iterator[Path]:
    """No kernel in memory or on disk, before the test and after it."""
    forget()
    yield fresh_cache
    forget()


def forget() -> None:
    """Make this process as new: no kernel is loaded, and no call prepared."""
    kernel.cache_clear()
    calls.calls.clear()


@pytest.mark.slow
@pytest.mark.feature("M07", "S08")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_results_do_not_depend_on_the_blocks(dtype: str) -> None:
    sizes = problem(causal() & local(60), 130, 170, dtype=dtype)
    operands = inputs(sizes, "bhnd", "packed")
    want = dense(operands, sizes.mask, sizes.scale)
    operands |= {name: want[name].astype(dtype) for name in ("o", "lse")}
    tolerance = {"float32": 1e-5, "float64": 1e-12}[dtype]
    tiles = FAMILIES[host().isa].tiles
    rows = (1, 7, 500) if dtype == "float32" else ()
    for tile, block_traverse in [*((tile, None) for tile in tiles), *((tiles[0], n) for n in rows)]:
        options = {"tile": tile, "block_traverse": block_traverse}
        got = forward(sizes, operands, **options)
        for form in FORMS:
            gradients = backward(sizes, operands, form, **options)
            got |= {f"{name} {form}": array for name, array in gradients.items()}
        for name, array in got.items():
            expected = want[name.split()[0]]
            largest = abs(expected[np.isfinite(expected)]).max()
            assert_near(f"{name} with {options}", array, expected, tolerance * largest)


@pytest.mark.slow
@pytest.mark.feature("M07")
@pytest.mark.parametrize("isa", FAMILIES)
def test_every_plan_fits_the_machine(isa: str) -> None:
    device = Device("cpu", "any", isa, "", "", 4)
    for dtype in ITEM_BYTES:
        computed = ITEM_BYTES[STATISTICS[dtype]]
        for dim in (1, 77, 512):
            for length in (1, 17, 100, 5000):
                sizes = problem(causal(), length, length, dim=dim, dtype=dtype)
                for operation, form in PASSES:
                    for launch in planned(sizes, device, operation, form).launches:
                        spec = launch.spec
                        assert spec.lanes * computed == device.vector_bytes
                        if spec.row.by_query:  # no tile of registers
                            assert spec.rows >= 2 * length
                            assert spec.block_traverse % spec.lanes == 0
                            continue
                        held = spec.rows * spec.vectors + spec.vectors + 1
                        assert held <= device.vector_registers, spec
                        assert spec.block_traverse % spec.rows == 0, spec
                        scores = spec.block_traverse * spec.block_parallel * computed
                        table = Chooser(sizes, device).family(spec.kernel)
                        assert scores <= table.scratch_bytes, spec
                        assert spec.block_traverse % table.traverse_step == 0, spec


@pytest.mark.feature("M07", "T07")
@pytest.mark.parametrize("isa", ["avx512", "neon"])
def test_a_narrow_window_has_narrow_blocks_where_they_were_measured(isa: str) -> None:
    device = Device("cpu", "any", isa, "", "", 4)
    widest = FAMILIES[isa].tiles[0].vectors

    def vectors(rule: Rule, length: int = 4096) -> set[int]:
        asked = problem(rule, length, length)
        made = [plan(asked, device, "forward"), plan(asked, device, "backward", "split")]
        launches = [launch for one in made for launch in one.launches]
        return {one.spec.vectors for one in launches if one.spec.kernel != "delta"}

    for rule in (full(), causal(), causal() & local(1024), local(600)):
        assert vectors(rule) == {widest}
    narrow = {2} if isa == "avx512" else {widest}
    for rule in (causal() & local(64), causal() & local(256), local(50, stride=3)):
        assert vectors(rule) == narrow
    assert vectors(causal(), 512) == narrow
    assert vectors(full() & ~full(), 512) == {widest}


@pytest.mark.feature("M07")
def test_an_override_is_what_the_plan_says() -> None:
    tile = FAMILIES[host().isa].tiles[-1]
    made = plan(
        problem(full()), host(), "backward", "split", tile=tile, block_traverse=3 * tile.rows
    )
    for launch in made.launches:
        assert (launch.spec.rows, launch.spec.vectors) == (tile.rows, tile.vectors)
        assert launch.spec.block_traverse == 3 * tile.rows
        assert launch.spec.block_parallel == tile.vectors * launch.spec.lanes


@pytest.mark.feature("M01", "M04")
def test_scratch_does_not_grow_with_the_lengths() -> None:
    """The specification has forgotten them, so all that a worker holds is the same."""
    for operation, form in PASSES:
        short, long = (
            planned(problem(causal(), length, length), host(), operation, form).launches
            for length in (3000, 30000)
        )
        for one, other in zip(short, long, strict=True):
            assert one.spec == other.spec
            assert workspace_bytes(one.spec) == workspace_bytes(other.spec) < 2**20


@pytest.mark.slow
@pytest.mark.feature("M02")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.slow
def test_gradients_of_heads_are_a_loop_over_key_heads(form: str) -> None:
    sizes = problem(causal() & local(40), 70, 90)
    operands = inputs(sizes, "bhnd", "packed")
    operands |= forward(sizes, operands)
    together = backward(sizes, operands, form)
    alone = replace(sizes, batch=1, heads_q=2, heads_kv=1)
    for b in range(2):
        for h in range(2):
            key_head = (slice(b, b + 1), slice(h, h + 1))
            query_heads = (slice(b, b + 1), slice(2 * h, 2 * h + 2))
            place = {name: key_head if name in "kv" else query_heads for name in operands}
            part = {name: array[place[name]] for name, array in operands.items()}
            for name, array in backward(alone, part, form).items():
                assert_same(name, array, together[name][place[name[1:]]])


Counted = Callable[[Problem, str, str], Array]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, fresh_kernels: Path) -> Counted:
    """Runs an operation with kernels that count the rows of their tiles: (full, partial)."""
    count = np.zeros(2, np.int64)
    real = work.tiles

    def counting(body: Any, spec: Any, arguments: Any, b: Any, h: Any, row: Any, tile: Any) -> None:
        def counting_tile(first: ir.Value, rows: ir.Value, masked: bool) -> None:
            place = f"ptr inttoptr (i64 {count.ctypes.data + 8 * masked} to ptr)"
            body.result("counted", "i64", f"atomicrmw add {place}, {rows.typed} monotonic")
            tile(first, rows, masked)

        real(body, spec, arguments, b, h, row, counting_tile)

    monkeypatch.setattr(work, "tiles", counting)

    def run(sizes: Problem, operation: str, form: str) -> Array:
        operands = inputs(sizes, "bhnd", "packed")
        want = dense(operands, sizes.mask, sizes.scale)
        operands |= {name: want[name].astype(sizes.dtype) for name in ("o", "lse")}
        count[...] = 0
        if operation == "forward":
            forward(sizes, operands)
        else:
            backward(sizes, operands, form)
        return count.copy()

    return run


SPARSE: dict[str, Rule] = {
    "window": causal() & local(30),
    "documents": documents(np.arange(300) // 64, np.arange(420) // 64),
    "2-D": local(3, grid_q=(12, 25), grid_k=(14, 30), sync="scale_front"),
}


@pytest.mark.slow
@pytest.mark.feature("M15", "T07")
@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize(("operation", "form"), PASSES)
def test_kernels_visit_the_tiles_of_the_plan_and_no_other(
    operation: str, form: str, name: str, counted: Counted
) -> None:
    sizes = problem(SPARSE[name])
    visited = counted(sizes, operation, form)
    expected, total = np.zeros(2, np.int64), 0
    for launch in planned(sizes, host(), operation, form).launches:
        if launch.spec.kernel == "reduce_dq":
            continue  # its runs are owners
        runs = launch.runs.runs
        for masked in (0, 1):
            rows = runs[runs[:, 2] == masked]
            expected[masked] += 2 * 4 * (rows[:, 1] - rows[:, 0]).sum()  # alike in all heads
        if launch.spec.row.visits:
            by_query = launch.spec.row.parallel == "q"
            total += 2 * 4 * launch.block_rows * (420 if by_query else 300)
            block = launch.spec.block_parallel, MASK_STEP
            tiles = sizes.mask.blocks(300, 420, *(block if by_query else block[::-1]))
            assert tiles.skip > 0
    np.testing.assert_array_equal(visited, expected)
    assert 0 < visited.sum() < 0.7 * total


@pytest.mark.feature("M15", "T07")
def test_keys_outside_of_the_runs_are_not_even_read() -> None:
    """A kernel without a mask, given the runs of a window: NaN in all other keys stays unseen."""
    sizes = problem(full(), batch=1, heads_q=1, heads_kv=1)
    window = plan(replace(sizes, mask=causal() & local(30)), host(), "forward").launches[0]
    made = plan(sizes, host(), "forward", tile=RegisterTile(window.spec.rows, window.spec.vectors))
    made = replace(made, launches=(replace(made.launches[0], runs=window.runs),))
    width = made.launches[0].spec.block_parallel
    assert width == window.spec.block_parallel
    clean = inputs(sizes, "bhnd", "packed")
    for row in range(window.block_rows):
        runs = window.runs.runs[window.runs.rows[row] : window.runs.rows[row + 1]]
        keys = np.concatenate([np.arange(first, last) for first, last, _ in runs])
        assert 0 < len(keys) < sizes.len_k
        operands = {name: clean[name].copy() for name in ("q", "k", "v")}
        outside = np.setdiff1d(np.arange(sizes.len_k), keys)
        for name in ("k", "v"):
            operands[name][:, :, outside] = np.nan
        results = {
            "o": np.zeros((1, 1, sizes.len_q, sizes.dim_v), np.float32),
            "lse": np.zeros((1, 1, sizes.len_q), np.float32),
        }
        operands |= results
        dispatch.run(made, {name: buffer(array) for name, array in operands.items()})
        block_of_queries = slice(row * width, (row + 1) * width)
        want, _ = reference.attention(
            clean["q"][:, :, block_of_queries],
            clean["k"][:, :, keys],
            clean["v"][:, :, keys],
            scale=sizes.scale,
        )
        assert_near("o", results["o"][:, :, block_of_queries], want, 1e-5)


@pytest.mark.feature("M14", "M03")
def test_a_broken_token_shows_its_line_and_mending_it_works(
    monkeypatch: pytest.MonkeyPatch, fresh_kernels: Path
) -> None:
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 1, 20, 6))
    with monkeypatch.context() as broken:
        real = ir.Body.multiply_add

        def misspelt(self: ir.Body, *arguments: Any, **options: Any) -> ir.Value:
            value = real(self, *arguments, **options)
            self._lines[-1] = self._lines[-1].replace("call", "cal", 1)
            return value

        broken.setattr(ir.Body, "multiply_add", misspelt)
        with pytest.raises(CompileError, match=r"line \d+ of an emitted kernel") as raised:
            tilefold.attention(q, k, v)
    shown = str(raised.value).splitlines()[1]
    assert "= cal <" in shown and "@llvm.fmuladd" in shown
    want, _ = reference.attention(q, k, v)
    assert_near("o", tilefold.attention(q, k, v), want, 1e-12)
