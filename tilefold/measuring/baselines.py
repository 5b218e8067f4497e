"""Other libraries that compute attention, each an adapter of a few lines.

On the command line they are called peers. A baseline is prepared before the clock starts: its
arrays have its own layout and type, its graph is compiled, its threads are set. The timed call is
the part for which a user waits. A library is imported when it is first asked for. If a baseline
cannot do a case, it raises NotImplementedError, and the table shows the reason in place of a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold import api
from tilefold.backends.cpu.device import host
from tilefold.common.imports import why_not
from tilefold.masks.position_rules import causal, full
from tilefold.measuring.workload import Array, Arrays, Call, Case
from tilefold.problems import reference

TOLERANCE = {"float64": 1e-5, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""The largest relative error, by norm, of a baseline that computes the same thing, by type."""


@dataclass(frozen=True)
class Baseline:
    """A baseline: the modules to import before anything runs, and the function that makes its call.

    `layout` is the layout of its results. `own_team` is True if it has threads of its own and does
    not use the OpenMP runtime that tilefold and torch share. `environment` holds variables that are
    set before the import.
    """

    modules: tuple[str, ...]
    make: Callable[[Case, Arrays], Call]
    layout: str = "bhnd"
    own_team: bool = False
    environment: Mapping[str, str] | None = None
    scores: bool = False
    """Whether its calls can have a modified score."""

    def prepare(self, case: Case, arrays: Arrays) -> Call:
        """The call of a case. Raises NotImplementedError for cases that it cannot do."""
        if case.score is not None and not self.scores:
            raise NotImplementedError(f"the adapter of {self.modules[0]} takes no score")
        return self.make(case, arrays)

    @property
    def unusable(self) -> str | None:
        """Why it cannot be measured: the first of its modules that does not import; None if all do.

        Its modules are imported.
        """
        for name, value in (self.environment or {}).items():
            os.environ.setdefault(name, value)
        for name in self.modules:
            if reason := why_not(name):
                return f"{name} {reason}"
        return None

    def load(self) -> None:
        """Import its modules. Raises ImportError with the reason where one does not import."""
        if reason := self.unusable:
            raise ImportError(reason)


def numpy_baseline(case: Case, a: Arrays) -> Call:
    """The dense reference in basic NumPy operations, in the type of lse."""
    mask, dtype = case.problem.mask, a.lse.dtype
    options: dict[str, Any] = {"mask": mask, "dtype": dtype, "score": case.score}
    if case.operation == "forward":
        return lambda: reference.attention(a.q, a.k, a.v, **options)[0]
    _only_backward(case)
    inputs = (a.do, a.q, a.k, a.v, a.o, a.lse)
    return lambda: reference.attention_backward(*inputs, **options)


def torch_baseline(case: Case, a: Arrays) -> Call:
    """PyTorch's `scaled_dot_product_attention` on the CPU, with its gradients by autograd."""
    import torch

    torch.set_num_threads(case.threads)
    torch.set_float32_matmul_precision(case.problem.precision)
    q, k, v, do = (tensor(x) for x in (a.q, a.k, a.v, a.do))
    options: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    if _square_causal(case):
        options["is_causal"] = True
    elif case.problem.mask != full():
        options["attn_mask"] = torch.from_numpy(_dense(case))
    attend: Any = torch.nn.functional.scaled_dot_product_attention
    if case.operation == "forward":
        return lambda: attend(q, k, v, **options)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    if case.operation == "backward":
        o = attend(*inputs, **options)
        return lambda: torch.autograd.grad(o, inputs, do, retain_graph=True)
    return lambda: torch.autograd.grad(attend(*inputs, **options), inputs, do)


