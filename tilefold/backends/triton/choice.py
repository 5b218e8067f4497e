"""The blocks of a kernel on an architecture: what is asked for, or the table's row, if it fits."""

from __future__ import annotations

from dataclasses import dataclass

from tilefold.backends.triton.architectures import Architecture
from tilefold.backends.triton.spec import Blocks


@dataclass(frozen=True)
class Choice:
    """Blocks, whether operands are held, and why, in words."""

    operation: str
    blocks: Blocks
    held: bool
    reasons: tuple[str, ...] = ()

    def explain(self) -> list[str]:
        """Lines of text."""
        kept = "held" if self.held else "loaded again for each tile"
        return [f"{self.operation}: {self.blocks}, {kept}", *(f"  {why}" for why in self.reasons)]


def choose(
    architecture: Architecture,
    operation: str,
    dtype: str,
    dim: int,
    dim_v: int,
    *,
    products: str = "ieee",
    blocks: Blocks | None = None,
    held: bool | None = None,
) -> Choice:
    """The blocks of a kernel. Raises ValueError for blocks that the architecture cannot hold."""
    widest = max(dim, dim_v)
    if blocks is None:
        rows = 64 if widest <= 128 else 32
        blocks = Blocks(rows, 64 if widest <= 64 else 32, 4, 2)
    return Choice(operation, blocks, True if held is None else held)
