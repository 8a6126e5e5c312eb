"""Every depthwise CUDA kernel, run by the emulator, against float64."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import pytest
import torch
from torch import Tensor

from xsep.backends.aten import ATEN
from xsep.problem import ACTIVATIONS, Geometry
from xsep.problem import Affine as AtenAffine

from . import emulated

pytestmark = pytest.mark.skipif(emulated.missing_tools() is not None, reason=str(emulated.missing_tools()))

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(scope="session")
def library() -> emulated.Library:
    return emulated.Library(emulated.build("depthwise"))


class Case(NamedTuple):
    """One convolution; geometry is (stride_h, stride_w, left, right, top, bottom, dilation_h, dilation_w)."""

    name: str
    n: int
    c: int
    h: int
    w: int
    filter: tuple[int, int]
    geometry: Geometry
    multiplier: int = 1
    fast: bool = True
    offset: int = 0  # elements by which x starts past a 16-byte boundary


def same(k: int, stride: int = 1) -> Geometry:
    return Geometry(stride, stride, k // 2, k // 2, k // 2, k // 2, 1, 1)


FAST = [Case(f"k{k}-stride{stride}", 2, 8, 11, 13, (k, k), same(k, stride)) for k in (3, 5, 7) for stride in (1, 2)] + [
    Case("k3-no-padding", 1, 24, 7, 9, (3, 3), Geometry(1, 1, 0, 0, 0, 0, 1, 1)),
    Case("k3-stride2-tf-same", 1, 16, 10, 12, (3, 3), Geometry(2, 2, 0, 1, 0, 1, 1, 1)),
    Case("k5-padding-beyond-filter", 1, 8, 5, 3, (5, 5), Geometry(1, 1, 6, 3, 1, 7, 1, 1)),
    Case("k3-stride2-explicit", 2, 8, 9, 6, (3, 3), Geometry(2, 2, 2, 0, 1, 3, 1, 1)),
    Case("k7-stride2-odd-padding", 1, 8, 17, 15, (7, 7), Geometry(2, 2, 3, 2, 5, 0, 1, 1)),
    Case("k3-many-channels", 1, 136, 5, 5, (3, 3), same(3)),
    Case("k3-one-pixel", 3, 8, 1, 1, (3, 3), same(3)),
    Case("k3-several-tiles", 1, 64, 9, 70, (3, 3), same(3)),
    # Several strips one below the other, and channels in whole vectors of four alone.
    *(Case(f"k{k}-stride{stride}-tall", 1, 12, 41, 5, (k, k), same(k, stride)) for k in (3, 5, 7) for stride in (1, 2)),
]
GENERAL = [
    Case("odd-channels", 2, 5, 7, 11, (3, 3), same(3), fast=False),
    Case("rectangular", 1, 8, 9, 7, (3, 5), Geometry(1, 1, 2, 2, 1, 1, 1, 1), fast=False),
    Case("dilation", 1, 7, 13, 11, (3, 3), Geometry(1, 1, 2, 2, 2, 2, 2, 2), fast=False),
    Case("stride3x2-dilation1x2", 1, 3, 14, 13, (2, 3), Geometry(3, 2, 1, 0, 2, 1, 1, 2), fast=False),
    Case("multiplier3", 2, 8, 7, 5, (3, 3), same(3), multiplier=3, fast=False),
    Case("k1", 1, 37, 3, 5, (1, 1), same(1), fast=False),
    Case("misaligned", 1, 8, 5, 7, (3, 3), same(3), fast=False, offset=1),
]
EVERY = FAST + GENERAL


PLAIN, RELU = emulated.Affine(), emulated.Affine(activation=1)
EVERY_GRADIENT = ("dx", "dw_dw", "dscale", "dshift")


def ids(case: Case) -> str:
    return case.name


def draw(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    x = torch.randn(case.n, case.c, case.h, case.w).to(dtype)
    return x, torch.randn(case.c * case.multiplier, 1, *case.filter).to(dtype)


def shape_of(case: Case) -> emulated.ConvShape:
    g = case.geometry
    p, q = g.output_size(case.h, case.w, *case.filter)
    return emulated.ConvShape(
        case.n, case.h, case.w, case.c, p, q, case.c * case.multiplier, *case.filter, g.stride_h, g.stride_w,
        g.pad_top, g.pad_left, g.dilation_h, g.dilation_w,
    )  # fmt: skip


def plan_of(
    library: emulated.Library, way: str, case: Case, dtype: torch.dtype, aligned: bool, multiprocessors: int
) -> emulated.DepthwisePlan:
    plan = emulated.DepthwisePlan()
    device = emulated.Device(multiprocessors, 99 * 1024)
    getattr(library.lib, f"emulate_plan_depthwise_{way}")(
        ctypes.byref(shape_of(case)), dtype.itemsize, int(aligned), ctypes.byref(device), ctypes.byref(plan)
    )
    return plan


class Outputs(NamedTuple):
    y: Tensor  # NCHW
    x_pre: Optional[Tensor]  # NCHW, beside a residual
    statistics: Tensor  # [workers, 3, C_mid], empty where not asked for
    counts: Tensor  # [workers], likewise


def fprop(
    library: emulated.Library, case: Case, x: Tensor, w: Tensor, prologue: emulated.Affine = PLAIN,
    epilogue: emulated.Affine = PLAIN, residual: Optional[Tensor] = None, multiprocessors: int = 1,
    statistics: bool = False, workers: Optional[int] = None,
) -> Outputs:  # fmt: skip
    """workers: CTAs that share the pixels, where the planner's number is not wanted."""
    shape = shape_of(case)
    plan = plan_of(library, "fprop", case, x.dtype, case.offset == 0, multiprocessors)
    plan.workers = plan.workers if workers is None else workers
    tiles = plan.workers if statistics else 0
    partials = emulated.Guarded((tiles, 3, shape.c_mid), torch.float32)
    counts = emulated.Guarded((tiles,), torch.int32)
    y = emulated.Guarded((shape.n, shape.p, shape.q, shape.c_mid), x.dtype)
    source, weights = emulated.nhwc(x, case.offset), emulated.Guarded.of(w)
    other = None if residual is None else emulated.nhwc(residual)
    x_pre = None if residual is None else emulated.Guarded((shape.n, shape.h, shape.w, shape.c_in), x.dtype)
    library.call("emulate_depthwise_fprop", emulated.DepthwiseFprop(
        shape, plan, emulated.TYPES[x.dtype], source.tensor.data_ptr(),
        None if other is None else other.tensor.data_ptr(), weights.tensor.data_ptr(),
        None if x_pre is None else x_pre.tensor.data_ptr(), y.tensor.data_ptr(),
        *((g.tensor.data_ptr() if statistics else None) for g in (partials, counts)), prologue.raw(), epilogue.raw(),
    ))  # fmt: skip
    pre = None if x_pre is None else x_pre.check().permute(0, 3, 1, 2)
    return Outputs(y.check().permute(0, 3, 1, 2), pre, partials.check(), counts.check())


