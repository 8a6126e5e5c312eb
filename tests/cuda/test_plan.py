"""The CUDA planner: pure data, the same that the launchers use."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from xsep import extension
from xsep.backends import chain_cuda_launch as launch
from xsep.backends import cuda
from xsep.problem import Geometry, Problem

H100 = cuda.DeviceFacts(132, 227 * 1024)
A100 = cuda.DeviceFacts(108, 163 * 1024)
A10 = cuda.DeviceFacts(72, 99 * 1024)
#: Xception's separable layers at 299 pixels: C_in, C_out, height and width.
XCEPTION = [
    (64, 128, 147), (128, 128, 147), (128, 256, 74), (256, 256, 74), (256, 728, 37), (728, 728, 37), (728, 728, 19),
    (728, 1024, 19), (1024, 1536, 10), (1536, 2048, 10),
]  # fmt: skip


@pytest.fixture
def planner() -> Any:
    module = extension.binding()
    if module is None:
        pytest.skip("xsep's compiled extension is not built")
    return module


def problem(
    c_in: int, c_out: int, size: int, n: int = 64, k: int = 3, stride: int = 1, dtype: torch.dtype = torch.bfloat16
) -> Problem:
    pad = k // 2
    geometry = Geometry(stride, stride, pad, pad, pad, pad, 1, 1)
    return Problem("separable", "cuda", dtype, True, n, c_in, size, size, 1, k, k, c_out, geometry, (0, 0, 0))


def fused(planner: Any, p: Problem, device: cuda.DeviceFacts) -> Any:
    return planner.plan_cuda_separable_fprop(
        cuda.shape_of(p), c_out=p.c_out, element_bytes=p.dtype.itemsize, multiprocessors=device.multiprocessors,
        shared_bytes=device.shared_bytes,
    )  # fmt: skip


@pytest.mark.parametrize("device", [H100, A100, A10], ids=["sm_90", "sm_80", "sm_86"])
@pytest.mark.parametrize("layer", XCEPTION, ids=lambda c: "-".join(map(str, c)))
def test_fused_where_one_cta_holds_c_out(planner: Any, layer: tuple[int, int, int], device: cuda.DeviceFacts) -> None:
    p = problem(*layer)
    plan = fused(planner, p, device)
    assert plan.fused == (p.c_out <= 256)
    if not plan.fused:
        return
    assert plan.shared_bytes <= device.shared_bytes
    assert plan.tile_rows * plan.tile_columns <= plan.pixels == 64 * plan.row_warps
    assert plan.tiles * plan.tile_rows * plan.tile_columns >= p.n * p.h * p.w
    assert plan.channel_warps * 64 >= p.c_out and plan.warps == plan.row_warps * plan.channel_warps <= 8
    assert 2 <= plan.halos <= 4 and (plan.keeps_w_pw or plan.halos == 2)
    assert plan.workers <= device.multiprocessors * (8 // plan.warps)
    assert plan.workers * plan.warps >= 4 * device.multiprocessors, "the card is at least half full"


@pytest.mark.parametrize("size", [7, 10, 14, 19, 28, 37, 56, 74, 112, 147])
def test_tiles_are_well_filled(planner: Any, size: int) -> None:
    """Small maps too: of what the depthwise part computes, strips of 8 pixels, at most a seventh is idle.

    Of 10 and 19 columns 16 and 24 are computed, however they are cut.
    """
    plan = fused(planner, problem(128, 128, size, n=1024), H100)
    strips = -(-plan.tile_columns // 8) * 8
    useful = 1024 * size * size / (plan.tiles * plan.tile_rows * strips)
    assert useful >= min(6 / 7, size / (-(-size // 8) * 8)) - 1e-9


@pytest.mark.parametrize("layer", XCEPTION[:4], ids=lambda c: "-".join(map(str, c)))
def test_weights_stay_in_shared_memory_on_hopper(planner: Any, layer: tuple[int, int, int]) -> None:
    assert fused(planner, problem(*layer), H100).keeps_w_pw


def test_few_pictures_are_spread_over_the_card(planner: Any) -> None:
    """A batch of one: more CTAs, with fewer pixels each, than the widest tile would give."""
    one, many = (fused(planner, problem(256, 256, 74, n=n), H100) for n in (1, 64))
    assert one.pixels <= many.pixels and one.workers >= 74 * 74 / 128


@pytest.mark.parametrize(
    "p",
    [problem(64, 512, 14), problem(60, 64, 14), problem(64, 60, 14), problem(64, 64, 14, k=7),
     problem(64, 64, 14)._replace(multiplier=2), problem(64, 64, 2**20, n=1), problem(12_000_000, 64, 1, n=1)],
    ids=["c_out-512", "c_in-not-of-8", "c_out-not-of-8", "k7", "multiplier", "2^31-tiles", "2^31-bytes-of-weights"],
)  # fmt: skip
def test_staged_where_the_fused_kernel_cannot(planner: Any, p: Problem) -> None:
    assert not cuda.is_fused(p, H100)
    assert cuda.describe(p, H100).startswith("staged")


@pytest.mark.parametrize("way", ["fprop", "bprop"])
@pytest.mark.parametrize("layer", XCEPTION, ids=lambda c: "-".join(map(str, c)))
def test_depthwise_covers_every_pixel_and_channel(planner: Any, layer: tuple[int, int, int], way: str) -> None:
    p = problem(*layer)
    plan = getattr(planner, f"plan_cuda_depthwise_{way}")(
        cuda.shape_of(p), element_bytes=2, multiprocessors=132, shared_bytes=H100.shared_bytes
    )
    assert plan.sliding_window
    assert plan.slices * plan.vectors * plan.vec >= p.c_in
    assert plan.strips_down * plan.strips_across * plan.vectors <= 128
    assert plan.tiles_down * plan.strips_down * plan.strip_rows >= p.h
    assert plan.tiles_across * plan.strips_across * 4 >= p.w
    assert plan.shared_bytes <= 48 * 1024
    assert plan.workers * plan.slices <= 132 * (12 if way == "fprop" else 2), "no CTA may be left for a last wave"


def test_tiles_leave_room_to_count_on_from_the_last_one(planner: Any) -> None:
    """In 32 bits a CTA adds the number of all CTAs to that of its tile, and looks whether there is such a tile."""
    for n, counted in ((2**30 - 1, True), (2**30, False), (2**31 - 1, False)):
        shape = cuda.shape_of(problem(8, 8, 1, n=n))
        facts = {"element_bytes": 2, **H100._asdict()}
        for way in ("fprop", "bprop"):
            assert getattr(planner, f"plan_cuda_depthwise_{way}")(shape, **facts).sliding_window == counted
        assert planner.plan_cuda_chain_backward(shape, c_out=8, **facts).fused == counted


def wgrad_plan(planner: Any, p: Problem, device: cuda.DeviceFacts, of: str = "separable") -> Any:
    return getattr(planner, f"plan_cuda_{of}_wgrad")(
        cuda.shape_of(p), c_out=p.c_out, element_bytes=p.dtype.itemsize, **device._asdict()
    )


@pytest.mark.parametrize("device", [H100, A100, A10], ids=["sm_90", "sm_80", "sm_86"])
@pytest.mark.parametrize("layer", XCEPTION, ids=lambda c: "-".join(map(str, c)))
def test_z_stays_on_the_chip_for_dw_pw(planner: Any, layer: tuple[int, int, int], device: cuda.DeviceFacts) -> None:
    """Where two tiles of dy fit; it pays in large pictures, where x and dy are then read once each."""
    p = problem(*layer)
    plan, walk = wgrad_plan(planner, p, device), wgrad_plan(planner, p, device).walk
    assert plan.on_chip == (p.c_out <= (128 if device is A10 else 256))
    if not plan.on_chip:
        return
    assert walk.shared_bytes <= device.shared_bytes
    assert plan.output_blocks * 64 >= p.c_out and plan.parts * walk.chunks * 64 >= p.c_in
    assert plan.output_blocks * walk.chunks * plan.shares <= 8, "a block for each warp at most"
    assert walk.tiles * walk.tile_rows * walk.tile_columns >= p.n * p.h * p.w
    assert walk.workers * plan.parts <= device.multiprocessors
    if device is H100:
        bytes_of = 2 * p.n * p.h * p.w * (p.c_in + p.c_out)
        assert plan.clocks / 1755 >= bytes_of / 4.35e6, "not faster than memory"
        assert plan.pays == (plan.clocks < 0.85 * plan.staged_clocks) == (plan.parts == 1)


@pytest.mark.parametrize("layer", XCEPTION[:4], ids=lambda c: "-".join(map(str, c)))
def test_dr_is_formed_there_too(planner: Any, layer: tuple[int, int, int]) -> None:
    """One buffer for r is enough, as x is not brought more than a tile ahead; du, r and x are read, and dr written."""
    p = problem(*layer)
    plan, walk = wgrad_plan(planner, p, H100, "chain"), wgrad_plan(planner, p, H100, "chain").walk
    assert plan.on_chip and walk.halos <= walk.chunks + 1 and walk.shared_bytes < plan.shared_bytes <= H100.shared_bytes
    bytes_of = 2 * p.n * p.h * p.w * (p.c_in + 3 * p.c_out)
    assert plan.clocks / 1755 >= bytes_of / 4.35e6, "not faster than memory"
    from_dr = wgrad_plan(planner, p, H100)
    raw = plan.staged_clocks - (from_dr.clocks if from_dr.pays else from_dr.staged_clocks)
    assert raw / 1755 == pytest.approx(6 * p.n * p.h * p.w * p.c_out / 4.3e6 + 2.5, rel=0.01)
    plans = [launch.backward_plan(p, H100._replace(l2_bytes=60 << 20), pooled) for pooled in (False, True)]
    assert [found and found.on_chip for found in plans] == ["dr and z", "z" if from_dr.pays else ""]
    for other in (p._replace(r=5, s=5, geometry=p.geometry._replace(pad_left=2, pad_right=2, pad_top=2, pad_bottom=2)),
                  p._replace(geometry=p.geometry._replace(stride_h=2, stride_w=2))):  # fmt: skip
        assert not wgrad_plan(planner, other, H100, "chain").on_chip and wgrad_plan(planner, other, H100).on_chip


@pytest.mark.parametrize(
    "p",
    [problem(64, 128, 147, dtype=torch.float32), problem(60, 128, 147), problem(64, 60, 147), problem(64, 520, 74),
     problem(64, 64, 147, k=7), problem(64, 64, 2**20, n=1)],
    ids=["float32", "c_in-not-of-8", "c_out-not-of-8", "c_out-520", "k7", "2^31-tiles"],
)  # fmt: skip
def test_z_goes_through_memory_elsewhere(planner: Any, p: Problem) -> None:
    assert not wgrad_plan(planner, p, H100).on_chip and cuda.wgrad_plan(p, H100) is None


def test_it_does_not_pay_where_pictures_are_few_or_channels_many(planner: Any) -> None:
    """A partial sum of each CTA, and x or dy read again for every part of the channels."""
    for p in (problem(64, 128, 14, n=2), problem(256, 256, 74), problem(728, 512, 19)):
        plan = wgrad_plan(planner, p, H100)
        assert plan.on_chip and not plan.pays


def pictures_of_a_slice(planner: Any, p: Problem, l2: int) -> int:
    return int(
        planner.plan_cuda_chain_slice(
            cuda.shape_of(p), c_out=p.c_out, element_bytes=2, multiprocessors=132, l2_bytes=l2 << 20
        )
    )


@pytest.mark.parametrize("layer", XCEPTION, ids=lambda c: "-".join(map(str, c)))
@pytest.mark.parametrize("n", [1, 64, 128])
@pytest.mark.parametrize("l2", [6, 60, 128, 256, 1024])
def test_slices_of_a_layer_pay(planner: Any, layer: tuple[int, int, int], n: int, l2: int) -> None:
    """dr and z of a slice fill half of L2 at most, and what they are spared outweighs the launches; else no slices."""
    p = problem(*layer, n=n)
    pictures, pixels = pictures_of_a_slice(planner, p, l2), p.h * p.w
    assert 1 <= pictures <= n
    if pictures == n:
        return
    assert pictures * pixels * (p.c_in + p.c_out) * 2 <= l2 << 19
    slices = -(-n // pictures)
    assert n - (slices - 1) * pictures >= pictures - slices, "the last slice is nearly as large as the others"
    reused, fresh = (pictures * pixels * 2 * c for c in (3 * p.c_out + 4 * p.c_in, 2 * p.c_out + 3 * p.c_in))
    microseconds = fresh / 4.3e6 + reused / 7.4e6
    assert microseconds > 6 * 9.9, "the host would not keep up"
    assert reused / 4.3e6 - reused / 7.4e6 > 6 * 2.5 * (slices - 1) / slices * 0.99, "6 launches of 2.5 us"


@pytest.mark.parametrize("layer", XCEPTION, ids=lambda c: "-".join(map(str, c)))
def test_an_h200_has_no_slices_and_a_larger_l2_has(planner: Any, layer: tuple[int, int, int]) -> None:
    """64 -> 128 channels at 147 pixels in 43 slices were 260 launches of kernels of 4 us."""
    p = problem(*layer, n=128)
    assert pictures_of_a_slice(planner, p, 60) == 128
    in_l2 = p.h * p.w * (p.c_in + p.c_out) * 2 * 128 <= 128 << 20
    assert in_l2 or pictures_of_a_slice(planner, p, 256) < 128


def backward(planner: Any, p: Problem, device: cuda.DeviceFacts, l2: int) -> Any:
    return planner.plan_cuda_chain_backward(
        cuda.shape_of(p), c_out=p.c_out, element_bytes=p.dtype.itemsize,
        **device._replace(l2_bytes=l2 << 20)._asdict(),
    )  # fmt: skip


@pytest.mark.parametrize("layer", XCEPTION, ids=lambda c: "-".join(map(str, c)))
def test_backward_in_one_pass_where_shared_memory_holds_a_tile(planner: Any, layer: tuple[int, int, int]) -> None:
    p = problem(*layer)
    narrow = p.c_out <= 128
    widest = layer == (128, 128, 147)  # more than 99 KB of shared memory hold
    for device, l2, expected in ((H100, 60, narrow), (A100, 40, narrow), (A10, 6, narrow and not widest)):
        plan = backward(planner, p, device, l2)
        assert plan.fused == expected
        if plan.fused:
            assert plan.shared_bytes <= device.shared_bytes
            assert plan.tiles_down * plan.tile_rows >= p.h and plan.tiles_across * 16 >= p.w
            assert plan.tiles == p.n * plan.tiles_down * plan.tiles_across
            assert plan.workers == device.multiprocessors


@pytest.mark.parametrize("layer", XCEPTION[:2], ids=lambda c: "-".join(map(str, c)))
def test_backward_in_one_pass_is_weighed_by_its_instructions(planner: Any, layer: tuple[int, int, int]) -> None:
    """It moves a third of the bytes, and still would take longer: 10,000 and 18,800 are counted a pixel."""
    p = problem(*layer)
    plan = backward(planner, p, H100, 60)
    pixels, clock = p.n * p.h * p.w, 132 * 1.755e3
    counted = {64: 10048, 128: 18829}[p.c_in] * pixels / 128 / clock
    kernel_by_kernel = pixels * 2 * (5 * p.c_out + 7 * p.c_in) / 4.3e6
    assert counted < plan.clocks / 1755 < 2.5 * counted, "and the latency of what a tile begins with"
    assert plan.staged_clocks / 1755 == pytest.approx(kernel_by_kernel + 15, rel=0.01)
    chosen = launch.backward_plan(p, H100._replace(l2_bytes=60 << 20))
    assert chosen is not None and chosen.fused == (plan.clocks < plan.staged_clocks) == False  # noqa: E712


def test_one_pass_is_weighed_against_what_goes_on_the_chip(monkeypatch: pytest.MonkeyPatch, planner: Any) -> None:
    """Of a pooled layer dr does not: so much sooner is one pass the faster way."""
    p, device = problem(64, 64, 147), H100._replace(l2_bytes=60 << 20)
    plans = {of: wgrad_plan(planner, p, device, of) for of in ("separable", "chain")}
    assert all(plan.pays for plan in plans.values())
    saved = {of: plan.staged_clocks - plan.clocks for of, plan in plans.items()}

    class OnePass:
        fused, staged_clocks = True, 1e6

    monkeypatch.setattr(launch, "_one_pass", lambda *arguments: OnePass)
    for pooled, least in ((False, 1e6 - saved["separable"] - saved["chain"]), (True, 1e6 - saved["separable"])):
        for clocks, fused in ((least - 1, True), (least + 1, False)):
            OnePass.clocks = clocks  # type: ignore[attr-defined]
            found = launch.backward_plan.__wrapped__(p, device, pooled)
            assert found is not None and found.fused == fused
            assert found.on_chip == ("" if fused else "z" if pooled else "dr and z")


def test_tiles_of_a_fused_backward_grow_with_shared_memory(planner: Any) -> None:
    rows = [
        backward(planner, problem(128, 128, 147), cuda.DeviceFacts(132, kilobytes * 1024), 0).tile_rows
        for kilobytes in (99, 160, 227)
    ]
    assert rows == [0, 4, 8], "none where only slivers fit"


def test_more_than_int32_tiles_goes_to_the_general_kernel(planner: Any) -> None:
    shape = (2**20, 64, 2**20, 8, 64, 2**20, 8, 3, 3, 1, 1, 1, 1, 1, 1)
    plan = planner.plan_cuda_depthwise_fprop(
        shape, element_bytes=2, multiprocessors=132, shared_bytes=H100.shared_bytes
    )
    assert not plan.sliding_window


@pytest.mark.parametrize("c_in, sliding", [(728, True), (13, False)], ids=["sliding", "general"])
def test_tiles_of_a_depthwise_forwards_statistics(planner: Any, c_in: int, sliding: bool) -> None:
    """One a CTA along the pixels, which all of them have some of; 128 pixels each behind the general kernel."""
    shape = cuda.shape_of(problem(c_in, 8, 19))
    plan = planner.plan_cuda_depthwise_fprop(
        shape, element_bytes=2, multiprocessors=132, shared_bytes=H100.shared_bytes
    )
    tiles = planner.plan_cuda_depthwise_statistics(shape, plan)
    assert plan.sliding_window == sliding
    assert tiles == (plan.workers if sliding else -(-64 * 19 * 19 // 128))
    assert not sliding or tiles <= 64 * plan.tiles_down * plan.tiles_across


def test_plan_in_words(planner: Any) -> None:
    assert "fused" in cuda.describe(problem(128, 128, 147), H100)
    assert "staged, depthwise by sliding windows" in cuda.describe(problem(728, 728, 19), H100)
    assert "general kernel" in cuda.describe(problem(728, 728, 19)._replace(op="depthwise", c_in=3, c_out=3), H100)
