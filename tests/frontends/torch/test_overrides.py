"""tilefold in the place of torch's own attention: every way there, and on and off."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import tilefold.torch
from tilefold.frontends.torch import overrides, recognised
from tilefold.torch import disable, enable, enabled, stats

sdpa = F.scaled_dot_product_attention
LENGTH = 24
PLACES = torch.arange(LENGTH)
SEEN = PLACES[:, None] >= PLACES
SPARSE = (PLACES[:, None] * 7 + PLACES * 5) % 3 > 0
PADDED = torch.tensor([20, LENGTH])[:, None] > PLACES


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def learned(*shape: int) -> list[Tensor]:
    return [normal(*shape, seed=seed).requires_grad_() for seed in range(3)]


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(recognised, "FEWEST_FLOPS", 0)
    yield
    disable()
    assert not active()


def active() -> bool:
    """Whether a call arrives here."""
    before = stats()["hits"]
    sdpa(*learned(1, 1, 2, 8))
    return bool(stats()["hits"] > before)


def attended(given: list[Tensor], **options: Any) -> Tensor:
    return sdpa(*given, **options)


def plain(given: list[Tensor]) -> list[Tensor]:
    return [x.detach() for x in given]


def inferred(given: list[Tensor]) -> Tensor:
    with torch.inference_mode():
        return sdpa(*given, attn_mask=SPARSE)


def lowered(given: list[Tensor]) -> Tensor:
    with torch.autocast("cpu"):
        return sdpa(*given, attn_mask=SPARSE).float()


def layered(given: list[Tensor]) -> Tensor:
    """Torch's layers, whose fast paths leave out the function."""
    torch.manual_seed(1)
    x = given[0][:, 0].detach()
    heads = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    hidden = ~PADDED
    with torch.no_grad():
        o = layer(x, src_key_padding_mask=hidden)
        o = o + heads(x, x, x, need_weights=False, key_padding_mask=hidden)[0]
    return (o + heads(x, x, x, need_weights=False)[0]).detach()


