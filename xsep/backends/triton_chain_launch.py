"""Launches of the training chain's own Triton kernels, as data (see :mod:`.triton_launch`)."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any, Optional

from torch import Tensor

from ..problem import Affine, Geometry
from .chain import TILE
from .triton_chain_plans import ProductTile, WgradTile
from .triton_launch import (
    INT32,
    Launch,
    geometry_of,
    pixel_strides,
    strides_of,
    vector_width,
    wide,
)
from .triton_plans import DepthwiseTile, row_tiles, step_of


@dataclass(frozen=True)
class DenseGradient:
    """A raw output's gradient as the kernels read it: everything NHWC without gaps."""

    du: Tensor  # [N, C, P, Q], or [N, C, ceil(P / 2), ceil(Q / 2)] beside taps
    r: Tensor  # [N, C, P, Q]
    coef: Tensor  # [3, C] float32
    taps: Optional[Tensor] = None  # uint8, like du
    pads: tuple[int, int] = (0, 0)  # top, left

    def part(self, pictures: slice) -> DenseGradient:
        taps = None if self.taps is None else self.taps[pictures]
        return DenseGradient(self.du[pictures], self.r[pictures], self.coef, taps, self.pads)

    def arguments(self) -> dict[str, Any]:
        return {
            "du": self.du, "taps": self.taps, "r": self.r, "coef": self.coef, "p": self.r.shape[2],
            "q": self.r.shape[3], "pooled_p": self.du.shape[2], "pooled_q": self.du.shape[3], "top": self.pads[0],
            "left": self.pads[1],
        }  # fmt: skip


def pixels_of(t: Tensor) -> int:
    return t.shape[0] * t.shape[2] * t.shape[3]


def _flat(*tensors: Tensor) -> dict[str, bool]:
    """Whether flat offsets over pixels and channels leave 32 bits, with room for a tile's overhang."""
    return {"WIDE": any(t.numel() + 512 * t.shape[1] > INT32 for t in tensors)}


def separable_wgrad_pw(
    dr: DenseGradient, x: Tensor, weight: Optional[Tensor], partials: Tensor, filter_size: tuple[int, int],
    prologue: Affine, geometry: Geometry, tile: WgradTile, share: int, tf32: bool, accumulate: bool = False,
) -> Launch:  # fmt: skip
    """x [N, C_in, H, W] with channels of stride 1, weight [R * S, C_in] or None, partials [groups, C_out, C_in].

    ``accumulate``: add to what the partials hold.
    """
    n, c_in, h, w = x.shape
    c_out, p = dr.r.shape[1:3]
    vec = vector_width(x.element_size(), c_in, *pixel_strides(x))
    out_vec = vector_width(x.element_size(), c_out)
    step = step_of(geometry.stride_h, geometry.dilation_h)
    args = {
        **dr.arguments(), "x": x, "weight": weight, "partials": partials, "scale_p": prologue.scale,
        "shift_p": prologue.shift, "alpha_p": prologue.alpha, "n": n, "h": h, "w": w, "in_vecs": c_in // vec,
        "out_vecs": c_out // out_vec, **strides_of("sx", x, vec), "pad_top": geometry.pad_top,
        "pad_left": geometry.pad_left, "tiles": row_tiles(p, step.row, tile.rows), "share": share,
    }  # fmt: skip
    constants = {
        "R": filter_size[0], "S": filter_size[1], **geometry_of(geometry), "ROW_STEP": step.row,
        "TAP_STEP": step.tap, "ACT_P": prologue.activation, "PRECISION": "tf32" if tf32 else "ieee",
        "ROWS": tile.rows, "COLS": tile.cols, "OUTPUTS": tile.outputs, "INPUTS": tile.inputs, "VEC": vec,
        "OUT_VEC": out_vec, "ACCUMULATE": accumulate, "WIDE": wide(x, dr.r),
    }  # fmt: skip
    grid = ceil(c_out / tile.outputs) * ceil(c_in / tile.inputs) * partials.shape[0]
    return Launch("separable_wgrad", "separable_wgrad_pw", (grid,), args, constants, tile.warps, tile.stages)


def wgrad_tiles(r: Tensor, geometry: Geometry, tile: WgradTile) -> int:
    """Pixel tiles of r [N, C_out, P, Q] that the groups share."""
    n, _, p, q = r.shape
    return row_tiles(p, step_of(geometry.stride_h, geometry.dilation_h).row, tile.rows) * ceil(n * q / tile.cols)