def double(affine: emulated.Affine) -> AtenAffine:
    scale, shift = (None if t is None else t.double() for t in affine[:2])
    return AtenAffine(scale, shift, affine.activation, affine.alpha)


def assert_close(name: str, ours: Tensor, theirs: Tensor, truth: Tensor) -> None:
    """At most twice PyTorch's own error at the same type, and an ulp of the largest result (8 in float32)."""
    ulp = torch.finfo(theirs.dtype).eps * float(truth.abs().max()) if truth.numel() else 0.0
    allowed = 2 * float((theirs.double() - truth).abs().max()) + ulp * (8 if theirs.dtype == torch.float32 else 1)
    error = float((ours.double() - truth).abs().max())
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("case", EVERY, ids=ids)
@pytest.mark.parametrize("kind", DTYPES)
def test_forward(library: emulated.Library, case: Case, kind: str) -> None:
    x, w = draw(case, DTYPES[kind])
    assert plan_of(library, "fprop", case, x.dtype, case.offset == 0, 1).sliding_window == case.fast
    ours = fprop(library, case, x, w).y
    plain = AtenAffine()
    theirs = ATEN.depthwise(x, w, plain, plain, case.geometry)
    assert_close("y", ours, theirs, ATEN.depthwise(x.double(), w.double(), plain, plain, case.geometry))


