"""The ops of the training chain in Triton's interpreter: statistics, their merge, and the prologue with a residual."""

from __future__ import annotations

from typing import Optional

import pytest
import torch
from torch import Tensor, nn

from xsep.activations import activate
from xsep.backends import triton_launch as launch
from xsep.ops.training import batch_norm_finalize, separable_fprop_statistics
from xsep.problem import IDENTITY, RELU, SILU, Geometry
from xsep.reference import depthwise

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
def test_forward_and_statistics(dtype: torch.dtype, geometry: Geometry, with_vec: bool, code: int) -> None:
    x, w_dw, w_pw = last(3, 19, 7, 9).to(dtype), torch.randn(19, 1, 3, 3).to(dtype), torch.randn(37, 19, 1, 1).to(dtype)
    vec = torch.stack([torch.randn(19), torch.randn(19)]) if with_vec else None
    r, partials, counts, x_pre = separable_fprop_statistics(x, vec, None, code, 0.0, w_dw, w_pw, geometry)
    assert x_pre is None and partials is not None and counts is not None
    expected, _ = truth(x, vec, None, code, w_dw, w_pw, geometry)
    ulp = torch.finfo(dtype).eps * float(expected.abs().max())
    # z is rounded once to the type of the matrix units before 19 of it are summed.
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
@pytest.mark.parametrize("k", [3, 5])
def test_residual_prologue_writes_the_sum(dtype: torch.dtype, k: int) -> None:
    geometry = Geometry(1, 1, k // 2, k // 2, k // 2, k // 2, 1, 1)
    x, t = last(2, 21, 6, 7).to(dtype), torch.randn(2, 21, 6, 7).to(dtype)
    w_dw, w_pw = torch.randn(21, 1, k, k).to(dtype), torch.randn(70, 21, 1, 1).to(dtype)
    vec = torch.stack([torch.randn(21), torch.randn(21)])
    r, _, _, x_pre = separable_fprop_statistics(x, vec, t, RELU, 0.0, w_dw, w_pw, geometry)
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
    w_dw, w_pw = torch.zeros(c, 1, 3, 3, dtype=dtype), torch.eye(c, dtype=dtype)[:, :, None, None]
    w_dw[:, :, 1, 1] = 1
    r, partials, counts, _ = separable_fprop_statistics(x, None, None, IDENTITY, 0.0, w_dw, w_pw, SAME)
    assert partials is not None and counts is not None
    rows = r.permute(0, 2, 3, 1).reshape(-1, c)
    assert torch.equal(r, x)
    exact = rows.double().var(0, unbiased=False)
    naive = rows.float().square().mean(0) - rows.float().mean(0).square()
    assert float(((naive - exact) / exact).abs().max()) > 0.01
    vec, mean, invstd, count = batch_norm_finalize(partials, counts, torch.ones(c), torch.zeros(c), eps=1e-12)
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
        batches += 1
        vec, mean, invstd, count = batch_norm_finalize(
            *partials_of(r, tile), bn.weight.detach().float(), bn.bias.detach().float(), running_mean, running_var,
            batches, momentum, 1e-3,
        )  # fmt: skip
        assert int(count) == 3 * 9 * 7
        torch.testing.assert_close(mean.double(), r.double().mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
        u = vec[0].double()[:, None, None] * r.double() + vec[1].double()[:, None, None]
        torch.testing.assert_close(u, expected.detach(), rtol=1e-5, atol=1e-5)
        assert bool((invstd > 0).all())
    torch.testing.assert_close(running_mean.double(), bn.running_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(running_var.double(), bn.running_var, rtol=1e-6, atol=1e-6)


def test_ranks_gathered_are_the_whole_batch() -> None:
    r = torch.randn(5, 11, 6, 6) * 3 - 40
    whole = batch_norm_finalize(*partials_of(r, 32), torch.ones(11), torch.zeros(11))
    ranks = [partials_of(part, 32) for part in (r[:2], r[2:])]
    gathered = batch_norm_finalize(
        torch.cat([p for p, _ in ranks]), torch.cat([n for _, n in ranks]), torch.ones(11), torch.zeros(11)
    )
    for a, b in zip(whole, gathered):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


def test_runs_are_the_same_bit_for_bit() -> None:
    x, w_dw, w_pw = last(3, 8, 9, 9), torch.randn(8, 1, 3, 3), torch.randn(24, 8, 1, 1)
    first = separable_fprop_statistics(x, None, None, RELU, 0.0, w_dw, w_pw, SAME)
    second = separable_fprop_statistics(x, None, None, RELU, 0.0, w_dw, w_pw, SAME)
    for a, b in zip(first[:3], second[:3]):
        assert a is not None and b is not None and torch.equal(a, b)
    assert first[1] is not None and first[2] is not None
    partials, counts, ones, zeros = first[1], first[2], torch.ones(24), torch.zeros(24)
    once, again = (batch_norm_finalize(partials, counts, ones, zeros) for _ in range(2))
    for a, b in zip(once, again):
        assert torch.equal(a, b)


def test_empty_batch_has_no_tiles() -> None:
    w_dw, w_pw = torch.randn(8, 1, 3, 3), torch.randn(4, 8, 1, 1)
    r, partials, counts, _ = separable_fprop_statistics(last(0, 8, 5, 5), None, None, RELU, 0.0, w_dw, w_pw, SAME)
    assert r.shape == (0, 4, 5, 5) and partials is not None and counts is not None
    assert partials.shape == (0, 3, 4) and int(counts.sum()) == 0


def test_opcheck() -> None:
    x, w_dw, w_pw = last(2, 5, 6, 6), torch.randn(5, 1, 3, 3), torch.randn(4, 5, 1, 1)
    forward = torch.ops.xsep.separable_fprop_statistics.default
    vec = torch.randn(2, 5)
    torch.library.opcheck(forward, (x, vec, torch.randn_like(x), RELU, 0.0, w_dw, w_pw, list(SAME), True))
    torch.library.opcheck(forward, (x, None, None, RELU, 0.0, w_dw, w_pw, list(HALF), False))
    partials, counts = partials_of(torch.randn(2, 4, 6, 6), 16)
    arguments = (partials, counts, torch.ones(4), torch.zeros(4), torch.zeros(4), torch.ones(4), None, 0.1, 1e-5)
    torch.library.opcheck(torch.ops.xsep.batch_norm_finalize.default, arguments)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(w_dw=torch.zeros(10, 1, 3, 3)), "w_dw must be"),
        (dict(geometry=Geometry(3, 3, 1, 1, 1, 1, 1, 1)), "strides up to 2"),
        (dict(residual=torch.zeros(2, 5, 6, 6), geometry=HALF), "needs stride 1"),
        (dict(residual=torch.zeros(2, 5, 6, 5)), "residual must be like x"),
    ],
    ids=["multiplier", "stride", "residual_stride", "residual_shape"],
)
def test_what_the_chain_does_not_take(change: dict[str, object], words: str) -> None:
    good: dict[str, object] = dict(
        x=last(2, 5, 6, 6), vec=None, residual=None, activation=RELU, alpha=0.0, w_dw=torch.randn(5, 1, 3, 3),
        w_pw=torch.randn(4, 5, 1, 1), geometry=SAME,
    )  # fmt: skip
    with pytest.raises(ValueError, match=words):
        separable_fprop_statistics(**{**good, **change})  # type: ignore[arg-type]


def test_finalize_wants_what_momentum_none_needs() -> None:
    partials, counts = partials_of(torch.randn(2, 4, 6, 6), 16)
    with pytest.raises(ValueError, match="batches"):
        batch_norm_finalize(partials, counts, torch.ones(4), torch.zeros(4), momentum=None)
    with pytest.raises(ValueError, match="come together"):
        batch_norm_finalize(partials, counts, torch.ones(4), torch.zeros(4), torch.zeros(4))
    assert launch.STATISTICS_GROUPS & (launch.STATISTICS_GROUPS - 1) == 0
