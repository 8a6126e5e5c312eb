"""What Lightning trains: loss, metrics, optimiser and learning rate of a preset around its network."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from .data import Loaders
from .metrics import MeanAveragePrecisionAtK
from .network import build
from .optimisation import optimizer, rate_factor
from .order import Geometry, mixed
from .pictures import normalised
from .presets import Preset


def loss_of(logits: Tensor, target: Tensor, multilabel: bool) -> Tensor:
    """The mean over pictures of the negative log-likelihood, in float32.

    The paper ends its network in a "logistic regression layer". With one label a picture that is the softmax's
    cross-entropy; with several, where the paper does not say, one logistic regression a class, summed.

    Args:
        logits: [N, classes].
        target: int64 [N], or [N, classes] of 0 and 1 for ``multilabel``.
        multilabel: whether a picture has several labels.
    """
    if multilabel:
        return F.binary_cross_entropy_with_logits(logits.float(), target, reduction="sum") / len(logits)
    return F.cross_entropy(logits.float(), target)


class Training(pl.LightningModule):
    """A preset's training.

    Args:
        preset: the numbers.
        classes: of the classifier.
        chain: whether the network trains as a chain (see :func:`xsep.models.xception`).
        lr: the starting learning rate.
        geometry: how a step's pictures are shared out.
        steps_per_epoch: of the optimiser.
        seed: of weights and dropout.
    """

    def __init__(
        self, preset: Preset, classes: int, chain: bool, lr: float, geometry: Geometry, steps_per_epoch: int, seed: int
    ) -> None:
        super().__init__()
        self.preset, self.lr, self.geometry = preset, lr, geometry
        self.steps_per_epoch, self.seed = steps_per_epoch, seed
        torch.manual_seed(mixed(seed))
        network: Any = build(preset.network, classes, preset.dropout, chain)
        self.network = network.to(memory_format=torch.channels_last)
        self.val_loss = MeanMetric()
        if preset.multilabel:
            metrics: dict[str, Metric] = {"val_map100": MeanAveragePrecisionAtK(100)}
        else:
            metrics = {
                f"val_top{k}": MulticlassAccuracy(classes, min(k, classes), average="micro", validate_args=False)
                for k in (1, 5)
            }
        # Without groups, which are made of metrics whose states happen to be equal after the first batch.
        self.metrics = MetricCollection(dict(metrics), compute_groups=False)
        #: Mean of the losses of a step's batches on this device; complete when the optimiser has stepped.
        self.step_loss = torch.zeros(())

    def on_train_epoch_start(self) -> None:
        loaders: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(loaders, Loaders) and loaders.order is not None:
            loaders.order.set_epoch(self.current_epoch)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        # Dropout by place and time rather than by what was drawn before: a resumed run draws the same, and so do
        # several devices and one that accumulates their batches.
        place = batch_idx * self.geometry.world + self.global_rank
        torch.manual_seed(mixed(self.seed, self.current_epoch, place))
        x, target = batch
        loss = loss_of(self.network(normalised(x)), target, self.preset.multilabel)
        share = loss.detach() / self.geometry.accumulate
        self.step_loss = share if batch_idx % self.geometry.accumulate == 0 else self.step_loss + share
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, target = batch
        logits = self.network(normalised(x)).float()
        if not self.preset.multilabel:
            real = target >= 0  # without the blanks that fill up the last batch
            logits, target = logits[real], target[real]
        else:
            real = target.any(1)
            logits, target = logits[real], target[real]
        if len(target):
            self.val_loss.update(loss_of(logits, target, self.preset.multilabel), len(target))
            self.metrics.update(logits, target)
        self.log("val_loss", self.val_loss, prog_bar=True, on_step=False, on_epoch=True)
        self.log_dict(self.metrics, prog_bar=True, on_step=False, on_epoch=True)

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        factor = rate_factor(self.preset.decay, step, self.steps_per_epoch, self.geometry.global_batch)
        return self.lr * factor

    def configure_optimizers(self) -> Any:
        made = optimizer(self.preset, self.network, self.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: self.rate(step) / self.lr)
        return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
