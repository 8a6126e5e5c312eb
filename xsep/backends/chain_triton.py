"""The chain in Triton: a layer's forward with its statistics, and their merge; the rest in plain PyTorch."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ..problem import Affine, Geometry, Problem
from . import triton as backend
from . import triton_launch as launch
from .chain import Forward, Load
from .chain_aten import AtenChain
from .chain_cpu import affine_of
from .triton_plans import SeparableTile, chain_tile, device_of, unrolled


def _problem(x: Tensor, w_dw: Tensor, w_pw: Tensor, geometry: Geometry, activation: int) -> Problem:
    n, c_in, h, w = x.shape
    return Problem(
        "separable", x.device.type, x.dtype, True, n, c_in, h, w, 1, w_dw.shape[2], w_dw.shape[3], w_pw.shape[0],
        geometry, (activation, 0, 0),
    )  # fmt: skip


def _tile(problem: Problem) -> tuple[SeparableTile, bool]:
    device = device_of(problem.device, torch.cuda.current_device() if problem.device == "cuda" else 0)
    tf32 = backend.tf32_allowed(problem.dtype, device)
    return chain_tile(problem, device, tf32), tf32


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

    def sep_fprop(
        self, x: Tensor, load: Load, residual: Optional[Tensor], w_dw: Tensor, w_pw: Tensor, geometry: Geometry,
        statistics: bool,
    ) -> Forward:  # fmt: skip
        g, (r_size, s_size), c_out = geometry, w_dw.shape[2:], w_pw.shape[0]
        problem = _problem(x, w_dw, w_pw, g, load.activation)
        tile, tf32 = _tile(problem)
        p, q = problem.output_size
        r = backend.new_nhwc(x, x.shape[0], c_out, p, q)
        x_pre = None if residual is None else backend.new_nhwc(x, *x.shape)
        partials = counts = None
        if statistics:
            tiles = launch.pixel_tiles(r, g, tile)
            partials = torch.empty((tiles, 3, c_out), dtype=torch.float32, device=x.device)
            counts = torch.empty((tiles,), dtype=torch.int32, device=x.device)
        if x.shape[0] == 0:
            return Forward(r, partials, counts, x_pre)
        x = backend.nhwc(x) if residual is None else backend.dense_nhwc(x)
        tensors = launch.SeparableTensors(
            x, w_pw.reshape(c_out, -1).contiguous(), r, backend.filters_by_tap(w_dw),
            addend=None if residual is None else backend.dense_nhwc(residual), x_pre=x_pre,
            partials=partials, counts=counts,
        )  # fmt: skip
        launch.separable_fprop(
            tensors, (r_size, s_size), affine_of(load), Affine(), Affine(), g, tile, tf32
        ).run(x.device)  # fmt: skip
        return Forward(r, partials, counts, x_pre)

    def bn_finalize(
        self, partials: Tensor, counts: Tensor, gamma: Optional[Tensor], beta: Optional[Tensor],
        running_mean: Optional[Tensor], running_var: Optional[Tensor], batches: Optional[Tensor], momentum: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        rows, _, c = partials.shape
        device = partials.device
        vec = torch.empty((2, c), dtype=torch.float32, device=device)
        mean, invstd = (torch.empty((c,), dtype=torch.float32, device=device) for _ in range(2))
        count = torch.empty((), dtype=torch.float64, device=device)
        groups = min(launch.STATISTICS_GROUPS, max(rows, 1))
        merged = torch.empty((groups, 3, c), dtype=torch.float64, device=device)
        launch.merge_statistics(partials.contiguous(), counts.contiguous(), merged).run(device)
        vectors = {
            "gamma": torch.ones_like(mean) if gamma is None else gamma,
            "beta": torch.zeros_like(mean) if beta is None else beta,
            "running_mean": running_mean, "running_var": running_var, "batches": batches,
            "vec": vec, "mean_out": mean, "invstd_out": invstd, "count_out": count,
        }  # fmt: skip
        launch.finalize_statistics(merged, vectors, momentum, eps).run(device)
        return vec, mean, invstd, count


TRITON_CHAIN = TritonChain()
