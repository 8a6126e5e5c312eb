"""The training chain's CUDA operators between the convolutions, run by the emulator, against float64.

Called as the backend calls them, so that its handling of layouts is tested with them.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.chain.support import affine, hold, image, last, vector
from tests.chain.test_backward_ops import coefficients
from tests.chain.test_forward_ops import starts, torch_pool
from xsep.activations import activate
from xsep.backends import chain_cuda_launch as launch
from xsep.backends.aten import ATEN
from xsep.backends.chain import Load, RawGradient, Shortcut
from xsep.backends.chain_aten import ATEN_CHAIN, gradient_sums, input_gradient
from xsep.backends.chain_cuda import CUDA_CHAIN
from xsep.backends.cuda import DeviceFacts, device_facts
from xsep.problem import ACTIVATIONS, IDENTITY, RELU, SILU, Affine, Geometry, Problem

from . import emulated
from .emulated_ops import SMALL, EmulatedOps, misaligned

pytestmark = pytest.mark.skipif(emulated.missing_tools() is not None, reason=str(emulated.missing_tools()))

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
#: 16-byte vectors, several slices of channels, and one channel a thread.
CHANNELS = [24, 13]
each_kind = pytest.mark.parametrize("kind", DTYPES)
each_width = pytest.mark.parametrize("c", CHANNELS)


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest, operators: EmulatedOps) -> None:
    torch.manual_seed(zlib.crc32(request.node.name.encode()))
    operators.on(SMALL)


def wide_load(load: Load) -> Load:
    return load._replace(vec=None if load.vec is None else load.vec.double())


def gradient_of(c: int, dtype: torch.dtype, pool: str, size: tuple[int, int, int] = (2, 10, 9)) -> RawGradient:
    n, h, w = size
    r, coef = last(n, c, h, w, dtype=dtype), coefficients(c, dtype)
    if not pool:
        return RawGradient(last(n, c, h, w, dtype=dtype), r, coef)
    du = last(n, c, (h + 1) // 2, (w + 1) // 2, dtype=dtype)
    pads = starts(pool, h, w)
    ones = torch.ones(2, c)
    return RawGradient(du, r, coef, ATEN_CHAIN.bn_pool_add(r, vector(c, dtype), du, ones, pads)[1], pads)


@each_kind
@each_width
@pytest.mark.parametrize("pool", ["", "torch", "same"])
def test_raw_gradient(kind: str, c: int, pool: str, size: tuple[int, int, int] = (2, 10, 9)) -> None:
    dtype = DTYPES[kind]
    dr = gradient_of(c, dtype, pool, size)
    truth = ATEN_CHAIN.formed(dr._replace(du=dr.du.double(), r=dr.r.double(), coef=dr.coef.double()))
    hold("dr", launch.raw_gradient(dr), truth, ATEN_CHAIN.formed(dr), dtype)


#: Pictures of which a thread has several pixels: of the same one, and of one some pictures on.
WALKED = {"large": (3, 29, 31), "small": (390, 2, 3)}


@pytest.mark.parametrize("size", WALKED.values(), ids=WALKED)
def test_threads_walk_from_pixel_to_pixel(size: tuple[int, int, int]) -> None:
    test_raw_gradient("bf16", 24, "same", size)
    n, h, w = size
    test_pool_add("bf16", 24, "torch", (4 * h, 2 * w), n)
    test_input_gradient("bf16", 24, RELU, "half", "xo", False, size)


def check_statistics(r: Tensor, partials: Tensor, counts: Tensor) -> None:
    """Merged in float64 they are the statistics of r; every pixel is counted once, in tiles of 128."""
    rows = r.permute(0, 2, 3, 1).reshape(-1, r.shape[1]).double()
    centre, s, q = partials.double().unbind(1)
    n = counts.double()[:, None]
    assert counts.tolist() == [len(tile) for tile in rows.split(128)]
    mean = (n * (centre + s / n)).sum(0) / n.sum()
    m2 = (q - s.square() / n + n * (centre + s / n - mean).square()).sum(0)
    torch.testing.assert_close(mean, rows.mean(0), rtol=0, atol=1e-6 * float(rows.abs().max()))
    torch.testing.assert_close(m2, (rows - rows.mean(0)).square().sum(0), rtol=2e-6, atol=1e-30)


@each_kind
@each_width
def test_statistics(kind: str, c: int) -> None:
    r = last(3, c, 11, 9, dtype=DTYPES[kind])
    check_statistics(r, *launch.tile_statistics(r))


def test_statistics_in_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MOST_TILES", 1)
    r = last(3, 13, 11, 9, dtype=torch.float32)
    check_statistics(r, *launch.tile_statistics(r))


def test_statistics_where_squares_would_cancel() -> None:
    r = (100 + 0.1 * last(3, 520, 7, 9)).bfloat16()  # more channels than one CTA has
    check_statistics(r, *launch.tile_statistics(r))


@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
@pytest.mark.parametrize("c", [13, 70])
def test_finalize_is_batch_norm(c: int, momentum: Optional[float]) -> None:
    """Vectors, running statistics and the backward's coefficients of nn.BatchNorm2d in float64, over two batches."""
    bn = nn.BatchNorm2d(c, eps=1e-3, momentum=momentum).double()
    gamma, beta = torch.randn(c), torch.randn(c)
    bn.weight.data.copy_(gamma)
    bn.bias.data.copy_(beta)
    running_mean, running_var, batches = torch.zeros(c), torch.ones(c), torch.tensor(0)
    for pictures in (1, 40):
        r = 5 + 2 * last(pictures, c, 9, 13, dtype=torch.float32)
        x = r.double().requires_grad_()
        expected = bn(x)
        partials, counts = ATEN_CHAIN.statistics(r)
        # As from a rank that had no picture.
        partials, counts = torch.cat([partials, torch.zeros(1, 3, c)]), torch.cat([counts, counts[:1] * 0])
        vec, (mean, centre), invstd, count = CUDA_CHAIN.bn_finalize(
            partials, counts, gamma, beta, running_mean, running_var, batches, momentum, 1e-3
        )
        assert int(count) == pictures * 9 * 13 and torch.equal(mean, centre)
        torch.testing.assert_close(affine(r.double(), vec), expected.detach(), rtol=2e-6, atol=1e-5)
        du = last(*r.shape, dtype=torch.float32)
        dx, dgamma, dbeta = torch.autograd.grad(expected, [x, bn.weight, bn.bias], du.double())
        sums = torch.stack([du.sum((0, 2, 3)), (du * (r - mean[:, None, None])).sum((0, 2, 3))])
        coef, ours_gamma, ours_beta = CUDA_CHAIN.bn_backward_finalize(sums, mean, invstd, gamma, count, True)
        dr = launch.raw_gradient(RawGradient(du, r, coef))
        for ours, exact in ((dr, dx), (ours_gamma, dgamma), (ours_beta, dbeta)):
            torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=2e-5 * float(exact.abs().max()))
        fixed, *_ = CUDA_CHAIN.bn_backward_finalize(sums, mean, invstd, None, count, False)
        assert torch.equal(fixed, torch.stack([invstd, invstd * 0, invstd * 0]))
    assert bn.running_mean is not None and bn.running_var is not None and batches == 2
    torch.testing.assert_close(running_mean.double(), bn.running_mean, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(running_var.double(), bn.running_var, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("tiles", [1, 9, 70, 5000])
def test_finalize_of_many_tiles(tiles: int) -> None:
    """More than a thread has on their way at a time, and than one CTA merges; some without a picture, holding NaN."""
    c = 37
    centres, counts = 50 + torch.randn(tiles, c), torch.randint(1, 129, (tiles,), dtype=torch.int32)
    sums = 0.1 * torch.randn(tiles, c)
    squares = torch.rand(tiles, c) + sums.square()
    partials = torch.stack([centres, sums, squares], 1)
    if tiles > 1:
        counts[3::4], partials[3::4] = 0, torch.nan
    _, (_, mean), invstd, count = CUDA_CHAIN.bn_finalize(partials, counts, None, None, None, None, None, 0.1, 1e-3)
    there = counts > 0
    n = counts[there].double()[:, None]
    k, s, q = (t[there].double() for t in (centres, sums, squares))
    total = n.sum()
    exact = (n * k + s).sum(0) / total
    variance = (q + 2 * (k - exact) * s + n * (k - exact).square()).sum(0) / total
    assert float(count) == float(total)
    torch.testing.assert_close(mean.double(), exact, rtol=1e-7, atol=0)
    torch.testing.assert_close(invstd.double(), (variance + 1e-3).rsqrt(), rtol=1e-6, atol=0)


def test_finalize_of_views() -> None:
    """As they come of a gather over ranks, or of a larger tensor."""
    partials, counts = torch.rand(3, 13, 5).transpose(1, 2)[:, :3], torch.tensor([9, 7, 5])
    vectors = torch.rand(13, 6).t()
    sums, count = torch.rand(13, 2).t(), torch.tensor(21.0)
    for ours, theirs in (
        (CUDA_CHAIN.bn_finalize(partials, counts, vectors[0], vectors[1], None, None, None, 0.1, 1e-3),
         ATEN_CHAIN.bn_finalize(partials, counts, vectors[0], vectors[1], None, None, None, 0.1, 1e-3)),
        (CUDA_CHAIN.bn_backward_finalize(sums, vectors[2], vectors[3], vectors[4], count, True),
         ATEN_CHAIN.bn_backward_finalize(sums, vectors[2], vectors[3], vectors[4], count, True)),
    ):  # fmt: skip
        for mine, exact in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.double(), exact.double(), rtol=1e-5, atol=1e-5)


def test_variance_that_float32_sums_would_lose() -> None:
    """Mean 100 and deviation 0.1, from the kernels' own statistics, without gamma, beta and running statistics."""
    r = 100 + 0.1 * last(5, 16, 9, 13, dtype=torch.float32)
    _, (_, mean), invstd, _ = CUDA_CHAIN.bn_finalize(
        *CUDA_CHAIN.statistics(r), None, None, None, None, None, 0.1, 1e-12
    )
    exact = r.double().var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(mean.double(), r.double().mean((0, 2, 3)), rtol=1e-7, atol=0)
    torch.testing.assert_close(invstd.double().square().reciprocal(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("code", range(len(ACTIVATIONS)), ids=ACTIVATIONS)
@pytest.mark.parametrize("joined", [False, True], ids=["alone", "joined"])
def test_apply(code: int, joined: bool) -> None:
    for kind, c in (("fp32", 13), ("bf16", 24)) if code == RELU else (("fp32", 24),):
        dtype = DTYPES[kind]
        load = Load(vector(c, dtype), code, 0.3)
        x = image(2, c, 5, 7, load.vec, dtype)
        residual = last(2, c, 5, 7, dtype=dtype) if joined else None
        exact = None if residual is None else residual.double()
        truth = ATEN_CHAIN.apply(x.double(), wide_load(load), exact)
        hold("y", launch.apply_load(x, load, residual), truth, ATEN_CHAIN.apply(x, load, residual), dtype)


#: Activation, shortcut, operands (x: the image itself), with a residual.
JOINTS = [
    (RELU, "", "x", False), (RELU, "full", "x", False), (RELU, "half", "xo", False),
    (RELU, "half-activated", "o", False), (RELU, "full-activated", "", False), (SILU, "full", "oo", False),
    (IDENTITY, "", "ox", False), (RELU, "", "x", True),
]  # fmt: skip


@each_kind
@each_width
@pytest.mark.parametrize("code, short, others, joined", JOINTS, ids=lambda v: str(v))
def test_input_gradient(
    kind: str, c: int, code: int, short: str, others: str, joined: bool, size: tuple[int, int, int] = (2, 7, 9)
) -> None:
    dtype, (n, h, w) = DTYPES[kind], size
    load = Load(vector(c, dtype), code)
    x, e = image(n, c, h, w, load.vec, dtype), last(n, c, h, w, dtype=dtype)
    residual = (0.05 * affine(x.double(), load.vec)).to(dtype) if joined else None  # of u's own sign
    shortcut: Optional[Shortcut] = None
    if short:
        shortcut = Shortcut(last(*x[:, :, :: 2 if "half" in short else 1, :: 2 if "half" in short else 1].shape,
                                 dtype=dtype), "activated" in short)  # fmt: skip
    operands = [x if o == "x" else last(*x.shape, dtype=dtype) + 3 for o in others]
    centres = torch.cat([torch.full((1, c), torch.nan), 3 + 0.1 * torch.randn(len(others), c)])

    def by_pytorch(kind: torch.dtype) -> Tensor:
        vec = load.vec if load.vec is None else load.vec.to(torch.promote_types(kind, torch.float32))
        u = affine(x.to(kind), vec) + (0 if residual is None else residual.to(kind))
        exact = shortcut if shortcut is None else shortcut._replace(g=shortcut.g.to(kind))
        return input_gradient(e.to(kind), u, load._replace(vec=vec), exact, kind)

    dx, sums = launch.load_gradient(e, x, load, residual, operands, centres if operands else None, shortcut)
    hold("dx", dx, by_pytorch(torch.float64), by_pytorch(dtype), dtype)
    check_sums(sums, dx, operands, centres)


def check_sums(sums: Tensor, dx: Tensor, operands: Sequence[Tensor], centres: Tensor) -> None:
    """Of dx as it is stored."""
    truth = gradient_sums(dx.double(), [o.double() for o in operands], centres.double())
    terms = [dx.double(), *(dx.double() * (o.double() - m[:, None, None])
                            for o, m in zip(operands, centres.double()[1:]))]  # fmt: skip
    size = float(torch.stack([t.abs().sum((0, 2, 3)) for t in terms]).max())
    hold("sums", sums, truth, gradient_sums(dx, operands, centres), torch.float32, size)


#: Filter, stride, dilation, and what joins as above.
LAYERS = {
    "k3": (3, 1, 1, RELU, "full", "x"), "k3-half": (3, 1, 1, RELU, "half", "xo"),
    "k3-activated": (3, 1, 1, RELU, "half-activated", "oo"), "k3-stride2": (3, 2, 1, RELU, "full-activated", ""),
    "k5-silu": (5, 1, 1, SILU, "half", "o"), "k7-stride2": (7, 2, 1, RELU, "", "x"),
    "dilated": (3, 1, 2, RELU, "half", "ox"),
}  # fmt: skip


@each_kind
@each_width
@pytest.mark.parametrize("name", LAYERS)
def test_depthwise_backward_ends_with_the_epilogue(
    monkeypatch: pytest.MonkeyPatch, operators: EmulatedOps, kind: str, c: int, name: str
) -> None:
    """dx, dw_dw and the sums of two slices of a batch, on fast and general kernels, against float64."""
    operators.on(DeviceFacts(2, 99 * 1024))
    dtype, (k, stride, dilation, code, short, others) = DTYPES[kind], LAYERS[name]
    pad = dilation * (k // 2)
    geometry = Geometry(stride, stride, pad, pad, pad, pad, dilation, dilation)
    load = Load(vector(c, dtype), code)
    x, w_dw = image(3, c, 7, 9, load.vec, dtype), torch.randn(c, 1, k, k).to(dtype)
    dz = last(3, c, *geometry.output_size(7, 9, k, k), dtype=dtype)
    step = 2 if "half" in short else 1
    shortcut = Shortcut(last(*x[:, :, ::step, ::step].shape, dtype=dtype), "activated" in short) if short else None
    operands = [x if o == "x" else last(*x.shape, dtype=dtype) + 3 for o in others]
    centres = torch.cat([torch.full((1, c), torch.nan), 3 + 0.1 * torch.randn(len(others), c)])

    def by_pytorch(kind: torch.dtype) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(kind, torch.float32)
        vec = load.vec if load.vec is None else load.vec.to(wide)
        u = affine(x.to(kind), vec).to(kind)
        act = activate(u, code, 0.0)
        found = ATEN.depthwise_backward_kernel(
            dz.to(kind), act, w_dw.to(kind), Affine(), geometry, (True, True, False, False)
        )
        assert found.dx is not None and found.dw_dw is not None
        exact = shortcut if shortcut is None else shortcut._replace(g=shortcut.g.to(kind))
        return input_gradient(found.dx, u, load._replace(vec=vec), exact, kind), found.dw_dw

    problem = Problem("separable", "cuda", dtype, True, 3, c, 7, 9, 1, k, k, 8, geometry, (code, 0, 0))
    monkeypatch.setattr(launch, "slices", lambda *_: launch.slices_of(3, 2))
    plan = launch.backward_plan.__wrapped__(problem, device_facts(-1))
    if plan is None:
        pytest.skip("xsep's compiled extension is not built")
    layer = launch.InputGradient(x, w_dw, load, geometry, shortcut, operands, centres if operands else None, plan)
    for part in plan.slices:
        layer.add(dz[part], part)
    dw_dw, sums = layer.total()
    truth, own = by_pytorch(torch.float64), by_pytorch(dtype)
    hold("dx", layer.dx, truth[0], own[0], dtype)
    hold("dw_dw", dw_dw, truth[1], own[1], torch.float32, float(truth[1].abs().max()) if dtype == torch.float32 else 0)
    check_sums(sums, layer.dx, operands, centres)


@each_kind
@each_width
@pytest.mark.parametrize("padding", ["torch", "same"])
@pytest.mark.parametrize("size", [(10, 8), (9, 7)], ids=["even", "odd"])
def test_pool_add(kind: str, c: int, padding: str, size: tuple[int, int], n: int = 2) -> None:
    """Values that tie in most windows, and a channel that has none but ties."""
    dtype = DTYPES[kind]
    r = torch.randint(0, 3, (n, c, *size)).to(dtype).contiguous(memory_format=torch.channels_last)
    s = last(n, c, (size[0] + 1) // 2, (size[1] + 1) // 2, dtype=dtype)
    vec, vec_s, pads = torch.randint(-2, 3, (2, c)).float(), vector(c, dtype), starts(padding, *size)
    t, taps, chosen = launch.bn_pool_add(r, vec, s, vec_s, pads)
    best = torch_pool(affine(r.double(), vec), padding)
    hold("t", t, best + affine(s.double(), vec_s), None, dtype)
    _, theirs, at_them = ATEN_CHAIN.bn_pool_add(r, vec, s, vec_s, pads)
    assert torch.equal(taps, theirs) and torch.equal(chosen, at_them)


def test_pool_of_nan_and_infinity() -> None:
    """A NaN wins its window; one of -inf alone has a tap inside the picture."""
    r = last(1, 8, 6, 6).float()
    r[0, 0, 2, 3], r[0, 1] = torch.nan, -torch.inf
    ones = torch.stack([torch.ones(8), torch.zeros(8)])
    t, taps, _ = launch.bn_pool_add(r, ones, torch.zeros(1, 8, 3, 3), ones, (1, 1))
    expected, places = F.max_pool2d(r, 3, 2, 1, return_indices=True)
    torch.testing.assert_close(t, expected, rtol=0, atol=0, equal_nan=True)
    row, column = torch.arange(3)[:, None] * 2 - 1, torch.arange(3) * 2 - 1
    assert torch.equal(taps.long(), (places // 6 - row) * 3 + places % 6 - column)


@each_kind
@each_width
def test_global_average(kind: str, c: int) -> None:
    dtype = DTYPES[kind]
    vec = vector(c, dtype)
    r, g = image(3, c, 7, 5, vec, dtype), torch.randn(3, c).to(dtype)
    pooled, positive, total = launch.bn_relu_gap(r, vec)
    mask = affine(r.double(), vec) > 0
    truth = affine(r.double(), vec).relu().mean((2, 3))
    hold("pooled", pooled, truth, ATEN_CHAIN.bn_relu_gap(r, vec)[0], dtype)
    assert torch.equal(positive.long(), mask.sum((2, 3)))
    hold(
        "total", total, (r.double() * mask).sum((2, 3)), None, torch.float32, float(r.double().abs().sum((2, 3)).max())
    )
    mean = r.float().mean((0, 2, 3))
    du, sums = launch.bn_relu_gap_backward(g, r, vec, mean, positive, total)
    hold("du", du, (g.double() / 35)[:, :, None, None] * mask, None, dtype)
    terms = torch.stack([du.double(), du.double() * (r.double() - mean.double()[:, None, None])])
    size = 4 * float(terms.abs().sum((1, 3, 4)).max())
    hold("sums", sums, terms.sum((1, 3, 4)), None, torch.float32, size)


def test_same_bits_for_any_order_of_threads(operators: EmulatedOps) -> None:
    """Seeds shuffle the threads between barriers, and several CTAs share the work; nothing may depend on it."""
    c = 24
    load = Load(vector(c, torch.bfloat16), RELU)
    x, e = (last(4, c, 9, 8, dtype=torch.bfloat16) for _ in range(2))
    found: list[tuple[Any, ...]] = []
    operators.on(SMALL._replace(multiprocessors=3))
    for seed in (1, 2, 3):
        operators.seed(seed)
        sums = launch.load_gradient(e, x, load, None, [x], torch.zeros(2, c))
        found.append((*sums, *launch.tile_statistics(x), *launch.bn_relu_gap(x, vector(c, torch.bfloat16) * 0 + 1)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0]))


def test_misaligned_images_take_one_channel_a_thread() -> None:
    dr = gradient_of(24, torch.bfloat16, "torch")
    assert dr.taps is not None
    other = dr._replace(du=misaligned(dr.du), r=misaligned(dr.r), taps=misaligned(dr.taps))
    assert torch.equal(launch.form(other), launch.raw_gradient(dr))


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_taps_need_only_their_own_alignment(operators: EmulatedOps, kind: str) -> None:
    """Those of a slice start where its first picture does: here not on 16 bytes, where du and r do."""
    dr = gradient_of(8 if kind == "bf16" else 4, DTYPES[kind], "torch", (2, 9, 9))
    assert dr.taps is not None
    part = launch.part_of(launch.dense(dr), slice(1, 2))
    assert part.taps is not None and part.taps.data_ptr() % 16 and not part.du.data_ptr() % 16
    operators.on(SMALL._replace(multiprocessors=132))
    expected = launch.raw_gradient(dr)[1:]
    emulated.launches(operators.lib)
    assert torch.equal(launch.form(part), expected)
    assert emulated.launches(operators.lib) == [("raw_gradient_kernel", 1, 1)], "256 pixels a CTA, of one vector each"


@pytest.mark.parametrize("kind, c", [("bf16", 12), ("bf16", 4), ("fp32", 4)])
def test_slices_take_the_fast_depthwise_forward(operators: EmulatedOps, kind: str, c: int) -> None:
    """Of channels whose every second picture starts on whole vectors, though not on 16 bytes."""
    dtype, geometry = DTYPES[kind], Geometry(*[1] * 8)
    x, w_dw = last(2, c, 5, 5, dtype=dtype), torch.randn(c, 1, 3, 3).to(dtype)
    emulated.launches(operators.lib)
    whole = CUDA_CHAIN.depthwise(x, Load(None, RELU), w_dw, geometry)
    part = CUDA_CHAIN.depthwise(x[1:], Load(None, RELU), w_dw, geometry)
    assert {found.kernel for found in emulated.launches(operators.lib)} == {"depthwise_fprop_kernel"}
    assert torch.equal(part, whole[1:])
    ones = torch.ones_like(x)
    for pictures in (slice(0, 2), slice(1, 2)):
        torch.ops.xsep.cuda_depthwise_bprop(
            ones[pictures], x[pictures], w_dw, None, None, None, list(geometry), RELU, 0.0, [1, 1, 0, 0]
        )
    kernels = {found.kernel for found in emulated.launches(operators.lib)}
    assert kernels == {"depthwise_bprop_kernel", "sum_bprop_partials_kernel"}


def test_activation_is_the_one_of_every_kernel() -> None:
    """u within rounding of zero has one sign in the load and in its gradient."""
    c = 8
    x = last(1, c, 8, 8).float()
    scale = 0.5 + torch.rand(c)
    for pixel in range(0, 64, 13):
        vec = torch.stack([scale, -(scale * x[0].flatten(1)[:, pixel])])
        y = launch.apply_load(x, Load(vec, RELU), None)
        dx, _ = launch.load_gradient(torch.ones_like(x), x, Load(vec, RELU), None, [], None)
        assert torch.equal(y > 0, dx > 0)
    assert float(activate(torch.tensor(-1.0), RELU, 0.0)) == 0
