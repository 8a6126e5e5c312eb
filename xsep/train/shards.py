"""Pictures in tar files as webdataset writes them: ``key.jpg`` beside ``key.cls``, many to a file, many files.

Each file is indexed once (a tar's headers say where every member lies) and pictures are read by their place. So shards
behave as a folder does: any order, the same pictures however many processes there are, and a place to resume at, which
a stream through whole shards and a shuffle buffer cannot have. Streaming is what the webdataset package is for, where
the shards lie on another machine; these have to be files.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Optional

import numpy as np
from PIL import Image

from .errors import TrainError
from .pictures import ENDINGS, decode


def expanded(pattern: str) -> Iterator[str]:
    """The names that braces stand for, in order: ``a-{08..10}.tar`` is a-08, a-09, a-10; ``{train,extra}`` both."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = []
    for i, part in enumerate(parts):
        span = re.fullmatch(r"(\d+)\.\.(\d+)", part) if i % 2 else None
        if span:
            first, last = span.groups()
            choices.append([str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)])
        else:
            choices.append(part.split(",") if i % 2 else [part])
    for names in product(*choices):
        yield "".join(names)


def _parsed(text: bytes, where: str) -> list[int]:
    """The class numbers in a ``.cls`` member: one, or several with spaces or commas between."""
    words = text.replace(b",", b" ").split()
    if not words or not all(word.isdigit() for word in words):
        raise TrainError(f"{where} must hold class numbers from 0, got {text[:40]!r}")
    return [int(word) for word in words]


class Shards:
    """All pictures of some tar files, in the files' order.

    Args:
        paths: the files, not compressed.
        classes: how many classes there are; None for one more than the highest number found.

    Raises:
        TrainError: a file is missing or no tar, a picture has no ``.cls``, or a class number is too high.
    """

    def __init__(self, paths: list[Path], classes: Optional[int] = None) -> None:
        self.paths = paths
        places: list[tuple[int, int, int]] = []
        labels: list[list[int]] = []
        for number, path in enumerate(paths):
            for offset, size, found in self._indexed(path):
                places.append((number, offset, size))
                labels.append(found)
        if not places:
            raise TrainError(f"there is no picture in {paths[0]}" + (" and the others" if len(paths) > 1 else ""))
        # Arrays rather than Python objects: a loader's processes share them without copies.
        self._places = np.array(places, dtype=np.int64)
        self._labels = np.array([label for found in labels for label in found], dtype=np.int64)
        self._ends = np.cumsum([len(found) for found in labels])
        highest = int(self._labels.max())
        self.classes = highest + 1 if classes is None else classes
        if highest >= self.classes:
            raise TrainError(f"{paths[0].parent} has class {highest}, and there are {self.classes} classes from 0")

    @staticmethod
    def _indexed(path: Path) -> Iterator[tuple[int, int, list[int]]]:
        """Offset and size in bytes of each picture of a shard, with its labels, in the order of the pictures."""
        pictures: dict[str, tuple[int, int]] = {}
        classes: dict[str, list[int]] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    folder, _, file = member.name.rpartition("/")
                    stem, _, ending = file.partition(".")
                    key = f"{folder}/{stem}"
                    if not member.isfile():
                        continue
                    if f".{ending}".lower().endswith(ENDINGS):
                        pictures[key] = member.offset_data, member.size
                    elif ending == "cls":
                        content = tar.extractfile(member)
                        assert content is not None
                        classes[key] = _parsed(content.read(), f"{member.name} in {path}")
        except FileNotFoundError:
            raise TrainError(f"there is no file {path}") from None
        except (OSError, tarfile.TarError) as error:
            raise TrainError(f"{path} is no uncompressed tar file that can be read: {error}") from None
        for key, (offset, size) in pictures.items():
            if key not in classes:
                raise TrainError(f"a picture in {path} has no class: {key.lstrip('/')}.cls is missing")
            yield offset, size, classes[key]

    def __len__(self) -> int:
        return len(self._places)

    def labels(self, index: int) -> tuple[int, ...]:
        begin = self._ends[index - 1] if index else 0
        return tuple(int(label) for label in self._labels[begin : self._ends[index]])

    def image(self, index: int) -> Image.Image:
        number, offset, size = (int(v) for v in self._places[index])
        path = self.paths[number]
        try:
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise TrainError(f"{path} cannot be read: {error.strerror}") from None
        return decode(data, f"picture {index} of {path}")
