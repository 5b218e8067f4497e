"""Second derivatives, forward mode and `vmap` with arrays in scores, with sinks, with dropout."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tilefold
from tilefold import attention, attention_backward, causal, dropout_mask, local
from tilefold.frontends.torch.derivatives.arguments import Kept
from tilefold.frontends.torch.derivatives.walk import Walk
from tilefold.masks.expression import Truth
from tilefold.problems.request import LAYOUTS

pytestmark = [
    pytest.mark.slow,  # kernels are compiled
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # torch's own, of tangents
]

Makes = Callable[..., dict[str, Any]]
SHAPES = (2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 2)


def randoms(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Numbers between 0.5 and 1.5 for arrays, whose number of axes is not that of q."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        if shape in SHAPES
        else torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
        for shape in shapes
    ]


def own(scalar: Tensor) -> Any:
    """s becomes tanh(s x) + x."""
    entry = tilefold.table(scalar)[()]
    return tilefold.score(lambda s: tilefold.tanh(s * entry) + entry)


def logarithmic(slopes: Tensor) -> Any:
    """s becomes s - slope log(distance), which is NaN where a causal mask hides the pair."""
    entries = tilefold.table(slopes)
    return tilefold.score(lambda s, h, q, k: s - s * entries[h] * tilefold.log(q - k + 2))


CASES: dict[str, tuple[Makes, tuple[tuple[int, ...], ...]]] = {
    "full bias, logarithms of distances": (
        lambda a, b: {"score": [tilefold.bias(a), logarithmic(b)], "mask": causal()},
        ((2, 4, 5, 6), (4,)),
    ),
    "list with broadcast arrays, sink": (
        lambda a, b, c: {
            "score": [tilefold.bias(a), tilefold.softcap(2.0), tilefold.temperature(b)],
            "sinks": c,
        },
        ((2, 1, 1, 6), (4, 5, 1), (4,)),
    ),
    "slopes, window, several sinks": (
        lambda a, b: {"score": tilefold.alibi(a), "mask": causal() & local(2), "sinks": b},
        ((2, 4), (4, 2)),
    ),
    "buckets, dropout": (
        lambda a: {"score": tilefold.relative_bias(a, max_distance=9), "dropout": 0.4, "seed": 3},
        ((4, 8),),
    ),
    "window bias, own score of a scalar": (
        lambda a, b: {"score": [tilefold.window_bias(a), own(b)]},
        ((4, 3, 5), ()),
    ),
    "one array twice": (
        lambda a: {"score": [tilefold.bias(a), tilefold.temperature(a)], "layout": "bnhd"},
        ((4, 1, 1),),
    ),
}


@pytest.mark.feature("T09")
@pytest.mark.parametrize("case", CASES)
def test_first_and_second_derivatives_in_every_mode_are_those_of_differences(case: str) -> None:
    make, shapes = CASES[case]
    given = [x.requires_grad_() for x in randoms(*SHAPES, *shapes)]
    if "window bias" in case:  # as many queries as keys
        given[0] = torch.cat([given[0], given[0][:, :, :1]], 2).detach().requires_grad_()

    def function(*given: Tensor) -> Any:
        options = make(*given[3:])
        axes = LAYOUTS[options.get("layout", "bhnd")]
        qkv = [x.permute(axes) for x in given[:3]]
        return attention(*qkv, return_lse=True, **options)

    fast = {"fast_mode": True}
    assert torch.autograd.gradcheck(function, given, check_forward_ad=True, **fast)
    assert torch.autograd.gradgradcheck(function, given, check_fwd_over_rev=True, **fast)


ARRAYS = (2, 1, 5, 6), (4,), (4, 2)
MASK = causal() & local(3)


def ours(*given: Tensor) -> Tensor:
    """Everything at once."""
    q, k, v, bias, slopes, sinks = given
    score = [tilefold.bias(bias), tilefold.softcap(2.0), tilefold.alibi(slopes)]
    made: Tensor = attention(q, k, v, mask=MASK, score=score, sinks=sinks, dropout=0.3, seed=5)
    return made


def dense(*given: Tensor) -> Tensor:
    """The same by torch's own operations."""
    q, k, v, bias, slopes, sinks = given
    (batch, heads, len_q, dim), len_k = q.shape, k.shape[2]
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    far = torch.arange(len_k) - torch.arange(len_q)[:, None] - (len_k - len_q)
    s = 2 * torch.tanh((q @ k.mT / dim**0.5 + bias) / 2) - slopes[:, None, None] * far.abs()
    s = s.masked_fill(torch.from_numpy(~MASK.to_dense(len_q, len_k)), -torch.inf)
    more = sinks[:, None].expand(batch, heads, len_q, -1)
    p = torch.cat([s, more], -1).softmax(-1)[..., :len_k]
    kept = dropout_mask(5, 0.3, batch=batch, heads=heads, rows=len_q, columns=len_k)
    return (torch.from_numpy(kept).double() / 0.7 * p) @ v


def squares(function: Any) -> Any:
    return lambda *given: function(*given).square().sum()


