"""Options that say what attention is asked to do, without data: sizes, type and mask."""

from __future__ import annotations

import argparse

from tilefold.masks.position_rules import Rule
from tilefold.problems.attention import ITEM_BYTES, Problem, default_scale
from tilefold.problems.request import PRECISIONS

SHAPE = "BATCH,HEADS,LENGTH,DIM"


def shape(text: str) -> tuple[int, int, int, int]:
    """`1,8,2048,64` as four numbers. Raises ValueError."""
    try:
        batch, heads, length, dim = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"a shape is four integers such as 1,8,2048,64 ({SHAPE}), not {text!r}"
        ) from None
    return batch, heads, length, dim


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Options for what may differ between queries and keys."""
    parser.add_argument("--len-k", type=int, help="keys, where they are not as many as queries")
    parser.add_argument("--heads-kv", type=int, help="heads of keys and values (grouped queries)")
    parser.add_argument("--dim-v", type=int, help="the dimension of values, where it is another")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """The option `--dtype`."""
    parser.add_argument(
        "--dtype", choices=tuple(ITEM_BYTES), default="float32", help="element type"
    )


def add_precision(parser: argparse.ArgumentParser) -> None:
    """The option `--precision`."""
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="highest", help="of products in float32"
    )


def kind(dtype: str, precision: str) -> str:
    """A type, and the precision of its products where it is not the highest: `float32 (high)`."""
    return dtype if precision == "highest" else f"{dtype} ({precision})"


def problem(options: argparse.Namespace, text: str, mask: Rule, dtype: str) -> Problem:
    """The problem of a shape's text and the options of `add_sizes` and `add_precision`."""
    batch, heads, length, dim = shape(text)
    return Problem(
        batch=batch,
        heads_q=heads,
        heads_kv=heads if options.heads_kv is None else options.heads_kv,
        len_q=length,
        len_k=length if options.len_k is None else options.len_k,
        dim=dim,
        dim_v=dim if options.dim_v is None else options.dim_v,
        dtype=dtype,
        scale=default_scale(dim),
        mask=mask,
        precision=options.precision if dtype == "float32" else "highest",
    )
