"""The training chain: BatchNorm networks of separable layers without elementwise passes."""

from .handle import Handle
from .modules import SeparableChain, SeparableConvBN

__all__ = ["Handle", "SeparableChain", "SeparableConvBN"]
