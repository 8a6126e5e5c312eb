"""The chain in Triton: what lies between the layers is formed on load and in registers, not in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from ..problem import IDENTITY, Affine, Geometry, Problem
from . import triton as backend
from . import triton_chain_launch as chain_launch
from . import triton_launch as launch
from .chain import Backward, ChainBackend, Forward, Load, RawGradient, Shortcut, tiles_of
from .chain_aten import AtenChain, gradient_sums, input_gradient
from .chain_kernels import affine_of
from .triton_chain_layers import (
    card_of,
    dense,
    dense_gradient,
    floats,
    layer_dgrad,
    operand_images,
    pointwise_gradient,
    weight_gradient,
)
from .triton_chain_plans import (
    BackwardPlan,
    backward_plan,
    elementwise_tile,
    gradient_tile,
    product_tile,
    sum_share,
    wgrad_tile,
)
from .triton_plans import DepthwiseTile, SeparableTile, chain_tile, device_of, unrolled

PLAIN = Affine()


def _problem(x: Tensor, w_dw: Tensor, c_out: int, geometry: Geometry, activation: int) -> Problem:
    n, c_in, h, w = x.shape
    return Problem(
        "separable", x.device.type, x.dtype, True, n, c_in, h, w, 1, w_dw.shape[2], w_dw.shape[3], c_out,
        geometry, (activation, 0, 0),
    )  # fmt: skip


def _tile(problem: Problem, addend: bool = False) -> tuple[SeparableTile, bool]:
    device = device_of(problem.device, torch.cuda.current_device() if problem.device == "cuda" else 0)
    tf32 = backend.tf32_allowed(problem.dtype, device)
    return chain_tile(problem, device, tf32, addend), tf32


class TritonChain(AtenChain):
    name = "triton"

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        reasons = backend.TRITON.not_supported_reasons(problem)
        if not unrolled(problem):
            p = problem
            reasons.append(
                f"its kernels of the chain take filters up to 7x7 and strides up to 2, not {p.r}x{p.s} and {p.geometry}"
            )
        return reasons

    def tiles(self, problem: Problem) -> int:
        p, q = problem.output_size
        shape = torch.empty((problem.n, problem.c_out, p, q), device="meta")
        return launch.pixel_tiles(shape, problem.geometry, _tile(problem)[0])

    def backward_plan(self, problem: Problem, pooled: bool = False) -> BackwardPlan:
        """How a layer's backward would run; its ``reason`` is one line for people."""
        device = device_of(problem.device, torch.cuda.current_device() if problem.device == "cuda" else 0)
        return backward_plan(problem, device, backend.tf32_allowed(problem.dtype, device), pooled)

    def sep_fprop(
        self, x: Tensor, load: Load, residual: Optional[Tensor], w_dw: Tensor, w_pw: Tensor, geometry: Geometry,
        statistics: bool,
    ) -> Forward:  # fmt: skip
        g, (r_size, s_size), c_out = geometry, w_dw.shape[2:], w_pw.shape[0]
        problem = _problem(x, w_dw, c_out, g, load.activation)
        tile, tf32 = _tile(problem, residual is not None)
        p, q = problem.output_size
        r = backend.new_nhwc(x, x.shape[0], c_out, p, q)
        x_pre = None if residual is None else backend.new_nhwc(x, *x.shape)
        partials = counts = None
        if statistics:
            tiles = launch.pixel_tiles(r, g, tile)
            partials = floats(x, tiles, 3, c_out)
            counts = torch.empty((tiles,), dtype=torch.int32, device=x.device)
        if x.shape[0] == 0:
            return Forward(r, partials, counts, x_pre)
        x = backend.nhwc(x) if residual is None else backend.dense_nhwc(x)
        tensors = launch.SeparableTensors(
            x, backend.pointwise_weights(w_pw, tf32), r, backend.filters_by_tap(w_dw),
            addend=None if residual is None else backend.dense_nhwc(residual), x_pre=x_pre,
            partials=partials, counts=counts,
        )  # fmt: skip
        launch.separable_fprop(
            tensors, (r_size, s_size), affine_of(load), PLAIN, PLAIN, g, tile, tf32
        ).run(x.device)  # fmt: skip
        return Forward(r, partials, counts, x_pre)

    def pw_fprop(self, x: Tensor, load: Load, w: Tensor, statistics: bool) -> Forward:
        n, _, h, width = x.shape
        c_out = w.shape[0]
        device, tf32 = card_of(x)
        y = backend.new_nhwc(x, n, c_out, h, width)
        partials = counts = None
        if statistics:
            tiles = tiles_of(n * h * width)
            partials = floats(x, tiles, 3, c_out)
            counts = torch.empty((tiles,), dtype=torch.int32, device=x.device)
        if n > 0:
            chain_launch.pointwise_fprop(
                backend.nhwc(x), backend.pointwise_weights(w, tf32), y, partials, counts, affine_of(load),
                product_tile(x.dtype, load.activation, device, tf32), tf32,
            ).run(x.device)  # fmt: skip
        return Forward(y, partials, counts)

    def statistics(self, r: Tensor) -> tuple[Tensor, Tensor]:
        n, c, h, w = r.shape
        tiles = tiles_of(n * h * w)
        partials = floats(r, tiles, 3, c)
        counts = torch.empty((tiles,), dtype=torch.int32, device=r.device)
        if n > 0:
            chain_launch.tile_statistics(backend.dense_nhwc(r), partials, counts).run(r.device)
        return partials, counts

    def bn_finalize(
        self, partials: Tensor, counts: Tensor, gamma: Optional[Tensor], beta: Optional[Tensor],
        running_mean: Optional[Tensor], running_var: Optional[Tensor], batches: Optional[Tensor],
        momentum: Optional[float], eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        rows, _, c = partials.shape
        device = partials.device
        vec, centres, invstd = floats(partials, 2, c), floats(partials, 2, c), floats(partials, c)
        count = torch.empty((), dtype=torch.float64, device=device)
        groups = min(launch.STATISTICS_GROUPS, max(rows, 1))
        merged = torch.empty((groups, 3, c), dtype=torch.float64, device=device)
        launch.merge_statistics(partials.contiguous(), counts.contiguous(), merged, batches).run(device)
        vectors = {
            "gamma": torch.ones_like(invstd) if gamma is None else gamma,
            "beta": torch.zeros_like(invstd) if beta is None else beta,
            "running_mean": running_mean, "running_var": running_var,
            "batches": batches if momentum is None else None,
            "vec": vec, "centres_out": centres, "invstd_out": invstd, "count_out": count,
        }  # fmt: skip
        launch.finalize_statistics(merged, vectors, momentum or 0.0, eps).run(device)
        return vec, centres, invstd, count

    def bn_backward_finalize(
        self, sums: Tensor, mean: Tensor, invstd: Tensor, gamma: Optional[Tensor], count: Tensor, batch: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        c = mean.shape[0]
        results = floats(sums, 3, c), floats(sums, c), floats(sums, c)
        chain_launch.finalize_backward(
            sums.contiguous(), mean, invstd, gamma, count.double(), batch, results
        ).run(sums.device)  # fmt: skip
        return results

    def sep_wgrad_pw(self, dr: RawGradient, x: Tensor, load: Load, w_dw: Tensor, geometry: Geometry) -> Tensor:
        problem = _problem(x, w_dw, dr.r.shape[1], geometry, load.activation)
        device, tf32 = card_of(x)
        plan = backward_plan(problem, device, tf32, dr.taps is not None)
        if plan.wgrad_fused:
            return weight_gradient(dr, x, load, plan.wgrad_tile, x.shape[0], w_dw, geometry)
        return weight_gradient(dr, x, load, plan.wgrad_tile, plan.wgrad_slice, w_dw, geometry, fused=False)

    def sep_dgrad(
        self, dr: RawGradient, w_pw: Tensor, w_dw: Tensor, x: Tensor, load: Load, geometry: Geometry,
        shortcut: Optional[Shortcut], operands: Sequence[Tensor], centres: Optional[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        problem = _problem(x, w_dw, w_pw.shape[0], geometry, load.activation)
        device, tf32 = card_of(x)
        plan = backward_plan(problem, device, tf32, dr.taps is not None)
        if plan.depthwise_tile is not None:
            return layer_dgrad(dr, w_pw, w_dw, x, load, geometry, shortcut, operands, centres, plan)
        # A stride beside a dilation, which the one-pass kernel does not take.
        dz = pointwise_gradient(dr, w_pw, plan.dgrad_tile)
        u, act = self.loaded_and_activated(x, load)
        found = backend.TRITON.depthwise_backward_kernel(dz, act, w_dw, PLAIN, geometry, (True, True, False, False))
        assert found.dx is not None and found.dw_dw is not None
        dx = input_gradient(found.dx, u, load, shortcut, x.dtype)
        return dx, found.dw_dw.float(), gradient_sums(dx, operands, centres)

    def sep_backward(
        self, dr: RawGradient, w_pw: Tensor, w_dw: Tensor, x: Tensor, load: Load, geometry: Geometry,
        shortcut: Optional[Shortcut], operands: Sequence[Tensor], centres: Optional[Tensor], wanted: Sequence[bool],
    ) -> Backward:  # fmt: skip
        # Not the plain chain's, which forms dr once for both.
        return ChainBackend.sep_backward(
            self, dr, w_pw, w_dw, x, load, geometry, shortcut, operands, centres, wanted
        )  # fmt: skip

    def pw_backward(self, dr: RawGradient, w: Tensor, x: Tensor, load: Load) -> tuple[Tensor, Tensor]:
        device, tf32 = card_of(x)
        tile = wgrad_tile(x.dtype, x.shape[1], 0, load.activation, device, tf32)
        dw = weight_gradient(dr, x, load, tile, x.shape[0])
        return dw, pointwise_gradient(dr, w, gradient_tile(x.dtype, x.shape[1], device, tf32))

    def bn_pool_add(
        self, r: Tensor, vec: Tensor, s: Tensor, vec_s: Tensor, pads: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        t, chosen = (backend.new_nhwc(s, *s.shape) for _ in range(2))
        taps = torch.empty(t.permute(0, 2, 3, 1).shape, dtype=torch.uint8, device=s.device).permute(0, 3, 1, 2)
        if s.numel() > 0:
            chain_launch.bn_pool_add(
                backend.dense_nhwc(r), vec.contiguous(), backend.dense_nhwc(s), vec_s.contiguous(), pads,
                (t, taps, chosen), _elements(r),
            ).run(r.device)  # fmt: skip
        return t, taps, chosen

    def bn_relu_gap(self, r: Tensor, vec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, c = r.shape[:2]
        pooled = torch.empty((n, c), dtype=r.dtype, device=r.device)
        positive, total = floats(r, n, c), floats(r, n, c)
        if n > 0:
            chain_launch.bn_relu_gap(
                backend.dense_nhwc(r), vec.contiguous(), pooled, positive, total, _elements(r)
            ).run(r.device)  # fmt: skip
        return pooled, positive, total

    def bn_relu_gap_backward(
        self, g: Tensor, r: Tensor, vec: Tensor, mean: Tensor, positive: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor]:
        n, c, h, w = r.shape
        du, sums, g = backend.new_nhwc(r, n, c, h, w), floats(r, 2, c), g.to(r.dtype).contiguous()
        if n > 0:
            chain_launch.bn_relu_gap_backward(
                g, backend.dense_nhwc(r), vec.contiguous(), du, _elements(r)
            ).run(r.device)  # fmt: skip
        chain_launch.bn_relu_gap_sums(
            g, positive.contiguous(), total.contiguous(), mean.contiguous(), sums, h * w
        ).run(r.device)  # fmt: skip
        return du, sums

    def apply(self, x: Tensor, load: Load, residual: Optional[Tensor]) -> Tensor:
        y = backend.new_nhwc(x, *x.shape)
        if x.shape[0] > 0:
            chain_launch.apply_load(
                backend.dense_nhwc(x), dense(residual), y, affine_of(load), _elements(x)
            ).run(x.device)  # fmt: skip
        return y

    def apply_backward(
        self, g: Tensor, x: Tensor, load: Load, residual: Optional[Tensor], operands: Sequence[Tensor],
        centres: Optional[Tensor],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        n, c, h, w = x.shape
        found, sums = operand_images(x, operands), 1 + len(operands)
        g, x = backend.dense_nhwc(g.to(x.dtype)), backend.dense_nhwc(x)
        du = None if load.activation == IDENTITY else backend.new_nhwc(x, n, c, h, w)
        totals = floats(x, sums, c)
        if n == 0:
            totals.zero_()
        else:
            tile = _elements(x)
            tiles, blocks = -(-n * h * w // tile.cols), -(-c // tile.channels)
            share = sum_share(tiles, blocks, 1, card_of(x)[0])
            partials = floats(x, -(-tiles // share), sums, c)
            chain_launch.apply_load_backward(
                g, x, dense(residual), found, None if centres is None else centres.contiguous(), du, partials,
                affine_of(load), tile, share,
            ).run(x.device)  # fmt: skip
            launch.sum_partials(partials, None, totals, sums).run(x.device)
        return (g if du is None else du), totals

    def bn_dgrad(self, dr: RawGradient) -> Tensor:
        out = backend.new_nhwc(dr.r, *dr.r.shape)
        if out.shape[0] > 0:
            chain_launch.bn_dgrad(dense_gradient(dr), out, _elements(dr.r)).run(out.device)
        return out


def _elements(t: Tensor) -> DepthwiseTile:
    return elementwise_tile(t.element_size(), t.shape[1], device_of(t.device.type, t.device.index or 0))


TRITON_CHAIN = TritonChain()
