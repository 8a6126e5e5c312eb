"""The library ops ``xsep::separable_conv2d`` and ``xsep::depthwise_conv2d`` with all that PyTorch asks of an op."""

from .autograd import depthwise, separable

__all__ = ["depthwise", "separable"]
