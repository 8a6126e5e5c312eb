"""The command line of ``python -m xsep.train``: what there is to choose, and how it ends."""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn, Optional

from .errors import TrainError
from .presets import PRESETS

DESCRIPTION = """\
Trains Xception by the paper's recipes, on pictures in folders or tar files.

  python -m xsep.train --preset digits                       a small network on scikit-learn's digits, anywhere
  python -m xsep.train --preset imagenet --data imagenet     imagenet/train/class/picture.jpg, imagenet/val/...
  python -m xsep.train --preset jft --data 'train-{000..146}.tar' --val 'val-{00..06}.tar'
  python -m xsep.train --preset imagenet --data imagenet --resume            goes on where it was stopped

Several machines are started as Lightning has it: by torchrun, SLURM, or the variables MASTER_ADDR, MASTER_PORT and
NODE_RANK, with --nodes and --devices.

Exit codes: 0; 1 where the loss is not finite; 2 where what is asked for cannot be done, with one sentence; 143 after
SIGTERM, with a checkpoint written."""

#: What training needs beside PyTorch, each with what it is called in the package index.
NEEDED = {"lightning": "lightning", "torchmetrics": "torchmetrics", "numpy": "numpy", "PIL": "pillow"}

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1, got {text!r}")
    return int(text)


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a number from 0, got {text!r}")
    return int(text)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def parser() -> Parser:
    made = Parser("xsep.train", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--preset", choices=PRESETS, required=True, help="the recipe")
    add("--data", metavar="PATH", help="folder with train and val in it, or with --val what is trained on")
    add("--val", metavar="PATH", help="what is validated with: a folder of class folders or tar files, or a pattern")
    add("--classes", type=_positive, metavar="N", help="the default is as many as are found")
    add("--out", metavar="DIR", help="where checkpoints, logs and weights go (default: runs/PRESET)")
    add("--resume", nargs="?", const="", metavar="CHECKPOINT", help="go on (default: from DIR/last.ckpt)")
    add("--epochs", type=_positive, metavar="N", help="in all; the default is the preset's")
    add("--batch", type=_positive, metavar="N", help="pictures a device and batch; the default is the preset's")
    add("--accumulate", type=_positive, default=1, metavar="N", help="batches a step (default: 1)")
    add("--lr", type=_rate, help="learning rate to begin with; the default is the preset's")
    add("--size", type=_positive, metavar="PIXELS", help="of the pictures (default: 299)")
    add("--chain", action=argparse.BooleanOptionalAction, help="fuse BatchNorm and ReLU into the layers", default=False)
    add("--accelerator", choices=("auto", "cpu", "gpu"), default="auto", help="(default: auto)")
    add("--devices", type=_positive, metavar="N", help="of each machine (default: all GPUs, or one CPU process)")
    add("--nodes", type=_positive, default=1, metavar="N", help="machines (default: 1)")
    add("--sync-bn", action="store_true", help="BatchNorm statistics over all devices")
    add("--precision", choices=PRECISIONS, help="(default: bf16-mixed on a GPU that has it, else 32-true)")
    add("--workers", type=_count, metavar="N", help="processes that decode, for each device (default: up to 8)")
    add("--seed", type=_count, default=0, metavar="N", help="of weights, order, crops and dropout (default: 0)")
    add("--log-every", type=_positive, metavar="STEPS", help="(default: 50; digits: 1)")
    add("--checkpoint-every", type=_positive, metavar="STEPS", help="also within an epoch; the default is at its end")
    return made


def _missing() -> list[str]:
    """The packages that training needs and Python cannot import, as the package index calls them."""
    found = []
    for module, package in NEEDED.items():
        try:
            __import__(module)
        except ImportError:
            found.append(package)
    return found


def main(argv: Optional[list[str]] = None) -> int:
    """Runs the command line; returns its exit code."""
    args = parser().parse_args(argv)
    missing = _missing()
    if missing:
        print(
            f"xsep.train: training needs {' and '.join(missing)}: pip install {' '.join(missing)}",
            file=sys.stderr,
        )
        return TrainError.code
    from .run import run

    try:
        run(args)
    except TrainError as error:
        # What every process finds at once is for the first one to say: another one's exit code would make Lightning
        # kill the first before it has.
        if error.everywhere and os.environ.get("LOCAL_RANK", "0") != "0":
            return 0
        print(f"xsep.train: {error.sentence}", file=sys.stderr)
        return error.code
    return 0
