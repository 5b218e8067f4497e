"""The options that describe a problem of attention without data: sizes, type and precision."""

from __future__ import annotations

import argparse
from typing import Any

from tilefold.masks.position_rules import Rule
from tilefold.problems.attention import ITEM_BYTES, Problem, default_scale
from tilefold.problems.request import PRECISIONS
from tilefold.scores.parse import parse_score
from tilefold.scores.score import Score

SHAPE = "BATCH,HEADS,LENGTH,DIM"


def shape(text: str) -> tuple[int, int, int, int]:
    """The four sizes of a text such as `1,8,2048,64`. Raises ValueError."""
    try:
        batch, heads, length, dim = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"a shape is four integers such as 1,8,2048,64 ({SHAPE}), not {text!r}"
        ) from None
    return batch, heads, length, dim


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Add the options for sizes of keys and values that differ from the sizes of queries."""
    parser.add_argument("--len-k", type=int, help="number of keys (default: as for queries)")
    parser.add_argument("--heads-kv", type=int, help="heads of keys and values (grouped queries)")
    parser.add_argument("--dim-v", type=int, help="dimension of values (default: as for keys)")


def add_dtype(parser: argparse.ArgumentParser, *more: str) -> None:
    """Add the option `--dtype`, with more types than attention has."""
    parser.add_argument(
        "--dtype", choices=(*ITEM_BYTES, *more), default="float32", help="element type"
    )


def add_precision(parser: argparse.ArgumentParser) -> None:
    """Add the option `--precision`."""
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="highest",
        help="least precision of products of float32 arrays",
    )


def add_score(parser: Any) -> None:
    """Add the option `--score`."""
    parser.add_argument("--score", metavar="SCORE", help='such as "[softcap(50), alibi()]"')


def add_sinks_and_dropout(parser: argparse.ArgumentParser) -> None:
    """Add the options `--sinks` and `--dropout`."""
    parser.add_argument("--sinks", type=int, default=0, help="number of sinks of each head")
    parser.add_argument("--dropout", type=float, default=0.0, help="probability, in [0, 1)")


def score(options: argparse.Namespace) -> Score | None:
    """The score of the option `--score`, with its arrays; None without it. Raises ValueError."""
    return None if options.score is None else parse_score(options.score)


def kind(dtype: str, precision: str) -> str:
    """A type, and the precision of its products unless it is the highest: `float32 (high)`."""
    return dtype if precision == "highest" else f"{dtype} ({precision})"


def problem(
    options: argparse.Namespace, text: str, mask: Rule, dtype: str, modified: Score | None = None
) -> Problem:
    """The problem of a shape such as `1,8,2048,64`, a mask, a type, and the parsed options."""
    batch, heads, length, dim = shape(text)
    sinks = getattr(options, "sinks", 0)
    if sinks < 0:
        raise ValueError(f"--sinks must be 0 or more, not {sinks}")
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
        score=None if modified is None else modified.form.score,
        sinks=sinks,
        dropout=getattr(options, "dropout", 0.0),
    )
