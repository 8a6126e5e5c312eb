"""The activations and their derivatives as plain, differentiable PyTorch operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import ELU, GELU, GELU_TANH, HARDSWISH, IDENTITY, LEAKY_RELU, RELU, RELU6, SILU, Affine


def activate(u: Tensor, code: int, alpha: float) -> Tensor:
    """act(u), elementwise, in u's type."""
    if code == IDENTITY:
        return u
    if code == RELU:
        return F.relu(u)
    if code == RELU6:
        return F.relu6(u)
    if code == SILU:
        return F.silu(u)
    if code == HARDSWISH:
        return F.hardswish(u)
    if code == GELU:
        return F.gelu(u)
    if code == GELU_TANH:
        return F.gelu(u, approximate="tanh")
    if code == ELU:
        return F.elu(u, alpha)
    if code == LEAKY_RELU:
        return F.leaky_relu(u, alpha)
    raise ValueError(f"activation code {code} is not one of the known codes 0 to {LEAKY_RELU}")


def output_determines_gradient(code: int, alpha: float) -> bool:
    """Whether act'(u) follows from act(u) alone, so that a backward needs the output only.

    Not for silu, gelu and hardswish (silu(-0.5) = silu(-2.509)), nor for elu and leaky_relu with alpha <= 0, where
    the sign of the output no longer tells the sign of u.
    """
    if code in (ELU, LEAKY_RELU):
        return alpha > 0
    return code in (IDENTITY, RELU, RELU6)


def gradient_from_output(dy: Tensor, y: Tensor, code: int, alpha: float) -> Tensor:
    """dy * act'(u) where y = act(u) determines it; differentiable in dy and y."""
    if code == IDENTITY:
        return dy
    if code == RELU:
        return dy * (y > 0)
    if code == RELU6:
        return dy * ((y > 0) & (y < 6))
    if code == ELU:
        return dy * torch.where(y > 0, torch.ones_like(y), y + alpha)
    if code == LEAKY_RELU:
        return torch.where(y > 0, dy, dy * alpha)
    raise ValueError(f"the output of activation code {code} does not determine its gradient")


def gradient_from_input(dy: Tensor, u: Tensor, code: int, alpha: float) -> Tensor:
    """dy * act'(u); differentiable in dy and u. Conventions at the kinks are PyTorch's."""
    if code == IDENTITY:
        return dy
    if code == RELU:
        return dy * (u > 0)
    if code == RELU6:
        return dy * ((u > 0) & (u < 6))
    if code == LEAKY_RELU:
        return torch.where(u > 0, dy, dy * alpha)
    # PyTorch's own kernels from here on: in a 16-bit type they compute in float32, where the formulas written out would
    # round at each step and be off by many ulp where a gradient nearly vanishes, and they are differentiable.
    kind = torch.promote_types(dy.dtype, u.dtype)
    dy, u = dy.to(kind), u.to(kind)
    if code == ELU:
        return torch.ops.aten.elu_backward(dy, alpha, 1.0, 1.0, False, u)
    if code == SILU:
        wide = torch.promote_types(kind, torch.float32)  # silu_backward alone has no derivative
        v = u.to(wide)
        s = torch.sigmoid(v)
        return (dy.to(wide) * (s * (1 + v * (1 - s)))).to(kind)
    if code == HARDSWISH:
        return torch.ops.aten.hardswish_backward(dy, u)
    if code == GELU:
        return torch.ops.aten.gelu_backward(dy, u, approximate="none")
    if code == GELU_TANH:
        return torch.ops.aten.gelu_backward(dy, u, approximate="tanh")
    raise ValueError(f"activation code {code} is not one of the known codes 0 to {LEAKY_RELU}")


def per_channel(v: Tensor) -> Tensor:
    """[C] -> [C, 1, 1], to stand beside [N, C, H, W]."""
    return v[:, None, None]


def scale_and_shift(v: Tensor, affine: Affine) -> Tensor:
    """scale * v + shift per channel of v [N, C, H, W], computed in the wider of the types and returned in v's."""
    u = v
    if affine.scale is not None:
        u = u * per_channel(affine.scale)
    if affine.shift is not None:
        u = u + per_channel(affine.shift)
    return u.to(v.dtype)


def apply_affine(v: Tensor, affine: Affine) -> Tensor:
    """act(scale * v + shift) per channel of v [N, C, H, W], in v's type."""
    return activate(scale_and_shift(v, affine), affine.activation, affine.alpha)
