"""What a backend is, and the backward of both ops composed from a backend's own kernels.

A backend brings four primitives (depthwise and pointwise, each forward and backward) and, where it has one, a fused
forward. The backward here recomputes z, multiplies, and hands dz to the depthwise backward; written in differentiable
PyTorch operations around the primitives, so that with the plain primitives of :mod:`xsep.backends.aten` it is its
own double backward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Optional, Union

import torch
from torch import Tensor

from ..activations import (
    gradient_from_input,
    gradient_from_output,
    output_determines_gradient,
    per_channel,
    scale_and_shift,
)
from ..problem import IDENTITY, Affine, DepthwiseArgs, Geometry, Problem, SeparableArgs
from . import pointwise

Gradients = tuple[Optional[Tensor], ...]


class DepthwiseGradients(NamedTuple):
    """What one pass over x and dz gives; None where it was not asked for."""

    dx: Optional[Tensor]  # [N, C_in, H, W]
    dw_dw: Optional[Tensor]  # [C_mid, 1, R, S]
    dscale_p: Optional[Tensor]  # [C_in]
    dshift_p: Optional[Tensor]  # [C_in]


def channel_sum(t: Tensor) -> Tensor:
    """[N, C, P, Q] -> [C], accumulated in float32 at least."""
    wide = torch.promote_types(t.dtype, torch.float32)
    return t.sum((0, 2, 3), dtype=wide)


class Backend(ABC):
    """One way to run the ops. Instances hold no state of a call.

    Tensors come in any layout and may be returned in any: the op gives its results the strides they must have.
    """

    name: str
    #: Whether ``separable_wgrad`` and ``pointwise_wgrad`` add up all pixels as a sum of short sums.
    adds_short_sums = False

    @abstractmethod
    def not_supported_reasons(self, problem: Problem) -> list[str]:
        """Why this backend cannot run the problem: sentences, or an empty list where it can."""

    def slower_than_aten(self, problem: Problem, direction: str) -> str:
        """Why PyTorch's own convolutions are faster at a problem that this backend can run, ``"forward"`` without
        gradients or ``"backward"`` with the forward before it; "" where they are not known to be. By the problem and,
        on a CPU, the number of threads alone: what runs never depends on what else a machine does."""
        return ""

    def is_one_call(self, a: Union[SeparableArgs, DepthwiseArgs]) -> bool:
        """Whether one operator of this backend makes y, of these tensors and of all others like them."""
        return False

    def is_one_backward(self, a: Union[SeparableArgs, DepthwiseArgs]) -> bool:
        """Whether one operator of this backend makes all gradients but the bias's."""
        return False

    @abstractmethod
    def plan(self, problem: Problem) -> str:
        """One line for people: how this backend would run a problem that it supports."""

    @abstractmethod
    def depthwise(self, x: Tensor, w_dw: Tensor, prologue: Affine, epilogue: Affine, geometry: Geometry) -> Tensor:
        """epilogue(dw(prologue(x))): [N, C_in, H, W] -> [N, C_mid, P, Q]; padding is zero after the prologue."""

    @abstractmethod
    def depthwise_backward_kernel(
        self, dz: Tensor, x: Tensor, w_dw: Tensor, prologue: Affine, geometry: Geometry, wanted: Sequence[bool]
    ) -> DepthwiseGradients:
        """Gradients of z = dw(prologue(x)) for dx, dw_dw, dscale_p, dshift_p, where wanted."""

    @abstractmethod
    def separable_forward(self, a: SeparableArgs) -> Tensor:
        """y [N, C_out, P, Q] of the whole op."""

    def pointwise(self, z: Tensor, w_pw: Tensor) -> Tensor:
        """[N, C_mid, P, Q] x [C_out, C_mid, 1, 1] -> [N, C_out, P, Q], no bias."""
        return pointwise.product(z, w_pw)

    def pointwise_dgrad(self, dv: Tensor, w_pw: Tensor) -> Tensor:
        """Gradient of ``pointwise`` for z: [N, C_out, P, Q] x [C_out, C_mid, 1, 1] -> [N, C_mid, P, Q]."""
        return pointwise.dgrad(dv, w_pw)

    def pointwise_wgrad(self, du: Tensor, z: Tensor, w_pw: Tensor) -> Tensor:
        """Gradient of ``pointwise`` for w_pw: du [N, C_out, P, Q], z [N, C_mid, P, Q] -> [C_out, C_mid, 1, 1], which
        may be wider than w_pw."""
        return pointwise.wgrad(du, z).view(w_pw.shape)

    def separable_wgrad(self, du: Tensor, a: SeparableArgs) -> Tensor:
        """``pointwise_wgrad`` with z made on the way, for a backend that need not keep all of it."""
        z = self.depthwise(a.x, a.w_dw, a.prologue, a.middle, Geometry(*a.geometry))
        return self.pointwise_wgrad(du, z, a.w_pw)

    def depthwise_forward(self, a: DepthwiseArgs) -> Tensor:
        """y [N, C_mid, P, Q] of the depthwise op."""
        return self.depthwise(a.x, a.w_dw, a.prologue, with_bias(a.epilogue, a.bias), Geometry(*a.geometry))

    def depthwise_backward(
        self, dy: Tensor, a: DepthwiseArgs, y: Optional[Tensor], wanted: Sequence[bool]
    ) -> Gradients:
        """Gradients of the depthwise op for its tensors in the schema's order, None where not wanted.

        With v = dw(x~), u = scale_e * (v + bias) + shift_e and y = act_e(u). ``y`` is there where
        act_e is no identity and y determines its gradient; else u is recomputed.
        """
        w_x, w_w, w_bias, w_scale_p, w_shift_p, w_scale, w_shift = wanted
        geometry, plain = Geometry(*a.geometry), Affine()
        epilogue = with_bias(a.epilogue, a.bias)
        v = None
        if needs_recompute(y, a.epilogue) or w_scale:
            v = self.depthwise(a.x, a.w_dw, a.prologue, plain, geometry)
        du = _activation_gradient(dy, y, None if v is None else scale_and_shift(v, epilogue), a.epilogue)
        sum_du = channel_sum(du) if (w_bias or w_shift or w_scale) else None
        dbias = dscale = dshift = None
        if sum_du is not None:
            dshift = sum_du if w_shift else None
            if w_bias:
                dbias = sum_du if a.scale_e is None else sum_du * a.scale_e
            if w_scale:
                assert v is not None
                dscale = channel_sum(du * v)
                if a.bias is not None:
                    dscale = dscale + a.bias * sum_du
        kernel = DepthwiseGradients(None, None, None, None)
        if w_x or w_w or w_scale_p or w_shift_p:
            dv = du if a.scale_e is None else (du * per_channel(a.scale_e)).to(du.dtype)
            kernel = self.depthwise_backward_kernel(
                dv, a.x, a.w_dw, a.prologue, geometry, (w_x, w_w, w_scale_p, w_shift_p)
            )
        return kernel.dx, kernel.dw_dw, dbias, kernel.dscale_p, kernel.dshift_p, dscale, dshift

    def separable_backward(
        self, dy: Tensor, a: SeparableArgs, y: Optional[Tensor], wanted: Sequence[bool]
    ) -> Gradients:
        """Gradients of the separable op for its tensors in the schema's order, None where not wanted.

        With v = pw(z), u = scale_e * (v + bias) + shift_e + residual, y = act_e(u) and G = du^T z:
        dw_pw = scale_e G, dscale_e = rowsum(w_pw G) + bias sum(du), dz = (scale_e du) w_pw;
        where v is made anyway, or G adds up pixel after pixel, dscale_e = sum(du v) + bias sum(du), which rounds less.
        ``y`` is there where act_e is no identity and y determines its gradient; else u is recomputed.
        """
        w_x, w_dw, w_pw, w_bias, w_residual, w_scale_p, w_shift_p, w_scale_m, w_shift_m, w_scale, w_shift = wanted
        geometry = Geometry(*a.geometry)
        below = w_x or w_dw or w_scale_p or w_shift_p or w_scale_m or w_shift_m
        z = None
        recompute = needs_recompute(y, a.epilogue)
        sums_v = recompute or (w_scale and not self.adds_short_sums)
        if sums_v or ((w_pw or w_scale) and not a.middle.is_identity()):
            z = self.depthwise(a.x, a.w_dw, a.prologue, a.middle, geometry)
        v = u = None
        if sums_v:
            assert z is not None
            v = self.pointwise(z, a.w_pw)
        if recompute:
            assert v is not None
            u = scale_and_shift(v, with_bias(a.epilogue, a.bias))
            u = u if a.residual is None else u + a.residual
        du = _activation_gradient(dy, y, u, a.epilogue)
        u = None

        sum_du = channel_sum(du) if (w_bias or w_shift or (w_scale and a.bias is not None)) else None
        g = None
        if w_pw or (w_scale and v is None):
            g = self.separable_wgrad(du, a) if z is None else self.pointwise_wgrad(du, z, a.w_pw)
        dw_pw = dbias = dscale = None
        if w_pw and g is not None:
            dw_pw = g if a.scale_e is None else g * a.scale_e.view(-1, 1, 1, 1)
        if w_bias and sum_du is not None:
            dbias = sum_du if a.scale_e is None else sum_du * a.scale_e
        if w_scale:
            if v is not None:
                dscale = channel_sum(du * v)
            else:
                assert g is not None
                dscale = (g.to(torch.promote_types(g.dtype, torch.float32)) * a.w_pw).sum((1, 2, 3))
            if a.bias is not None and sum_du is not None:
                dscale = dscale + a.bias * sum_du

        v = None
        if a.middle.is_identity():
            z = None  # before dz is made: the two never stand in memory together
        dscale_m = dshift_m = None
        kernel = DepthwiseGradients(None, None, None, None)
        if below:
            dv = du if a.scale_e is None else (du * per_channel(a.scale_e)).to(du.dtype)
            dz = self.pointwise_dgrad(dv, a.w_pw)
            d = dz
            if not a.middle.is_identity():
                d, dscale_m, dshift_m = self._middle_backward(dz, a, z, geometry, w_scale_m, w_shift_m)
            if w_x or w_dw or w_scale_p or w_shift_p:
                kernel = self.depthwise_backward_kernel(
                    d, a.x, a.w_dw, a.prologue, geometry, (w_x, w_dw, w_scale_p, w_shift_p)
                )
        return (
            kernel.dx, kernel.dw_dw, dw_pw, dbias, du if w_residual else None,
            kernel.dscale_p, kernel.dshift_p, dscale_m, dshift_m, dscale, sum_du if w_shift else None,
        )  # fmt: skip

    def _middle_backward(
        self, dz: Tensor, a: SeparableArgs, z: Optional[Tensor], geometry: Geometry, w_scale: bool, w_shift: bool
    ) -> tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
        """Through z = act_m(scale_m * d + shift_m): dd, dscale_m, dshift_m."""
        m = a.middle
        from_output = output_determines_gradient(m.activation, m.alpha)
        d = None
        if w_scale or not from_output:
            d = self.depthwise(a.x, a.w_dw, a.prologue, Affine(), geometry)
        if from_output:
            if z is None and m.activation != IDENTITY:
                z = self.depthwise(a.x, a.w_dw, a.prologue, m, geometry)
            du = dz if z is None else gradient_from_output(dz, z, m.activation, m.alpha)
        else:
            assert d is not None
            du = gradient_from_input(dz, scale_and_shift(d, m), m.activation, m.alpha)
        dscale = channel_sum(du * d) if w_scale and d is not None else None
        dshift = channel_sum(du) if w_shift else None
        return (du if m.scale is None else (du * per_channel(m.scale)).to(du.dtype)), dscale, dshift


