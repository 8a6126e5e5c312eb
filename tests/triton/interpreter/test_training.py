"""The forward ops of the training chain in Triton's interpreter: layers, statistics and their merge, and pools."""

from __future__ import annotations

import copy
import functools
from typing import Optional

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from tests.chain import test_forward_ops as forward
from tests.chain.support import DTYPES
from tests.chain.support import last as image_of
from tests.host_waits import HostWaits
from xsep import card_check
from xsep.activations import activate
from xsep.backends import triton_launch as launch
from xsep.backends.chain import Load
from xsep.backends.triton_launch import Launch
from xsep.chain import SeparableChain, SeparableConvBN
from xsep.ops import training
from xsep.ops.training import calls
from xsep.problem import IDENTITY, RELU, SILU, Geometry
from xsep.reference import depthwise

sep_fprop = functools.partial(training.sep_fprop, backend="triton")
bn_finalize = functools.partial(training.bn_finalize, backend="triton")

each_kind = pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16"])
SAME = Geometry(1, 1, 1, 1, 1, 1, 1, 1)
HALF = Geometry(2, 2, 0, 1, 0, 1, 1, 1)


def truth(
    x: Tensor, vec: Optional[Tensor], residual: Optional[Tensor], code: int, w_dw: Tensor, w_pw: Tensor, g: Geometry
) -> tuple[Tensor, Tensor]:
    """(r, x_pre) in float64; x_pre is rounded to x's type before its activation, as it is stored."""
    pre = x.double()
    if vec is not None:
        pre = pre * vec[0].double()[:, None, None] + vec[1].double()[:, None, None]
    if residual is not None:
        pre = (pre + residual.double()).to(x.dtype).double()
    padding = (g.pad_left, g.pad_right, g.pad_top, g.pad_bottom)
    z = depthwise(activate(pre, code, 0.0), w_dw.double(), g.stride, padding, g.dilation)
    return torch.einsum("ncpq,oc->nopq", z, w_pw.double()[:, :, 0, 0]), pre


