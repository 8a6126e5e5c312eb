"""The CPU's passes over pixels against the same in float64, at every instruction set that this chip has.

A process loads one level, so each level's tests run in a process of their own: this file's, by pytest.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from torch import Tensor

from tests.chain.support import affine, hold, image, last, same, vector
from tests.chain.test_backward_ops import coefficients
from tests.chain.test_forward_ops import check_partials, starts
from xsep import extension
from xsep.activations import activate, gradient_from_input
from xsep.backends.chain import RawGradient
from xsep.backends.chain_aten import ATEN_CHAIN
from xsep.problem import IDENTITY, RELU, SILU
from xsep.testing import poisoned_memory

OPS: Any = torch.ops.xsep
F32 = torch.float32
each_type = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
#: Single vectors and several side by side, whole and in part, at every level.
each_width = pytest.mark.parametrize("c", [1, 13, 64, 150])


@pytest.fixture(autouse=True)
def loaded() -> None:
    assert extension.load_cpu().reason is None


def on_both_numbers_of_threads() -> Iterator[int]:
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            yield threads
    finally:
        torch.set_num_threads(before)


def laid_out(t: Tensor, how: int) -> Tensor:
    """In NHWC, in NCHW, or as every second channel of something larger."""
    if how == 2:
        return torch.stack([t, torch.full_like(t, torch.nan)], 2).flatten(1, 2)[:, ::2]
    return t.contiguous() if how == 1 else t


@each_type
@each_width
@pytest.mark.parametrize("size", [(1, 7), (16, 8), (19, 21)], ids=str)
def test_statistics(dtype: torch.dtype, c: int, size: tuple[int, int]) -> None:
    r = (last(2, c, *size) * 0.1 + 100).to(dtype)
    found: list[tuple[Tensor, Tensor]] = []
    for _ in on_both_numbers_of_threads():
        with poisoned_memory():
            found.append(OPS.cpu_chain_statistics(laid_out(r, len(found))))
    partials, counts = found[0]
    assert counts.dtype == torch.int32 and counts[:-1].eq(128).all() and partials.dtype == F32
    check_partials(partials, counts, r)
    assert all(torch.equal(a, b) for a, b in zip(*found))


@each_type
@each_width
@pytest.mark.parametrize("pool", ["", "torch", "same"])
def test_raw_gradient(dtype: torch.dtype, c: int, pool: str) -> None:
    for how, (h, w) in enumerate([(10, 9), (7, 12), (1, 2)]):
        r, coef = last(2, c, h, w, dtype=dtype), coefficients(c, dtype)
        taps: Optional[Tensor] = None
        du, pads = last(2, c, h, w, dtype=dtype), (0, 0)
        if pool:
            du, pads = last(2, c, (h + 1) // 2, (w + 1) // 2, dtype=dtype), starts(pool, h, w)
            none = torch.zeros_like(du)
            _, taps, _ = OPS.cpu_chain_pool_add(r, vector(c, dtype), none, vector(c, dtype), pads)
        truth = ATEN_CHAIN.formed(RawGradient(du.double(), r.double(), coef.double(), taps, pads))
        own = ATEN_CHAIN.formed(RawGradient(du, r, coef, taps, pads))
        for _ in on_both_numbers_of_threads():
            with poisoned_memory():
                dr = OPS.cpu_chain_raw_gradient(laid_out(du, how), taps, laid_out(r, how), coef, pads)
            hold("dr", dr, truth, own, dtype)


@each_type
@each_width
@pytest.mark.parametrize("short", ["", "full", "half", "activated", "half-activated"])
def test_input_gradient(dtype: torch.dtype, c: int, short: str) -> None:
    for code, operands, (h, w) in ((RELU, 0, (5, 6)), (SILU, 1, (7, 9)), (RELU, 2, (12, 11)), (IDENTITY, 1, (1, 1))):
        vec = vector(c, dtype)
        x, e = image(2, c, h, w, vec, dtype), last(2, c, h, w, dtype=dtype)
        g = last(2, c, (h + 1) // 2, (w + 1) // 2, dtype=dtype) if "half" in short else last(2, c, h, w, dtype=dtype)
        others = [laid_out(last(2, c, h, w, dtype=dtype) + 3, operands) for _ in range(operands)]
        centres = torch.cat([torch.full((1, c), torch.nan), 3 + 0.1 * torch.randn(operands, c)])
        truth = e.double()
        if short:
            step = 2 if "half" in short else 1
            truth[:, :, ::step, ::step] += g.double()
        if "activated" in short:
            truth = gradient_from_input(truth, affine(x.double(), vec), code, 0.0)
        found = []
        for _ in on_both_numbers_of_threads():
            dx = e.clone()
            with poisoned_memory():
                sums = OPS.cpu_chain_input_gradient_(
                    dx, laid_out(g, operands) if short else None, x if "activated" in short else None, vec, code, 0.0,
                    others, centres if others else None,
                )  # fmt: skip
            found.append((dx, sums))
        hold("dx", dx, truth, None, dtype)
        terms = [dx.double()]
        terms += [dx.double() * (o.double() - m[:, None, None]) for o, m in zip(others, centres.double()[1:])]
        size = max(float(t.abs().sum((0, 2, 3)).max()) for t in terms)
        hold("sums", sums, torch.stack([t.sum((0, 2, 3)) for t in terms]), None, F32, size)
        assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize(("n", "h", "w"), [(1, 128, 128), (1, 129, 127), (3, 107, 113)])
def test_sums_of_so_many_pixels_that_groups_have_several_runs(n: int, h: int, w: int) -> None:
    """There are at most 256 groups of runs of 64 pixels; the last ones are short."""
    e, other, centres = last(n, 5, h, w, dtype=F32), last(n, 5, h, w, dtype=F32) + 3, 3 + 0.1 * torch.randn(2, 5)
    found = []
    for _ in on_both_numbers_of_threads():
        with poisoned_memory():
            found.append(
                OPS.cpu_chain_input_gradient_(e.clone(), None, None, None, IDENTITY, 0.0, [other], centres)
            )  # fmt: skip
    terms = [e.double(), e.double() * (other.double() - centres.double()[1, :, None, None])]
    size = max(float(t.abs().sum((0, 2, 3)).max()) for t in terms)
    hold("sums", found[0], torch.stack([t.sum((0, 2, 3)) for t in terms]), None, F32, size)
    assert torch.equal(*found)


@each_type
@pytest.mark.parametrize("code", [IDENTITY, RELU, SILU], ids=["identity", "relu", "silu"])
def test_depthwise_gradient_of_what_is_loaded(dtype: torch.dtype, code: int) -> None:
    """The gradient of act(u), of u, and of x are each other's but for a factor."""
    vec = vector(21, dtype)
    x, dz, w = image(2, 21, 9, 10, vec, dtype), last(2, 21, 9, 10, dtype=dtype), torch.randn(21, 1, 3, 3).to(dtype)
    some = (dz, x, w, *vec, same(), code, 0.0)
    with poisoned_memory():
        of_loaded, dw = OPS.cpu_chain_depthwise_bprop(*some, True)
        of_u, again = OPS.cpu_chain_depthwise_bprop(*some, False)
        of_x, rounded, _, _ = OPS.cpu_depthwise_bprop(*some, (True, True, False, False))
    assert dw.dtype == F32 and torch.equal(dw, again) and torch.equal(dw.to(dtype), rounded)
    u = affine(x.double(), vec)
    padded = torch.nn.functional.conv_transpose2d(dz.double(), w.double(), padding=1, groups=21)
    hold("act(u)", of_loaded, padded, None, dtype)
    hold("u", of_u, gradient_from_input(padded, u, code, 0.0), None, dtype)
    hold("x", of_x, vec[0].double()[:, None, None] * gradient_from_input(padded, u, code, 0.0), None, dtype)


