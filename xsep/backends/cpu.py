"""The ``cpu`` backend: C++ kernels for float32, bfloat16 and float16, the fused forward among them.

The kernels work on NHWC. NCHW tensors are turned round where they are read and written: the forward brings each row of
x as it comes to it, in the caches, and stores y tile by tile; the backward's kernels turn tiles of x, dy and dx. The
depthwise forward by itself takes NCHW plane by plane, as it lies, where that is faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional, Union

import torch
from torch import Tensor

from .. import extension
from ..problem import IDENTITY, Affine, DepthwiseArgs, Geometry, Problem, SeparableArgs, output_format
from . import packed_weights
from .base import (
    Backend,
    DepthwiseGradients,
    Gradients,
    needs_recompute,
    only_bias_follows,
    where_only_bias_follows,
    with_bias,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Floats in a vector of each level.
LANES = {"default": 4, "avx2": 8, "avx512": 16}
#: Of a 1x1 filter: every pixel stays where it is.
IN_PLACE = Geometry(1, 1, 0, 0, 0, 0, 1, 1)


def _to_nhwc(t: Tensor) -> Tensor:
    """Turned round once, not by every kernel that reads it."""
    return t if t.is_contiguous(memory_format=torch.channels_last) else torch.ops.xsep.cpu_to_nhwc(t)


def _to_nchw(t: Tensor) -> Tensor:
    return t if t.is_contiguous() else torch.ops.xsep.cpu_to_nchw(t)


def pixel_product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b over the pixels of images [N, C, H, W], [C_a, C_b] in float32, as a sum of short sums.

    PyTorch's matrix product adds up pixel after pixel: in float32 up to ten times the error of its convolutions.
    """
    filters = b.new_ones((b.shape[1], 1, 1, 1))  # b is what a depthwise convolution with them makes of b
    product = torch.ops.xsep.cpu_separable_wgrad(
        a, b, filters, None, None, None, None, IN_PLACE, (IDENTITY, IDENTITY), (0.0, 0.0)
    )
    return product.view(a.shape[1], b.shape[1])


def _wants_nchw(x: Tensor, *weights: Tensor) -> bool:
    return output_format(x, *weights) is torch.contiguous_format


def _like(dx: Optional[Tensor], x: Tensor, *weights: Tensor) -> Optional[Tensor]:
    """A gradient in NHWC in the layout that x's has to have; a glance at x, the usual case, is cheap."""
    if dx is None or x.is_contiguous(memory_format=torch.channels_last) or not _wants_nchw(x, *weights):
        return dx
    return _to_nchw(dx)


