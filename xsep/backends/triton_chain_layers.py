"""A layer's backward in Triton: slices of pictures, partial sums, and their last stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from ..problem import Affine, Geometry, Problem
from . import triton as backend
from . import triton_chain_launch as chain_launch
from . import triton_launch as launch
from .chain import Load, RawGradient, Shortcut
from .chain_kernels import affine_of
from .triton_chain_plans import BackwardPlan, ProductTile, WgradTile, sum_share, wgrad_groups
from .triton_plans import Device, device_of, even_slices, fprop_tile

PLAIN = Affine()


def card_of(t: Tensor) -> tuple[Device, bool]:
    """The device's properties, and whether its float32 products may be TF32."""
    device = device_of(t.device.type, t.device.index or 0)
    return device, backend.tf32_allowed(t.dtype, device)


def floats(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def dense(t: Optional[Tensor]) -> Optional[Tensor]:
    return None if t is None else backend.dense_nhwc(t)


def dense_gradient(dr: RawGradient) -> chain_launch.DenseGradient:
    return chain_launch.DenseGradient(
        backend.dense_nhwc(dr.du), backend.dense_nhwc(dr.r), dr.coef.contiguous(), dense(dr.taps), dr.pads
    )  # fmt: skip


def operand_images(x: Tensor, found: Sequence[Tensor]) -> tuple[Optional[Tensor], Optional[Tensor]]:
    """Dense images, None for x itself, which the kernels have read already."""
    same = [o.data_ptr() == x.data_ptr() and o.stride() == x.stride() for o in found]
    other = [None if s else backend.dense_nhwc(o) for s, o in zip(same, found)] + [None, None]
    return other[0], other[1]


def pointwise_gradient(dr: RawGradient, w: Tensor, tile: ProductTile) -> Tensor:
    """dz = w^T dr, [N, C_in, P, Q], of w [C_out, C_in, 1, 1]."""
    n, _, p, q = dr.r.shape
    dz, tf32 = backend.new_nhwc(dr.r, n, w.shape[1], p, q), card_of(dr.r)[1]
    if n > 0:
        chain_launch.pointwise_dgrad(
            dense_gradient(dr), backend.pointwise_weights(w, tf32), dz, tile, tf32
        ).run(dz.device)  # fmt: skip
    return dz


def weight_gradient(
    dr: RawGradient, x: Tensor, load: Load, tile: WgradTile, slice_n: int, w_dw: Optional[Tensor] = None,
    geometry: Geometry = backend.POINT, fused: bool = True,
) -> Tensor:  # fmt: skip
    """dr^T z, [C_out, C_in, 1, 1], of z = dw(load(x)) or, without w_dw, of z = load(x).

    ``fused``: z is made where it is multiplied. Else the depthwise kernel writes it, ``slice_n`` pictures at a time,
    and the product reads it from L2.
    """
    (n, c_in), (c_out, p, q) = x.shape[:2], dr.r.shape[1:]
    total = floats(x, c_out, c_in, 1, 1)
    if n == 0:
        return total.zero_()
    device, tf32 = card_of(x)
    gradient, x, load_x = dense_gradient(dr), backend.nhwc(x), affine_of(load)
    taps = None if w_dw is None else backend.filters_by_tap(w_dw)
    size = (1, 1) if w_dw is None else (w_dw.shape[2], w_dw.shape[3])
    z = None if fused else backend.new_nhwc(x, min(slice_n, n), c_in, p, q)
    inner = geometry if z is None else backend.POINT
    blocks = -(-c_out // tile.outputs) * -(-c_in // tile.inputs)
    parts = even_slices(n, slice_n)
    tiles = [chain_launch.wgrad_tiles(gradient.r[part], inner, tile) for part in parts]
    partials = floats(x, wgrad_groups(max(tiles), blocks, device), c_out, c_in)
    for part, count in zip(parts, tiles):
        own, share = gradient.part(part), -(-count // partials.shape[0])
        if z is None:
            made = chain_launch.separable_wgrad_pw(
                own, x[part], taps, partials, size, load_x, geometry, tile, share, tf32, part.start > 0
            )  # fmt: skip
        else:
            assert taps is not None
            z_part = z[: part.stop - part.start]
            _depthwise_into(z_part, x[part], taps, size, load_x, geometry, device)
            made = chain_launch.separable_wgrad_pw(
                own, z_part, None, partials, (1, 1), PLAIN, inner, tile, share, tf32, part.start > 0
            )  # fmt: skip
        made.run(x.device)
    chain_launch.sum_groups(partials, total).run(x.device)
    return total


def _depthwise_into(
    z: Tensor, x: Tensor, taps: Tensor, size: tuple[int, int], load: Affine, geometry: Geometry, device: Device
) -> None:
    n, c, h, w = x.shape
    problem = Problem(
        "depthwise", x.device.type, x.dtype, True, n, c, h, w, 1, *size, c, geometry, (load.activation, 0)
    )  # fmt: skip
    tile = fprop_tile(problem, device)
    assert tile is not None, "the chain takes no filters that the unrolled kernel does not"
    launch.depthwise_fprop(x, taps, z, size, load, PLAIN, geometry, tile).run(x.device)


def layer_dgrad(
    dr: RawGradient, w_pw: Tensor, w_dw: Tensor, x: Tensor, load: Load, geometry: Geometry,
    shortcut: Optional[Shortcut], operands: Sequence[Tensor], centres: Optional[Tensor], plan: BackwardPlan,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dw_dw, sums) by a product that forms dr on load and one depthwise pass, slice by slice."""
    (n, c, h, w), size = x.shape, (w_dw.shape[2], w_dw.shape[3])
    sums, tile = 1 + len(operands), plan.depthwise_tile
    assert tile is not None
    dw_dw, totals = floats(x, *w_dw.shape), floats(x, sums, c)
    dx = backend.new_nhwc(x, n, c, h, w)
    if n == 0:
        return dx, dw_dw.zero_(), totals.zero_()
    device, tf32 = card_of(x)
    others = operand_images(x, operands)
    gradient, x, weights = dense_gradient(dr), backend.nhwc(x), backend.pointwise_weights(w_pw, tf32)
    dz = backend.new_nhwc(x, min(plan.dgrad_slice, n), c, *dr.r.shape[2:])
    taps, short = backend.filters_by_tap(w_dw), None if shortcut is None else backend.dense_nhwc(shortcut.g)
    middles = None if centres is None else centres.contiguous()
    parts = even_slices(n, plan.dgrad_slice)
    splits = [launch.backward_split(x[part], geometry, tile) for part in parts]
    shares = [sum_share(split.tiles, split.channel_blocks, len(parts), device) for split in splits]
    rows = [split.programs(share) for split, share in zip(splits, shares)]
    partials, first = floats(x, sum(rows), size[0] * size[1] + sums, c), 0
    for part, split, share, count in zip(parts, splits, shares, rows):
        dz_part = dz[: part.stop - part.start]
        chain_launch.pointwise_dgrad(gradient.part(part), weights, dz_part, plan.dgrad_tile, tf32).run(x.device)
        mine = [None if o is None else o[part] for o in others]
        epilogue = launch.ChainEpilogue(
            sums, middles, (mine[0], mine[1]), None if short is None else short[part],
            shortcut is not None and shortcut.activated,
        )  # fmt: skip
        launch.depthwise_backward(
            x[part], dz_part, taps, dx[part], partials[first : first + count], size, affine_of(load), geometry,
            True, False, tile, split, share, epilogue,
        ).run(x.device)  # fmt: skip
        first += count
    launch.sum_partials(partials, dw_dw, totals, sums).run(x.device)
    return dx, dw_dw, totals
