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
#: Microseconds that the host needs for one launch, whose arguments are made and which Triton enqueues in Python: 48 to
#: 64 measured on an AMD EPYC (Triton 3.6, one thread), the driver's few not among them. A CUDA graph needs none.
HOST_LAUNCH_US = 50.0
#: Clocks of a card in one: 1,410 of an A100 to 2,520 of an RTX 4090.
CLOCKS_A_US = 1800


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


def row_tiles(rows: int, step: int, tile_rows: int) -> int:
    """Tiles that cover ``rows`` rows when a tile has ``tile_rows`` of one of ``step`` interleaved phases."""
    return step * ceil(rows / (step * tile_rows))


def groups_of(extent: int, pad: int, stride: int) -> int:
    """Groups of ``stride`` rows or columns of x that begin where a filter does."""
    return ceil((extent + pad % stride) / stride)


@dataclass(frozen=True)
class DepthwiseTile:
    """``rows`` rows of ``cols`` groups of ``side`` columns, ``channels`` channels, by a program of ``warps`` warps."""

    rows: int
    cols: int
    channels: int
    warps: int
    side: int = 1
    unroll: int = 1  # steps of the walk down the rows


@dataclass(frozen=True)
class SeparableTile:
    """``rows`` rows of ``cols`` groups of ``side`` columns, ``outputs`` channels; ``depth`` channels of z at a time."""

    rows: int
    cols: int
    outputs: int
    depth: int
    warps: int
    stages: int
    side: int = 1


@dataclass(frozen=True)
class SeparablePlan:
    """``fused``: one kernel. Else the depthwise kernel, then a product, ``slice_n`` pictures at a time."""

    fused: bool
    slice_n: int
    tile: SeparableTile


#: exp, tanh and erf keep so many values at once that there is room for half as many columns beside them.
COSTLY = (SILU, GELU, GELU_TANH)
#: Activations that want no registers of their own.
COMPARISONS = (IDENTITY, RELU, RELU6, LEAKY_RELU)


class Lane(NamedTuple):
    """What one lane of a depthwise kernel has: so many neighbouring channels of so many columns; rows in one turn."""

    channels: int
    side: int
    unroll: int


#: (R * S up to, lanes of 16-bit and of 32-bit types): what the filter's taps, and in the backward their sums, leave
#: registers for.
FPROP_LANES = (
    (9, Lane(8, 2, 2), Lane(4, 2, 2)),
    (25, Lane(2, 4, 1), Lane(2, 4, 1)),
    (49, Lane(2, 2, 2), Lane(2, 2, 2)),
)
BACKWARD_LANES = (
    (9, Lane(4, 2, 2), Lane(4, 2, 1)),
    (25, Lane(2, 2, 1), Lane(2, 2, 1)),
    (49, Lane(1, 2, 1), Lane(1, 2, 1)),
)
#: Depthwise programs that a multiprocessor has registers for, and how many rows it takes each until it is under way.
RESIDENT = 2
START = 4

#: Fused tiles for 16-bit types and TF32, by the largest C_out. All of C_out up to 256 is held by one program; filters
#: of more than FUSED_TAPS, and strides in float32, need the registers of half of it.
FUSED_TILES = {
    64: SeparableTile(4, 32, 64, 32, 8, 1),
    128: SeparableTile(4, 32, 128, 32, 8, 1),
    256: SeparableTile(4, 32, 256, 32, 8, 1),
}
FUSED_TAPS = 9
#: Two columns a lane, where neither taps nor strides nor activations want the registers: an element of x is loaded,
#: converted and given the prologue 3 times for every z instead of 4.5.
FUSED_SIDE = {64: SeparableTile(4, 16, 64, 64, 8, 1, 2), 128: SeparableTile(4, 16, 128, 64, 8, 1, 2)}
#: AMD's 64 KB of local memory; a wavefront has 64 lanes, so 4 are 256 threads.
FUSED_TILES_HIP = {
    64: SeparableTile(2, 64, 64, 32, 4, 1),
    128: SeparableTile(2, 64, 128, 32, 4, 1),
    256: SeparableTile(2, 64, 256, 32, 8, 1),
}
#: Exact float32 products run on the plain lanes, from registers.
FUSED_IEEE = SeparableTile(2, 32, 64, 16, 4, 1)
#: For maps or batches so small that the tiles above leave multiprocessors idle.
FUSED_SMALL = SeparableTile(2, 16, 64, 32, 4, 1)

