"""xsep: depthwise separable convolution, fast, in PyTorch."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from .arguments import ChannelAffine
from .functional import depthwise_conv2d, explain, separable_conv2d
from .modules import FusedSeparableConv2d
from .swap import swap_separable_convs, unswap

try:
    __version__ = version("xsep")
except PackageNotFoundError:
    __version__ = "0+not.installed"

__all__ = [
    "ChannelAffine",
    "FusedSeparableConv2d",
    "depthwise_conv2d",
    "explain",
    "separable_conv2d",
    "swap_separable_convs",
    "unswap",
]
