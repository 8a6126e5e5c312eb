"""The ``aten`` backend: PyTorch's own convolutions and elementwise operations. Everywhere, every type, never wrong.

Its primitives are differentiable, so ``ATEN.separable_backward`` is also what the ops' double backward runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import activate, apply_affine, gradient_from_input, per_channel, scale_and_shift
from ..problem import Affine, DepthwiseArgs, Geometry, Problem, SeparableArgs
from .base import Backend, DepthwiseGradients, channel_sum, with_bias


def pad(x: Tensor, g: Geometry) -> tuple[Tensor, list[int]]:
    """x and the symmetric padding (vertical, horizontal) that is left for the convolution itself to add."""
    left, right, top, bottom = g.pad_left, g.pad_right, g.pad_top, g.pad_bottom
    symbols = any(isinstance(side, torch.SymInt) for side in (left, right, top, bottom))
    if not symbols and left == right and top == bottom:  # of symbols it is not asked: an export is for any size
        return x, [top, left]
    return F.pad(x, (left, right, top, bottom)), [0, 0]


class AtenBackend(Backend):
    name = "aten"

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        return []

    def plan(self, problem: Problem) -> str:
        calls = "one conv2d" if problem.op == "depthwise" else "two conv2d"
        return f"PyTorch's own: {calls} and elementwise operations, every stage through memory"

    def depthwise(self, x: Tensor, w_dw: Tensor, prologue: Affine, epilogue: Affine, geometry: Geometry) -> Tensor:
        return apply_affine(self._convolved(x, w_dw, None, prologue, geometry), epilogue)

    def _convolved(
        self, x: Tensor, w_dw: Tensor, bias: Optional[Tensor], prologue: Affine, geometry: Geometry
    ) -> Tensor:
        """bias is [C_mid], of x's type."""
        padded, padding = pad(apply_affine(x, prologue), geometry)
        if _is_misread(padded, w_dw, geometry.stride):
            padded, w_dw = _surely_contiguous(padded), _surely_contiguous(w_dw)
        return F.conv2d(padded, w_dw, bias, geometry.stride, padding, geometry.dilation, x.shape[1])

    def pointwise(self, z: Tensor, w_pw: Tensor) -> Tensor:
        return F.conv2d(z, w_pw)

    def pointwise_dgrad(self, dv: Tensor, w_pw: Tensor) -> Tensor:
        return F.conv_transpose2d(dv, w_pw)

    def pointwise_wgrad(self, du: Tensor, z: Tensor, w_pw: Tensor) -> Tensor:
        return _convolution_backward(du, z, w_pw, (1, 1), [0, 0], (1, 1), 1, (False, True))[1]

    def depthwise_forward(self, a: DepthwiseArgs) -> Tensor:
        # The gradient of a depthwise convolution's own bias is a sum of one value after another, tens of ulp off.
        differentiated = a.bias is not None and a.bias.requires_grad and torch.is_grad_enabled()
        if a.scale_e is not None or differentiated or (a.bias is not None and a.bias.dtype != a.x.dtype):
            return super().depthwise_forward(a)
        return apply_affine(self._convolved(a.x, a.w_dw, a.bias, a.prologue, Geometry(*a.geometry)), a.epilogue)

    def separable_forward(self, a: SeparableArgs) -> Tensor:
        z = self.depthwise(a.x, a.w_dw, a.prologue, a.middle, Geometry(*a.geometry))
        if a.scale_e is None and (a.bias is None or a.bias.dtype == a.x.dtype):
            v, epilogue = F.conv2d(z, a.w_pw, a.bias), a.epilogue
        else:
            v, epilogue = F.conv2d(z, a.w_pw), with_bias(a.epilogue, a.bias)
        u = scale_and_shift(v, epilogue)
        if a.residual is not None:
            u = u + a.residual
        return activate(u, epilogue.activation, epilogue.alpha)

    def depthwise_backward_kernel(
        self, dz: Tensor, x: Tensor, w_dw: Tensor, prologue: Affine, geometry: Geometry, wanted: Sequence[bool]
    ) -> DepthwiseGradients:
        w_x, w_w, w_scale, w_shift = wanted
        need_input = w_x or w_scale or w_shift
        u = scale_and_shift(x, prologue)
        padded, padding = pad(activate(u, prologue.activation, prologue.alpha), geometry)
        dpadded, dw = _convolution_backward(
            dz, padded, w_dw, geometry.stride, padding, geometry.dilation, x.shape[1], (need_input, w_w)
        )
        if not need_input:
            return DepthwiseGradients(None, dw, None, None)
        g = geometry
        if padded.shape != x.shape:
            dpadded = F.pad(dpadded, (-g.pad_left, -g.pad_right, -g.pad_top, -g.pad_bottom))
        du = gradient_from_input(dpadded, u, prologue.activation, prologue.alpha)
        dx: Optional[Tensor] = None
        if w_x:
            dx = du if prologue.scale is None else (du * per_channel(prologue.scale)).to(du.dtype)
        return DepthwiseGradients(
            dx, dw if w_w else None, channel_sum(du * x) if w_scale else None, channel_sum(du) if w_shift else None
        )


