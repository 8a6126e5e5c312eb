"""Training Xception from a command line, by the paper's recipes: ``python -m xsep.train --help``.

Lightning runs the loop, so that several devices and machines, mixed precision, checkpoints, progress bars and loggers
are its own; what is here are the recipes, the input and the order of its pictures, the metrics, and what happens when
something goes wrong. Nothing of it is imported by the rest of xsep, and importing this package needs no Lightning.
"""

from .errors import TrainError
from .presets import PRESETS, Preset

__all__ = ["PRESETS", "Preset", "TrainError"]
