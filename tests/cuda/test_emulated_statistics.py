"""Statistics of y from the depthwise forward that computes it, run by the emulator, against float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from xsep.problem import RELU, SILU, Geometry

from . import emulated
from .emulated import check_statistics
from .emulated_ops import EmulatedOps
from .test_emulated_depthwise import DTYPES, PLAIN, Case, Outputs, draw, fprop, library, plan_of, same

__all__ = ["library"]  # the fixture

pytestmark = pytest.mark.skipif(emulated.missing_tools() is not None, reason=str(emulated.missing_tools()))


class Walk(NamedTuple):
    """A convolution, and how many CTAs share its tiles."""

    case: Case
    workers: int


WALKS = {
    **{
        f"k{k}-stride{stride}": Walk(Case("", 3, 8, 11, 13, (k, k), same(k, stride)), 2)
        for k in (3, 5, 7) for stride in (1, 2)
    },
    "many-tiles": Walk(Case("", 2, 64, 9, 37, (3, 3), same(3)), 3),
    "a-tile-each": Walk(Case("", 1, 64, 9, 37, (3, 3), same(3)), 0),
    "idle-lanes": Walk(Case("", 3, 136, 5, 7, (3, 3), same(3)), 2),
    "one-pixel": Walk(Case("", 3, 8, 1, 1, (3, 3), same(3)), 2),
    "no-padding": Walk(Case("", 2, 24, 7, 9, (3, 3), Geometry(1, 1, 0, 0, 0, 0, 1, 1)), 1),
    "stride2-explicit": Walk(Case("", 2, 8, 9, 6, (3, 3), Geometry(2, 2, 2, 0, 1, 3, 1, 1)), 1),
}  # fmt: skip


def tiles_of(library: emulated.Library, case: Case, dtype: torch.dtype) -> int:
    plan = plan_of(library, "fprop", case, dtype, True, 1)
    assert plan.sliding_window
    return int(case.n * plan.tiles_down * plan.tiles_across)


def take(
    library: emulated.Library, walk: Walk, x: Tensor, w: Tensor, prologue: emulated.Affine = PLAIN,
    epilogue: emulated.Affine = PLAIN, residual: bool = False,
) -> Outputs:  # fmt: skip
    """With statistics, which leave the rest as it is without them."""
    workers = walk.workers or tiles_of(library, walk.case, x.dtype)
    other = torch.randn_like(x) if residual else None
    given = (library, walk.case, x, w, prologue, epilogue, other)
    found, without = fprop(*given, statistics=True, workers=workers), fprop(*given, workers=workers)
    for mine, plain in zip(found[:2], without[:2]):
        torch.testing.assert_close(mine, plain, rtol=0, atol=0, equal_nan=True)
    return found


@pytest.mark.parametrize("name", WALKS)
@pytest.mark.parametrize("kind", DTYPES)
def test_statistics(library: emulated.Library, name: str, kind: str) -> None:
    walk = WALKS[name]
    x, w = draw(walk.case, DTYPES[kind])
    assert walk.workers < tiles_of(library, walk.case, x.dtype), "a CTA should have several tiles"
    found = take(library, walk, x, w)
    check_statistics(found.y, found.statistics, found.counts)


@pytest.mark.parametrize("name", ["k3-stride1", "k5-stride2", "many-tiles"])
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("activation", [RELU, SILU], ids=["relu", "silu"])
def test_behind_everything(library: emulated.Library, name: str, kind: str, activation: int) -> None:
    """Residual, prologue and epilogue: of y behind them all, while x_pre is written."""
    walk = WALKS[name]
    x, w = draw(walk.case, DTYPES[kind])
    of_x, of_y = torch.randn(2, 2, walk.case.c)
    prologue, epilogue = (emulated.Affine(scale, shift, activation) for scale, shift in (of_x, of_y))
    found = take(library, walk, x, w, prologue, epilogue, residual=True)
    assert found.x_pre is not None and not found.x_pre.isnan().any()
    check_statistics(found.y, found.statistics, found.counts)


def check_far_from_zero(library: emulated.Library, name: str, kind: str) -> Outputs:
    """Mean 100, standard deviation about 0.1: sums of y and y^2 in float32 lose the variance here."""
    walk = WALKS[name]
    x, w = draw(walk.case, DTYPES[kind])
    epilogue = emulated.Affine(torch.full((walk.case.c,), 0.03), torch.full((walk.case.c,), 100.0))
    found = take(library, walk, x, w, epilogue=epilogue)
    check_statistics(found.y, found.statistics, found.counts)
    return found


@pytest.mark.parametrize("name", ["k3-stride1", "k7-stride2", "many-tiles"])
@pytest.mark.parametrize("kind", DTYPES)
def test_where_squares_would_cancel(library: emulated.Library, name: str, kind: str) -> None:
    check_far_from_zero(library, name, kind)


def test_a_first_strip_far_from_the_mean(library: emulated.Library) -> None:
    """A centre that stayed there would cost the thread's other pixels their digits."""
    walk = WALKS["many-tiles"]
    x, w = draw(walk.case, torch.float32)
    x, w = 100 + 0.1 * x, torch.zeros_like(w)
    w[:, :, 1, 1] = 1
    x[0, :, :2, :4] = -100
    found = take(library, walk, x, w)
    assert torch.equal(found.y, x)
    check_statistics(found.y, found.statistics, found.counts)


def test_nan_stays_in_its_channel(library: emulated.Library) -> None:
    walk = WALKS["many-tiles"]
    x, w = draw(walk.case, torch.bfloat16)
    x[1, 3, 2, 4] = float("nan")
    found = take(library, walk, x, w)
    assert found.statistics.isnan().any(0).any(0).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("name", ["many-tiles", "a-tile-each", "idle-lanes"])
def test_merged_by_the_chains_own_kernel(
    library: emulated.Library, operators: EmulatedOps, name: str, kind: str
) -> None:
    """What BatchNorm makes of y: its mean, its deviation and the running statistics."""
    found, c = check_far_from_zero(library, name, kind), WALKS[name].case.c
    running = torch.zeros(c), torch.zeros(c)
    _, (_, mean), invstd, count = torch.ops.xsep.cuda_chain_bn_finalize(
        found.statistics, found.counts, None, None, *running, None, False, 1.0, 1e-5
    )
    y = found.y.double()
    assert float(count) == y.numel() / c
    close = torch.testing.assert_close
    close(mean.double(), y.mean((0, 2, 3)), rtol=1e-6, atol=0)
    close(invstd.double(), (y.var((0, 2, 3), unbiased=False) + 1e-5).rsqrt(), rtol=2e-6, atol=0)
    close(running[0].double(), y.mean((0, 2, 3)), rtol=1e-6, atol=0)
    close(running[1].double(), y.var((0, 2, 3)), rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", ["k3-stride2", "many-tiles", "idle-lanes"])
def test_same_bits_for_any_order_of_threads(name: str) -> None:
    walk = WALKS[name]
    x, w = draw(walk.case, torch.bfloat16)
    path = emulated.build("depthwise")
    first, *others = (take(emulated.Library(path, seed), walk, x, w) for seed in (1, 2, 3))
    for other in others:
        assert torch.equal(other.statistics, first.statistics) and torch.equal(other.counts, first.counts)
