"""What cannot be meant is refused in one sentence that names the argument, on every backend alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import xsep
from xsep import ChannelAffine

GOOD: dict[str, Any] = {
    "x": torch.randn(2, 4, 6, 7),
    "w_dw": torch.randn(8, 1, 3, 3),
    "w_pw": torch.randn(5, 8, 1, 1),
}


def elu(alpha: Any) -> ChannelAffine:
    return ChannelAffine(activation="elu", alpha=alpha)


REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("x_rank", {"x": torch.randn(4, 6, 7)}, ValueError, r"x must be \[N, C_in, H, W\], got \[4, 6, 7\].*x\[None\]"),
    ("x_list", {"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    ("x_integer", {"x": torch.ones(2, 4, 6, 7, dtype=torch.int64)}, TypeError, "x must be float32.*torch.int64"),
    ("x_complex", {"x": torch.ones(2, 4, 6, 7, dtype=torch.complex64)}, TypeError, "x must be float32.*complex64"),
    ("x_sparse", {"x": torch.randn(2, 4, 6, 7).to_sparse()}, TypeError, "x must be a dense"),
    ("x_no_channels", {"x": torch.randn(2, 0, 6, 7)}, ValueError, r"x must have at least one channel.*\[2, 0, 6, 7\]"),
    ("w_dw_rank", {"w_dw": torch.randn(8, 3, 3)}, ValueError, r"w_dw must be \[C_in .* got \[8, 3, 3\]"),
    ("w_dw_dense", {"w_dw": torch.randn(8, 4, 3, 3)}, ValueError, r"w_dw must be \[C_in .* got \[8, 4, 3, 3\]"),
    ("w_dw_channels", {"w_dw": torch.randn(6, 1, 3, 3)}, ValueError, r"multiple of x's 4 channels.*\[6, 1, 3, 3\]"),
    ("w_dw_empty", {"w_dw": torch.randn(8, 1, 0, 3)}, ValueError, "w_dw must have a filter of at least 1x1"),
    ("w_dw_type", {"w_dw": torch.randn(8, 1, 3, 3).half()}, TypeError, "w_dw must have x's type torch.float32"),
    ("w_dw_device", {"w_dw": torch.empty(8, 1, 3, 3, device="meta")}, ValueError, "w_dw must be on x's device cpu, got meta"),
    ("w_pw_channels", {"w_pw": torch.randn(5, 4, 1, 1)}, ValueError, r"w_pw must be \[C_out, 8, 1, 1\].*\[5, 4, 1, 1\]"),
    ("w_pw_filter", {"w_pw": torch.randn(5, 8, 3, 3)}, ValueError, r"w_pw must be \[C_out, 8, 1, 1\]"),
    ("w_pw_flat", {"w_pw": torch.randn(5, 8)}, ValueError, r"w_pw must be .* got \[5, 8\]"),
    ("w_pw_empty", {"w_pw": torch.randn(0, 8, 1, 1)}, ValueError, "w_pw must have at least one output channel"),
    ("bias_length", {"bias": torch.randn(4)}, ValueError, r"bias must be \[C_out\] = \[5\], got \[4\]"),
    ("bias_type", {"bias": torch.randn(5).double()}, TypeError, "bias must have x's type torch.float32"),
    ("bias_number", {"bias": 1.0}, TypeError, "bias must be a tensor or None, got float"),
    ("stride_zero", {"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    ("stride_three", {"stride": (1, 1, 1)}, ValueError, "stride must be an int or a pair of ints"),
    ("stride_float", {"stride": (1.0, 1)}, ValueError, "stride must be an int or a pair of ints"),
    ("stride_word", {"stride": "2"}, ValueError, "stride must be an int or a pair of ints, got '2'"),
    ("stride_numpy", {"stride": np.float32(1)}, ValueError, "stride must be an int or a pair of ints, got .*1.0"),
    ("stride_numpy_zero", {"stride": (1, np.int64(0))}, ValueError, "stride must be at least 1, got .*0"),
    ("stride_numpy_bool", {"stride": np.bool_(True)}, ValueError, "stride must be an int or a pair of ints, got .*True"),
    ("stride_bool_beside_numpy", {"stride": (np.int64(1), True)}, ValueError, "stride must be an int or a pair of ints, got .*True"),
    ("padding_numpy_side", {"padding": (0, np.int64(-1), 0, 0)}, ValueError, "left, right, top, bottom. must be at least 0, got"),
    ("stride_none", {"stride": None}, ValueError, "stride must be an int or a pair of ints, got None"),
    ("dilation_zero", {"dilation": (1, 0)}, ValueError, r"dilation must be at least 1, got \(1, 0\)"),
    ("padding_word", {"padding": "full"}, ValueError, "padding must be .*got 'full'"),
    ("padding_float", {"padding": 1.0}, ValueError, "padding must be an int or a pair of ints, got 1.0"),
    ("padding_float_side", {"padding": (0, 1.0, 0, 0)}, ValueError, "left, right, top, bottom. must be ints, got .0, 1.0"),
    ("padding_negative", {"padding": -1}, ValueError, "padding must be at least 0, got -1"),
    ("padding_negative_side", {"padding": (0, -1, 0, 0)}, ValueError, "padding .left, right, top, bottom. must be"),
    ("padding_three", {"padding": (1, 1, 1)}, ValueError, "padding must be an int or a pair"),
    ("output_size", {"dilation": 4}, ValueError, r"the output would be -2x-1: .*filter 3x3 at dilation 4x4"),
    ("prologue_type", {"prologue": "relu"}, TypeError, "prologue must be a ChannelAffine or None, got str"),
    ("activation", {"middle": ChannelAffine(activation="mish")}, ValueError, "middle.activation must be .*got 'mish'"),
    ("alpha", {"epilogue": ChannelAffine(activation="relu", alpha=0.1)}, ValueError, "epilogue.alpha belongs to elu"),
    ("alpha_word", {"epilogue": elu("foo")}, ValueError, "epilogue.alpha must be a finite real number, got 'foo'"),
    ("alpha_text", {"middle": elu("1")}, ValueError, "middle.alpha must be a finite real number, got '1'"),
    ("alpha_nan", {"prologue": elu(float("nan"))}, ValueError, "prologue.alpha must be a finite real number, got nan"),
    ("alpha_infinite", {"middle": elu(-float("inf"))}, ValueError, "middle.alpha must be .* got -inf"),
    ("alpha_bool", {"middle": elu(True)}, ValueError, "middle.alpha must be .* got True"),
    ("alpha_numpy_bool", {"middle": elu(np.bool_(True))}, ValueError, "middle.alpha must be .*True"),
    ("alpha_complex", {"middle": elu(1j)}, ValueError, "middle.alpha must be .* got 1j"),
    ("alpha_huge", {"middle": elu(10**400)}, ValueError, "middle.alpha must be .* got 1000"),
    ("alpha_vector", {"middle": elu(torch.ones(2))}, ValueError, "middle.alpha must be .* got tensor"),
    ("prologue_length", {"prologue": ChannelAffine(torch.randn(8))}, ValueError, r"prologue.scale must be \[C_in\] = \[4\]"),
    ("middle_length", {"middle": ChannelAffine(None, torch.randn(4))}, ValueError, r"middle.shift must be \[C_mid\] = \[8\]"),
    ("epilogue_rank", {"epilogue": ChannelAffine(torch.randn(5, 1))}, ValueError, r"epilogue.scale must be \[C_out\]"),
    ("epilogue_half", {"epilogue": ChannelAffine(torch.randn(5).half())}, TypeError, "epilogue.scale must have x's type"),
    ("residual_shape", {"residual": torch.randn(2, 5, 1, 1)}, ValueError, r"residual must have exactly .*\[2, 5, 4, 5\].*not broadcast"),
    ("residual_type", {"residual": torch.randn(2, 5, 4, 5).double()}, TypeError, "residual must have x's type"),
    ("backend", {"backend": "cudnn"}, ValueError, "backend must be None or one of auto, aten, cpu, triton, cuda, got 'cudnn'"),
]  # fmt: skip


@pytest.mark.parametrize("name, change, kind, message", REFUSED, ids=[r[0] for r in REFUSED])
def test_refused(name: str, change: dict[str, Any], kind: type[Exception], message: str) -> None:
    xsep.separable_conv2d(**GOOD)  # what is remembered of a good call must not let a bad one through
    given = {**GOOD, **change}
    positional = [given.pop(k) for k in ("x", "w_dw", "w_pw")]
    with pytest.raises(kind, match=message) as caught:
        xsep.separable_conv2d(*positional, **given)
    assert "\n" not in str(caught.value)


def test_depthwise_refuses_alike() -> None:
    with pytest.raises(ValueError, match=r"bias must be \[C_mid\] = \[8\], got \[5\]"):
        xsep.depthwise_conv2d(GOOD["x"], GOOD["w_dw"], torch.randn(5))
    with pytest.raises(ValueError, match=r"epilogue.shift must be \[C_mid\]"):
        xsep.depthwise_conv2d(GOOD["x"], GOOD["w_dw"], epilogue=ChannelAffine(shift=torch.randn(4)))


@pytest.mark.parametrize("op", ["separable", "depthwise"])
@pytest.mark.parametrize("size, filter_size, stride, dilation", [
    (7, 3, 1, 1), (7, 3, 2, 1), (8, 3, 2, 1), (9, 5, 3, 2), (6, 2, 2, 1), (5, 1, 3, 1), (6, 4, 1, 2), (147, 3, 2, 1),
])  # fmt: skip
def test_same_padding_is_tensorflows(size: int, filter_size: int, stride: int, dilation: int, op: str) -> None:
    """ceil(size / stride) outputs, and the odd pixel of padding goes after: computed here by its definition."""
    x, w_dw = torch.randn(1, 2, size, size), torch.randn(2, 1, filter_size, filter_size)
    out = -(-size // stride)
    total = max((out - 1) * stride + (filter_size - 1) * dilation + 1 - size, 0)
    padded = torch.nn.functional.pad(x, (total // 2, total - total // 2) * 2)
    expected = torch.conv2d(padded, w_dw, stride=stride, dilation=dilation, groups=2)
    assert expected.shape[2] == out
    if op == "depthwise":
        y = xsep.depthwise_conv2d(x, w_dw, stride=stride, padding="same", dilation=dilation)
    else:
        w_pw = torch.eye(2)[:, :, None, None]
        y = xsep.separable_conv2d(x, w_dw, w_pw, stride=stride, padding="same", dilation=dilation)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_padding_forms_agree() -> None:
    x, w_dw, w_pw = GOOD["x"], GOOD["w_dw"], GOOD["w_pw"]

    def run(padding: Any) -> torch.Tensor:
        return xsep.separable_conv2d(x, w_dw, w_pw, padding=padding)

    assert torch.equal(run(0), run("valid"))
    assert torch.equal(run(1), run((1, 1, 1, 1)))
    assert torch.equal(run(1), run("same"))
    assert torch.equal(run((2, 1)), run((1, 1, 2, 2)))


def test_numbers_of_numpy_are_numbers() -> None:
    x, w_dw, w_pw = GOOD["x"], GOOD["w_dw"], GOOD["w_pw"]

    def run(integer: Any, real: Any) -> list[torch.Tensor]:
        zero, one, two = integer(0), integer(1), integer(2)
        options: dict[str, Any] = dict(stride=(two, one), dilation=one, middle=elu(real(0.25)))
        paddings: tuple[Any, ...] = (one, (one, zero), (two, zero, one, one))
        return [xsep.separable_conv2d(x, w_dw, w_pw, padding=padding, **options) for padding in paddings]

    for integer in (np.int64, np.int32, np.uint8):
        for real in (np.float64, np.float32, np.float16):
            assert all(torch.equal(a, b) for a, b in zip(run(integer, real), run(int, float), strict=True))


def test_float32_vectors_beside_sixteen_bits() -> None:
    x, w_dw, w_pw = (GOOD[k].bfloat16() for k in ("x", "w_dw", "w_pw"))
    affine = ChannelAffine(torch.randn(5), torch.randn(5))
    assert xsep.separable_conv2d(x, w_dw, w_pw, torch.randn(5), epilogue=affine).dtype == torch.bfloat16