@pytest.mark.parametrize("case", FAST, ids=ids)
@pytest.mark.parametrize("kind", DTYPES)
def test_relu_alone(library: emulated.Library, case: Case, kind: str) -> None:
    """Forward and backward have it before they widen x."""
    x, w = draw(case, DTYPES[kind])
    plain, relu = AtenAffine(), AtenAffine(activation=1)
    theirs = ATEN.depthwise(x, w, relu, plain, case.geometry)
    truth = ATEN.depthwise(x.double(), w.double(), relu, plain, case.geometry)
    assert_close("y", fprop(library, case, x, w, RELU).y, theirs, truth)
    for wanted in (EVERY_GRADIENT, ("dx", "dw_dw"), ("dx",), ("dw_dw",)):
        check_backward(library, case, DTYPES[kind], RELU, wanted)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("wanted", [("dx",), EVERY_GRADIENT], ids=["dx-alone", "with-sums"])
def test_gradient_of_relu_at_its_edges(library: emulated.Library, kind: str, wanted: Sequence[str]) -> None:
    """Where x is a zero of either sign nothing passes, at the smallest numbers above it and at infinity all."""
    case, dtype = FAST[0], DTYPES[kind]
    tiny = torch.finfo(dtype).smallest_normal
    edges = torch.tensor([0.0, -0.0, tiny, -tiny, tiny / 4, -tiny / 4, 1.0, -1.0, torch.inf, -torch.inf])
    x = edges[torch.arange(case.n * case.c * case.h * case.w) % 10].reshape(case.n, case.c, case.h, case.w).to(dtype)
    dz = torch.ones(case.n, case.c, case.h, case.w).to(dtype)
    w = torch.zeros(case.c, 1, 3, 3).to(dtype)
    w[:, :, 1, 1] = 1
    assert torch.equal(bprop(library, case, dz, x, w, RELU, wanted=wanted)["dx"], (x > 0).to(dtype))


@pytest.mark.parametrize("case", [FAST[0], FAST[1], GENERAL[0]], ids=ids)
@pytest.mark.parametrize("activation", range(len(ACTIVATIONS)), ids=ACTIVATIONS)
def test_forward_prologue_and_epilogue(library: emulated.Library, case: Case, activation: int) -> None:
    x, w = draw(case, torch.float32, activation)
    prologue = emulated.Affine(torch.randn(case.c), torch.randn(case.c), activation, 0.3)
    epilogue = emulated.Affine(torch.randn(case.c), torch.randn(case.c), activation, 0.3)
    ours = fprop(library, case, x, w, prologue, epilogue).y
    theirs = ATEN.depthwise(x, w, AtenAffine(*prologue), AtenAffine(*epilogue), case.geometry)
    truth = ATEN.depthwise(x.double(), w.double(), double(prologue), double(epilogue), case.geometry)
    assert_close("y", ours, theirs, truth)


