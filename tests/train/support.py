"""Pictures and runs that the tests of training share."""

from __future__ import annotations

import csv
import io
import sys
import tarfile
from pathlib import Path
from typing import Optional

import numpy as np
import pytest
from PIL import Image

from xsep.train.main import main

#: Pictures of the digits that are trained on, and steps of an epoch at the preset's 64 a step.
TRAINING, STEPS = 1500, 23


def jpeg(width: int, height: int, seed: int, kind: str = "JPEG") -> bytes:
    """A picture file of smooth noise."""
    small = np.random.RandomState(seed).randint(0, 256, (5, 5, 3)).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(small).resize((width, height)).save(data, kind)
    return data.getvalue()


def make_folders(root: Path, classes: tuple[str, ...] = ("ape", "bee"), train: int = 4, val: int = 3) -> Path:
    """``root/train/class/n.jpg`` and ``root/val/class/n.jpg``, no two pictures of a size."""
    for part, count in (("train", train), ("val", val)):
        for c, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.jpg").write_bytes(jpeg(80 + i, 90 + c, 10 * c + i))
    return root


def make_shard(path: Path, labels: list[str], first: int = 0) -> Path:
    """A tar file with a picture and its classes for each of the labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, label in enumerate(labels):
            for ending, data in (("jpg", jpeg(85, 80, first + i)), ("cls", label.encode())):
                member = tarfile.TarInfo(f"some/{first + i:05}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


DIGITS = ("--preset", "digits", "--accelerator", "cpu", "--chain")


def digits(out: Path, *more: str) -> int:
    """Trains on the digits in this process, on CPU, as a chain; the exit code."""
    return main([*DIGITS, "--out", str(out), *more])


def command(out: Path, *more: str) -> list[str]:
    """The same as a command line for a process of its own."""
    return [sys.executable, "-m", "xsep.train", *DIGITS, "--out", str(out), *more]


def column(out: Path, name: str) -> list[float]:
    """A run's values of one column of curves.csv, by step."""
    with (out / "curves.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def complaint(capsys: pytest.CaptureFixture[str], code: int, expected: int) -> str:
    """The one sentence with which a run ended, which has to be all that it says in that way."""
    err = capsys.readouterr().err
    assert code == expected, err
    said: Optional[list[str]] = [line for line in err.splitlines() if line.startswith("xsep.train: ")]
    assert said is not None and len(said) == 1, err
    assert "Traceback" not in err
    return said[0].removeprefix("xsep.train: ")
