"""Exact attention, forward and backward, by kernels compiled at run time. Start at `attention`."""

from importlib import import_module
from types import FunctionType
from typing import TYPE_CHECKING, Any

from tilefold.common.first_use import imported

if TYPE_CHECKING:
    from tilefold.api import attention, attention_backward, merge
    from tilefold.backends.cpu.threads import get_num_threads, set_num_threads
    from tilefold.common.reproducible import get_reproducible, set_reproducible
    from tilefold.compiling import compile_async
    from tilefold.maps.doors import key_mass, weights
    from tilefold.masks.data_rules import dense, documents, lengths
    from tilefold.masks.position_rules import (
        Rule,
        causal,
        chunked,
        full,
        local,
        prefix,
        rule,
    )
    from tilefold.problems.attention import Problem
    from tilefold.problems.dropout import dropout_mask
    from tilefold.products.calls import gemm, pack
    from tilefold.products.files import load_quantized, save_quantized
    from tilefold.products.quantized import QuantizedMatrix, quantize
    from tilefold.products.quantized_calls import qgemm
    from tilefold.scores.functions import (
        exp,
        log,
        maximum,
        minimum,
        sigmoid,
        sqrt,
        table,
        tanh,
        where,
    )
    from tilefold.scores.modifications import alibi, bias, softcap, temperature
    from tilefold.scores.picture import picture
    from tilefold.scores.relative import distance_bias, relative_bias, window_bias
    from tilefold.scores.score import Score
    from tilefold.scores.traced import score

__version__ = "0.1.0"
__all__ = [
    "Problem",
    "QuantizedMatrix",
    "Rule",
    "Score",
    "alibi",
    "attention",
    "attention_backward",
    "bias",
    "causal",
    "chunked",
    "compile_async",
    "dense",
    "distance_bias",
    "documents",
    "dropout_mask",
    "exp",
    "full",
    "gemm",
    "get_num_threads",
    "get_reproducible",
    "key_mass",
    "lengths",
    "load_quantized",
    "local",
    "log",
    "maximum",
    "merge",
    "minimum",
    "pack",
    "picture",
    "prefix",
    "qgemm",
    "quantize",
    "relative_bias",
    "rule",
    "save_quantized",
    "score",
    "set_num_threads",
    "set_reproducible",
    "sigmoid",
    "softcap",
    "sqrt",
    "table",
    "tanh",
    "temperature",
    "weights",
    "where",
    "window_bias",
]

_HOMES = dict.fromkeys(__all__, "tilefold.masks.position_rules") | {
    "attention": "tilefold.api",
    "attention_backward": "tilefold.api",
    "merge": "tilefold.api",
    "key_mass": "tilefold.maps.doors",
    "weights": "tilefold.maps.doors",
    "dense": "tilefold.masks.data_rules",
    "documents": "tilefold.masks.data_rules",
    "lengths": "tilefold.masks.data_rules",
    "Problem": "tilefold.problems.attention",
    "dropout_mask": "tilefold.problems.dropout",
    "qgemm": "tilefold.products.quantized_calls",
    **dict.fromkeys(("QuantizedMatrix", "quantize"), "tilefold.products.quantized"),
    **dict.fromkeys(("gemm", "pack"), "tilefold.products.calls"),
    **dict.fromkeys(("load_quantized", "save_quantized"), "tilefold.products.files"),
    "compile_async": "tilefold.compiling",
    "get_num_threads": "tilefold.backends.cpu.threads",
    "set_num_threads": "tilefold.backends.cpu.threads",
    "get_reproducible": "tilefold.common.reproducible",
    "set_reproducible": "tilefold.common.reproducible",
    "Score": "tilefold.scores.score",
    "score": "tilefold.scores.traced",
    "picture": "tilefold.scores.picture",
    **dict.fromkeys(("alibi", "bias", "softcap", "temperature"), "tilefold.scores.modifications"),
    **dict.fromkeys(("distance_bias", "relative_bias", "window_bias"), "tilefold.scores.relative"),
    **dict.fromkeys(
        ("exp", "log", "maximum", "minimum", "sigmoid", "sqrt", "table", "tanh", "where"),
        "tilefold.scores.functions",
    ),
}


_module = imported(import_module)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import tilefold` alone loads not even NumPy."""
    if name in ("blas", "metal", "triton"):
        return _module(f"tilefold.{name}")  # the import makes it an attribute of tilefold
    if name not in _HOMES:
        raise AttributeError(f"module 'tilefold' has no attribute {name!r}")
    value = getattr(_module(_HOMES[name]), name)
    if isinstance(value, FunctionType):
        vars(value)["autograph_info__"] = None  # so TensorFlow's AutoGraph does not rewrite it
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "blas", "metal", "triton"})
