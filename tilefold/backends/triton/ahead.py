"""Kernels compiled ahead of time, with the compiler's report of their resources.

Triton can compile for GPUs that are absent. So a machine without a GPU can find how many registers
a kernel takes, whether its loops spill, how much shared memory it needs, and which instructions
multiply. This is a compiler's report and no measurement: it says nothing about time.

A process that interprets kernels (`TRITON_INTERPRET=1`) cannot compile them, and Triton's C++ code
ends the process when it meets a case that it cannot compile. So `reports` compiles in separate
processes, which run this file.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tilefold.backends.triton import listing, module, source
from tilefold.backends.triton.architectures import Architecture, architecture
from tilefold.backends.triton.kernels import arguments, frame
from tilefold.backends.triton.kernels.text import ELEMENTS
from tilefold.backends.triton.matmul import gemm
from tilefold.backends.triton.matmul.gemm import GemmSpec
from tilefold.backends.triton.spec import TritonSpec

Spec = TritonSpec | GemmSpec
"""A kernel of attention, or of a product."""

Task = tuple[Spec, str]
"""A kernel and the name of the architecture that it is compiled for."""

_ROOT = Path(__file__).parents[3]
"""The folder of the package, so that other processes import the same package."""

_ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Compiled:
    """A compiler's report of a kernel.

    `registers` counts the 32-bit registers of a thread, `tensor_columns` the columns of Blackwell's
    tensor memory. `stack_bytes` is the stack of the whole kernel. `spills` counts loads and stores
    of spilled registers in the innermost loops that multiply, by walk ("whole", "edge", "careful"),
    or under "body" for a kernel without walks. `failure` says in one line why there is no kernel;
    it is "" if there is one.
    """

    architecture: str
    triton: str = ""
    registers: int = 0
    stack_bytes: int = 0
    spills: Mapping[str, int] = field(default_factory=dict)
    shared_bytes: int = 0
    tensor_columns: int = 0
    instructions: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    failure: str = ""

    @property
    def hot_spills(self) -> int:
        """The number of spills in the loop over whole tiles."""
        return self.spills.get("whole", 0)

    def within(self, device: Architecture) -> bool:
        """True if there is a kernel, and the architecture can hold one program of it."""
        tensors = self.tensor_columns <= 512
        return not self.failure and self.shared_bytes <= device.shared_bytes and tensors


def emit(spec: Spec) -> str:
    """The source of a kernel."""
    return gemm.emit(spec) if isinstance(spec, GemmSpec) else source.emit(spec)


def compile(spec: Spec, name: str, *, text: str | None = None) -> Compiled:
    """Compile a kernel for an architecture such as "sm_90". `text` replaces the spec's own source.

    Operands are assumed to be aligned to 16 bytes, with adjacent elements in each row. Raises
    NotImplementedError if Triton is missing or interprets kernels in this process.
    """
    if reason := missing():
        raise NotImplementedError(reason)
    import triton
    from triton.backends.compiler import GPUTarget

    device = architecture(name)
    text = emit(spec) if text is None else text
    if isinstance(spec, GemmSpec):
        entry, multiplied = gemm.ENTRY, spec.multiplied
    else:
        entry, multiplied = spec.entry, spec.dtype
    function = module.load(text, entry)
    signature, constants, attributes = declared(spec, function.arg_names)
    kind = source_kind(function)
    digits = int(name.removeprefix("sm_")) if device.kind == "cuda" else name
    begin = time.perf_counter()
    made = triton.compile(
        kind(fn=function, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget(device.kind, digits, device.warp),
        options=module.launch_options(
            device.kind, multiplied, spec.blocks.warps, spec.blocks.stages
        ),
    )
    seconds = time.perf_counter() - begin
    read = _nvidia if device.kind == "cuda" else _amd
    return Compiled(
        architecture=name,
        triton=triton.__version__,
        shared_bytes=made.metadata.shared,
        tensor_columns=getattr(made.metadata, "tmem_size", None) or 0,
        seconds=seconds,
        **read(made.asm, text),
    )


def missing() -> str | None:
    """The reason why kernels cannot be compiled in this process; None if they can."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is set: kernels are interpreted here; compile with `reports`"
    return module.missing()


def declared(
    spec: Spec, names: Sequence[str]
) -> tuple[dict[str, str], dict[str, int], dict[tuple[int], Any]]:
    """The types, constants and alignments of a kernel's arguments, as Triton takes them."""
    if isinstance(spec, GemmSpec):
        return _of_product(spec)
    types = arguments.signature(spec)
    for name, (_, rows, columns) in frame.descriptors(spec):
        types[name] = f"tensordesc<{ELEMENTS[spec.dtype]}[1, 1, {rows}, {columns}]>"
    strides = arguments.strides(spec)
    constants = {name: 1 for name in strides if name.endswith("_d")}
    types = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {name for name in strides if name not in constants}
    aligned |= {name for name, kind in types.items() if kind.startswith("*")}
    attributes = {(i,): _ALIGNED for i, name in enumerate(names) if name in aligned}
    return types, constants, attributes


