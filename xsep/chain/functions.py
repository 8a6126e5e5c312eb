"""Gradients of the chain: one autograd Function a layer.

Between two Functions travels a raw output, not the tensor it stands for. What autograd calls the gradient of that raw
output is du, the gradient of u = scale * r + shift; the gradient of ``centres`` [1 + K, C] is the sums of du and of
du * (operand - centre) for each of K operands, which the producer's BatchNorm needs. The first row of centres only
stands where the plain sum arrives. Both are linear in du, so where a raw output has several readers autograd's own
accumulation stays right. ``own`` are a layer's own centres, of one operand, the raw output itself: its mean, twice.

No backward here may have the host wait for the card, or copy to it, or no CUDA graph could hold it. So there is no
``sums[[0, 2]]``, whose list becomes a tensor on the CPU first.

The forward ops have run before a Function is applied, which then only says what is saved and how gradients come about:
BatchNorm's running statistics are moved in place, and a traced Function must not do that.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends.chain import Load, RawGradient, Shortcut
from ..ops.training import calls
from ..problem import Geometry
from .batchnorm import gradients

Inputs = tuple[Any, ...]


class LayerSpec(NamedTuple):
    """What of a separable layer is no tensor."""

    geometry: Geometry
    activation: int  # on load
    alpha: float
    batch: bool  # see Vectors
    group: Any
    backend: str
    short: str = ""  # "", "full" or "half": which view of the source is handed out as the block's shortcut
    activated: bool = False  # the shortcut is taken behind the activation


def _like(gradient: Optional[Tensor], parameter: Optional[Tensor], wanted: bool) -> Optional[Tensor]:
    return None if gradient is None or parameter is None or not wanted else gradient.to(parameter.dtype)


class SeparableLayer(torch.autograd.Function):
    """(r, centres, shortcut or None) of a layer that has run. Saves what was stored anyway, and vectors."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, centres: Optional[Tensor], residual: Optional[Tensor], w_dw: Tensor, w_pw: Tensor,
        gamma: Optional[Tensor], beta: Optional[Tensor], vec: Optional[Tensor], r: Tensor, x_pre: Optional[Tensor],
        own: Tensor, invstd: Tensor, count: Tensor, spec: LayerSpec, *operands: Tensor,
    ) -> Any:  # fmt: skip
        source, source_vec = (x, vec) if x_pre is None else (x_pre, None)
        ctx.spec = spec
        ctx.save_for_backward(
            source, source_vec, centres, w_dw, w_pw, gamma, beta, r, own, invstd, count, *operands
        )  # fmt: skip
        short = None
        if spec.short:
            short = source.detach() if spec.short == "full" else source.detach()[:, :, ::2, ::2]
        return r.detach(), own.detach(), short

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Inputs:
        du, sums, short = grads
        source, vec, centres, w_dw, w_pw, gamma, beta, r, own, invstd, count, *operands = ctx.saved_tensors
        spec, needs = ctx.spec, ctx.needs_input_grad
        coef, dgamma, dbeta = gradients(sums, own[1], invstd, gamma, count, spec.batch, spec.group, spec.backend)
        dtype = source.dtype
        found = calls.sep_backward(
            RawGradient(du, r, coef), w_pw.to(dtype), w_dw.to(dtype), source,
            Load(vec, spec.activation, spec.alpha), spec.geometry,
            None if short is None else Shortcut(short, spec.activated), operands, centres,
            (needs[0] or needs[1] or needs[2], needs[3], needs[4]), spec.backend,
        )  # fmt: skip
        return (
            found.dx if needs[0] else None, found.sums if needs[1] else None, found.dx if needs[2] else None,
            _like(found.dw_dw, w_dw, needs[3]), _like(found.dw_pw, w_pw, needs[4]),
            _like(dgamma, gamma, needs[5]), _like(dbeta, beta, needs[6]), *[None] * (7 + len(operands)),
        )  # fmt: skip


