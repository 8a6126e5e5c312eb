"""Models whose separable convolutions run through :mod:`xsep`."""

from .xception import Xception, xception

__all__ = ["Xception", "xception"]
