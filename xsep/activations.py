"""The activations and their derivatives as plain, differentiable PyTorch operations."""

from __future__ import annotations

import math

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
    if code == ELU:
        return dy * torch.where(u > 0, torch.ones_like(u), alpha * torch.exp(u.clamp(max=0)))
    if code == SILU:
        s = torch.sigmoid(u)
        return dy * (s * (1 + u * (1 - s)))
    if code == HARDSWISH:
        inside = torch.where(u > -3, u / 3 + 0.5, torch.zeros_like(u))
        return dy * torch.where(u < 3, inside, torch.ones_like(u))
    if code == GELU:
        cdf = 0.5 * (1 + torch.erf(u * math.sqrt(0.5)))
        return dy * (cdf + u * torch.exp(-0.5 * u * u) * (1 / math.sqrt(2 * math.pi)))
    if code == GELU_TANH:
        k = math.sqrt(2 / math.pi)
        t = torch.tanh(k * (u + 0.044715 * u**3))
        return dy * (0.5 * (1 + t) + 0.5 * u * (1 - t * t) * k * (1 + 3 * 0.044715 * u * u))
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
