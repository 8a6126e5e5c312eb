"""NaN, infinities and denormals go through as in PyTorch's own convolutions.

Where PyTorch differs from itself there is no such answer. Its float16 filters multiply the padding (infinity times the
zeros there is NaN), its float32 and bfloat16 ones do not. Its gelu of an infinity is NaN in one layout and not in the
other. Its float16 depthwise result overflows where the fused op, which never stores it, does not.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import xsep
from xsep import reference
from xsep.testing import NAMES

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VALUES = [torch.nan, torch.inf, -torch.inf]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
PLACES = ["inside", "corner", "w_dw", "w_pw", "where_weights_are_zero"]


def kinds(t: Tensor) -> Tensor:
    """0 finite, 1 inf, 2 -inf, 3 NaN."""
    return t.isposinf() + 2 * t.isneginf() + 3 * t.isnan()


def tensors(dtype: torch.dtype, layout: torch.memory_format, c_in: int = 19, c_out: int = 7) -> list[Tensor]:
    x, w_dw, w_pw = torch.randn(2, c_in, 7, 9), torch.randn(c_in, 1, 3, 3), torch.randn(c_out, c_in, 1, 1)
    return [x.to(dtype).contiguous(memory_format=layout), w_dw.to(dtype), w_pw.to(dtype)]


def two(x: Tensor, w_dw: Tensor, w_pw: Tensor) -> tuple[Tensor, Tensor]:
    z = torch.conv2d(x, w_dw, padding=1, groups=x.shape[1])
    return z, torch.conv2d(z, w_pw)


def ours(x: Tensor, w_dw: Tensor, w_pw: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    z = xsep.depthwise_conv2d(x, w_dw, padding=1, backend=backend)
    return z, xsep.separable_conv2d(x, w_dw, w_pw, padding=1, backend=backend)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", VALUES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_what_is_not_finite_spreads_as_in_two_convolutions(
    place: str, value: float, dtype: torch.dtype, layout: torch.memory_format, backend: str
) -> None:
    x, w_dw, w_pw = tensors(dtype, layout)
    if place == "w_dw":
        w_dw[2, 0, 0, 0] = value
    elif place == "w_pw":
        w_pw[3, 5] = value
    elif place == "corner":
        x[1, 3, 0, 0] = value
    else:
        x[1, 3, 3, 4] = value
    if place == "where_weights_are_zero":
        w_dw[3], w_pw[:, 3] = 0, 0
    # PyTorch's 16-bit convolutions multiply padding by the weights where they are not oneDNN's.
    onednns = dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    wide = dtype is not torch.float32 and not onednns and backend != "aten"
    expected = two(x.float(), w_dw.float(), w_pw.float()) if wide else two(x, w_dw, w_pw)
    for got, want in zip(ours(x, w_dw, w_pw, backend), expected):
        assert torch.equal(kinds(got), kinds(want))
    assert not expected[1].isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES[1:])
def test_activations_pass_them_on(name: str, dtype: torch.dtype, layout: torch.memory_format, backend: str) -> None:
    """No minimum or maximum may swallow a NaN. The weights are positive: no infinity minus infinity."""
    x, w_dw, w_pw = (t.abs() + 0.1 if i else t for i, t in enumerate(tensors(dtype, layout)))
    x[0, 1, 2, 2] = torch.nan
    if name != "gelu":
        x[0, 2, 5, 6], x[1, 2, 5, 6] = torch.inf, -torch.inf
    for place in range(3):
        affines = [xsep.ChannelAffine(activation=name if p == place else None) for p in range(3)]
        options: Any = dict(zip(("prologue", "middle", "epilogue"), affines))
        y = xsep.separable_conv2d(x, w_dw, w_pw, padding=1, backend=backend, **options)
        wide = (t.float().cpu() for t in (x, w_dw, w_pw))
        want = reference.two_convolutions(*wide, padding=(1, 1, 1, 1), **options)
        assert torch.equal(kinds(y).cpu(), kinds(want)), f"{name} as the {('prologue', 'middle', 'epilogue')[place]}"
        assert want.isnan().any() and (want.isposinf().any() or name in ("relu6", "gelu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", VALUES, ids=str)
def test_a_bad_gradient_reaches_what_it_must_and_nothing_else(value: float, dtype: torch.dtype, backend: str) -> None:
    leaves = [t.requires_grad_() for t in tensors(dtype, torch.channels_last)]
    dy = torch.randn(2, 7, 7, 9).to(dtype)
    dy[1, 2, 3, 4] = value
    y = xsep.separable_conv2d(*leaves, padding=1, backend=backend)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected = torch.autograd.grad(reference.separable_conv2d(*wide, padding=(1, 1, 1, 1)), wide, dy.double())
    for name, got, want in zip(("dx", "dw_dw", "dw_pw"), torch.autograd.grad(y, leaves, dy), expected):
        assert torch.equal(got.isfinite(), want.isfinite()), name
    assert expected[0].isfinite().any() and expected[2].isfinite().any()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_float16_overflows_no_sooner_than_in_pytorch(layout: torch.memory_format) -> None:
    """The fused op holds z in float32: where PyTorch's z is infinite it may have the right finite answer."""
    x, w_dw, w_pw = tensors(torch.float16, layout)
    x[1, 3, 3, 4] = torch.finfo(torch.float16).max
    # Twice, or about a quarter, of the largest value that there is: no z lies so near to it, and no y, that rounding
    # decides whether it is infinite. Output 0 is so where z is not.
    w_dw[3] = (torch.where(w_dw[3] < 0, -1, 1) * (0.2 + 0.1 * torch.rand(1, 3, 3))).half()
    w_dw[3, 0, 1, 1] = 2
    w_pw[:, 3] = (torch.where(w_pw[:, 3] < 0, -1, 1) * (0.1 + 0.3 * torch.rand(7, 1, 1))).half()
    w_pw[0, 3] = 8
    theirs = two(x, w_dw, w_pw)[1]
    y = xsep.separable_conv2d(x, w_dw, w_pw, padding=1, backend="cpu")
    truth = two(x.double(), w_dw.double(), w_pw.double())[1]
    assert not (theirs.isfinite() & ~y.isfinite()).any()
    assert not theirs.isfinite().all()
    finite = truth.abs() < 60000
    torch.testing.assert_close(y[finite].double(), truth[finite], rtol=2**-10, atol=0.02)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_denormals_are_kept(dtype: torch.dtype, layout: torch.memory_format, backend: str) -> None:
    x, w_dw, w_pw = tensors(dtype, layout)
    x = (x.double() * (1e-39 if dtype is torch.float32 else 1e-6)).to(dtype)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    truths = two(x.double(), w_dw.double(), w_pw.double())
    for got, theirs, truth in zip(ours(x, w_dw, w_pw, backend), two(x, w_dw, w_pw), truths):
        assert float(truth.abs().max()) < 4 * torch.finfo(dtype).smallest_normal * (40 if truth is truths[1] else 10)
        error = float((got.double() - truth).abs().max())
        bound = 2 * float((theirs.double() - truth).abs().max())
        assert error <= bound + 4 * smallest + torch.finfo(dtype).eps * float(truth.abs().max())
        assert (got != 0).double().mean() > 0.9


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_bfloat16_denormals_are_right_or_zero(layout: torch.memory_format, backend: str) -> None:
    """PyTorch's bfloat16 convolutions flush them on chips whose bfloat16 instructions do, and so may the kernels."""
    x, w_dw, _ = tensors(torch.bfloat16, layout)
    x = (x.double() * 1e-39).to(torch.bfloat16)
    truth = torch.conv2d(x.double(), w_dw.double(), padding=1, groups=x.shape[1])
    z = xsep.depthwise_conv2d(x, w_dw, padding=1, backend=backend).double()
    smallest = torch.finfo(torch.bfloat16).smallest_normal * torch.finfo(torch.bfloat16).eps
    right = (z - truth).abs() <= 8 * smallest
    normal = truth.abs() >= 1.01 * torch.finfo(torch.bfloat16).smallest_normal
    assert (right | (z == 0)).all()
    assert normal.sum() == 0 or not z.isnan().any()
    assert torch.equal(torch.signbit(z)[z != 0], torch.signbit(truth)[z != 0])