def sum_groups(partials: Tensor, total: Tensor) -> Launch:
    """partials [groups, ...] -> total [...], both contiguous float32."""
    args = {"partials": partials, "total": total, "groups": partials.shape[0], "elements": total.numel()}
    return Launch("separable_wgrad", "sum_groups", (ceil(total.numel() / 512),), args, {"ELEMENTS": 512}, warps=4)


def pointwise_fprop(
    x: Tensor, w_pw: Tensor, y: Tensor, partials: Optional[Tensor], counts: Optional[Tensor], prologue: Affine,
    tile: ProductTile, tf32: bool,
) -> Launch:  # fmt: skip
    """x [N, C_in, H, W] with channels of stride 1, y [N, C_out, H, W] dense; partials of TILE pixels each."""
    c_in, h, w = x.shape[1:]
    c_out = y.shape[1]
    vec = vector_width(x.element_size(), c_in, *pixel_strides(x))
    out_vec = vector_width(x.element_size(), c_out)
    args = {
        "x": x, "w_pw": w_pw, "y": y, "partials": partials, "counts": counts, "scale_p": prologue.scale,
        "shift_p": prologue.shift, "alpha_p": prologue.alpha, "pixels": pixels_of(x), "h": h, "w": w,
        "in_vecs": c_in // vec, "out_vecs": c_out // out_vec, **strides_of("sx", x, vec),
    }  # fmt: skip
    constants = {
        "ACT_P": prologue.activation, "PRECISION": "tf32" if tf32 else "ieee", "PIXELS": tile.pixels,
        "OUTPUTS": tile.columns, "DEPTH": tile.depth, "VEC": vec, "OUT_VEC": out_vec,
        "WIDE": wide(x, y) or _flat(y)["WIDE"],
    }  # fmt: skip
    grid = ceil(c_out / tile.columns) * ceil(pixels_of(x) / tile.pixels)
    return Launch("pointwise_chain", "pointwise_fprop", (grid,), args, constants, tile.warps, tile.stages)


def pointwise_dgrad(dr: DenseGradient, w_pw: Tensor, dz: Tensor, tile: ProductTile, tf32: bool) -> Launch:
    """w_pw [C_out, C_in], dz [N, C_in, P, Q] dense."""
    c_out, c_in = w_pw.shape
    vec, out_vec = (vector_width(dz.element_size(), c) for c in (c_in, c_out))
    args = {
        **dr.arguments(), "w_pw": w_pw, "dz": dz, "pixels": pixels_of(dz), "in_vecs": c_in // vec,
        "out_vecs": c_out // out_vec,
    }  # fmt: skip
    constants = {
        "PRECISION": "tf32" if tf32 else "ieee", "PIXELS": tile.pixels, "INPUTS": tile.columns, "DEPTH": tile.depth,
        "VEC": vec, "OUT_VEC": out_vec, **_flat(dz, dr.r),
    }  # fmt: skip
    grid = ceil(c_in / tile.columns) * ceil(pixels_of(dz) / tile.pixels)
    return Launch("pointwise_chain", "pointwise_dgrad", (grid,), args, constants, tile.warps, tile.stages)