@each_type
@each_width
@pytest.mark.parametrize("padding", ["torch", "same"])
def test_pool_of_whole_numbers_is_the_plain_one_bit_for_bit(dtype: torch.dtype, c: int, padding: str) -> None:
    """Few values, so that windows have several largest ones, and what is not a number in one of them."""
    for how, (h, w) in enumerate([(10, 9), (7, 12), (1, 1)]):
        r = torch.randint(-3, 4, (2, c, h, w)).to(dtype).contiguous(memory_format=torch.channels_last)
        s = torch.randint(-3, 4, (2, c, (h + 1) // 2, (w + 1) // 2)).to(dtype)
        r[0, c // 2, h // 2, w // 2] = torch.nan
        vec, vec_s = (torch.randint(-2, 3, (2, c)).float() for _ in range(2))
        expected = ATEN_CHAIN.bn_pool_add(r, vec, s, vec_s, starts(padding, h, w))
        with poisoned_memory():
            found = OPS.cpu_chain_pool_add(laid_out(r, how), vec, laid_out(s, how), vec_s, starts(padding, h, w))
        for a, b in zip(found, expected):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@each_type
@each_width
@pytest.mark.parametrize("code", [IDENTITY, RELU, SILU], ids=["identity", "relu", "silu"])
def test_apply(dtype: torch.dtype, c: int, code: int) -> None:
    for how, (vec, joined) in enumerate([(vector(c, dtype), True), (vector(c, dtype), False), (None, True)]):
        x, t = last(2, c, 6, 5, dtype=dtype), last(2, c, 6, 5, dtype=dtype)
        with poisoned_memory():
            y = OPS.cpu_chain_apply(laid_out(x, how), vec, code, 0.0, laid_out(t, how) if joined else None)
        u = affine(x.double(), vec) + (t.double() if joined else 0)
        hold("y", y, activate(u, code, 0.0), None, dtype, float(u.abs().max()))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
def test_finalize_of_parameters_in_any_type(kind: torch.dtype, momentum: Optional[float]) -> None:
    partials, counts = OPS.cpu_chain_statistics((100 + 0.1 * last(3, 37, 9, 7)).float())
    partials = torch.cat([partials, torch.zeros(1, 3, 37)])  # of a process that had no picture
    counts = torch.cat([counts, torch.zeros(1, dtype=torch.int32)])
    gamma, beta, mean = (torch.randn(37).to(kind) for _ in range(3))
    var = torch.rand(37).to(kind)
    moved = [[mean.clone(), var.clone(), torch.tensor(6)] for _ in range(2)]
    found = OPS.cpu_chain_bn_finalize(partials, counts, gamma, beta, *moved[0], momentum, 1e-3)
    wide = [t.double() for t in (partials, gamma, beta)]
    running_mean, running_var, batches = moved[1]
    expected = ATEN_CHAIN.bn_finalize(
        wide[0], counts, wide[1], wide[2], running_mean, running_var, batches, momentum, 1e-3
    )  # fmt: skip
    assert moved[0][2] == moved[1][2] == 7
    for a, b in zip((*found, *moved[0][:2]), (*expected, *moved[1][:2])):
        torch.testing.assert_close(a.double(), b.double(), rtol=2 * torch.finfo(a.dtype).eps, atol=1e-5)
    sums = torch.randn(2, 37)
    for batch in (True, False):
        results = OPS.cpu_chain_bn_backward_finalize(sums, found[1][1], found[2], gamma, found[3], batch)
        s, mean, invstd = (t.double() for t in (sums, found[1][1], found[2]))
        for got, truth in zip(
            results, ATEN_CHAIN.bn_backward_finalize(s, mean, invstd, wide[1], found[3], batch)
        ):  # fmt: skip
            torch.testing.assert_close(got.double(), truth, rtol=2e-7, atol=1e-30)


def test_empty_batch() -> None:
    none, vec = torch.zeros(0, 5, 4, 6), torch.ones(2, 5)
    assert OPS.cpu_chain_apply(none, vec, RELU, 0.0, none).shape == none.shape
    partials, counts = OPS.cpu_chain_statistics(none)
    assert partials.shape == (0, 3, 5) and counts.shape == (0,)
    assert OPS.cpu_chain_raw_gradient(none, None, none, torch.ones(3, 5), (0, 0)).shape == none.shape
    dx = none.contiguous(memory_format=torch.channels_last)
    sums = OPS.cpu_chain_input_gradient_(dx, none, None, None, 0, 0.0, [none], torch.ones(2, 5))
    assert torch.equal(sums, torch.zeros(2, 5))
    half = none[:, :, ::2, ::2]
    assert all(t.shape == half.shape for t in OPS.cpu_chain_pool_add(none, vec, half, vec, (1, 1)))


def test_refusals() -> None:
    x, vec, coef = last(2, 5, 4, 6, dtype=F32), torch.ones(2, 5), torch.ones(3, 5)
    half = x[:, :, ::2, ::2]
    calls: list[tuple[Any, tuple[Any, ...], str]] = [
        (OPS.cpu_chain_apply, (x.double(), None, 0, 0.0, None), "take float32, bfloat16 and float16, not Double"),
        (OPS.cpu_chain_apply, (x, torch.ones(2, 4), 0, 0.0, None), r"vec must be \[2, 5\], but is \[2, 4\]"),
        (OPS.cpu_chain_apply, (x, vec, 9, 0.0, None), "unknown activation code 9"),
        (OPS.cpu_chain_apply, (x, vec, 0, 0.0, half), r"residual must be \[2, 5, 4, 6\], but is \[2, 5, 2, 3\]"),
        (OPS.cpu_chain_statistics, (x[:, :0],), r"r must have channels, but is \[2, 0, 4, 6\]"),
        (OPS.cpu_chain_raw_gradient, (half, None, x, coef, (0, 0)), r"du must be \[2, 5, 4, 6\]"),
        (OPS.cpu_chain_raw_gradient, (x, None, x, vec, (0, 0)), r"coef must be \[3, 5\], but is \[2, 5\]"),
        (OPS.cpu_chain_raw_gradient, (half, half, x, coef, (0, 0)), "taps must be a 4-d CPU tensor of Byte"),
        (OPS.cpu_chain_raw_gradient, (half, x.byte(), x, coef, (0, 0)), r"taps must be \[2, 5, 2, 3\]"),
        (OPS.cpu_chain_raw_gradient, (half, half.byte(), x, coef, (0, 2)), r"pads must be two numbers, 0 or 1"),
        (OPS.cpu_chain_pool_add, (x, vec, x, vec, (0, 0)), r"s must be \[2, 5, 2, 3\], but is \[2, 5, 4, 6\]"),
        (OPS.cpu_chain_input_gradient_, (x.contiguous(), None, None, None, 0, 0.0, [], None), "e must lie in NHWC"),
        (OPS.cpu_chain_input_gradient_, (x, x[:1], None, None, 0, 0.0, [], None), r"shortcut must be \[2, 5, 2, 3\]"),
        (OPS.cpu_chain_input_gradient_, (x, None, None, None, 0, 0.0, [x], None), "operands need centres"),
        (OPS.cpu_chain_input_gradient_, (x, None, None, None, 0, 0.0, [x], coef), r"centres must be \[2, 5\]"),
        (OPS.cpu_chain_bn_finalize, (torch.ones(3, 2, 5), torch.ones(3, dtype=torch.int32), *[None] * 5, 0.1, 1e-5),
         r"partials must be \[3, 3, C\]"),
        (OPS.cpu_chain_bn_finalize, (torch.ones(3, 3, 5), torch.ones(3, dtype=torch.int32), *[None] * 4, torch.ones(2),
                                     0.1, 1e-5), r"batches must be one int64 on the CPU, but is \[2\] Float"),
        (OPS.cpu_chain_bn_backward_finalize, (vec, vec[0], vec[0, :4], None, torch.ones(()).double(), True),
         r"invstd must be \[5\]"),
    ]  # fmt: skip
    for op, arguments, words in calls:
        with pytest.raises((RuntimeError, TypeError), match=words):
            op(*arguments)


def _levels() -> list[str]:
    module = extension.binding()
    return [] if module is None else module.cpu_levels_here()


@pytest.mark.parametrize("level", [level for level in _levels() if level != _levels()[-1]])
def test_at_the_level_of_another_chip(level: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not level", __file__],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "XSEP_CPU_ISA": level, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_load_of_a_value_near_the_kink_is_every_kernels() -> None:
    """The sign of scale * x + shift, where it is a rounding error, in the forward's rows and in each pass."""
    c = 24
    x = last(1, c, 8, 8, dtype=F32)
    scale = 0.5 + torch.rand(c)
    shift = -(scale * x[0, :, 3, 4])
    vec, one = torch.stack([scale, shift]), torch.ones(c, 1, 1, 1)
    point = (1, 1, 0, 0, 0, 0, 1, 1)
    read = OPS.cpu_depthwise_fprop(x, one, scale, shift, None, None, point, (RELU, IDENTITY), (0.0, 0.0))
    assert torch.equal(OPS.cpu_chain_apply(x, vec, RELU, 0.0, None), read)
    dx, _ = OPS.cpu_chain_depthwise_bprop(torch.ones_like(x), x, one, scale, shift, point, RELU, 0.0, False)
    assert torch.equal(dx > 0, read > 0)
    later = torch.ones_like(x)
    OPS.cpu_chain_input_gradient_(later, None, x, vec, RELU, 0.0, [], None)
    assert torch.equal(later > 0, read > 0)
