"""The Python side of the cuda backend above its operators, which the emulator runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.chain.support import double, hold, image, last, vector
from tests.chain.test_forward_ops import starts
from xsep.backends import chain_cuda, cuda, pointwise
from xsep.backends import chain_cuda_launch as launch
from xsep.backends.aten import ATEN
from xsep.backends.chain import Backward, Load, RawGradient, Shortcut
from xsep.backends.chain_aten import ATEN_CHAIN
from xsep.backends.cuda import nhwc
from xsep.problem import LEAKY_RELU, RELU, SILU, Affine, Geometry, Problem, SeparableArgs
from xsep.testing import float32_products

from .emulated import check_statistics
from .emulated_ops import H200, EmulatedOps, misaligned


@pytest.fixture(autouse=True)
def ieee() -> Iterator[None]:
    with float32_products("ieee"):
        yield


def draw(layout: torch.memory_format, everything: bool, multiplier: int = 1, fused: bool = False) -> SeparableArgs:
    """Of channels that the fused kernel takes, or of others."""
    torch.manual_seed(0)
    n, h, w, (c_in, c_out) = 2, 11, 13, (8, 12) if fused else (5, 7)
    c_mid = c_in * multiplier
    x = torch.randn(n, c_in, h, w).contiguous(memory_format=layout)
    w_dw, w_pw = torch.randn(c_mid, 1, 3, 3), torch.randn(c_out, c_mid, 1, 1)
    no = None
    a = SeparableArgs(x, w_dw, w_pw, no, no, no, no, no, no, no, no, [1] * 8, [0] * 3, [0.0] * 3)
    if not everything:
        return a._replace(bias=torch.randn(c_out))
    return a._replace(
        bias=torch.randn(c_out), residual=torch.randn(n, c_out, h, w), scale_p=torch.randn(c_in),
        shift_p=torch.randn(c_in), scale_m=torch.randn(c_mid), shift_m=torch.randn(c_mid), scale_e=torch.randn(c_out),
        shift_e=torch.randn(c_out), activations=[RELU, SILU, RELU],
    )  # fmt: skip


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("everything", [False, True], ids=["bias", "everything"])
@pytest.mark.parametrize("fused", [False, True], ids=["staged", "fused"])
def test_forward(operators: EmulatedOps, fused: bool, everything: bool, layout: torch.memory_format) -> None:
    a = draw(layout, everything, fused=fused)
    ours, theirs = cuda.CUDA.separable_forward(a), ATEN.separable_forward(a)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert operators.called == {"depthwise_fprop" if everything and not fused else "separable_fprop": 1}


def bare(c_in: int, c_out: int, dtype: torch.dtype, multiplier: int = 1) -> SeparableArgs:
    """A ReLU and the two convolutions, the layer that Xception has."""
    x, no = torch.randn(2, c_in, 9, 7).to(dtype), None
    w_dw, w_pw = (
        torch.randn(c_in * multiplier, 1, 3, 3).to(dtype),
        torch.randn(c_out, c_in * multiplier, 1, 1).to(dtype),
    )
    return SeparableArgs(x, w_dw, w_pw, no, no, no, no, no, no, no, no, [1, 2, *[1] * 6], [RELU, 0, 0], [0.0] * 3)


#: What follows w_pw, and whether a product of PyTorch's can take it along.
BEHIND: dict[str, tuple[Callable[[int, torch.dtype], dict[str, Any]], bool]] = {
    "nothing": (lambda c, dtype: {}, True),
    "bias": (lambda c, dtype: {"bias": torch.randn(c).to(dtype)}, True),
    "shift": (lambda c, dtype: {"shift_e": torch.randn(c).to(dtype)}, True),
    "middle": (lambda c, dtype: {"activations": [RELU, SILU, 0]}, True),
    "both": (lambda c, dtype: {"bias": torch.randn(c).to(dtype), "shift_e": torch.randn(c)}, False),
    "scale": (lambda c, dtype: {"scale_e": torch.randn(c)}, False),
    "relu": (lambda c, dtype: {"activations": [RELU, 0, RELU]}, False),
}


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("multiplier", [1, 2], ids=["m1", "m2"])
@pytest.mark.parametrize("behind", BEHIND)
def test_staged_forward_in_one_call(operators: EmulatedOps, behind: str, multiplier: int, kind: torch.dtype) -> None:
    """Of channels that the fused kernel has no plan for."""
    added, taken = BEHIND[behind]
    a = bare(5, 7, kind, multiplier)
    a = a._replace(**added(7, kind))
    ours, theirs, exact = cuda.CUDA.separable_forward(a), ATEN.separable_forward(a), ATEN.separable_forward(double(a))
    hold("y", ours, exact, theirs, kind)
    assert operators.called == {"separable_fprop" if taken else "depthwise_fprop": 1}


def test_float32_bias_of_16_bit_images_is_added_in_float32(operators: EmulatedOps) -> None:
    a = bare(5, 7, torch.bfloat16)._replace(bias=torch.randn(7))
    hold("y", cuda.CUDA.separable_forward(a), ATEN.separable_forward(double(a)), ATEN.separable_forward(a), a.x.dtype)
    assert operators.called == {"depthwise_fprop": 1}


WANTED = {
    "all": (1,) * 5,
    "x": (1, 0, 0, 0, 0),
    "w_dw": (0, 1, 0, 0, 0),
    "w_pw": (0, 0, 1, 0, 0),
    "vectors": (0, 0, 0, 1, 1),
}


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("multiplier", [1, 2], ids=["m1", "m2"])
@pytest.mark.parametrize("what", [*WANTED, "all, of a float32 bias"])
def test_backward_in_one_call(
    operators: EmulatedOps, what: str, multiplier: int, kind: torch.dtype, layout: torch.memory_format
) -> None:
    what, _, wide = what.partition(", ")
    a = bare(5, 7, kind, multiplier)._replace(bias=torch.randn(7).to(torch.float32 if wide else kind))
    vec = vector(5, kind)
    a = a._replace(x=image(2, 5, 9, 7, vec, kind).contiguous(memory_format=layout), scale_p=vec[0], shift_p=vec[1])
    dy = torch.randn_like(ATEN.separable_forward(a)).contiguous(memory_format=layout)
    x, w_dw, w_pw, scale, shift = map(bool, WANTED[what])
    wanted = [x, w_dw, w_pw, what == "all", False, scale, shift, *[False] * 4]
    ours = cuda.CUDA.separable_backward(dy, a, None, wanted)
    theirs = ATEN.separable_backward(dy, a, None, wanted)
    exact = ATEN.separable_backward(dy.double(), double(a), None, wanted)
    for name, want, mine, peer, right in zip(SeparableArgs._fields, wanted, ours, theirs, exact):
        if want:
            assert mine is not None and peer is not None and right is not None
            hold(name, mine, right, peer, kind)
    assert operators.called == {"separable_bprop": 1}


def test_tf32_where_pytorch_may(operators: EmulatedOps) -> None:
    a, load = draw(torch.channels_last, False, fused=True), Load()
    a = a._replace(bias=None)
    truth = ATEN.separable_forward(a)
    for precision, least, most in (("ieee", 0, 1e-4), ("tf32", 1e-4, 0.1)):
        with float32_products(precision):
            chained = chain_cuda.CUDA_CHAIN.sep_fprop(a.x, load, None, a.w_dw, a.w_pw, Geometry(*a.geometry), False).r
            for y in (cuda.CUDA.separable_forward(a), chained):
                assert least <= float((y - truth).abs().max()) < most


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("multiplier", [1, 2], ids=["m1", "m2"])
def test_backward(operators: EmulatedOps, multiplier: int, layout: torch.memory_format) -> None:
    a = draw(layout, True, multiplier)
    dy = torch.randn_like(ATEN.separable_forward(a))
    y = ATEN.separable_forward(a)
    wanted = [True] * 11
    for ours, theirs in zip(
        cuda.CUDA.separable_backward(dy, a, y, wanted), ATEN.separable_backward(dy, a, y, wanted), strict=True
    ):
        assert ours is not None and theirs is not None
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert operators.called["depthwise_bprop"] == 1


def test_each_activation_has_its_own_alpha(operators: EmulatedOps) -> None:
    a, geometry = draw(torch.channels_last, False, fused=True), Geometry(*[1] * 8)
    prologue, epilogue = Affine(None, None, LEAKY_RELU, 0.3), Affine(None, None, LEAKY_RELU, 0.1)
    torch.testing.assert_close(
        cuda.CUDA.depthwise(a.x, a.w_dw, prologue, epilogue, geometry),
        ATEN.depthwise(a.x, a.w_dw, prologue, epilogue, geometry), rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    a = a._replace(activations=[LEAKY_RELU] * 3, alphas=[0.3, 0.2, 0.1])
    torch.testing.assert_close(
        cuda.CUDA.separable_forward(a), ATEN.separable_forward(a), rtol=1e-4, atol=1e-4
    )  # fmt: skip


def test_the_chain_is_the_same_bits_wherever_its_images_lie(operators: EmulatedOps) -> None:
    """Traced code knows the tiles without knowing addresses."""
    x, r = (last(2, c, 5, 9, dtype=torch.bfloat16) for c in (8, 16))
    w_dw, w_pw, coef = torch.randn(8, 1, 3, 3).bfloat16(), torch.randn(16, 8, 1, 1).bfloat16(), torch.randn(3, 16)
    geometry, load, everything = Geometry(*[1] * 8), Load(None, RELU), (True, True, True)
    chain, found = chain_cuda.CUDA_CHAIN, []
    operators.on(H200._replace(l2_bytes=0))  # the backward is one pass, which has no other way
    for place in (nhwc, misaligned):
        dr = RawGradient(place(r), place(r), coef)
        back = chain.sep_backward(dr, w_pw, w_dw, place(x), load, geometry, None, [place(x)], coef[:2, :8], everything)
        found.append([*chain.sep_fprop(place(x), load, place(x), w_dw, w_pw, geometry, True), *back])
    assert operators.called["chain_fused_backward"] == operators.called["separable_fprop_chain"] == 2
    for one, other in zip(*found, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


def test_empty_batch_launches_nothing(operators: EmulatedOps) -> None:
    a = draw(torch.channels_last, False)
    a = a._replace(x=a.x[:0])
    assert cuda.CUDA.separable_forward(a).shape == (0, 7, 11, 13)
    gradients = cuda.CUDA.depthwise_backward_kernel(
        torch.empty(0, 5, 11, 13), a.x, a.w_dw, Affine(), Geometry(*a.geometry), [True] * 4
    )
    assert gradients.dw_dw is not None and gradients.dshift_p is not None
    assert float(gradients.dw_dw.abs().sum()) == 0 and gradients.dshift_p.shape == (5,)
    assert not operators.called


@pytest.mark.parametrize("way", ["fused", "staged", "sliced"])
@pytest.mark.parametrize("joined", [False, True], ids=["alone", "addend"])
@pytest.mark.parametrize("statistics", [False, True], ids=["r", "statistics"])
def test_chain_forward(
    operators: EmulatedOps, monkeypatch: pytest.MonkeyPatch, way: str, joined: bool, statistics: bool
) -> None:
    """Slices end in the middle of a tile of the statistics; the tiles are those of the whole batch."""
    monkeypatch.setattr(launch, "slices", lambda *_: launch.slices_of(2, 1 if way == "sliced" else 2))
    a = draw(torch.contiguous_format, False, fused=way == "fused")
    load = Load(torch.randn(2, a.x.shape[1]), RELU, 0.0)
    addend = torch.randn_like(a.x) if joined else None
    arguments = (a.x, load, addend, a.w_dw, a.w_pw, Geometry(*a.geometry), statistics)
    ours, theirs = chain_cuda.CUDA_CHAIN.sep_fprop(*arguments), ATEN_CHAIN.sep_fprop(*arguments)
    torch.testing.assert_close(ours.r, theirs.r, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.x_pre, theirs.x_pre)
    assert (ours.partials is not None) == (ours.counts is not None) == statistics
    if ours.partials is not None and ours.counts is not None:
        check_statistics(ours.r, ours.partials, ours.counts)
    one = "depthwise_fprop_residual" if joined else "depthwise_fprop"
    expected = {"fused": {"separable_fprop_chain": 1}, "staged": {one: 1}, "sliced": {one: 2}}[way]
    assert {name: operators.called[name] for name in expected} == expected


#: Shortcut, whether it joins before the activation, operands, pool.
LAYERS = {
    "relu": ("", False, "o", ""), "shortcut": ("full", False, "x", ""), "half": ("half", True, "xo", ""),
    "pool": ("", False, "o", "torch"), "pool-same": ("half", False, "", "same"),
}  # fmt: skip


@pytest.mark.parametrize("pictures", [1, 3], ids=["sliced", "whole"])
@pytest.mark.parametrize("c_in, c_out", [(11, 17), (16, 24)], ids=["odd", "vectors"])
@pytest.mark.parametrize("name", LAYERS)
def test_chain_backward(
    operators: EmulatedOps, monkeypatch: pytest.MonkeyPatch, name: str, c_in: int, c_out: int, pictures: int
) -> None:
    """All of a layer's backward against float64, with the batch in slices and not."""
    monkeypatch.setattr(pointwise, "settings_differ", lambda _: c_in == 11)
    monkeypatch.setattr(launch, "slices", lambda *_: launch.slices_of(3, pictures))
    monkeypatch.setattr(launch, "backward_plan", launch.backward_plan.__wrapped__)
    short, before, others, pool = LAYERS[name]
    dtype, geometry = torch.float32, Geometry(*[1] * 8)
    load = Load(vector(c_in, dtype), RELU)
    x = image(3, c_in, 8, 7, load.vec, dtype)
    w_dw, w_pw = torch.randn(c_in, 1, 3, 3), 0.3 * torch.randn(c_out, c_in, 1, 1)
    r, coef = last(3, c_out, 8, 7, dtype=dtype), torch.randn(3, c_out)
    dr = RawGradient(last(3, c_out, 8, 7, dtype=dtype), r, coef)
    if pool:
        du, pads = last(3, c_out, 4, 4, dtype=dtype), starts(pool, 8, 7)
        ones = torch.ones(2, c_out)
        dr = RawGradient(du, r, coef, ATEN_CHAIN.bn_pool_add(r, ones, du, ones, pads)[1], pads)
    g = last(3, c_in, 8, 7, dtype=dtype)
    shortcut = Shortcut(g if short == "full" else g[:, :, ::2, ::2], before) if short else None
    operands = [x if o == "x" else last(*x.shape, dtype=dtype) for o in others]
    centres = torch.randn(1 + len(others), c_in)

    def run(chain: Any, kind: torch.dtype) -> Backward:
        vec = load.vec.to(kind) if load.vec is not None else None
        found: Backward = chain.sep_backward(
            dr._replace(du=dr.du.to(kind), r=r.to(kind), coef=coef.to(kind)), w_pw.to(kind), w_dw.to(kind), x.to(kind),
            Load(vec, RELU), geometry, None if shortcut is None else shortcut._replace(g=shortcut.g.to(kind)),
            [o.to(kind) for o in operands], centres.to(kind), (True, True, True),
        )  # fmt: skip
        return found

    ours, own, truth = run(chain_cuda.CUDA_CHAIN, dtype), run(ATEN_CHAIN, dtype), run(ATEN_CHAIN, torch.float64)
    for what, mine, theirs, exact in zip(Backward._fields, ours, own, truth, strict=True):
        assert mine is not None and exact is not None
        hold(what, mine, exact, theirs, dtype, 100.0 if what == "sums" else 0.0)


