"""The cost model: what design.md's arithmetic says of the ten Xception shapes, on cards that are not here."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from xsep import dispatch, plans
from xsep.backends import cuda as cuda_backend
from xsep.problem import IDENTITY, RELU, Geometry, Problem
from xsep.testing import float32_products
from xsep.tuning import device as devices
from xsep.tuning.device import A100, H100, H200, PUBLISHED, RTX_4090, T4, DeviceProperties

#: C_in, C_out, height and width, and the microseconds of the fused floor on an H200 in bf16 at batch 64.
SHAPES = [
    (64, 128, 147, 123.5), (128, 128, 147, 164.7), (128, 256, 74, 62.6), (256, 256, 74, 83.5), (256, 728, 37, 41.3),
    (728, 728, 37, 117.6), (728, 728, 19, 31.0), (728, 1024, 19, 43.6), (1024, 1536, 10, 25.5), (1536, 2048, 10, 51.0),
]  # fmt: skip
BOTH = ("cuda", "triton")
CARDS = pytest.mark.parametrize("card", PUBLISHED, ids=lambda card: card.name.split()[-1])
LAYERS = pytest.mark.parametrize("layer", SHAPES, ids=lambda s: f"{s[0]}-{s[1]}-{s[2]}")


def problem(
    c_in: int, c_out: int, size: int, n: int = 64, dtype: torch.dtype = torch.bfloat16, k: int = 3, last: bool = True
) -> Problem:
    pad = k // 2
    return Problem(
        "separable", "cuda", dtype, last, n, c_in, size, size, 1, k, k, c_out,
        Geometry(1, 1, pad, pad, pad, pad, 1, 1), (RELU, IDENTITY, IDENTITY),
    )  # fmt: skip


def by_way(p: Problem, card: DeviceProperties) -> dict[str, plans.Prediction]:
    return {prediction.way: prediction for prediction in plans.predictions(p, card)}


@LAYERS
def test_floor_is_the_one_worked_out_by_hand(layer: tuple[int, int, int, float]) -> None:
    c_in, c_out, size, expected = layer
    assert plans.floor(problem(c_in, c_out, size), H200) == pytest.approx(expected, rel=0.02)


@CARDS
@LAYERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_prediction_is_below_the_floor(
    layer: tuple[int, int, int, float], card: DeviceProperties, dtype: torch.dtype
) -> None:
    p = problem(*layer[:3], dtype=dtype)
    found = plans.predictions(p, card)
    assert {"aten, channels_last", "aten, NCHW"} <= {q.way for q in found}
    for q in found:
        for direction in ("forward", "backward"):
            assert q.time(direction) >= plans.floor(p, card, direction) * 0.999 or "L2" in q.note, q


@LAYERS
def test_fused_where_one_cta_holds_c_out_and_staged_beyond(layer: tuple[int, int, int, float]) -> None:
    """design.md: recomputing z for every block of output channels costs more than it saves."""
    c_in, c_out, size, _ = layer
    found = by_way(problem(c_in, c_out, size, n=256), H200)
    assert ("cuda, fused" in found) == (c_out <= 256)
    if c_out > 256:
        assert f"is made {-(-c_out // 256)} times" in found["triton, fused"].note
        assert found["triton, fused"].forward > found["triton, staged"].forward
        assert found["triton, staged"].chosen_way and not found["triton, fused"].chosen_way
    else:
        assert found["cuda, fused"].chosen_way and not found["cuda, staged"].chosen_way


@LAYERS
@pytest.mark.parametrize("card", [H200, A100, RTX_4090], ids=["H200", "A100", "4090"])
def test_ways_are_those_of_the_planners_that_the_launchers_ask(
    layer: tuple[int, int, int, float], card: DeviceProperties
) -> None:
    p = problem(*layer[:3])
    chosen = {q.backend: q.way for q in plans.predictions(p, card) if q.chosen_way}
    fused = cuda_backend.is_fused(p, plans.cuda_facts(card))
    assert chosen["cuda"] == ("cuda, fused" if fused else "cuda, staged")
    assert cuda_backend.describe(p, plans.cuda_facts(card)).startswith(chosen["cuda"].split(", ")[1])
    plan = plans.triton_plans.separable_plan(p, plans.triton_device(card), False)
    assert chosen["triton"] == ("triton, fused" if plan.fused else "triton, staged")


@CARDS
@LAYERS
def test_choice_and_reason_on_every_card(layer: tuple[int, int, int, float], card: DeviceProperties) -> None:
    p = problem(*layer[:3])
    name, why = plans.choose(p, card, BOTH)
    if card is T4:
        assert name == "aten"
        for backend in BOTH:
            assert plans.refusal(backend, p, card) == "its kernels need compute capability 8.0, and this card has 7.5"
    else:
        assert name in BOTH and "the cost model has" in why and "PyTorch at" in why
    assert plans.choose(p, card, ())[0] == "aten"
    assert plans.choose(p, card, ("cuda",))[0] in ("cuda", "aten")


def test_a_small_problem_is_the_hosts_and_stays_with_pytorch() -> None:
    name, why = plans.choose(problem(64, 64, 7, n=1), H200, BOTH)
    assert name == "aten" and "times as fast" in why
    small = problem(64, 64, 7, n=1)
    assert "the host's 20 us" in by_way(small, H200)["cuda, fused"].note
    by_python = by_way(small._replace(dtype=torch.float32), H200)["cuda, fused"]
    assert "the host's 50 us" in by_python.note and by_python.forward == 50 and by_python.backward == 100


def test_each_launch_that_python_makes_costs_the_host() -> None:
    """Of a small problem nothing else counts: the op's own, and that of so many launches."""
    found, op = by_way(problem(64, 64, 7, n=1), H200), plans.HOST_US["triton"]
    assert found["triton, fused"].forward == op + plans.HOST_LAUNCH_US
    assert found["triton, staged"].forward == op + 2 * plans.HOST_LAUNCH_US
    assert found["triton, fused"].backward == 2 * op + 3 * plans.HOST_LAUNCH_US
    exact, rounded = (
        {q.way: q for q in plans.predictions(problem(64, 64, 7, n=1, dtype=torch.float32), H200, tf32)}
        for tf32 in (False, True)
    )
    for way in ("triton, fused", "triton, staged"):
        assert rounded[way].forward == exact[way].forward + plans.HOST_LAUNCH_US, "the weights' rounding"
    sliced = by_way(problem(728, 728, 37, n=1024), RTX_4090)["triton, staged"]
    assert sliced.launches[0] > 20 and "L2" in sliced.note
    assert sliced.forward >= op + sliced.launches[0] * plans.HOST_LAUNCH_US


