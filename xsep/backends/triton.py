"""The ``triton`` backend: NVIDIA and AMD cards without a compiled extension; on the CPU in Triton's interpreter.

Kernels are NHWC. Inputs of another layout are copied once, inside. Triton is imported when the first kernel runs.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Optional

import torch
from torch import Tensor

from ..problem import Affine, Geometry, Problem, SeparableArgs
from . import pointwise
from . import triton_launch as launch
from .base import Backend, DepthwiseGradients
from .triton_plans import (
    Device,
    backward_tile,
    device_of,
    even_slices,
    fprop_tile,
    pointwise_tile,
    separable_plan,
    share_of,
)

#: Older versions cannot carry tuples of accumulators through a loop, which the kernels do.
MINIMUM = (3, 3)
TYPES = (torch.float32, torch.float16, torch.bfloat16)
PLAIN = Affine()
POINT = Geometry(1, 1, 0, 0, 0, 0, 1, 1)


@lru_cache(maxsize=1)
def installed_version() -> Optional[tuple[int, ...]]:
    """The installed Triton's version without importing it, or None."""
    if importlib.util.find_spec("triton") is None:
        return None
    for package in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        return tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    return None


def interpreting() -> bool:
    """Whether Triton was asked, by TRITON_INTERPRET=1, to run kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "on", "true", "yes", "y")


def nhwc(t: Tensor) -> Tensor:
    """t [N, C, H, W] itself where its channels have stride 1, else a channels_last copy."""
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous(memory_format=torch.channels_last)


def dense_nhwc(t: Tensor) -> Tensor:
    """t [N, C, H, W] with the strides of a fresh channels_last tensor, copied if need be."""
    return t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def new_nhwc(like: Tensor, n: int, c: int, h: int, w: int) -> Tensor:
    return torch.empty((n, h, w, c), dtype=like.dtype, device=like.device).permute(0, 3, 1, 2)


def filters_by_tap(w_dw: Tensor) -> Tensor:
    """[C_mid, 1, R, S] -> [R * S, C_mid], so that neighbouring lanes read neighbouring weights."""
    return w_dw.reshape(w_dw.shape[0], -1).t().contiguous()


def pointwise_weights(w_pw: Tensor, tf32: bool) -> Tensor:
    """[C_out, C_mid, 1, 1] -> contiguous [C_out, C_mid]; for products in TF32 rounded to it."""
    flat = w_pw.reshape(w_pw.shape[0], w_pw.shape[1]).contiguous()
    if not tf32:
        return flat
    rounded = torch.empty_like(flat)
    launch.round_weights(flat, rounded).run(flat.device)
    return rounded


def tf32_allowed(dtype: torch.dtype, device: Device) -> bool:
    """Whether float32 products may be TF32: as PyTorch's convolution settings say, and only on NVIDIA."""
    return dtype is torch.float32 and device.kind == "cuda" and pointwise.tf32_allowed()


def _depthwise_problem(x: Tensor, w_dw: Tensor, geometry: Geometry, activations: tuple[int, ...] = (0, 0)) -> Problem:
    n, c_in, h, w = x.shape
    c_mid, _, r, s = w_dw.shape
    return Problem(
        "depthwise",
        x.device.type,
        x.dtype,
        True,
        n,
        c_in,
        h,
        w,
        c_mid // c_in,
        r,
        s,
        c_mid,
        geometry,
        activations,
    )