def test_chain_backward_of_what_is_wanted(operators: EmulatedOps) -> None:
    a, load = draw(torch.channels_last, False), Load(torch.randn(2, 5), RELU, 0.0)
    r = torch.randn(2, 7, 11, 13).contiguous(memory_format=torch.channels_last)
    dr = RawGradient(torch.randn_like(r), r, torch.randn(3, 7))
    layer: Any = (dr, a.w_pw, a.w_dw, a.x, load, Geometry(*a.geometry), None, [], None)
    chain: Any = chain_cuda.CUDA_CHAIN
    dx, dw_dw, dw_pw, sums = chain.sep_backward(*layer, (True, True, True))
    assert dx is not None and dw_dw is not None and dw_pw is not None and sums is not None
    only = chain.sep_backward(*layer, (False, False, True))
    assert only.dx is None and only.sums is None and only.dw_pw is not None and torch.equal(only.dw_pw, dw_pw)
    assert torch.equal(chain.sep_wgrad_pw(dr, a.x, load, a.w_dw, Geometry(*a.geometry)), dw_pw)
    assert chain.sep_backward(*layer, (True, False, False)).dw_pw is None


def test_chain_of_an_empty_batch_launches_nothing(operators: EmulatedOps) -> None:
    chain, geometry = chain_cuda.CUDA_CHAIN, Geometry(*[1] * 8)
    x, r, vec = torch.empty(0, 5, 8, 8), torch.empty(0, 7, 8, 8), torch.randn(2, 7)
    w_dw, w_pw, load = torch.randn(5, 1, 3, 3), torch.randn(7, 5, 1, 1), Load(torch.randn(2, 5), RELU)
    dr = RawGradient(r, r, torch.randn(3, 7))
    back = chain.sep_backward(dr, w_pw, w_dw, x, load, geometry, None, [x], torch.zeros(2, 5), (True,) * 3)
    assert back.dx is not None and back.dx.shape == x.shape
    for t in back[1:]:
        assert t is not None and float(t.abs().sum()) == 0
    assert [t.shape for t in chain.statistics(r)] == [(0, 3, 7), (0,)]
    assert [t.shape for t in chain.bn_relu_gap(r, vec)] == [(0, 7)] * 3
    du, sums = chain.bn_relu_gap_backward(torch.empty(0, 7), r, vec, vec[0], *torch.empty(2, 0, 7))
    assert du.shape == r.shape and float(sums.abs().sum()) == 0
    pooled = torch.empty(0, 7, 4, 4)
    assert [t.shape for t in chain.bn_pool_add(r, vec, pooled, vec, (1, 1))] == [pooled.shape] * 3
    assert chain.apply(x, load, None).shape == chain.apply_backward(x, x, load, None, [], None)[0].shape == x.shape
    dw, dy = chain.pw_backward(dr, w_pw, x, load)
    assert float(dw.abs().sum()) == 0 and dy.shape == x.shape
    assert chain.pw_fprop(x, load, w_pw, True).r.shape == r.shape
    assert not operators.called


