"""The training chain's backward in Triton's interpreter: what ``tests/chain`` holds every backend to, and more."""

from __future__ import annotations

import copy
import zlib
from dataclasses import replace
from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.chain import test_backward_ops as backward
from tests.chain.support import DTYPES, affine, hold, image, last, layer, same, vector, wide
from tests.chain.test_layers import NETWORKS, step
from tests.conftest import NIGHTLY
from xsep.activations import activate
from xsep.backends import chain_triton
from xsep.backends.chain import RawGradient, Shortcut
from xsep.ops.training import bn_backward_finalize, bn_dgrad, bn_finalize, calls, sep_backward
from xsep.problem import IDENTITY, RELU, SILU, Geometry
from xsep.testing import poisoned_memory

KINDS = ("fp32", "bf16", "fp16")
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(zlib.crc32(request.node.name.encode()))


def held(case: backward.Case) -> dict[str, Tensor]:
    """All that a layer's backward gives, within the rule."""
    own, truth = case.by_autograd(case.dtype), case.by_autograd(torch.float64)
    with poisoned_memory():
        found = sep_backward(**case.arguments(), backend="triton")._asdict()
    assert found["sums"].dtype == found["dw_dw"].dtype == found["dw_pw"].dtype == torch.float32
    assert found["dx"].dtype == case.dtype
    for what, expected in truth.items():
        hold(what, found[what], expected, own[what], case.dtype, case.sums_size if what == "sums" else 0.0)
    return found


#: Of the 16-bit types, what runs every time.
HALF = [("bf16", "activated-shortcut"), ("bf16", "half-shortcut"), ("fp16", "pool-same"), ("fp16", "strided")]


@pytest.mark.parametrize(
    "kind, name", [(k, n) for k in KINDS for n in backward.CASES if k == "fp32" or (k, n) in HALF or NIGHTLY]
)
def test_layer(kind: str, name: str) -> None:
    held(backward.Case(DTYPES[kind], *backward.CASES[name]))


class Sized(backward.Case):
    """A layer of any size; its shortcut is full and one of two operands is x itself."""

    def __init__(
        self, dtype: torch.dtype, c: int, c_out: int, size: tuple[int, int, int], filters: tuple[int, int],
        g: Geometry, code: int = RELU, short: bool = True,
    ) -> None:  # fmt: skip
        n, h, w = size
        self.code, self.geometry, self.dtype = code, g, dtype
        self.vec = vector(c, dtype)
        self.x = image(n, c, h, w, self.vec, dtype)
        self.w_dw = torch.randn(c, 1, *filters).to(dtype)
        self.w_pw = (0.3 * torch.randn(c_out, c, 1, 1)).to(dtype)
        p, q = g.output_size(h, w, *filters)
        r = layer(activate(affine(self.x.double(), self.vec), code, 0.0), self.w_dw.double(), self.w_pw.double(), g)
        self.r = r.contiguous(memory_format=torch.channels_last).to(dtype)
        self.coef, self.pads, self.index = backward.coefficients(c_out, dtype), (0, 0), None
        self.du = last(n, c_out, p, q, dtype=dtype)
        self.dense = self.du.double()
        self.shortcut = Shortcut(last(n, c, h, w, dtype=dtype), False) if short else None
        self.operands = [self.x, last(n, c, h, w, dtype=dtype) + 3]
        self.centres = torch.cat([torch.full((1, c), torch.nan), 0.1 * torch.randn(2, c)]).to(wide(dtype))


def strided(stride: tuple[int, int], dilation: tuple[int, int], pads: tuple[int, int, int, int]) -> Geometry:
    return Geometry(*stride, *pads, *dilation)


SIZED: dict[str, tuple[Any, ...]] = {
    "fp32-blocks": ("fp32", 70, 90, (2, 5, 4), (3, 3), same()),
    "bf16-blocks": ("bf16", 136, 152, (2, 6, 5), (3, 3), same()),
    "fp16-one-channel": ("fp16", 1, 1, (2, 5, 3), (3, 3), same()),
    "fp32-one-pixel": ("fp32", 5, 3, (3, 1, 1), (3, 3), same()),
    "bf16-k5": ("bf16", 24, 16, (2, 7, 9), (5, 5), same(5)),
    "fp32-k5-strided": ("fp32", 9, 7, (2, 7, 8), (5, 5), strided((2, 2), (1, 1), (2, 2, 2, 2))),
    "fp32-k7": ("fp32", 6, 5, (1, 8, 9), (7, 7), same(7)),
    "fp32-k7-strided": ("fp32", 6, 5, (1, 9, 8), (7, 7), strided((2, 2), (1, 1), (3, 3, 3, 3))),
    "fp32-rectangular": ("fp32", 7, 6, (2, 8, 9), (2, 4), strided((1, 2), (1, 3), (1, 4, 2, 0))),
    "fp32-strided-dilated": ("fp32", 7, 6, (2, 9, 9), (3, 3), strided((2, 2), (2, 2), (2, 2, 2, 2))),
    "fp32-silu": ("fp32", 7, 6, (2, 5, 6), (3, 3), same(), SILU),
    "bf16-linear": ("bf16", 7, 6, (2, 5, 6), (3, 3), same(), IDENTITY, False),
}


