"""The fused separable CUDA kernel, run by the emulator, against float64."""

from __future__ import annotations

import ctypes
import random
from typing import NamedTuple, Optional

import pytest
import torch
from torch import Tensor

from tests.tf32 import round_to_tf32
from xsep.backends.aten import ATEN
from xsep.problem import ACTIVATIONS, Geometry, SeparableArgs

from . import emulated

pytestmark = pytest.mark.skipif(emulated.missing_tools() is not None, reason=str(emulated.missing_tools()))

KINDS = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
H100, A10 = 227 * 1024, 99 * 1024


@pytest.fixture(scope="session")
def library() -> emulated.Library:
    return emulated.Library(emulated.build("separable"))


class Cut(NamedTuple):
    """How y is cut into tiles, and who has them."""

    chunk_bytes: int
    row_warps: int
    columns: int
    across_pictures: bool
    halos: int
    keeps_w_pw: bool
    workers: int


class Case(NamedTuple):
    name: str
    n: int
    c_in: int
    c_out: int
    h: int
    w: int
    k: int
    geometry: Geometry
    shared: int = H100
    cut: Optional[Cut] = None  # else the planner's


def same(k: int, stride: int = 1) -> Geometry:
    return Geometry(stride, stride, k // 2, k // 2, k // 2, k // 2, 1, 1)


CASES = [
    Case("k3", 1, 72, 40, 9, 13, 3, same(3)),
    Case("k3-stride2", 1, 40, 24, 17, 15, 3, same(3, 2)),
    Case("k5", 1, 24, 56, 7, 11, 5, same(5)),
    Case("k5-stride2", 1, 16, 8, 19, 13, 5, same(5, 2)),
    Case("c_out-256", 1, 16, 248, 5, 7, 3, same(3)),
    Case("c_out-72", 1, 8, 72, 5, 7, 3, same(3)),
    Case("small-pictures", 5, 136, 16, 3, 5, 3, same(3)),
    Case("rows-cross-pictures", 3, 8, 16, 7, 7, 3, same(3)),
    Case("stride2-crossing", 3, 8, 16, 7, 9, 5, same(5, 2)),
    Case("one-pixel", 7, 8, 8, 1, 1, 3, same(3)),
    Case("wide", 1, 8, 8, 3, 301, 3, same(3)),
    Case("no-padding", 1, 24, 8, 7, 9, 3, Geometry(1, 1, 0, 0, 0, 0, 1, 1)),
    Case("tf-same", 1, 8, 16, 8, 10, 3, Geometry(2, 2, 0, 1, 0, 1, 1, 1)),
    Case("explicit-padding", 2, 8, 32, 5, 3, 5, Geometry(1, 1, 6, 3, 1, 7, 1, 1)),
    Case("short-chunks", 1, 136, 136, 9, 13, 5, same(5), A10),
]
#: CTAs that walk over several tiles each, with each number of buffers, across pictures and past the last tile.
WALKS = [
    Case("one-cta", 2, 136, 40, 9, 13, 3, same(3), cut=Cut(128, 1, 8, False, 2, False, 1)),
    Case("w_pw-kept", 2, 136, 72, 9, 13, 3, same(3), cut=Cut(64, 1, 13, True, 3, True, 2)),
    Case("a-step-a-tile", 3, 24, 40, 7, 9, 3, same(3), cut=Cut(64, 1, 5, True, 4, True, 2)),
    Case("two-steps-a-tile", 3, 40, 136, 14, 17, 5, same(5), cut=Cut(64, 2, 9, True, 2, True, 3)),
    Case("rows-of-warps", 2, 72, 16, 17, 19, 3, same(3), cut=Cut(128, 4, 16, False, 3, True, 1)),
    Case("all-row-warps", 2, 24, 32, 31, 29, 3, same(3), cut=Cut(64, 8, 29, True, 2, True, 1)),
    Case("stride2", 3, 72, 24, 13, 15, 3, same(3, 2), cut=Cut(64, 1, 4, True, 4, True, 2)),
    Case("k5-stride2", 3, 136, 16, 15, 13, 5, same(5, 2), cut=Cut(64, 1, 7, False, 2, False, 2)),
    Case("padding-alone", 3, 8, 16, 2, 3, 5, Geometry(1, 1, 9, 8, 7, 8, 1, 1), cut=Cut(64, 1, 4, True, 3, True, 2)),
]


def ids(case: Case) -> str:
    return case.name


class Inputs(NamedTuple):
    x: Tensor
    w_dw: Tensor
    w_pw: Tensor
    bias: Optional[Tensor] = None
    residual: Optional[Tensor] = None
    prologue: emulated.Affine = emulated.Affine()
    middle: emulated.Affine = emulated.Affine()
    epilogue: emulated.Affine = emulated.Affine()


def draw(case: Case, kind: str, activation: int = 0, everything: bool = False, seed: int = 0) -> Inputs:
    torch.manual_seed(seed)
    dtype = KINDS[kind]
    x = torch.randn(case.n, case.c_in, case.h, case.w).to(dtype)
    w_dw = torch.randn(case.c_in, 1, case.k, case.k).to(dtype)
    w_pw = torch.randn(case.c_out, case.c_in, 1, 1).to(dtype)
    if not everything:
        return Inputs(x, w_dw, w_pw)
    p, q = case.geometry.output_size(case.h, case.w, case.k, case.k)

    def affine(channels: int, vector_type: torch.dtype) -> emulated.Affine:
        scale, shift = torch.randn(2, channels).to(vector_type)
        return emulated.Affine(scale, shift, activation, 0.3)

    return Inputs(
        x, w_dw, w_pw, torch.randn(case.c_out), torch.randn(case.n, case.c_out, p, q).to(dtype),
        affine(case.c_in, torch.float32), affine(case.c_in, dtype), affine(case.c_out, torch.float32),
    )  # fmt: skip


def shape_of(case: Case) -> emulated.ConvShape:
    g = case.geometry
    p, q = g.output_size(case.h, case.w, case.k, case.k)
    return emulated.ConvShape(
        case.n, case.h, case.w, case.c_in, p, q, case.c_in, case.k, case.k, g.stride_h, g.stride_w, g.pad_top,
        g.pad_left, 1, 1,
    )  # fmt: skip


def plan_of(library: emulated.Library, case: Case, dtype: torch.dtype) -> emulated.SeparablePlan:
    plan = emulated.SeparablePlan()
    if case.cut is not None:
        cut = (ctypes.c_int * 7)(*case.cut)
        assert library.lib.emulate_cut_separable_fprop(
            ctypes.byref(shape_of(case)), case.c_out, dtype.itemsize, ctypes.byref(cut), ctypes.byref(plan)
        )
        return plan
    device = emulated.Device(1, case.shared)
    library.lib.emulate_plan_separable_fprop(
        ctypes.byref(shape_of(case)), case.c_out, dtype.itemsize, 1, ctypes.byref(device), ctypes.byref(plan)
    )
    return plan


class Outputs(NamedTuple):
    y: Tensor  # NCHW
    statistics: Tensor  # [tiles, 3, C_out], empty where not asked for
    counts: Tensor  # [tiles], likewise
    x_pre: Optional[Tensor]  # NCHW, beside an addend


def fprop(
    library: emulated.Library, case: Case, kind: str, a: Inputs, statistics: bool = False,
    addend: Optional[Tensor] = None,
) -> Outputs:  # fmt: skip
    shape, plan = shape_of(case), plan_of(library, case, a.x.dtype)
    assert plan.fused, "the planner would not run this case fused"
    x, w_dw, w_pw = emulated.nhwc(a.x), emulated.Guarded.of(a.w_dw), emulated.Guarded.of(a.w_pw)
    residual = None if a.residual is None else emulated.nhwc(a.residual)
    y = emulated.Guarded((case.n, shape.p, shape.q, case.c_out), a.x.dtype)
    tiles = plan.tiles if statistics else 0
    partials = emulated.Guarded((tiles, 3, case.c_out), torch.float32)
    counts = torch.empty(tiles, dtype=torch.int32)
    other = None if addend is None else emulated.nhwc(addend)
    x_pre = None if addend is None else emulated.Guarded((case.n, case.h, case.w, case.c_in), a.x.dtype)
    library.call("emulate_separable_fprop", emulated.SeparableFprop(
        shape, plan, emulated.TYPES[a.x.dtype], case.c_out, int(kind == "tf32"),
        x.tensor.data_ptr(), *(None if g is None else g.tensor.data_ptr() for g in (other, x_pre)),
        *(g.tensor.data_ptr() for g in (w_dw, w_pw)), None if residual is None else residual.tensor.data_ptr(),
        y.tensor.data_ptr(), *((t.data_ptr() if statistics else None) for t in (partials.tensor, counts)),
        emulated.vector(a.bias), a.prologue.raw(), a.middle.raw(), a.epilogue.raw(),
    ))  # fmt: skip
    written = None if x_pre is None else x_pre.check().permute(0, 3, 1, 2)
    return Outputs(y.check().permute(0, 3, 1, 2), partials.check(), counts, written)


def aten_args(case: Case, a: Inputs, dtype: torch.dtype) -> SeparableArgs:
    def to(t: Optional[Tensor]) -> Optional[Tensor]:
        return t if t is None or dtype != torch.float64 else t.double()

    affines = (a.prologue, a.middle, a.epilogue)
    (scale_p, shift_p), (scale_m, shift_m), (scale_e, shift_e) = ((to(f.scale), to(f.shift)) for f in affines)
    return SeparableArgs(
        a.x.to(dtype), a.w_dw.to(dtype), a.w_pw.to(dtype), to(a.bias), to(a.residual), scale_p, shift_p, scale_m,
        shift_m, scale_e, shift_e, list(case.geometry), [f.activation for f in affines], [f.alpha for f in affines],
    )  # fmt: skip


def pytorch(case: Case, kind: str, a: Inputs) -> Tensor:
    """PyTorch's own composition; for tf32 its second convolution as a GPU that may use TF32 multiplies it."""
    args = aten_args(case, a, KINDS[kind])
    if kind != "tf32":
        return ATEN.separable_forward(args)
    z = ATEN.depthwise(args.x, args.w_dw, args.prologue, args.middle, case.geometry)
    plain = args._replace(
        x=round_to_tf32(z), w_dw=torch.ones(case.c_in, 1, 1, 1), w_pw=round_to_tf32(args.w_pw), scale_p=None,
        shift_p=None, scale_m=None, shift_m=None, geometry=[1, 1, 0, 0, 0, 0, 1, 1],
        activations=[0, 0, args.activations[2]],
    )  # fmt: skip
    return ATEN.separable_forward(plain)


def assert_close(name: str, ours: Tensor, theirs: Tensor, truth: Tensor) -> None:
    """At most twice PyTorch's own error at the same type, and an ulp of the largest result (8 in float32)."""
    ulp = torch.finfo(theirs.dtype).eps * float(truth.abs().max())
    allowed = 2 * float((theirs.double() - truth).abs().max()) + ulp * (8 if theirs.dtype == torch.float32 else 1)
    error = float((ours.double() - truth).abs().max())
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def check(library: emulated.Library, case: Case, kind: str, a: Inputs) -> None:
    ours = fprop(library, case, kind, a).y
    truth = ATEN.separable_forward(aten_args(case, a, torch.float64))
    assert_close("y", ours, pytorch(case, kind, a), truth)


@pytest.mark.parametrize("case", [*CASES, *WALKS], ids=ids)
@pytest.mark.parametrize("kind", KINDS)
def test_forward(library: emulated.Library, case: Case, kind: str) -> None:
    check(library, case, kind, draw(case, kind))


@pytest.mark.parametrize("case", [CASES[0], CASES[5], CASES[7], CASES[13], WALKS[1], WALKS[2]], ids=ids)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_with_everything(library: emulated.Library, case: Case, kind: str) -> None:
    """Bias, residual, all three affines with ReLU; the middle's vectors in the type of x, the others float32."""
    check(library, case, kind, draw(case, kind, activation=1, everything=True))


@pytest.mark.parametrize("case", [CASES[0], *WALKS], ids=ids)
@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("affine", [False, True], ids=["alone", "affine"])
def test_relu_in_front(library: emulated.Library, case: Case, kind: str, affine: bool) -> None:
    """In 16 bits it has code of its own, alone and behind a BatchNorm."""
    inputs = draw(case, kind)
    scale, shift = (torch.randn(case.c_in), torch.randn(case.c_in)) if affine else (None, None)
    check(library, case, kind, inputs._replace(prologue=emulated.Affine(scale, shift, 1)))


@pytest.mark.parametrize("activation", range(len(ACTIVATIONS)), ids=ACTIVATIONS)
def test_activations(library: emulated.Library, activation: int) -> None:
    check(library, CASES[5], "fp32", draw(CASES[5], "fp32", activation, everything=True, seed=activation))


def test_division_by_multiplication(library: emulated.Library) -> None:
    """At multiples of the divisor and beside them, up to the largest numbers that are divided."""
    most, draw = 2**31 - 1, random.Random(0).randrange
    divisors = [*range(1, 100), most, most - 1, 2**30, 2**30 + 1, *(draw(1, 2**k) for k in range(2, 32))]
    for divisor in divisors:
        quotients = [0, 1, most // divisor, *(draw(most // divisor + 1) for _ in range(5))]
        for i in {q * divisor + beside for q in quotients for beside in (-1, 0, 1)}:
            if 0 <= i <= most:
                assert library.lib.emulate_quotient(i, divisor) == i // divisor, (i, divisor)


def test_where_shared_memory_is_scarce(library: emulated.Library) -> None:
    """w_pw is then loaded for each tile anew."""
    case = CASES[-1]
    scarce, enough = (plan_of(library, case._replace(shared=shared), torch.bfloat16) for shared in (A10, H100))
    assert not scarce.keeps_w_pw and enough.keeps_w_pw
    assert scarce.shared_bytes <= A10 < enough.shared_bytes <= H100


def test_walks_reach_every_way_of_the_pipeline(library: emulated.Library) -> None:
    plans = [plan_of(library, case, torch.bfloat16) for case in WALKS]
    assert {(p.halos, bool(p.keeps_w_pw)) for p in plans} == {(2, False), (2, True), (3, True), (4, True)}
    assert {p.row_warps for p in plans} == {1, 2, 4, 8} and {p.chunk_bytes for p in plans} == {64, 128}
    assert {p.channel_warps for p in plans} == {1, 2, 3} and all(p.tiles > p.workers for p in plans)
    assert {1, 2, 3, 5} <= {p.chunks for p in plans}
    assert any(p.tiles % p.workers for p in plans), "some CTA ends before the others"


def check_statistics(found: Outputs) -> None:
    emulated.check_statistics(found.y, found.statistics, found.counts)


@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[7], CASES[10], *WALKS], ids=ids)
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_statistics(library: emulated.Library, case: Case, kind: str) -> None:
    check_statistics(fprop(library, case, kind, draw(case, kind), statistics=True))