@pytest.mark.parametrize("differ", [False, True], ids=["mm", "conv2d"])
def test_chain_pointwise(operators: EmulatedOps, monkeypatch: pytest.MonkeyPatch, differ: bool) -> None:
    """The skip: every second pixel, forward and backward; by a product, or by what obeys the settings for TF32."""
    monkeypatch.setattr(pointwise, "settings_differ", lambda _: differ)
    load, w = Load(torch.randn(2, 5), RELU), torch.randn(7, 5, 1, 1)
    y = last(2, 5, 9, 7, dtype=torch.float32)[:, :, ::2, ::2]
    ours, theirs = chain_cuda.CUDA_CHAIN, ATEN_CHAIN
    found, expected = ours.pw_fprop(y, load, w, True), theirs.pw_fprop(y, load, w, True)
    for mine, exact in zip(found[:3], expected[:3]):
        assert mine is not None and exact is not None
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-4)
    dr = RawGradient(torch.randn_like(expected.r), expected.r, torch.randn(3, 7))
    for mine, exact in zip(ours.pw_backward(dr, w, y, load), theirs.pw_backward(dr, w, y, load)):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-4)


def test_chain_tiles_are_the_plans(operators: EmulatedOps) -> None:
    """Traced code sizes the partials by them, so they have to be what the kernel's own plan says."""
    problem = Problem(
        "separable", "cuda", torch.bfloat16, True, 3, 16, 23, 29, 1, 3, 3, 24, Geometry(*[1] * 8), (1, 0, 0)
    )
    plan = cuda.fused_plan(problem, H200)
    assert plan is not None and chain_cuda.CUDA_CHAIN.tiles(problem) == plan.tiles
    wide = problem._replace(c_out=728)
    assert cuda.fused_plan(wide, H200) is None
    assert chain_cuda.CUDA_CHAIN.tiles(wide) == -(-3 * 23 * 29 // 128) != plan.tiles
