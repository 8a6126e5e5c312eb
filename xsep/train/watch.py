"""What is looked at after each step: its loss, which is logged and has to be finite, and whether to stop by SIGTERM."""

from __future__ import annotations

import math
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any, Optional

import lightning.pytorch as pl
import torch

from .errors import Interrupted, NonFiniteLoss
from .module import Training

#: Later than every step.
NEVER = 2**62


class Watch(pl.Callback):
    """Logs each step's loss and learning rate, over all devices, and ends the run where it must not go on.

    Whether a loss is finite is noted on the device, and read where the host waits for it anyway: on a CPU after each
    step, else when a line is logged, at the end of an epoch, and before a checkpoint, none of which is spoilt that way.
    SIGTERM to any of the processes ends all after the step that is running, behind a checkpoint.

    Args:
        last: the checkpoint to write on SIGTERM.
        every: steps between two lines of the log.
    """

    def __init__(self, last: Path, every: int) -> None:
        self.last, self.every = last, every
        self._asked = False
        self._first_bad: Optional[torch.Tensor] = None
        self._loss = torch.zeros(())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # In place of Lightning's own handler, which ends a run without a checkpoint; teardown restores the original.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: Optional[FrameType]) -> None:
        self._asked = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Training)
        if (batch_idx + 1) % pl_module.geometry.accumulate:
            return
        step = trainer.global_step - 1
        self._loss = trainer.strategy.reduce(pl_module.step_loss, reduce_op="mean")
        self._note(step)
        if self._loss.device.type == "cpu" or (step + 1) % self.every == 0:
            self._check()
        pl_module.log("loss", self._loss, prog_bar=True, logger=False)
        if (step + 1) % self.every == 0 and trainer.logger is not None:
            # Not through the module, whose lines are written later than a run can end here.
            line = {"loss": float(self._loss), "lr": pl_module.rate(step), "epoch": trainer.current_epoch}
            trainer.logger.log_metrics(line, step)
        # At the end of an epoch, validation and the checkpoint behind it come first.
        if not trainer.is_last_batch and trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            trainer.save_checkpoint(self.last, weights_only=False)
            raise Interrupted(f"stopped by SIGTERM after {step + 1} steps; go on with --resume ({self.last})")

    def _note(self, step: int) -> None:
        """Remembers the first step whose loss is not finite, without waiting for the device."""
        if self._first_bad is None:
            self._first_bad = torch.full((), NEVER, dtype=torch.int64, device=self._loss.device)
        here = torch.where(torch.isfinite(self._loss), NEVER, step)
        self._first_bad = torch.minimum(self._first_bad, here)

    def _check(self) -> None:
        step = NEVER if self._first_bad is None else int(self._first_bad)
        if step != NEVER:
            value = float(self._loss)
            now = f"{value}" if not math.isfinite(value) else "not finite"
            raise NonFiniteLoss(f"the loss is {now} in step {step + 1}: a lower --lr, or another --precision, may help")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        self._check()