def _of_product(
    spec: GemmSpec,
) -> tuple[dict[str, str], dict[str, int], dict[tuple[int], Any]]:
    """What `declared` says, of a product whose matrices have adjacent elements in each row."""
    types = gemm.signature(spec)
    steps = "a_k", "b_n", "g_n", "c_n", "old_n"
    constants = {str(name): 1 for name in steps if name in types}
    types |= dict.fromkeys(constants, "constexpr")
    alike = {*gemm.alike(spec), *constants}
    aligned = [
        i for i, (name, kind) in enumerate(types.items()) if name not in alike and kind[0] in "*i"
    ]
    return types, constants, {(i,): _ALIGNED for i in aligned}


def source_kind(function: Any) -> Any:
    """The class that compiles a function: Triton's, or Gluon's."""
    if function.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource
    from triton.compiler import ASTSource

    return ASTSource


def reports(
    tasks: Iterable[Task],
    *,
    workers: int = 2,
    limit_seconds: float = 300.0,
    fresh: bool = False,
    python: str = sys.executable,
) -> list[Compiled]:
    """Compile kernels in other processes; the report of a failed kernel has its `failure`.

    Kernels in Triton's cache are not compiled again, unless `fresh` is True.
    """
    waiting = list(tasks)
    found: dict[int, Compiled] = {}
    lock, places = threading.Lock(), iter(range(len(waiting)))

    def work() -> None:
        child = Compiler(python, limit_seconds, fresh)
        while True:
            with lock:
                place = next(places, None)
            if place is None:
                break
            found[place] = child.ask(waiting[place])
        child.end()

    threads = [threading.Thread(target=work) for _ in range(min(workers, len(waiting)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[place] for place in range(len(waiting))]


class Compiler:
    """A process that compiles one kernel after the other; it is started again if it ends."""

    def __init__(
        self, python: str = sys.executable, limit_seconds: float = 300.0, fresh: bool = False
    ) -> None:
        self._python, self._limit = python, limit_seconds
        self._environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        if fresh:
            self._environment["TRITON_ALWAYS_COMPILE"] = "1"
        self._process: subprocess.Popen[str] | None = None

    def ask(self, task: Task) -> Compiled:
        """The report of a kernel."""
        if self._process is None:
            self._process = subprocess.Popen(
                [self._python, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=self._environment,
                cwd=_ROOT,
            )
        process = self._process
        assert process.stdin and process.stdout
        timer = threading.Timer(self._limit, process.kill)
        begin = time.perf_counter()  # before the timer starts
        timer.start()
        try:
            process.stdin.write(base64.b64encode(pickle.dumps(task)).decode() + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        timer.cancel()
        if answer:
            return Compiled(**json.loads(answer))
        code = self.end()
        late = time.perf_counter() - begin >= self._limit
        why = f"took more than {self._limit:.0f} seconds" if late else f"ended with code {code}"
        return Compiled(task[1], failure=f"the compiler {why}")

    def end(self) -> int:
        """End the process, and return its exit code."""
        if self._process is None:
            return 0
        with self._process as process:
            assert process.stdin
            with suppress(BrokenPipeError):
                process.stdin.close()
        self._process = None
        return process.returncode


def main() -> None:
    """Compile the task in each line of standard input, and answer with a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # other output is no answer
    for line in sys.stdin:
        spec, name = pickle.loads(base64.b64decode(line))
        try:
            found = compile(spec, name)
        except Exception as error:
            words = (str(error).strip().splitlines() or [""])[0]
            found = Compiled(name, failure=f"{type(error).__name__}: {words}"[:300])
        print(json.dumps(asdict(found)), file=answers, flush=True)


def _nvidia(made: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The report of a cubin, NVIDIA's machine code."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(made["cubin"])
        usage = _tool("cuobjdump", "-res-usage", str(file))
        code = _tool("nvdisasm", "-c", "-g", str(file))
    return {
        "registers": max(map(int, re.findall(r"REG:(\d+)", usage))),
        "stack_bytes": max(map(int, re.findall(r"STACK:(\d+)", usage))),
        "spills": listing.spills(code, text),
        "instructions": listing.instructions(made["ptx"]),
    }


def _amd(made: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The report of amdgcn, AMD's assembly."""
    code = made["amdgcn"]

    def field_of(name: str) -> int:
        return max(map(int, re.findall(rf"\.{name}:\s+(\d+)", code)), default=0)

    return {
        "registers": field_of("vgpr_count"),
        "stack_bytes": field_of("private_segment_fixed_size"),
        "spills": listing.spills(code, text),
        "instructions": listing.instructions(code),
    }


def _tool(name: str, *given: str) -> str:
    """The output of a CUDA tool that is a part of Triton."""
    import triton

    file = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(file), *given], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
