"""`tilefold mask`: draw a rule and its tiles, or the weights that a score gives."""

from __future__ import annotations

import argparse
from typing import Any

from tilefold.commands import specification, terminal
from tilefold.masks import parse, picture
from tilefold.masks.position_rules import Rule
from tilefold.scores import picture as heat
from tilefold.scores.score import Score


def register(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "mask",
        help="draw a mask, or the weights of a score, in the terminal or to a file",
        description="Draw which query sees which key; mark tiles as skipped, full or partial. With"
        " --score draw the weights of scores that are 0 before the score modifies them.",
        epilog=terminal.EXIT_CODES,
    )
    parser.set_defaults(main=main)
    parser.add_argument("rule", help='such as "causal() & (local(256) | prefix(4))"')
    specification.add_score(parser)
    parser.add_argument("--len-q", type=int, default=16, help="number of queries (default 16)")
    parser.add_argument("--len-k", type=int, help="number of keys (default: as for queries)")
    parser.add_argument("--block-q", type=int, help="number of queries in a tile")
    parser.add_argument("--block-k", type=int, help="number of keys in a tile")
    parser.add_argument("--batch", type=int, default=1, help="batch, if the rule depends on it")
    parser.add_argument("--heads", type=int, default=1, help="heads, if the rule depends on them")
    parser.add_argument("--b", type=int, default=0, help="the batch entry to draw")
    parser.add_argument("--h", type=int, default=0, help="the head to draw")
    parser.add_argument("--save", metavar="FILE", help="write the picture to FILE (.svg or .png)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def main(options: argparse.Namespace) -> int:
    """Draw the mask."""
    rule = parse.parse(options.rule)
    len_k = options.len_q if options.len_k is None else options.len_k
    score = specification.score(options)
    if score is not None:
        return _weights(options, rule, score, len_k)
    drawn = picture.draw(
        rule,
        options.len_q,
        len_k,
        options.block_q,
        options.block_k,
        batch=options.batch,
        heads=options.heads,
        b=options.b,
        h=options.h,
    )
    if options.save:
        picture.save(drawn, options.save)
    if options.json:
        tiles = drawn.counts._asdict() | {"block_q": drawn.block_q, "block_k": drawn.block_k}
        sizes = {"len_q": options.len_q, "len_k": len_k}
        terminal.print_json({"mask": str(rule), **sizes, "tiles": tiles, "saved": options.save})
        return 0
    _show(drawn, options.save)
    return 0


def _weights(options: argparse.Namespace, rule: Rule, score: Score, len_k: int) -> int:
    """Draw the weights of a score."""
    for name in ("block_q", "block_k"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for masks: leave it out with --score")
    planes = {name: getattr(options, name) for name in ("batch", "heads", "b", "h")}
    drawn = heat.draw(score, options.len_q, len_k, rule, **planes)
    if options.save:
        heat.save(drawn, options.save)
    if options.json:
        sizes = {"len_q": options.len_q, "len_k": len_k}
        terminal.print_json(
            {"mask": str(rule), "score": str(score), **sizes, "saved": options.save}
        )
    else:
        _show(drawn, options.save)
    return 0


def _show(drawn: object, saved: str | None) -> None:
    terminal.out().print(drawn)
    if saved:
        terminal.notes().print(f"written to {saved}", soft_wrap=True)