@pytest.mark.parametrize("case", [CASES[7], WALKS[1]], ids=ids)
def test_statistics_where_squares_would_cancel(library: emulated.Library, case: Case) -> None:
    """Mean 100, standard deviation about 0.1: sums of y and y^2 in float32 lose the variance here."""
    epilogue = emulated.Affine(torch.full((case.c_out,), 0.1), torch.full((case.c_out,), 100.0))
    a = draw(case, "bf16")._replace(epilogue=epilogue)
    check_statistics(fprop(library, case, "bf16", a, statistics=True))


JOINED = [(case, "bf16", True) for case in (CASES[0], CASES[2], CASES[6], CASES[7], CASES[9], CASES[10])]
JOINED += [(CASES[7], kind, with_vectors) for kind in KINDS for with_vectors in (False, True)]
JOINED += [(case, "bf16", True) for case in WALKS[:6]]


@pytest.mark.parametrize(
    "case, kind, with_vectors",
    dict.fromkeys(JOINED),
    ids=lambda v: v.name if isinstance(v, Case) else v if isinstance(v, str) else ("raw", "normalised")[v],
)
def test_an_addend_joins_before_the_activation(
    library: emulated.Library, case: Case, kind: str, with_vectors: bool
) -> None:
    """y = pw(dw(relu(x_pre))) with x_pre = scale x + shift + addend, every element of it written, by one tile."""
    a = draw(case, kind)
    scale, shift = torch.randn(2, case.c_in)
    addend = torch.randn_like(a.x)
    prologue = emulated.Affine(scale, shift, 1) if with_vectors else emulated.Affine(activation=1)
    a = a._replace(prologue=prologue)
    found = fprop(library, case, kind, a, statistics=True, addend=addend)
    assert found.x_pre is not None and not found.x_pre.isnan().any()

    def joined(dtype: torch.dtype) -> Tensor:
        u = a.x.to(dtype)
        if with_vectors:
            u = u * scale.to(dtype)[:, None, None] + shift.to(dtype)[:, None, None]
        return u + addend.to(dtype)

    assert_close("x_pre", found.x_pre, joined(a.x.dtype), joined(torch.float64))
    again = a._replace(x=found.x_pre, prologue=emulated.Affine(activation=1))
    truth = ATEN.separable_forward(aten_args(case, again, torch.float64))
    assert_close("y", found.y, pytorch(case, kind, again), truth)
    check_statistics(found)


