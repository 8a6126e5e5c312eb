"""From a preset's numbers to an optimiser, a learning rate for each step, and Polyak's average of the weights."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn

from .presets import Decay, Preset

#: RMSprop's decay of the mean square. The paper does not give it; Inception V3's recipe and TensorFlow have 0.9. Its
#: epsilon, left open too, is PyTorch's.
ALPHA = 0.9


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """All parameters; those of convolutions and classifier with weight decay, biases and BatchNorms without.

    The paper's 1e-5 is an L2 term ``weight_decay * sum(w ** 2) / 2`` of the loss, in TensorFlow of its time over the
    layers' weights alone: its gradient is what PyTorch's ``weight_decay`` adds.
    """
    parameters = list(network.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def optimizer(preset: Preset, network: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The preset's optimiser for a network, at a starting learning rate."""
    groups = parameter_groups(network, preset.weight_decay)
    if preset.optimizer == "sgd":
        return torch.optim.SGD(groups, lr, preset.momentum)
    return torch.optim.RMSprop(groups, lr, ALPHA, momentum=preset.momentum)


def rate_factor(decay: Decay, step: int, steps_per_epoch: int, global_batch: int) -> float:
    """What the learning rate of a step (counted from 0) is multiplied by.

    Args:
        decay: factor and interval.
        step: steps of the optimiser before this one.
        steps_per_epoch: of the optimiser.
        global_batch: pictures a step, of all devices and accumulated batches together.
    """
    if decay.epochs is not None:
        return decay.factor ** (step // (decay.epochs * steps_per_epoch))
    assert decay.samples is not None
    return decay.factor ** (step * global_batch // decay.samples)


class Polyak(WeightAveraging):
    """An exponential moving average of weights and BatchNorm statistics: validated with, exported, saved, resumed.

    Averaging starts with the first step. So that the random weights of the beginning are soon forgotten, the decay
    grows to its value as (1 + steps) / (10 + steps): the rule of TensorFlow's ``ExponentialMovingAverage`` where it is
    told the step.
    """

    def __init__(self, decay: float) -> None:
        def average(averages: list[Tensor], models: list[Tensor], count: Tensor) -> None:
            if not averages[0].is_floating_point():
                torch._foreach_copy_(averages, models)
                return
            steps = count.to(averages[0].dtype)
            weight = 1 - torch.clamp((1 + steps) / (10 + steps), max=decay)
            differences = torch._foreach_sub(models, averages)
            torch._foreach_mul_(differences, weight)
            torch._foreach_add_(averages, differences)

        super().__init__(multi_avg_fn=average)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            # The count is looked at in each step, and on a GPU the host would wait for it.
            self._average_model.n_averaged = self._average_model.n_averaged.cpu()
