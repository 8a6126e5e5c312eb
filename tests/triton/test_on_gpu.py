"""The triton backend on a real card, at real sizes: ``pytest -m gpu tests/triton``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import xsep
from xsep import testing
from xsep.backends.triton import TRITON
from xsep.ops.training import batch_norm_finalize, separable_fprop_statistics
from xsep.problem import RELU, Affine, Geometry, Problem
from xsep.testing import VECTORS, Case

pytestmark = pytest.mark.gpu

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SAME = Geometry(1, 1, 1, 1, 1, 1, 1, 1)
CHAIN = ("relu", None, None)
CASES = [
    Case(n=8, c_in=64, h=147, w=147, c_out=128, activations=CHAIN),
    Case(n=4, c_in=128, h=74, w=74, c_out=256, activations=CHAIN, vectors=("scale_p", "shift_p")),
    Case(n=4, c_in=256, h=37, w=37, c_out=728, residual=True, bias=True),
    Case(n=8, c_in=728, h=19, w=19, c_out=728, activations=CHAIN, vectors=VECTORS),
    Case(n=8, c_in=1536, h=10, w=10, c_out=2048),
    Case(n=8, c_in=96, h=57, w=57, c_out=24, stride=(2, 2), activations=(None, "silu", None)),
    Case(n=4, c_in=144, h=28, w=28, c_out=40, filter=(5, 5), padding=(2, 2, 2, 2), stride=(2, 2)),
    Case(n=4, c_in=240, h=14, w=14, c_out=80, filter=(5, 5), padding=(2, 2, 2, 2), activations=(None, "silu", None)),
    Case(n=4, c_in=96, h=56, w=56, c_out=96, filter=(7, 7), padding=(3, 3, 3, 3), activations=(None, None, "gelu")),
    Case(n=2, c_in=256, h=33, w=33, c_out=256, padding=(12, 12, 12, 12), dilation=(12, 12)),
    Case(n=2, c_in=13, h=23, w=19, c_out=17, layout="sliced"),
    Case(n=2, c_in=32, h=41, w=37, c_out=16, multiplier=2, layout="contiguous"),
    Case(n=2, c_in=40, h=31, w=31, c_out=56, filter=(9, 9), padding=(4, 4, 4, 4)),
    Case(op="depthwise", n=16, c_in=384, h=28, w=28, activations=(None, None, "silu"), bias=True),
]  # fmt: skip


@pytest.fixture(autouse=True)
def supported() -> None:
    problem = Problem("separable", "cuda", torch.float32, True, 1, 8, 8, 8, 1, 3, 3, 8, SAME, (0, 0, 0))
    reasons = TRITON.not_supported_reasons(problem)
    if reasons:
        pytest.fail("; ".join(reasons))


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_forward_and_every_gradient(case: Case, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.cudnn.conv.fp32_precision", "ieee")
    testing.check(replace(case, dtype=DTYPES[kind]), "triton", "cuda")


@pytest.mark.parametrize("case", CASES[:5], ids=lambda c: c.id)
def test_tf32_where_the_settings_allow_it(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.cudnn.conv.fp32_precision", "tf32")
    monkeypatch.setattr("torch.backends.cuda.matmul.fp32_precision", "tf32")
    testing.check(case, "triton", "cuda")


@pytest.mark.parametrize("case", list(testing.generate(60, seed=31)), ids=lambda c: c.id)
def test_generated_problem(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.cudnn.conv.fp32_precision", "ieee")
    testing.check(case, "triton", "cuda")


def test_more_than_two_to_the_31_elements() -> None:
    """The last picture of a batch of 2.3e9 elements is what it is alone, forward and backward."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB of GPU memory")
    n, c, size = 2200, 64, 128
    x = torch.empty((n, size, size, c), device="cuda", dtype=torch.bfloat16).normal_().permute(0, 3, 1, 2)
    assert x.numel() > 2**31
    w_dw = torch.randn(c, 1, 3, 3, device="cuda", dtype=torch.bfloat16)
    w_pw = torch.randn(c, c, 1, 1, device="cuda", dtype=torch.bfloat16)
    relu = Affine(None, None, RELU, 0.0)
    for pictures in (slice(0, 1), slice(n - 1, n)):
        alone = TRITON.depthwise(x[pictures], w_dw, relu, Affine(), SAME)
        assert torch.equal(TRITON.depthwise(x, w_dw, relu, Affine(), SAME)[pictures], alone)
        dx = TRITON.depthwise_backward_kernel(x, x, w_dw, relu, SAME, (True, False, False, False)).dx
        one = TRITON.depthwise_backward_kernel(
            x[pictures], x[pictures], w_dw, relu, SAME, (True, False, False, False)
        ).dx  # fmt: skip
        assert dx is not None and one is not None and torch.equal(dx[pictures], one)
        del dx
        r = separable_fprop_statistics(x, None, None, RELU, 0.0, w_dw, w_pw, SAME)[0]
        r_alone = separable_fprop_statistics(x[pictures], None, None, RELU, 0.0, w_dw, w_pw, SAME)[0]
        assert torch.equal(r[pictures], r_alone)


@pytest.mark.parametrize("c_out", [128, 728], ids=["fused", "staged"])
def test_cuda_graph_of_forward_and_backward(c_out: int) -> None:
    case = Case(n=8, c_in=128, h=37, w=37, c_out=c_out, activations=CHAIN, dtype=torch.bfloat16)
    inputs = testing.make_inputs(case, "cuda")
    x, w_dw, w_pw = (inputs.tensors[k] for k in ("x", "w_dw", "w_pw"))

    def step() -> list[torch.Tensor]:
        y = xsep.separable_conv2d(
            x, w_dw, w_pw, padding=1, prologue=xsep.ChannelAffine(activation="relu"), backend="triton"
        )
        return [y, *torch.autograd.grad(y, (x, w_dw, w_pw), inputs.dy)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = [t.clone() for t in step()]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
        for t in captured:
            t.detach().fill_(float("nan"))
        graph.replay()
    torch.cuda.synchronize()
    for ours, theirs in zip(captured, expected):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("size", [(8, 128, 147), (8, 728, 19)], ids=str)
def test_statistics_at_real_sizes(size: tuple[int, int, int]) -> None:
    n, c, h = size
    x = (100 + 0.1 * torch.randn(n, h, h, c, device="cuda")).bfloat16().permute(0, 3, 1, 2)
    w_dw = torch.zeros(c, 1, 3, 3, device="cuda", dtype=torch.bfloat16)
    w_dw[:, :, 1, 1] = 1
    w_pw = torch.eye(c, device="cuda", dtype=torch.bfloat16)[:, :, None, None]
    r, partials, counts, _ = separable_fprop_statistics(x, None, None, 0, 0.0, w_dw, w_pw, SAME)
    assert torch.equal(r, x) and partials is not None and counts is not None
    ones, zeros = torch.ones(c, device="cuda"), torch.zeros(c, device="cuda")
    _, mean, invstd, count = batch_norm_finalize(partials, counts, ones, zeros, eps=1e-12)
    assert int(count) == n * h * h
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-7, atol=0)
    exact = x.double().var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(invstd.double().square().reciprocal(), exact, rtol=1e-5, atol=0)
