"""One run, from the command line's choices to the weights it leaves behind."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from . import curves
from .checkpoints import Identity, Stamp, resume_point
from .data import Loaders, Sets, open_sets
from .errors import TrainError
from .module import Training
from .optimisation import Polyak
from .order import EpochBatches, Geometry
from .presets import PRESETS, Preset
from .watch import Watch

#: The smallest pictures that Xception takes.
SMALLEST = 71

#: Hints that miss the point here: choices made on purpose; a run resumed within an epoch, which Lightning takes for
#: impossible as the order of the pictures, not the loader, knows where to go on; and the strides of 1x1 and depthwise
#: filters, which are two names of one layout.
HINTS = (
    ".*does not have many workers.*", ".*is smaller than the logging interval.*", ".*exists and is not empty.*",
    ".*your dataloader is not resumable.*", ".*callbacks used to create the checkpoint.*", ".*treespec, LeafSpec.*",
    ".*Grad strides do not match bucket view strides.*",
)  # fmt: skip


def _size(args: argparse.Namespace, preset: Preset) -> int:
    size = int(args.size or preset.size)
    if preset.network == "small" and size != preset.size:
        raise TrainError(f"the digits are {preset.size}x{preset.size} pixels; --size is for the other presets")
    if preset.network == "xception" and size < SMALLEST:
        raise TrainError(f"Xception takes pictures of at least {SMALLEST} pixels, and --size is {size}")
    return size


def _workers(args: argparse.Namespace, preset: Preset) -> int:
    if args.workers is not None:
        return int(args.workers)
    return 0 if preset.network == "small" else min(8, os.cpu_count() or 1)


def _out(args: argparse.Namespace) -> tuple[Path, Optional[Path]]:
    """The run's folder, made where it is missing, and the checkpoint to resume from."""
    out = Path(args.out or f"runs/{args.preset}")
    last = out / "last.ckpt"
    # A process that another one of the same run has started finds what that one has made meanwhile.
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if args.resume is None and last.exists() and first:
        raise TrainError(f"{out} holds a run already: go on with it by --resume, or name another folder with --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainError(f"{out} cannot be made: {error.strerror}") from None
    if not os.access(out, os.W_OK):
        raise TrainError(f"{out} cannot be written to")
    return out, None if args.resume is None else Path(args.resume or last)


def _precision(args: argparse.Namespace) -> Any:
    if args.precision is not None:
        return args.precision
    gpu = args.accelerator != "cpu" and torch.cuda.is_available()
    return "bf16-mixed" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


def _steps_per_epoch(sets: Sets, geometry: Geometry) -> int:
    order = EpochBatches(len(sets.train), geometry, 0, 0)
    if not len(order):
        raise TrainError(
            f"there are {len(sets.train)} training pictures, fewer than a step's {geometry.global_batch}: "
            "take a smaller --batch or --accumulate"
        )
    return len(order) // geometry.accumulate


def _trainer(args: argparse.Namespace, preset: Preset, out: Path, callbacks: list[Any]) -> pl.Trainer:
    return pl.Trainer(
        accelerator=args.accelerator, devices=args.devices or "auto", num_nodes=args.nodes,
        precision=_precision(args), max_epochs=args.epochs or preset.epochs,
        accumulate_grad_batches=args.accumulate, sync_batchnorm=args.sync_bn, callbacks=callbacks,
        logger=CSVLogger(out, name="log", flush_logs_every_n_steps=1), log_every_n_steps=_log_every(args, preset),
        use_distributed_sampler=False, num_sanity_val_steps=0, enable_model_summary=False, default_root_dir=out,
        enable_progress_bar=sys.stderr.isatty(),
    )  # fmt: skip


def _log_every(args: argparse.Namespace, preset: Preset) -> int:
    return int(args.log_every or (1 if preset.network == "small" else 50))


def _keepers(args: argparse.Namespace, out: Path, headline: str) -> list[Any]:
    """What writes last.ckpt and best.ckpt; last.ckpt within epochs too, where that is asked for."""
    common: dict[str, Any] = {"dirpath": out, "enable_version_counter": False, "auto_insert_metric_name": False}
    best = ModelCheckpoint(
        filename="best", monitor=headline, mode="max", save_on_train_epoch_end=True, save_weights_only=False, **common
    )
    last = ModelCheckpoint(filename="last", save_on_train_epoch_end=True, **common)
    within = Within(filename="last", every_n_train_steps=args.checkpoint_every, **common)
    return [best, last, *([within] if args.checkpoint_every else [])]


class Within(ModelCheckpoint):
    """Checkpoints within an epoch, not behind its last step, where validation and the epoch's own one follow."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, *args, **kwargs)


def run(args: argparse.Namespace) -> dict[str, float]:
    """Trains as the command line's arguments say; returns the last metrics.

    In the run's folder it leaves last.ckpt and best.ckpt (Lightning's checkpoints; their ``state_dict`` is Polyak's
    average), curves.csv, curves.png, log/ (Lightning's own CSV files), and at the end weights.pt: the averaged
    network's ``state_dict``, which ``xsep.models.load_weights`` reads where the network is Xception.

    A run that was stopped, by SIGTERM or any other way, and resumed sees every picture as often as one that was not
    and, on CPUs with the same number of threads, ends in the same weights, bit for bit. What was done since the last
    checkpoint is done again: a checkpoint is written at each epoch's end, on SIGTERM, and every so many steps where
    that is asked for.

    Raises:
        TrainError: it cannot be done, or went wrong; one sentence.
    """
    for hint in HINTS:
        warnings.filterwarnings("ignore", hint)
    preset = PRESETS[args.preset]
    size = _size(args, preset)
    sets = open_sets(preset, args.data, args.val, args.classes)
    out, checkpoint = _out(args)
    watch = Watch(out / "last.ckpt", _log_every(args, preset))
    try:
        headline = "val_map100" if preset.multilabel else "val_top1"
        polyak = Polyak(preset.polyak)
        trainer = _trainer(args, preset, out, [polyak, watch, *_keepers(args, out, headline)])
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise TrainError(str(error).strip().splitlines()[0]) from None
    if args.sync_bn and trainer.strategy.root_device.type == "cpu":
        raise TrainError("--sync-bn needs GPUs: PyTorch's DistributedDataParallel refuses SyncBatchNorm on CPUs")
    geometry = Geometry(args.batch or preset.batch, trainer.world_size, args.accumulate)
    steps = _steps_per_epoch(sets, geometry)
    if preset.global_batch not in (None, geometry.global_batch) and args.lr is None:
        rank_zero_info(
            f"the learning rate {preset.lr} belongs to {preset.global_batch} pictures a step, here are "
            f"{geometry.global_batch}: --lr sets another"
        )
    module = Training(preset, sets.classes, args.chain, args.lr or preset.lr, geometry, steps, args.seed)
    identity = Identity(preset.name, preset.network, sets.classes, len(sets.train), *geometry, args.seed)
    trainer.callbacks.insert(0, Stamp(identity))  # type: ignore[attr-defined]
    start = (0, 0)
    if checkpoint is not None:
        shapes = {name: tuple(t.shape) for name, t in module.state_dict().items()}
        start = resume_point(checkpoint, identity, shapes)
        if start[0] >= (trainer.max_epochs or 0):
            # A run that was stopped behind its last epoch has everything but this.
            module.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"])
            _export(trainer, module, out)
            rank_zero_info(f"{checkpoint} has {start[0]} epochs done already (--epochs says how many there are to be)")
            return {}
    loaders = Loaders(sets, preset, size, geometry, args.seed, _workers(args, preset), start)
    _fit(trainer, module, loaders, checkpoint, out)
    _export(trainer, module, out)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    told = ", ".join(f"{name} {value:.4f}" for name, value in sorted(found.items()) if name.startswith("val_"))
    rank_zero_info(f"{trainer.current_epoch} epochs: {told}; {out / 'weights.pt'}")
    return found


def _export(trainer: pl.Trainer, module: Training, out: Path) -> None:
    if trainer.is_global_zero:
        torch.save({name: t.cpu() for name, t in module.network.state_dict().items()}, out / "weights.pt")


def _fit(trainer: pl.Trainer, module: Training, loaders: Loaders, checkpoint: Optional[Path], out: Path) -> None:
    try:
        trainer.fit(module, datamodule=loaders, ckpt_path=checkpoint, weights_only=None if checkpoint is None else True)
    except TrainError as error:
        launcher: Any = trainer.strategy.launcher
        if not error.everywhere and launcher is not None and getattr(launcher, "procs", None):
            launcher.kill(9)  # the others wait for this one
        raise
    except torch.OutOfMemoryError as error:
        raise TrainError(f"out of memory, a smaller --batch may do: {str(error).splitlines()[0]}") from None
    except MisconfigurationException as error:
        raise TrainError(str(error).strip().splitlines()[0]) from None
    finally:
        if trainer.is_global_zero:
            curves.write(out)