def test_a_small_gain_is_not_believed() -> None:
    p = problem(1536, 2048, 10, dtype=torch.float32)
    best = min(q.forward for q in plans.predictions(p, A100))
    aten = by_way(p, A100)["aten, channels_last"].forward
    assert best < aten < plans.MARGIN * best
    assert plans.choose(p, A100, BOTH)[0] == "aten"


def test_nchw_pays_for_its_conversion() -> None:
    last, first = (by_way(problem(128, 128, 74, last=flag), H200) for flag in (True, False))
    assert first["cuda, fused"].forward > 1.5 * last["cuda, fused"].forward
    assert first["aten, NCHW"].chosen_way and not first["aten, channels_last"].chosen_way


def test_types_and_vendors_that_cannot_run_are_refused_with_a_reason() -> None:
    wide = problem(64, 64, 56, dtype=torch.float64)
    assert "not float64" in plans.refusal("cuda", wide, H200)
    assert all(math.isinf(q.forward) for q in plans.predictions(wide, H200) if q.backend in BOTH)
    amd = dataclasses.replace(H200, vendor="gfx942")
    assert "NVIDIA" in plans.refusal("cuda", problem(64, 64, 56), amd) and amd.architecture == "gfx942"
    assert plans.refusal("triton", problem(64, 64, 56), amd) == ""


def test_depthwise_alone_and_a_filter_beyond_the_fast_kernels() -> None:
    depthwise = problem(256, 256, 37)._replace(op="depthwise", activations=(0, 0))
    assert {q.way for q in plans.predictions(depthwise, H200)} == {
        "aten, channels_last", "aten, NCHW", "cuda", "triton",
    }  # fmt: skip
    large = by_way(problem(64, 64, 56, k=9), H200)
    assert "general" in large["cuda, staged"].note and "triton, fused" not in large


