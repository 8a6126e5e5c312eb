"""Pictures as the network's input: decoding, the random crop of training, the centre crop of validation."""

from __future__ import annotations

import io
import math
from typing import Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .errors import TrainError

#: What counts as a picture, by the end of its name.
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")

#: Of the random crop's area, and of its width over height, as Inception's recipe (arXiv 1409.4842, section 6) has them.
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)

#: The share of a picture's shorter side that validation sees, as published for Xception by timm: 0.8975.
CENTRE = 0.8975


class Source(Protocol):
    """A data set: labelled pictures, by number."""

    #: Classes there are at least; a picture's labels are below it.
    classes: int

    def __len__(self) -> int: ...

    def labels(self, index: int) -> tuple[int, ...]:
        """A picture's labels; several in a multi-label data set."""
        ...

    def image(self, index: int) -> Image.Image:
        """A picture; raises TrainError where it cannot be read."""
        ...


def decode(data: bytes, name: str) -> Image.Image:
    """A picture file's content as RGB; ``name`` is for the complaint."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise TrainError(f"{name} is no picture that can be read") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise TrainError(f"{name} is no picture that can be read: {error}") from None


def as_tensor(image: Image.Image) -> Tensor:
    """uint8 [H, W, channels]."""
    pixels = np.array(image)
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[:, :, None])


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))


def random_box(width: int, height: int, generator: torch.Generator) -> tuple[float, float, float, float]:
    """Left, upper, right, lower of a crop of random area, shape and place; the whole of an extremely long picture's
    middle where ten draws do not fit."""
    for _ in range(10):
        area = width * height * _uniform(*AREA, generator)
        ratio = math.exp(_uniform(math.log(RATIO[0]), math.log(RATIO[1]), generator))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = round(_uniform(0, width - w, generator)), round(_uniform(0, height - h, generator))
            return left, upper, left + w, upper + h
    w, h = min(width, height * RATIO[1]), min(height, width / RATIO[0])
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def random_crop(image: Image.Image, size: int, generator: torch.Generator) -> Tensor:
    """uint8 [size, size, 3]: a random box of the picture, mirrored every other time."""
    box = random_box(image.width, image.height, generator)
    found = as_tensor(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
    return found.flip(1) if _uniform(0, 1, generator) < 0.5 else found


def centre_crop(image: Image.Image, size: int) -> Tensor:
    """uint8 [size, size, 3]: the square in the picture's middle."""
    side = CENTRE * min(image.width, image.height)
    left, upper = (image.width - side) / 2, (image.height - side) / 2
    box = (left, upper, left + side, upper + side)
    return as_tensor(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def normalised(x: Tensor) -> Tensor:
    """uint8 [N, H, W, C] -> float32 [N, C, H, W] from -1 to 1, in channels_last memory."""
    return x.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
