"""PyTorch before 2.12, which has no operators of ours: what works there, and what says why not.

A process with another version in `torch.__version__` takes that path. The real 2.10 and 2.11, which
need gigabytes of CUDA, passed the same code by hand.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

BEFORE = """
import torch, tilefold
torch.__version__ = torch.torch_version.TorchVersion("{version}")
def refused(call):
    try:
        call()
    except Exception as error:
        print(type(error).__name__, str(error).splitlines()[0])
random = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(1, 2, 40, 8, generator=random).requires_grad_() for _ in range(3))
mask = tilefold.causal() & tilefold.local(9)
def f(q):
    return tilefold.attention(2 * q, k, v, mask=mask).sin()
"""


def printed(code: str, version: str = "2.11.0") -> list[str]:
    """The lines that a process with another PyTorch prints."""
    words = [sys.executable, "-c", BEFORE.format(version=version) + code]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.feature("T11", "T15")
def test_calls_and_gradients_are_those_of_the_definition() -> None:
    code = """
import torch.utils.flop_counter
from tilefold.frontends.torch import calls as frontend
assert not frontend.OPERATORS
f(q).sum().backward()
found = [f(q), q.grad, k.grad, v.grad]
for tensor in (q, k, v):
    tensor.grad = None
seen = torch.from_numpy(mask.to_dense(40, 40))
s = (2 * q @ k.mT / 8 ** 0.5).masked_fill(~seen, -torch.inf)
want = (s.softmax(-1) @ v).sin()
want.sum().backward()
for name, one, other in zip("oqkv", found, [want, q.grad, k.grad, v.grad]):
    print(name, bool((one - other).abs().max() < 1e-5))
with torch.device("cpu"), torch.utils.flop_counter.FlopCounterMode(display=False):
    print("modes", bool((f(q) - want).abs().max() < 1e-5))
"""
    assert printed(code) == ["o True", "q True", "k True", "v True", "modes True"]


@pytest.mark.slow
@pytest.mark.feature("T15")
def test_a_compiled_function_breaks_its_graph() -> None:
    code = """
import warnings
warnings.simplefilter("ignore")
want = f(q).detach()
compiled = torch.compile(f, backend="aot_eager")(q)
print(bool((compiled - want).abs().max() < 1e-6))
compiled.sum().backward()
print(bool(q.grad.abs().sum() > 0))
torch._dynamo.reset()
refused(lambda: torch.compile(f, backend="aot_eager", fullgraph=True)(q))
"""
    right, gradient, whole = printed(code)
    assert (right, gradient) == ("True", "True")
    assert whole.startswith("Unsupported ") and "disable" in whole


@pytest.mark.slow
@pytest.mark.feature("T15")
def test_what_needs_an_operator_says_so() -> None:
    code = """
print(bool(torch.func.grad(lambda q: f(q).sum())(q).abs().sum() > 0))
class Kind(torch.Tensor): pass
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
with FakeTensorMode(allow_non_fake_inputs=True):
    refused(lambda: tilefold.attention(q.detach(), k.detach(), v.detach()))
refused(lambda: make_fx(f)(q.detach()))
refused(lambda: f(q.detach().as_subclass(Kind)))
o, lse = tilefold.attention(q, k, v, return_lse=True)
dq = tilefold.attention_backward(torch.ones_like(o), q, k, v, o, lse)[0]
dq.sum().backward()
print(bool(q.grad.isfinite().all()))
refused(lambda: tilefold.attention(q, k, v.to_sparse()))
"""
    transform, fake, traced, subclass, second, sparse = printed(code)
    for line in (fake, traced, subclass):
        assert line.startswith("NotImplementedError attention under tracers, on meta tensors")
        assert line.endswith("needs PyTorch 2.12 or newer, found 2.11.0")
    assert (transform, second) == ("True", "True")
    assert sparse.startswith("TypeError v must be a strided tensor")


@pytest.mark.slow
@pytest.mark.feature("T15")
def test_one_that_is_too_old_is_named() -> None:
    (line,) = printed("refused(lambda: f(q))", "2.9.1")
    assert line.startswith("ImportError tensors need PyTorch 2.10 or newer, found 2.9.1; ")