def only_bias_follows(a: Union[SeparableArgs, DepthwiseArgs]) -> bool:
    """Whether nothing stands between the convolutions or behind them but a bias, so that dy is the products'."""
    if isinstance(a, SeparableArgs) and (a.residual is not None or not a.middle.is_identity()):
        return False
    return a.epilogue.is_identity()


def where_only_bias_follows(kernel: Sequence[Tensor], dy: Tensor, wanted: Sequence[bool]) -> Gradients:
    """The separable op's gradients, given dx, dw_dw, dw_pw, dscale_p and dshift_p of one kernel."""
    dx, dw_dw, dw_pw, dscale, dshift = kernel
    dbias = channel_sum(dy) if wanted[3] else None
    return dx, dw_dw, dw_pw, dbias, None, dscale, dshift, None, None, None, None


def with_bias(epilogue: Affine, bias: Optional[Tensor]) -> Affine:
    """The same epilogue for v instead of v + bias: scale * (v + bias) + shift = scale * v + (scale * bias + shift)."""
    if bias is None:
        return epilogue
    moved = bias if epilogue.scale is None else epilogue.scale * bias
    return epilogue._replace(shift=moved if epilogue.shift is None else moved + epilogue.shift)


def needs_recompute(y: Optional[Tensor], epilogue: Affine) -> bool:
    return y is None and epilogue.activation != IDENTITY


def _activation_gradient(dy: Tensor, y: Optional[Tensor], u: Optional[Tensor], epilogue: Affine) -> Tensor:
    if epilogue.activation == IDENTITY:
        return dy
    if y is not None:
        return gradient_from_output(dy, y, epilogue.activation, epilogue.alpha)
    assert u is not None
    return gradient_from_input(dy, u, epilogue.activation, epilogue.alpha)