WAYS: dict[str, tuple[int, Callable[[list[Tensor]], Tensor]]] = {
    "plain": (1, attended),
    "causal": (1, lambda given: attended(given, is_causal=True)),
    "causal from the upper left": (
        1,
        lambda given: sdpa(given[0][:, :, :9], *given[1:], is_causal=True),
    ),
    "a mask of bool": (1, lambda given: attended(given, attn_mask=SPARSE)),
    "a rule": (1, lambda given: attended(given, attn_mask=SEEN)),
    "a mask and causal": (1, lambda given: attended(given, attn_mask=SPARSE, is_causal=True)),
    "padding": (1, lambda given: attended(given, attn_mask=PADDED[:, None, None])),
    "added": (1, lambda given: attended(given, attn_mask=normal(LENGTH, LENGTH, seed=5))),
    "grouped": (
        1,
        lambda given: sdpa(given[0], given[1][:, :2], given[2][:, :2], enable_gqa=True),
    ),
    "wider values": (1, lambda given: sdpa(*given[:2], torch.cat([given[2]] * 2, -1))),
    "three axes": (1, lambda given: attended([x[0] for x in given])),
    "five axes": (1, lambda given: attended([x[None] for x in given])),
    "one head for all": (1, lambda given: sdpa(given[0], given[1][:, :1], given[2][:, :1])),
    "views of layers": (1, lambda given: attended([x.transpose(1, 2) for x in given])),
    "scale": (1, lambda given: attended(given, scale=0.5)),
    "half": (1, lambda given: attended([x.half() for x in given]).float()),
    "bfloat16": (1, lambda given: attended([x.bfloat16() for x in given]).float()),
    "float64": (1, lambda given: attended([x.double() for x in given]).float()),
    "inference": (1, inferred),
    "autocast": (1, lowered),
    "vmap": (
        2,
        lambda given: torch.vmap(lambda q: sdpa(q[None], *(x[:1] for x in given[1:])))(given[0]),
    ),
    "a gradient of torch.func": (
        1,
        lambda given: torch.func.grad(lambda q: attended([q, *plain(given)[1:]]).sum())(
            plain(given)[0]
        ),
    ),
    "layers of torch": (3, layered),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", WAYS)
def test_every_way_arrives_with_the_results_of_torch(name: str) -> None:
    calls, function = WAYS[name]
    given = learned(2, 4, LENGTH, 8)
    want, before = function(given), stats()
    with enabled():
        got = function(given)
    after = stats()
    assert after["hits"] - before["hits"] == calls
    assert after["reasons"] == before["reasons"]
    near = {"rtol": 2e-2, "atol": 2e-2} if name in ("half", "bfloat16", "autocast") else {}
    torch.testing.assert_close(got, want, **near)
    assert got.stride() == want.stride() or name == "layers of torch"
    if want.requires_grad:
        do = normal(*want.shape, seed=9)
        theirs = torch.autograd.grad(want, given, do)
        for one, other in zip(torch.autograd.grad(got, given, do), theirs, strict=True):
            torch.testing.assert_close(
                one, other, rtol=near.get("rtol", 1e-4), atol=near.get("atol", 2e-5)
            )


@pytest.mark.slow
def test_the_mask_gets_its_gradient_and_dropout_its_seed() -> None:
    q, k, v = learned(2, 4, LENGTH, 8)
    mask = normal(2, 1, LENGTH, LENGTH, seed=4).requires_grad_()
    (want,) = torch.autograd.grad(sdpa(q, k, v, mask).square().sum(), mask)
    before = stats()
    with enabled():
        (got,) = torch.autograd.grad(sdpa(q, k, v, mask).square().sum(), mask)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        found = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            found.append(sdpa(q, k, v, dropout_p=0.4))
        assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
        torch.manual_seed(3)
        ours = tilefold.torch.scaled_dot_product_attention(q, k, v, dropout_p=0.4)
        assert torch.equal(ours, found[0])
    assert stats()["hits"] == before["hits"] + 4 and stats()["misses"] == before["misses"]


@pytest.mark.slow
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_operators_lie_as_torch_promises(turned: bool, masked: bool) -> None:
    """Compiled programs rely on the strides, and read lse in torch's own backward pass."""
    flash: Any = torch._scaled_dot_product_flash_attention_for_cpu
    given = [x.detach() for x in learned(2, 4, LENGTH, 8)]
    if turned:
        given = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given]
    mask = normal(LENGTH, LENGTH, seed=3).masked_fill(~SPARSE, -torch.inf) if masked else None
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    do = normal(2, 4, LENGTH, 8, seed=8)
    want = flash(*given, is_causal=True, attn_mask=mask)
    slopes = backward(do, *given, *want, 0.0, True, attn_mask=mask)
    with enabled():
        got = flash(*given, is_causal=True, attn_mask=mask)
        ours = backward(do, *given, *want, 0.0, True, attn_mask=mask)
    assert torch.isfinite(want[1]).all()
    for one, other in zip((*got, *ours), (*want, *slopes), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, check_stride=True)
    theirs = backward(do, *given, *got, 0.0, True, attn_mask=mask)  # after it was disabled
    for one, other in zip(theirs, slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_repeated_small_call_reads_new_numbers_and_new_places() -> None:
    with enabled():
        for number in range(4):
            memory = normal(3 * 2 * 8 + 1, seed=number)
            for start in (0, 1):  # not aligned to a vector
                given = memory[start:][: 3 * 2 * 8].view(3, 1, 1, 2, 8).unbind()
                want = (given[0] @ given[1].mT / 8**0.5).softmax(-1) @ given[2]
                torch.testing.assert_close(sdpa(*given), want)
        for length in range(2, 9):  # decoding
            q, keys = normal(1, 2, 1, 8), normal(1, 2, length, 8, seed=length)
            want = (q @ keys.mT / 8**0.5).softmax(-1) @ keys
            torch.testing.assert_close(sdpa(q, keys, keys), want)


def test_empty_calls() -> None:
    q, k, v = (x.detach() for x in learned(2, 4, LENGTH, 8))
    for given in ((q[:, :, :0], k, v), (q, k[:, :, :0], v[:, :, :0]), (q[:0], k[:0], v[:0])):
        with enabled():
            got = sdpa(*given)
        want = sdpa(*given)
        assert got.shape == want.shape and torch.equal(got, want)


def test_on_and_off() -> None:
    disable()  # nothing was on
    assert not active()
    enable()
    enable()
    assert active()
    disable()
    assert not active()
    with enabled():
        with enabled():
            assert active()
        assert active()
        disable()  # only what `enable` did
        assert active()
    assert not active()
    enable()
    with enabled():
        pass
    assert active()
    disable()
    with pytest.raises(ZeroDivisionError), enabled():
        1 / 0  # noqa: B018
    assert not active()


def test_blocks_of_threads_end_with_the_last() -> None:
    inside, go = threading.Barrier(2), threading.Event()
    found: list[bool] = []

    def block() -> None:
        with enabled():
            inside.wait(10)
            go.wait(10)
            found.append(active())

    thread = threading.Thread(target=block)
    thread.start()
    with enabled():
        inside.wait(10)
    assert active()  # the other block still runs, and the switch is one of the process
    go.set()
    thread.join()
    assert found == [True] and not active()


def test_layers_keep_their_fast_path_afterwards() -> None:
    assert torch.backends.mha.get_fastpath_enabled()
    with enabled():
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.skipif(overrides._registry is None, reason="torch has no registry before 2.13")
def test_the_registry_of_torch_switches_it() -> None:
    attention: Any = torch.nn.attention
    assert "tilefold" in attention.list_flash_attention_impls()
    attention.activate_flash_attention_impl("tilefold")
    assert active()
    attention.restore_flash_attention_impl()
    assert not active()
    enable()
    assert attention.current_flash_attention_impl() == "tilefold"
    attention.restore_flash_attention_impl()
    disable()
    assert attention.current_flash_attention_impl() is None


def test_without_a_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overrides, "_registry", None)
    enable()
    enable()
    assert active()
    disable()
    assert not active()


