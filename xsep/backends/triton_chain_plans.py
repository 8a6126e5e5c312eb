"""How the triton backend runs the training chain's backward: tiles, groups and slices, and why.

Pure functions of the layer and the device, like :mod:`.triton_plans`. Tiles name every shipped configuration, so that
the tests can compile each ahead of time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil
from typing import Optional

import torch

from ..problem import IDENTITY, Problem
from .triton_plans import COMPARISONS, INT32, DepthwiseTile, Device, backward_tile, slice_of


@dataclass(frozen=True)
class ProductTile:
    """pixels x columns of a product by one program, ``depth`` of the summed channels at a time."""

    pixels: int
    columns: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class WgradTile:
    """outputs x inputs weights by one program, rows x cols pixels at a time."""

    rows: int
    cols: int
    outputs: int
    inputs: int
    warps: int
    stages: int


@dataclass(frozen=True)
class BackwardPlan:
    """How a layer's two weight and input gradients are made, ``slice_n`` pictures at a time where something is kept."""

    wgrad_fused: bool  # z made in the product's own program; else by the depthwise kernel, left in L2
    wgrad_slice: int
    wgrad_tile: WgradTile
    dgrad_slice: int
    dgrad_tile: ProductTile
    depthwise_tile: Optional[DepthwiseTile]  # None: the general kernels, then the epilogue in plain PyTorch
    reason: str


#: Products over flat pixels, within the 99 KB of shared memory that cards of capability 8.6, 8.9 and 12.0 have. The
#: statistics' tiles of ``pointwise_fprop`` are 128 pixels on every card.
PRODUCT = ProductTile(128, 128, 64, 8, 3)
#: For 32-bit values, and for an activation that is no comparison: at 64 channels ptxas spilled up to 836 bytes.
PRODUCT_SHALLOW = ProductTile(128, 128, 32, 8, 3)
#: Those that form dr on load, by the widest of their columns. Two tensors are read for one, from L2 once for every
#: block of columns: 256 of them bring 1.5 times the multiplications a byte that 128 do.
GRADIENTS = {
    64: ProductTile(128, 64, 32, 8, 3),
    128: ProductTile(128, 128, 32, 8, 4),
    256: ProductTile(128, 256, 32, 8, 3),
}
GRADIENTS_TF32 = {64: ProductTile(128, 64, 32, 8, 2), 128: ProductTile(128, 128, 32, 8, 2)}
PRODUCT_HIP = ProductTile(128, 128, 32, 8, 1)
PRODUCT_IEEE = ProductTile(128, 32, 16, 8, 1)
#: Un-pooled on load, every left operand is nine loads: too many buffers for a pipeline.
GRADIENT_POOLED = ProductTile(128, 128, 32, 8, 1)

#: The weight gradient. What else wants registers (filters of more than FUSED_TAPS, a stride, un-pooling on load, 32-bit
#: values, an activation that is no comparison, narrow accesses, 64-bit offsets) leaves room for half as many sums: at
#: 128 inputs ptxas spilled up to 624 bytes.
WGRAD = WgradTile(2, 32, 128, 128, 8, 1)
WGRAD_NARROW = WgradTile(2, 32, 128, 64, 8, 1)
WGRAD_LARGE_FILTER = WgradTile(1, 64, 128, 64, 8, 1)
#: With no filter there are three loads a turn, which a pipeline can run ahead of.
WGRAD_PLAIN = WgradTile(1, 64, 128, 128, 8, 2)
WGRAD_PLAIN_TF32 = WgradTile(1, 32, 128, 128, 8, 2)
WGRAD_HIP = WgradTile(2, 32, 128, 64, 4, 1)
FUSED_TAPS = 9
WGRAD_IEEE = WgradTile(1, 16, 64, 32, 4, 1)
WGRAD_IEEE_LARGE_FILTER = WgradTile(1, 16, 64, 16, 4, 1)
WGRAD_PLAIN_IEEE = WgradTile(1, 16, 64, 32, 4, 2)
#: Programs a multiprocessor gets: two even out, and more would be more rows of partial sums. Eight, where those are
#: small.
WGRAD_WAVES = 2
SUM_WAVES = 8


