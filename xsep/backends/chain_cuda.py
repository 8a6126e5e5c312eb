"""The chain on CUDA: a layer's forward in one kernel with its statistics where C_out fits one CTA, else staged.

Staged forward and backward go over the whole batch, or where L2 is large over slices of it, so small that what one
kernel writes for the next is found there: z and r for its statistics, or dr, formed in one pass, and z or dz between
two products and one depthwise pass. The product that makes dw_pw may have z on the chip, and all of a layer's backward
may be one kernel. The planner weighs these ways by counted bytes, instructions and launches, not by measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from ..problem import IDENTITY, Geometry, Problem
from . import chain_cuda_launch as launch
from .chain import Backward, Forward, Load, RawGradient, Shortcut
from .chain_kernels import KernelChain, affine_of
from .cuda import CUDA, DeviceFacts, device_facts, fused_plan, is_aligned, nhwc, vectors_of, wgrad_on_chip
from .pointwise import dgrad, product, product_into, tf32_allowed, wgrad


def _problem(x: Tensor, w_dw: Tensor, w_pw: Tensor, geometry: Geometry, activation: int) -> Problem:
    n, c_in, h, w = x.shape
    return Problem(
        "separable", "cuda", x.dtype, True, n, c_in, h, w, 1, w_dw.shape[2], w_dw.shape[3], w_pw.shape[0], geometry,
        (activation, 0, 0),
    )  # fmt: skip


def _as_filter(dw: Optional[Tensor]) -> Optional[Tensor]:
    return None if dw is None else dw[:, :, None, None]


class CudaChain(KernelChain):
    name = "cuda"
    kernels = CUDA

    def __init__(self, way: str = "") -> None:
        """``way``: of a layer's backward, by its name, wherever there is that one; else as planned."""
        self.way = way

    @property
    def label(self) -> str:
        return f"{self.name}, {self.way}" if self.way else self.name

    def backward_plan(self, problem: Problem, facts: DeviceFacts, pooled: bool) -> Optional[launch.BackwardPlan]:
        wanted = launch.backward_ways(problem, facts).get(self.way) if self.way else None
        return launch.backward_plan(problem, facts, pooled) if wanted is None else wanted

    def other_ways(self, problem: Problem) -> list[str]:
        facts = device_facts(torch.cuda.current_device())
        planned = launch.backward_plan(problem, facts)
        return [way for way, plan in launch.backward_ways(problem, facts).items() if plan != planned]

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
        addend = None if residual is None else launch.ready(residual)
        if fused_plan(problem, device_facts(x.get_device())) is None:
            return self.staged(x, load, addend, w_dw, w_pw, problem, statistics)
        w_pw = w_pw.contiguous()
        r, partials, counts, x_pre = torch.ops.xsep.cuda_separable_fprop_chain(
            launch.ready(x), addend, w_dw.contiguous(), w_pw if is_aligned(w_pw) else w_pw.clone(),
            *vectors_of(prologue), list(geometry), prologue.activation, prologue.alpha, tf32_allowed(), statistics,
        )  # fmt: skip
        return Forward(
            r, partials if statistics else None, counts if statistics else None, None if residual is None else x_pre
        )

    def staged(
        self, x: Tensor, load: Load, addend: Optional[Tensor], w_dw: Tensor, w_pw: Tensor, problem: Problem,
        statistics: bool,
    ) -> Forward:  # fmt: skip
        """Depthwise kernel, GEMM and statistics, a slice of the batch after the other."""
        x, prologue, geometry = launch.ready(x), affine_of(load), problem.geometry
        w_dw, (p, q) = w_dw.contiguous(), problem.output_size
        rows = x.new_empty((x.shape[0] * p * q, w_pw.shape[0]))
        found = launch.TileStatistics(rows) if statistics else None
        x_pre = None if addend is None else torch.empty_like(x)
        for part in launch.slices(problem, device_facts(x.get_device())):
            if addend is None or x_pre is None:
                z = self.depthwise(x[part], load, w_dw, geometry)
            else:
                z = torch.ops.xsep.cuda_depthwise_fprop_residual(
                    x[part], w_dw, addend[part], *vectors_of(prologue), None, None, list(geometry),
                    [prologue.activation, 0], [prologue.alpha, 0.0], x_pre[part],
                )  # fmt: skip
            own = rows[part.start * p * q : part.stop * p * q]
            product_into(own, z, w_pw)
            if found is not None:
                found.add(part.stop * p * q)
        r = rows.view(x.shape[0], p, q, w_pw.shape[0]).permute(0, 3, 1, 2)
        if found is None:
            return Forward(r, None, None, x_pre)
        return Forward(r, found.partials, found.counts, x_pre)

    def activated(self, x: Tensor, load: Load) -> Tensor:
        return x if load.vec is None and load.activation == IDENTITY else self.apply(x, load, None)

    def pointwise(self, z: Tensor, w_pw: Tensor) -> Tensor:
        return nhwc(product(z, w_pw))

    def pointwise_dgrad(self, dr: Tensor, w: Tensor) -> Tensor:
        return nhwc(dgrad(dr, w))

    def pw_fprop(self, x: Tensor, load: Load, w: Tensor, statistics: bool) -> Forward:
        r = self.pointwise(self.activated(x, load), w)
        return Forward(r, *(self.statistics(r) if statistics else (None, None)))

    def statistics(self, r: Tensor) -> tuple[Tensor, Tensor]:
        return launch.tile_statistics(r)

    def bn_finalize(
        self, partials: Tensor, counts: Tensor, gamma: Optional[Tensor], beta: Optional[Tensor],
        running_mean: Optional[Tensor], running_var: Optional[Tensor], batches: Optional[Tensor],
        momentum: Optional[float], eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        if partials.numel() == 0 or not launch.are_movable(running_mean, running_var):
            return super().bn_finalize(
                partials, counts, gamma, beta, running_mean, running_var, batches, momentum, eps
            )  # fmt: skip
        return launch.bn_finalize(partials, counts, gamma, beta, running_mean, running_var, batches, momentum, eps)

    def bn_backward_finalize(
        self, sums: Tensor, mean: Tensor, invstd: Tensor, gamma: Optional[Tensor], count: Tensor, batch: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return launch.bn_backward_finalize(sums, mean, invstd, gamma, count, batch)

    def formed(self, dr: RawGradient) -> Tensor:
        return launch.raw_gradient(dr)

    def sep_wgrad_pw(self, dr: RawGradient, x: Tensor, load: Load, w_dw: Tensor, geometry: Geometry) -> Tensor:
        w_pw = w_dw.new_empty((dr.r.shape[1], x.shape[1], 1, 1))
        found = self.sep_backward(dr, w_pw, w_dw, x, load, geometry, None, [], None, (False, False, True)).dw_pw
        assert found is not None
        return found

    def sep_backward(
        self, dr: RawGradient, w_pw: Tensor, w_dw: Tensor, x: Tensor, load: Load, geometry: Geometry,
        shortcut: Optional[Shortcut], operands: Sequence[Tensor], centres: Optional[Tensor], wanted: Sequence[bool],
    ) -> Backward:  # fmt: skip
        problem = _problem(x, w_dw, w_pw, geometry, load.activation)
        c_out, c_in = w_pw.shape[:2]
        with_input = wanted[0] or wanted[1]
        if x.numel() == 0:
            found = Backward(
                torch.empty_like(x), launch.zeros(x, *w_dw.shape), None, launch.zeros(x, 1 + len(operands), c_in)
            )
            found = found if with_input else Backward(*(None,) * 4)
            return found._replace(dw_pw=launch.zeros(x, c_out, c_in, 1, 1) if wanted[2] else None)
        plan = self.backward_plan(problem, device_facts(x.get_device()), dr.taps is not None)
        if plan is None:
            return super().sep_backward(
                dr, w_pw, w_dw, x, load, geometry, shortcut, operands, centres, wanted
            )  # fmt: skip
        dr, x = launch.dense(dr), launch.ready(x)
        if plan.fused:
            # Whatever is wanted, so that no bit depends on that.
            dx, dw_dw, whole, sums = launch.fused_backward(
                dr, w_pw, w_dw, x, load, geometry, shortcut, operands, centres
            )  # fmt: skip
            found = Backward(dx, dw_dw, None, sums) if with_input else Backward(*(None,) * 4)
            return found._replace(dw_pw=_as_filter(whole) if wanted[2] else None)
        dw_pw = last = None
        if with_input:
            last = launch.InputGradient(x, w_dw, load, geometry, shortcut, operands, centres, plan)
        for part in plan.slices:
            raw = launch.part_of(dr, part)
            if wanted[2] and plan.on_chip == "dr and z" and raw.taps is None:
                formed, of_part = launch.wgrad_of_raw(raw, x[part], load, w_dw, geometry)
            else:
                formed = launch.form(raw)
                of_part = self.wgrad_pw(formed, x[part], load, w_dw, geometry, plan) if wanted[2] else None
            if of_part is not None:
                dw_pw = of_part if dw_pw is None else dw_pw.add_(of_part)
            if last is not None:
                # z is gone: what PyTorch allocates for dz is its memory, which L2 has.
                last.add(self.pointwise_dgrad(formed, w_pw), part)
        if last is None:
            return Backward(None, None, _as_filter(dw_pw), None)
        dw_dw, sums = last.total()
        return Backward(last.dx, dw_dw, _as_filter(dw_pw), sums)

    def wgrad_pw(
        self, dr: Tensor, x: Tensor, load: Load, w_dw: Tensor, geometry: Geometry, plan: launch.BackwardPlan
    ) -> Tensor:  # fmt: skip
        """dw_pw [C_out, C_in] from dr, z on the chip or made before."""
        if plan.on_chip:
            return wgrad_on_chip(dr, x, w_dw, affine_of(load), geometry)
        return wgrad(dr, self.depthwise(x, load, w_dw, geometry))

    def pw_backward(self, dr: RawGradient, w: Tensor, x: Tensor, load: Load) -> tuple[Tensor, Tensor]:
        formed = launch.raw_gradient(dr)
        act = self.activated(x, load)
        return wgrad(formed, act)[:, :, None, None], self.pointwise_dgrad(formed, w)

    def bn_pool_add(
        self, r: Tensor, vec: Tensor, s: Tensor, vec_s: Tensor, pads: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        return launch.bn_pool_add(r, vec, s, vec_s, pads)

    def bn_relu_gap(self, r: Tensor, vec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return launch.bn_relu_gap(r, vec)

    def bn_relu_gap_backward(
        self, g: Tensor, r: Tensor, vec: Tensor, mean: Tensor, positive: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor]:
        return launch.bn_relu_gap_backward(g, r, vec, mean, positive, total)

    def apply(self, x: Tensor, load: Load, residual: Optional[Tensor]) -> Tensor:
        return launch.apply_load(x, load, residual)

    def apply_backward(
        self, g: Tensor, x: Tensor, load: Load, residual: Optional[Tensor], operands: Sequence[Tensor],
        centres: Optional[Tensor],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return launch.load_gradient(g, x, load, residual, operands, centres)


CUDA_CHAIN = CudaChain()
