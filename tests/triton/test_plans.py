"""The choices of the triton backend: pure functions, so testable with neither Triton nor a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.triton.ahead_of_time import DEVICES
from xsep import plans as cost_model
from xsep import testing
from xsep.backends import triton as backend
from xsep.backends import triton_launch as launch
from xsep.backends import triton_plans as plans
from xsep.backends.triton import TRITON
from xsep.problem import GELU, RELU, SILU, Affine, Geometry, Problem, SeparableArgs, separable_problem
from xsep.testing import Case
from xsep.tuning.device import H200 as CARD

ROOT = Path(__file__).resolve().parents[2]
H200 = DEVICES["sm_90"]
#: C_in, C_out, height and width of Xception's separable layers (Chollet 2017, arXiv:1610.02357, figure 5).
LAYERS = [
    (64, 128, 147), (128, 128, 147), (128, 256, 74), (256, 256, 74), (256, 728, 37), (728, 728, 37), (728, 728, 19),
    (728, 1024, 19), (1024, 1536, 10), (1536, 2048, 10),
]  # fmt: skip


def problem(c_in: int, c_out: int, size: int, k: int = 3, stride: int = 1, n: int = 64, **changed: Any) -> Problem:
    pad = k // 2
    made = Problem(
        "separable", "cuda", torch.bfloat16, True, n, c_in, size, size, 1, k, k, c_out,
        Geometry(stride, stride, pad, pad, pad, pad, 1, 1), (0, 0, 0),
    )  # fmt: skip
    return made._replace(**changed)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda v: "-".join(map(str, v)))
def test_z_stays_on_chip_where_one_program_holds_all_of_c_out(layer: tuple[int, int, int]) -> None:
    plan = plans.separable_plan(problem(*layer), H200, False)
    assert plan.fused == (layer[1] <= 256)
    if plan.fused:
        assert plan.tile.outputs >= layer[1]


@pytest.mark.parametrize("size", [147, 74, 37, 19, 10])
def test_few_lanes_idle_on_xceptions_maps(size: int) -> None:
    for tile in (plans.fprop_tile(problem(728, 728, size), H200), plans.backward_tile(problem(728, 728, size), H200)):
        assert tile is not None
        made = plans.row_tiles(size, 1, tile.rows) * tile.rows * plans.row_tiles(size, 1, tile.side) * tile.side
        assert made <= 1.09 * size**2, f"{tile} makes {made} of {size**2} pixels"


@pytest.mark.parametrize("n", [1, 8, 64])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda v: "-".join(map(str, v)))
def test_strips_fill_the_card_or_are_as_short_as_they_get(layer: tuple[int, int, int], n: int) -> None:
    """No strip is so long that a whole wave of programs more would be had by halving it."""
    c, _, size = layer
    made = problem(c, c, size, n=n)
    tile = plans.fprop_tile(made, H200)
    assert tile is not None

    def clocks(rows: int) -> int:
        beside = -(-n * plans.row_tiles(size, 1, tile.side) // tile.cols) * -(-c // tile.channels)
        return plans.waves(beside * plans.row_tiles(size, 1, rows), H200) * (rows + 2 + plans.START)

    assert all(clocks(tile.rows) <= clocks(rows) for rows in range(1, size + 1))


def test_what_wants_registers_gets_fewer_columns_a_lane() -> None:
    """Each of them spilled where the lane was that of a ReLU; the compilations ahead of time hold all of them."""

    def lane(k: int, stride: int, code: int, dtype: torch.dtype = torch.bfloat16) -> tuple[int, int, int]:
        tile = plans.fprop_tile(problem(128, 128, 160, k, stride, activations=(code, 0, 0), dtype=dtype), H200)
        assert tile is not None
        return tile.cols * tile.channels // 128, tile.side, tile.unroll

    def backward(k: int, stride: int, code: int) -> tuple[int, int, int]:
        tile = plans.backward_tile(problem(128, 128, 160, k, stride, activations=(code, 0, 0)), H200)
        assert tile is not None
        return tile.cols * tile.channels // 128, tile.side, tile.unroll

    for code in plans.COSTLY:
        assert [lane(3, 1, code), lane(5, 1, code), lane(3, 2, code)] == [(8, 1, 1), (2, 2, 1), (8, 1, 1)]
    assert [lane(3, 1, RELU), lane(5, 1, RELU), lane(3, 2, RELU)] == [(8, 2, 2), (2, 4, 1), (8, 2, 1)]
    assert lane(3, 1, RELU, torch.float32) == (4, 2, 2)
    for code in (SILU, GELU):
        assert [backward(3, 1, code), backward(5, 1, code), backward(7, 1, code)] == [(4, 1, 2), (2, 1, 2), (1, 1, 2)]
    assert [backward(3, 1, RELU), backward(3, 2, RELU), backward(7, 1, RELU)] == [(4, 2, 2), (4, 1, 1), (1, 2, 1)]


def test_the_chain_in_tf32_has_room_for_its_statistics() -> None:
    wide, narrow = (problem(128, c_out, 147, k, dtype=torch.float32) for c_out, k in ((256, 3), (64, 7)))
    assert plans.separable_plan(wide, H200, True).tile == plans.FUSED_TILES[256]
    assert plans.chain_tile(wide, H200, True) == plans.FUSED_TILES[128]
    assert plans.chain_tile(narrow, H200, True).depth == 16
    assert plans.chain_tile(wide, DEVICES["gfx942"], True) == plans.FUSED_TILES_HIP[256]


def test_what_the_unrolled_kernels_do_not_take_goes_to_the_general_ones() -> None:
    for odd in (problem(8, 8, 32, k=9), problem(8, 8, 32, stride=3)):
        assert plans.fprop_tile(odd, H200) is None and plans.backward_tile(odd, H200) is None
        assert not plans.separable_plan(odd, H200, False).fused
    assert plans.backward_tile(problem(8, 16, 32, multiplier=2), H200) is None
    dilated = problem(8, 8, 32, geometry=Geometry(2, 2, 2, 2, 2, 2, 2, 2))
    assert plans.fprop_tile(dilated, H200) is not None and plans.backward_tile(dilated, H200) is None


def test_a_small_problem_gets_small_tiles() -> None:
    assert plans.separable_plan(problem(728, 728, 10, n=1), H200, False).tile == plans.FUSED_SMALL
    assert plans.separable_plan(problem(128, 256, 147), H200, False).tile == plans.FUSED_TILES[256]


def test_lanes_have_two_columns_where_there_are_registers_for_them() -> None:
    def tile(*args: int, card: str = "sm_90", **changed: Any) -> plans.SeparableTile:
        return plans.separable_plan(problem(*args, **changed), DEVICES[card], True).tile

    assert tile(64, 128, 147) == plans.FUSED_SIDE[128] and tile(64, 40, 147) == plans.FUSED_SIDE[64]
    assert tile(64, 128, 147, activations=(RELU, 0, 0)) == plans.FUSED_SIDE[128]
    crowded = (
        tile(64, 128, 147, k=5), tile(64, 128, 147, stride=2), tile(61, 128, 147), tile(64, 128, 147, multiplier=2),
        tile(64, 128, 147, activations=(0, 0, SILU)), tile(64, 128, 147, dtype=torch.float32),
    )  # fmt: skip
    assert set(crowded) == {plans.FUSED_TILES[128]}
    assert tile(64, 128, 147, card="gfx942") == plans.FUSED_TILES_HIP[128]
    # The training chain: the same pixels with an addend, which wants registers too.
    side, beside = (plans.chain_tile(problem(64, 128, 147), H200, False, addend) for addend in (False, True))
    assert side == plans.FUSED_SIDE[128] and beside == plans.replace(side, depth=16)
    alone, other = (plans.chain_tile(problem(64, 256, 147), H200, False, addend) for addend in (False, True))
    assert alone == other == plans.FUSED_TILES[256]


def test_the_chains_tile_does_not_depend_on_the_batch() -> None:
    tiles = {plans.chain_tile(problem(256, 256, 19, n=n), H200, False) for n in (1, 8, 64, 1024)}
    assert len(tiles) == 1


@pytest.mark.parametrize("multiple", [1, 2, 4, 8, 24])
def test_accesses_are_as_wide_as_every_stride_allows(multiple: int) -> None:
    t = torch.empty((2, 4, 4, 48 * multiple), dtype=torch.bfloat16, device="meta").permute(0, 3, 1, 2)
    part = t[:, : 8 * multiple]
    assert launch.vector_width(2, part.shape[1], *launch.pixel_strides(part)) == 8
    part = t[:, :multiple]
    assert launch.vector_width(2, part.shape[1], *launch.pixel_strides(part)) == min(8, multiple & -multiple)


@pytest.mark.parametrize("h, w", [(1 << 16, 8), (8, 1 << 16)])
def test_offsets_widen_before_they_overflow(h: int, w: int) -> None:
    """A launch whose 32-bit offsets would overflow says so; rows always have 64 bits."""

    def made(n: int, c: int) -> launch.Launch:
        x = torch.empty((n, h, w, c), dtype=torch.float16, device="meta").permute(0, 3, 1, 2)
        weight = torch.empty((9, c), dtype=torch.float16, device="meta")
        geometry, plain = Geometry(1, 1, 1, 1, 1, 1, 1, 1), Affine()
        return launch.depthwise_fprop(
            x, weight, x, (3, 3), plain, plain, geometry, plans.DepthwiseTile(4, 16, 64, 4)
        )  # fmt: skip

    assert not made(2, 64).constants["WIDE"]
    assert made(100, 64).constants["WIDE"]
    assert made(1, 1 << 16).constants["WIDE"]


def test_gradients_of_an_expanded_input_are_addressed_in_64_bits() -> None:
    """One picture expanded to many has small offsets, but its gradient is dense."""
    x = torch.empty((1, 64, 64, 64), dtype=torch.float16, device="meta").permute(0, 3, 1, 2).expand(10_000, -1, -1, -1)
    assert launch.pixel_strides(x)[0] == 0 and launch.wide(x)


def test_every_tile_of_x_belongs_to_one_program_of_the_backward() -> None:
    x = torch.empty((3, 13, 17, 24), device="meta").permute(0, 3, 1, 2)
    for stride, dilation in ((1, 1), (2, 1), (1, 3)):
        geometry = Geometry(stride, stride, 1, 1, 1, 1, dilation, dilation)
        split = launch.backward_split(x, geometry, plans.DepthwiseTile(2, 8, 64, 4))
        for share in (1, 3, split.tiles, split.tiles + 5):
            assert split.programs(share) * share >= split.tiles > (split.programs(share) - 1) * share


@pytest.mark.parametrize("tf32", [False, True], ids=["ieee", "tf32"])
@pytest.mark.parametrize("slice_n", [0, 2, 5], ids=["fused", "slices", "staged"])
def test_the_cost_model_counts_the_launches_that_there_are(
    slice_n: int, tf32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(n=5, c_in=8, h=6, w=6, c_out=16, bias=True)
    inputs = testing.make_inputs(case)
    x, w_dw, w_pw, bias = (inputs.tensors[name].detach() for name in ("x", "w_dw", "w_pw", "bias"))
    geometry, no = Geometry(1, 1, 1, 1, 1, 1, 1, 1), None
    a = SeparableArgs(x, w_dw, w_pw, bias, no, no, no, no, no, no, no, list(geometry), [0, 0, 0], [0.0] * 3)
    planned = plans.separable_plan

    def chosen(*arguments: Any) -> plans.SeparablePlan:
        return plans.replace(planned(*arguments), fused=slice_n == 0, slice_n=max(slice_n, 1))

    for module in (plans, backend):
        monkeypatch.setattr(module, "separable_plan", chosen)
    monkeypatch.setattr(backend, "device_of", lambda *_: H200)
    monkeypatch.setattr(backend, "tf32_allowed", lambda *_: tf32)
    made: list[str] = []
    monkeypatch.setattr(launch.Launch, "run", lambda self, _: made.append(self.kernel))
    TRITON.separable_forward(a)
    forward = len(made)
    z = TRITON.depthwise(x, w_dw, a.prologue, a.middle, geometry)
    TRITON.depthwise_backward_kernel(z, x, w_dw, a.prologue, geometry, (True, True, False, False))
    predicted = cost_model._triton(cost_model._Clock(separable_problem(a)._replace(device="cuda"), CARD, tf32), tf32)
    (counted,) = (way.launches for way in predicted if way.chosen_way)
    assert counted == (forward, len(made) - forward), made


def reasons(**changed: Any) -> str:
    return "; ".join(TRITON.not_supported_reasons(problem(8, 8, 8, **changed)))


def test_reasons_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in reasons(device="cpu")
    assert "'mps'" in reasons(device="mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "PyTorch sees no GPU" in reasons(device="cuda")
    assert "float64 is not" in reasons(device="cpu", dtype=torch.float64)
    monkeypatch.setattr(backend, "installed_version", lambda: None)
    assert "Triton is not installed" in reasons(device="cpu")
    monkeypatch.setattr(backend, "installed_version", lambda: (3, 1))
    assert "Triton 3.1 is installed, and the kernels need 3.3 or newer" in reasons(device="cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backend, "installed_version", lambda: (3, 6))
    assert reasons(device="cpu") == ""


@pytest.mark.parametrize(
    "conv, cudnn, whole, allowed",
    [("tf32", "ieee", "ieee", True), ("none", "tf32", "ieee", True), ("none", "none", "tf32", True),
     ("none", "ieee", "tf32", False), ("ieee", "tf32", "tf32", False)],
)  # fmt: skip
def test_tf32_only_where_the_convolution_settings_allow_it(
    monkeypatch: pytest.MonkeyPatch, conv: str, cudnn: str, whole: str, allowed: bool
) -> None:
    class Settings:
        def __init__(self, precision: str) -> None:
            self.fp32_precision = precision

    settings = Settings(cudnn)
    settings.conv = Settings(conv)  # type: ignore[attr-defined]
    everything = Settings(whole)
    everything.cudnn = settings  # type: ignore[attr-defined]
    monkeypatch.setattr(backend.torch, "backends", everything)
    assert backend.tf32_allowed(torch.float32, H200) == allowed
    assert not backend.tf32_allowed(torch.bfloat16, H200)
    assert not backend.tf32_allowed(torch.float32, DEVICES["gfx942"])


def test_importing_the_backend_does_not_import_triton() -> None:
    code = "import sys, xsep.backends.triton, xsep.ops.training\nprint('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