def is_bare(a: Union[SeparableArgs, DepthwiseArgs]) -> bool:
    """Whether the forward is one or two calls of ``conv2d`` and nothing else."""
    g = Geometry(*a.geometry)
    bare = a.prologue.is_identity() and a.epilogue.is_identity()
    if isinstance(a, SeparableArgs):
        bare = bare and a.middle.is_identity() and a.residual is None
    even = g.pad_left == g.pad_right and g.pad_top == g.pad_bottom
    if not bare or not even or (a.bias is not None and a.bias.dtype != a.x.dtype):
        return False
    return not _is_misread(a.x, a.w_dw, g.stride)


def _is_misread(x: Tensor, w: Tensor, stride: tuple[int, int]) -> bool:
    """Whether a convolution of PyTorch 2.13's CPU build may read the wrong pixels where x or w is channels_last.

    Seen at a horizontal stride: of bfloat16 with a depth multiplier, and of one channel in float32 too. Where the
    stride leaves one column of output, 3x3 over [2, 1, 4, 4] at stride (1, 2) say, the result is off by as much as it
    is large; where it leaves more, the result is right, but the program died now and then of an address that is
    nobody's. The weights' gradient in bfloat16 is wrong there as well. None of it was seen of contiguous pictures and
    weights.
    """
    if x.device.type != "cpu" or stride[1] == 1:
        return False
    if x.shape[1] == 1:
        return x.dtype in (torch.float32, torch.bfloat16)
    return x.dtype == torch.bfloat16 and w.shape[0] != x.shape[1]


def _surely_contiguous(t: Tensor) -> Tensor:
    """With strides that are channels_last by no reading, which those of a dimension of size 1 may otherwise be."""
    return t.reshape(-1).view(t.shape)


def _convolution_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    stride: tuple[int, int],
    padding: list[int],
    dilation: tuple[int, int],
    groups: int,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    def call(dy: Tensor, x: Tensor, w: Tensor, input_wanted: bool, weight_wanted: bool) -> tuple[Tensor, Tensor]:
        dx, dw, _ = torch.ops.aten.convolution_backward(
            dy, x, w, None, list(stride), padding, list(dilation), False, [0, 0], groups,
            [input_wanted, weight_wanted, False],
        )  # fmt: skip
        return dx, dw

    input_wanted, weight_wanted = wanted
    if _is_misread(x, w, stride):
        dy, x, w = (_surely_contiguous(t) for t in (dy, x, w))
    if weight_wanted and groups > 1 and x.dtype == torch.bfloat16 and x.device.type == "cpu":
        # The bfloat16 depthwise weight gradient of PyTorch 2.13's CPU build reads memory that nothing wrote (seen for
        # channels_last maps one pixel wide at stride 2: NaN, or 1e36). Float32 does not.
        dw = call(dy.float(), x.float(), w.float(), False, True)[1].to(w.dtype)
        return (call(dy, x, w, True, False)[0] if input_wanted else x), dw
    return call(dy, x, w, input_wanted, weight_wanted)


ATEN = AtenBackend()
