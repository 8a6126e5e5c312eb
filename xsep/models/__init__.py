"""Models whose separable convolutions run through :mod:`xsep`, the paper's baseline, and loading published weights."""

from .inception_v3 import InceptionV3, inception_v3
from .weights import WeightsError, load_weights
from .xception import Xception, xception

__all__ = ["InceptionV3", "WeightsError", "Xception", "inception_v3", "load_weights", "xception"]
