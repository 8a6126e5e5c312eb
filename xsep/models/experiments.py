"""What the paper holds separable convolution against: another order, and coarser segments of channels.

Chollet, arXiv 1610.02357v3, sections 1.2 and 1.3: between a regular convolution and a separable one lies a spectrum,
by into how many segments of channels the spatial convolution divides its input; and Inception modules, taken to the
extreme, apply the pointwise convolution first, with a ReLU behind each of the two.
"""

from __future__ import annotations

from typing import Optional

from torch import Tensor, nn

from ..activations import activate
from ..arguments import BACKEND_NAMES, ChannelAffine
from ..functional import depthwise_conv2d
from ..problem import ACTIVATIONS, DEFAULT_ALPHA


class SpectrumConv2d(nn.Module):
    """A 3x3 convolution within segments of channels and a 1x1 convolution across them, in either order.

    ``conv1`` is the spatial and ``pointwise`` the 1x1 convolution; one segment is a regular 3x3 convolution, without
    the 1x1. The spatial one of a segment a channel runs as xsep's depthwise op, the activation before it included.

    Args:
        c_in: channels of the input, a multiple of segments.
        c_out: channels of the output, likewise.
        dilation: of the spatial convolution, padded so that the size stays.
        prologue_activation: before the first of the two.
        middle_activation: between them; with the pointwise one first, None is a ReLU.
        pointwise_first: whether the 1x1 convolution comes first.
        segments: of the spatial convolution's input; None for one a channel.
        backend: which backend runs the depthwise op; None for the fastest there is.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        *,
        dilation: int,
        prologue_activation: Optional[str],
        middle_activation: Optional[str],
        pointwise_first: bool,
        segments: Optional[int],
        backend: Optional[str],
    ) -> None:
        super().__init__()
        if backend is not None and backend not in BACKEND_NAMES:
            raise ValueError(f"backend must be None or one of {', '.join(BACKEND_NAMES)}, got {backend!r}")
        self.pointwise_first = pointwise_first
        self.dilation = dilation
        self.backend = backend
        self.prologue_activation = prologue_activation
        self.middle_activation = middle_activation or ("relu" if pointwise_first else None)
        spatial = c_out if pointwise_first else c_in
        groups = spatial if segments is None else segments
        self.conv1 = nn.Conv2d(spatial, spatial, 3, padding=dilation, dilation=dilation, groups=groups, bias=False)
        self.pointwise: Optional[nn.Conv2d] = nn.Conv2d(c_in, c_out, 1, bias=False)
        if segments == 1:
            self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=dilation, dilation=dilation, bias=False)
            self.pointwise = None

    def forward(self, x: Tensor) -> Tensor:
        """[N, c_in, H, W] -> [N, c_out, H, W]."""
        if self.pointwise is None:
            return self._spatial(x, self.prologue_activation)
        if self.pointwise_first:
            return self._spatial(self.pointwise(_activated(x, self.prologue_activation)), self.middle_activation)
        return self.pointwise(_activated(self._spatial(x, self.prologue_activation), self.middle_activation))

    def _spatial(self, x: Tensor, activation: Optional[str]) -> Tensor:
        if self.conv1.groups < self.conv1.in_channels:
            return self.conv1(_activated(x, activation))
        return depthwise_conv2d(
            x, self.conv1.weight, padding=self.dilation, dilation=self.dilation,
            prologue=ChannelAffine(activation=activation), backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        order = ", pointwise first" if self.pointwise_first else ""
        return f"prologue={self.prologue_activation}, middle={self.middle_activation}{order}"


def _activated(x: Tensor, name: Optional[str]) -> Tensor:
    if name is None:
        return x
    code = ACTIVATIONS.index(name)
    return activate(x, code, DEFAULT_ALPHA.get(code, 0.0))