class PooledLayer(torch.autograd.Function):
    """(t, centres) of a down block's second half: its last layer, the skip convolution, pool and sum."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, centres: Optional[Tensor], w_dw: Tensor, w_pw: Tensor, gamma: Optional[Tensor],
        beta: Optional[Tensor], y: Tensor, w_s: Tensor, gamma_s: Optional[Tensor], beta_s: Optional[Tensor],
        vec: Optional[Tensor], vec_y: Optional[Tensor], r: Tensor, own: Tensor, invstd: Tensor, count: Tensor,
        s: Tensor, own_s: Tensor, invstd_s: Tensor, count_s: Tensor, t: Tensor, index: Tensor, spec: LayerSpec,
        load_y: tuple[int, float], skip: tuple[bool, Any], pads: tuple[int, int], *operands: Tensor,
    ) -> Any:  # fmt: skip
        ctx.spec, ctx.load_y, ctx.skip, ctx.pads = spec, load_y, skip, pads
        ctx.save_for_backward(
            x, centres, w_dw, w_pw, gamma, beta, y, w_s, gamma_s, beta_s, vec, vec_y,
            r, own, invstd, count, s, own_s, invstd_s, count_s, index, *operands,
        )  # fmt: skip
        return t.detach(), torch.cat((own, own_s[1:]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Inputs:
        g, sums = grads
        (x, centres, w_dw, w_pw, gamma, beta, y, w_s, gamma_s, beta_s, vec, vec_y,
         r, own, invstd, count, s, own_s, invstd_s, count_s, index, *operands) = ctx.saved_tensors  # fmt: skip
        spec, needs, dtype = ctx.spec, ctx.needs_input_grad, x.dtype
        # Every window has exactly one chosen tap, so the sums of the pool's gradient are those of g itself.
        coef, dgamma, dbeta = gradients(
            sums[:2], own[1], invstd, gamma, count, spec.batch, spec.group, spec.backend
        )  # fmt: skip
        batch_s, group_s = ctx.skip
        coef_s, dgamma_s, dbeta_s = gradients(
            sums[::2], own_s[1], invstd_s, gamma_s, count_s, batch_s, group_s, spec.backend
        )  # fmt: skip
        dw_s = dy = None
        if needs[6] or needs[7]:
            dw_s, dy = calls.pw_backward(
                RawGradient(g, s, coef_s), w_s.to(dtype), y, Load(vec_y, *ctx.load_y), spec.backend
            )  # fmt: skip
        found = calls.sep_backward(
            RawGradient(g, r, coef, index, ctx.pads), w_pw.to(dtype), w_dw.to(dtype), x,
            Load(vec, spec.activation, spec.alpha), spec.geometry, None, operands, centres,
            (needs[0] or needs[1], needs[2], needs[3]), spec.backend,
        )  # fmt: skip
        return (
            found.dx if needs[0] else None, found.sums if needs[1] else None,
            _like(found.dw_dw, w_dw, needs[2]), _like(found.dw_pw, w_pw, needs[3]),
            _like(dgamma, gamma, needs[4]), _like(dbeta, beta, needs[5]), dy if needs[6] else None,
            _like(dw_s, w_s, needs[7]), _like(dgamma_s, gamma_s, needs[8]), _like(dbeta_s, beta_s, needs[9]),
            *[None] * (16 + len(operands)),
        )  # fmt: skip


class Enter(torch.autograd.Function):
    """(r, centres) of a BatchNorm behind an ordinary convolution: where a chain starts with a raw output."""

    @staticmethod
    def forward(
        ctx: Any, r: Tensor, gamma: Optional[Tensor], beta: Optional[Tensor], own: Tensor, invstd: Tensor,
        count: Tensor, spec: tuple[bool, Any, str],
    ) -> Any:  # fmt: skip
        ctx.spec = spec
        ctx.save_for_backward(r, gamma, beta, own, invstd, count)
        return r.detach(), own.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Inputs:
        du, sums = grads
        r, gamma, beta, own, invstd, count = ctx.saved_tensors
        needs, backend = ctx.needs_input_grad, ctx.spec[2]
        coef, dgamma, dbeta = gradients(sums, own[1], invstd, gamma, count, *ctx.spec)
        dr = calls.bn_dgrad(du, r, coef, backend) if needs[0] else None
        return dr, _like(dgamma, gamma, needs[1]), _like(dbeta, beta, needs[2]), None, None, None, None


class Leave(torch.autograd.Function):
    """act(vec(x) + residual) as an ordinary tensor.

    Also where there is nothing to apply: ordinary readers do not deliver the sums that the producer needs.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, centres: Optional[Tensor], residual: Optional[Tensor], vec: Optional[Tensor],
        activation: int, alpha: float, backend: str, *operands: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.spec = (activation, alpha, backend)
        nothing = vec is None and residual is None and not activation
        out = x.detach() if nothing else calls.apply(x, Load(vec, activation, alpha), residual, backend)
        # Only an activation's derivative looks at the values again; x and the residual are stored by others anyway.
        again = (x, vec, residual) if activation else (x, None, None)
        ctx.save_for_backward(centres, *again, *operands)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Inputs:
        centres, x, vec, residual, *operands = ctx.saved_tensors
        activation, alpha, backend = ctx.spec
        load = Load(vec, activation, alpha)
        du, sums = calls.apply_backward(grads[0], x, load, residual, operands, centres, backend)
        needs = ctx.needs_input_grad
        return (
            du if needs[0] else None, sums if needs[1] else None, du if needs[2] else None,
            *[None] * (4 + len(operands)),
        )  # fmt: skip


class GlobalPool(torch.autograd.Function):
    """The mean of relu(vec(r)) over the picture, [N, C]."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, centres: Tensor, vec: Tensor, backend: str) -> Tensor:
        pooled, positive, total = calls.bn_relu_gap(r, vec, backend)
        ctx.backend = backend
        ctx.save_for_backward(r, centres, vec, positive, total)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Inputs:
        r, centres, vec, positive, total = ctx.saved_tensors
        du, sums = calls.bn_relu_gap_backward(grads[0], r, vec, centres[1], positive, total, ctx.backend)
        return du, sums, None, None
