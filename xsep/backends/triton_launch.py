"""Launches of the Triton kernels as data: which kernel, on what grid, with which arguments and constants.

Made from shapes, strides and types alone, so that a launch can be made of meta tensors and compiled ahead of time.
"""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import dataclass
from math import ceil, gcd
from typing import Any, Optional

import torch
from torch import Tensor

from ..problem import Affine, Geometry
from .triton_plans import INT32, DepthwiseTile, SeparableTile, groups_of, row_tiles, step_of


@dataclass
class Launch:
    """One kernel launch; ``module`` and ``kernel`` name a function of ``xsep.kernels``."""

    module: str
    kernel: str
    grid: tuple[int, ...]
    args: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    stages: int = 1

    def function(self) -> Any:
        return getattr(importlib.import_module(f"xsep.kernels.{self.module}"), self.kernel)

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told; to fuse products with sums too, which Triton 3.10 will no longer do unasked."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def run(self, device: torch.device) -> None:
        guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with guard:
            self.function()[self.grid](**self.args, **self.constants, **self.options)


def vector_width(itemsize: int, *extents: int) -> int:
    """Channels in an access of at most 16 bytes when every extent and stride is a multiple of them."""
    return gcd(16 // itemsize, *extents)


def pixel_strides(t: Tensor) -> tuple[int, int, int]:
    """Strides of N, H, W of a [N, C, H, W] tensor whose channels have stride 1; 0 where there is one index only."""
    strides = zip((t.stride(0), t.stride(2), t.stride(3)), (t.shape[0], t.shape[2], t.shape[3]))
    n, h, w = (stride if size > 1 else 0 for stride, size in strides)
    return n, h, w


def wide(*tensors: Tensor) -> bool:
    """Whether offsets over pictures, columns and channels of one of the tensors, or of a dense copy, leave 32 bits."""
    return any(
        t.numel() > INT32 or abs(n) * t.shape[0] + abs(w) * (t.shape[3] + 64) + t.shape[1] > INT32
        for t in tensors
        for n, _, w in [pixel_strides(t)]
    )


def geometry_of(g: Geometry) -> dict[str, int]:
    return {
        "STRIDE_H": g.stride_h, "STRIDE_W": g.stride_w, "DILATION_H": g.dilation_h, "DILATION_W": g.dilation_w,
    }  # fmt: skip


def _run_time_geometry(g: Geometry) -> dict[str, int]:
    return {
        "pad_top": g.pad_top, "pad_left": g.pad_left, "stride_h": g.stride_h, "stride_w": g.stride_w,
        "dilation_h": g.dilation_h, "dilation_w": g.dilation_w,
    }  # fmt: skip


def strides_of(prefix: str, t: Tensor, vec: int) -> dict[str, int]:
    return dict(zip((f"{prefix}_n", f"{prefix}_h", f"{prefix}_w"), (s // vec for s in pixel_strides(t))))


def depthwise_fprop(
    x: Tensor, weight: Tensor, y: Tensor, filter_size: tuple[int, int], prologue: Affine, epilogue: Affine,
    geometry: Geometry, tile: DepthwiseTile,
) -> Launch:  # fmt: skip
    """x [N, C_in, H, W] and y [N, C_mid, P, Q] with channels of stride 1, weight [R * S, C_mid]."""
    n, c_in, h, w = x.shape
    c_mid, p, q = y.shape[1:]
    multiplier = c_mid // c_in
    strides = pixel_strides(x)
    vec = vector_width(x.element_size(), c_mid, *strides) if multiplier == 1 else 1
    down, across = step_of(geometry.stride_h, geometry.dilation_h), step_of(geometry.stride_w, geometry.dilation_w)
    strips, groups = row_tiles(p, down.row, tile.rows), row_tiles(q, across.row, tile.side)
    grid = ceil(c_mid / tile.channels) * strips * ceil(n * groups / tile.cols)
    args = {
        "x": x, "weight": weight, "y": y, "scale_p": prologue.scale, "shift_p": prologue.shift,
        "scale_e": epilogue.scale, "shift_e": epilogue.shift, "alpha_p": prologue.alpha, "alpha_e": epilogue.alpha,
        "n": n, "h": h, "w": w, "channel_vecs": c_mid // vec, "p": p, "q": q, **strides_of("sx", x, vec),
        "pad_top": geometry.pad_top, "pad_left": geometry.pad_left, "groups": groups, "strips": strips,
        "rows": tile.rows,
    }  # fmt: skip
    constants = {
        "R": filter_size[0], "S": filter_size[1], **geometry_of(geometry), "ROW_STEP": down.row, "TAP_ROWS": down.tap,
        "COL_STEP": across.row, "TAP_COLS": across.tap, "MULTIPLIER": multiplier, "ACT_P": prologue.activation,
        "ACT_E": epilogue.activation, "SIDE": tile.side, "UNROLL": tile.unroll, "COLS": tile.cols,
        "CHANNELS": tile.channels, "VEC": vec, "WIDE": wide(x, y),
    }  # fmt: skip
    return Launch("depthwise_fprop", "depthwise_fprop", (grid,), args, constants, tile.warps)


@dataclass(frozen=True)
class BackwardSplit:
    """How the strips of x are dealt out to the programs of the one-pass backward."""

    strips: int  # in a column of x
    groups: int  # of columns in a row
    tiles: int
    channel_blocks: int

    def programs(self, share: int) -> int:
        """Rows of partial sums: programs for each block of channels."""
        return ceil(self.tiles / share)


def backward_split(x: Tensor, geometry: Geometry, tile: DepthwiseTile) -> BackwardSplit:
    n, c, h, w = x.shape
    g = geometry
    strips = row_tiles(groups_of(h, g.pad_top, g.stride_h), g.dilation_h, tile.rows)
    groups = row_tiles(groups_of(w, g.pad_left, g.stride_w), g.dilation_w, tile.side)
    return BackwardSplit(strips, groups, strips * ceil(n * groups / tile.cols), ceil(c / tile.channels))


@dataclass(frozen=True)
class ChainEpilogue:
    """What the training chain adds to the one-pass backward, whose partials are [programs, R * S + sums, C]; dense."""

    sums: int  # 1, and one for each operand
    centres: Optional[Tensor] = None  # [sums, C] float32, where there are operands
    operands: tuple[Optional[Tensor], Optional[Tensor]] = (None, None)  # [N, C, H, W]; None: x itself, or none
    shortcut: Optional[Tensor] = None  # [N, C, H, W], or every second row and column
    activated: bool = False


def depthwise_backward(
    x: Tensor, dz: Tensor, weight: Tensor, dx: Optional[Tensor], partials: Optional[Tensor],
    filter_size: tuple[int, int], prologue: Affine, geometry: Geometry, want_dw: bool, want_affine: bool,
    tile: DepthwiseTile, split: BackwardSplit, share: int, chain: Optional[ChainEpilogue] = None,
) -> Launch:  # fmt: skip
    """x, dx [N, C, H, W] and dz [N, C, P, Q] with channels of stride 1; partials [programs, R * S + 2, C]."""
    n, c, h, w = x.shape
    p, q = dz.shape[2:]
    extra = chain or ChainEpilogue(0)
    short_h, short_w = (h, w) if extra.shortcut is None else extra.shortcut.shape[2:]
    vec = vector_width(x.element_size(), c, *pixel_strides(x), *pixel_strides(dz))
    grid = split.channel_blocks * split.programs(share)
    args = {
        "x": x, "dz": dz, "weight": weight, "dx": dx, "partials": partials, "scale_p": prologue.scale,
        "shift_p": prologue.shift, "alpha_p": prologue.alpha, "n": n, "h": h, "w": w, "channel_vecs": c // vec,
        "p": p, "q": q, **strides_of("sx", x, vec), **strides_of("sd", dz, vec), "pad_top": geometry.pad_top,
        "pad_left": geometry.pad_left, "strips": split.strips, "rows": tile.rows, "groups": split.groups,
        "share": share, "shortcut": extra.shortcut, "operand_1": extra.operands[0], "operand_2": extra.operands[1],
        "centres": extra.centres, "short_h": short_h, "short_w": short_w,
    }  # fmt: skip
    constants = {
        "R": filter_size[0], "S": filter_size[1], **geometry_of(geometry), "ACT_P": prologue.activation,
        "WANT_DX": dx is not None, "WANT_DW": want_dw, "WANT_AFFINE": want_affine, "SIDE": tile.side,
        "UNROLL": tile.unroll, "COLS": tile.cols, "CHANNELS": tile.channels, "VEC": vec, "WIDE": wide(x, dz),
        "SHORT_STEP": 1 if (short_h, short_w) == (h, w) else 2, "ACTIVATED": extra.activated, "SUMS": extra.sums,
    }  # fmt: skip
    return Launch("depthwise_backward", "depthwise_backward", (grid,), args, constants, tile.warps)


def sum_partials(partials: Tensor, dw: Optional[Tensor], dvectors: Optional[Tensor], vectors: int = 2) -> Launch:
    """partials [rows, taps + vectors, C] -> dw [C, ..., taps in all], dvectors [vectors, C]."""
    rows, entries, c = partials.shape
    args = {
        "partials": partials, "dw": dw, "dvectors": dvectors, "rows": rows, "entries": entries,
        "taps": entries - vectors, "channels": c,
    }  # fmt: skip
    return Launch("reductions", "sum_partials", (entries, ceil(c / 32)), args, {"ROWS": 32, "CHANNELS": 32}, warps=4)


#: Groups of tiles whose statistics are merged side by side before the last merge.
STATISTICS_GROUPS = 32


def merge_statistics(partials: Tensor, counts: Tensor, merged: Tensor, batches: Optional[Tensor]) -> Launch:
    """partials [T, 3, C] float32, counts [T] int32 -> merged [groups, 3, C] float64: count, mean, deviations.

    ``batches`` [] int64, or None, is one more afterwards.
    """
    rows, _, c = partials.shape
    groups = merged.shape[0]
    args = {
        "partials": partials, "counts": counts, "batches": batches, "merged": merged, "rows": rows, "channels": c,
        "share": ceil(rows / groups),
    }  # fmt: skip
    return Launch("statistics", "merge_statistics", (groups, ceil(c / 32)), args, {"ROWS": 16, "CHANNELS": 32}, warps=4)


def finalize_statistics(merged: Tensor, vectors: dict[str, Optional[Tensor]], momentum: float, eps: float) -> Launch:
    """``vectors`` are the kernel's tensors but for ``merged``; momentum is used where ``batches`` is None."""
    groups, _, c = merged.shape
    args = {"merged": merged, **vectors, "momentum": momentum, "eps": eps, "groups": groups, "channels": c}
    constants = {"GROUPS": STATISTICS_GROUPS, "CHANNELS": 32}
    return Launch("statistics", "finalize_statistics", (ceil(c / 32),), args, constants, warps=4)


#: Pixels and channels of a program of the general kernels.
GENERAL = (16, 64)


def _vector_width(x: Tensor, c_mid: int, *images: Tensor) -> int:
    """Of the general kernels; with a multiplier, neighbouring channels of z are no neighbours in x."""
    strides = [stride for t in images for stride in pixel_strides(t)]
    return vector_width(x.element_size(), c_mid, *strides) if c_mid == x.shape[1] else 1


def fprop_general(
    x: Tensor, weight: Tensor, y: Tensor, filter_size: tuple[int, int], prologue: Affine, epilogue: Affine,
    geometry: Geometry,
) -> Launch:  # fmt: skip
    n, c_in, h, w = x.shape
    c_mid, p, q = y.shape[1:]
    grid = ceil(c_mid / GENERAL[1]) * ceil(n * p * q / GENERAL[0])
    vec = _vector_width(x, c_mid, x)
    args = {
        "x": x, "weight": weight, "y": y, "scale_p": prologue.scale, "shift_p": prologue.shift,
        "scale_e": epilogue.scale, "shift_e": epilogue.shift, "alpha_p": prologue.alpha, "alpha_e": epilogue.alpha,
        "n": n, "h": h, "w": w, "channel_vecs": c_mid // vec, "p": p, "q": q, **strides_of("sx", x, vec),
        "r_size": filter_size[0], "s_size": filter_size[1], **_run_time_geometry(geometry),
        "multiplier": c_mid // c_in,
    }  # fmt: skip
    constants = {
        "ACT_P": prologue.activation, "ACT_E": epilogue.activation, "PIXELS": GENERAL[0], "CHANNELS": GENERAL[1],
        "VEC": vec,
    }  # fmt: skip
    return Launch("depthwise_general", "fprop_general", (grid,), args, constants, warps=4)


def dgrad_general(
    x: Tensor, dz: Tensor, weight: Tensor, dx: Tensor, partials: Optional[Tensor], filter_size: tuple[int, int],
    prologue: Affine, geometry: Geometry,
) -> Launch:  # fmt: skip
    """partials [pixel blocks, 2, C_in] or None where the prologue's gradients are not wanted."""
    n, c_in, h, w = x.shape
    c_mid, p, q = dz.shape[1:]
    grid = ceil(c_in / GENERAL[1]) * ceil(n * h * w / GENERAL[0])
    vec = _vector_width(x, c_mid, x, dz)
    args = {
        "x": x, "dz": dz, "weight": weight, "dx": dx, "partials": partials, "scale_p": prologue.scale,
        "shift_p": prologue.shift, "alpha_p": prologue.alpha, "n": n, "h": h, "w": w, "channel_vecs": c_in // vec,
        "p": p, "q": q, **strides_of("sx", x, vec), **strides_of("sd", dz, vec), "r_size": filter_size[0],
        "s_size": filter_size[1], **_run_time_geometry(geometry), "multiplier": c_mid // c_in,
    }  # fmt: skip
    constants = {
        "ACT_P": prologue.activation, "WANT_AFFINE": partials is not None, "PIXELS": GENERAL[0], "CHANNELS": GENERAL[1],
        "VEC": vec,
    }  # fmt: skip
    return Launch("depthwise_general", "dgrad_general", (grid,), args, constants, warps=4)


def wgrad_general(
    x: Tensor, dz: Tensor, partials: Tensor, filter_size: tuple[int, int], prologue: Affine, geometry: Geometry
) -> Launch:
    """partials [rows, R * S + 2, C_mid]; its rows share the output pixels."""
    n, c_in, h, w = x.shape
    c_mid, p, q = dz.shape[1:]
    rows, vec = partials.shape[0], _vector_width(x, c_mid, x, dz)
    # All on one axis: the others end at 65,535, and a filter may have more taps.
    grid = (ceil(c_mid / GENERAL[1]) * rows * filter_size[0] * filter_size[1],)
    args = {
        "x": x, "dz": dz, "partials": partials, "scale_p": prologue.scale, "shift_p": prologue.shift,
        "alpha_p": prologue.alpha, "n": n, "h": h, "w": w, "channel_vecs": c_mid // vec, "p": p, "q": q,
        **strides_of("sx", x, vec), **strides_of("sd", dz, vec), "r_size": filter_size[0], "s_size": filter_size[1],
        **_run_time_geometry(geometry), "multiplier": c_mid // c_in, "share": ceil(ceil(n * p * q / GENERAL[0]) / rows),
    }  # fmt: skip
    constants = {"ACT_P": prologue.activation, "PIXELS": GENERAL[0], "CHANNELS": GENERAL[1], "VEC": vec}
    return Launch("depthwise_general", "wgrad_general", grid, args, constants, warps=4)


def round_weights(weight: Tensor, rounded: Tensor) -> Launch:
    """weight -> rounded, to the nearest TF32 numbers; both contiguous float32."""
    args = {"weight": weight, "rounded": rounded, "elements": weight.numel()}
    return Launch("tf32", "round_weights", (ceil(weight.numel() / 1024),), args, {"ELEMENTS": 1024}, warps=4)


@dataclass(frozen=True)
class SeparableTensors:
    """What the fused kernel reads and writes besides the affines; images have channels of stride 1."""

    x: Tensor  # [N, C_in, H, W]
    w_pw: Tensor  # [C_out, C_mid]; from round_weights where float32 is multiplied as TF32
    y: Tensor  # [N, C_out, P, Q], dense
    weight: Optional[Tensor] = None  # [R * S, C_mid]; None: no depthwise convolution
    bias: Optional[Tensor] = None  # [C_out]
    residual: Optional[Tensor] = None  # [N, C_out, P, Q], dense
    addend: Optional[Tensor] = None  # [N, C_in, H, W], x's strides
    x_pre: Optional[Tensor] = None  # [N, C_in, H, W], dense
    partials: Optional[Tensor] = None  # [pixel tiles, 3, C_out] float32
    counts: Optional[Tensor] = None  # [pixel tiles] int32


def pixel_tiles(y: Tensor, geometry: Geometry, tile: SeparableTile) -> int:
    """Pixel tiles of y [N, C_out, P, Q]: rows of the statistics' partials."""
    n, _, p, q = y.shape
    down, across = step_of(geometry.stride_h, geometry.dilation_h), step_of(geometry.stride_w, geometry.dilation_w)
    return row_tiles(p, down.row, tile.rows) * ceil(n * row_tiles(q, across.row, tile.side) / tile.cols)


def separable_fprop(
    t: SeparableTensors, filter_size: tuple[int, int], prologue: Affine, middle: Affine, epilogue: Affine,
    geometry: Geometry, tile: SeparableTile, tf32: bool,
) -> Launch:  # fmt: skip
    n, c_in, h, w = t.x.shape
    c_out, c_mid = t.w_pw.shape
    p, q = t.y.shape[2:]
    multiplier = c_mid // c_in
    vec = vector_width(t.x.element_size(), c_mid, *pixel_strides(t.x)) if multiplier == 1 else 1
    out_vec = vector_width(t.x.element_size(), c_out)
    down, across = step_of(geometry.stride_h, geometry.dilation_h), step_of(geometry.stride_w, geometry.dilation_w)
    args = {
        "x": t.x, "addend": t.addend, "x_pre": t.x_pre, "weight": t.weight, "w_pw": t.w_pw, "residual": t.residual,
        "y": t.y, "partials": t.partials, "counts": t.counts, "bias": t.bias, "scale_p": prologue.scale,
        "shift_p": prologue.shift, "scale_m": middle.scale, "shift_m": middle.shift, "scale_e": epilogue.scale,
        "shift_e": epilogue.shift, "alpha_p": prologue.alpha, "alpha_m": middle.alpha, "alpha_e": epilogue.alpha,
        "n": n, "h": h, "w": w, "mid_vecs": c_mid // vec, "out_vecs": c_out // out_vec, "p": p, "q": q,
        **strides_of("sx", t.x, vec), "pad_top": geometry.pad_top, "pad_left": geometry.pad_left,
        "tiles": row_tiles(p, down.row, tile.rows), "groups": row_tiles(q, across.row, tile.side),
    }  # fmt: skip
    constants = {
        "R": filter_size[0], "S": filter_size[1], **geometry_of(geometry), "ROW_STEP": down.row, "TAP_ROWS": down.tap,
        "COL_STEP": across.row, "TAP_COLS": across.tap, "MULTIPLIER": multiplier,
        "CENTRE_R": geometry.pad_top // geometry.dilation_h, "CENTRE_S": geometry.pad_left // geometry.dilation_w,
        "ACT_P": prologue.activation, "ACT_M": middle.activation, "ACT_E": epilogue.activation,
        "PRECISION": "tf32" if tf32 else "ieee", "ROWS": tile.rows, "SIDE": tile.side, "COLS": tile.cols,
        "OUTPUTS": tile.outputs, "DEPTH": tile.depth, "VEC": vec, "OUT_VEC": out_vec,
        "WIDE": wide(t.x, t.y) or t.w_pw.numel() > INT32,
    }  # fmt: skip
    grid = ceil(c_out / tile.outputs) * pixel_tiles(t.y, geometry, tile)
    return Launch("separable_fprop", "separable_fprop", (grid,), args, constants, tile.warps, tile.stages)