def product_tile(dtype: torch.dtype, activation: int, device: Device, tf32: bool) -> ProductTile:
    """Of ``pointwise_fprop``; ``activation`` on load."""
    if dtype is torch.float32 and not tf32:
        return PRODUCT_IEEE
    if device.kind == "hip":
        return PRODUCT_HIP
    return PRODUCT if dtype is not torch.float32 and activation in COMPARISONS else PRODUCT_SHALLOW


def gradient_tile(dtype: torch.dtype, c_in: int, device: Device, tf32: bool, pooled: bool = False) -> ProductTile:
    """Of ``pointwise_dgrad``, whose columns are the input channels."""
    if dtype is torch.float32 and not tf32:
        return PRODUCT_IEEE
    if device.kind == "hip":
        return PRODUCT_HIP
    if pooled:
        return GRADIENT_POOLED
    tiles = GRADIENTS_TF32 if dtype is torch.float32 else GRADIENTS
    return next((tile for columns, tile in tiles.items() if c_in <= columns), tiles[max(tiles)])


def wgrad_tile(
    dtype: torch.dtype, c_in: int, taps: int, activation: int, device: Device, tf32: bool, pooled: bool = False,
    stride: int = 1, wide: bool = False,
) -> WgradTile:  # fmt: skip
    """``taps``: R * S of the depthwise filter, 0 where there is none; ``activation`` on load; ``wide`` offsets."""
    if dtype is torch.float32 and not tf32:
        if taps > 25 and device.kind != "hip":
            return WGRAD_IEEE_LARGE_FILTER
        return WGRAD_IEEE if taps > 0 or pooled or device.kind == "hip" else WGRAD_PLAIN_IEEE
    if device.kind == "hip":
        return WGRAD_HIP
    if taps == 0 and c_in > 64 and not pooled:
        return WGRAD_PLAIN_TF32 if dtype is torch.float32 else WGRAD_PLAIN
    # One row at a time; two of z as it was stored, rounded to TF32 beside an un-pooled dr, spilled 68 bytes on sm_80.
    if taps > 25 or (taps == 0 and pooled and dtype is torch.float32):
        return WGRAD_LARGE_FILTER
    crowded = taps > FUSED_TAPS or stride > 1 or pooled or dtype is torch.float32
    crowded = crowded or activation not in COMPARISONS or c_in % 8 > 0 or wide
    return WGRAD_NARROW if crowded or c_in <= 64 else WGRAD