def _elementwise(
    kernel: str, t: Tensor, args: dict[str, Any], tile: DepthwiseTile, module: str = "chain_elementwise",
    tensors: tuple[Tensor, ...] = (),
) -> Launch:  # fmt: skip
    """One program a tile of the dense t [N, C, ...] and block of its channels."""
    n, c, h, w = t.shape
    vec = vector_width(t.element_size(), c)
    constants = {"PIXELS": tile.cols, "CHANNELS": tile.channels, "VEC": vec, **_flat(t, *tensors)}
    grid = ceil(c / tile.channels) * ceil(n * h * w / tile.cols)
    return Launch(
        module, kernel, (grid,), {**args, "pixels": n * h * w, "channel_vecs": c // vec}, constants, tile.warps
    )  # fmt: skip


def apply_load(x: Tensor, residual: Optional[Tensor], y: Tensor, load: Affine, tile: DepthwiseTile) -> Launch:
    """Dense images of one shape."""
    args = {"x": x, "residual": residual, "y": y, "scale": load.scale, "shift": load.shift, "alpha": load.alpha}
    made = _elementwise("apply_load", x, args, tile)
    made.constants["ACT"] = load.activation
    return made


def apply_load_backward(
    g: Tensor, x: Tensor, residual: Optional[Tensor], operands: tuple[Optional[Tensor], Optional[Tensor]],
    centres: Optional[Tensor], du: Optional[Tensor], partials: Tensor, load: Affine, tile: DepthwiseTile, share: int,
) -> Launch:  # fmt: skip
    """Dense images of one shape; partials [programs, sums, C]."""
    args = {
        "g": g, "x": x, "residual": residual, "operand_1": operands[0], "operand_2": operands[1], "centres": centres,
        "du": du, "partials": partials, "scale": load.scale, "shift": load.shift, "alpha": load.alpha, "share": share,
    }  # fmt: skip
    made = _elementwise("apply_load_backward", x, args, tile)
    made.constants.update(ACT=load.activation, SUMS=partials.shape[1])
    made.grid = (ceil(x.shape[1] / tile.channels) * partials.shape[0],)
    return made


def bn_dgrad(dr: DenseGradient, out: Tensor, tile: DepthwiseTile) -> Launch:
    return _elementwise("bn_dgrad", out, {**dr.arguments(), "dr": out}, tile)


def bn_pool_add(
    r: Tensor, vec: Tensor, s: Tensor, vec_s: Tensor, pads: tuple[int, int], results: tuple[Tensor, Tensor, Tensor],
    tile: DepthwiseTile,
) -> Launch:  # fmt: skip
    """Dense images; ``results``: t, the taps and what was chosen."""
    t, taps, chosen = results
    args = {
        "r": r, "s": s, "vec": vec, "vec_s": vec_s, "t": t, "taps": taps, "chosen": chosen, "h": r.shape[2],
        "w": r.shape[3], "p": s.shape[2], "q": s.shape[3], "top": pads[0], "left": pads[1],
    }  # fmt: skip
    return _elementwise("bn_pool_add", t, args, tile, "chain_pooling", (r,))


def bn_relu_gap(r: Tensor, vec: Tensor, pooled: Tensor, positive: Tensor, total: Tensor, tile: DepthwiseTile) -> Launch:
    n, c, h, w = r.shape
    width = vector_width(r.element_size(), c)
    args = {
        "r": r, "vec": vec, "pooled": pooled, "positive": positive, "total": total, "area": h * w,
        "channel_vecs": c // width,
    }  # fmt: skip
    constants = {"PIXELS": tile.cols, "CHANNELS": tile.channels, "VEC": width}
    return Launch("chain_pooling", "bn_relu_gap", (n, ceil(c / tile.channels)), args, constants, tile.warps)


def bn_relu_gap_backward(g: Tensor, r: Tensor, vec: Tensor, du: Tensor, tile: DepthwiseTile) -> Launch:
    args = {"g": g, "r": r, "vec": vec, "du": du, "area": r.shape[2] * r.shape[3]}
    return _elementwise("bn_relu_gap_backward", r, args, tile, "chain_pooling")


def bn_relu_gap_sums(g: Tensor, positive: Tensor, total: Tensor, mean: Tensor, sums: Tensor, area: int) -> Launch:
    n, c = g.shape
    args = {
        "g": g, "positive": positive, "total": total, "mean": mean, "sums": sums, "n": n, "area": area, "channels": c,
    }  # fmt: skip
    constants = {"PICTURES": 16, "CHANNELS": 32}
    return Launch("chain_pooling", "bn_relu_gap_sums", (ceil(c / 32),), args, constants, warps=4)


def tile_statistics(r: Tensor, partials: Tensor, counts: Tensor) -> Launch:
    """r [N, C, P, Q] dense, in tiles of TILE pixels."""
    c = r.shape[1]
    width = vector_width(r.element_size(), c)
    args = {"r": r, "partials": partials, "counts": counts, "pixels": pixels_of(r), "channel_vecs": c // width}
    constants = {"PIXELS": TILE, "CHANNELS": 64, "VEC": width}
    return Launch("statistics", "tile_statistics", (partials.shape[0], ceil(c / 64)), args, constants, warps=8)


def finalize_backward(
    sums: Tensor, mean: Tensor, invstd: Tensor, gamma: Optional[Tensor], count: Tensor, batch: bool,
    results: tuple[Tensor, Tensor, Tensor],
) -> Launch:  # fmt: skip
    """``results``: coef [3, C], dgamma [C], dbeta [C]."""
    c = mean.shape[0]
    args = {
        "sums": sums, "mean": mean, "invstd": invstd, "gamma": gamma, "count": count, "coef": results[0],
        "dgamma": results[1], "dbeta": results[2], "channels": c,
    }  # fmt: skip
    constants = {"BATCH": batch, "CHANNELS": 128}
    return Launch("statistics", "finalize_backward", (ceil(c / 128),), args, constants, warps=4)