#: The pointwise product with prologue, epilogue or statistics, where torch.mm would need further passes.
POINTWISE = SeparableTile(1, 128, 128, 64, 8, 3)
POINTWISE_TF32 = SeparableTile(1, 128, 128, 32, 8, 3)
POINTWISE_HIP = SeparableTile(1, 128, 128, 32, 4, 2)
POINTWISE_IEEE = SeparableTile(1, 64, 64, 16, 4, 2)


def unrolled(problem: Problem) -> bool:
    """Whether filter and stride are small enough for the kernels that know them at compile time."""
    g = problem.geometry
    return max(problem.r, problem.s) <= UNROLLED_FILTER and max(g.stride) <= UNROLLED_STRIDE


def _lane(lanes: tuple[tuple[int, Lane, Lane], ...], problem: Problem) -> Lane:
    _, narrow, wide = next(entry for entry in lanes if problem.r * problem.s <= entry[0])
    return wide if problem.dtype.itemsize == 4 else narrow


def _strips(rows: int, phases: int) -> list[int]:
    """Every height that cuts the rows of each of so many interleaved phases into strips of about one size."""
    longest = max(ceil(rows / phases), 1)
    return sorted({ceil(longest / count) for count in range(1, longest + 1)}, reverse=True)


def _tile(channels: int, lane: Lane, device: Device) -> DepthwiseTile:
    """128 threads on every card; a power of two of channels, at most 64."""
    block = min(64, 1 << max(channels - 1, 0).bit_length())
    return DepthwiseTile(1, max(128 * lane.channels // block, 1), block, 128 // device.warp, lane.side, lane.unroll)


def waves(programs: int, device: Device) -> int:
    return ceil(programs / (RESIDENT * device.multiprocessors))


@lru_cache(maxsize=4096)
def fprop_tile(problem: Problem, device: Device) -> Optional[DepthwiseTile]:
    """The tile of the unrolled forward kernel, or None where the general one has to run."""
    if not unrolled(problem):
        return None
    lane = _lane(FPROP_LANES, problem)
    if any(code in COSTLY for code in problem.activations):
        lane = lane._replace(side=lane.side // 2, unroll=1)
    if max(problem.geometry.stride) > 1:
        lane = lane._replace(unroll=1)
    tile = _tile(problem.c_mid, lane, device)
    p, q = problem.output_size
    g = problem.geometry
    down, across = step_of(g.stride_h, g.dilation_h), step_of(g.stride_w, g.dilation_w)
    beside = ceil(problem.n * row_tiles(q, across.row, tile.side) / tile.cols) * ceil(problem.c_mid / tile.channels)

    def cost(rows: int) -> int:
        programs = beside * row_tiles(p, down.row, rows)
        return waves(programs, device) * (rows + ceil(problem.r / down.tap) - 1 + START)

    return replace(tile, rows=min(_strips(p, down.row), key=cost))


@lru_cache(maxsize=4096)
def backward_tile(problem: Problem, device: Device) -> Optional[DepthwiseTile]:
    """The tile of the one-pass backward kernel, or None where the general ones have to run."""
    g = problem.geometry
    dilated = (g.stride_h > 1 and g.dilation_h > 1) or (g.stride_w > 1 and g.dilation_w > 1)
    if not unrolled(problem) or problem.multiplier != 1 or dilated:
        return None
    lane = _lane(BACKWARD_LANES, problem)
    if max(g.stride) > 1 or problem.activations[0] not in COMPARISONS:
        lane = lane._replace(side=1, unroll=1 if max(g.stride) > 1 and problem.r * problem.s <= 9 else 2)
    if max(g.stride) > 1 and problem.dtype.itemsize == 4:
        lane = lane._replace(channels=max(lane.channels // 2, 1))
    tile = _tile(problem.c_in, lane, device)
    rows_of_x, columns = groups_of(problem.h, g.pad_top, g.stride_h), groups_of(problem.w, g.pad_left, g.stride_w)
    beside = ceil(problem.n * row_tiles(columns, g.dilation_w, tile.side) / tile.cols)
    blocks = ceil(problem.c_in / tile.channels)

    def cost(rows: int) -> int:
        tiles = beside * row_tiles(rows_of_x, g.dilation_h, rows)
        share = share_of(tiles, blocks, device)
        return waves(ceil(tiles / share) * blocks, device) * share * (rows + (problem.r - 1) // g.stride_h + START)

    return replace(tile, rows=min(_strips(rows_of_x, g.dilation_h), key=cost))


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
    large, strided = problem.r * problem.s > FUSED_TAPS, max(problem.geometry.stride) > 1
    wide = problem.dtype is torch.float32
    roomy = not (large or strided or wide) and set(problem.activations) <= set(COMPARISONS)
    # Where lanes have whole vectors of channels; else every channel is a load.
    if roomy and device.kind != "hip" and problem.multiplier == 1 and problem.c_mid % 8 == 0 and problem.c_out <= 128:
        tiles = FUSED_SIDE
    wanted = min(problem.c_out, 128 if large or (strided and wide) else 256)
    return next(tile for size, tile in tiles.items() if wanted <= size)


def pointwise_tile(dtype: torch.dtype, device: Device, tf32: bool) -> SeparableTile:
    if dtype is torch.float32 and not tf32:
        return POINTWISE_IEEE
    if dtype is torch.float32:
        return POINTWISE_TF32
    return POINTWISE_HIP if device.kind == "hip" else POINTWISE


def chain_tile(problem: Problem, device: Device, tf32: bool, addend: bool = False) -> SeparableTile:
    """The fused tile of the training chain: of the same pixels for every batch size, with and without an addend.

    So traced code knows the partials.
    """
    tile = _matrix_tile(problem._replace(n=2**20), device, tf32)
    if addend and tile.side > 1:
        return replace(tile, depth=16)
    if not tf32 or device.kind == "hip" or problem.dtype is not torch.float32:
        return tile
    # The statistics and what the addend wants spilled up to 148 bytes beside TF32's wider operands.
    if tile.outputs > 128:
        return FUSED_TILES[128]
    return replace(tile, depth=16) if problem.r * problem.s > 25 and tile.outputs == 64 else tile


def slice_of(n: int, in_l2: int, clocks: float, device: Device) -> int:
    """How many of n pictures two kernels, of which one reads what the other wrote, work on at a time.

    ``in_l2``: so many stay there. ``clocks``: of one multiprocessor, that all n take the two kernels if they do.

    No slice is done by the card before the host has enqueued two kernels, though it be larger than L2. Of a layer with
    as many channels out as in, a third to a half of what the two kernels move is what L2 would hold; twice as fast from
    there, it saves a sixth to a quarter. A host that is late costs more: slices of five pictures of 128 channels at 147
    take an H200 a third of the host's time. Nor does a CUDA graph, which has no host, gain by those: two launches cost
    6 us of the card, and L2 saves 7. Slices larger than L2 only keep small what is in memory between the two kernels.
    """
    host = 2 * HOST_LAUNCH_US * CLOCKS_A_US * device.multiprocessors
    count = min(ceil(n / in_l2), int(clocks / host))
    return max(ceil(n / max(count, 1)), 1)


def even_slices(n: int, step: int) -> list[slice]:
    """At most ``step`` pictures each, and none more than one picture smaller than another."""
    count = -(-n // step)
    return [slice(i * n // count, (i + 1) * n // count) for i in range(count)]


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
    in_l2 = max(1, min(problem.n, device.l2_bytes // (2 * z_picture)))
    x_bytes = problem.n * problem.h * problem.w * problem.c_in * size
    y_bytes, z_bytes = pixels * problem.c_out * size, pixels * problem.c_mid * size
    half = 1 if size == 2 else 2
    matrix = pixels * problem.c_mid * problem.c_out / (device.matrix_rate / half)
    if problem.dtype is torch.float32 and not tf32:
        matrix = pixels * problem.c_mid * problem.c_out / (0.7 * device.lane_rate)
    lanes = pixels * problem.c_mid * (problem.r * problem.s + 2 * problem.s) / device.lane_rate
    again = ceil(problem.c_out / tile.outputs)
    fused = max((x_bytes + y_bytes) / device.memory_rate, matrix + again * lanes)

    def staged(slice_n: int) -> float:
        z_rate = device.memory_rate * (2 if slice_n * z_picture <= device.l2_bytes else 1)
        depthwise = max(x_bytes / device.memory_rate + z_bytes / z_rate, lanes)
        return depthwise + max(y_bytes / device.memory_rate + z_bytes / z_rate, matrix)

    slice_n = slice_of(problem.n, in_l2, staged(in_l2), device)
    return SeparablePlan(unrolled(problem) and fused <= staged(slice_n), slice_n, tile)