def wgrad_groups(tiles: int, blocks: int, device: Device) -> int:
    """Groups of pixel tiles that fill the card, and no more, when there are ``blocks`` blocks of weights."""
    groups = min(tiles, max(1, WGRAD_WAVES * device.multiprocessors // blocks))
    return ceil(tiles / ceil(tiles / groups))


def sum_share(tiles: int, blocks: int, launches: int, device: Device) -> int:
    """Tiles of a program that adds up as it goes, where so many launches each leave their programs' sums."""
    waves = max(SUM_WAVES // launches, WGRAD_WAVES)
    return max(1, ceil(tiles * blocks / (waves * device.multiprocessors)))


def elementwise_tile(itemsize: int, channels: int, device: Device) -> DepthwiseTile:
    """One row of pixels: 16 bytes a thread of 128, twice."""
    block = min(64, 1 << max(channels - 1, 0).bit_length())
    return DepthwiseTile(1, max(128 * (16 // itemsize) * 2 // block, 1), block, 128 // device.warp)


def _in_l2(problem: Problem, picture: int, device: Device) -> int:
    """Pictures of which ``picture`` bytes each stay in half of L2, but enough to fill the card."""
    p, q = problem.output_size
    programs = max(ceil(p * q / 128), 1) * ceil(problem.c_in / 128)
    most = max(device.l2_bytes // (2 * max(picture, 1)), ceil(2 * device.multiprocessors / programs))
    return max(1, min(problem.n, most))


@lru_cache(maxsize=4096)
def backward_plan(problem: Problem, device: Device, tf32: bool, pooled: bool = False) -> BackwardPlan:
    """The weight gradient by the clocks of one multiprocessor that each way would take, as ``separable_plan`` counts.

    Fused, z is made again for every block of output channels; apart, it is written and read once, by L2 where slices of
    the batch that L2 holds keep the card busy (``slice_of``). The input gradient is always a product and one depthwise
    pass, dz between them likewise. On chip, the R * S sums of dw_dw leave registers for 64 channels a program: du and r
    would be read again for every 64 instead of every 256, and the weights for every row of pixels, by count of bytes
    more than dz costs.
    """
    p, q = problem.output_size
    pixels, size = problem.n * p * q, problem.dtype.itemsize
    picture = p * q * problem.c_in * size
    taps = problem.r * problem.s
    stride = max(problem.geometry.stride)
    x_bytes = problem.n * problem.h * problem.w * problem.c_in * size
    z_bytes, r_bytes = pixels * problem.c_in * size, pixels * problem.c_out * size
    wide = max(x_bytes, r_bytes) // size > INT32
    tile = wgrad_tile(problem.dtype, problem.c_in, taps, problem.activations[0], device, tf32, pooled, stride, wide)
    exact = problem.dtype is torch.float32 and not tf32
    rate = 0.7 * device.lane_rate if exact else device.matrix_rate / (1 if size == 2 else 2)
    matrix = pixels * problem.c_in * problem.c_out / rate
    again = ceil(problem.c_out / tile.outputs)
    lanes = pixels * problem.c_in * (taps + 2 * problem.s) / device.lane_rate
    fused = max((x_bytes + 2 * r_bytes) / device.memory_rate, matrix + again * lanes)

    def kept(slice_n: int) -> bool:
        return slice_n * picture <= device.l2_bytes

    def apart(slice_n: int, x_passes: int = 1) -> float:
        """The depthwise kernel, which moves x, or x and dx, and the product with du and r; z or dz between them."""
        z = z_bytes / (device.memory_rate * (2 if kept(slice_n) else 1))
        moved = x_passes * x_bytes / device.memory_rate + z
        return max(moved, x_passes * lanes) + max(2 * r_bytes / device.memory_rate + z, matrix)

    def place(slice_n: int) -> str:
        return "L2" if kept(slice_n) else "memory, as the host would be late with less,"

    in_l2 = _in_l2(problem, picture, device)
    wgrad_slice = slice_of(problem.n, in_l2, apart(in_l2), device)
    dgrad_slice = slice_of(problem.n, in_l2, apart(in_l2, 2), device)
    on_chip = fused <= apart(wgrad_slice)
    if on_chip:
        why = f"dw_pw: z made on chip, {again} time{'s' if again > 1 else ''}"
    else:
        tile = wgrad_tile(problem.dtype, problem.c_in, 0, IDENTITY, device, tf32, pooled)
        where = f"z of {wgrad_slice} pictures in {place(wgrad_slice)}"
        why = f"dw_pw: {where} as making it {again} times on chip would take longer"
    depthwise = chain_backward_tile(problem, device)
    if depthwise is None:
        why += "; dx: dz in memory for the general kernels"
        dgrad_slice = max(problem.n, 1)
    else:
        why += f"; dx: dz of {dgrad_slice} pictures in {place(dgrad_slice)} between a product and one depthwise pass"
    product = gradient_tile(problem.dtype, problem.c_in, device, tf32, pooled)
    return BackwardPlan(on_chip, wgrad_slice, tile, dgrad_slice, product, depthwise, why)


def chain_backward_tile(problem: Problem, device: Device) -> Optional[DepthwiseTile]:
    """The one-pass backward's tile where a shortcut and the sums of dx want registers beside the sums of dw_dw."""
    # What activations cost is in the rule below.
    tile = backward_tile(problem._replace(activations=(IDENTITY,) * 3), device)
    if tile is None:
        return None
    return replace(tile, side=tile.side if problem.activations[0] in COMPARISONS else 1, unroll=1)
