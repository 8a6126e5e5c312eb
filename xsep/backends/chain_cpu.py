"""The chain on a CPU: the compiled kernels where a layer's convolutions are, plain PyTorch for the vectors and sums."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ..problem import IDENTITY, Affine, Geometry, Problem, SeparableArgs
from .base import SUM_ROWS
from .chain import Load, RawGradient, Shortcut, wide
from .chain_aten import AtenChain, activated, input_gradient, rows_of, unpooled
from .cpu import CPU

POINT = Geometry(1, 1, 0, 0, 0, 0, 1, 1)
PLAIN = Affine()


def affine_of(load: Load) -> Affine:
    scale, shift = (None, None) if load.vec is None else (load.vec[0], load.vec[1])
    return Affine(scale, shift, load.activation, load.alpha)


class CpuChain(AtenChain):
    name = "cpu"

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        return CPU.not_supported_reasons(problem)

    def loaded_and_activated(self, x: Tensor, load: Load) -> tuple[Tensor, Tensor]:
        u = x
        if load.vec is not None:
            # A depthwise kernel of one tap, 1: the same arithmetic as in every other kernel's load, so that the sign
            # of u is the same in all of them.
            one = x.new_ones((x.shape[1], 1, 1, 1))
            u = CPU.depthwise(x, one, affine_of(load._replace(activation=IDENTITY)), PLAIN, POINT)
        return u, u if load.activation == IDENTITY else activated(u, load, x.dtype)

    def depthwise(self, x: Tensor, load: Load, w_dw: Tensor, geometry: Geometry) -> Tensor:
        return CPU.depthwise(x, w_dw, affine_of(load), PLAIN, geometry)

    def layer(self, x: Tensor, load: Load, w_dw: Tensor, w_pw: Tensor, geometry: Geometry) -> Tensor:
        scale, shift, activation, alpha = affine_of(load)
        x = x.contiguous(memory_format=torch.channels_last)
        return CPU.separable_forward(
            SeparableArgs(
                x, w_dw, w_pw, None, None, scale, shift, None, None, None, None, list(geometry),
                [activation, IDENTITY, IDENTITY], [alpha, 0.0, 0.0],
            )
        )  # fmt: skip

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

    def pointwise_dgrad(self, dr: Tensor, w: Tensor) -> Tensor:
        return CPU.pointwise_dgrad(dr, w)

    def pointwise_wgrad(self, dr: Tensor, z: Tensor) -> Tensor:
        """In blocks of rows, each rounded to the images' type, added up in float32."""
        dr_rows, z_rows = rows_of(dr), rows_of(z)
        g = torch.zeros((dr.shape[1], z.shape[1]), dtype=wide(z.dtype), device=z.device)
        for start in range(0, dr_rows.shape[0], SUM_ROWS):
            part = slice(start, start + SUM_ROWS)
            g += torch.mm(dr_rows[part].t(), z_rows[part])
        return g[:, :, None, None]

    def depthwise_backward(
        self, dz: Tensor, u: Tensor, act: Tensor, w_dw: Tensor, load: Load, geometry: Geometry,
        shortcut: Optional[Shortcut],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """In one pass, the activation's derivative included unless a shortcut has to be added before it."""
        before = shortcut is not None and shortcut.activated
        source, prologue = (act, PLAIN) if before else (u, Affine(None, None, load.activation, load.alpha))
        g = CPU.depthwise_backward_kernel(dz, source, w_dw, prologue, geometry, (True, True, False, False))
        assert g.dx is not None and g.dw_dw is not None
        return input_gradient(g.dx, u, load, shortcut, act.dtype, masked=not before), g.dw_dw.to(wide(act.dtype))


CPU_CHAIN = CpuChain()