def test_what_is_left_to_torch_is_said_once_for_each_reason() -> None:
    q, k, v = (x.detach() for x in learned(1, 2, 4, 8))
    infinite = "scale must be a finite number, got inf"
    overrides._counts.said.clear()

    def left() -> None:
        sdpa(q, k, v, scale=float("inf"))

    with enabled():
        before = stats()
        with pytest.warns(RuntimeWarning, match=rf"leaves a call .* to torch's own.*{infinite}"):
            left()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            left()
        with (
            sdpa_kernel(SDPBackend.MATH),
            pytest.warns(RuntimeWarning, match="sdpa_kernel excludes flash attention"),
        ):
            got = sdpa(q, k, v)
        torch.testing.assert_close(got, sdpa(q, k, v))
    after = stats()
    assert after["misses"] == before["misses"] + 3 == sum(after["reasons"].values())
    assert after["reasons"][infinite] == before["reasons"].get(infinite, 0) + 2
    assert after["hits"] == before["hits"] + 1


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ((normal(1, 2, 4, 8), normal(1, 2, 4, 8).double(), normal(1, 2, 4, 8)), {}),
        ((normal(1, 4, 4, 8), *[normal(1, 2, 4, 8)] * 2), {}),
        ((*[normal(1, 2, 4, 8)] * 3, torch.ones(3, 4)), {}),
        ((*[normal(1, 2, 4, 8)] * 3,), {"dropout_p": 2.0}),
    ],
)
def test_what_torch_refuses_it_still_refuses_in_its_words(given: Any, options: Any) -> None:
    before = stats()
    with pytest.raises(RuntimeError) as theirs:
        sdpa(*given, **options)
    with enabled(), pytest.raises(theirs.type) as ours:
        sdpa(*given, **options)
    assert str(ours.value) == str(theirs.value)
    assert stats() == before


@pytest.mark.slow
def test_compiled_programs_arrive() -> None:
    """Torch's flash operator is reached when it runs; for other calls ours is in the graph."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    mask = normal(2, 1, LENGTH, LENGTH, seed=4).requires_grad_()
    q, k, v = learned(2, 4, LENGTH, 8)
    functions: dict[str, tuple[int, Callable[..., Tensor], list[Tensor]]] = {
        "causal": (1, lambda q, k, v: sdpa(q * 1, k, v, is_causal=True), [q, k, v]),
        "a mask": (1, lambda q, k, v: sdpa(q * 1, k, v, SEEN), [q, k, v]),
        "three axes": (0, lambda q, k, v: sdpa(q[0], k[0], v[0], SPARSE), [q, k, v]),
        "a learned mask": (0, lambda q, k, v, mask: sdpa(q, k, v, mask), [q, k, v, mask]),
        "wider values": (0, lambda q, k, v: sdpa(q, k, torch.cat([v, v], -1)), [q, k, v]),
    }
    for name, (calls, function, given) in functions.items():
        want = function(*given)
        slopes = torch.autograd.grad(want.square().sum(), given)
        torch._dynamo.reset()
        nodes: list[str] = []

        def compiler(graph: Any, _: Any, nodes: list[str] = nodes) -> Any:
            nodes += [str(node.target) for node in graph.graph.nodes]
            return make_boxed_func(graph.forward)

        backend = aot_autograd(fw_compiler=compiler)
        with enabled():
            compiled = torch.compile(function, fullgraph=True, backend=backend)
            compiled(*given)
            before = stats()["hits"]
            got = compiled(*given)
            ours = torch.autograd.grad(got.square().sum(), given)
        assert stats()["hits"] == before + calls, name
        assert any("tilefold" in node for node in nodes) is (calls == 0), name
        for one, other in zip((got, *ours), (want, *slopes), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_finds_the_strides_that_it_was_promised() -> None:
    given = [x.detach().transpose(1, 2).requires_grad_() for x in learned(2, LENGTH, 4, 8)]
    want = sdpa(*given, is_causal=True)
    slopes = torch.autograd.grad(want.square().sum(), given)
    torch._dynamo.reset()
    before = stats()["hits"]
    with enabled():
        compiled = torch.compile(
            lambda q, k, v: sdpa(q * 1, k, v, is_causal=True) + 0, fullgraph=True
        )
        got = compiled(*given)
        ours = torch.autograd.grad(got.square().sum(), given)
    assert stats()["hits"] > before
    for one, other in zip((got, *ours), (want, *slopes), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