def test_a_dilated_filter_is_left_to_kernels_that_slide() -> None:
    """CUDA's kernel for it is bound by instructions, far from memory's speed; Triton's slides over any dilation."""
    for op in ("depthwise", "separable"):
        dilated = problem(256, 256, 37)._replace(geometry=Geometry(1, 1, 6, 6, 6, 6, 6, 6), op=op)
        found = by_way(dilated._replace(activations=(0, 0) if op == "depthwise" else (0, 0, 0)), H200)
        cuda, aten = found["cuda" if op == "depthwise" else "cuda, staged"], found["aten, channels_last"]
        assert (
            "general" in cuda.note and cuda.card_forward > aten.card_forward and cuda.card_backward > aten.card_backward
        )
        triton = [q for q in found.values() if q.backend == "triton"]
        assert not any("general" in q.note for q in triton)
        assert min(q.card_forward for q in triton) < aten.card_forward


@pytest.mark.parametrize(
    "name, card",
    [("NVIDIA H200", H200), ("h200", H200), ("A100", A100), ("RTX 4090", RTX_4090), ("rtx4090", RTX_4090), ("T4", T4)],
)
def test_cards_by_name(name: str, card: DeviceProperties) -> None:
    assert devices.published(name) is card


@pytest.mark.parametrize("name", ["", "NVIDIA", "H2000", "Voodoo 2"])
def test_an_unknown_card_is_refused_with_those_that_are_known(name: str) -> None:
    with pytest.raises(ValueError, match="NVIDIA H200, NVIDIA H100 HBM3, NVIDIA A100"):
        devices.published(name)


@pytest.mark.parametrize(
    "name, capability, count, known",
    [
        ("NVIDIA H200", (9, 0), 132, H200),
        ("NVIDIA H100 80GB HBM3", (9, 0), 132, H100),
        ("NVIDIA A100-SXM4-80GB", (8, 0), 108, A100),
        ("Tesla T4", (7, 5), 40, T4),
    ],
)
def test_a_running_card_is_known_by_its_name(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], count: int, known: DeviceProperties
) -> None:
    told = SimpleNamespace(name=name, major=capability[0], minor=capability[1], multi_processor_count=count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: told)
    devices.running.cache_clear()
    found = devices.running(0)
    devices.running.cache_clear()
    assert found == dataclasses.replace(known, name=name)


@pytest.mark.parametrize("card", PUBLISHED, ids=lambda card: card.name.split()[-1])
def test_an_unknown_card_is_estimated_near_its_data_sheet(card: DeviceProperties) -> None:
    """From what the driver says of the published cards alone: clocks from the same data sheets."""
    clocks = {H200: (1830e3, 3201e3, 6016), H100: (1830e3, 2619e3, 5120), A100: (1410e3, 1593e3, 5120),
              RTX_4090: (2520e3, 10501e3, 384), T4: (1590e3, 5001e3, 256)}  # fmt: skip
    clock, memory, bus = clocks[card]
    told = SimpleNamespace(
        name="?", major=card.capability[0], minor=card.capability[1], multi_processor_count=card.multiprocessors,
        clock_rate=clock, memory_clock_rate=memory, memory_bus_width=bus, L2_cache_size=card.l2_bytes,
        shared_memory_per_block_optin=card.shared_bytes,
    )  # fmt: skip
    found = devices.estimated(told, devices._RATES[card.capability])
    assert found.bandwidth == pytest.approx(card.bandwidth, rel=0.02)
    assert found.half_flops == pytest.approx(card.half_flops, rel=0.02)
    assert found.float32_flops == pytest.approx(card.float32_flops, rel=0.1)
    assert (found.l2_bytes, found.shared_bytes, found.architecture) == (
        card.l2_bytes, card.shared_bytes, card.architecture,
    )  # fmt: skip


def test_work_agrees_with_the_dispatchers() -> None:
    p = problem(64, 128, 147)
    moved, flops = dispatch.work(p)
    work = plans.work_of(p)
    assert work.bytes == moved and work.depthwise + work.pointwise == flops


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_tf32_where_convolutions_have_a_setting_of_their_own(precision: str) -> None:
    """The older flag raises where recurrent networks have another one."""
    with float32_products(precision):
        assert plans.tf32_allowed(torch.float32) == (precision == "tf32")
        assert not plans.tf32_allowed(torch.float16)
