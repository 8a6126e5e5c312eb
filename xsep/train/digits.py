"""Scikit-learn's 1,797 handwritten digits of 8x8 pixels: a small real data set that needs no download."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .errors import TrainError

#: How many are trained on; the other 297 are validated with.
TRAINING = 1500


class Digits:
    """One of the two parts of the digits, which are split at random, always the same way."""

    classes = 10

    def __init__(self, training: bool) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise TrainError("the digits come with scikit-learn: pip install scikit-learn") from None
        digits = load_digits()
        order = np.random.RandomState(0).permutation(len(digits.images))
        chosen = order[:TRAINING] if training else order[TRAINING:]
        # Sixteen grey values, spread over a byte.
        self._images = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        self._targets = digits.target[chosen]

    def __len__(self) -> int:
        return len(self._images)

    def labels(self, index: int) -> tuple[int, ...]:
        return (int(self._targets[index]),)

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self._images[index])
