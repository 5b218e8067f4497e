"""What two processes compute together; each prints a line for what it has found to be equal."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import tilefold
from tilefold import attention, attention_backward, causal

RANDOM = torch.Generator().manual_seed(0)
X = torch.randn(4, 5, 8, generator=RANDOM)


class Model(nn.Module):
    """A linear layer, and attention with learned sinks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.sinks = nn.Linear(8, 24), nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        """Rows (batch, length, 8)."""
        q, k, v = self.linear(x).unflatten(-1, (3, 2, 4)).unbind(2)
        o: Tensor = attention(q, k, v, mask=causal(), sinks=self.sinks, layout="bnhd")
        return o.flatten(2)


def whole(x: Any) -> Tensor:
    """A tensor that may lie in parts."""
    made: Tensor = x.full_tensor() if isinstance(x, DTensor) else x
    return made


def of_models(rank: int, mesh: Any) -> None:
    """Gradients of halves of the batch, averaged, are those of the whole batch."""
    model = Model()
    model(X).square().mean().backward()
    want = [x.grad for x in model.parameters()]
    for name, wrapped in (
        ("DDP", DistributedDataParallel(Model())),
        ("FSDP", fully_shard(Model(), mesh=mesh)),
    ):
        wrapped(X[2 * rank : 2 * rank + 2]).square().mean().backward()
        for one, other in zip(wrapped.parameters(), want, strict=True):
            torch.testing.assert_close(whole(one.grad), other, rtol=1e-5, atol=1e-7)
        print(name, flush=True)


LENGTHS = tilefold.lengths([3, 5])


def everything(*given: Tensor) -> tuple[Tensor, Tensor]:
    """What asks for the batch and the head: lengths, slopes of heads, a bias, sinks."""
    q, k, bias, sinks = given
    score = [tilefold.bias(bias), tilefold.alibi()]
    made: tuple[Tensor, Tensor] = attention(
        q, k, k, mask=LENGTHS, score=score, sinks=sinks, return_lse=True
    )
    return made


def of_parts(mesh: Any) -> None:
    """Heads or batches lie in parts, and each process computes its own; others are gathered."""
    shapes = (2, 4, 5, 8), (2, 2, 5, 8), (2, 4, 5, 5), (4, 2)
    given = [torch.randn(shape, generator=RANDOM).requires_grad_() for shape in shapes]
    o, lse = everything(*given)
    (o.square().sum() + lse.sum()).backward()
    for name, place, lies in (
        ("batch", Shard(0), Shard(0)),
        ("heads", Shard(1), Shard(1)),
        ("length", Shard(2), Replicate()),
    ):
        parts = [distribute_tensor(x.detach(), mesh, [place]) for x in given[:2]]
        parts += [distribute_tensor(x.detach(), mesh, [Replicate()]) for x in given[2:]]
        for x in parts:
            x.requires_grad_()
        found = everything(*parts)
        assert [x.placements for x in found] == [(lies,), (lies,)]
        (found[0].square().sum() + found[1].sum()).backward()
        for one, other in zip(found, (o, lse), strict=True):
            torch.testing.assert_close(whole(one), other)
        for one, other in zip(parts, given, strict=True):
            torch.testing.assert_close(whole(one.grad), other.grad)
        print(name, flush=True)
    same = everything(*parts[:2], *[x.detach() for x in given[2:]])  # arrays that all have
    torch.testing.assert_close(whole(same[0]), o)


def refused(mesh: Any) -> None:
    """What has no parts says so."""
    q, k = (
        distribute_tensor(torch.ones(shape), mesh, [Replicate()])
        for shape in ((2, 4, 5, 8), (2, 2, 5, 8))
    )
    own = torch.ones(4, requires_grad=True)
    for call, words in (
        (lambda: attention(q, k.full_tensor(), k), "k must be a DTensor as the others are"),
        (lambda: attention(q.full_tensor(), k, k), "q must be a DTensor as the others are"),
        (lambda: attention(q, k, k, sinks=own), "sinks must be a DTensor as q is, since it wants"),
        (lambda: attention(q, k, k, dropout=0.1), "dropout of DTensors is not implemented"),
        (lambda: attention(q[0], k, k), "q must have 4 axes, got shape (4, 5, 8)"),
        (
            lambda: attention_backward(q, q, q, q, q, q[..., 0]),
            "attention_backward of DTensors is not implemented",
        ),
    ):
        try:
            call()
        except (TypeError, ValueError, NotImplementedError) as error:
            assert str(error).startswith(words), error
        else:
            raise AssertionError(words)
    print("refused", flush=True)


def main(rank: int, file: str) -> None:
    """Meet the other process at a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    of_models(rank, mesh)
    of_parts(mesh)
    refused(mesh)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
