"""The chain on a CPU, by compiled kernels: the convolutions, and passes over pixels for all that is between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from ..problem import IDENTITY, Geometry
from .chain import Load, RawGradient, Shortcut
from .chain_kernels import KernelChain, affine_of
from .cpu import CPU, pixel_product

OPS: Any = torch.ops.xsep


class CpuChain(KernelChain):
    name = "cpu"
    kernels = CPU

    def layer(self, x: Tensor, load: Load, w_dw: Tensor, w_pw: Tensor, geometry: Geometry) -> Tensor:
        return super().layer(x.contiguous(memory_format=torch.channels_last), load, w_dw, w_pw, geometry)

    def loaded_and_activated(self, x: Tensor, load: Load) -> tuple[Tensor, Tensor]:
        u = x if load.vec is None else self.apply(x, load._replace(activation=IDENTITY), None)
        return u, u if load.activation == IDENTITY else self.apply(x, load, None)

    def apply(self, x: Tensor, load: Load, residual: Optional[Tensor]) -> Tensor:
        return OPS.cpu_chain_apply(x, load.vec, load.activation, load.alpha, residual)

    def statistics(self, r: Tensor) -> tuple[Tensor, Tensor]:
        return OPS.cpu_chain_statistics(r)

    def bn_finalize(
        self, partials: Tensor, counts: Tensor, gamma: Optional[Tensor], beta: Optional[Tensor],
        running_mean: Optional[Tensor], running_var: Optional[Tensor], batches: Optional[Tensor],
        momentum: Optional[float], eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        return OPS.cpu_chain_bn_finalize(
            partials, counts, gamma, beta, running_mean, running_var, batches, momentum, eps
        )  # fmt: skip

    def bn_backward_finalize(
        self, sums: Tensor, mean: Tensor, invstd: Tensor, gamma: Optional[Tensor], count: Tensor, batch: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return OPS.cpu_chain_bn_backward_finalize(sums, mean, invstd, gamma, count, batch)

    def formed(self, dr: RawGradient) -> Tensor:
        return OPS.cpu_chain_raw_gradient(dr.du, dr.taps, dr.r, dr.coef, dr.pads)

    def pointwise(self, z: Tensor, w: Tensor) -> Tensor:
        return CPU.pointwise(z, w)

    def pointwise_dgrad(self, dr: Tensor, w: Tensor) -> Tensor:
        return CPU.pointwise_dgrad(dr, w)

    def pointwise_wgrad(self, dr: Tensor, z: Tensor) -> Tensor:
        return pixel_product(dr, z)[:, :, None, None]

    def weight_gradient(self, dr: Tensor, x: Tensor, load: Load, w_dw: Tensor, geometry: Geometry) -> Tensor:
        scale, shift, activation, alpha = affine_of(load)
        return OPS.cpu_separable_wgrad(
            dr, x, w_dw, scale, shift, None, None, geometry, (activation, IDENTITY), (alpha, 0.0)
        )  # fmt: skip

    def depthwise_backward(
        self, dz: Tensor, x: Tensor, w_dw: Tensor, load: Load, geometry: Geometry, shortcut: Optional[Shortcut],
        operands: Sequence[Tensor], centres: Optional[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        scale, shift, activation, alpha = affine_of(load)
        g, before = (None, False) if shortcut is None else shortcut
        dx, dw_dw = OPS.cpu_chain_depthwise_bprop(dz, x, w_dw, scale, shift, geometry, activation, alpha, before)
        sums = OPS.cpu_chain_input_gradient_(
            dx, g, x if before else None, load.vec, activation, alpha, operands, centres
        )  # fmt: skip
        return dx, dw_dw, sums

    def bn_pool_add(
        self, r: Tensor, vec: Tensor, s: Tensor, vec_s: Tensor, pads: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        return OPS.cpu_chain_pool_add(r, vec, s, vec_s, pads)


CPU_CHAIN = CpuChain()
