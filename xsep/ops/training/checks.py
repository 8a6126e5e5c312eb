"""What the chain's ops refuse, once for all backends: shapes and types that cannot be meant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from ...problem import ACTIVATIONS, Geometry, Problem


def _fail(name: str, t: Tensor, expected: str) -> None:
    raise ValueError(f"{name} must be {expected}, got {list(t.shape)} {str(t.dtype).removeprefix('torch.')}")


def image(name: str, t: Tensor, like: Optional[Tensor] = None) -> None:
    """[N, C, H, W] of a floating type; like another, if one is given."""
    if t.dim() != 4 or not t.dtype.is_floating_point:
        _fail(name, t, "a floating point [N, C, H, W]")
    if like is not None and (t.shape != like.shape or t.dtype != like.dtype):
        _fail(name, t, f"{list(like.shape)} {str(like.dtype).removeprefix('torch.')}")


def vectors(name: str, t: Optional[Tensor], rows: int, channels: int) -> None:
    if t is not None and (t.dim() != 2 or t.shape[0] != rows or t.shape[1] != channels):
        _fail(name, t, f"[{rows}, {channels}]")


def channel_vector(name: str, t: Optional[Tensor], channels: int) -> None:
    if t is not None and (t.dim() != 1 or t.shape[0] != channels):
        _fail(name, t, f"[{channels}]")


def load(x: Tensor, vec: Optional[Tensor], activation: int) -> None:
    image("x", x)
    vectors("vec", vec, 2, x.shape[1])
    if not 0 <= activation < len(ACTIVATIONS):
        raise ValueError(f"activation must be a code from 0 to {len(ACTIVATIONS) - 1}, got {activation}")


def depthwise_filter(x: Tensor, w_dw: Tensor) -> None:
    c_in = x.shape[1]
    if w_dw.dim() != 4 or w_dw.shape[0] != c_in or w_dw.shape[1] != 1 or w_dw.dtype != x.dtype:
        _fail("w_dw", w_dw, f"[{c_in}, 1, R, S] in x's type, {x.dtype}")


def pointwise_filter(x: Tensor, w: Tensor, name: str = "w_pw") -> None:
    c_in = x.shape[1]
    if w.dim() != 4 or w.shape[1] != c_in or w.shape[2] != 1 or w.shape[3] != 1 or w.dtype != x.dtype:
        _fail(name, w, f"[C_out, {c_in}, 1, 1] in x's type, {x.dtype}")


def residual(x: Tensor, t: Optional[Tensor], w_dw: Tensor, geometry: Geometry) -> None:
    """x_pre is written by the tile in whose middle it lies, so tiles of y and of x must be the same."""
    if t is None:
        return
    g, (r, s) = geometry, w_dw.shape[2:]
    centred = g.pad_top == g.pad_bottom == g.dilation_h * (r // 2) and g.pad_left == g.pad_right
    centred = centred and g.pad_left == g.dilation_w * (s // 2) and r % 2 == s % 2 == 1 and g.stride == (1, 1)
    if not centred:
        raise ValueError(f"a residual needs stride 1 and padding that keeps the size, got {r}x{s}, {geometry}")
    image("residual", t, x)


def raw_gradient(
    du: Tensor, index: Optional[Tensor], r: Tensor, coef: Tensor, pads: Sequence[int], size: tuple[int, int, int]
) -> None:
    """``size``: N, P and Q that r must have."""
    image("r", r)
    if (r.shape[0], r.shape[2], r.shape[3]) != size:
        _fail("r", r, f"[{size[0]}, C, {size[1]}, {size[2]}]")
    if index is None:
        image("du", du, r)
    else:
        image("du", du)
        pooled = (r.shape[0], r.shape[1], (r.shape[2] + 1) // 2, (r.shape[3] + 1) // 2)
        if tuple(du.shape) != pooled or du.dtype != r.dtype:
            _fail("du", du, f"{list(pooled)} beside an index, in r's type")
        if index.shape != du.shape or index.dtype != torch.uint8:
            _fail("index", index, f"{list(du.shape)} uint8")
        if len(pads) != 2 or min(pads) < 0 or max(pads) > 1:
            raise ValueError(f"pads must be two numbers, 0 or 1, got {list(pads)}")
    vectors("coef", coef, 3, r.shape[1])


def operands(x: Tensor, found: Sequence[Tensor], centres: Optional[Tensor]) -> None:
    if len(found) > 2:
        raise ValueError(f"operands must be at most 2, got {len(found)}")
    for o in found:
        image("operands", o, x)
    if found and centres is None:
        raise ValueError("centres must be there for operands, got None")
    vectors("centres", centres, 1 + len(found), x.shape[1])


def layer_problem(x: Tensor, w_dw: Tensor, c_out: int, geometry: Geometry, activation: int) -> Problem:
    n, c_in, h, w = x.shape
    problem = Problem(
        "separable", x.device.type, x.dtype, True, n, c_in, h, w, 1, w_dw.shape[2], w_dw.shape[3], c_out, geometry,
        (activation, 0, 0),
    )  # fmt: skip
    p, q = problem.output_size
    if p < 1 or q < 1:
        raise ValueError(f"x {list(x.shape)} is smaller than the filter {list(w_dw.shape)} with {geometry}")
    return problem
