"""Backward ops of the training chain: the gradient of a raw output is formed where it is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

from torch import Tensor

from ...backends.chain import Load, RawGradient, Shortcut
from ...problem import Geometry
from . import checks
from .registry import LOAD, Outputs, define, images, nhwc, nothing, own, vectors
from .selection import select, select_for

RAW = "Tensor du, Tensor? index, Tensor r, Tensor coef, int[] pads"
SUMS = "Tensor[] operands, Tensor? centres"
LAYER = f"{RAW}, Tensor w_pw, Tensor w_dw, {LOAD}, SymInt[] geometry, Tensor? shortcut, bool activated, {SUMS}"


def _layer_checked(
    du: Tensor, index: Any, r: Tensor, coef: Tensor, pads: Sequence[int], w_pw: Any, w_dw: Tensor, x: Tensor, vec: Any,
    activation: int, geometry: Geometry, shortcut: Optional[Tensor], operands: Sequence[Tensor], centres: Any,
) -> Any:  # fmt: skip
    checks.load(x, vec, activation)
    checks.depthwise_filter(x, w_dw)
    if w_pw is not None:
        checks.pointwise_filter(x, w_pw)
    problem = checks.layer_problem(x, w_dw, r.shape[1], geometry, activation)
    checks.raw_gradient(du, index, r, coef, pads, (x.shape[0], *problem.output_size))
    if shortcut is not None:
        n, c, h, w = x.shape
        sizes = ((n, c, h, w), (n, c, (h + 1) // 2, (w + 1) // 2))
        if tuple(shortcut.shape) not in sizes or shortcut.dtype != x.dtype:
            raise ValueError(
                f"shortcut must be {list(sizes[0])} or {list(sizes[1])} {x.dtype}, got {list(shortcut.shape)} "
                f"{shortcut.dtype}"
            )
    checks.operands(x, operands, centres)
    return problem


def _pads(pads: Sequence[int]) -> tuple[int, int]:
    return (pads[0], pads[1]) if pads else (0, 0)


def _sep_wgrad_pw(
    du: Tensor, index: Optional[Tensor], r: Tensor, coef: Tensor, pads: Sequence[int], x: Tensor,
    vec: Optional[Tensor], activation: int, alpha: float, w_dw: Tensor, geometry: Sequence[int], backend: str,
) -> Outputs:  # fmt: skip
    g = Geometry(*geometry)
    problem = _layer_checked(du, index, r, coef, pads, None, w_dw, x, vec, activation, g, None, [], None)
    dr = RawGradient(du, r, coef, index, _pads(pads))
    found = select(problem, backend, "backward").sep_wgrad_pw(dr, x, Load(vec, activation, alpha), w_dw, g)
    return (found.contiguous(),)


def _sep_wgrad_pw_fake(
    du: Tensor, index: Optional[Tensor], r: Tensor, coef: Tensor, pads: Sequence[int], x: Tensor,
    vec: Optional[Tensor], activation: int, alpha: float, w_dw: Tensor, geometry: Sequence[int], backend: str,
) -> Outputs:  # fmt: skip
    g = Geometry(*geometry)
    _layer_checked(du, index, r, coef, pads, None, w_dw, x, vec, activation, g, None, [], None)
    return (vectors(x, r.shape[1], x.shape[1], 1, 1),)


define("chain_sep_wgrad_pw", f"{RAW}, {LOAD}, Tensor w_dw, SymInt[] geometry", 1, _sep_wgrad_pw, _sep_wgrad_pw_fake)


def _sep_backward(
    du: Tensor, index: Optional[Tensor], r: Tensor, coef: Tensor, pads: Sequence[int], w_pw: Tensor, w_dw: Tensor,
    x: Tensor, vec: Optional[Tensor], activation: int, alpha: float, geometry: Sequence[int],
    shortcut: Optional[Tensor], activated: bool, operands: list[Tensor], centres: Optional[Tensor],
    wanted: Sequence[bool], backend: str,
) -> Outputs:  # fmt: skip
    g = Geometry(*geometry)
    problem = _layer_checked(
        du, index, r, coef, pads, w_pw, w_dw, x, vec, activation, g, shortcut, operands, centres
    )  # fmt: skip
    dr, load = RawGradient(du, r, coef, index, _pads(pads)), Load(vec, activation, alpha)
    short = None if shortcut is None else Shortcut(shortcut, activated)
    b = select(problem, backend, "backward").sep_backward(dr, w_pw, w_dw, x, load, g, short, operands, centres, wanted)
    dx = own(nhwc(b.dx), du, shortcut) if wanted[0] and b.dx is not None else nothing(x)
    dw_dw = b.dw_dw.contiguous() if wanted[1] and b.dw_dw is not None else nothing(coef)
    dw_pw = b.dw_pw.contiguous() if wanted[2] and b.dw_pw is not None else nothing(coef)
    return dx, dw_dw, dw_pw, b.sums if wanted[0] and b.sums is not None else nothing(coef)


def _sep_backward_fake(
    du: Tensor, index: Optional[Tensor], r: Tensor, coef: Tensor, pads: Sequence[int], w_pw: Tensor, w_dw: Tensor,
    x: Tensor, vec: Optional[Tensor], activation: int, alpha: float, geometry: Sequence[int],
    shortcut: Optional[Tensor], activated: bool, operands: list[Tensor], centres: Optional[Tensor],
    wanted: Sequence[bool], backend: str,
) -> Outputs:  # fmt: skip
    _layer_checked(
        du, index, r, coef, pads, w_pw, w_dw, x, vec, activation, Geometry(*geometry), shortcut, operands, centres
    )  # fmt: skip
    return (
        images(x, *x.shape) if wanted[0] else nothing(x),
        vectors(x, *w_dw.shape) if wanted[1] else nothing(coef),
        vectors(x, *w_pw.shape) if wanted[2] else nothing(coef),
        vectors(x, 1 + len(operands), x.shape[1]) if wanted[0] else nothing(coef),
    )


define("chain_sep_backward", f"{LAYER}, bool[] wanted", 4, _sep_backward, _sep_backward_fake)


def _sep_dgrad(*arguments: Any) -> Outputs:
    du, index, r, coef, pads, w_pw, w_dw, x, vec, activation, alpha, geometry, shortcut, activated = arguments[:14]
    operands, centres, backend = arguments[14:]
    g = Geometry(*geometry)
    problem = _layer_checked(
        du, index, r, coef, pads, w_pw, w_dw, x, vec, activation, g, shortcut, operands, centres
    )  # fmt: skip
    dr, load = RawGradient(du, r, coef, index, _pads(pads)), Load(vec, activation, alpha)
    short = None if shortcut is None else Shortcut(shortcut, activated)
    dx, dw_dw, sums = select(problem, backend, "backward").sep_dgrad(
        dr, w_pw, w_dw, x, load, g, short, operands, centres
    )
    return own(nhwc(dx), du, shortcut), dw_dw.contiguous(), sums


def _sep_dgrad_fake(*arguments: Any) -> Outputs:
    wanted: tuple[Any, ...] = ((True, True, False), arguments[-1])
    dx, dw_dw, _, sums = _sep_backward_fake(*(arguments[:-1] + wanted))
    return dx, dw_dw, sums


define("chain_sep_dgrad", LAYER, 3, _sep_dgrad, _sep_dgrad_fake)


def _pw_checked(du: Tensor, r: Tensor, coef: Tensor, w: Tensor, x: Tensor, vec: Any, activation: int) -> None:
    checks.load(x, vec, activation)
    checks.pointwise_filter(x, w, "w")
    checks.raw_gradient(du, None, r, coef, [], (x.shape[0], x.shape[2], x.shape[3]))


def _pw_backward(
    du: Tensor, r: Tensor, coef: Tensor, w: Tensor, x: Tensor, vec: Optional[Tensor], activation: int, alpha: float,
    backend: str,
) -> Outputs:  # fmt: skip
    _pw_checked(du, r, coef, w, x, vec, activation)
    chosen = select_for(x.device, x.dtype, backend)
    dw, dy = chosen.pw_backward(RawGradient(du, r, coef), w, x, Load(vec, activation, alpha))
    return dw.contiguous(), nhwc(dy)


def _pw_backward_fake(
    du: Tensor, r: Tensor, coef: Tensor, w: Tensor, x: Tensor, vec: Optional[Tensor], activation: int, alpha: float,
    backend: str,
) -> Outputs:  # fmt: skip
    _pw_checked(du, r, coef, w, x, vec, activation)
    return vectors(x, *w.shape), images(x, *x.shape)


define("chain_pw_backward", f"Tensor du, Tensor r, Tensor coef, Tensor w, {LOAD}", 2, _pw_backward, _pw_backward_fake)


def _bn_relu_gap_backward(
    g: Tensor, r: Tensor, vec: Tensor, mean: Tensor, positive: Tensor, total: Tensor, backend: str
) -> Outputs:
    checks.load(r, vec, 0)
    du, sums = select_for(r.device, r.dtype, backend).bn_relu_gap_backward(g, r, vec, mean, positive, total)
    return nhwc(du), sums


def _bn_relu_gap_backward_fake(
    g: Tensor, r: Tensor, vec: Tensor, mean: Tensor, positive: Tensor, total: Tensor, backend: str
) -> Outputs:
    checks.load(r, vec, 0)
    return images(r, *r.shape), vectors(r, 2, r.shape[1])


define("chain_bn_relu_gap_backward", "Tensor g, Tensor r, Tensor vec, Tensor mean, Tensor positive, Tensor total", 2,
        _bn_relu_gap_backward, _bn_relu_gap_backward_fake)  # fmt: skip


def _apply_backward(
    g: Tensor, x: Tensor, vec: Optional[Tensor], activation: int, alpha: float, residual: Optional[Tensor],
    operands: list[Tensor], centres: Optional[Tensor], backend: str,
) -> Outputs:  # fmt: skip
    checks.load(x, vec, activation)
    checks.image("g", g, x)
    checks.operands(x, operands, centres)
    chosen = select_for(x.device, x.dtype, backend)
    du, sums = chosen.apply_backward(g, x, Load(vec, activation, alpha), residual, operands, centres)
    return own(nhwc(du), g), sums


def _apply_backward_fake(
    g: Tensor, x: Tensor, vec: Optional[Tensor], activation: int, alpha: float, residual: Optional[Tensor],
    operands: list[Tensor], centres: Optional[Tensor], backend: str,
) -> Outputs:  # fmt: skip
    checks.load(x, vec, activation)
    checks.image("g", g, x)
    checks.operands(x, operands, centres)
    return images(x, *x.shape), vectors(x, 1 + len(operands), x.shape[1])


define("chain_apply_backward", f"Tensor g, {LOAD}, Tensor? residual, {SUMS}", 2, _apply_backward,
        _apply_backward_fake)  # fmt: skip


def _bn_dgrad(du: Tensor, r: Tensor, coef: Tensor, backend: str) -> Outputs:
    checks.raw_gradient(du, None, r, coef, [], (r.shape[0], r.shape[2], r.shape[3]))
    return (nhwc(select_for(r.device, r.dtype, backend).bn_dgrad(RawGradient(du, r, coef))),)


def _bn_dgrad_fake(du: Tensor, r: Tensor, coef: Tensor, backend: str) -> Outputs:
    checks.raw_gradient(du, None, r, coef, [], (r.shape[0], r.shape[2], r.shape[3]))
    return (images(r, *r.shape),)


define("chain_bn_dgrad", "Tensor du, Tensor r, Tensor coef", 1, _bn_dgrad, _bn_dgrad_fake)
