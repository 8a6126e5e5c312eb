"""From what the command line names to loaders: the data sets of a preset, and each device's batches."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any, NamedTuple, Optional

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .digits import Digits
from .errors import TrainError
from .folders import Folder
from .order import Draw, EpochBatches, Geometry, Share, mixed
from .pictures import Source, as_tensor, centre_crop, random_crop
from .presets import Preset
from .shards import Shards, expanded


class Sets(NamedTuple):
    """What is trained on and what is validated with; both have as many classes."""

    train: Source
    val: Source
    classes: int


def _shard_paths(what: str) -> list[Path]:
    """The tar files of a pattern with braces or wildcards, of a name, or in a folder; none for other things."""
    if Path(what).is_dir():
        return sorted(Path(what).glob("*.tar"))
    if not what.endswith(".tar"):
        return []
    paths: list[Path] = []
    for name in expanded(what):
        wild = any(sign in name for sign in "*?[")
        found = sorted(glob.glob(name)) if wild else [name]
        if not found:
            raise TrainError(f"there is no file {name}")
        paths += [Path(f) for f in found]
    return paths


def _opened(what: str, classes: Optional[int], names: Optional[list[str]] = None) -> Source:
    shards = _shard_paths(what)
    return Shards(shards, classes) if shards else Folder(Path(what), names)


def _halves(folder: Path) -> tuple[str, str]:
    """What is trained on and what is validated with, of a folder that has both."""
    if folder.suffix == ".tar":
        raise TrainError(f"{folder} is what to train on: say with --val what to validate with")
    if not folder.is_dir():
        raise TrainError(f"there is no folder {folder}")
    shards = not (folder / "train").exists() and any(folder.glob("train*.tar"))
    train, val = (f"{folder}/{half}{'*.tar' if shards else ''}" for half in ("train", "val"))
    return train, val


def open_sets(preset: Preset, data: Optional[str], val: Optional[str], classes: Optional[int]) -> Sets:
    """The data sets that a preset trains on.

    Args:
        preset: whose.
        data: a folder with ``train`` and ``val`` in it, or with tar files whose names begin so; or, with ``val``, what
            is trained on. Each is a folder of class folders, a folder of tar files, or a pattern of tar files such as
            ``train-{000..146}.tar``.
        val: what is validated with.
        classes: how many there are; None for those that are found.

    Raises:
        TrainError: something is missing or does not fit.
    """
    if preset.name == "digits":
        if data is not None or val is not None:
            raise TrainError("the digits come with scikit-learn: --data and --val are for the other presets")
        return Sets(Digits(True), Digits(False), Digits.classes)
    if data is None:
        raise TrainError(f"the preset {preset.name} needs pictures: name their folder with --data")
    if val is None:
        data, val = _halves(Path(data))
    train = _opened(data, classes)
    count = train.classes if classes is None else classes
    if train.classes > count:
        raise TrainError(f"{data} has {train.classes} classes, and --classes is {count}")
    return Sets(train, _opened(val, count, getattr(train, "names", None)), count)


class Pictures(Dataset[tuple[Tensor, Tensor]]):
    """Input and target of draws. What is random about one depends on seed, epoch and picture alone.

    An item is uint8 [size, size, channels] with an int64 class (-1 for a blank), or with float32 [classes] of 0 and 1
    for a multi-label preset.
    """

    def __init__(self, source: Source, preset: Preset, classes: int, size: int, training: bool, seed: int) -> None:
        self.source, self.preset, self.classes, self.size = source, preset, classes, size
        self.training, self.seed = training, seed

    def __len__(self) -> int:
        return len(self.source)

    def _target(self, labels: tuple[int, ...]) -> Tensor:
        if self.preset.multilabel:
            found = torch.zeros(self.classes)
            found[list(labels)] = 1.0
            return found
        if len(labels) > 1:
            raise TrainError(f"a picture has {len(labels)} labels, and the preset {self.preset.name} takes one")
        return torch.tensor(labels[0] if labels else -1)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor]:
        if draw.number < 0:
            channels = 1 if isinstance(self.source, Digits) else 3
            return torch.zeros(self.size, self.size, channels, dtype=torch.uint8), self._target(())
        image, target = self.source.image(draw.number), self._target(self.source.labels(draw.number))
        if isinstance(self.source, Digits):
            return as_tensor(image), target
        if self.training:
            generator = torch.Generator().manual_seed(mixed(self.seed, draw.epoch, draw.number))
            return random_crop(image, self.size, generator), target
        return centre_crop(image, self.size), target


class Loaders(pl.LightningDataModule):
    """Each device's loaders.

    Args:
        sets: what there is.
        preset: whose.
        size: of the pictures, in pixels.
        geometry: how a step's pictures are shared out.
        seed: of order and crops.
        workers: processes that decode, for each device.
        start: epoch to begin with, and how many of its batches to leave out.
    """

    def __init__(
        self, sets: Sets, preset: Preset, size: int, geometry: Geometry, seed: int, workers: int, start: tuple[int, int]
    ) -> None:
        super().__init__()
        self.sets, self.preset, self.size, self.geometry = sets, preset, size, geometry
        self.seed, self.workers, self.start = seed, workers, start
        self.order: Optional[EpochBatches] = None

    def _loader(self, source: Source, training: bool, batches: Any) -> DataLoader[Any]:
        assert self.trainer is not None
        pictures = Pictures(source, self.preset, self.sets.classes, self.size, training, self.seed)
        return DataLoader(
            pictures, batch_sampler=batches, num_workers=self.workers, persistent_workers=self.workers > 0,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )  # fmt: skip

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        rank, (epoch, done) = self.trainer.global_rank, self.start
        self.order = EpochBatches(len(self.sets.train), self.geometry, rank, self.seed, epoch, done)
        return self._loader(self.sets.train, True, self.order)

    def val_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        trainer, (batch, world, _) = self.trainer, self.geometry
        return self._loader(self.sets.val, False, Share(len(self.sets.val), batch, world, trainer.global_rank))
