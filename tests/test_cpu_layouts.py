"""The CPU kernels and NCHW: what comes out lies as it should, and holds the bits that NHWC gives."""

from __future__ import annotations

import pytest
import torch

import xsep
from xsep import extension

TYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 7), (1, 16, 4, 4), (3, 33, 17, 1), (1, 1, 9, 9), (2, 70, 1, 1), (2, 64, 9, 31), (0, 3, 2, 2)]
)
def test_turning_a_layout_round_moves_every_value(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert extension.load_cpu().reason is None
    nchw = torch.randn(shape).to(dtype)
    nhwc = torch.ops.xsep.cpu_to_nhwc(nchw)
    assert torch.equal(nhwc, nchw) and nhwc.is_contiguous(memory_format=torch.channels_last)
    back = torch.ops.xsep.cpu_to_nchw(nhwc)
    assert torch.equal(back, nchw) and back.is_contiguous()
    crop = torch.randn(*shape[:3], 2 * shape[3]).to(dtype)[..., ::2]
    assert torch.equal(torch.ops.xsep.cpu_to_nhwc(crop), crop)
    assert torch.ops.xsep.cpu_to_nhwc(nhwc).data_ptr() != nhwc.data_ptr() or not nhwc.numel()


def test_nchw_pictures_come_out_as_nchw_without_being_turned_round_as_a_whole() -> None:
    x, w_dw, w_pw = torch.randn(2, 19, 23, 29), torch.randn(19, 1, 3, 3), torch.randn(70, 19, 1, 1)
    y = xsep.separable_conv2d(x, w_dw, w_pw, padding=1, backend="cpu")
    nhwc = xsep.separable_conv2d(x.contiguous(memory_format=torch.channels_last), w_dw, w_pw, padding=1, backend="cpu")
    assert y.is_contiguous() and nhwc.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, nhwc)


@pytest.mark.parametrize("shape", [(2, 19, 23, 29), (1, 300, 40, 41), (2, 40, 5, 7), (1, 3, 8, 8)])
@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_depthwise_of_nchw_pictures_comes_out_as_nchw(
    shape: tuple[int, int, int, int], multiplier: int, dtype: torch.dtype
) -> None:
    x, w_dw = torch.randn(shape).to(dtype), torch.randn(shape[1] * multiplier, 1, 3, 3).to(dtype)
    y = xsep.depthwise_conv2d(x, w_dw, padding=1, backend="cpu")
    nhwc = xsep.depthwise_conv2d(x.contiguous(memory_format=torch.channels_last), w_dw, padding=1, backend="cpu")
    assert y.is_contiguous() and nhwc.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, nhwc)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("c_in", [10, 33, 64])
@pytest.mark.parametrize("size", [(3, 3), (1, 19), (70, 67)])
def test_the_backward_of_nchw_gives_nchw_and_the_bits_of_nhwc(
    size: tuple[int, int], c_in: int, dtype: torch.dtype
) -> None:
    assert extension.load_cpu().reason is None
    x, dy = torch.randn(3, c_in, *size).to(dtype), torch.randn(3, 34, *size).to(dtype)
    w_dw, w_pw = torch.randn(c_in, 1, 3, 3).to(dtype), torch.randn(34, c_in, 1, 1).to(dtype)
    scale, geometry = torch.randn(c_in), (1, 1, 1, 1, 1, 1, 1, 1)
    nchw, nhwc = (
        torch.ops.xsep.cpu_separable_bprop(
            dy.contiguous(memory_format=layout), x.contiguous(memory_format=layout), w_dw, w_pw, scale, None, geometry,
            1, 0.0, (True,) * 5
        )
        for layout in (torch.contiguous_format, torch.channels_last)
    )  # fmt: skip
    assert nchw[0].is_contiguous() and nhwc[0].is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(nchw, nhwc, strict=True))