EVERY = tuple(range(6))
WAYS: dict[str, Callable[[Any], Any]] = {
    "jvp": lambda f: lambda *given: jvp(f, given, given),
    "jacfwd": lambda f: jacfwd(f, EVERY),
    "jacrev": lambda f: jacrev(lambda *given: f(*given)[:, :2, :3, 0], EVERY),
    "hessian": lambda f: hessian(squares(f), (0, 3, 4, 5)),
    "vmap": lambda f: vmap(f, in_dims=(0, None, 1, 0, 1, 1)),
    "vmap of grad": lambda f: vmap(grad(squares(f), EVERY), in_dims=(0, None, 1, 0, 1, 1)),
    "vmap of grad, arrays shared": lambda f: vmap(
        grad(squares(f), EVERY), in_dims=(0, None, 1, None, None, None)
    ),
    "grad of vmap": lambda f: grad(
        lambda *given: vmap(f, in_dims=(0, None, 1, None, 1, 1))(*given).square().sum(), EVERY
    ),
}


@pytest.mark.feature("T09")
@pytest.mark.parametrize("way", WAYS)
def test_transforms_give_what_they_give_of_dense_operations(way: str) -> None:
    given = randoms(*SHAPES, *ARRAYS)
    if "vmap" in way:
        several = [torch.stack([x, x / 2, 2 * x]) for x in given]
        given[0], given[2] = several[0], several[2].movedim(0, 1)
        if "shared" not in way:
            given[4:] = several[4].movedim(0, 1), several[5].movedim(0, 1)
        if way in ("vmap", "vmap of grad"):
            given[3] = several[3]
    found, expected = (tree_leaves(WAYS[way](f)(*given)) for f in (ours, dense))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_pairs_that_fall_out_are_those_of_the_definition() -> None:
    walk = Walk(Truth(True), 2, 2, 2, 300, 301, block=256)
    expected = torch.from_numpy(dropout_mask(-7, 0.3, batch=2, heads=4, rows=300, columns=301))
    expected = expected.unflatten(1, (2, 2))[None].expand(2, -1, -1, -1, -1, -1)
    seeds = torch.tensor([[-7], [-7]])
    for step in walk.steps(2, "cpu"):
        for seed in (seeds, seeds[:1]):
            found = Kept(0.3).read(seed, walk.pairs(step, "cpu", indexed=True))
            part = expected[(*step.heads, slice(None), step.queries, step.keys)]
            assert torch.equal(
                found.expand(part.flatten(0, 2).flatten(1, 2).shape).view_as(part), part
            )


def second(function: Any, given: list[Tensor], do: Tensor) -> tuple[Tensor, ...]:
    """The gradients of a half of the squares of the gradients."""
    given = [x.clone().requires_grad_() for x in given]
    first = torch.autograd.grad(function(*given), given, do, create_graph=True)
    found: tuple[Tensor, ...] = torch.autograd.grad(first, given, [x.detach() for x in first])
    return found


