"""Masks made of functions: `create_block_mask`, and PyTorch's own `BlockMask`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as theirs

from tilefold.frontends.torch.flex.requests import rule_of

MaskMod = Callable[[Any, Any, Any, Any], Any]
BLOCK = 128
"""The block of PyTorch's masks."""
_SLICED = getattr(theirs, "_sliced_mask_mod_error", "none")  # from torch 2.10 on


class BlockMask:
    """A function that says which query sees which key, and the sizes that it is asked for.

    >>> import tilefold.torch
    >>> mask = tilefold.torch.create_block_mask(lambda b, h, q, k: q >= k, None, None, 256, 384)
    >>> mask
    BlockMask(shape=(1, 1, 256, 384), BLOCK_SIZE=(128, 128))
    >>> mask.to_dense().int()
    tensor([[[[1, 0, 0],
              [1, 1, 0]]]], dtype=torch.int32)

    It holds no array of blocks: a call finds the tiles that it skips from the function.
    """

    def __init__(
        self,
        mask_mod: MaskMod,
        shape: tuple[int, int, int, int],
        block_size: tuple[int, int],
        device: Any = None,
    ) -> None:
        self.mask_mod, self.shape, self.BLOCK_SIZE = mask_mod, shape, block_size
        self.device = device

    @property
    def seq_lengths(self) -> tuple[int, int]:
        """The numbers of queries and keys."""
        return self.shape[-2], self.shape[-1]

    def numel(self) -> int:
        """The number of pairs."""
        return int(torch.Size(self.shape).numel())

    def to_dense(self) -> Tensor:
        """Which blocks have a visible pair: bool, (batch, heads, blocks of queries, of keys)."""
        return self._blocks() > 0

    def sparsity(self) -> float:
        """How many blocks have no visible pair, in percent."""
        return 100.0 * (1.0 - float(self.to_dense().float().mean()))

    def _blocks(self) -> Tensor:
        """2 for a block all of whose pairs are visible, 1 for a part of them, 0 for none."""
        batch, heads, len_q, len_k = self.shape
        rule, (block_q, block_k) = rule_of(self.mask_mod, self.shape), self.BLOCK_SIZE
        rows = []
        for start in range(0, len_q, block_q):
            queries = min(block_q, len_q - start)
            piece = rule.window(len_q, len_k, q0=start).to_dense(queries, len_k, batch, heads)
            blocks = [x.flatten(2) for x in torch.split(torch.from_numpy(piece), block_k, 3)]
            rows.append(torch.stack([x.any(-1).int() + x.all(-1).int() for x in blocks], -1))
        return torch.stack(rows, 2)

    def __getitem__(self, index: Any) -> BlockMask:
        """The mask of some batch entries, heads, and blocks of queries: integers or slices."""
        starts, sizes = [], []
        given = index if isinstance(index, tuple) else (index,)
        every = (1, 1, self.BLOCK_SIZE[0])
        for axis, (size, step) in enumerate(zip(self.shape[:3], every, strict=True)):
            blocks = range(-(-size // step))
            x = given[axis] if axis < len(given) else slice(None)
            if not isinstance(x, (int, slice)) or len(given) > 3:
                raise NotImplementedError(
                    "a BlockMask takes an integer or a slice for each of batch, head and block of"
                    f" queries, got {index}"
                )
            part = blocks[x] if isinstance(x, slice) else blocks[x : x + 1 or None]
            if isinstance(x, int) and not -len(blocks) <= x < len(blocks):
                raise IndexError(
                    f"index {x} is out of bounds for axis {axis} of size {len(blocks)}"
                )
            if part.step != 1:
                raise NotImplementedError(f"slices of a BlockMask have the step 1, got {x}")
            starts.append(part.start * step)
            sizes.append(max(min(size, part.stop * step) - part.start * step, 0))
        b0, h0, q0 = starts

        def shifted(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return self.mask_mod(b + b0, h + h0, q_idx + q0, kv_idx)

        batch, heads, len_q = sizes
        return BlockMask(
            shifted, (batch, heads, len_q, self.shape[3]), self.BLOCK_SIZE, self.device
        )

    def _adjust(self, new_q_len: int, new_kv_len: int) -> BlockMask:
        """The mask for other numbers of queries and keys, as torch names it."""
        shape = (self.shape[0], self.shape[1], new_q_len, new_kv_len)
        return BlockMask(self.mask_mod, shape, self.BLOCK_SIZE, self.device)

    def to(self, device: Any) -> BlockMask:
        """The mask itself, for another device: a function has none."""
        return BlockMask(self.mask_mod, self.shape, self.BLOCK_SIZE, device)

    def __repr__(self) -> str:
        return f"BlockMask(shape={self.shape}, BLOCK_SIZE={self.BLOCK_SIZE})"


def create_block_mask(
    mask_mod: MaskMod,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: Any = None,
    BLOCK_SIZE: int | tuple[int, int] = BLOCK,
    _compile: bool = False,
    **options: Any,
) -> BlockMask:
    """A mask for `flex_attention`, with the arguments of torch's function.

    >>> import tilefold.torch
    >>> def window(b, h, q_idx, kv_idx):
    ...     return (q_idx >= kv_idx) & (q_idx - kv_idx < 256)
    >>> tilefold.torch.create_block_mask(window, B=None, H=None, Q_LEN=1024, KV_LEN=1024)
    BlockMask(shape=(1, 1, 1024, 1024), BLOCK_SIZE=(128, 128))

    Nothing of Q_LEN x KV_LEN is made: the function is kept, and asked in every call.

    Arguments:
        mask_mod: a function of b, h, q_idx, kv_idx, scalar tensors, that returns a truth
        B, H: the batch and the heads of queries; None means that they do not matter
        Q_LEN, KV_LEN: the numbers of queries and keys
        BLOCK_SIZE: the blocks of `to_dense` and `sparsity`; kernels choose their own
        device, _compile, and torch's other options: have no effect

    Raises TypeError unless mask_mod is a function.
    """
    if not callable(mask_mod):
        raise TypeError(f"create_block_mask: mask_mod must be a function, got {mask_mod!r}")
    block = (BLOCK_SIZE, BLOCK_SIZE) if isinstance(BLOCK_SIZE, int) else BLOCK_SIZE
    return BlockMask(mask_mod, (B or 1, H or 1, Q_LEN, KV_LEN), block, device)


def mask_mod_of(mask: Any) -> MaskMod | None:
    """The function of a mask, ours or torch's; of torch's without one that of its blocks."""
    if mask is None:
        return None
    function: MaskMod = mask.mask_mod
    if isinstance(mask, BlockMask):
        return function
    if function is _SLICED:
        raise RuntimeError("flex_attention: a sliced BlockMask of torch has no mask_mod")
    if function is not theirs.noop_mask:
        return function
    block_q, block_k = mask.BLOCK_SIZE
    if max(block_q, block_k) >= 2**30:  # torch's mask of a call without one
        return None
    blocks = mask.to_dense().bool()
    batch, heads = blocks.shape[0] > 1, blocks.shape[1] > 1

    def seen(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return blocks[b if batch else 0, h if heads else 0, q_idx // block_q, kv_idx // block_k]

    return seen
