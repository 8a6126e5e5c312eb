"""The CPU kernels and NCHW: what comes out lies as it should, and holds the bits that NHWC gives."""

from __future__ import annotations

import pytest
import torch

import xsep
from xsep import extension
from xsep.backends.cpu import LANES

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
    if dtype == torch.bfloat16 and multiplier > 1 and extension.load_cpu().level == "avx512":
        # Where the chip has AVX512_BF16, however products are made, rows of NHWC are multiplied in pairs, which adds in
        # another order.
        torch.testing.assert_close(y, nhwc, rtol=torch.finfo(dtype).eps, atol=1e-5)
    else:
        assert torch.equal(y, nhwc)


PLANES = {
    "one channel": ((2, 1, 30, 31), 1, (3, 3), (1, 1), (1, 1), (1, 1)),
    "few channels": ((2, 3, 9, 70), 1, (3, 3), (1, 1), (1, 1), (1, 1)),
    "one pixel": ((1, 3, 1, 1), 1, (5, 5), (1, 1), (2, 2), (1, 1)),
    "columns of one pixel": ((3, 5, 17, 1), 1, (3, 3), (2, 2), (1, 1), (1, 1)),
    "long rows": ((1, 33, 7, 61), 1, (3, 3), (1, 1), (1, 1), (1, 1)),
    "long rows, one filter row": ((1, 33, 7, 61), 1, (1, 3), (1, 1), (0, 1), (1, 1)),
    "several units": ((1, 6, 75, 90), 1, (7, 7), (1, 1), (3, 3), (1, 1)),
    "stride 2": ((2, 5, 33, 67), 1, (3, 3), (2, 2), (1, 1), (1, 1)),
    "stride 2, even": ((1, 9, 20, 64), 1, (5, 5), (2, 2), (2, 2), (1, 1)),
    "stride 2, no padding": ((1, 9, 23, 37), 1, (7, 7), (2, 2), (0, 0), (1, 1)),
    "stride 3 and 1": ((1, 7, 20, 45), 1, (3, 4), (3, 1), (2, 0), (1, 2)),
    "stride 1 and 4": ((1, 3, 11, 50), 1, (3, 3), (1, 4), (1, 1), (2, 3)),
    "dilation": ((2, 6, 19, 40), 1, (3, 3), (1, 1), (4, 6), (4, 6)),
    "dilation and stride": ((1, 6, 30, 40), 1, (3, 5), (2, 3), (4, 6), (2, 2)),
    "multiplier": ((2, 20, 12, 13), 3, (3, 3), (1, 1), (1, 1), (1, 1)),
    "multiplier, one channel": ((2, 1, 25, 50), 8, (5, 5), (2, 2), (2, 2), (1, 1)),
}


@pytest.mark.parametrize("epilogues", [False, True], ids=["plain", "with affines"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("problem", PLANES.values(), ids=PLANES.keys())
def test_planes_hold_the_sums_of_the_convolution(problem: tuple, dtype: torch.dtype, epilogues: bool) -> None:
    (n, c, h, w), multiplier, filter, stride, padding, dilation = problem
    geometry = (*stride, padding[1], padding[1], padding[0], padding[0], *dilation)
    module, lanes = extension.binding(), LANES[extension.load_cpu().level]
    assert module is not None, "the extension is not built"
    assert module.cpu_takes_planes((n, c, h, w), filter, multiplier, geometry, nchw=True, lanes=lanes)
    x, w_dw = torch.randn(n, c, h, w).to(dtype), torch.randn(c * multiplier, 1, *filter).to(dtype)
    affines = [torch.randn(i) for i in (c, c, c * multiplier, c * multiplier)]
    given = affines if epilogues else [None] * 4
    y = torch.ops.xsep.cpu_depthwise_fprop(
        x, w_dw, *given, geometry, (1, 3) if epilogues else (0, 0), (0.0, 0.0), nchw=True
    )
    assert y.is_contiguous() and y.dtype == dtype

    def of(values: torch.Tensor, i: int) -> torch.Tensor:
        scale, shift = (a.to(values).view(-1, 1, 1) for a in affines[i : i + 2])
        return values * scale + shift

    u, taps = x.double(), w_dw.double()
    if epilogues:
        u = of(u, 0).relu()
    exact = torch.nn.functional.conv2d(u, taps, None, stride, padding, dilation, groups=c)
    sums = torch.nn.functional.conv2d(u.abs(), taps.abs(), None, stride, padding, dilation, groups=c)
    if epilogues:
        exact, sums = torch.nn.functional.silu(of(exact, 2)), 2 + 2 * sums * affines[2].double().abs().view(-1, 1, 1)
    rounding = torch.finfo(dtype).eps
    assert ((y - exact).abs() <= 1e-6 * sums + rounding * exact.abs()).all()


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