class Watching(TorchDispatchMode):
    """Sees operations, and counts the bytes of the tensors that live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = call(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self.seen:
                self._add(storage)
        return made

    def _add(self, storage: Any) -> None:
        number, size = storage._cdata, storage.nbytes()
        self.seen.add(number)
        self.now += size
        self.most = max(self.most, self.now)

        def forget() -> None:
            self.seen.discard(number)
            self.now -= size

        weakref.finalize(storage, forget)


def test_several_tiles_are_those_of_dense_operations_and_memory_is_linear() -> None:
    """And modes that watch operations see the same numbers."""
    most = []
    for length in (400, 800):
        shapes = (1, 2, length, 8), (1, 1, length, 8), (1, 1, length, 4)
        given = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        given += [torch.rand(length, dtype=torch.float64), *randoms((2,), (2, 2))]
        do = torch.randn(1, 2, length, 4, dtype=torch.float64)
        if not most:
            found, expected = (second(f, given, do) for f in (ours, dense))
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
            assert all(map(torch.equal, found, second(ours, given, do)))
        with Watching() as watching:
            watched = second(ours, given, do)
        if not most:
            for one, other in zip(watched, found, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
        most.append(watching.most)
    assert most[1] < 1.5 * most[0], most


def test_a_bias_of_minus_infinity_hides_the_pair_from_all_derivatives() -> None:
    q, k, v, bias, scale = randoms(*SHAPES, (5, 6), (4, 1, 1))
    bias[2:, 3] = bias[4] = -torch.inf
    do = torch.ones(2, 4, 5, 2, dtype=torch.float64)

    def function(mask: Any) -> Any:
        def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
            score = [tilefold.bias(bias), tilefold.temperature(scale)]
            made: Tensor = attention(q, k, v, score=score, mask=mask)
            return made

        return call

    hidden = tilefold.dense(torch.isfinite(bias).numpy())
    given = [q, k, v, bias, scale]
    found = second(function(None), given, do)
    finite = [*given[:3], bias.masked_fill(bias.isinf(), 7.0), scale]
    for one, other in zip(found, second(function(hidden), finite, do), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_other_types_of_arrays_and_further_results() -> None:
    """Tensors of float32 with arrays of other types, also of NumPy; the largest score."""
    given = [x.float() for x in randoms(*SHAPES)]
    (wide,) = randoms((6,))
    sinks = torch.tensor([0.5, -torch.inf, 1, 2]).half()

    def call(q: Tensor, wide: Tensor, sinks: Tensor) -> Any:
        score = [tilefold.bias(wide), tilefold.bias(np.arange(6) / 6)]
        options: dict[str, Any] = {"score": score, "sinks": sinks, "return_max": True}
        return attention(q, *given[1:], **options)

    inputs = given[0], wide, sinks
    (o, largest), (moved, still) = jvp(call, inputs, tuple([torch.ones_like(x) for x in inputs]))
    for found, want in zip((o, largest), call(*inputs), strict=True):
        torch.testing.assert_close(found, want)
    assert moved.isfinite().all() and not still.any()
    step = 1e-2
    ends = [call(given[0] + t, wide + t, sinks.float() + t)[0] for t in (step, -step)]
    torch.testing.assert_close(moved, (ends[0] - ends[1]) / (2 * step), rtol=1e-3, atol=1e-4)
    slopes = grad(lambda *given: call(*given)[0].square().sum(), (0, 1, 2))(*inputs)
    assert [x.dtype for x in slopes] == [torch.float32, torch.float64, torch.float16]


def test_the_backward_pass_alone_has_derivatives() -> None:
    q, k, v, bias, sinks = randoms(*SHAPES, (4, 1, 6), (4,))
    options = {"score": tilefold.bias(bias), "sinks": sinks}
    o, lse = attention(q, k, v, return_lse=True, **options)
    do, dlse = torch.ones_like(o), torch.ones_like(lse)

    def backward(*given: Tensor) -> Any:
        *six, dlse, bias, sinks = given
        score = tilefold.bias(bias)
        return attention_backward(*six, dlse=dlse, score=score, sinks=sinks)

    given = do, q, k, v, o, lse, dlse, bias, sinks
    plain = [x.clone().requires_grad_() for x in given]
    fast = {"fast_mode": True}
    assert torch.autograd.gradcheck(backward, plain, check_forward_ad=True, **fast)
    several = [torch.stack([x, 2 * x]) for x in given[:1]]
    found = vmap(backward, in_dims=(0, *[None] * 8))(*several, *given[1:])
    for entry in range(2):
        for one, other in zip(found, backward(several[0][entry], *given[1:]), strict=True):
            torch.testing.assert_close(one[entry], other, rtol=1e-12, atol=1e-13)


def test_every_entry_of_vmap_has_the_batch_and_the_seed_of_its_own_call() -> None:
    q, k, v, array = (torch.stack([x, -x]) for x in randoms(*SHAPES, (2,)))

    def call(q: Tensor, k: Tensor, v: Tensor, array: Tensor) -> Tensor:
        entries = tilefold.table(array)
        score = tilefold.score(lambda s, b: s + b * entries[b])
        made: Tensor = attention(q, k, v, score=score, dropout=0.5, seed=1)
        return made

    found = vmap(call)(q, k, v, array)
    for one, *given in zip(found, q, k, v, array, strict=True):
        assert torch.equal(one, call(*given))

    def random(q: Tensor) -> Tensor:
        made: Tensor = attention(q, k[0], v[0], dropout=0.5)
        return made

    same = torch.stack([q[0], q[0]])
    torch.manual_seed(0)
    one, other = vmap(random, randomness="same")(same)
    assert torch.equal(one, other)
    one, other = vmap(random, randomness="different")(same)
    assert not torch.equal(one, other)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(random)(same)


def test_compiled_functions_leave_their_graph_for_forward_mode() -> None:
    """Operators of PyTorch would lose the tangents without a word."""
    torch._dynamo.reset()
    q, k, v, array = randoms(*SHAPES, (4, 1, 6))
    score = tilefold.bias(array)

    def call(q: Tensor) -> Tensor:
        made: Tensor = attention(q, k, v) + attention(q, k, v, score=score)
        return made

    def function(q: Tensor) -> Any:
        return jvp(call, (q,), (q,))

    torch.testing.assert_close(torch.compile(function, backend="eager")(q), function(q))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="forward mode, and transforms of"):
        torch.compile(function, backend="eager", fullgraph=True)(q)


@pytest.mark.parametrize("empty", [(1, 2, 0, 3), (0, 2, 4, 3)], ids=["no queries", "no batch"])
def test_empty_calls_have_empty_derivatives(empty: tuple[int, ...]) -> None:
    q, k = torch.ones(empty), torch.ones(empty[0], 2, 4, 3)
    sinks, array = torch.ones(2, requires_grad=True), torch.ones(4, requires_grad=True)

    def call(q: Tensor) -> Tensor:
        made: Tensor = attention(q, k, k, score=tilefold.bias(array), sinks=sinks)
        return made

    assert hessian(lambda q: call(q).sum())(q).shape == empty * 2
    first = torch.autograd.grad(call(q).sum(), (sinks, array), create_graph=True)
    assert [x.tolist() for x in first] == [[0, 0], [0, 0, 0, 0]]
