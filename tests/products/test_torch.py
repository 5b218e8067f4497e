"""`tilefold.gemm` of PyTorch tensors: values in place, gradients, compilers and transforms."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from gemms import ACTIVATIONS

torch = pytest.importorskip("torch")

import interpreted  # noqa: E402
from metal import needs as needs_emulator  # noqa: E402
from metal_rules import Compiler  # noqa: E402

import tilefold  # noqa: E402
from tilefold import gemm  # noqa: E402
from tilefold.backends.metal.runtime import Mps  # noqa: E402
from tilefold.backends.triton.interpreter import Interpreted  # noqa: E402
from tilefold.products import torch as products  # noqa: E402

GENERATOR = torch.Generator().manual_seed(3)


def normal(*shape: int, dtype: Any = torch.float64, grad: bool = True) -> Any:
    made = torch.randn(*shape, generator=GENERATOR, dtype=torch.float64).to(dtype)
    return made.requires_grad_(grad)


def plain(*shape: int, dtype: Any = torch.float32) -> Any:
    return normal(*shape, dtype=dtype, grad=False)


def near(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    assert got.shape == want.shape
    error = (got.double() - want.double()).norm()
    assert error <= tolerance * max(1, want.double().norm()), error


def expected(a: Any, b: Any, c: Any = 0.0, beta: float = 0.0, bias: Any = 0.0) -> Any:
    return a.double() @ b.double() + beta * c + bias


@pytest.mark.feature("M11")
def test_tensors_are_read_and_written_in_place() -> None:
    x, w, bias = plain(2, 9, 5), plain(7, 5), plain(7)
    near(gemm(x, w, bias=bias, transpose_b=True), expected(x, w.T, bias=bias))
    near(gemm(x[:, ::2, 1:], w.T[1:, ::3]), expected(x[:, ::2, 1:], w.T[1:, ::3]))
    near(gemm(x[0, 0], w.T), x[0, 0].double() @ w.T.double())
    near(gemm(w, x[0, 0]), w.double() @ x[0, 0].double())
    assert gemm(x[0, 0], w[0]).shape == ()
    half = gemm(x.bfloat16(), w.T.half(), out_dtype=torch.bfloat16)
    assert half.dtype is torch.bfloat16
    near(half, expected(x, w.T), 0.03)
    out = plain(2, 9, 7)
    version = out._version
    assert gemm(x, w.T, out, beta=0.5, out=out) is out and out._version > version


def test_integers_of_8_bits_are_summed_in_int32() -> None:
    integers = torch.randint(-128, 128, (4, 33), generator=GENERATOR, dtype=torch.int8)
    assert (gemm(integers, integers.T) == integers.int() @ integers.T.int()).all()


@pytest.mark.filterwarnings("ignore:.*jit.script")  # torch's own, in its forward mode
@pytest.mark.slow
@pytest.mark.feature("A12")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_through_activations(activation: str | None) -> None:
    """Both sides transposed or not, biases of columns and of rows, c that broadcasts."""
    turned = activation in ("relu", "silu", "gelu_tanh")
    a, b = normal(*((4, 3) if turned else (3, 4))), normal(*((5, 4) if turned else (4, 5)))
    bias, c = normal(*((5,) if turned else (3, 1))), normal(*((3, 1) if turned else (5,)))

    def call(a: Any, b: Any, c: Any, bias: Any) -> Any:
        options = {"transpose_a": turned, "transpose_b": turned, "activation": activation}
        return gemm(a, b, c, alpha=0.7, beta=-0.3, bias=bias, **options)

    assert torch.autograd.gradcheck(
        call, (a, b, c, bias), check_batched_grad=True, check_forward_ad=True
    )
    if activation != "relu":
        assert torch.autograd.gradgradcheck(call, (a, b, c, bias))


@pytest.mark.filterwarnings("ignore:.*jit.script")  # torch's own, in its forward mode
@pytest.mark.slow
def test_gradients_beside_integers() -> None:
    """Of the side that is not of integers, whichever it is."""
    x, bias = normal(2, 3, 4), normal(5)
    w, gate = (torch.randint(-9, 9, (5, 4), generator=GENERATOR, dtype=torch.int8) for _ in "wg")

    def call(x: Any, bias: Any) -> Any:
        return gemm(x, w, bias=bias, gate=gate, activation="silu", transpose_b=True)

    assert torch.autograd.gradcheck(call, (x, bias), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (x, bias))
    right = normal(3, 2, dtype=torch.float16)
    y = gemm(w[:, :3].view(torch.uint8), right)
    assert y.dtype is torch.float16
    y.sum().backward()
    near(right.grad, w[:, :3].view(torch.uint8).sum(0)[:, None].expand(3, 2), 1e-3)


@pytest.mark.filterwarnings("ignore:.*jit.script")  # torch's own, in its forward mode
@pytest.mark.slow
@pytest.mark.feature("A12")
@pytest.mark.parametrize("activation", ["silu", "tanh"])
def test_gradients_of_a_gated_pair(activation: str) -> None:
    x, w, gate, bias = normal(2, 3, 4), normal(4, 5), normal(4, 5), normal(5)

    def call(x: Any, w: Any, gate: Any, bias: Any) -> Any:
        return gemm(x, w, gate=gate, bias=bias, activation=activation, alpha=0.5)

    assert torch.autograd.gradcheck(call, (x, w, gate, bias), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (x, w, gate, bias))


GRADED = (
    *(((2, 3, 4), (4, 5)), ((3, 4), (2, 4, 5)), ((2, 1, 3, 4), (1, 3, 4, 2)), ((4,), (4, 5))),
    *(((3, 4), (4,)), ((4,), (4,)), ((2, 3, 4), (4,)), ((2, 0), (0, 3)), ((0, 4), (4, 3))),
)


@pytest.mark.parametrize("shapes", GRADED, ids=str)
def test_gradients_of_batches_and_vectors(shapes: Any) -> None:
    a, b = (normal(*shape) for shape in shapes)
    a, turned = (a.detach().mT.contiguous().requires_grad_(), True) if a.dim() == 3 else (a, False)
    got = gemm(a, b, transpose_a=turned)
    want = (a.mT if turned else a) @ b
    near(got, want)
    slope = torch.randn(want.shape, generator=GENERATOR, dtype=torch.float64)
    found = torch.autograd.grad(got, (a, b), slope)
    for mine, other in zip(found, torch.autograd.grad(want, (a, b), slope), strict=True):
        near(mine, other)


@pytest.mark.slow
def test_gradients_have_the_types_of_their_operands() -> None:
    x = plain(6, 8, dtype=torch.bfloat16).requires_grad_()
    w, bias = plain(8, 4).requires_grad_(), plain(4).requires_grad_()
    y = gemm(x, w, bias=bias, activation="gelu", out_dtype="float16")
    y.float().sum().backward()
    x2, w2, bias2 = (t.detach().double().requires_grad_() for t in (x, w, bias))
    torch.nn.functional.gelu(x2 @ w2 + bias2).sum().backward()
    for mine, other in ((x, x2), (w, w2), (bias, bias2)):
        assert mine.grad.dtype is mine.dtype
        near(mine.grad, other.grad, 0.01)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_products_of_integers_have_gradients_of_what_is_added(activation: str | None) -> None:
    a, b = (torch.tensor(numbers, dtype=torch.int8) for numbers in ([[1, -2, 3]], [[1], [2], [3]]))
    c, bias = plain(1, 1).requires_grad_(), plain(1).requires_grad_()
    options: dict[str, Any] = {"alpha": 0.1, "beta": 0.5, "bias": bias, "out_dtype": "float32"}
    y = gemm(a, b, c, activation=activation, **options)
    z = 0.1 * (a.double() @ b.double()) + 0.5 * c + bias
    want = {None: z, "relu": torch.relu(z), "gelu": torch.nn.functional.gelu(z)}[activation]
    near(y, want)
    found = (torch.autograd.grad(each.sum() * 0.3, (c, bias)) for each in (y, want))
    for mine, other in zip(*found, strict=True):
        near(mine, other)


@pytest.mark.slow
def test_a_compiler_sees_one_operator() -> None:
    def layer(x: Any, w: Any, bias: Any, c: Any) -> Any:
        return gemm(x, w, c, beta=0.5, bias=bias, activation="silu", transpose_b=True).sum(-1)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (3, 5, 6):
        given = normal(rows, 4), normal(7, 4), normal(7), normal(rows, 7)
        got, want = compiled(*given), layer(*given)
        near(got, want)
        slope = torch.ones_like(got)
        for mine, other in zip(
            *(torch.autograd.grad(y, given, slope) for y in (got, want)), strict=True
        ):
            near(mine, other)
    x, out = plain(3, 4), plain(3, 4)
    torch.compile(lambda x, out: gemm(x, x.mT, out=out[:, :3]), backend="aot_eager")(x, out)
    near(out[:, :3], x @ x.mT)


@pytest.mark.slow
def test_exported_programs_have_unknown_sizes() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Any, w: Any) -> Any:
            return gemm(x, w, activation="tanh")

    x, w = plain(3, 4), plain(4, 5)
    sizes = {0: torch.export.Dim("rows", min=2, max=100)}
    program = torch.export.export(Layer(), (x, w), dynamic_shapes=(sizes, None))
    assert "torch.ops.tilefold.gemm" in program.graph_module.code
    more = plain(9, 4)
    near(program.module()(more, w), torch.tanh(more @ w))


@pytest.mark.slow
def test_operator_and_transforms() -> None:
    a, b, bias = normal(3, 4), normal(4, 5), normal(5)
    options = (0.5, 0.0, False, False, "gelu", None, "highest")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opcheck compiles, and torch warns of its own parts
        torch.library.opcheck(torch.ops.tilefold.gemm, (a, b, None, bias, None, *options))

    def call(a: Any, b: Any, bias: Any) -> Any:
        return gemm(a, b, bias=bias, activation="tanh")

    want = torch.tanh(a @ b + bias)
    slopes = torch.func.grad(lambda *x: call(*x).sum(), (0, 1, 2))(a, b, bias)
    others = torch.autograd.grad(want.sum(), (a, b, bias), retain_graph=True)
    for mine, other in zip(slopes, others, strict=True):
        near(mine, other)
    batch = torch.randn(6, 3, 4, generator=GENERATOR, dtype=torch.float64)
    more = torch.randn(6, 4, 5, generator=GENERATOR, dtype=torch.float64)
    vmap = torch.func.vmap
    near(vmap(call, (0, None, None))(batch, b, bias), torch.tanh(batch @ b + bias))
    near(vmap(call, (None, 0, None))(a, more, bias), torch.tanh(a @ more + bias))
    near(vmap(call, (None, None, 0))(a, b, more[:, 0]), torch.tanh(a @ b + more[:, :1]))
    gated = vmap(lambda w, g: gemm(a, w, gate=g), (0, None))(more, b)
    near(gated, (a @ more) * (a @ b))
    near(
        torch.func.jacrev(call)(a, b, bias),
        torch.func.jacrev(lambda *x: torch.tanh(x[0] @ x[1] + x[2]))(a, b, bias),
    )


@pytest.mark.slow
@pytest.mark.feature("A12")
@pytest.mark.parametrize("backend", ["metal", "triton"])
def test_tensors_on_a_gpu_go_to_its_kernels(backend: str, monkeypatch: Any) -> None:
    """The kernels of Metal on the emulator, those of Triton in the interpreter."""
    if backend == "metal":
        needs_emulator()
        machine: Any = Mps(torch.device("cpu"), Compiler(), "apple9")
    else:
        interpreted.needs()
        machine = Interpreted("sm_90")
    monkeypatch.setattr(products, "machine_of", lambda tensor: machine)
    x, w, bias = (plain(*shape).requires_grad_() for shape in ((2, 9, 17), (17, 12), (12,)))
    got = gemm(x, w, bias=bias, activation="gelu")
    want = torch.nn.functional.gelu(x @ w + bias)
    near(got, want)
    slope = plain(2, 9, 12)
    for mine, other in zip(
        *(torch.autograd.grad(y, (x, w, bias), slope) for y in (got, want)), strict=True
    ):
        near(mine, other)
    x, w = x.detach(), w.detach()
    c = plain(17)
    near(gemm(w, x[0, 0, :12], c, beta=0.5), w @ x[0, 0, :12] + 0.5 * c)
    out = plain(9, 12)
    assert gemm(x[0], w, gate=w, activation="silu", out=out) is out
    near(out, torch.nn.functional.silu(x[0] @ w) * (x[0] @ w))
    with pytest.raises(ValueError, match="out must not overlap a"):
        gemm(x[0], w, out=x[0, :, :12])
    with pytest.raises(TypeError, match=r"b must be one of float32.*, got int8") as caught:
        gemm(x, w.to(torch.int8))
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.feature("T15")
def test_bad_tensors_raise_one_line() -> None:
    x, w = plain(3, 4), plain(4, 5)
    one = torch.ones((), requires_grad=True)
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        ((x, w.numpy()), {}, TypeError, "b must be a torch tensor as a is, got ndarray"),
        ((x, w.to_sparse()), {}, TypeError, "b must be a strided tensor, got torch.sparse_coo"),
        ((x, w.cfloat()), {}, TypeError, "b must be one of float32"),
        ((x, w), {"out": plain(3, 5).expand(2, 3, 5)}, ValueError, "out must be of shape (3, 5)"),
        ((x, w + one), {"out": plain(3, 5)}, ValueError, "out takes no gradients"),
        ((x, x.T), {"out": x[:, :3]}, ValueError, "out must not overlap a"),
        ((x, w), {"alpha": torch.tensor(1.0)}, TypeError, "alpha must be a number"),
        ((x, w), {"out_dtype": torch.int8}, TypeError, "out_dtype must be one of float32"),
    ]
    for arrays, options, kind, line in cases:
        with pytest.raises(kind) as caught:
            gemm(*arrays, **options)
        assert line in str(caught.value) and "\n" not in str(caught.value)
    nested = torch.nested.nested_tensor([x, x])
    for call in (lambda: gemm(nested, w), lambda: gemm(x, w, bias=nested)):
        with pytest.raises(TypeError, match=r"(a|bias) must be one tensor, got a nested one"):
            call()
    with pytest.raises(NotImplementedError, match="w must be a plain tensor, whose memory is read"):
        torch.func.vmap(tilefold.pack)(plain(2, 3, 4))
    w = w.detach()
    for index in range(2):  # a storage's first element has the address 0 then, others small ones
        freed, out = plain(2, 3, 4)[index], plain(2, 3, 5)[index]
        for tensor in (freed, out):
            gemm(plain(3, 4), w, out=plain(3, 5))  # a plan is kept for tensors that lie so
            tensor.untyped_storage().resize_(0)
        with pytest.raises(
            ValueError, match=r"a needs .* bytes of memory, and its storage holds 0"
        ):
            gemm(freed, w)
        with pytest.raises(ValueError, match=r"out needs .* bytes of memory, and its storage"):
            gemm(plain(3, 4), w, out=out)
