"""Launches of the training chain's kernels as its backend would make them, of meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor

from xsep.backends import triton_chain_launch as chain
from xsep.backends import triton_chain_plans as plans
from xsep.backends import triton_launch as launch
from xsep.backends.chain import tiles_of
from xsep.backends.triton_plans import DepthwiseTile, Device
from xsep.problem import Affine, Geometry, Problem

POINT = Geometry(1, 1, 0, 0, 0, 0, 1, 1)


def image(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((n, h, w, c), dtype=dtype, device="meta").permute(0, 3, 1, 2)


def floats(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


class ChainLaunches:
    """One method a kernel, each named as a job names it."""

    def __init__(self, job: Any, device: Device, dtype: torch.dtype) -> None:
        self.job, self.device, self.dtype = job, device, dtype
        self.n, self.c, self.size, self.k, self.tf32 = job.n, job.channels, job.size, job.k, job.tf32
        pad = job.dilation * (job.k // 2)
        self.geometry = Geometry(job.stride, job.stride, pad, pad, pad, pad, job.dilation, job.dilation)
        p, q = self.geometry.output_size(job.size, job.size, job.k, job.k)
        self.problem = Problem(
            "separable", "cuda", dtype, True, self.n, self.c, job.size, job.size, 1, job.k, job.k, job.outputs,
            self.geometry, (job.activation, 0, 0),
        )  # fmt: skip
        self.x = image(self.n, self.c, job.size, job.size, dtype)
        self.half = image(self.n, self.c, (job.size + 1) // 2, (job.size + 1) // 2, dtype)
        self.z, self.r = (image(self.n, c, p, q, dtype) for c in (self.c, job.outputs))
        self.weight = torch.empty((job.k * job.k, self.c), dtype=dtype, device="meta")
        self.w_pw = torch.empty((job.outputs, self.c), dtype=dtype, device="meta")
        vector = floats(self.c) if job.vectors else None
        self.load = Affine(vector, vector, job.activation, 0.5)
        du, taps = self.r, None
        if job.pooled:
            du = image(self.n, job.outputs, (p + 1) // 2, (q + 1) // 2, dtype)
            taps = du.to(torch.uint8)
        self.dr = chain.DenseGradient(du, self.r, floats(3, job.outputs), taps, (1, 1))
        # The first operand is x, as in a chain; a second is another tensor.
        self.operands = (None, self.x if job.operands > 1 else None)

    def elements(self, channels: int) -> DepthwiseTile:
        return plans.elementwise_tile(self.dtype.itemsize, channels, self.device)

    def _wgrad(self, weight: Optional[Tensor], x: Tensor, geometry: Geometry, k: int, load: Affine) -> launch.Launch:
        tile = plans.wgrad_tile(
            self.dtype, self.c, 0 if weight is None else k * k, load.activation, self.device, self.tf32,
            self.job.pooled, 1 if weight is None else self.job.stride, launch.wide(x, self.r),
        )  # fmt: skip
        tiles = chain.wgrad_tiles(self.r, geometry, tile)
        groups = plans.wgrad_groups(tiles, 1, self.device)
        share = -(-tiles // groups)
        partials = floats(groups, self.job.outputs, self.c)
        apart = weight is None and load.is_identity()
        return chain.separable_wgrad_pw(
            self.dr, x, weight, partials, (k, k), load, geometry, tile, share, self.tf32, apart
        )  # fmt: skip

    def chain_wgrad(self) -> launch.Launch:
        return self._wgrad(self.weight, self.x, self.geometry, self.k, self.load)

    def chain_wgrad_apart(self) -> launch.Launch:
        return self._wgrad(None, self.z, POINT, 1, Affine())

    def chain_wgrad_skip(self) -> launch.Launch:
        return self._wgrad(None, self.z, POINT, 1, self.load)

    def chain_sum_groups(self) -> launch.Launch:
        return chain.sum_groups(floats(9, self.job.outputs, self.c), floats(self.job.outputs, self.c))

    def chain_dgrad(self) -> launch.Launch:
        tile = plans.gradient_tile(self.dtype, self.c, self.device, self.tf32, self.job.pooled)
        return chain.pointwise_dgrad(self.dr, self.w_pw, self.z, tile, self.tf32)

    def chain_fprop(self) -> launch.Launch:
        y = image(self.n, self.job.outputs, self.size, self.size, self.dtype)
        tiles = tiles_of(chain.pixels_of(y))
        partials, counts = floats(tiles, 3, self.job.outputs), torch.empty(tiles, dtype=torch.int32, device="meta")
        return chain.pointwise_fprop(
            self.x, self.w_pw, y, partials, counts, self.load,
            plans.product_tile(self.dtype, self.job.activation, self.device, self.tf32), self.tf32,
        )  # fmt: skip

    def chain_backward(self) -> launch.Launch:
        tile = plans.chain_backward_tile(self.problem, self.device)
        assert tile is not None
        split = launch.backward_split(self.x, self.geometry, tile)
        share, sums = plans.sum_share(split.tiles, split.channel_blocks, 1, self.device), 1 + self.job.operands
        shortcut = {"": None, "full": self.x, "half": self.half}[self.job.shortcut]
        return launch.depthwise_backward(
            self.x, self.z, self.weight, self.x, floats(split.programs(share), self.k * self.k + sums, self.c),
            (self.k, self.k), self.load, self.geometry, True, False, tile, split, share,
            launch.ChainEpilogue(sums, floats(sums, self.c), self.operands, shortcut),
        )  # fmt: skip

    def chain_apply(self) -> launch.Launch:
        return chain.apply_load(self.x, self.x, self.x, self.load, self.elements(self.c))

    def chain_apply_backward(self) -> launch.Launch:
        sums = 1 + self.job.operands
        return chain.apply_load_backward(
            self.x, self.x, self.x, self.operands, floats(sums, self.c), self.x, floats(99, sums, self.c), self.load,
            self.elements(self.c), 3,
        )  # fmt: skip

    def chain_bn_dgrad(self) -> launch.Launch:
        return chain.bn_dgrad(self.dr, self.r, self.elements(self.job.outputs))

    def chain_pool(self) -> launch.Launch:
        vec, results = floats(2, self.c), (self.half, self.half.to(torch.uint8), self.half)
        return chain.bn_pool_add(self.x, vec, self.half, vec, (1, 1), results, self.elements(self.c))

    def chain_gap(self) -> launch.Launch:
        pooled, sums = torch.empty((self.n, self.c), dtype=self.dtype, device="meta"), floats(self.n, self.c)
        return chain.bn_relu_gap(self.x, floats(2, self.c), pooled, sums, sums, self.elements(self.c))

    def chain_gap_backward(self) -> launch.Launch:
        g = torch.empty((self.n, self.c), dtype=self.dtype, device="meta")
        return chain.bn_relu_gap_backward(g, self.x, floats(2, self.c), self.x, self.elements(self.c))

    def chain_gap_sums(self) -> launch.Launch:
        g, sums = torch.empty((self.n, self.c), dtype=self.dtype, device="meta"), floats(self.n, self.c)
        return chain.bn_relu_gap_sums(g, sums, sums, floats(self.c), floats(2, self.c), self.size**2)

    def chain_statistics(self) -> launch.Launch:
        tiles = tiles_of(chain.pixels_of(self.x))
        return chain.tile_statistics(
            self.x, floats(tiles, 3, self.c), torch.empty(tiles, dtype=torch.int32, device="meta")
        )  # fmt: skip

    def chain_finalize_backward(self) -> launch.Launch:
        one, gamma = floats(self.c), floats(self.c) if self.job.vectors else None
        results = (floats(3, self.c), one, one)
        return chain.finalize_backward(floats(2, self.c), one, one, gamma, floats().double(), True, results)


LAUNCHES: dict[str, Callable[[ChainLaunches], launch.Launch]] = {
    name: method for name, method in vars(ChainLaunches).items() if name.startswith("chain_")
}
