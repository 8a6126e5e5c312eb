"""The chain's forward ops against float64: raw outputs, statistics of what was rounded, pool, global average."""

from __future__ import annotations

from typing import Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.chain.support import DTYPES, WAY_IDS, WAYS, affine, hold, image, last, layer, same, vector
from xsep.activations import activate
from xsep.backends.chain import Load
from xsep.ops.training import bn_finalize, bn_pool_add, bn_relu_gap, calls, pw_fprop, sep_fprop
from xsep.problem import IDENTITY, RELU, SILU, Geometry
from xsep.testing import poisoned_memory

each_way = pytest.mark.parametrize("backend, kind", WAYS, ids=WAY_IDS)


def check_partials(partials: Tensor, counts: Tensor, r: Tensor) -> None:
    """Merged in float64 here, they are the statistics of the rounded r. A tile may have no pixel."""
    rows = r.double().permute(0, 2, 3, 1).reshape(-1, r.shape[1])
    n = counts.double()[:, None]
    shift, s, q = partials.double().unbind(1)
    assert int(counts.sum()) == len(rows)
    mean = (n * shift + s).sum(0) / n.sum()
    safe = n.clamp(min=1)
    deviations = (q - s.square() / safe + n * (shift + s / safe - mean).square()).sum(0)
    torch.testing.assert_close(mean, rows.mean(0), rtol=0, atol=1e-6 * float(rows.abs().max()))
    torch.testing.assert_close(deviations / n.sum(), rows.var(0, unbiased=False), rtol=1e-5, atol=1e-12)


@each_way
@pytest.mark.parametrize("geometry", [same(), same(5), same(3, 2), Geometry(2, 2, 0, 1, 0, 1, 1, 1)],
                         ids=["k3", "k5", "dilated", "stride2"])  # fmt: skip
@pytest.mark.parametrize("code", [IDENTITY, RELU, SILU], ids=["identity", "relu", "silu"])
def test_sep_fprop(backend: str, kind: str, geometry: Geometry, code: int) -> None:
    dtype, k = DTYPES[kind], 5 if geometry == same(5) else 3
    for vec in (None, vector(19, dtype)):
        x = image(3, 19, 11, 13, vec, dtype)
        w_dw, w_pw = (torch.randn(s).to(dtype) for s in ((19, 1, k, k), (37, 19, 1, 1)))
        with poisoned_memory():
            f = sep_fprop(x, vec, None, code, 0.0, w_dw, w_pw, geometry, backend=backend)
        u = activate(affine(x.double(), vec), code, 0.0)
        own = layer(activate(affine(x, vec).to(dtype), code, 0.0), w_dw, w_pw, geometry)
        hold("r", f.r, layer(u, w_dw.double(), w_pw.double(), geometry), own, dtype)
        assert f.x_pre is None and f.partials is not None and f.counts is not None
        check_partials(f.partials, f.counts, f.r)
        none = sep_fprop(x, vec, None, code, 0.0, w_dw, w_pw, geometry, False, backend)
        assert none.partials is None and none.counts is None and torch.equal(none.r, f.r)


@each_way
@pytest.mark.parametrize("with_vec", [False, True], ids=["raw", "normalised"])
def test_residual_prologue_writes_the_sum(backend: str, kind: str, with_vec: bool) -> None:
    dtype = DTYPES[kind]
    x, t, vec = last(2, 21, 6, 7, dtype=dtype), last(2, 21, 6, 7, dtype=dtype), vector(21, dtype) if with_vec else None
    w_dw, w_pw = torch.randn(21, 1, 3, 3).to(dtype), torch.randn(70, 21, 1, 1).to(dtype)
    f = sep_fprop(x, vec, t, RELU, 0.0, w_dw, w_pw, same(), backend=backend)
    assert f.x_pre is not None and f.x_pre.dtype == dtype
    hold("x_pre", f.x_pre, affine(x.double(), vec) + t.double(), (affine(x, vec) + t).to(dtype), dtype)
    again = layer(f.x_pre.double().relu(), w_dw.double(), w_pw.double(), same())
    hold("r", f.r, again, layer(f.x_pre.relu(), w_dw, w_pw, same()), dtype)