@pytest.mark.parametrize(
    "case", [FAST[0], FAST[3], FAST[9], FAST[12], FAST[14], FAST[15], GENERAL[1], GENERAL[3]], ids=ids
)
@pytest.mark.parametrize("kind", DTYPES)
def test_forward_residual_prologue(library: emulated.Library, case: Case, kind: str) -> None:
    x, w = draw(case, DTYPES[kind])
    residual = torch.randn_like(x)
    prologue = emulated.Affine(torch.randn(case.c), torch.randn(case.c), 1)
    ours, x_pre, *_ = fprop(library, case, x, w, prologue, residual=residual)
    assert x_pre is not None
    plain, relu = AtenAffine(), AtenAffine(activation=1)

    def pre(t: Tensor, r: Tensor) -> Tensor:
        wide = torch.promote_types(t.dtype, torch.float32)
        scale, shift = (v.to(wide)[:, None, None] for v in (prologue.scale, prologue.shift))  # type: ignore[union-attr]
        return (scale * t + shift + r).to(t.dtype)

    exact = pre(x.double(), residual.double())
    assert_close("x_pre", x_pre, pre(x, residual), exact)
    theirs = ATEN.depthwise(pre(x, residual), w, relu, plain, case.geometry)
    assert_close("y", ours, theirs, ATEN.depthwise(exact, w.double(), relu, plain, case.geometry))


def bprop(
    library: emulated.Library, case: Case, dz: Tensor, x: Tensor, w: Tensor, prologue: emulated.Affine,
    centre: Optional[Tensor] = None, multiprocessors: int = 1, wanted: Sequence[str] = EVERY_GRADIENT,
) -> dict[str, Tensor]:  # fmt: skip
    """dx (NCHW), dw_dw, dscale, dshift; those that are not wanted stay NaN."""
    shape = shape_of(case)
    plan = plan_of(library, "bprop", case, x.dtype, case.offset == 0, multiprocessors)
    taps = case.filter[0] * case.filter[1]
    out = {
        "dx": emulated.Guarded((case.n, case.h, case.w, case.c), x.dtype),
        "dw_dw": emulated.Guarded(tuple(w.shape), x.dtype),
        "dscale": emulated.Guarded((case.c,), torch.float32),
        "dshift": emulated.Guarded((case.c,), torch.float32),
    }
    partials = emulated.Guarded((plan.workers, taps + 3, shape.c_mid), torch.float32)
    gradient, source, weights = emulated.nhwc(dz), emulated.nhwc(x, case.offset), emulated.Guarded.of(w)
    library.call("emulate_depthwise_bprop", emulated.DepthwiseBprop(
        shape, plan, emulated.TYPES[x.dtype], gradient.tensor.data_ptr(), source.tensor.data_ptr(),
        weights.tensor.data_ptr(), *(g.tensor.data_ptr() if name in wanted else None for name, g in out.items()),
        emulated.pointer(centre),
        partials.tensor.data_ptr(), prologue.raw(), emulated.Epilogue(),
    ))  # fmt: skip
    partials.check()
    results = {name: guarded.check() for name, guarded in out.items()}
    return {**results, "dx": results["dx"].permute(0, 3, 1, 2)}


def check_backward(
    library: emulated.Library, case: Case, dtype: torch.dtype, prologue: emulated.Affine,
    wanted: Sequence[str] = EVERY_GRADIENT,
) -> None:  # fmt: skip
    x, w = draw(case, dtype)
    shape = shape_of(case)
    dz = torch.randn(shape.n, shape.c_mid, shape.p, shape.q).to(dtype)
    every = (True, True, True, True)
    theirs = ATEN.depthwise_backward_kernel(dz, x, w, AtenAffine(*prologue), case.geometry, every)
    truth = ATEN.depthwise_backward_kernel(dz.double(), x.double(), w.double(), double(prologue), case.geometry, every)
    ours = bprop(library, case, dz, x, w, prologue, wanted=wanted)
    for name, t, exact in zip(EVERY_GRADIENT, theirs, truth):
        assert t is not None and exact is not None
        if name in wanted:
            assert_close(name, ours[name], t, exact)


