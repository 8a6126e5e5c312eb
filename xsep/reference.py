"""The truth: both ops written so that they can be read beside their formulas, differentiable, in any float type.

No convolution routine is called; a filter is a sum over its taps. Run in float64, this is what every kernel is tested
against. :func:`two_convolutions` is the other yardstick: what a PyTorch user writes today.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[Optional[str], Callable[[Tensor, float], Tensor]] = {
    None: lambda u, alpha: u,
    "relu": lambda u, alpha: F.relu(u),
    "relu6": lambda u, alpha: F.relu6(u),
    "silu": lambda u, alpha: F.silu(u),
    "hardswish": lambda u, alpha: F.hardswish(u),
    "gelu": lambda u, alpha: F.gelu(u),
    "gelu_tanh": lambda u, alpha: F.gelu(u, approximate="tanh"),
    "elu": lambda u, alpha: F.elu(u, alpha),
    "leaky_relu": lambda u, alpha: F.leaky_relu(u, alpha),
}
_ALPHA = {"elu": 1.0, "leaky_relu": 0.01}

#: Called with every pre-activation, what the activation makes of it, and its name; tests look there for values too near
#: a jump of the derivative.
Observer = Callable[[Tensor, Tensor, Optional[str]], None]


def affine(v: Tensor, a: Any, residual: Optional[Tensor] = None, observe: Optional[Observer] = None) -> Tensor:
    """``act(scale * v + shift + residual)`` per channel of v [N, C, H, W]; ``a`` is a ChannelAffine or None."""
    scale, shift, name, alpha = (None, None, None, None) if a is None else a
    u = v if scale is None else v * _beside_pixels(scale)
    u = u if shift is None else u + _beside_pixels(shift)
    u = u.to(v.dtype) if residual is None else u.to(v.dtype) + residual
    out = ACTIVATIONS[name](u, _ALPHA.get(name or "", 0.0) if alpha is None else alpha)
    if observe is not None:
        observe(u, out, name)
    return out


def _beside_pixels(v: Tensor) -> Tensor:
    """[C] -> [C, 1, 1]."""
    return v[:, None, None]


def depthwise(
    x: Tensor, w_dw: Tensor, stride: tuple[int, int], padding: tuple[int, int, int, int], dilation: tuple[int, int]
) -> Tensor:
    """Depthwise convolution of x [N, C_in, H, W] with w_dw [C_mid, 1, R, S]; padding (left, right, top, bottom)."""
    multiplier = w_dw.shape[0] // x.shape[1]
    padded = F.pad(x, padding).repeat_interleave(multiplier, dim=1)
    r_size, s_size = w_dw.shape[2:]
    p = (padded.shape[2] - dilation[0] * (r_size - 1) - 1) // stride[0] + 1
    q = (padded.shape[3] - dilation[1] * (s_size - 1) - 1) // stride[1] + 1
    z = padded.new_zeros((x.shape[0], w_dw.shape[0], p, q))
    for r in range(r_size):
        rows = padded.narrow(2, r * dilation[0], (p - 1) * stride[0] + 1)[:, :, :: stride[0]]
        for s in range(s_size):
            taps = rows.narrow(3, s * dilation[1], (q - 1) * stride[1] + 1)[:, :, :, :: stride[1]]
            z = z + taps * w_dw[:, 0, r, s, None, None]
    return z


def separable_conv2d(
    x: Tensor,
    w_dw: Tensor,
    w_pw: Tensor,
    bias: Optional[Tensor] = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    prologue: Any = None,
    middle: Any = None,
    epilogue: Any = None,
    residual: Optional[Tensor] = None,
    observe: Optional[Observer] = None,
) -> Tensor:
    """:func:`xsep.separable_conv2d`, with padding as (left, right, top, bottom)."""
    z = depthwise(affine(x, prologue, observe=observe), w_dw, stride, padding, dilation)
    v = torch.einsum("ncpq,kc->nkpq", affine(z, middle, observe=observe), w_pw[:, :, 0, 0])
    v = v if bias is None else v + _beside_pixels(bias)
    return affine(v, epilogue, residual, observe)


def depthwise_conv2d(
    x: Tensor,
    w_dw: Tensor,
    bias: Optional[Tensor] = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    prologue: Any = None,
    epilogue: Any = None,
    observe: Optional[Observer] = None,
) -> Tensor:
    """:func:`xsep.depthwise_conv2d`, with padding as (left, right, top, bottom)."""
    v = depthwise(affine(x, prologue, observe=observe), w_dw, stride, padding, dilation)
    v = v if bias is None else v + _beside_pixels(bias)
    return affine(v, epilogue, observe=observe)


class _Depthwise(torch.autograd.Function):
    """PyTorch's depthwise convolution, for bfloat16 on a CPU with the weight gradient computed in float32.

    PyTorch 2.13's own reads outside its buffers there: NaN, or now and then a segmentation fault (seen at dilation 12
    in oneDNN's jit_avx512_core_bf16_convolution_bwd_weights).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, stride: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.options = ([*stride], [0, 0], [*dilation], False, [0, 0], x.shape[1])
        return F.conv2d(x, w, None, stride, 0, dilation, x.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Optional[Tensor], ...]:
        (dz,), (x, w) = grads, ctx.saved_tensors
        backward = torch.ops.aten.convolution_backward
        dx = backward(dz, x, w, None, *ctx.options, [True, False, False])[0] if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            wide = (t.float() for t in (dz, x, w))
            dw = backward(*wide, None, *ctx.options, [False, True, False])[1].to(w.dtype)
        return dx, dw, None, None


def two_convolutions(
    x: Tensor,
    w_dw: Tensor,
    w_pw: Optional[Tensor],
    bias: Optional[Tensor] = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    prologue: Any = None,
    middle: Any = None,
    epilogue: Any = None,
    residual: Optional[Tensor] = None,
) -> Tensor:
    """The same by PyTorch's conv2d, in x's type at every stage; without ``w_pw`` the depthwise op alone."""
    padded = F.pad(affine(x, prologue), padding)
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        z = _Depthwise.apply(padded, w_dw, stride, dilation)
    else:
        z = F.conv2d(padded, w_dw, None, stride, 0, dilation, x.shape[1])
    v = z if w_pw is None else F.conv2d(affine(z, middle), w_pw)
    v = v if bias is None else v + _beside_pixels(bias.to(v.dtype))
    return affine(v, epilogue, residual)
