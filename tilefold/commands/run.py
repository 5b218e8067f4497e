"""`tilefold run`: the main job on real text, or attention on a user's own arrays."""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from tilefold import api
from tilefold.commands import main_job, specification, terminal
from tilefold.common import array_files
from tilefold.masks import parse
from tilefold.masks.position_rules import full
from tilefold.problems.request import LAYOUTS

DESCRIPTION = """Without --q, --k, --v: encode real text with a real transformer whose attention is
computed by tilefold, answer a question by the nearest paragraphs, compare with float64, and
measure this machine. With them: compute attention on arrays from .npy, .npz or .safetensors files;
FILE:NAME picks one array of a file."""


def register(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "run",
        help="the main job: real text through a real transformer, or your own arrays",
        description=DESCRIPTION,
        epilog=terminal.EXIT_CODES,
    )
    parser.set_defaults(main=main)
    main_job.add_options(parser.add_argument_group("real text"))
    own = parser.add_argument_group("your own arrays")
    for letter in "qkv":
        own.add_argument(f"--{letter}", metavar="FILE[:NAME]")
    own.add_argument("--out", metavar="FILE", help="the file that o is written to")
    own.add_argument("--lse", metavar="FILE", help="the file for the log-sum-exp (default: none)")
    own.add_argument("--mask", metavar="RULE", help='such as "causal() & local(256)"')
    specification.add_score(own)
    own.add_argument("--layout", choices=tuple(LAYOUTS), help="order of the axes (default: bhnd)")
    own.add_argument("--scale", type=float, help="default: 1 / sqrt(dim)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def main(options: argparse.Namespace) -> int:
    """Run the job that the options ask for."""
    places = {name: getattr(options, name) for name in ("q", "k", "v", "out")}
    given = [name for name, place in places.items() if place is not None]
    if not given:
        for name in ("lse", "mask", "score", "layout", "scale"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name} is for your own arrays: give --q, --k, --v, --out too")
        return main_job.main(options)
    if missing := [f"--{name}" for name in places if name not in given]:
        raise ValueError(f"--{given[0]} asks for {', '.join(missing)} too")
    if options.question is not None:
        raise ValueError(f"a question ({options.question!r}) and --q do not go together")
    for name in ("top", "paragraphs", "picture"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} is for the real text: leave it out with --q")
    _own_arrays(options)
    return 0


def _own_arrays(options: argparse.Namespace) -> None:
    mask = full() if options.mask is None else parse.parse(options.mask)
    score = specification.score(options)
    q, k, v = (array_files.load(getattr(options, name), name) for name in "qkv")
    start = time.perf_counter()
    o, lse = api.attention(
        q,
        k,
        v,
        mask=mask,
        score=score,
        scale=options.scale,
        layout=options.layout or "bhnd",
        return_lse=True,
    )
    seconds = time.perf_counter() - start
    array_files.save(options.out, {"o": o})
    if options.lse:
        array_files.save(options.lse, {"lse": lse})
    if options.json:
        terminal.print_json(
            {
                "out": options.out,
                "lse": options.lse,
                "shape": list(o.shape),
                "dtype": str(o.dtype),
                "mask": str(mask),
                "score": None if score is None else str(score),
                "seconds": seconds,
                "finite": bool(np.isfinite(o).all()),
            }
        )
        return
    shape = ", ".join(map(str, o.shape))
    what = f"o ({shape}) {o.dtype} in {terminal.seconds(seconds)}, compiling included"
    console = terminal.out()
    console.print(f"{what}, written to {options.out}", soft_wrap=True)
    if not np.isfinite(o).all():
        console.print("o holds NaN or infinity, as the inputs make it", soft_wrap=True)