#: The others are the same kernels at other constants.
EVERY_TIME = [n for n in SIZED if NIGHTLY or n not in ("fp32-k7", "fp32-silu", "fp32-k5-strided", "fp32-one-pixel")]


@pytest.mark.parametrize("name", EVERY_TIME)
def test_sizes_filters_and_strides(name: str) -> None:
    kind, *rest = SIZED[name]
    held(Sized(DTYPES[kind], *rest))


@pytest.mark.parametrize(
    "name, fused", [("half-shortcut", True), ("half-shortcut", False), ("pool-torch", True), ("pool-torch", False)][
        : 4 if NIGHTLY else 2
    ], ids=lambda v: {True: "z-on-chip", False: "z-apart"}.get(v, v),
)  # fmt: skip
def test_both_plans_in_slices(name: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three pictures, two at a time: partial sums of all slices, operands, shortcuts and taps of the right pictures."""
    plan = chain_triton.backward_plan

    def chosen(*arguments: Any) -> Any:
        return replace(plan(*arguments), wgrad_fused=fused, wgrad_slice=2, dgrad_slice=2)

    monkeypatch.setattr(chain_triton, "backward_plan", chosen)
    held(backward.Case(torch.float32, *backward.CASES[name]))


def test_one_op_is_the_two_and_runs_are_the_same_bit_for_bit() -> None:
    """``test_layer`` there compares sep_backward with its two parts, of the very same inputs."""
    backward.test_layer("triton", "bf16", "pool-same")


@pytest.mark.parametrize("wanted", [(True, False, False), (False, False, True)][: 2 if NIGHTLY else 1], ids=str)
def test_only_what_is_wanted(wanted: tuple[bool, bool, bool]) -> None:
    backward.test_only_what_is_wanted("triton", wanted)


def test_the_masks_of_forward_and_backward_are_one() -> None:
    """u within rounding of zero: the shift of a channel is the negated product of one of its pixels, rounded."""
    c = 16
    r = torch.randn(2, c, 9, 8).contiguous(memory_format=torch.channels_last)
    scale = 0.5 + torch.rand(c)
    shift = -(scale * r[0].flatten(1)[torch.arange(c), torch.randint(72, (c,))])
    load = backward.Load(torch.stack([scale, shift]), RELU)
    w_dw = torch.zeros(c, 1, 3, 3)
    w_dw[:, :, 1, 1] = 1
    w_pw, coef = torch.eye(c)[:, :, None, None], torch.tensor([[1.0], [0.0], [0.0]]).expand(3, c).contiguous()
    out = calls.sep_fprop(r, load.vec, None, RELU, 0.0, w_dw, w_pw, same(), False, "triton").r
    dr = RawGradient(torch.ones_like(r), r, coef)
    dx, _, _ = backward.sep_dgrad(dr, w_pw, w_dw, r, load, same(), backend="triton")
    assert torch.equal(dx > 0, out > 0)
    assert torch.equal(calls.apply(r, load, None, "triton") > 0, out > 0)
    du, _ = calls.apply_backward(torch.ones_like(r), r, load, None, [], None, "triton")
    assert torch.equal(du > 0, out > 0)


@each_kind
@pytest.mark.parametrize("batch", [True, False], ids=["batch", "fixed"])
def test_batch_norm_backward(kind: str, batch: bool) -> None:
    backward.test_batch_norm_backward("triton", kind, batch)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_hostile_mean(kind: str) -> None:
    """Mean 100, deviation 0.1: statistics, sums and dr as nn.BatchNorm2d's backward has them, all on this backend."""
    dtype = DTYPES[kind]
    r, du = (100 + 0.1 * last(4, 8, 13, 11)).to(dtype), last(4, 8, 13, 11, dtype=dtype)
    gamma, truth = torch.randn(8), {}
    for precision in (torch.float64, torch.float32):
        x = r.to(precision).requires_grad_()
        y = F.batch_norm(x, None, None, gamma.to(precision), None, True)
        truth[precision] = torch.autograd.grad(y, x, du.to(precision))[0]
    partials, counts = calls.statistics(r, "triton")
    _, centres, invstd, count = bn_finalize(partials, counts, gamma, backend="triton")
    _, sums = calls.apply_backward(du, r, backward.Load(), None, [r], centres, "triton")
    coef, _, _ = bn_backward_finalize(sums, centres[1], invstd, gamma, count, backend="triton")
    hold("dr", bn_dgrad(du, r, coef, "triton"), truth[torch.float64], truth[torch.float32], dtype)


@each_kind
def test_pw_backward(kind: str) -> None:
    backward.test_pw_backward("triton", kind)


@each_kind
def test_global_average_backward(kind: str) -> None:
    backward.test_global_average_backward("triton", kind)


@each_kind
@pytest.mark.parametrize("code", [IDENTITY, RELU], ids=["identity", "relu"])
@pytest.mark.parametrize("joined", [False, True], ids=["alone", "joined"])
def test_apply_backward(kind: str, code: int, joined: bool) -> None:
    backward.test_apply_backward("triton", kind, code, joined)


@pytest.mark.parametrize("operands", [0, 2])
def test_sums_of_no_and_of_two_operands(operands: int) -> None:
    x, g = last(3, 70, 9, 8, dtype=torch.float32), last(3, 70, 9, 8, dtype=torch.float32)
    others = [last(3, 70, 9, 8, dtype=torch.float32), x][:operands]
    centres = torch.randn(1 + operands, 70) if operands else None
    load = backward.Load(vector(70, torch.float32), SILU)
    found, plain = (calls.apply_backward(g, x, load, g, others, centres, b) for b in ("triton", "aten"))
    for a, b in zip(found, plain):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("padding", ["torch", "same"])
@pytest.mark.parametrize("size", [(10, 10), (9, 7)], ids=["even", "odd"])
def test_ties_in_the_pool_go_where_pytorch_sends_them(padding: str, size: tuple[int, int]) -> None:
    backward.test_ties_in_the_pool_go_where_pytorch_sends_them("triton", padding, size)


@pytest.mark.parametrize("name", ["middle", "down-odd", "down-even-same", "three"][: 4 if NIGHTLY else 2])
def test_networks(name: str) -> None:
    """Chained on this backend against the plain one: output, every gradient, running statistics."""
    make, (_, c, h, w) = NETWORKS[name]
    ours = make().float()
    for m in ours.modules():
        if hasattr(m, "backend"):
            m.backend = "triton"
    plain = copy.deepcopy(ours)
    for m in plain.modules():
        if hasattr(m, "backend"):
            m.backend = "aten"
    x = last(2, c, h - 6, w - 6, dtype=torch.float32)
    with torch.no_grad():
        g = torch.randn_like(copy.deepcopy(plain).eval()(x))
    found, expected = (step(m, x, g) for m in (ours, plain))
    assert found.keys() == expected.keys()
    for what, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(found[what], value, rtol=2e-3, atol=2e-3 * float(value.abs().max()), msg=what)


def test_opcheck() -> None:
    """Schemas, fakes and strides, of every op whose kernels are new."""
    ops: Any = torch.ops.xsep
    case = backward.Case(torch.float32, *backward.CASES["half-shortcut"])
    x, r, du, coef, load = case.x, case.r, case.du, case.coef, case.arguments()["load"]
    short: Optional[Shortcut] = case.shortcut
    assert short is not None
    raw: tuple[Any, ...] = (du, None, r, coef, [])
    layer_of = (
        *raw, case.w_pw, case.w_dw, x, *load, list(case.geometry), short.g, short.activated, case.operands,
        case.centres,
    )  # fmt: skip
    vec, g = vector(11, torch.float32), torch.randn(3, 11)
    half = x[:, :, ::2, ::2].contiguous(memory_format=torch.channels_last)
    small = last(3, 17, 5, 4, dtype=torch.float32)
    for op, arguments in {
        ops.chain_sep_backward: (*layer_of, [True, True, True]),
        ops.chain_pw_backward: (small, small, coef, case.w_pw, x[:, :, ::2, ::2], vec, RELU, 0.0),
        ops.chain_pw_fprop: (x[:, :, ::2, ::2], vec, RELU, 0.0, case.w_pw, True),
        ops.chain_statistics: (r,),
        ops.chain_bn_pool_add: (x, vec, half, vec, [1, 1]),
        ops.chain_bn_relu_gap: (x, vec),
        ops.chain_bn_relu_gap_backward: (g, x, vec, vec[0], g, g),
        ops.chain_apply: (x, vec, RELU, 0.0, x),
        ops.chain_apply_backward: (x, x, vec, RELU, 0.0, None, [x], case.centres[:2]),
        ops.chain_bn_dgrad: (du, r, coef),
        ops.chain_bn_backward_finalize: (vec, vec[0], vec[1], None, torch.tensor(9.0).double(), True),
    }.items():
        torch.library.opcheck(op.default, (*arguments, "triton"), test_utils=("test_schema", "test_faketensor"))
