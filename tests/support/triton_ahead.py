"""Triton kernels compiled for absent GPUs, in a process that does not interpret them.

    python tests/support/triton_ahead.py < tasks.json

A task is {file, entry, signature, constants, aligned, options, target}. The answer to each task is
a line of JSON: {"shared": bytes, "assembly": counts of instructions}, or {"failure": one line}.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

INSTRUCTIONS = (
    *("wgmma.mma_async", "tcgen05.mma", "mma.sync", "cp.async.bulk.tensor", "cp.async.cg"),
    *(
        "ld.global.v4",
        "st.global.v4",
        "ld.global.b16",
        "shfl.sync",
        "ld.shared",
        "st.shared",
        "v_mfma",
    ),
)

Task = Mapping[str, Any]


def compiled(tasks: Sequence[Task], cache: Path, python: str = sys.executable) -> list[Any]:
    """The compiler's answer to each task; `cache` is the folder of Triton's cache for this call."""
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run(
        [python, __file__],
        input=json.dumps(tasks),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # a failing Triton prints all of its intermediate code
        text=True,
        env=environment,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    missing = len(tasks) - len(answers)
    return answers + [{"failure": f"the compiler ended with code {done.returncode}"}] * missing


def answer(task: Task) -> dict[str, Any]:
    """Compile one task."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name = f"module_{abs(hash(task['file']))}"
    spec = importlib.util.spec_from_file_location(name, task["file"])
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    function = getattr(module, task["entry"])
    kind: Any = ASTSource
    if function.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as kind
    names = function.arg_names
    constants = dict(task.get("constants", {}))
    for each in task.get("layouts", ()):
        constants[each] = getattr(module, task["layouts"][each])
    types = {each: "constexpr" if each in constants else task["signature"][each] for each in names}
    aligned = {each for each in names if types[each].startswith("*")} | set(task["aligned"])
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, each in enumerate(names)
        if each in aligned and types[each] != "constexpr"
    }
    target = task["target"]
    cuda = target.startswith("sm_")
    where = GPUTarget(
        "cuda" if cuda else "hip", int(target[3:]) if cuda else target, 32 if cuda else 64
    )
    made = triton.compile(
        kind(fn=function, signature=types, constexprs=constants, attrs=attributes),
        target=where,
        options=dict(task["options"]),
    )
    code = made.asm["ptx" if cuda else "amdgcn"]
    counts = {each: len(re.findall(re.escape(each), code)) for each in INSTRUCTIONS}
    return {
        "shared": made.metadata.shared,
        "assembly": {each: count for each, count in counts.items() if count},
    }


def main() -> None:
    """Answer the tasks of standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # other output is no answer
    for task in json.load(sys.stdin):
        try:
            found = answer(task)
        except Exception as error:
            words = (str(error).strip().splitlines() or [""])[0]
            found = {"failure": f"{type(error).__name__}: {words}"[:300]}
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
