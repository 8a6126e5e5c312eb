"""The chain on CUDA: a layer's forward in one kernel with its statistics where C_out fits one CTA, else staged.

The backward's convolutions are CUDA kernels and GEMMs; what lies between them goes through memory.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ..problem import Geometry, Problem
from .chain import Forward, Load
from .chain_aten import images_of, rows_of
from .chain_kernels import KernelChain, affine_of
from .cuda import CUDA, device_facts, fused_plan, is_aligned, nhwc, tf32_allowed, vectors_of


def _ready(t: Tensor) -> Tensor:
    """NHWC at an address that 16-byte accesses can use: the plan, and so the tiles, must not depend on it."""
    t = nhwc(t)
    return t if is_aligned(t) else t.clone()


def _problem(x: Tensor, w_dw: Tensor, w_pw: Tensor, geometry: Geometry, activation: int) -> Problem:
    n, c_in, h, w = x.shape
    return Problem(
        "separable", "cuda", x.dtype, True, n, c_in, h, w, 1, w_dw.shape[2], w_dw.shape[3], w_pw.shape[0], geometry,
        (activation, 0, 0),
    )  # fmt: skip


class CudaChain(KernelChain):
    name = "cuda"
    kernels = CUDA

    def tiles(self, problem: Problem) -> int:
        plan = fused_plan(problem, device_facts(torch.cuda.current_device())) if problem.n else None
        return super().tiles(problem) if plan is None else int(plan.tiles)

    def sep_fprop(
        self, x: Tensor, load: Load, residual: Optional[Tensor], w_dw: Tensor, w_pw: Tensor, geometry: Geometry,
        statistics: bool,
    ) -> Forward:  # fmt: skip
        problem = _problem(x, w_dw, w_pw, geometry, load.activation)
        if x.numel() == 0:
            return super().sep_fprop(x, load, residual, w_dw, w_pw, geometry, statistics)
        prologue = affine_of(load)
        addend = None if residual is None else _ready(residual)
        if fused_plan(problem, device_facts(x.get_device())) is None:
            if addend is None:
                return super().sep_fprop(x, load, None, w_dw, w_pw, geometry, statistics)
            z, x_pre = torch.ops.xsep.cuda_depthwise_fprop_residual(
                _ready(x), w_dw.contiguous(), addend, *vectors_of(prologue), None, None, list(geometry),
                [prologue.activation, 0], [prologue.alpha, 0.0],
            )  # fmt: skip
            r = images_of(torch.mm(rows_of(z), w_pw.reshape(w_pw.shape[0], -1).t()), z)
            partials, counts = self.statistics(r) if statistics else (None, None)
            return Forward(r, partials, counts, x_pre)
        w_pw = w_pw.contiguous()
        r, partials, counts, x_pre = torch.ops.xsep.cuda_separable_fprop_chain(
            _ready(x), addend, w_dw.contiguous(), w_pw if is_aligned(w_pw) else w_pw.clone(), *vectors_of(prologue),
            list(geometry), prologue.activation, prologue.alpha, tf32_allowed(), statistics,
        )  # fmt: skip
        return Forward(
            r, partials if statistics else None, counts if statistics else None, None if residual is None else x_pre
        )


CUDA_CHAIN = CudaChain()
