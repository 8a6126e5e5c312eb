"""How the CPU planner cuts work: everything once, a share for every thread, tiles that fit the caches."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from xsep import extension

SAME = (1, 1, 1, 1, 1, 1, 1, 1)


def _plan(
    x: tuple[int, ...], c_out: int, threads: int, z_bytes: int = 4, l2_bytes: int = 1 << 20, packed: bool = True
) -> Any:
    module = extension.binding()
    assert module is not None, "the extension is not built"
    return module.plan_cpu_separable(
        x, (3, 3), 1, SAME, c_out=c_out, threads=threads, z_bytes=z_bytes, weights_packed=packed, l2_bytes=l2_bytes
    )


def check_tiles(plan: Any, pixels: int) -> None:
    """They follow each other from the first pixel to the last, and are of one size but for a block of the product."""
    tiles = [plan.tile(i) for i in range(plan.tiles)]
    assert tiles[0][0] == 0 and tiles[-1][1] == pixels
    assert all(before[1] == after[0] for before, after in itertools.pairwise(tiles))
    sizes = [end - begin for begin, end in tiles]
    assert min(sizes) > 0 and max(sizes) <= plan.tile_pixels and plan.tile_pixels - min(sizes[:-1] or sizes) <= 6


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("pixels", [361, 722, 2738, 43218])
def test_threads_have_as_many_pixels_each(threads: int, pixels: int) -> None:
    plan = _plan((1, 728, 1, pixels), 728, threads)
    check_tiles(plan, pixels)
    if plan.panel_groups == 1:
        share = -(-plan.tasks // threads)
        shares = [
            sum(end - begin for begin, end in map(plan.tile, range(first, min(first + share, plan.tiles))))
            for first in range(0, plan.tiles, share)
        ]
        assert len(shares) == threads and max(shares) - min(shares) <= 6 * -(-plan.tiles // threads)
        assert max(shares) <= 1.05 * pixels / threads + 12


@pytest.mark.parametrize("threads", [1, 2, 8, 32, 64])
@pytest.mark.parametrize("z_bytes", [2, 4])
def test_every_thread_gets_work_at_batch_one(threads: int, z_bytes: int) -> None:
    plan = _plan((1, 728, 19, 19), 728, threads, z_bytes)
    assert plan.tasks >= 0.9 * threads
    check_tiles(plan, 361)
    assert plan.panels == 12 and 1 <= plan.panel_groups <= plan.panels


@pytest.mark.parametrize("l2_bytes", [256 << 10, 1 << 20, 2 << 20])
@pytest.mark.parametrize("channels", [1, 3, 64, 728, 2048, 5000, 60000])
def test_the_z_tile_stays_within_its_budget(channels: int, l2_bytes: int) -> None:
    plan = _plan((4, channels, 37, 37), 100, 2, l2_bytes=l2_bytes)
    fits = plan.tile_pixels * channels * 4 <= min(512 << 10, l2_bytes // 2)
    assert fits or plan.tile_pixels == 1


@pytest.mark.parametrize(("channels", "pixels"), [(3, 1008), (8, 504), (16, 252), (32, 126), (256, 126)])
def test_tiles_of_few_channels_are_long(channels: int, pixels: int) -> None:
    plan = _plan((4, channels, 224, 224), 32, 2)
    assert 0.9 * pixels <= plan.tile_pixels <= pixels
    check_tiles(plan, 4 * 224 * 224)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_all_of_z_comes_first_where_the_weights_outweigh_it(threads: int) -> None:
    """Then no packed weights are written to memory; weights that are packed already have no such cost."""
    x = (1, 1536, 10, 10)
    plan = _plan(x, 2048, threads, packed=False)
    assert plan.z_first and plan.tasks == plan.panels == 32
    check_tiles(plan, 100)
    assert not _plan(x, 2048, threads, packed=True).z_first
    assert not _plan((2, 128, 147, 147), 128, threads, packed=False).z_first
    assert not _plan((64, 1536, 10, 10), 2048, threads, packed=False).z_first  # z is larger than a cache


def test_z_is_not_made_twice_where_tiles_are_plenty() -> None:
    assert _plan((8, 728, 37, 37), 728, 2).panel_groups == 1


@pytest.mark.parametrize("channels", [1, 3, 65, 728, 2048])
@pytest.mark.parametrize("size", [1, 3, 7, 31])
def test_backward_units_cover_the_input_once(channels: int, size: int) -> None:
    module = extension.binding()
    assert module is not None, "the extension is not built"
    plan = module.plan_cpu_backward((2, channels, 37, 41), (size, size), 1, (1, 1, *(size // 2,) * 4, 1, 1))
    assert plan.row_groups * plan.group_rows >= 2 * 37 > (plan.row_groups - 1) * plan.group_rows
    assert plan.channel_groups * plan.group_channels >= channels > (plan.channel_groups - 1) * plan.group_channels
    assert plan.units == plan.row_groups * plan.channel_groups
    assert plan.group_channels % 16 == 0


@pytest.mark.parametrize("threads", [1, 2, 3, 16, 64])
@pytest.mark.parametrize("c_out", [1, 7, 728, 5000])
@pytest.mark.parametrize("channels", [1, 65, 728])
@pytest.mark.parametrize("size", [1, 10, 147])
def test_wgrad_tasks_cover_pixels_and_columns_once(threads: int, c_out: int, channels: int, size: int) -> None:
    module = extension.binding()
    assert module is not None, "the extension is not built"
    where = ((2, channels, size, size), (3, 3), 1, SAME)
    plan = module.plan_cpu_wgrad(*where, c_out=c_out, threads=threads, z_bytes=4)
    assert plan.pixel_groups * plan.group_pixels >= 2 * size**2 > (plan.pixel_groups - 1) * plan.group_pixels
    assert plan.column_groups * plan.group_columns >= channels > (plan.column_groups - 1) * plan.group_columns
    assert plan.group_columns % 16 == 0 and plan.group_pixels % plan.tile_pixels == 0 and plan.tile_pixels % 2 == 0
    one = module.plan_cpu_wgrad(*where, c_out=c_out, threads=1, z_bytes=4)
    assert (plan.tile_pixels, plan.group_pixels) == (one.tile_pixels, one.group_pixels), "sums would depend on threads"


@pytest.mark.parametrize("threads", [1, 2, 3, 16, 64])
@pytest.mark.parametrize("pixels", [1, 5, 200, 43218])
@pytest.mark.parametrize("depth", [1, 64, 2048, 300000])
def test_dgrad_tasks_cover_pixels_once(threads: int, pixels: int, depth: int) -> None:
    module = extension.binding()
    assert module is not None, "the extension is not built"
    plan = module.plan_cpu_product(pixels, depth, 12, threads=threads, bytes=4)
    check_tiles(plan, pixels)
    assert plan.tile_pixels % 6 == 0 and 1 <= plan.panel_groups <= 12 and plan.tasks >= min(threads, 12)


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_a_few_pixels_are_multiplied_panel_by_panel(threads: int) -> None:
    """Then no packed weights are written to memory, and every thread has as many panels as another, or almost."""
    module = extension.binding()
    assert module is not None, "the extension is not built"
    few = module.plan_cpu_product(200, 2048, 24, threads=threads, bytes=4)
    assert few.z_first == (24 % threads == 0 or threads <= 6)
    if few.z_first:
        assert few.tasks == 24 and few.panel_groups == 1
        check_tiles(few, 200)
    assert not module.plan_cpu_product(43218, 128, 2, threads=threads, bytes=4).z_first  # more than a cache holds
    assert not module.plan_cpu_product(
        200, 2048, 3, threads=2, bytes=4
    ).z_first  # a thread would have two, one a single


@pytest.mark.parametrize(("channels", "in_units"), [(1, False), (16, False), (31, False), (32, True), (728, True)])
def test_nchw_of_few_channels_is_turned_round_as_a_whole_in_the_backward(channels: int, in_units: bool) -> None:
    module = extension.binding()
    assert module is not None, "the extension is not built"
    assert module.cpu_turns_in_units((2, channels, 19, 19), (3, 3), 1, SAME) == in_units


@pytest.mark.parametrize(
    ("channels", "size", "nchw", "stride", "idle"),
    [
        (1, 64, True, 1, (False, True)), (1, 64, False, 1, (True, True)), (1, 19, False, 1, (False, False)),
        (3, 224, True, 1, (False, False)), (3, 224, True, 2, (False, True)), (3, 64, True, 2, (False, False)),
        (3, 224, False, 2, (False, False)), (4, 224, True, 2, (False, False)),
    ],
)  # fmt: skip
def test_vectors_are_all_but_empty_where_channels_are_few(
    channels: int, size: int, nchw: bool, stride: int, idle: tuple[bool, bool]
) -> None:
    """In a forward by itself, and in a training step, where a large filter changes it."""
    module = extension.binding()
    assert module is not None, "the extension is not built"
    x, geometry = (2, channels, size, size), (stride, stride, 2, 2, 2, 2, 1, 1)
    for filter in (3, 5):
        found = tuple(
            module.cpu_leaves_lanes_idle(x, (filter, filter), 1, geometry, nchw=nchw, training=training)
            for training in (False, True)
        )
        assert found == ((idle[0], False) if filter == 5 else idle)


STRIDED = (2, 2, 1, 1, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("channels", "multiplier", "size", "c_out", "filter", "geometry", "forward", "training"),
    [
        (3, 1, 224, 32, 3, SAME, True, True), (3, 1, 112, 32, 3, SAME, False, False),
        (3, 1, 448, 32, 3, STRIDED, True, False), (15, 1, 224, 32, 5, SAME, True, False),
        (16, 1, 224, 32, 3, SAME, False, False), (1, 1, 224, 32, 3, SAME, False, False),
        (3, 6, 224, 32, 3, SAME, False, False), (3, 1, 224, 334, 3, SAME, True, True),
        (3, 1, 224, 335, 3, SAME, False, False),
    ],
)  # fmt: skip
def test_which_layers_of_bfloat16_leave_lanes_idle(
    channels: int, multiplier: int, size: int, c_out: int, filter: int, geometry: tuple[int, ...], forward: bool,
    training: bool,
) -> None:  # fmt: skip
    module = extension.binding()
    assert module is not None, "the extension is not built"

    def left(training: bool, nchw: bool = False) -> bool:
        return bool(
            module.cpu_pairs_leave_lanes_idle(
                (1, channels, size, size), (filter, filter), multiplier, geometry, c_out=c_out, nchw=nchw,
                training=training
            )
        )  # fmt: skip

    assert (left(False), left(True)) == (forward, training)
    assert not left(False, nchw=True) and not left(True, nchw=True)


@pytest.mark.parametrize(
    ("x", "geometry", "nchw", "forward", "training"),
    [
        ((1, 1, 14, 14), SAME, True, False, True), ((1, 1, 14, 14), STRIDED, True, False, True),
        ((1, 1, 14, 14), SAME, False, False, True), ((2, 1, 64, 64), SAME, True, False, False),
        ((1, 1, 160, 160), SAME, True, False, False), ((1, 1, 224, 224), SAME, False, False, False),
        ((1, 7, 128, 128), SAME, True, False, False), ((1, 7, 128, 128), SAME, False, False, False),
        ((1, 16, 224, 224), STRIDED, True, False, True), ((1, 17, 224, 224), STRIDED, True, False, False),
        ((1, 5, 224, 224), STRIDED, False, True, True), ((1, 5, 112, 112), STRIDED, False, False, False),
        ((1, 24, 224, 224), STRIDED, False, True, True), ((1, 25, 224, 224), STRIDED, False, False, False),
        ((1, 4, 224, 224), SAME, False, True, True), ((1, 12, 224, 224), SAME, False, False, True),
        ((1, 5, 224, 224), SAME, False, False, False), ((1, 16, 224, 224), SAME, False, False, False),
    ],
)  # fmt: skip
def test_what_a_depthwise_convolution_leaves_to_pytorch(
    x: tuple[int, ...], geometry: tuple[int, ...], nchw: bool, forward: bool, training: bool
) -> None:
    module = extension.binding()
    assert module is not None, "the extension is not built"

    def left(
        training: bool, filter: tuple[int, int] = (3, 3), threads: int = 1, multiplier: int = 1, lanes: int = 8
    ) -> bool:
        return bool(
            module.cpu_depthwise_leaves_lanes_idle(
                x, filter, multiplier, geometry, nchw=nchw, training=training, threads=threads, lanes=lanes
            )
        )

    assert (left(False), left(True)) == (forward, training)
    assert not left(True, (5, 5))
    if nchw:
        assert not left(False, threads=x[0] + 1) and not left(False, multiplier=8)
        assert left(True, lanes=16) == (training and x[1] == 1)
    if x[1] > 1 and nchw:
        assert not left(True, threads=x[0] + 1) and left(True, multiplier=8) == (x[1] < 8 or training)
    if x[1] == 1:  # a dense convolution
        assert left(False, multiplier=2) != nchw and left(True, multiplier=4)


@pytest.mark.parametrize(
    ("channels", "size", "filter", "geometry", "planes"),
    [
        (1, 7, 7, SAME, (True, True, True)), (3, 7, 3, STRIDED, (True, True, True)),
        (4, 7, 3, SAME, (False, True, True)), (8, 28, 3, SAME, (False, False, True)),
        (12, 28, 5, SAME, (False, True, True)), (16, 28, 3, SAME, (False, False, False)),
        (17, 47, 3, SAME, (False, False, False)), (17, 48, 3, SAME, (True, True, True)),
        (17, 48, 3, STRIDED, (False, False, False)), (17, 56, 5, SAME, (False, False, False)),
    ],
)  # fmt: skip
def test_which_pictures_are_taken_plane_by_plane(
    channels: int, size: int, filter: int, geometry: tuple[int, ...], planes: tuple[bool, ...]
) -> None:
    """Of vectors of 4, 8 and 16 lanes."""
    module = extension.binding()
    assert module is not None, "the extension is not built"

    def taken(lanes: int, nchw: bool, multiplier: int = 1) -> bool:
        x = (2, channels, size, size)
        return bool(module.cpu_takes_planes(x, (filter, filter), multiplier, geometry, nchw=nchw, lanes=lanes))

    assert tuple(taken(lanes, True) for lanes in (4, 8, 16)) == planes
    assert all(taken(lanes, False) == (channels == 1) for lanes in (4, 8, 16))
    assert taken(8, True, multiplier=2) and not taken(8, False, multiplier=2)


@pytest.mark.parametrize(
    ("channels", "multiplier", "size", "filter", "geometry", "planes"),
    [
        (1, 1, 7, 5, STRIDED, (True, True, True, True)), (7, 3, 19, 7, STRIDED, (True, True, True, True)),
        (8, 1, 28, 5, SAME, (True, True, True, True)), (12, 1, 28, 3, STRIDED, (False, False, True, False)),
        (16, 1, 28, 3, SAME, (False, False, False, False)), (16, 2, 28, 3, SAME, (True, True, True, False)),
        (64, 1, 48, 3, SAME, (True, True, True, False)), (64, 1, 47, 3, SAME, (False, False, False, False)),
        (64, 1, 96, 3, STRIDED, (False, False, False, False)), (65, 1, 56, 3, SAME, (False, False, False, False)),
        (900, 4, 56, 3, SAME, (False, False, False, False)),
    ],
)  # fmt: skip
def test_which_fused_forwards_go_plane_by_plane(
    channels: int, multiplier: int, size: int, filter: int, geometry: tuple[int, ...], planes: tuple[bool, ...]
) -> None:
    """With vectors of 4, 8 and 16 lanes, and where bfloat16 could be multiplied in pairs."""
    module = extension.binding()
    assert module is not None, "the extension is not built"

    def taken(lanes: int, pairs: bool = False, nchw: bool = True, threads: int = 2) -> bool:
        x = (2, channels, size, size)
        return bool(
            module.cpu_separates_planes(
                x, (filter, filter), multiplier, geometry, nchw=nchw, pairs=pairs, threads=threads, lanes=lanes,
                l2_bytes=2**20,
            )
        )  # fmt: skip

    assert (taken(4), taken(8), taken(16), taken(16, pairs=True)) == planes
    assert not taken(16, nchw=False)
    assert taken(16, threads=999) == (planes[2] and channels < 16)  # else with a task for each thread


@pytest.mark.parametrize("threads", [1, 2, 16])
@pytest.mark.parametrize("x", [(1, 1, 224, 224), (2, 3, 40, 3000), (1, 200, 7, 7), (4, 64, 56, 56), (0, 3, 8, 8)])
@pytest.mark.parametrize("geometry", [SAME, (2, 3, 24, 25, 12, 13, 2, 4)])
def test_rows_of_z_stay_in_the_cache(x: tuple[int, int, int, int], geometry: tuple[int, ...], threads: int) -> None:
    module = extension.binding()
    assert module is not None, "the extension is not built"
    stride, _, left, right, top, bottom, dilation, _ = geometry
    rows = (x[2] + top + bottom - 2 * dilation - 1) // stride + 1
    columns = (x[3] + left + right - 2 * geometry[7] - 1) // geometry[1] + 1
    plan = module.plan_cpu_separable_planes(x, (3, 3), 2, geometry, threads=threads, l2_bytes=2**20)
    assert plan.tasks == x[0] * plan.row_groups and plan.group_rows % 4 == 0
    assert (plan.row_groups - 1) * plan.group_rows < rows <= plan.row_groups * plan.group_rows
    assert plan.z_step >= min(plan.group_rows, rows) * columns and plan.z_step % 32 == 16
    assert plan.group_rows == 4 or 8 * x[1] * plan.group_rows * columns <= 2**19


@pytest.mark.parametrize("threads", [1, 2, 16])
@pytest.mark.parametrize(
    "x", [(1, 1, 224, 224), (2, 3, 40, 3000), (1, 200, 7, 7), (4, 64, 56, 56), (1, 1, 1, 1), (0, 3, 8, 8)]
)
@pytest.mark.parametrize("filter", [1, 3])
@pytest.mark.parametrize("geometry", [SAME, (2, 3, 24, 25, 12, 13, 2, 4)])
def test_every_row_of_every_plane_is_in_one_unit(
    x: tuple[int, int, int, int], filter: int, geometry: tuple[int, ...], threads: int
) -> None:
    module = extension.binding()
    assert module is not None, "the extension is not built"
    stride, _, _, _, top, bottom, dilation, _ = geometry
    rows = (x[2] + top + bottom - dilation * (filter - 1) - 1) // stride + 1
    plan = module.plan_cpu_planes(x, (filter, filter), 1, geometry, threads=threads)
    assert plan.units == max(x[0] * x[1], 1) * plan.row_groups
    assert (plan.row_groups - 1) * plan.group_rows < rows <= plan.row_groups * plan.group_rows
    assert plan.group_rows % 4 == 0
    if x == (1, 1, 224, 224) and filter == 3 and geometry == SAME:  # one plane, and work for all
        assert threads <= plan.units <= 4 * threads + 16


def test_planning_refuses_what_cannot_be_meant() -> None:
    module = extension.binding()
    assert module is not None, "the extension is not built"
    with pytest.raises(ValueError, match="stride and dilation must be positive"):
        module.plan_cpu_backward((1, 1, 3, 3), (3, 3), 1, (0, 1, 1, 1, 1, 1, 1, 1))
