"""Forward ops of the training chain. None has a gradient of its own: :mod:`xsep.chain` writes them.

Images are returned in NHWC order, what was not asked for as a tensor without elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from ...backends.chain import Load, tiles_of
from ...problem import Geometry
from . import checks
from .registry import LOAD, Outputs, define, fake_statistics, images, nhwc, nothing, own, vectors
from .selection import select, select_for


def _sep_checked(x: Any, vec: Any, activation: int, residual: Any, w_dw: Any, w_pw: Any, geometry: Geometry) -> Any:
    checks.load(x, vec, activation)
    checks.depthwise_filter(x, w_dw)
    checks.pointwise_filter(x, w_pw)
    checks.residual(x, residual, w_dw, geometry)
    return checks.layer_problem(x, w_dw, w_pw.shape[0], geometry, activation)


def _sep_fprop(
    x: Tensor, vec: Optional[Tensor], activation: int, alpha: float, residual: Optional[Tensor], w_dw: Tensor,
    w_pw: Tensor, geometry: Sequence[int], statistics: bool, backend: str,
) -> Outputs:  # fmt: skip
    g = Geometry(*geometry)
    problem = _sep_checked(x, vec, activation, residual, w_dw, w_pw, g)
    f = select(problem, backend).sep_fprop(x, Load(vec, activation, alpha), residual, w_dw, w_pw, g, statistics)
    partials = nothing(x) if f.partials is None else f.partials
    counts = nothing(x).int() if f.counts is None else f.counts
    return nhwc(f.r), partials, counts, nothing(x) if f.x_pre is None else nhwc(f.x_pre)


def _sep_fprop_fake(
    x: Tensor, vec: Optional[Tensor], activation: int, alpha: float, residual: Optional[Tensor], w_dw: Tensor,
    w_pw: Tensor, geometry: Sequence[int], statistics: bool, backend: str,
) -> Outputs:  # fmt: skip
    g = Geometry(*geometry)
    problem = _sep_checked(x, vec, activation, residual, w_dw, w_pw, g)
    r = images(x, x.shape[0], w_pw.shape[0], *problem.output_size)
    partials, counts = nothing(x), nothing(x).int()
    if statistics:
        # Where a size is a symbol, nobody can say into how many tiles a plan will cut it.
        known = all(isinstance(size, int) for size in (problem.n, problem.h, problem.w))
        tiles = select(problem, backend).tiles(problem) if known else torch.library.get_ctx().new_dynamic_size()
        partials, counts = fake_statistics(r, tiles)
    return r, partials, counts, nothing(x) if residual is None else images(x, *x.shape)


define("chain_sep_fprop", f"{LOAD}, Tensor? residual, Tensor w_dw, Tensor w_pw, SymInt[] geometry, bool statistics",
        4, _sep_fprop, _sep_fprop_fake)  # fmt: skip


def _pw_fprop(
    x: Tensor, vec: Optional[Tensor], activation: int, alpha: float, w: Tensor, statistics: bool, backend: str
) -> Outputs:
    checks.load(x, vec, activation)
    checks.pointwise_filter(x, w, "w")
    f = select_for(x.device, x.dtype, backend).pw_fprop(x, Load(vec, activation, alpha), w, statistics)
    if f.partials is None or f.counts is None:
        return nhwc(f.r), nothing(x), nothing(x).int()
    return nhwc(f.r), f.partials, f.counts


def _pw_fprop_fake(
    x: Tensor, vec: Optional[Tensor], activation: int, alpha: float, w: Tensor, statistics: bool, backend: str
) -> Outputs:
    checks.load(x, vec, activation)
    checks.pointwise_filter(x, w, "w")
    r = images(x, x.shape[0], w.shape[0], x.shape[2], x.shape[3])
    if not statistics:
        return r, nothing(x), nothing(x).int()
    return r, *fake_statistics(r, tiles_of(r.shape[0] * r.shape[2] * r.shape[3]))


define("chain_pw_fprop", f"{LOAD}, Tensor w, bool statistics", 3, _pw_fprop, _pw_fprop_fake)


def _statistics(r: Tensor, backend: str) -> Outputs:
    checks.image("r", r)
    return select_for(r.device, r.dtype, backend).statistics(r)


def _statistics_fake(r: Tensor, backend: str) -> Outputs:
    checks.image("r", r)
    return fake_statistics(r, tiles_of(r.shape[0] * r.shape[2] * r.shape[3]))


define("chain_statistics", "Tensor r", 2, _statistics, _statistics_fake)


def _pool_checked(r: Tensor, vec: Tensor, s: Tensor, vec_s: Tensor, pads: Sequence[int]) -> None:
    checks.image("r", r)
    checks.image("s", s)
    pooled = (r.shape[0], r.shape[1], (r.shape[2] + 1) // 2, (r.shape[3] + 1) // 2)
    if tuple(s.shape) != pooled or s.dtype != r.dtype:
        raise ValueError(f"s must be {list(pooled)} {r.dtype}, got {list(s.shape)} {s.dtype}")
    if len(pads) != 2 or min(pads) < 0 or max(pads) > 1:
        raise ValueError(f"pads must be two numbers, 0 or 1, got {list(pads)}")
    checks.vectors("vec", vec, 2, r.shape[1])
    checks.vectors("vec_s", vec_s, 2, r.shape[1])


def _bn_pool_add(r: Tensor, vec: Tensor, s: Tensor, vec_s: Tensor, pads: Sequence[int], backend: str) -> Outputs:
    _pool_checked(r, vec, s, vec_s, pads)
    found = select_for(r.device, r.dtype, backend).bn_pool_add(r, vec, s, vec_s, (pads[0], pads[1]))
    return tuple(nhwc(t) for t in found)


def _bn_pool_add_fake(r: Tensor, vec: Tensor, s: Tensor, vec_s: Tensor, pads: Sequence[int], backend: str) -> Outputs:
    _pool_checked(r, vec, s, vec_s, pads)
    return images(s, *s.shape), images(s, *s.shape).to(torch.uint8), images(s, *s.shape)


define("chain_bn_pool_add", "Tensor r, Tensor vec, Tensor s, Tensor vec_s, int[] pads", 3, _bn_pool_add,
        _bn_pool_add_fake)  # fmt: skip


def _bn_relu_gap(r: Tensor, vec: Tensor, backend: str) -> Outputs:
    checks.load(r, vec, 0)
    return select_for(r.device, r.dtype, backend).bn_relu_gap(r, vec)


def _bn_relu_gap_fake(r: Tensor, vec: Tensor, backend: str) -> Outputs:
    checks.load(r, vec, 0)
    n, c = r.shape[:2]
    return vectors(r, n, c, dtype=r.dtype), vectors(r, n, c), vectors(r, n, c)


define("chain_bn_relu_gap", "Tensor r, Tensor vec", 3, _bn_relu_gap, _bn_relu_gap_fake)


def _apply(
    x: Tensor, vec: Optional[Tensor], activation: int, alpha: float, residual: Optional[Tensor], backend: str
) -> Outputs:
    checks.load(x, vec, activation)
    if residual is not None:
        checks.image("residual", residual, x)
    y = select_for(x.device, x.dtype, backend).apply(x, Load(vec, activation, alpha), residual)
    return (own(nhwc(y), x, residual),)


def _apply_fake(
    x: Tensor, vec: Optional[Tensor], activation: int, alpha: float, residual: Optional[Tensor], backend: str
) -> Outputs:
    checks.load(x, vec, activation)
    if residual is not None:
        checks.image("residual", residual, x)
    return (images(x, *x.shape),)


define("chain_apply", f"{LOAD}, Tensor? residual", 1, _apply, _apply_fake)
