"""The chain on a CPU: the compiled kernels where a layer's convolutions are, plain PyTorch for the vectors and sums."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import Geometry
from .chain import Load, RawGradient, wide
from .chain_aten import unpooled
from .chain_kernels import KernelChain
from .cpu import CPU, pixel_product


class CpuChain(KernelChain):
    name = "cpu"
    kernels = CPU

    def layer(self, x: Tensor, load: Load, w_dw: Tensor, w_pw: Tensor, geometry: Geometry) -> Tensor:
        return super().layer(x.contiguous(memory_format=torch.channels_last), load, w_dw, w_pw, geometry)

    def unpooled(self, dr: RawGradient) -> Tensor:
        """By PyTorch's backward of the pool, where its padding is one that the pool knows."""
        (top, left), (h, w), (p, q) = dr.pads, dr.r.shape[2:], dr.du.shape[2:]
        assert dr.taps is not None
        if dr.pads != (1, 1) and not all(pad == size % 2 for pad, size in zip(dr.pads, (h, w))):
            return unpooled(dr)
        dtype = wide(dr.r.dtype)
        taps = dr.taps.to(torch.int64)
        y, x = torch.arange(p)[:, None] * 2 - top, torch.arange(q) * 2 - left
        places = (taps // 3 + y).mul_(w).add_(taps % 3 + x)
        return torch.ops.aten.max_pool2d_with_indices_backward(
            dr.du.to(dtype), torch.empty((), dtype=dtype).expand(dr.r.shape), [3, 3], [2, 2], [top, left], [1, 1],
            dr.pads != (1, 1), places,
        )  # fmt: skip

    def pointwise(self, z: Tensor, w: Tensor) -> Tensor:
        return CPU.pointwise(z, w)

    def pointwise_dgrad(self, dr: Tensor, w: Tensor) -> Tensor:
        return CPU.pointwise_dgrad(dr, w)

    def pointwise_wgrad(self, dr: Tensor, z: Tensor) -> Tensor:
        return pixel_product(dr, z)[:, :, None, None]


CPU_CHAIN = CpuChain()
