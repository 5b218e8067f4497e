"""What two processes compute together; each prints a line for what it has found to be equal."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.experimental import local_map
from torch.nn.parallel import DistributedDataParallel

import tilefold
from tilefold import attention, causal

RANDOM = torch.Generator().manual_seed(0)
X = torch.randn(4, 5, 8, generator=RANDOM)
Q = torch.randn(2, 4, 5, 8, generator=RANDOM)


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


def of_parts(mesh: Any) -> None:
    """Heads or batches lie in parts, and each process computes its own."""
    q = Q.clone().requires_grad_()
    o = attention(q, q, q, mask=causal(), score=tilefold.softcap(3.0))
    o.square().sum().backward()
    for name, axis in (("batch", 0), ("heads", 1)):
        parts = distribute_tensor(Q, mesh, [Shard(axis)]).requires_grad_()
        run = local_map(
            lambda q: attention(q, q, q, mask=causal(), score=tilefold.softcap(3.0)),
            out_placements=[Shard(axis)],
            in_placements=([Shard(axis)],),
        )
        found = run(parts)
        found.square().sum().backward()
        torch.testing.assert_close(whole(found), o)
        torch.testing.assert_close(whole(parts.grad), q.grad)
        assert parts.grad.placements == (Shard(axis),)
        print(f"local_map over {name}", flush=True)


def main(rank: int, file: str) -> None:
    """Meet the other process at a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    of_models(rank, mesh)
    of_parts(mesh)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