def last(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("geometry", [SAME, HALF], ids=["same", "half"])
@pytest.mark.parametrize("with_vec", [False, True], ids=["raw", "normalised"])
@pytest.mark.parametrize("code", [IDENTITY, RELU, SILU], ids=["identity", "relu", "silu"])
@pytest.mark.parametrize("c", [19, 24])
def test_forward_and_statistics(dtype: torch.dtype, geometry: Geometry, with_vec: bool, code: int, c: int) -> None:
    x, w_dw, w_pw = last(3, c, 7, 9).to(dtype), torch.randn(c, 1, 3, 3).to(dtype), torch.randn(37, c, 1, 1).to(dtype)
    vec = torch.stack([torch.randn(c), torch.randn(c)]) if with_vec else None
    r, partials, counts, x_pre = sep_fprop(x, vec, None, code, 0.0, w_dw, w_pw, geometry)
    assert x_pre is None and partials is not None and counts is not None
    expected, _ = truth(x, vec, None, code, w_dw, w_pw, geometry)
    ulp = torch.finfo(dtype).eps * float(expected.abs().max())
    # z is rounded once to the type of the matrix units before its channels are summed.
    assert float((r.double() - expected).abs().max()) <= (4 if dtype is torch.float32 else 2) * ulp
    assert int(counts.sum()) == r.shape[0] * r.shape[2] * r.shape[3]
    check_partials(partials, counts, r)


def check_partials(partials: Tensor, counts: Tensor, r: Tensor) -> None:
    """The partials, merged in float64 here, are the statistics of the rounded r."""
    n = counts.double()[:, None]
    shift, s, q = partials.double().unbind(1)
    rows = r.double().permute(0, 2, 3, 1).reshape(-1, r.shape[1])
    mean = (n * shift + s).sum(0) / n.sum()
    deviations = (q - s.square() / n + n * (shift + s / n - mean).square()).sum(0)
    torch.testing.assert_close(mean, rows.mean(0), rtol=0, atol=1e-6 * float(rows.abs().max()))
    torch.testing.assert_close(deviations / n.sum(), rows.var(0, unbiased=False), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k, c", [(3, 21), (5, 21), (3, 24)])
def test_residual_prologue_writes_the_sum(dtype: torch.dtype, k: int, c: int) -> None:
    geometry = Geometry(1, 1, k // 2, k // 2, k // 2, k // 2, 1, 1)
    x, t = last(2, c, 6, 7).to(dtype), torch.randn(2, c, 6, 7).to(dtype)
    w_dw, w_pw = torch.randn(c, 1, k, k).to(dtype), torch.randn(70, c, 1, 1).to(dtype)
    vec = torch.stack([torch.randn(c), torch.randn(c)])
    r, _, _, x_pre = sep_fprop(x, vec, t, RELU, 0.0, w_dw, w_pw, geometry)
    assert x_pre is not None and x_pre.dtype == dtype
    expected, pre = truth(x, vec, t, RELU, w_dw, w_pw, geometry)
    eps = torch.finfo(dtype).eps
    assert float((x_pre.double() - pre).abs().max()) <= 2 * eps * float(pre.abs().max())
    again, _ = truth(x_pre, None, None, RELU, w_dw, w_pw, geometry)
    assert float((r.double() - again).abs().max()) <= 4 * eps * float(expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_where_sums_of_squares_fail(dtype: torch.dtype) -> None:
    """Mean 100, deviation 0.1: the variance from float32 sums of r and r^2 is wrong in its first digit."""
    c = 16
    x = (100 + 0.1 * torch.randn(4, c, 13, 11)).to(dtype).contiguous(memory_format=torch.channels_last)
    x[0, :, 0, 0] = 100.5  # bfloat16 has nothing between 100 and this, and by chance a channel may be 100 everywhere
    w_dw, w_pw = torch.zeros(c, 1, 3, 3, dtype=dtype), torch.eye(c, dtype=dtype)[:, :, None, None]
    w_dw[:, :, 1, 1] = 1
    r, partials, counts, _ = sep_fprop(x, None, None, IDENTITY, 0.0, w_dw, w_pw, SAME)
    assert partials is not None and counts is not None
    rows = r.permute(0, 2, 3, 1).reshape(-1, c)
    assert torch.equal(r, x)
    exact = rows.double().var(0, unbiased=False)
    naive = rows.float().square().mean(0) - rows.float().mean(0).square()
    assert float(((naive - exact) / exact).abs().max()) > 0.01
    vec, (_, mean), invstd, count = bn_finalize(partials, counts, torch.ones(c), torch.zeros(c), eps=1e-12)
    assert int(count) == rows.shape[0]
    torch.testing.assert_close(mean.double(), rows.double().mean(0), rtol=1e-7, atol=0)
    torch.testing.assert_close(invstd.double().square().reciprocal(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(vec[0], invstd, rtol=1e-6, atol=0)


def partials_of(r: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    parts = r.permute(0, 2, 3, 1).reshape(-1, r.shape[1]).split(tile)
    centres = [p.mean(0) for p in parts]
    sums = [torch.stack([k, (p - k).sum(0), (p - k).square().sum(0)]) for p, k in zip(parts, centres)]
    return torch.stack(sums), torch.tensor([len(p) for p in parts], dtype=torch.int32)


@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
@pytest.mark.parametrize("tile", [7, 64], ids=["many_tiles", "few_tiles"])
def test_finalize_is_batch_norm(momentum: Optional[float], tile: int) -> None:
    """Vectors and running statistics of nn.BatchNorm2d in float64, over three batches."""
    bn = nn.BatchNorm2d(37, eps=1e-3, momentum=momentum).double()
    nn.init.normal_(bn.weight)
    nn.init.normal_(bn.bias)
    running_mean, running_var = torch.zeros(37), torch.ones(37)
    batches = torch.tensor(0)
    for _ in range(3):
        r = torch.randn(3, 37, 9, 7) * 2 + 5
        expected = bn(r.double())
        vec, (mean, centre), invstd, count = bn_finalize(
            *partials_of(r, tile), bn.weight.detach().float(), bn.bias.detach().float(), running_mean, running_var,
            batches, momentum, 1e-3,
        )  # fmt: skip
        assert int(count) == 3 * 9 * 7 and torch.equal(mean, centre)
        torch.testing.assert_close(mean.double(), r.double().mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
        u = vec[0].double()[:, None, None] * r.double() + vec[1].double()[:, None, None]
        torch.testing.assert_close(u, expected.detach(), rtol=1e-5, atol=1e-5)
        assert bool((invstd > 0).all())
    assert batches == 3
    torch.testing.assert_close(running_mean.double(), bn.running_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(running_var.double(), bn.running_var, rtol=1e-6, atol=1e-6)


def test_ranks_gathered_are_the_whole_batch() -> None:
    r = torch.randn(5, 11, 6, 6) * 3 - 40
    whole = bn_finalize(*partials_of(r, 32), torch.ones(11), torch.zeros(11))
    ranks = [partials_of(part, 32) for part in (r[:2], r[2:])]
    gathered = bn_finalize(
        torch.cat([p for p, _ in ranks]), torch.cat([n for _, n in ranks]), torch.ones(11), torch.zeros(11)
    )
    for a, b in zip(whole, gathered):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


def test_runs_are_the_same_bit_for_bit() -> None:
    x, w_dw, w_pw = last(3, 8, 9, 9), torch.randn(8, 1, 3, 3), torch.randn(24, 8, 1, 1)
    first = sep_fprop(x, None, None, RELU, 0.0, w_dw, w_pw, SAME)
    second = sep_fprop(x, None, None, RELU, 0.0, w_dw, w_pw, SAME)
    for a, b in zip(first[:3], second[:3]):
        assert a is not None and b is not None and torch.equal(a, b)
    assert first[1] is not None and first[2] is not None
    partials, counts, ones, zeros = first[1], first[2], torch.ones(24), torch.zeros(24)
    once, again = (bn_finalize(partials, counts, ones, zeros) for _ in range(2))
    for a, b in zip(once, again):
        assert torch.equal(a, b)


def test_empty_batch_has_no_tiles() -> None:
    w_dw, w_pw = torch.randn(8, 1, 3, 3), torch.randn(4, 8, 1, 1)
    r, partials, counts, _ = sep_fprop(last(0, 8, 5, 5), None, None, RELU, 0.0, w_dw, w_pw, SAME)
    assert r.shape == (0, 4, 5, 5) and partials is not None and counts is not None
    assert partials.shape == (0, 3, 4) and int(counts.sum()) == 0


def test_opcheck() -> None:
    x, w_dw, w_pw = last(2, 5, 6, 6), torch.randn(5, 1, 3, 3), torch.randn(4, 5, 1, 1)
    forward, vec = torch.ops.xsep.chain_sep_fprop.default, torch.randn(2, 5)
    torch.library.opcheck(forward, (x, vec, RELU, 0.0, torch.randn_like(x), w_dw, w_pw, list(SAME), True, "triton"))
    torch.library.opcheck(forward, (x, None, RELU, 0.0, None, w_dw, w_pw, list(HALF), False, "triton"))
    partials, counts = partials_of(torch.randn(2, 4, 6, 6), 16)
    ones, zeros = torch.ones(4), torch.zeros(4)
    arguments = (partials, counts, ones, zeros, torch.zeros(4), torch.ones(4), None, 0.1, 1e-5, "triton")
    torch.library.opcheck(torch.ops.xsep.chain_bn_finalize.default, arguments)


def test_without_gamma_and_beta() -> None:
    partials, counts = partials_of(torch.randn(2, 4, 6, 6), 16)
    plain, ones = bn_finalize(partials, counts), bn_finalize(partials, counts, torch.ones(4), torch.zeros(4))
    assert all(torch.equal(a, b) for a, b in zip(plain, ones))


def test_filters_that_the_kernels_do_not_take() -> None:
    x, w_dw, w_pw = last(2, 5, 9, 9), torch.randn(5, 1, 3, 3), torch.randn(4, 5, 1, 1)
    with pytest.raises(RuntimeError, match="filters up to 7x7 and strides up to 2"):
        sep_fprop(x, None, None, RELU, 0.0, w_dw, w_pw, Geometry(3, 3, 1, 1, 1, 1, 1, 1))
    with pytest.raises(RuntimeError, match="float64 is not"):
        sep_fprop(x.double(), None, None, RELU, 0.0, w_dw.double(), w_pw.double(), SAME)


def test_a_chain_trains() -> None:
    """Against the plain backend."""
    layers = [SeparableConvBN(a, b, backend="triton") for a, b in ((5, 7), (7, 6))]
    plain = copy.deepcopy(layers)
    for layer in plain:
        layer.conv.backend = "aten"
    ours, theirs = SeparableChain(*layers), SeparableChain(*plain)
    x = last(2, 5, 7, 6)
    while copy.deepcopy(plain[0])(x).abs().min() < 1e-4:
        x = last(2, 5, 7, 6)  # within rounding of the second ReLU's kink either gradient would be right
    assert ours.not_chained_reasons(x) == []
    results = []
    for m in (ours, theirs):
        leaf = x.clone().requires_grad_()
        m(leaf).square().sum().backward()
        results.append([leaf.grad, *(p.grad for p in m.parameters()), *m.buffers()])
    for a, b in zip(*results):
        assert a is not None and b is not None
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_groups_of_the_merge_are_a_power_of_two() -> None:
    assert launch.STATISTICS_GROUPS & (launch.STATISTICS_GROUPS - 1) == 0


@each_kind
@pytest.mark.parametrize("code", [IDENTITY, RELU], ids=["identity", "relu"])
def test_pw_fprop_of_every_second_pixel(kind: str, code: int) -> None:
    forward.test_pw_fprop_of_every_second_pixel("triton", kind, code)


@each_kind
@pytest.mark.parametrize("padding", ["torch", "same"])
@pytest.mark.parametrize("size", forward.SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_pool_and_add(kind: str, padding: str, size: tuple[int, int]) -> None:
    forward.test_pool_and_add("triton", kind, padding, size)


def test_pool_spreads_a_nan_as_pytorch_does() -> None:
    forward.test_pool_spreads_a_nan_as_pytorch_does("triton")


def test_pool_takes_the_tap_that_pytorch_takes() -> None:
    """Windows of ties, of NaN and of -inf alone: taps and values are those of the plain backend, bit for bit."""
    r = torch.randint(-1, 2, (2, 20, 9, 10)).float().contiguous(memory_format=torch.channels_last)
    r[0, :5] = -torch.inf
    r[1, :5, 2:5, 3:6] = torch.nan
    vec = torch.stack([torch.ones(20), torch.zeros(20)])
    s = torch.randn(2, 20, 5, 5)
    ours, plain = (calls.bn_pool_add(r, vec, s, vec, (1, 0), b) for b in ("triton", "aten"))
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@each_kind
def test_global_average(kind: str) -> None:
    forward.test_global_average("triton", kind)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_global_average_shows_what_is_no_number(value: float) -> None:
    r = torch.randn(2, 70, 9, 9).contiguous(memory_format=torch.channels_last)
    r[1, 3, 4, 4] = value
    vec = torch.stack([torch.ones(70), torch.zeros(70)])
    for a, b in zip(*(calls.bn_relu_gap(r, vec, b) for b in ("triton", "aten"))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


@each_kind
@pytest.mark.parametrize("code", [IDENTITY, RELU], ids=["identity", "relu"])
def test_apply(kind: str, code: int) -> None:
    forward.test_apply("triton", kind, code)


@each_kind
def test_statistics_of_a_tensor(kind: str) -> None:
    """Two whole tiles and a short one, of more channels than a program has, mean 100 and deviation 0.1."""
    r = (100 + 0.1 * image_of(3, 70, 10, 9)).to(DTYPES[kind])
    partials, counts = calls.statistics(r, "triton")
    assert counts.tolist() == [128, 128, 14]
    check_partials(partials, counts, r)


def test_empty_batches() -> None:
    none, vec = torch.zeros(0, 4, 5, 5), torch.ones(2, 4)
    partials, counts = calls.statistics(none, "triton")
    assert partials.shape == (0, 3, 4) and counts.shape == (0,)
    half = torch.zeros(0, 4, 3, 3)
    assert [t.shape[0] for t in calls.bn_pool_add(none, vec, half, vec, (1, 1), "triton")] == [0, 0, 0]
    assert [t.shape for t in calls.bn_relu_gap(none, vec, "triton")] == [(0, 4)] * 3
    assert calls.apply(none, Load(vec, RELU), None, "triton").shape == none.shape
    r, p, n, _ = training.pw_fprop(none, Load(vec, RELU), torch.randn(6, 4, 1, 1), backend="triton")
    assert r.shape == (0, 6, 5, 5) and p is not None and n is not None and p.shape == (0, 3, 6) and n.shape == (0,)
    du, sums = calls.bn_relu_gap_backward(vec[:0], none, vec, vec[0], vec[:0], vec[:0], "triton")
    assert du.shape == none.shape and not bool(sums.any())


def test_a_step_does_not_wait_for_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tests/test_host_waits.py has it; what the interpreter does of a launch does not count."""
    run = Launch.run

    def unseen(self: Launch, device: torch.device) -> None:
        with _disable_current_modes():
            run(self, device)

    monkeypatch.setattr(Launch, "run", unseen)
    network, x = card_check.network("triton", torch.float32, "cpu", (8, 16, 24), (2, 11, 10))
    network.chained(True)
    with HostWaits() as waits:
        network(x).square().sum().backward()
    assert not waits.found
    assert {"chain_sep_backward", "chain_bn_pool_add", "chain_pw_backward", "contiguous"} <= waits.seen