@pytest.mark.parametrize("backend", ["aten", "cpu"])
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_statistics_where_sums_of_squares_fail(backend: str, kind: str) -> None:
    """Mean 100, deviation 0.1: the variance from float32 sums of r and r^2 is wrong in its first digit."""
    c, dtype = 16, DTYPES[kind]
    x = (100 + 0.1 * last(4, c, 13, 11)).to(dtype)
    w_dw, w_pw = torch.zeros(c, 1, 3, 3, dtype=dtype), torch.eye(c, dtype=dtype)[:, :, None, None]
    w_dw[:, :, 1, 1] = 1
    f = sep_fprop(x, None, None, IDENTITY, 0.0, w_dw, w_pw, same(), backend=backend)
    assert torch.equal(f.r, x) and f.partials is not None and f.counts is not None
    rows = f.r.permute(0, 2, 3, 1).reshape(-1, c)
    exact = rows.double().var(0, unbiased=False)
    naive = rows.float().square().mean(0) - rows.float().mean(0).square()
    assert float(((naive - exact) / exact).abs().max()) > 0.01
    vec, (_, mean), invstd, count = bn_finalize(f.partials, f.counts, eps=1e-12, backend=backend)
    assert int(count) == rows.shape[0]
    torch.testing.assert_close(mean.double(), rows.double().mean(0), rtol=1e-7, atol=0)
    torch.testing.assert_close(invstd.double().square().reciprocal(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(vec[0], invstd, rtol=1e-6, atol=0)


@each_way
@pytest.mark.parametrize("code", [IDENTITY, RELU], ids=["identity", "relu"])
def test_pw_fprop_of_every_second_pixel(backend: str, kind: str, code: int) -> None:
    dtype = DTYPES[kind]
    vec = vector(13, dtype)
    x, w = image(2, 13, 11, 9, vec, dtype), torch.randn(29, 13, 1, 1).to(dtype)
    f = pw_fprop(x[:, :, ::2, ::2], Load(vec, code), w, backend=backend)
    truth = F.conv2d(activate(affine(x.double(), vec), code, 0.0), w.double(), stride=2)
    own = F.conv2d(activate(affine(x, vec).to(dtype), code, 0.0), w, stride=2)
    hold("r", f.r, truth, own, dtype)
    assert f.partials is not None and f.counts is not None
    check_partials(f.partials, f.counts, f.r)


@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
@pytest.mark.parametrize("affine_wanted", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("kind", ["fp64", "fp32"])
def test_finalize_is_batch_norm(momentum: Optional[float], affine_wanted: bool, kind: str) -> None:
    """Vectors and running statistics of nn.BatchNorm2d in float64, over three batches."""
    dtype, tolerance = DTYPES[kind], 1e-12 if kind == "fp64" else 2e-6
    bn = nn.BatchNorm2d(37, eps=1e-3, momentum=momentum, affine=affine_wanted).double()
    gamma = beta = None
    if affine_wanted:
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
        gamma, beta = bn.weight.detach().to(dtype), bn.bias.detach().to(dtype)
        bn.weight.data.copy_(gamma)
        bn.bias.data.copy_(beta)
    running_mean, running_var = torch.zeros(37, dtype=dtype), torch.ones(37, dtype=dtype)
    batches = torch.tensor(0)
    for _ in range(3):
        r = (last(3, 37, 9, 7) * 2 + 5).to(dtype)
        expected = bn(r.double()).detach()
        vec, (mean, centre), invstd, count = bn_finalize(
            *calls.statistics(r), gamma, beta, running_mean, running_var, batches, momentum, 1e-3
        )
        assert int(count) == 3 * 9 * 7 and vec.dtype == mean.dtype == invstd.dtype == dtype
        assert torch.equal(mean, centre)
        torch.testing.assert_close(affine(r.double(), vec), expected, rtol=tolerance, atol=5 * tolerance)
    assert bn.running_mean is not None and bn.running_var is not None and batches == bn.num_batches_tracked == 3
    torch.testing.assert_close(running_mean.double(), bn.running_mean, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(running_var.double(), bn.running_var, rtol=tolerance, atol=tolerance)


def torch_pool(u: Tensor, padding: str) -> Tensor:
    """3x3 of stride 2, padded by one on every side, or as TensorFlow's SAME does."""
    if padding == "torch":
        return F.max_pool2d(u, 3, 2, 1)
    pads = [side for size in (u.shape[3], u.shape[2]) for side in ((0, 1) if size % 2 == 0 else (1, 1))]
    return F.max_pool2d(F.pad(u, pads, value=-torch.inf), 3, 2)


def starts(padding: str, h: int, w: int) -> tuple[int, int]:
    return (1, 1) if padding == "torch" else (h % 2, w % 2)


SIZES = [(10, 10), (9, 11), (10, 7), (3, 2), (1, 4)]


@each_way
@pytest.mark.parametrize("padding", ["torch", "same"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_pool_and_add(backend: str, kind: str, padding: str, size: tuple[int, int]) -> None:
    dtype, (h, w) = DTYPES[kind], size
    r, s = last(2, 13, h, w, dtype=dtype), last(2, 13, (h + 1) // 2, (w + 1) // 2, dtype=dtype)
    vec, vec_s = vector(13, dtype), vector(13, dtype)
    with poisoned_memory():
        t, index, chosen = bn_pool_add(r, vec, s, vec_s, starts(padding, h, w), backend)
    truth = torch_pool(affine(r.double(), vec), padding) + affine(s.double(), vec_s)
    own = torch_pool(affine(r, vec).to(dtype), padding) + affine(s, vec_s).to(dtype)
    hold("t", t, truth, own, dtype)
    # What was chosen is in the window, at the tap that the index names, and gives the pooled value.
    padded = F.pad(r, (1, 2, 1, 2))
    top, left = starts(padding, h, w)
    for k in range(9):
        i, j = k // 3 + 1 - top, k % 3 + 1 - left
        view = padded[:, :, i : i + 2 * t.shape[2] - 1 : 2, j : j + 2 * t.shape[3] - 1 : 2]
        assert torch.equal(chosen[index == k], view[index == k])
    assert int(index.max()) <= 8
    hold("chosen", affine(chosen.double(), vec), torch_pool(affine(r.double(), vec), padding), None, wide32(dtype))


def wide32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("backend", ["aten", "cpu"])
def test_pool_spreads_a_nan_as_pytorch_does(backend: str) -> None:
    r = last(1, 3, 8, 8, dtype=torch.float32)
    r[0, 1, 3, 3] = torch.nan
    one = torch.stack([torch.ones(3), torch.zeros(3)])
    t, _, _ = bn_pool_add(r, one, torch.zeros(1, 3, 4, 4), one, (1, 1), backend)
    assert torch.equal(t.isnan(), F.max_pool2d(r, 3, 2, 1).isnan()) and bool(t.isnan().any())


@each_way
def test_global_average(backend: str, kind: str) -> None:
    dtype = DTYPES[kind]
    vec = vector(13, dtype)
    r = image(3, 13, 7, 5, vec, dtype)
    f, positive, total = bn_relu_gap(r, vec, backend)
    u = affine(r.double(), vec)
    hold("f", f, u.relu().mean((2, 3)), affine(r, vec).to(dtype).relu().mean((2, 3)), dtype)
    assert f.dtype == dtype and torch.equal(positive.double(), (u > 0).sum((2, 3)).double())
    truth = (r.double() * (u > 0)).sum((2, 3))
    hold("total", total, truth, None, wide32(dtype), float(r.double().abs().sum((2, 3)).max()))


@each_way
@pytest.mark.parametrize("code", [IDENTITY, RELU], ids=["identity", "relu"])
def test_apply(backend: str, kind: str, code: int) -> None:
    dtype, vec = DTYPES[kind], vector(13, DTYPES[kind])
    x, t = last(2, 13, 6, 5, dtype=dtype), last(2, 13, 6, 5, dtype=dtype)
    for residual in (None, t):
        y = calls.apply(x, Load(vec, code), residual, backend)
        u = affine(x.double(), vec) + (0 if residual is None else residual.double())
        own = affine(x, vec).to(dtype) + (0 if residual is None else residual)
        hold("y", y, activate(u, code, 0.0), activate(own, code, 0.0), dtype)


def test_runs_are_the_same_bit_for_bit() -> None:
    x, w_dw, w_pw = last(3, 8, 19, 9, dtype=torch.float32), torch.randn(8, 1, 3, 3), torch.randn(24, 8, 1, 1)
    first, second = (sep_fprop(x, None, None, RELU, 0.0, w_dw, w_pw, same()) for _ in range(2))
    for a, b in zip(first[:3], second[:3]):
        assert a is not None and b is not None and torch.equal(a, b)


def test_running_statistics_count_as_changed(backend: str) -> None:
    """As PyTorch's do: who saved them for a backward must not go on with other values."""
    mean, var, batches = torch.zeros(5), torch.ones(5), torch.tensor(0)
    scale = torch.rand(5, requires_grad=True)
    y = (scale * mean + scale * var).sum()
    r, version = last(2, 5, 4, 4, dtype=torch.float32), batches._version
    bn_finalize(*calls.statistics(r), None, None, mean, var, batches, backend=backend)
    assert float(var[0]) != 1.0 and batches == 1 and batches._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_empty_batch_has_no_tiles() -> None:
    w_dw, w_pw = torch.randn(8, 1, 3, 3), torch.randn(4, 8, 1, 1)
    f = sep_fprop(torch.zeros(0, 8, 5, 5), None, None, RELU, 0.0, w_dw, w_pw, same())
    assert f.r.shape == (0, 4, 5, 5) and f.partials is not None and f.counts is not None
    assert f.partials.shape == (0, 3, 4) and int(f.counts.sum()) == 0