@pytest.mark.parametrize("case", EVERY, ids=ids)
@pytest.mark.parametrize("kind", DTYPES)
def test_backward(library: emulated.Library, case: Case, kind: str) -> None:
    x, _ = draw(case, DTYPES[kind])
    assert plan_of(library, "bprop", case, x.dtype, case.offset == 0, 1).sliding_window == case.fast
    check_backward(library, case, DTYPES[kind], emulated.Affine())


@pytest.mark.parametrize("case", [FAST[0], FAST[1], GENERAL[4]], ids=ids)
@pytest.mark.parametrize("activation", range(len(ACTIVATIONS)), ids=ACTIVATIONS)
def test_backward_prologue(library: emulated.Library, case: Case, activation: int) -> None:
    torch.manual_seed(activation)
    prologue = emulated.Affine(torch.randn(case.c), torch.randn(case.c), activation, 0.3)
    check_backward(library, case, torch.float32, prologue)


@pytest.mark.parametrize("case", [FAST[1], GENERAL[0]], ids=ids)
def test_backward_centred_sums(library: emulated.Library, case: Case) -> None:
    """With a centre, dscale is the sum of du (x - centre), as BatchNorm's backward wants it."""
    x, w = draw(case, torch.float32)
    shape, centre = shape_of(case), torch.randn(case.c)
    dz = torch.randn(shape.n, shape.c_mid, shape.p, shape.q)
    prologue = emulated.Affine(torch.randn(case.c), torch.randn(case.c), 1)
    ours = bprop(library, case, dz, x, w, prologue, centre)

    def sums(dtype: torch.dtype) -> Tensor:
        assert prologue.scale is not None and prologue.shift is not None
        affine = AtenAffine(prologue.scale.to(dtype), prologue.shift.to(dtype), 1)
        g = ATEN.depthwise_backward_kernel(
            dz.to(dtype), x.to(dtype), w.to(dtype), affine, case.geometry, (False, False, True, True)
        )
        assert g.dscale_p is not None and g.dshift_p is not None
        return g.dscale_p - centre.to(dtype) * g.dshift_p

    assert_close("dscale", ours["dscale"], sums(torch.float32), sums(torch.float64))


#: C, filter, and of 132 multiprocessors: rows of the partials, CTAs of dgrad without sums for 32 channels.
WIDE = {"dilated": (256, 3, 132, 132), "k7": (96, 7, 352, 352), "k31": (96, 31, 22, 352), "narrow": (8, 7, 1056, 1056)}


