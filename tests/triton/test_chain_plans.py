"""The triton backend's choices for the training chain's backward: pure functions, with neither Triton nor a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.triton.ahead_of_time import DEVICES, Job, launch_of
from tests.triton.chain_launches import LAUNCHES, image
from tests.triton.test_plans import H200, LAYERS, problem
from xsep.backends import triton_chain_launch as chain
from xsep.backends import triton_chain_plans as plans
from xsep.backends.chain import TILE
from xsep.backends.chain_triton import TRITON_CHAIN
from xsep.backends.triton_plans import CLOCKS_A_US, HOST_LAUNCH_US, even_slices, slice_of
from xsep.problem import RELU, SILU, Geometry

POINT = Geometry(1, 1, 0, 0, 0, 0, 1, 1)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda v: "-".join(map(str, v)))
def test_z_is_made_on_chip_where_it_is_made_at_most_twice(layer: tuple[int, int, int]) -> None:
    plan = plans.backward_plan(problem(*layer, activations=(RELU, 0, 0)), H200, False)
    assert plan.wgrad_fused == (layer[1] <= 256)
    assert ("z made on chip" in plan.reason) == plan.wgrad_fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("card", DEVICES)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda v: "-".join(map(str, v)))
def test_what_is_kept_between_two_kernels_stays_in_l2_where_the_host_keeps_up(
    layer: tuple[int, int, int], card: str, dtype: torch.dtype
) -> None:
    c_in, c_out, size = layer
    n, device = 256, DEVICES[card]
    plan = plans.backward_plan(problem(*layer, n=n, dtype=dtype), device, False)
    slices = even_slices(n, plan.dgrad_slice)
    pixels = size * size * (slices[0].stop - slices[0].start)
    kept = plan.dgrad_slice * size * size * c_in * dtype.itemsize <= device.l2_bytes
    assert f"dz of {plan.dgrad_slice} pictures in {'L2' if kept else 'memory'}" in plan.reason
    programs = -(-pixels // 128) * -(-c_in // 128)
    assert programs >= device.multiprocessors, "a slice leaves multiprocessors idle"
    # du, r, x and dx once through memory, dz twice, and the product: at least this long, in microseconds.
    exact = dtype is torch.float32
    rate = 0.7 * device.lane_rate if exact else device.matrix_rate
    moved = pixels * (2 * c_in + 2 * c_out) * dtype.itemsize / device.memory_rate
    most = moved + pixels * c_in * (2 * dtype.itemsize / device.memory_rate + 30 / device.lane_rate + c_out / rate)
    took = most / device.multiprocessors / CLOCKS_A_US
    assert len(slices) == 1 or took >= 2 * HOST_LAUNCH_US, f"a slice of {took:.0f} us, which the host is late for"
    if not kept:
        halved = moved / 2 / device.multiprocessors / CLOCKS_A_US
        assert halved < 2 * HOST_LAUNCH_US, "more slices would do, and less memory"


@pytest.mark.parametrize("n, in_l2", [(64, 5), (64, 64), (3, 1), (1, 1), (0, 1)])
def test_slices_are_as_many_as_the_host_keeps_up_with(n: int, in_l2: int) -> None:
    host = 2 * HOST_LAUNCH_US * CLOCKS_A_US * H200.multiprocessors
    for times in (0.0, 0.5, 1.0, 4.5, 1000.0):
        count = len(even_slices(n, slice_of(n, in_l2, times * host, H200)))
        assert count <= max(times, n > 0) and count <= -(-n // in_l2)
    assert slice_of(n, in_l2, 1e9 * host, H200) <= in_l2
    assert slice_of(n, in_l2, 0.0, H200) == max(n, 1)


def test_slices_of_thin_layers_are_few() -> None:
    """128 channels at 147, batch 64, bfloat16: L2 would have 13 slices, whose 26 launches last the host 1.3 ms."""
    layer = problem(128, 128, 147)
    assert -(-layer.n // (H200.l2_bytes // (2 * 147 * 147 * 128 * 2))) == 13
    assert len(even_slices(layer.n, plans.backward_plan(layer, H200, False).dgrad_slice)) == 4


def test_a_stride_beside_a_dilation_goes_to_the_general_kernels() -> None:
    odd = problem(8, 8, 32, geometry=Geometry(2, 2, 2, 2, 2, 2, 2, 2))
    plan = plans.backward_plan(odd, H200, False)
    assert plan.depthwise_tile is None and "general kernels" in plan.reason
    assert plans.backward_plan(problem(8, 8, 32), H200, False).depthwise_tile is not None


@pytest.mark.parametrize("n, step", [(64, 57), (3, 2), (1, 1), (256, 15), (5, 9)])
def test_slices_are_alike(n: int, step: int) -> None:
    parts = even_slices(n, step)
    sizes = [part.stop - part.start for part in parts]
    assert sum(sizes) == n and max(sizes) <= step and max(sizes) - min(sizes) <= 1
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]


def test_the_backend_says_how_it_would_run_a_layer() -> None:
    reason = TRITON_CHAIN.backward_plan(problem(16, 16, 8, device="cpu", dtype=torch.float32)).reason
    assert "z made on chip" in reason and "one depthwise pass" in reason


def test_an_empty_batch_has_a_plan() -> None:
    assert plans.backward_plan(problem(8, 8, 32, n=0), H200, False).dgrad_slice == 1


@pytest.mark.parametrize("size, n", [(147, 64), (19, 64), (7, 1), (1, 1)])
@pytest.mark.parametrize("blocks", [1, 6, 300])
def test_every_pixel_tile_belongs_to_one_group(size: int, n: int, blocks: int) -> None:
    tile = plans.WGRAD
    tiles = chain.wgrad_tiles(image(n, 8, size, size, torch.bfloat16), POINT, tile)
    assert tiles * tile.rows * tile.cols >= n * size * size
    groups = plans.wgrad_groups(tiles, blocks, H200)
    share = -(-tiles // groups)
    assert groups * share >= tiles > (groups - 1) * share
    assert groups == 1 or groups * blocks <= plans.WGRAD_WAVES * H200.multiprocessors


def test_what_wants_registers_gets_narrower_tiles() -> None:
    def tile(c_in: int = 128, taps: int = 9, code: int = RELU, device: str = "sm_90", pooled: bool = False) -> object:
        return plans.wgrad_tile(torch.bfloat16, c_in, taps, code, DEVICES[device], False, pooled)

    assert tile() == plans.WGRAD
    for crowded in (tile(taps=25), tile(code=SILU), tile(pooled=True), tile(c_in=64), tile(c_in=131)):
        assert crowded == plans.WGRAD_NARROW
    assert tile(device="gfx942") == plans.WGRAD_HIP and tile(taps=49) == plans.WGRAD_LARGE_FILTER
    half = (torch.float16, 128, 9, RELU, DEVICES["sm_90"], False)
    assert plans.wgrad_tile(*half) == plans.WGRAD and plans.wgrad_tile(*half, wide=True) == plans.WGRAD_NARROW


@pytest.mark.parametrize("target", DEVICES)
@pytest.mark.parametrize("tf32", [False, True], ids=["ieee", "tf32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_of_the_statistics_have_the_pixels_that_traced_code_expects(
    target: str, tf32: bool, dtype: torch.dtype
) -> None:
    for activation in (RELU, SILU):
        assert plans.product_tile(dtype, activation, DEVICES[target], tf32).pixels == TILE


@pytest.mark.parametrize("kernel", [name for name in LAUNCHES if name not in ("chain_gap", "chain_statistics")])
def test_offsets_widen_before_they_overflow(kernel: str) -> None:
    small, large = (launch_of(Job(kernel, "sm_90", "bf16", n=n)).constants for n in (2, 1024))
    if "WIDE" in small:
        assert not small["WIDE"] and large["WIDE"]
    else:
        assert kernel in ("chain_gap_sums", "chain_finalize_backward", "chain_sum_groups")


@pytest.mark.parametrize("kernel", LAUNCHES)
def test_accesses_are_as_wide_as_the_channels_allow(kernel: str) -> None:
    for channels, expected in ((728, 8), (12, 4), (13, 1)):
        constants = launch_of(Job(kernel, "sm_90", "bf16", channels=channels, outputs=channels)).constants
        assert constants.get("VEC", expected) == expected and constants.get("OUT_VEC", expected) == expected