class CpuBackend(Backend):
    name = "cpu"
    adds_short_sums = True

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        reasons = []
        if problem.device != "cpu":
            reasons.append(f"its kernels run on the CPU, and the tensors are on {problem.device}")
        if problem.dtype not in DTYPES:
            reasons.append(f"its kernels take float32, bfloat16 and float16, not {problem.dtype}".replace("torch.", ""))
        missing = extension.load_cpu().reason
        if missing:
            reasons.append(missing)
        return reasons

    def slower_than_aten(self, problem: Problem, direction: str) -> str:
        module, p = extension.binding(), problem
        where = ((p.n, p.c_in, p.h, p.w), (p.r, p.s), p.multiplier, p.geometry)
        if module is None:
            return ""
        nchw, training = not p.channels_last, direction == "backward"
        of = "one input channel" if p.c_in == 1 else f"{p.c_in} input channels in {'NCHW' if nchw else 'NHWC'}"
        idle = f"PyTorch's convolutions are faster: {of} leave most lanes of a vector idle in the cpu backend"
        if p.dtype != torch.float32:
            # PyTorch's convolutions of 16-bit types need instructions that not every chip has.
            plain = p.op == "separable" and not any(p.activations)
            if not plain or p.dtype != torch.bfloat16 or not torch.ops.xsep.cpu_has_bfloat16_dot():
                return ""
            left = module.cpu_pairs_leave_lanes_idle(*where, c_out=p.c_out, nchw=nchw, training=training)
            return idle if left else ""
        if p.op == "depthwise":
            threads, lanes = torch.get_num_threads(), LANES[extension.load_cpu().level]
            if not module.cpu_depthwise_leaves_lanes_idle(
                *where, nchw=nchw, training=training, threads=threads, lanes=lanes
            ):
                return ""
            return f"PyTorch's convolution is faster with so few channels: {of}"
        return idle if module.cpu_leaves_lanes_idle(*where, nchw=nchw, training=training) else ""

    def plan(self, problem: Problem) -> str:
        module, threads = extension.binding(), torch.get_num_threads()
        assert module is not None
        p = problem
        where = ((p.n, p.c_in, p.h, p.w), (p.r, p.s), p.multiplier, p.geometry)
        how = f"{threads} thread{'s' if threads > 1 else ''}, {extension.load_cpu().level}"
        if p.op == "depthwise":
            if module.cpu_takes_planes(*where, nchw=not p.channels_last, lanes=LANES[extension.load_cpu().level]):
                planes = module.plan_cpu_planes(*where, threads=threads)
                return f"depthwise, plane by plane, {planes.units} units of {planes.group_rows} rows, {how}"
            staged = module.plan_cpu_depthwise(*where, threads=threads)
            how += self._turned(p, where, threads, 1)
            return f"depthwise, {staged.tasks} tasks of {staged.run_pixels} pixels, {how}"
        paired = p.dtype == torch.bfloat16 and torch.ops.xsep.cpu_has_bfloat16_gemm()
        lanes = LANES[extension.load_cpu().level]
        if module.cpu_separates_planes(*where, nchw=not p.channels_last, pairs=paired, threads=threads, lanes=lanes):
            rows = module.plan_cpu_separable_planes(*where, threads=threads)
            return f"fused, plane by plane, {rows.tasks} tasks of {rows.group_rows} rows, float32 GEMM, {how}"
        fused = module.plan_cpu_separable(*where, c_out=p.c_out, threads=threads, z_bytes=2 if paired else 4)
        how += self._turned(p, where, threads, fused.panel_groups)
        gemm = f"{'bfloat16' if paired else 'float32'} GEMM, {how}"
        if fused.z_first:
            return f"all of z first, kept in the cache, then {fused.panels} panels of 64 channels, {gemm}"
        groups = f" in {fused.panel_groups} groups, z made anew for each" if fused.panel_groups > 1 else ""
        return (
            f"fused, {fused.tasks} tasks of at most {fused.tile_pixels} pixels, {fused.panels} panels of 64 channels"
            f"{groups}, {gemm}"
        )

    @staticmethod
    def _turned(p: Problem, where: tuple[Any, ...], threads: int, visits: int) -> str:
        """What is said of x's layout."""
        module = extension.binding()
        if module is None:
            return ""
        if p.channels_last:
            lanes = LANES[extension.load_cpu().level]
            spread = module.cpu_spreads_pixels(
                *where, threads=threads, visits=visits, lanes=lanes, element_bytes=p.dtype.itemsize
            )
            return ", x's pixels moved apart row by row" if spread else ""
        if module.cpu_brings_rows(*where, nchw=True, threads=threads, visits=visits, element_bytes=p.dtype.itemsize):
            return ", x turned to NHWC row by row"
        return ", x converted to NHWC"

    def depthwise(
        self, x: Tensor, w_dw: Tensor, prologue: Affine, epilogue: Affine, geometry: Geometry, nchw: bool = False
    ) -> Tensor:
        return torch.ops.xsep.cpu_depthwise_fprop(
            x, w_dw, prologue.scale, prologue.shift, epilogue.scale, epilogue.shift,
            geometry, (prologue.activation, epilogue.activation), (prologue.alpha, epilogue.alpha), nchw,
        )  # fmt: skip

    def depthwise_backward_kernel(
        self, dz: Tensor, x: Tensor, w_dw: Tensor, prologue: Affine, geometry: Geometry, wanted: Sequence[bool]
    ) -> DepthwiseGradients:
        dx, dw_dw, dscale, dshift = torch.ops.xsep.cpu_depthwise_bprop(
            dz, x, w_dw, prologue.scale, prologue.shift, geometry, prologue.activation, prologue.alpha, wanted
        )
        return DepthwiseGradients(
            dx if wanted[0] else None,
            dw_dw if wanted[1] else None,
            dscale if wanted[2] else None,
            dshift if wanted[3] else None,
        )

    def separable_wgrad(self, du: Tensor, a: SeparableArgs) -> Tensor:
        if a.w_dw.shape[0] != a.x.shape[1]:
            return super().separable_wgrad(du, a)
        return torch.ops.xsep.cpu_separable_wgrad(
            du, a.x, a.w_dw, a.prologue.scale, a.prologue.shift, a.middle.scale, a.middle.shift,
            a.geometry, a.activations[:2], a.alphas[:2],
        )  # fmt: skip

    def pointwise(self, z: Tensor, w_pw: Tensor) -> Tensor:
        # Pixels by a matrix, as the gradient is: that of the weights turned round.
        return torch.ops.xsep.cpu_pointwise_product(z, w_pw.transpose(0, 1))

    def pointwise_dgrad(self, dv: Tensor, w_pw: Tensor) -> Tensor:
        return torch.ops.xsep.cpu_pointwise_product(dv, w_pw)

    def pointwise_wgrad(self, du: Tensor, z: Tensor, w_pw: Tensor) -> Tensor:
        return pixel_product(du, z).view(w_pw.shape)

    def separable_forward(self, a: SeparableArgs) -> Tensor:
        shift_e = a.shift_e if a.bias is None else with_bias(a.epilogue, a.bias).shift
        return torch.ops.xsep.cpu_separable_fprop(
            a.x, a.w_dw, a.w_pw, a.residual, a.scale_p, a.shift_p, a.scale_m, a.shift_m, a.scale_e, shift_e,
            a.geometry, a.activations, a.alphas, packed_weights.find(a.w_pw, a.w_dw.shape[0] // a.x.shape[1]),
        )  # fmt: skip

    def depthwise_forward(self, a: DepthwiseArgs) -> Tensor:
        epilogue = with_bias(a.epilogue, a.bias)
        return self.depthwise(a.x, a.w_dw, a.prologue, epilogue, Geometry(*a.geometry), _wants_nchw(a.x, a.w_dw))

    def depthwise_backward(
        self, dy: Tensor, a: DepthwiseArgs, y: Optional[Tensor], wanted: Sequence[bool]
    ) -> Gradients:
        if needs_recompute(y, a.epilogue) or wanted[5]:
            dy, y = _to_nhwc(dy), None if y is None else _to_nhwc(y)  # beside what is made anew, in NHWC
        dx, *rest = super().depthwise_backward(dy, a, y, wanted)
        return (_like(dx, a.x, a.w_dw), *rest)

    def separable_backward(
        self, dy: Tensor, a: SeparableArgs, y: Optional[Tensor], wanted: Sequence[bool]
    ) -> Gradients:
        if not wanted[4] and self.is_one_backward(a):
            dx, *rest = self._separable_bprop(dy, a, wanted)
        else:
            several = a.w_dw.shape[0] != a.x.shape[1]
            if several or not a.middle.is_identity() or needs_recompute(y, a.epilogue):
                dy, y = _to_nhwc(dy), None if y is None else _to_nhwc(y)  # beside what is made anew, in NHWC
            dx, *rest = super().separable_backward(dy, a, y, wanted)
        return (_like(dx, a.x, a.w_dw, a.w_pw), *rest)

    def is_one_call(self, a: Union[SeparableArgs, DepthwiseArgs]) -> bool:
        return True

    def is_one_backward(self, a: Union[SeparableArgs, DepthwiseArgs]) -> bool:
        return only_bias_follows(a) and (isinstance(a, DepthwiseArgs) or a.w_dw.shape[0] == a.x.shape[1])

    def _separable_bprop(self, dy: Tensor, a: SeparableArgs, wanted: Sequence[bool]) -> Gradients:
        kernel = torch.ops.xsep.cpu_separable_bprop(
            dy, a.x, a.w_dw, a.w_pw, a.scale_p, a.shift_p, a.geometry, a.activations[0], a.alphas[0],
            (wanted[0], wanted[1], wanted[2], wanted[5], wanted[6]),
        )  # fmt: skip
        return where_only_bias_follows(kernel, dy, wanted)


CPU = CpuBackend()