class TritonBackend(Backend):
    name = "triton"

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        reasons = []
        version = installed_version()
        if version is None:
            reasons.append("Triton is not installed")
        elif version < MINIMUM:
            found, floor = (".".join(map(str, v)) for v in (version, MINIMUM))
            reasons.append(f"Triton {found} is installed, and the kernels need {floor} or newer")
        if problem.device == "cpu":
            if not interpreting():
                reasons.append("the tensors are on the CPU, where Triton runs only under TRITON_INTERPRET=1")
        elif problem.device != "cuda":
            reasons.append(f"Triton kernels run on CUDA and ROCm devices, not on {problem.device!r}")
        elif interpreting():
            reasons.append("TRITON_INTERPRET=1 is set, so Triton would not run on the GPU")
        elif not torch.cuda.is_available():
            reasons.append("PyTorch sees no GPU")
        elif torch.version.hip is None and torch.cuda.get_device_capability()[0] < 8:
            reasons.append("the kernels need an NVIDIA GPU of compute capability 8.0 or newer")
        if problem.dtype not in TYPES:
            reasons.append(f"{str(problem.dtype).removeprefix('torch.')} is not float32, float16 or bfloat16")
        return reasons

    def plan(self, problem: Problem) -> str:
        device = device_of(problem.device, torch.cuda.current_device() if problem.device == "cuda" else 0)
        copied = "" if problem.channels_last else "; NCHW input copied to NHWC once and the result back"
        if problem.op == "depthwise":
            tile = fprop_tile(problem, device)
            if tile is None:
                return f"depthwise, general kernel{copied}"
            return (
                f"depthwise, {tile.rows}x{tile.cols * tile.side} pixels of {tile.channels} channels a program{copied}"
            )
        found = separable_plan(problem, device, tf32_allowed(problem.dtype, device))
        if found.fused:
            t = found.tile
            return (
                f"fused, {t.rows}x{t.cols * t.side} pixels by {t.outputs} of {problem.c_out} channels a program, "
                f"{t.depth} of z at a time{copied}"
            )
        return f"staged, depthwise kernel then a matrix product, {found.slice_n} pictures at a time{copied}"

    def depthwise(self, x: Tensor, w_dw: Tensor, prologue: Affine, epilogue: Affine, geometry: Geometry) -> Tensor:
        n, _, h, w = x.shape
        p, q = geometry.output_size(h, w, *w_dw.shape[2:])
        z = new_nhwc(x, n, w_dw.shape[0], p, q)
        if n > 0:
            self._depthwise_into(z, nhwc(x), filters_by_tap(w_dw), w_dw, prologue, epilogue, geometry)
        return z

    def _depthwise_into(
        self, z: Tensor, x: Tensor, weight: Tensor, w_dw: Tensor, prologue: Affine, epilogue: Affine, g: Geometry
    ) -> None:
        problem = _depthwise_problem(x, w_dw, g, (prologue.activation, epilogue.activation))
        tile = fprop_tile(problem, device_of(x.device.type, x.device.index or 0))
        size = (w_dw.shape[2], w_dw.shape[3])
        if tile is None:
            launch.fprop_general(x, weight, z, size, prologue, epilogue, g).run(x.device)
        else:
            launch.depthwise_fprop(x, weight, z, size, prologue, epilogue, g, tile).run(x.device)

    def depthwise_backward_kernel(
        self, dz: Tensor, x: Tensor, w_dw: Tensor, prologue: Affine, geometry: Geometry, wanted: Sequence[bool]
    ) -> DepthwiseGradients:
        w_x, w_w, w_scale, w_shift = wanted
        n, c_in, h, w = x.shape
        r, s = w_dw.shape[2:]
        want_affine = w_scale or w_shift
        dw = torch.empty_like(w_dw, memory_format=torch.contiguous_format) if w_w else None
        vectors = torch.empty((2, c_in), dtype=torch.float32, device=x.device) if want_affine else None
        dx = new_nhwc(x, n, c_in, h, w) if w_x or want_affine else None
        if n > 0:
            x, dz, weight = nhwc(x), nhwc(dz), filters_by_tap(w_dw)
            device = device_of(x.device.type, x.device.index or 0)
            tile = backward_tile(_depthwise_problem(x, w_dw, geometry), device)
            if tile is None:
                self._general_backward(x, dz, weight, (r, s), dx, dw, vectors, prologue, geometry)
            else:
                split = launch.backward_split(x, geometry, tile)
                share = share_of(split.tiles, split.channel_blocks, device)
                partials = None
                if dw is not None or vectors is not None:
                    shape = (split.programs(share), r * s + 2, c_in)
                    partials = torch.empty(shape, dtype=torch.float32, device=x.device)
                launch.depthwise_backward(
                    x, dz, weight, dx, partials, (r, s), prologue, geometry, dw is not None, vectors is not None,
                    tile, split, share,
                ).run(x.device)  # fmt: skip
                if partials is not None:
                    launch.sum_partials(partials, dw, vectors).run(x.device)
        else:
            for t in (dw, vectors):
                if t is not None:
                    t.zero_()
        return DepthwiseGradients(
            dx if w_x else None,
            dw,
            vectors[0] if vectors is not None and w_scale else None,
            vectors[1] if vectors is not None and w_shift else None,
        )

    def _general_backward(
        self, x: Tensor, dz: Tensor, weight: Tensor, size: tuple[int, int], dx: Optional[Tensor],
        dw: Optional[Tensor], vectors: Optional[Tensor], prologue: Affine, geometry: Geometry,
    ) -> None:  # fmt: skip
        n, c_in, h, w = x.shape
        c_mid, p, q = dz.shape[1:]
        wide: Any = {"dtype": torch.float32, "device": x.device}
        if dx is not None:
            blocks = -(-n * h * w // launch.GENERAL[0])
            sums = torch.empty((blocks, 2, c_in), **wide) if vectors is not None else None
            launch.dgrad_general(x, dz, weight, dx, sums, size, prologue, geometry).run(x.device)
            if sums is not None:
                launch.sum_partials(sums, None, vectors).run(x.device)
        if dw is not None:
            blocks = -(-n * p * q // launch.GENERAL[0])
            rows = min(blocks, 256)
            partials = torch.empty((rows, size[0] * size[1] + 2, c_mid), **wide)
            launch.wgrad_general(x, dz, partials, size, prologue, geometry).run(x.device)
            launch.sum_partials(partials, dw, None).run(x.device)

    def separable_forward(self, a: SeparableArgs) -> Tensor:
        n, c_in, h, w = a.x.shape
        c_mid, _, r, s = a.w_dw.shape
        geometry, c_out = Geometry(*a.geometry), a.w_pw.shape[0]
        p, q = geometry.output_size(h, w, r, s)
        y = new_nhwc(a.x, n, c_out, p, q)
        if n == 0:
            return y
        device = device_of(a.x.device.type, a.x.device.index or 0)
        tf32 = tf32_allowed(a.x.dtype, device)
        problem = Problem(
            "separable", a.x.device.type, a.x.dtype, True, n, c_in, h, w, c_mid // c_in, r, s, c_out, geometry,
            tuple(a.activations),
        )  # fmt: skip
        plan = separable_plan(problem, device, tf32)
        residual = None if a.residual is None else dense_nhwc(a.residual)
        x, weight, w_pw = nhwc(a.x), filters_by_tap(a.w_dw), pointwise_weights(a.w_pw, tf32)
        if plan.fused:
            tensors = launch.SeparableTensors(x, w_pw, y, weight, a.bias, residual)
            launch.separable_fprop(
                tensors, (r, s), a.prologue, a.middle, a.epilogue, geometry, plan.tile, tf32
            ).run(x.device)  # fmt: skip
            return y
        z = new_nhwc(x, min(plan.slice_n, n), c_mid, p, q)
        for part in even_slices(n, plan.slice_n):
            z_part = z[: part.stop - part.start]
            self._depthwise_into(z_part, x[part], weight, a.w_dw, a.prologue, a.middle, geometry)
            self._pointwise_into(y[part], z_part, w_pw, a, None if residual is None else residual[part], tf32)
        return y

    def _pointwise_into(
        self, y: Tensor, z: Tensor, w_pw: Tensor, a: SeparableArgs, residual: Optional[Tensor], tf32: bool
    ) -> None:
        """y = epilogue(pw(z)): torch.mm where nothing follows, else our kernel, which has the epilogue in it."""
        c_out, c_mid = w_pw.shape
        rows = z.numel() // c_mid
        plain = a.bias is None and residual is None and a.epilogue.is_identity()
        if plain and z.dtype is not torch.float32:
            torch.mm(z.permute(0, 2, 3, 1).view(rows, c_mid), w_pw.t(), out=y.permute(0, 2, 3, 1).view(rows, c_out))
            return
        tile = pointwise_tile(z.dtype, device_of(z.device.type, z.device.index or 0), tf32)
        launch.separable_fprop(
            launch.SeparableTensors(
                one_row(z), w_pw, one_row(y), None, a.bias, None if residual is None else one_row(residual)
            ),
            (1, 1), PLAIN, PLAIN, a.epilogue, POINT, tile, tf32,
        ).run(z.device)  # fmt: skip


def one_row(t: Tensor) -> Tensor:
    """A dense NHWC tensor [N, C, H, W] as one picture of one row, [1, C, 1, N * H * W]."""
    return t.permute(0, 2, 3, 1).reshape(1, 1, -1, t.shape[1]).permute(0, 3, 1, 2)


TRITON = TritonBackend()
