"""Tiles of the Triton kernels, and fused or staged: pure functions of the problem and the device.

Nothing here imports Triton. The tables name every shipped configuration, so that the tests can compile each ahead of
time; the choices among them never depend on a measurement made at run time, so results never differ between runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache
from math import ceil, gcd
from typing import NamedTuple, Optional

import torch

from ..problem import GELU, GELU_TANH, IDENTITY, LEAKY_RELU, RELU, RELU6, SILU, Problem

#: Filters and strides up to these are unrolled; anything larger runs the general kernels.
UNROLLED_FILTER = 7
UNROLLED_STRIDE = 2
#: Offsets below this leave room for a tile's overhang.
INT32 = 2**31 - 2**24


@dataclass(frozen=True)
class Device:
    """What a choice may look at. Rates are per multiprocessor and clock, and only their ratios matter."""

    kind: str  # "cuda", "hip", or "cpu" for the interpreter
    multiprocessors: int
    warp: int  # lanes
    l2_bytes: int
    memory_rate: float  # bytes from memory
    matrix_rate: float  # 16-bit multiply-adds that a good matrix product reaches
    lane_rate: int = 128  # float32 multiply-adds


#: Memory, matrix and lane rates of NVIDIA cards by compute capability, from the vendor's data sheets and white papers
#: of A100 (1,555 GB/s, 312 TFLOP/s, 108 multiprocessors at 1.41 GHz), RTX 3090 (936, 71, 82, 1.70), RTX 4090 (1,008,
#: 165, 128, 2.52), H200 (4,800, 989, 132, 1.83) and RTX PRO / GB202 class, less the fifth that copies and matrix
#: products leave on the table; and of AMD's MI300X (5,300 GB/s, 1,307 TFLOP/s, 304 at 2.1 GHz).
CUDA_RATES = {
    (8, 0): (8.2, 820.0, 64), (8, 6): (5.4, 204.0, 128), (8, 9): (2.5, 205.0, 128), (9, 0): (16.0, 1640.0, 128),
    (10, 0): (23.0, 3280.0, 128), (12, 0): (3.4, 410.0, 128),
}  # fmt: skip
HIP_RATES = (6.6, 820.0)
INTERPRETER = Device("cpu", 4, 32, 1 << 20, 16.0, 1640.0)


def cuda_rates(capability: tuple[int, int]) -> tuple[float, float, int]:
    """Those of the nearest capability that is not higher."""
    return CUDA_RATES[max((c for c in CUDA_RATES if c <= capability), default=(8, 0))]


@cache
def device_of(kind: str, index: int) -> Device:
    """The properties of a device of PyTorch's; the interpreter's for "cpu"."""
    if kind == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(index)
    l2_bytes = int(getattr(properties, "L2_cache_size", 0)) or 4 << 20
    if torch.version.hip is not None:
        return Device("hip", properties.multi_processor_count, 64, l2_bytes, *HIP_RATES)
    rates = cuda_rates((properties.major, properties.minor))
    return Device("cuda", properties.multi_processor_count, 32, l2_bytes, *rates)


class Step(NamedTuple):
    """How the rows of one tile lie: ROW_STEP apart in y, TAP_STEP rows of taps apart in x."""

    row: int
    tap: int


def step_of(stride: int, dilation: int) -> Step:
    common = gcd(stride, dilation)
    return Step(dilation // common, stride // common)


@dataclass(frozen=True)
class DepthwiseTile:
    """rows x cols pixels of ``channels`` channels by one program of ``warps`` warps."""

    rows: int
    cols: int
    channels: int
    warps: int


@dataclass(frozen=True)
class SeparableTile:
    """rows x cols pixels of ``outputs`` channels by one program, ``depth`` channels of z at a time."""

    rows: int
    cols: int
    outputs: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class SeparablePlan:
    """``fused``: one kernel. Else the depthwise kernel, then a product, ``slice_n`` pictures at a time."""

    fused: bool
    slice_n: int
    tile: SeparableTile


#: Rows of one depthwise forward program. More rows read fewer halo rows; the accumulators of 8, and 12 rows of x in
#: flight, are what the registers hold.
FPROP_ROWS = (8, 6, 5, 4, 2, 1)
FPROP_LOADED = 12
#: exp, tanh and erf keep so many values at once that 8 sums beside them spilled (up to 96 bytes on sm_80 and sm_90); in
#: float32, where a thread has half as many channels, erf alone.
FPROP_LOADED_COSTLY = 9
COSTLY = (SILU, GELU, GELU_TANH)
COSTLY_FP32 = (GELU,)
#: Activations that want no registers of their own.
COMPARISONS = (IDENTITY, RELU, RELU6, LEAKY_RELU)

#: (R * S up to, elements a thread holds of 16-bit and of 32-bit types, rows at stride 1): what leaves registers for
#: the sums. At stride 2 it is 2 rows.
BACKWARD_STEPS = ((9, 8, 4, 2), (25, 4, 2, 2), (49, 1, 1, 4))

#: Fused tiles for 16-bit types and TF32, by the largest C_out. All of C_out up to 256 is held by one program; filters
#: of more than FUSED_TAPS need the registers of half of it.
FUSED_TILES = {
    64: SeparableTile(2, 64, 64, 32, 8, 1),
    128: SeparableTile(2, 64, 128, 32, 8, 1),
    256: SeparableTile(2, 64, 256, 32, 8, 1),
}
FUSED_TAPS = 9
#: AMD's 64 KB of local memory; a wavefront has 64 lanes, so 4 are 256 threads.
FUSED_TILES_HIP = {
    64: SeparableTile(2, 64, 64, 32, 4, 1),
    128: SeparableTile(2, 64, 128, 32, 4, 1),
    256: SeparableTile(2, 64, 256, 32, 8, 1),
}
#: Exact float32 products run on the plain lanes, from registers.
FUSED_IEEE = SeparableTile(2, 32, 64, 16, 4, 1)
#: For maps or batches so small that the tiles above leave multiprocessors idle.
FUSED_SMALL = SeparableTile(1, 16, 64, 32, 4, 1)

#: The pointwise product with prologue, epilogue or statistics, where torch.mm would need further passes.
POINTWISE = SeparableTile(1, 128, 128, 64, 8, 3)
POINTWISE_TF32 = SeparableTile(1, 128, 128, 32, 8, 3)
POINTWISE_HIP = SeparableTile(1, 128, 128, 32, 4, 2)
POINTWISE_IEEE = SeparableTile(1, 64, 64, 16, 4, 2)


def unrolled(problem: Problem) -> bool:
    """Whether filter and stride are small enough for the kernels that know them at compile time."""
    g = problem.geometry
    return max(problem.r, problem.s) <= UNROLLED_FILTER and max(g.stride) <= UNROLLED_STRIDE


def _channels_and_cols(channels: int, elements: int, threads: int) -> tuple[int, int]:
    """Channels of a tile (a power of two, at most 64) and the columns that fill the threads."""
    block = min(64, 1 << max(channels - 1, 0).bit_length())
    return block, max(threads * elements // block, 1)


def _threads(device: Device) -> tuple[int, int]:
    """(warps, threads) of a depthwise program: 128 threads on every card."""
    return 128 // device.warp, 128


def fprop_rows(r: int, tap: int, itemsize: int, most: int = FPROP_LOADED) -> list[int]:
    """Those of FPROP_ROWS that a program can have; 2 of 7 float32 taps spilled, 8 bytes, where 1 and 4 do not."""
    fitting = [rows for rows in FPROP_ROWS if (rows - 1) * tap + r <= most]
    return [rows for rows in fitting if (rows, r, tap, itemsize) != (2, 7, 1, 4)]


def fprop_tile(problem: Problem, device: Device) -> Optional[DepthwiseTile]:
    """The tile of the unrolled forward kernel, or None where the general one has to run."""
    if not unrolled(problem):
        return None
    warps, threads = _threads(device)
    elements = 16 // problem.dtype.itemsize
    p, q = problem.output_size
    channels, cols = _channels_and_cols(problem.c_mid, elements, threads)
    step = step_of(problem.geometry.stride_h, problem.geometry.dilation_h)
    around = ceil(problem.n * q / cols) * ceil(problem.c_mid / channels)

    def cost(rows: int) -> tuple[float, int]:
        per_phase = ceil(ceil(p / step.row) / rows)
        made = per_phase * rows * step.row  # rows past the map are computed and thrown away
        loaded = per_phase * step.row * ((rows - 1) * step.tap + problem.r)
        waves = ceil(around * per_phase * step.row / (4 * device.multiprocessors))
        idle = waves * 4 * device.multiprocessors / (around * per_phase * step.row)
        return (made + 0.5 * loaded / step.tap) * idle, -rows

    costly = COSTLY if problem.dtype.itemsize == 2 else COSTLY_FP32
    most = FPROP_LOADED_COSTLY if any(code in costly for code in problem.activations) else FPROP_LOADED
    fitting = fprop_rows(problem.r, step.tap, problem.dtype.itemsize, most)
    return DepthwiseTile(min(fitting, key=cost), cols, channels, warps)


def backward_tile(problem: Problem, device: Device) -> Optional[DepthwiseTile]:
    """The tile of the one-pass backward kernel, or None where the general ones have to run."""
    g = problem.geometry
    if not unrolled(problem) or problem.multiplier != 1 or (g.stride_h > 1 and g.dilation_h > 1):
        return None
    warps, threads = _threads(device)
    _, narrow, wide, rows = next(step for step in BACKWARD_STEPS if problem.r * problem.s <= step[0])
    elements = wide if problem.dtype.itemsize == 4 else narrow
    channels, cols = _channels_and_cols(problem.c_in, elements, threads)
    strided = max(g.stride) > 1
    tile = DepthwiseTile(2 if strided else rows, cols, channels, warps)
    if problem.activations[0] in COMPARISONS or device.kind == "hip":
        return tile
    # An activation's slope beside as many sums spilled up to 48 bytes.
    if problem.r * problem.s > 25:
        return replace(tile, rows=min(tile.rows, 2))
    return replace(tile, cols=max(cols // 2, 1)) if strided and problem.dtype.itemsize == 2 else tile


def share_of(tiles: int, blocks: int, device: Device) -> int:
    """Tiles one backward program has: enough programs to balance 8 waves, few enough that their sums are small."""
    return max(1, ceil(tiles * blocks / (8 * device.multiprocessors)))


def _matrix_tile(problem: Problem, device: Device, tf32: bool) -> SeparableTile:
    if problem.dtype is torch.float32 and not tf32:
        return FUSED_IEEE
    pixels = problem.n * problem.output_size[0] * problem.output_size[1]
    if ceil(pixels / 128) * ceil(problem.c_out / 256) < device.multiprocessors // 2:
        return FUSED_SMALL
    tiles = FUSED_TILES_HIP if device.kind == "hip" else FUSED_TILES
    widest = 256 if problem.r * problem.s <= FUSED_TAPS else 128
    return next((tile for size, tile in tiles.items() if min(problem.c_out, widest) <= size), tiles[widest])


def pointwise_tile(dtype: torch.dtype, device: Device, tf32: bool) -> SeparableTile:
    if dtype is torch.float32 and not tf32:
        return POINTWISE_IEEE
    if dtype is torch.float32:
        return POINTWISE_TF32
    return POINTWISE_HIP if device.kind == "hip" else POINTWISE


def chain_tile(problem: Problem, device: Device, tf32: bool) -> SeparableTile:
    """The fused tile of the training chain: the same for every batch size, so that traced code knows the partials."""
    tile = _matrix_tile(problem._replace(n=2**20), device, tf32)
    if not tf32 or device.kind == "hip" or problem.dtype is not torch.float32:
        return tile
    # The statistics and what the addend wants spilled up to 148 bytes beside TF32's wider operands.
    if tile.outputs > 128:
        return FUSED_TILES[128]
    return replace(tile, depth=16) if problem.r * problem.s > 25 and tile.outputs == 64 else tile


@lru_cache(maxsize=4096)
def separable_plan(problem: Problem, device: Device, tf32: bool) -> SeparablePlan:
    """Fused or staged, by the clocks of one multiprocessor that each would take.

    Fused: the larger of memory and of matrix units plus the lanes that make z, once for each block of output channels.
    Staged: the depthwise pass at memory speed, then the product, which reads z from L2 where a slice of it fits.
    """
    tile = _matrix_tile(problem, device, tf32)
    p, q = problem.output_size
    pixels, size = problem.n * p * q, problem.dtype.itemsize
    z_picture = max(p * q * problem.c_mid * size, 1)
    slice_n = max(1, min(problem.n, device.l2_bytes // (2 * z_picture)))
    if not unrolled(problem):
        return SeparablePlan(False, slice_n, tile)
    x_bytes = problem.n * problem.h * problem.w * problem.c_in * size
    y_bytes, z_bytes = pixels * problem.c_out * size, pixels * problem.c_mid * size
    half = 1 if size == 2 else 2
    matrix = pixels * problem.c_mid * problem.c_out / (device.matrix_rate / half)
    if problem.dtype is torch.float32 and not tf32:
        matrix = pixels * problem.c_mid * problem.c_out / (0.7 * device.lane_rate)
    lanes = pixels * problem.c_mid * (problem.r * problem.s + 2 * problem.s) / device.lane_rate
    again = ceil(problem.c_out / tile.outputs)
    fused = max((x_bytes + y_bytes) / device.memory_rate, matrix + again * lanes)
    z_rate = device.memory_rate * (2 if slice_n * z_picture <= device.l2_bytes else 1)
    depthwise = max(x_bytes / device.memory_rate + z_bytes / z_rate, lanes)
    staged = depthwise + max(y_bytes / device.memory_rate + z_bytes / z_rate, matrix)
    return SeparablePlan(fused <= staged, slice_n, tile)