@pytest.mark.parametrize("name", WIDE)
def test_general_dgrad_fills_the_card(library: emulated.Library, name: str) -> None:
    """Its grid has no taps to be multiplied by, as wgrad's has; rows of partials are bounded by 8 MB."""
    c, k, rows, ctas = WIDE[name]
    dilation = 2 if k == 3 else 1
    pad = dilation * (k // 2)
    geometry = Geometry(1, 1, pad, pad, pad, pad, dilation, dilation)
    case = Case(name, 128, c, 64, 64, (k, k), geometry)
    plan = plan_of(library, "bprop", case, torch.bfloat16, k == 3, 132)
    assert (plan.sliding_window, plan.workers, plan.dgrad_workers) == (False, rows, ctas)
    assert ctas * -(-c // 32) == 132 * 8 and rows * (k * k + 3) * c * 4 <= 8 << 20


@pytest.mark.parametrize("case", [GENERAL[0], GENERAL[2], GENERAL[4]], ids=ids)
def test_general_dgrad_alone(library: emulated.Library, case: Case) -> None:
    """More CTAs of it than there are rows of partials, of which it writes none; no bit depends on what is wanted."""
    case = case._replace(n=20, geometry=case.geometry)
    x, w = draw(case, torch.float32)
    shape = shape_of(case)
    dz = torch.randn(shape.n, shape.c_mid, shape.p, shape.q)
    every = bprop(library, case, dz, x, w, PLAIN)
    plan = plan_of(library, "bprop", case, x.dtype, True, 1)
    emulated.launches(library.lib)
    alone = bprop(library, case, dz, x, w, PLAIN, wanted=["dx"])
    assert emulated.launches(library.lib) == [("depthwise_dgrad_general_kernel", plan.dgrad_workers, 1)]
    assert plan.dgrad_workers > 1 and torch.equal(alone["dx"], every["dx"])
    assert all(alone[name].isnan().all() for name in EVERY_GRADIENT[1:])


@pytest.mark.parametrize("rows", [1, 16, 17, 129, 700])
@pytest.mark.parametrize("kind", DTYPES)
def test_sums_of_many_rows(library: emulated.Library, rows: int, kind: str) -> None:
    """The second stage by itself, of channels that fill no CTA; nothing is read of what nobody wants."""
    dtype, c, taps = DTYPES[kind], 45, 9
    torch.manual_seed(rows)
    shape = emulated.ConvShape(1, 5, 5, c, 5, 5, c, 3, 3, 1, 1, 1, 1, 1, 1)
    partials = torch.randn(rows, taps + 3, c)
    exact = partials.double().sum(0)
    partials[:, taps + 1] = torch.nan
    given = emulated.Guarded.of(partials)
    dw_dw = emulated.Guarded((c, taps), dtype)
    vectors = [emulated.Guarded((c,), torch.float32) for _ in range(3)]
    places = [None if k == 1 else v.tensor.data_ptr() for k, v in enumerate(vectors)]
    library.call("emulate_sum_bprop_partials", emulated.SumPartials(
        shape, emulated.TYPES[dtype], rows, given.tensor.data_ptr(), dw_dw.tensor.data_ptr(), tuple(places),
    ))  # fmt: skip
    close = torch.testing.assert_close
    close(dw_dw.check(), exact[:taps].t().to(dtype))
    for k, v in enumerate(vectors):
        assert k == 1 or close(v.check(), exact[taps + k].float(), rtol=1e-6, atol=1e-6) is None
    assert vectors[1].check().isnan().all()


@pytest.mark.parametrize("way", ["fprop", "bprop"])
def test_an_error_carries_the_kernel_and_the_whole_problem(library: emulated.Library, way: str) -> None:
    """A plan without a CTA stands for whatever CUDA may refuse."""
    params: Any = {"fprop": emulated.DepthwiseFprop, "bprop": emulated.DepthwiseBprop}[way]()
    params.shape, params.type, params.dx = shape_of(GENERAL[0]), 1, 1
    kernel = {"fprop": "depthwise_fprop_general_kernel", "bprop": "depthwise_dgrad_general_kernel"}[way]
    with pytest.raises(RuntimeError, match=rf"{kernel}: impossible grid, for float16 x \[2, 5, 7, 11\], depthwise"):
        library.call(f"emulate_depthwise_{way}", params)


@pytest.mark.parametrize("case", [FAST[0], FAST[3], FAST[13], FAST[14], GENERAL[1]], ids=ids)
def test_same_bits_for_any_order_of_threads(case: Case) -> None:
    """Seeds shuffle the threads between barriers; several CTAs share the work; nothing may depend on it."""
    x, w = draw(case, torch.bfloat16)
    shape = shape_of(case)
    dz = torch.randn(shape.n, shape.c_mid, shape.p, shape.q).bfloat16()
    prologue = emulated.Affine(torch.randn(case.c), torch.randn(case.c), 1)
    found: list[dict[str, Any]] = []
    for seed in (1, 2, 3):
        seeded = emulated.Library(emulated.build("depthwise"), seed)
        y = fprop(seeded, case, x, w, prologue, multiprocessors=3).y
        found.append({"y": y, **bprop(seeded, case, dz, x, w, prologue, multiprocessors=3)})
    for other in found[1:]:
        for name, value in other.items():
            assert torch.equal(value, found[0][name]), name
