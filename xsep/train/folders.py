"""A folder of pictures, ``root/class/picture.jpg``, as torchvision's ImageFolder reads it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Optional

from PIL import Image

from .errors import TrainError
from .pictures import ENDINGS, decode


class Folder:
    """The pictures below a folder, whose folders are the classes, in alphabetical order.

    Args:
        root: the folder.
        names: the classes that there are to be, of the training set; a folder may lack one, not have another.

    Raises:
        TrainError: there is no such folder, or no picture, or a class that the training set does not have.
    """

    def __init__(self, root: Path, names: Optional[list[str]] = None) -> None:
        if not root.is_dir():
            raise TrainError(f"there is no folder {root}")
        found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        self.names = found if names is None else names
        strange = sorted(set(found) - set(self.names))
        if strange:
            raise TrainError(f"{root} has a class that the training pictures do not have: {strange[0]}")
        self.classes = len(self.names)
        self._files: list[tuple[str, int]] = []
        for label, name in enumerate(self.names):
            count = len(self._files)
            for folder, _, files in sorted(os.walk(root / name, followlinks=True)):
                pictures = (f for f in sorted(files) if f.lower().endswith(ENDINGS))
                self._files += ((os.path.join(folder, file), label) for file in pictures)
            if names is None and len(self._files) == count:
                raise TrainError(f"there is no picture in {root / name} (known endings: {', '.join(ENDINGS)})")
        if not self._files:
            raise TrainError(f"there is no picture below {root}: wanted is {root}/class/picture.jpg")

    def __len__(self) -> int:
        return len(self._files)

    def labels(self, index: int) -> tuple[int, ...]:
        return (self._files[index][1],)

    def image(self, index: int) -> Image.Image:
        path = self._files[index][0]
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise TrainError(f"{path} cannot be read: {error.strerror}") from None
        return decode(data, path)