def flex_baseline(case: Case, a: Arrays) -> Call:
    """PyTorch's FlexAttention, compiled, with a block mask; it has no gradient on the CPU."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _only_forward(case, "FlexAttention has no backward on the CPU")
    problem = case.problem
    torch.set_num_threads(case.threads)
    q, k, v = (tensor(x) for x in (a.q, a.k, a.v))
    options: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    if problem.mask != full():
        # Without data a rule prints as the Python that FlexAttention asks for.
        rule = str(problem.mask.bind(problem.len_q, problem.len_k))
        if "#" in rule:
            raise NotImplementedError("the adapter of FlexAttention takes no rules with data")
        visible = eval(f"lambda b, h, q, k: {rule}")
        lengths = (problem.len_q, problem.len_k)
        options["block_mask"] = create_block_mask(visible, None, None, *lengths, device="cpu")
    if case.score is not None:
        options["score_mod"] = _score_mod(case)
    torch.compiler.reset()  # after eight compilations of a function it silently stops compiling
    attend: Any = torch.compile(flex_attention)
    return lambda: attend(q, k, v, **options)


def _score_mod(case: Case) -> Any:
    """The score of a case as the function that FlexAttention asks for."""
    import torch

    text = str(case.score.expression(case.problem.score_sizes)) if case.score else "s"
    if "array[" in text:
        raise NotImplementedError("the adapter of FlexAttention takes no scores with data")
    functions = ("exp", "log", "tanh", "sigmoid", "sqrt", "where", "minimum", "maximum")
    known = {name: getattr(torch, name) for name in functions} | {"inf": float("inf")}
    return eval(f"lambda s, b, h, q, k: {text}", known)


def onnxruntime_baseline(case: Case, a: Arrays) -> Call:
    """ONNX Runtime's `MultiHeadAttention`."""
    import onnx
    import onnxruntime

    problem = case.problem
    _only_forward(case, "ONNX Runtime has no gradients")
    if problem.dtype != "float32":
        raise NotImplementedError("MultiHeadAttention of ONNX Runtime is float32 on the CPU")
    if problem.heads_q != problem.heads_kv:
        raise NotImplementedError("MultiHeadAttention has no grouped queries")
    feeds = {name: _sequence_first(x) for name, x in zip("qkv", (a.q, a.k, a.v), strict=True)}
    feeds = {name: x.reshape(*x.shape[:2], -1) for name, x in feeds.items()}
    inputs = ["q", "k", "v"]
    if problem.mask != full() and not _square_causal(case):
        inputs += ["", "", "bias"]  # the two empty ones are the projections' bias and padding
        feeds["bias"] = np.where(_dense(case), np.float32(0), np.float32(-np.inf))
    real = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node(
                "MultiHeadAttention",
                inputs,
                ["o"],
                domain="com.microsoft",
                num_heads=problem.heads_q,
                unidirectional=int(_square_causal(case)),
            )
        ],
        "attention",
        [onnx.helper.make_tensor_value_info(n, real, x.shape) for n, x in feeds.items()],
        [onnx.helper.make_tensor_value_info("o", real, None)],
    )
    domains = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=domains, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    # Spinning threads would keep the cores busy in turns of others; its own times do not change.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    shape = (problem.batch, problem.len_q, problem.heads_q, problem.dim_v)
    return lambda: session.run(None, feeds)[0].reshape(shape)


def openvino_baseline(case: Case, a: Arrays) -> Call:
    """OpenVINO's `ScaledDotProductAttention`, computed in the type of the case."""
    from tilefold.measuring.openvino_model import Model

    problem = case.problem
    _only_forward(case, "OpenVINO has no gradients")
    if problem.dtype not in ("float32", "bfloat16"):
        raise NotImplementedError(f"OpenVINO computes in float32 or bfloat16, not {problem.dtype}")
    if problem.heads_q != problem.heads_kv:
        raise NotImplementedError("ScaledDotProductAttention has no grouped queries")
    arrays: list[Any] = [a.q, a.k, a.v]
    if problem.mask != full() and not _square_causal(case):
        arrays.append(_dense(case))
    options = {"causal": _square_causal(case)}
    return Model("scaled_dot_product_attention", arrays, problem.dtype, case.threads, **options)


def jax_baseline(case: Case, a: Arrays) -> Call:
    """`jax.nn.dot_product_attention` under jit, and its vector-Jacobian product."""
    import jax

    if case.problem.dtype == "float16":
        raise NotImplementedError("dot_product_attention of JAX has no float16 on the CPU")
    _all_threads(case, "JAX")
    q, k, v, do = (jax.numpy.asarray(_sequence_first(x)) for x in (a.q, a.k, a.v, a.do))
    options: dict[str, Any] = {}
    if _square_causal(case):
        options["is_causal"] = True
    elif case.problem.mask != full():
        options["mask"] = jax.numpy.asarray(_dense(case))

    attend = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, **options))
    if case.operation == "forward":
        return lambda: attend(q, k, v).block_until_ready()
    if case.operation == "backward":
        _, pull = jax.vjp(attend, q, k, v)
        gradients = jax.jit(lambda pull, do: pull(do))
        return lambda: jax.block_until_ready(gradients(pull, do))
    both = jax.jit(lambda q, k, v, do: jax.vjp(attend, q, k, v)[1](do))
    return lambda: jax.block_until_ready(both(q, k, v, do))


def keras_baseline(case: Case, a: Arrays) -> Call:
    """`keras.ops.dot_product_attention` on TensorFlow, inside a `tf.function`."""
    import keras
    import tensorflow

    _all_threads(case, "TensorFlow")
    if keras.backend.backend() != "tensorflow":
        raise NotImplementedError("Keras was imported with another backend than TensorFlow")
    q, k, v, do = (tensorflow.constant(_sequence_first(x)) for x in (a.q, a.k, a.v, a.do))
    options: dict[str, Any] = {}
    if _square_causal(case):
        options["is_causal"] = True
    elif case.problem.mask != full():
        options["mask"] = tensorflow.constant(_dense(case))

    attend = tensorflow.function(
        lambda q, k, v: keras.ops.dot_product_attention(q, k, v, **options)
    )
    if case.operation == "forward":
        return lambda: attend(q, k, v)

    def taped() -> Call:
        with tensorflow.GradientTape(persistent=case.operation == "backward") as tape:
            tape.watch((q, k, v))
            o = attend(q, k, v)
        return lambda: tape.gradient(o, (q, k, v), do)

    if case.operation == "backward":
        return taped()
    return lambda: taped()()


