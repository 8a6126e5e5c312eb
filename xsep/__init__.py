"""xsep: depthwise separable convolution, fast, in PyTorch."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from .arguments import ChannelAffine
from .autotuner import autotune
from .backends.packed_weights import forget_packed_weights
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
    "autotune",
    "depthwise_conv2d",
    "explain",
    "forget_packed_weights",
    "separable_conv2d",
    "swap_separable_convs",
    "unswap",
]
