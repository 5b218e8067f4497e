"""Every message of the border, once: it names the argument, what is allowed and what was given."""

from __future__ import annotations

import inspect
import pydoc
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tilefold
from tilefold import attention, attention_backward, causal, dense, documents, full, lengths
from tilefold.problems.attention import Problem


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def huge(*shape: int) -> np.ndarray:
    """An array of any size in four bytes of memory."""
    return np.broadcast_to(np.float32(0), shape)


def backward(**changed: Any) -> Any:
    """attention_backward on arrays that fit, but for those given."""
    q = zeros(1, 2, 3, 4)
    fitting = {"do": q, "q": q, "k": q, "v": q, "o": q, "lse": zeros(1, 2, 3)}
    return attention_backward(**{**fitting, **changed})


def hidden_later(q: Any, k: Any) -> Any:
    """A rule's function that nobody made a rule of."""
    return q >= k


class OnGpu:
    """What a GPU array looks like from outside."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (1, 1, 1, 1), "typestr": "<f4", "version": 3}


class OnGpuByDlpack:
    def __dlpack__(self, **_: Any) -> Any:
        raise AssertionError("not asked for")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


class CupyArray(OnGpu):
    __module__ = "cupy"


class MlxArray(OnGpuByDlpack):
    __module__ = "mlx.core"

    def __dlpack_device__(self) -> tuple[int, int]:
        return 8, 0


class Unreadable:
    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("four bits per element")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


Q = zeros(2, 4, 5, 8)
CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "rank": (
        lambda: attention(zeros(5, 8), Q, Q),
        ValueError,
        "q must have four axes, (batch, heads, sequence, dim) in layout bhnd, got shape (5, 8)",
    ),
    "rank in another layout": (
        lambda: attention(Q, Q, zeros(5), layout="bhdn"),
        ValueError,
        "v must have four axes, (batch, heads, dim, sequence) in layout bhdn, got shape (5,)",
    ),
    "batch": (
        lambda: attention(Q, zeros(3, 4, 5, 8), Q),
        ValueError,
        "the batch of k must be 2 as in q, got 3: q is (2, 4, 5, 8) and k (3, 4, 5, 8) in"
        " layout bhnd",
    ),
    "dim": (
        lambda: attention(Q, zeros(2, 4, 5, 7), Q),
        ValueError,
        "the dim of k must be 8 as in q, got 7: q is (2, 4, 5, 8) and k (2, 4, 5, 7) in"
        " layout bhnd",
    ),
    "batch of v": (
        lambda: attention(Q, Q, zeros(1, 4, 5, 8)),
        ValueError,
        "the batch of v must be 2 as in k, got 1: k is (2, 4, 5, 8) and v (1, 4, 5, 8) in"
        " layout bhnd",
    ),
    "heads of v": (
        lambda: attention(Q, Q, zeros(2, 2, 5, 8)),
        ValueError,
        "the heads of v must be 4 as in k, got 2: k is (2, 4, 5, 8) and v (2, 2, 5, 8) in"
        " layout bhnd",
    ),
    "length of v": (
        lambda: attention(Q, Q, zeros(2, 4, 6, 8)),
        ValueError,
        "the sequence of v must be 5 as in k, got 6: k is (2, 4, 5, 8) and v (2, 4, 6, 8) in"
        " layout bhnd",
    ),
    "groups": (
        lambda: attention(Q, zeros(2, 3, 5, 8), zeros(2, 3, 5, 8)),
        ValueError,
        "the heads of q must be a multiple of the heads of k and v, got 4 and 3",
    ),
    "no key heads": (
        lambda: attention(Q, zeros(2, 0, 5, 8), zeros(2, 0, 5, 8)),
        ValueError,
        "the heads of q must be a multiple of the heads of k and v, got 4 and 0",
    ),
    "dim of zero": (
        lambda: attention(zeros(1, 1, 2, 0), zeros(1, 1, 2, 0), zeros(1, 1, 2, 3)),
        ValueError,
        "dim must be from 1 to 2147482623, got 0",
    ),
    "dim_v of zero": (
        lambda: attention(Q, Q, zeros(2, 4, 5, 0)),
        ValueError,
        "dim_v must be from 1 to 2147482623, got 0",
    ),
    "length": (
        lambda: attention(huge(1, 1, 2**31, 1), huge(1, 1, 1, 1), huge(1, 1, 1, 1)),
        ValueError,
        "len_q must be from 0 to 2147482623, got 2147483648",
    ),
    "batch and heads": (
        lambda: attention(*[huge(2**16, 2**15, 1, 1)] * 3),
        ValueError,
        "batch * heads must be below 2147482624, got 2147483648",
    ),
    "layout": (
        lambda: attention(Q, Q, Q, layout="bnh"),
        ValueError,
        "layout must be 'bhnd', 'bnhd' or 'bhdn', got 'bnh'",
    ),
    "precision": (
        lambda: attention(Q, Q, Q, precision="low"),
        ValueError,
        "precision must be 'highest', 'high' or 'medium', got 'low'",
    ),
    "precision of another type": (
        lambda: attention(Q, Q, Q, precision=None),  # type: ignore[arg-type]  # the point
        ValueError,
        "precision must be 'highest', 'high' or 'medium', got None",
    ),
    "precision of gradients of another type": (
        lambda: backward(precision=["high"]),
        ValueError,
        "precision must be 'highest', 'high' or 'medium', got ['high']",
    ),
    "layout of another type": (
        lambda: attention(Q, Q, Q, layout=["bhnd"]),  # type: ignore[arg-type]  # the point
        ValueError,
        "layout must be 'bhnd', 'bnhd' or 'bhdn', got ['bhnd']",
    ),
    "scale": (
        lambda: attention(Q, Q, Q, scale=float("inf")),
        ValueError,
        "scale must be a finite number, got inf",
    ),
    "scale of another type": (
        lambda: attention(Q, Q, Q, scale="big"),  # type: ignore[arg-type]  # the point
        TypeError,
        "scale must be a finite number, or None for 1 / sqrt(dim), got 'big'",
    ),
    "scale of several numbers": (
        lambda: attention(Q, Q, Q, scale=np.ones(2)),  # type: ignore[arg-type]  # the point
        TypeError,
        "scale must be a finite number, or None for 1 / sqrt(dim), got array([1., 1.])",
    ),
    "mask is an array": (
        lambda: attention(Q, Q, Q, mask=np.ones(2, bool)),  # type: ignore[arg-type]  # the point
        TypeError,
        "mask must be a rule such as tilefold.causal(), got array([ True, True]); wrap an array of"
        " bool as tilefold.dense(array)",
    ),
    "mask is a name": (
        lambda: attention(Q, Q, Q, mask="causal"),  # type: ignore[arg-type]  # the point
        TypeError,
        "mask must be a rule such as tilefold.causal(), got 'causal'; make a rule of a string with"
        " tilefold.masks.parse.parse(string)",
    ),
    "mask is True": (
        lambda: attention(Q, Q, Q, mask=True),  # type: ignore[arg-type]  # the point
        TypeError,
        "mask must be a rule such as tilefold.causal(), got True; write tilefold.rule(function) or"
        " combine tilefold's rules with & | ~",
    ),
    "mask is not called": (
        lambda: attention(Q, Q, Q, mask=causal),  # type: ignore[arg-type]  # the point
        TypeError,
        "mask must be a rule such as tilefold.causal(), got ADDRESS; call it: causal(...)",
    ),
    "mask is a function": (
        lambda: backward(mask=hidden_later),
        TypeError,
        "mask must be a rule such as tilefold.causal(), got ADDRESS; wrap it:"
        " tilefold.rule(function)",
    ),
    "additive mask": (
        lambda: dense(np.array([[0, -np.inf], [0, 0]], np.float32)),
        TypeError,
        "dense: array must be of bool, got float32; use array == 0 if 0 is seen and -inf is hidden"
        " (an additive mask), and array != 0 if 1 is seen and 0 is hidden",
    ),
    "mask of texts": (
        lambda: dense([["x"]]),
        TypeError,
        "dense: array must be of bool, got <U1",
    ),
    "dense mask": (
        lambda: attention(Q, Q, Q, mask=dense(np.ones((5, 4), bool))),
        ValueError,
        "dense(array[5x4]) of shape (5, 4) does not broadcast to (2, 4, 5, 5)",
    ),
    "documents": (
        lambda: attention(Q, Q, Q, mask=documents([0, 1])),
        ValueError,
        "documents(ids[2]): ids_q has 2 entries, but len_q is 5; give one id per position",
    ),
    "lengths": (
        lambda: attention(Q, Q, Q, mask=lengths([1, 2, 3])),
        ValueError,
        "lengths(n_k[3]): n_k is for a batch of 3, but batch is 2",
    ),
    "grid": (
        lambda: attention(Q, Q, Q, mask=causal(sync="scale_end", grid_q=(2, 3))),
        ValueError,
        'causal(sync="scale_end", grid_q=(2, 3)): grid_q=(2, 3) holds 6 positions, but len_q is 5;'
        " height x width must equal it",
    ),
    "mask that does not fit empty arrays": (
        lambda: attention(zeros(0, 1, 5, 2), *[zeros(0, 1, 5, 2)] * 2, mask=documents([0])),
        ValueError,
        "documents(ids[1]): ids_q has 1 entries, but len_q is 5; give one id per position",
    ),
    "half": (
        lambda: attention(Q, Q.astype(np.float16), Q),
        TypeError,
        "k must be of float32 as q is, got float16",
    ),
    "integers": (
        lambda: attention(Q.astype(np.int64), Q, Q),
        TypeError,
        "q must be of float32, float64, float16 or bfloat16, got int64",
    ),
    "objects": (
        lambda: attention(Q, Q, Q.astype(object)),
        TypeError,
        "v must be of float32, float64, float16 or bfloat16, got object",
    ),
    "mixed types": (
        lambda: attention(Q, Q.astype(np.float64), Q),
        TypeError,
        "k must be of float32 as q is, got float64",
    ),
    "no array": (
        lambda: attention([[[[1.0]]]], Q, Q),
        TypeError,
        "q must be a NumPy array, a torch tensor or an object with __dlpack__ or"
        " __array_interface__, got list",
    ),
    "masked array": (
        lambda: attention(np.ma.array(Q), Q, Q),
        TypeError,
        "q must be an array without a mask of its own, got MaskedArray; pass its data, and what to"
        " hide in attention as `mask`",
    ),
    "GPU": (
        lambda: attention(OnGpu(), Q, Q),
        NotImplementedError,
        "q is a OnGpu on a GPU, where only torch tensors have kernels so far; copy it to the CPU"
        " first, or make it a torch tensor (torch.from_dlpack)",
    ),
    "GPU through DLPack": (
        lambda: attention(Q, OnGpuByDlpack(), Q),
        NotImplementedError,
        "k is a OnGpuByDlpack on DLPack device 2, where only torch tensors have kernels so far;"
        " copy it to the CPU first, or make it a torch tensor (torch.from_dlpack)",
    ),
    "array of CuPy": (
        lambda: attention(Q, Q, CupyArray()),
        NotImplementedError,
        "v is a CupyArray on a GPU, where only torch tensors have kernels so far; pass"
        " torch.from_dlpack(v), or cupy.asnumpy(v), a copy on the CPU",
    ),
    "array of MLX on an Apple GPU": (
        lambda: attention(Q, MlxArray(), Q),
        NotImplementedError,
        "k is a MlxArray on DLPack device 8, where only torch tensors have kernels so far; pass"
        " numpy.array(k, copy=False), which shares its memory where MLX runs on Metal",
    ),
    "DLPack that fails": (
        lambda: attention(Q, Q, Unreadable()),
        TypeError,
        "v must be an array that NumPy can view, got Unreadable: four bits per element",
    ),
    "shape of do": (
        lambda: backward(do=zeros(1, 2, 3, 5)),
        ValueError,
        "do must have shape (1, 2, 3, 4) to go with q, k and v, got (1, 2, 3, 5)",
    ),
    "shape of o": (
        lambda: backward(o=zeros(2, 3, 4)),
        ValueError,
        "o must have shape (1, 2, 3, 4) to go with q, k and v, got (2, 3, 4)",
    ),
    "shape of lse": (
        lambda: backward(lse=zeros(1, 3, 2)),
        ValueError,
        "lse must have shape (1, 2, 3) to go with q, k and v, got (1, 3, 2)",
    ),
    "type of lse": (
        lambda: backward(lse=zeros(1, 2, 3, dtype=np.float64)),
        TypeError,
        "lse must be of float32 where q is float32, got float64",
    ),
    "lse is missing": (
        lambda: backward(lse=None),
        TypeError,
        "lse must be a NumPy array, a torch tensor or an object with __dlpack__ or"
        " __array_interface__, got NoneType",
    ),
    "type of a problem": (
        lambda: Problem(1, 1, 1, 1, 1, 1, 1, "int8", 1.0, full()),
        ValueError,
        "dtype must be 'float32', 'float64', 'float16' or 'bfloat16', got 'int8'",
    ),
    "size of a problem": (
        # the point: a length that is no integer
        lambda: Problem(1, 1, 1, 2.5, 1, 1, 1, "float32", 1.0, full()),  # type: ignore[arg-type]
        TypeError,
        "len_q must be an integer, got 2.5",
    ),
    "shape of a problem is a number": (
        lambda: Problem.of(5.5),  # type: ignore[arg-type]  # the point
        TypeError,
        "q must be a shape of integers such as (1, 8, 2048, 64), got 5.5",
    ),
    "shape of a problem is missing": (
        lambda: Problem.of(None),  # type: ignore[arg-type]  # the point
        TypeError,
        "q must be a shape of integers such as (1, 8, 2048, 64), got None",
    ),
    "shape of a problem has a fraction": (
        lambda: Problem.of((1, 8, 64, 16), (1, 8, 5.5, 16)),  # type: ignore[arg-type]  # the point
        TypeError,
        "k must be a shape of integers such as (1, 8, 2048, 64), got (1, 8, 5.5, 16)",
    ),
    "shape of a problem is a text": (
        lambda: Problem.of("1,8"),  # type: ignore[arg-type]  # the point
        TypeError,
        "q must be a shape of integers such as (1, 8, 2048, 64), got '1,8'",
    ),
    "shape of a problem is an array": (
        lambda: Problem.of(zeros(1, 1, 1, 1)),  # type: ignore[arg-type]  # the point
        TypeError,
        "q must be a shape of integers such as (1, 8, 2048, 64), got array([[[[0.]]]],"
        " dtype=float32); pass q.shape",
    ),
    "name": (
        lambda: tilefold.attend,
        AttributeError,
        "module 'tilefold' has no attribute 'attend'",
    ),
}


@pytest.mark.feature("T15")
@pytest.mark.parametrize("case", CASES)
def test_message(case: str) -> None:
    call, kind, message = CASES[case]
    wanted = re.escape(message).replace("ADDRESS", r"<function \w+ at 0x\w+>")
    with pytest.raises(kind, match=f"^{wanted}$") as caught:
        call()
    assert caught.type is kind


@pytest.mark.feature("T01")
@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_lse_of_another_type_than_statistics_have(dtype: type) -> None:
    with pytest.raises(
        TypeError, match=f"^lse must be of float32 where q is float32, got {np.dtype(dtype)}$"
    ):
        backward(lse=np.zeros((1, 2, 3), dtype))


NAMES = {
    "is_causal": "write mask=tilefold.causal(), where the last query meets the last key, or",
    "attn_mask": "write mask=tilefold.dense(array) for an array of bool where True is seen",
    "dropout_p": "write dropout=",
    "softmax_scale": "write scale=",
    "window_size": "write mask=tilefold.local(n), whose n keys on each side include the",
    "enable_gqa": "leave it out: heads_q may be any multiple of heads_kv",
    "score_mod": "write score=tilefold.score(lambda s, b, h, q, k: ...), a formula of the score s",
    "softcap": "write score=tilefold.softcap(cap)",
    "alibi_slopes": "write score=tilefold.alibi(slopes)",
    "attn_bias": "write score=tilefold.bias(array) for an array of floats that is added to the sco",
    "layot": "did you mean layout=?",
    "masks": "did you mean mask=?",
    "zeta": "its arguments are ",
}


@pytest.mark.feature("A03", "T15")
@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_another_library_says_what_it_is_here(name: str) -> None:
    lse = Q[..., 0]
    for called, call in {
        "attention": lambda **more: attention(Q, Q, Q, **more),
        "attention_backward": lambda **more: attention_backward(Q, Q, Q, Q, Q, lse, **more),
    }.items():
        said = f"{called} has no argument {name!r}: {NAMES[name]}"
        with pytest.raises(TypeError, match=f"^{re.escape(said)}") as caught:
            call(**{name: 0})
        assert "unknown" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.feature("T12")
def test_signatures_show_what_may_be_given() -> None:
    for function in (attention, attention_backward):
        shown = inspect.signature(function).parameters.values()
        assert all(parameter.kind is not parameter.VAR_KEYWORD for parameter in shown)
        text = pydoc.render_doc(function)
        assert "precision: 'str' = 'highest'" in text and "unknown" not in text
