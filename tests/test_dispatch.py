"""Who runs what, and what is said about the others."""

from __future__ import annotations

from typing import Optional

import pytest
import torch

import xsep
from xsep import dispatch
from xsep.problem import Problem

X, W_DW, W_PW = torch.randn(1, 8, 6, 6), torch.randn(8, 1, 3, 3), torch.randn(4, 8, 1, 1)


def test_auto_takes_the_fused_kernel_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XSEP_BACKEND", raising=False)
    text = xsep.explain(X, W_DW, W_PW, padding=1)
    assert "runs on   cpu" in text and "not aten" in text and "not cuda" in text and "not triton" in text
    assert "floor" in text


@pytest.mark.parametrize(
    ("channels", "size", "layout", "stride", "left"),
    [(1, 48, torch.contiguous_format, 1, True), (1, 19, torch.contiguous_format, 1, False),
     (3, 192, torch.contiguous_format, 2, True), (3, 192, torch.contiguous_format, 1, False),
     (3, 192, torch.channels_last, 2, False), (4, 192, torch.contiguous_format, 2, False)],
)  # fmt: skip
def test_training_of_channels_that_leave_vectors_empty_is_left_to_pytorch(
    channels: int, size: int, layout: torch.memory_format, stride: int, left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XSEP_BACKEND", raising=False)
    x = torch.randn(2, channels, size, size).contiguous(memory_format=layout)
    w_dw, w_pw = torch.randn(channels, 1, 3, 3), torch.randn(4, channels, 1, 1)
    text = xsep.explain(x, w_dw, w_pw, padding=1, stride=stride)
    assert "runs on   cpu" in text
    assert ("backward  aten: PyTorch's convolutions are faster" in text) == left
    alone = xsep.separable_conv2d(x, w_dw, w_pw, padding=1, stride=stride)
    x.requires_grad_()
    for _ in range(2):  # the second time by the calls that were checked once
        y = xsep.separable_conv2d(x, w_dw, w_pw, padding=1, stride=stride)
        plain = torch.nn.functional.conv2d(x, w_dw, None, stride, 1, groups=channels)
        # PyTorch's own two convolutions, whose gradients are theirs, or what a forward by itself is.
        assert torch.equal(y, torch.nn.functional.conv2d(plain, w_pw) if left else alone)
        assert (y.grad_fn is not None and "Convolution" in type(y.grad_fn).__name__) == left
        y.sum().backward()


@pytest.mark.parametrize(("size", "activation", "left"), [(224, None, True), (112, None, False), (224, "relu", False)])
def test_bfloat16_is_left_where_pytorch_multiplies_pairs(
    size: int, activation: Optional[str], left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XSEP_BACKEND", raising=False)
    x = torch.randn(1, 3, size, size).to(torch.bfloat16, memory_format=torch.channels_last)
    weights = torch.randn(3, 1, 3, 3).bfloat16(), torch.randn(32, 3, 1, 1).bfloat16()
    text = xsep.explain(x, *weights, padding=1, epilogue=xsep.ChannelAffine(activation=activation))
    there = left and torch.ops.xsep.cpu_has_bfloat16_dot()
    assert ("runs on   aten" in text) == there and ("leave most lanes of a vector idle" in text) == there


def test_explain_counts_bytes_and_flops() -> None:
    p = Problem(
        "separable", "cpu", torch.bfloat16, True, 64, 64, 147, 147, 1, 3, 3, 128,
        xsep.problem.Geometry(1, 1, 1, 1, 1, 1, 1, 1), (1, 0, 0),
    )  # fmt: skip
    moved, flops = dispatch.work(p)
    pixels = 64 * 147 * 147
    assert moved == 2 * (pixels * 64 + pixels * 128 + 64 * 9 + 64 * 128)
    assert flops == 2 * pixels * (64 * 9 + 64 * 128)


def test_environment_chooses_where_the_caller_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XSEP_BACKEND", "aten")
    assert "runs on   aten" in xsep.explain(X, W_DW, W_PW)
    assert "runs on   cpu" in xsep.explain(X, W_DW, W_PW, backend="cpu")
    monkeypatch.setenv("XSEP_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"XSEP_BACKEND must be auto or one of .*got 'fast'"):
        xsep.separable_conv2d(X, W_DW, W_PW)


def test_an_explicit_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run .*float64"):
        xsep.separable_conv2d(X.double(), W_DW.double(), W_PW.double(), backend="cpu")
    assert "runs on   nothing" in xsep.explain(X.double(), W_DW.double(), W_PW.double(), backend="cpu")


def test_explain_of_a_depthwise_convolution() -> None:
    assert "depthwise" in xsep.explain(X, W_DW)
    with pytest.raises(ValueError, match="w_pw is missing"):
        xsep.explain(X, W_DW, residual=X)


def test_choosing_is_cheap_after_the_first_time() -> None:
    """A bound on work, not on time: the second look-up asks no backend anything."""
    problem = Problem(
        "separable", "cpu", torch.float32, True, 3, 8, 9, 9, 1, 3, 3, 8,
        xsep.problem.Geometry(1, 1, 1, 1, 1, 1, 1, 1), (0, 0, 0),
    )  # fmt: skip
    dispatch.select(problem, "auto")
    before = dispatch._select.cache_info().hits
    dispatch.select(problem, "auto")
    assert dispatch._select.cache_info().hits == before + 1
