"""Runs one operation of tilefold on a GPU, for tools that look at kernels.

    PYTHONPATH=.:benchmarks python -m gpu_parts.one forward --form tiled --shape 1,8,4096,128

Several cases are given one after another, with `--` between them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence

from gpu_parts import attend
from gpu_parts.section import Settings, Stage, stage
from tilefold.masks import parse
from tilefold.problems.attention import Problem, default_scale


def arguments() -> argparse.ArgumentParser:
    """What says a case."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("operation", choices=("forward", "backward"))
    parser.add_argument("--form", default="auto", help="of the plan: tiled, hopper, fused, ...")
    parser.add_argument("--shape", default="1,2,256,64", help="batch,heads,length,dim")
    parser.add_argument("--keys", type=int, help="length of keys, where it is another one")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--mask", default="full()")
    parser.add_argument("--repeat", type=int, default=1)
    return parser


def run(words: Sequence[str], on: Stage) -> None:
    """Run a case as often as is asked for."""
    options = arguments().parse_args(words)
    batch, heads, length, dim = (int(part) for part in options.shape.split(","))
    problem = Problem(
        batch=batch,
        heads_q=heads,
        heads_kv=heads,
        len_q=length,
        len_k=options.keys or length,
        dim=dim,
        dim_v=dim,
        dtype=options.dtype,
        scale=default_scale(dim),
        mask=parse.parse(options.mask),
    )
    given = attend.tensors(on, problem)
    if options.operation == "backward":
        given = attend.with_forward(on, problem, given)
    call = attend.own(on, problem, given, options.operation, options.form)
    for _ in range(options.repeat):
        results = call()
    print(f"{' '.join(words)}: sum {sum(float(tensor.float().sum()) for tensor in results):.6g}")


def cases(words: Sequence[str]) -> Iterator[list[str]]:
    """The cases of a command line."""
    for separator, part in itertools.groupby(words, lambda word: word == "--"):
        if not separator:
            yield list(part)


if __name__ == "__main__":
    for each in cases(sys.argv[1:]):
        run(each, stage(Settings()))
