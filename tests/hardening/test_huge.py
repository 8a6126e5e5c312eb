"""More than 2^31 elements in a tensor, without the memory that it seems to need."""

from __future__ import annotations

import pytest
import torch

import xsep
from tests.conftest import NIGHTLY

BIG = 2**31


def memory_available() -> int:
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def needs(gibibytes: int) -> None:
    if memory_available() < gibibytes << 30:
        pytest.skip(f"needs {gibibytes} GiB of free memory")


def test_an_output_of_more_than_two_to_the_31(backend: str) -> None:
    """One channel in, 64 out: a small input whose every picture differs, and 4.3 GB of output."""
    if backend == "aten" and not NIGHTLY:
        pytest.skip("PyTorch's own convolutions, held to it each night")
    needs(7)
    n = BIG // (64 * 32 * 32) + 3
    values = (torch.arange(n, dtype=torch.int32) % 251).to(torch.bfloat16)  # exact in bfloat16, and so are the products
    x = values[:, None, None, None].expand(n, 1, 32, 32)
    w_dw = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    w_pw = torch.tensor([1.0, -1.0, 0.5, 2.0] * 16, dtype=torch.bfloat16)[:, None, None, None]
    with torch.inference_mode():
        y = xsep.separable_conv2d(x.contiguous(memory_format=torch.channels_last), w_dw, w_pw, backend=backend)
        assert y.numel() > BIG and y.shape == (n, 64, 32, 32)
        for corner in ((0, 0), (31, 31)):
            assert torch.equal(y[:, :, corner[0], corner[1]], values[:, None] * w_pw[:, 0, 0, 0])
        assert torch.equal(y[-1], (values[-1] * w_pw[:, 0]).expand(64, 32, 32))


def test_an_input_of_more_than_two_to_the_31(backend: str) -> None:
    """Pictures of which a stride of 8 reads one pixel in 64; each but the last is the same memory."""
    if backend == "aten" and not NIGHTLY:
        pytest.skip("PyTorch's own convolutions, held to it each night")
    needs(7)
    n = BIG // (64 * 32 * 32) + 3
    picture = torch.randn(1, 64, 32, 32).bfloat16().contiguous(memory_format=torch.channels_last)
    w_dw, w_pw = torch.randn(64, 1, 3, 3).bfloat16(), torch.randn(3, 64, 1, 1).bfloat16()
    with torch.inference_mode():
        y = xsep.separable_conv2d(picture.expand(n, 64, 32, 32), w_dw, w_pw, stride=8, padding=1, backend=backend)
        one = xsep.separable_conv2d(picture, w_dw, w_pw, stride=8, padding=1, backend=backend)
        assert y.shape == (n, 3, 4, 4)
        torch.testing.assert_close(y, one.expand_as(y), rtol=2**-7, atol=2**-7 * float(one.abs().max()))


@pytest.mark.skipif(not NIGHTLY, reason="14 GiB: each night")
def test_a_gradient_of_more_than_two_to_the_31(backend: str) -> None:
    needs(16)
    n = BIG // (64 * 32 * 32) + 3
    picture = torch.randn(1, 64, 32, 32).bfloat16().contiguous(memory_format=torch.channels_last)
    w_dw, w_pw = torch.randn(64, 1, 3, 3).bfloat16(), torch.randn(3, 64, 1, 1).bfloat16()
    x = picture.expand(n, 64, 32, 32).requires_grad_()
    y = xsep.separable_conv2d(x, w_dw, w_pw, stride=8, padding=1, backend=backend)
    dy = torch.randn(1, 3, 4, 4).bfloat16()
    (dx,) = torch.autograd.grad(y, x, dy.expand(y.shape))
    leaf = picture.clone().requires_grad_()
    one = torch.autograd.grad(xsep.separable_conv2d(leaf, w_dw, w_pw, stride=8, padding=1, backend=backend), leaf, dy)[
        0
    ]
    for i in (0, n // 2, n - 1):
        torch.testing.assert_close(dx[i : i + 1], one, rtol=2**-7, atol=2**-7 * float(one.abs().max()))