def test_an_error_carries_the_kernel_and_the_whole_problem(library: emulated.Library) -> None:
    params = emulated.SeparableFprop(shape_of(CASES[1]), emulated.SeparablePlan(), 2, CASES[1].c_out)
    words = r"separable_fprop_kernel is not made for bfloat16 x \[1, 40, 17, 15\], depthwise filter 3 x 3 .* 24 outputs"
    with pytest.raises(RuntimeError, match=words):
        library.call("emulate_separable_fprop", params)


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[6], *WALKS[:4]], ids=ids)
def test_same_bits_for_any_order_of_threads(case: Case) -> None:
    """Seeds shuffle the threads between barriers and collectives; nothing may depend on it."""
    a = draw(case, "bf16", activation=1, everything=True)
    path = emulated.build("separable")
    results = [fprop(emulated.Library(path, seed), case, "bf16", a, statistics=True) for seed in (1, 2, 3)]
    for other in results[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(other[:3], results[0][:3]))


def test_nan_of_a_pixel_stays_in_its_window(library: emulated.Library) -> None:
    """A NaN in x reaches the outputs whose window holds it, and no others."""
    case = CASES[7]
    a = draw(case, "bf16")
    a.x[1, 3, 2, 4] = float("nan")
    y = fprop(library, case, "bf16", a).y
    expected = torch.zeros(case.n, case.h, case.w, dtype=torch.bool)
    expected[1, 1:4, 3:6] = True
    assert torch.equal(y.isnan().any(1), expected)
    assert torch.equal(y.isnan().all(1), expected)


def check_not_finite(library: emulated.Library, case: Case, kind: str, value: float) -> None:
    a = draw(case, kind)
    a.x[0, 3, 2, 2] = value
    a.x[0, case.c_in - 1, case.h - 1, case.w - 1] = -value
    for middle in (emulated.Affine(), emulated.Affine(torch.ones(case.c_in), torch.ones(case.c_in))):
        b = a._replace(middle=middle)
        ours, theirs = fprop(library, case, kind, b).y, pytorch(case, kind, b)
        for what in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(what(ours), what(theirs)), what
        assert bool(ours.isfinite().any()) and bool(ours.isinf().any()) == (value == value)


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[6], CASES[7]], ids=ids)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
def test_what_is_not_finite(library: emulated.Library, case: Case, kind: str, value: float) -> None:
    """On tensor cores the depthwise multiplies the channels beside an infinite one by zeros, which is NaN."""
    check_not_finite(library, case, kind, value)
