"""What a run leaves behind to be resumed from, and whether a checkpoint is one of this run's kind."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch

from .errors import TrainError
from .order import Geometry

#: Under which a checkpoint of Lightning's holds what this recipe adds.
KEY = "xsep_train"


class Identity(NamedTuple):
    """What has to be the same for a run to go on."""

    preset: str
    network: str
    classes: int
    pictures: int  # in the training set
    batch: int
    world: int
    accumulate: int
    seed: int

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.batch, self.world, self.accumulate)


class Stamp(pl.Callback):
    """Writes a run's identity into its checkpoints."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        checkpoint[KEY] = self.identity._asdict()


def resume_point(path: Path, mine: Identity, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Where a checkpoint's run is to go on: the epoch, and how many of this device's batches of it are done.

    Args:
        path: the checkpoint.
        mine: the run that is to go on.
        shapes: of its network's parameters and buffers, by their names in a checkpoint.

    Raises:
        TrainError: the file cannot be read, or is of another network, preset or data set, or is shared out otherwise.
    """
    if not path.is_file():
        raise TrainError(f"there is no checkpoint {path} to resume from")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        identity = Identity(**found[KEY])
        state, step = found["state_dict"], int(found["global_step"])
    except (KeyError, TypeError):
        raise TrainError(f"{path} is no checkpoint of xsep.train") from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
        raise TrainError(f"{path} is no checkpoint that can be read") from None
    theirs = {name: tuple(t.shape) for name, t in state.items()}
    if (identity.network, identity.classes) != (mine.network, mine.classes) or theirs != shapes:
        raise TrainError(
            f"{path} holds another network: {identity.network} with {identity.classes} classes (preset "
            f"{identity.preset}), and this run's is {mine.network} with {mine.classes} (preset {mine.preset})"
        )
    for name, what in (("preset", "preset"), ("pictures", "number of training pictures"), ("seed", "seed")):
        if getattr(identity, name) != getattr(mine, name):
            raise TrainError(
                f"{path} is of another run: its {what} is {getattr(identity, name)}, here {getattr(mine, name)}"
            )
    if identity.geometry.global_batch != mine.geometry.global_batch:
        raise TrainError(
            f"{path} has {identity.geometry.global_batch} pictures a step, here {mine.geometry.global_batch}: "
            "--batch, --devices, --nodes and --accumulate have to multiply to the same"
        )
    epoch, done = divmod(step, mine.pictures // mine.geometry.global_batch)
    if done and identity.geometry != mine.geometry:
        raise TrainError(
            f"{path} is from the middle of an epoch, which goes on with as many devices: "
            f"--batch {identity.batch} --accumulate {identity.accumulate} on {identity.world} devices in all"
        )
    return epoch, done * mine.accumulate
