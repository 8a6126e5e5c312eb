"""The ops under torch.compile, export, FX and autocast: traced once, right for every batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.compile_fx import compile_fx

import xsep
from xsep import testing
from xsep.testing import VECTORS, Case

CASES = [
    Case(),
    Case(layout="contiguous", activations=("relu", None, "silu"), bias=True),
    Case(multiplier=2, residual=True, vectors=VECTORS, activations=("relu", "silu", "relu6"), bias=True),
    Case(dtype=torch.bfloat16, vectors=VECTORS, wide_vectors=True, activations=("elu", None, "gelu")),
    Case(op="depthwise", bias=True, vectors=VECTORS, activations=("relu", None, "hardswish"), stride=(2, 1)),
    Case(c_in=1, c_out=1, h=5, w=1, padding=(1, 1, 1, 1)),
    Case(n=0),
]


def op_arguments(case: Case, backend: str) -> tuple[Any, tuple[Any, ...]]:
    from xsep.arguments import depthwise_args, separable_args

    positional, keywords = testing.make_inputs(case).arguments()
    names = {"bias": None, **keywords}
    if case.op == "depthwise":
        args: Any = depthwise_args(**dict(zip(("x", "w_dw"), positional)), **names)
        return torch.ops.xsep.depthwise_conv2d.default, (*args, backend)
    args = separable_args(**dict(zip(("x", "w_dw", "w_pw"), positional)), **{"residual": None, **names})
    return torch.ops.xsep.separable_conv2d.default, (*args, backend)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_opcheck(case: Case, backend: str) -> None:
    op, args = op_arguments(case, backend)
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("case", CASES[:5], ids=lambda c: c.id)
def test_opcheck_of_the_backward(case: Case, backend: str) -> None:
    from xsep.ops.autograd import y_is_needed
    from xsep.ops.definitions import DEPTHWISE, SEPARABLE

    _, args = op_arguments(case, backend)
    op = SEPARABLE if case.op == "separable" else DEPTHWISE
    y = op.forward_op(*args).detach()
    _, activations, alphas, _ = args[op.tensors :]
    kept = y if y_is_needed(activations, alphas) else None
    wanted = [t is not None and i != op.residual for i, t in enumerate(args[: op.tensors])]
    # Up to PyTorch 2.12 its own convolution, which the double backward is made of, has none of unknown sizes.
    sizes = "dynamic" if torch.__version__ >= "2.13" else "static"
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", f"test_aot_dispatch_{sizes}")
    torch.library.opcheck(op.backward_op, (torch.randn_like(y), kept, *args, wanted), test_utils=checks)


@pytest.mark.parametrize("case", CASES[:6], ids=lambda c: c.id)
def test_fake_and_reality_agree_to_the_stride(case: Case, backend: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    op, args = op_arguments(case, backend)
    with torch.no_grad():
        real = op(*args)
        with FakeTensorMode() as mode:
            fake = op(*[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args])
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def network(x: Tensor, w_dw: Tensor, w_pw: Tensor, scale: Tensor, backend: str) -> Tensor:
    act = xsep.ChannelAffine(activation="relu")
    for _ in range(2):
        x = xsep.separable_conv2d(
            x, w_dw, w_pw, padding=1, prologue=act, epilogue=xsep.ChannelAffine(scale), residual=x, backend=backend
        )
    return xsep.depthwise_conv2d(x, w_dw, padding="same", stride=2, backend=backend)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_compiled_fullgraph_with_a_dynamic_batch(layout: torch.memory_format, backend: str) -> None:
    weights: list[Any] = [torch.randn(s) * 0.3 for s in ((8, 1, 3, 3), (8, 8, 1, 1), (8,))]
    frames = 0

    def count(graph: Any, example: Any) -> Any:
        nonlocal frames
        frames += 1
        return compile_fx(graph, example)

    eager: Any = network
    compiled = torch.compile(eager, fullgraph=True, backend=count)
    for n in (2, 3, 5, 17):
        x: Any = torch.randn(n, 8, 9, 10).contiguous(memory_format=layout)
        leaves: list[Any] = [t.clone().requires_grad_() for t in (x, *weights)]
        again: list[Any] = [t.clone().requires_grad_() for t in (x, *weights)]
        torch._dynamo.mark_dynamic(leaves[0], 0)  # raises where tracing pins the batch size
        y, expected = compiled(*leaves, backend), eager(*again, backend)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert y.stride() == expected.stride()
        dy = torch.randn_like(y)
        for got, want in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, again, dy)):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
    assert frames == 1, f"compiled {frames} times for four batch sizes"


def test_export_keeps_the_op(backend: str) -> None:
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w_dw = torch.nn.Parameter(torch.randn(8, 1, 3, 3))
            self.w_pw = torch.nn.Parameter(torch.randn(8, 8, 1, 1))
            self.scale = torch.nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            return network(x, self.w_dw, self.w_pw, self.scale, backend)

    model = Network()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(2, 8, 9, 10),), dynamic_shapes=({0: batch},))
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("xsep.separable_conv2d" in t for t in targets) == 2
    x = torch.randn(5, 8, 9, 10)
    torch.testing.assert_close(program.module()(x), model(x))


def test_symbolic_trace_keeps_the_call(backend: str) -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w_dw = torch.nn.Parameter(torch.randn(8, 1, 3, 3))
            self.w_pw = torch.nn.Parameter(torch.randn(8, 8, 1, 1))
            self.scale = torch.nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            affine = xsep.ChannelAffine(self.scale, activation="relu")
            return xsep.separable_conv2d(x, self.w_dw, self.w_pw, padding="same", epilogue=affine, backend=backend)

    layer = Layer()
    traced = torch.fx.symbolic_trace(layer)
    assert any(node.target is xsep.separable_conv2d for node in traced.graph.nodes)
    x = torch.randn(2, 8, 6, 6)
    y = traced(x)
    torch.testing.assert_close(y, layer(x))
    assert y.requires_grad


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_conv2d_does(kind: torch.dtype, backend: str) -> None:
    x, w_dw, w_pw = (torch.randn(s, requires_grad=True) for s in ((2, 8, 6, 7), (8, 1, 3, 3), (5, 8, 1, 1)))
    scale = torch.randn(5, requires_grad=True)
    affine = xsep.ChannelAffine(scale, activation="relu")
    with torch.autocast("cpu", dtype=kind):
        y = xsep.separable_conv2d(x, w_dw, w_pw, padding=1, epilogue=affine, backend=backend)
        assert torch.conv2d(x, w_dw, groups=8).dtype == y.dtype == kind
    y.float().sum().backward()
    for leaf in (x, w_dw, w_pw, scale):
        assert leaf.grad is not None and leaf.grad.dtype == torch.float32
    manual = xsep.separable_conv2d(
        x.to(kind), w_dw.to(kind), w_pw.to(kind), padding=1, epilogue=affine, backend=backend
    )
    assert torch.equal(y, manual)


def test_autocast_under_compile() -> None:
    x, w_dw, w_pw = torch.randn(2, 8, 6, 7), torch.randn(8, 1, 3, 3), torch.randn(5, 8, 1, 1)

    @torch.compile(fullgraph=True)
    def f(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return xsep.separable_conv2d(x, w_dw, w_pw)

    assert f(x).dtype == torch.bfloat16


def test_float64_is_left_alone_by_autocast() -> None:
    x, w_dw, w_pw = (torch.randn(s, dtype=torch.float64) for s in ((1, 4, 5, 5), (4, 1, 3, 3), (2, 4, 1, 1)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert xsep.separable_conv2d(x, w_dw, w_pw).dtype == torch.float64