def implementation(name: str, device: str, case: Case, a: Arrays, *, wait: bool = True) -> Call:
    """One of `implementations.NAMES` on torch tensors on a device, with gradients by autograd.

    With `wait` the call returns when the device has finished.
    """
    import torch

    from tilefold.backends.arrays.torch import tensor_of
    from tilefold.implementations.torch import finish

    problem = case.problem
    if device == "mps" and problem.dtype == "float64":
        raise NotImplementedError("torch has no float64 on Apple GPUs")
    torch.set_num_threads(case.threads)
    torch.set_float32_matmul_precision(problem.precision)
    q, k, v, do = (tensor_of(x).to(device) for x in (a.q, a.k, a.v, a.do))
    options = case.options | {"impl": name}
    inputs = [q, k, v]
    if case.operation != "forward":
        inputs = [x.detach().requires_grad_() for x in inputs]
    kept = api.attention(*inputs, **options) if case.operation == "backward" else None

    def call() -> object:
        made = api.attention(*inputs, **options) if kept is None else kept
        if case.operation != "forward":
            made = torch.autograd.grad(made, inputs, do, retain_graph=made is kept)
        if wait:
            finish(device)
        return made

    return call


BASELINES: Mapping[str, Baseline] = {
    "torch": Baseline(("torch",), torch_baseline),
    "flex": Baseline(("torch",), flex_baseline, scores=True),
    "onnxruntime": Baseline(("onnx", "onnxruntime"), onnxruntime_baseline, "bnhd", own_team=True),
    "openvino": Baseline(("openvino",), openvino_baseline, own_team=True),
    "jax": Baseline(("jax",), jax_baseline, "bnhd", own_team=True),
    "keras": Baseline(
        ("tensorflow", "keras"),
        keras_baseline,
        "bnhd",
        own_team=True,
        environment={"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"},
    ),
    "numpy": Baseline(("numpy",), numpy_baseline, scores=True),
}
"""All baselines by name, installed or not."""


def check(name: str, case: Case, expected: object, found: object) -> float:
    """The relative error of a baseline's result. Raises ArithmeticError if it is too large."""
    layout = BASELINES[name].layout if name in BASELINES else "bhnd"
    errors = []
    for mine, theirs in zip(results(expected), results(found), strict=True):
        turned = theirs.swapaxes(1, 2) if layout == "bnhd" else theirs
        if turned.shape != mine.shape:
            raise ArithmeticError(f"{name} gives {turned.shape} where {mine.shape} is asked for")
        errors.append(float(np.linalg.norm(turned - mine) / np.linalg.norm(mine)))
    error = float(np.max(errors))  # NaN where one of them is
    if not error <= TOLERANCE[case.problem.dtype]:
        raise ArithmeticError(f"{name} computes something else: relative error {error:.1e}")
    return error


def results(value: object) -> list[NDArray[np.float64]]:
    """The results of a call as arrays of float64."""
    many = value if isinstance(value, (tuple, list)) else (value,)
    found = []
    for each in many:
        if hasattr(each, "detach"):
            each = each.detach().cpu().double()
        found.append(np.asarray(each).astype(np.float64))
    return found


def tensor(x: Array) -> Any:
    """A torch tensor that shares the memory of an array, also of one in ml_dtypes' bfloat16."""
    import torch

    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def _sequence_first(x: Array) -> Array:
    """A contiguous copy in the layout (batch, sequence, heads, dim)."""
    return np.ascontiguousarray(x.swapaxes(1, 2))


def _square_causal(case: Case) -> bool:
    """True if the causal flag of every library means the same as the rule."""
    return case.problem.mask == causal() and case.problem.len_q == case.problem.len_k


def _dense(case: Case) -> NDArray[np.bool_]:
    """The rule as an array of four axes."""
    problem = case.problem
    dense = problem.mask.to_dense(problem.len_q, problem.len_k, problem.batch, problem.heads_q)
    return np.ascontiguousarray(dense.reshape((1,) * (4 - dense.ndim) + dense.shape))


def _only_forward(case: Case, reason: str) -> None:
    if case.operation != "forward":
        raise NotImplementedError(reason)


def _only_backward(case: Case) -> None:
    if case.operation != "backward":
        raise NotImplementedError("the reference has no call for both passes")


def _all_threads(case: Case, library: str) -> None:
    """Raise if a library, which uses as many threads as the process has cores, uses too many."""
    if case.threads != host().cores:
        raise NotImplementedError(
            f"{library} has as many threads as the process may use cores, and no way to change"
            f" that afterwards: bind the process to {case.threads} of them"
        )
