"""Why something is not chained: phrases for people, or nothing where it is.

The chain goes past the forwards of the modules it stands in for, so it steps aside wherever somebody could be watching
one, or has changed it.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from ..functional import autocasts
from ..modules import FusedSeparableConv2d, has_hooks
from ..ops.training.selection import not_supported_reasons
from ..problem import Geometry, Problem
from .batchnorm import KINDS
from .handle import image_type
from .layers import geometry_of

__all__ = [
    "batchnorm_reasons", "call_reasons", "convolution_reasons", "image_type", "module_reasons", "pair_reasons",
    "skip_reasons", "weight_reasons",
]  # fmt: skip

#: Other subclasses may give the ops a meaning of their own.
KNOWN_TENSORS = (Tensor, nn.Parameter, FakeTensor)


def call_reasons(x: Tensor) -> list[str]:
    """About the call: what is recorded of it, and of what kind x is."""
    if not torch.is_grad_enabled():
        return ["no gradients are recorded"]
    # torch.compiler.is_exporting() reads this flag, but in what PyTorch 2.10 and 2.11 compile it is always true.
    exporting = torch.compiler._is_exporting_flag
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export() or exporting:
        return ["the network is being traced or exported"]
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            return ["a functorch transform is active"]
        if forward_ad._current_level >= 0:
            return ["a forward-mode level is active"]
        if nn.modules.module._has_any_global_hook():
            return ["hooks are registered for all modules"]
        if type(x) not in KNOWN_TENSORS:
            return [f"the picture is a {type(x).__name__}"]
    return []


def module_reasons(module: nn.Module) -> list[str]:
    """Hooks, or a forward put in place of the class's."""
    found = []
    if has_hooks(module):
        found.append("has hooks")
    if "forward" in vars(module):
        found.append("has a forward of its own")
    return found


def batchnorm_reasons(bn: nn.Module) -> list[str]:
    if not (type(bn) in KINDS or getattr(type(bn), "chainable", False)):
        return [f"is a {type(bn).__name__}"]
    if getattr(bn, "folded_scale", None) is not None:
        return ["is folded"]
    return module_reasons(bn)


def weight_reasons(conv: nn.Conv2d, dtype: torch.dtype) -> list[str]:
    """``dtype`` is that of the images, as autocast has it."""
    if "parametrizations" in conv._modules:
        # To look at such a weight is to make it, and some change whenever they are made.
        return ["has a parametrised weight"]
    weight = conv.weight
    if not torch.compiler.is_compiling() and type(weight) not in KNOWN_TENSORS:
        return [f"has a weight that is a {type(weight).__name__}"]
    if weight.dtype == dtype or (autocasts(weight.device.type) and torch.float64 not in (dtype, weight.dtype)):
        return []
    return [f"has a {weight.dtype} weight for a {dtype} image"]


def convolution_reasons(conv: Any, dtype: Optional[torch.dtype] = None) -> list[str]:
    """About a separable convolution that would become a layer."""
    if type(conv) is not FusedSeparableConv2d:
        return [f"is a {type(conv).__name__}"]
    found = module_reasons(conv)
    conv_dw, conv_pw = conv.convs
    if conv.middle_activation is not None:
        found.append(f"has a {conv.middle_activation} between its convolutions")
    if conv_dw.bias is not None or conv_pw.bias is not None:
        found.append("has a bias")
    if conv.depth_multiplier != 1:
        found.append(f"has depth multiplier {conv.depth_multiplier}")
    if dtype is None or found:
        return found
    for c in (conv_dw, conv_pw):
        found += weight_reasons(c, dtype)
    if conv.backend is not None and not found:
        weight = conv_dw.weight
        geometry = geometry_of(conv, weight.new_empty((1, conv.in_channels, 71, 71), device="meta"))
        found += _backend_reasons(
            conv.backend, weight.device.type, dtype, conv.in_channels, conv.out_channels, weight.shape[2],
            weight.shape[3], *geometry,
        )  # fmt: skip
    return found


@torch.compiler.assume_constant_result
def _backend_reasons(
    backend: str, device: str, dtype: torch.dtype, c_in: int, c_out: int, r: int, s: int, *geometry: int
) -> list[str]:
    """Asked, not traced, as the answer loads libraries; of plain numbers, which is all that a trace can hand on."""
    problem = Problem("separable", device, dtype, True, 1, c_in, 71, 71, 1, r, s, c_out, Geometry(*geometry), (0, 0, 0))
    return not_supported_reasons(problem, backend)


def pair_reasons(conv: Any, bn: Any, dtype: Optional[torch.dtype] = None) -> list[str]:
    """About a separable convolution and the BatchNorm behind it."""
    found = [f"its convolution {reason}" for reason in convolution_reasons(conv, dtype)]
    return found + [f"its BatchNorm {reason}" for reason in batchnorm_reasons(bn)]


def skip_reasons(conv: Any, bn: Any, dtype: Optional[torch.dtype] = None) -> list[str]:
    """About the 1x1 convolution of stride 2 and the BatchNorm on a residual."""
    found = [f"its skip convolution {reason}" for reason in module_reasons(conv)]
    plain = type(conv) is nn.Conv2d or "parametrizations" in conv._modules
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.groups) if plain else None
    if shape != ((1, 1), (2, 2), (0, 0), 1) or conv.bias is not None:
        found.append("its skip is no 1x1 convolution of stride 2 without a bias")
    elif dtype is not None:
        found += [f"its skip convolution {reason}" for reason in weight_reasons(conv, dtype)]
    return found + [f"its skip's BatchNorm {reason}" for reason in batchnorm_reasons(bn)]
