"""The recipes: numbers alone, each with its source.

ImageNet's and JFT's are those of Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions" (arXiv
1610.02357v3), section 4: 60 GPUs, in synchronous steps for ImageNet, in asynchronous ones for JFT. The paper
leaves open how many pictures a GPU had; Inception V3's recipe (arXiv 1512.00567, section 8), whose learning rate and
decay these are, has 32. A rate of 0.045 is therefore taken to belong to 60 x 32 = 1,920 pictures a step: a run with
fewer wants a lower one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional


@dataclass(frozen=True)
class Decay:
    """The learning rate times ``factor`` after every so many epochs or training pictures (one of the two)."""

    factor: float
    epochs: Optional[int] = None
    samples: Optional[int] = None


@dataclass(frozen=True)
class Preset:
    """One recipe."""

    name: str
    network: str  # "xception" or "small"
    optimizer: str  # "sgd" or "rmsprop", with a momentum of 0.9
    lr: float
    decay: Decay
    dropout: float  # before the classifier
    multilabel: bool  # several labels a picture: MAP@100 instead of top-1 and top-5
    size: int  # of the square pictures that the network sees, in pixels
    batch: int  # pictures a device and step
    epochs: int
    polyak: float  # decay of the exponential moving average of the weights
    global_batch: Optional[int] = None  # pictures a step that lr belongs to
    weight_decay: float = 1e-5
    momentum: float = 0.9


#: Decay of the moving average. The paper has "Polyak averaging" and no number; this is Inception's (the constant
#: MOVING_AVERAGE_DECAY of TensorFlow's published inception_train.py).
POLYAK = 0.9999

#: The paper does not count epochs on ImageNet: Inception V3 trained for 100. On JFT it stopped after a month, far from
#: converged, so that one epoch of 350 million pictures is more than anybody's budget.
PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "imagenet", "xception", "sgd", 0.045, Decay(0.94, epochs=2), dropout=0.5, multilabel=False, size=299,
            batch=32, epochs=100, polyak=POLYAK, global_batch=60 * 32,
        ),
        Preset(
            "jft", "xception", "rmsprop", 0.001, Decay(0.9, samples=3_000_000), dropout=0.0, multilabel=True, size=299,
            batch=32, epochs=1, polyak=POLYAK,
        ),
        # The first recipe on scikit-learn's 1,797 handwritten digits, in a minute on two cores; its own are the batch,
        # the epochs and a moving average short enough for some hundred steps.
        Preset(
            "digits", "small", "sgd", 0.045, Decay(0.94, epochs=2), dropout=0.5, multilabel=False, size=8, batch=64,
            epochs=12, polyak=0.99,
        ),
    )
}  # fmt: skip
