"""Inception V3 in plain PyTorch layers: what the paper measures Xception against.

Architecture: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (arXiv 1512.00567), without
the auxiliary classifier. Parameter names and the average pools' counting of padding are those of torchvision's
``inception_v3``, so that its checkpoints load; 23,834,568 parameters at 1,000 classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: The smallest height and width that leave something of every pool.
MIN_SIZE = 75

Kernel = Union[int, tuple[int, int]]


class Conv(NamedTuple):
    """One convolution of a branch; 3x3 ones of stride 2 are not padded, all others keep the size."""

    name: str
    c_out: int
    kernel: Kernel = 1
    stride: int = 1


#: One branch of a module: convolutions one after the other. The last step may be two side by side, their outputs one
#: above the other. A branch that begins with a name alone begins with that pool.
Branch = list[Union[str, Conv, tuple[Conv, Conv]]]


class ConvBatchNorm(nn.Module):
    """Convolution without bias, BatchNorm, ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: Kernel, stride: int = 1, same: bool = False) -> None:
        super().__init__()
        r, s = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = ((r - 1) // 2, (s - 1) // 2) if same else (0, 0)
        self.conv = nn.Conv2d(c_in, c_out, (r, s), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches side by side, their outputs concatenated along the channels in the order given."""

    def __init__(self, c_in: int, branches: list[Branch]) -> None:
        super().__init__()
        self.branches: list[list[Any]] = []
        self.out_channels = 0
        for branch in branches:
            c = c_in
            steps: list[Any] = []
            for step in branch:
                if isinstance(step, str):
                    steps.append(step)
                    continue
                beside = (step,) if isinstance(step, Conv) else step
                for conv in beside:
                    same = conv.stride == 1
                    self.add_module(conv.name, ConvBatchNorm(c, conv.c_out, conv.kernel, conv.stride, same))
                steps.append([conv.name for conv in beside])
                c = sum(conv.c_out for conv in beside)
            self.branches.append(steps)
            self.out_channels += c

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for steps in self.branches:
            y = x
            for step in steps:
                if step == "average":
                    y = F.avg_pool2d(y, 3, 1, 1)
                elif step == "maximum":
                    y = F.max_pool2d(y, 3, 2)
                elif len(step) == 1:
                    y = getattr(self, step[0])(y)
                else:
                    y = torch.cat([getattr(self, name)(y) for name in step], 1)
            outputs.append(y)
        return torch.cat(outputs, 1)


def _mixed_5(pool: int) -> list[Branch]:
    """35x35: 1x1, 5x5, twice 3x3."""
    return [
        [Conv("branch1x1", 64)],
        [Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, 5)],
        [Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, 3), Conv("branch3x3dbl_3", 96, 3)],
        ["average", Conv("branch_pool", pool)],
    ]


def _mixed_6a() -> list[Branch]:
    """35x35 to 17x17."""
    return [
        [Conv("branch3x3", 384, 3, 2)],
        [Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, 3), Conv("branch3x3dbl_3", 96, 3, 2)],
        ["maximum"],
    ]


def _mixed_6(c: int) -> list[Branch]:
    """17x17: 1x1, 7x7 as 1x7 and 7x1, and that twice, c channels inside."""
    row, column = (1, 7), (7, 1)
    twice: list[tuple[int, Kernel]] = [(c, 1), (c, column), (c, row), (c, column), (192, row)]
    return [
        [Conv("branch1x1", 192)],
        [Conv("branch7x7_1", c), Conv("branch7x7_2", c, row), Conv("branch7x7_3", 192, column)],
        [Conv(f"branch7x7dbl_{i}", c_out, kernel) for i, (c_out, kernel) in enumerate(twice, 1)],
        ["average", Conv("branch_pool", 192)],
    ]


def _mixed_7a() -> list[Branch]:
    """17x17 to 8x8."""
    return [
        [Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, 3, 2)],
        [
            Conv("branch7x7x3_1", 192), Conv("branch7x7x3_2", 192, (1, 7)), Conv("branch7x7x3_3", 192, (7, 1)),
            Conv("branch7x7x3_4", 192, 3, 2),
        ],
        ["maximum"],
    ]  # fmt: skip


def _mixed_7() -> list[Branch]:
    """8x8: 1x1, 3x3 as 1x3 beside 3x1, and that behind a 3x3."""

    def beside(name: str) -> tuple[Conv, Conv]:
        return Conv(f"{name}a", 384, (1, 3)), Conv(f"{name}b", 384, (3, 1))

    return [
        [Conv("branch1x1", 320)],
        [Conv("branch3x3_1", 384), beside("branch3x3_2")],
        [Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, 3), beside("branch3x3dbl_3")],
        ["average", Conv("branch_pool", 192)],
    ]


class InceptionV3(nn.Module):
    """Inception V3; use :func:`inception_v3`, which documents the arguments."""

    def __init__(self, num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.5) -> None:
        super().__init__()
        if num_classes < 0:
            raise ValueError(f"num_classes must be at least 0, got {num_classes!r}")
        if in_chans < 1:
            raise ValueError(f"in_chans must be at least 1, got {in_chans!r}")
        if not 0.0 <= drop_rate < 1.0:
            raise ValueError(f"drop_rate must be in [0, 1), got {drop_rate!r}")
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.num_features = 2048

        self.Conv2d_1a_3x3 = ConvBatchNorm(in_chans, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvBatchNorm(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvBatchNorm(32, 64, 3, same=True)
        self.Conv2d_3b_1x1 = ConvBatchNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBatchNorm(80, 192, 3)
        modules = {
            "5b": _mixed_5(32), "5c": _mixed_5(64), "5d": _mixed_5(64), "6a": _mixed_6a(), "6b": _mixed_6(128),
            "6c": _mixed_6(160), "6d": _mixed_6(160), "6e": _mixed_6(192), "7a": _mixed_7a(), "7b": _mixed_7(),
            "7c": _mixed_7(),
        }  # fmt: skip
        c = 192
        self.mixed = [f"Mixed_{name}" for name in modules]
        for name, branches in zip(self.mixed, modules.values(), strict=True):
            module = Mixed(c, branches)
            self.add_module(name, module)
            c = module.out_channels
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming initialisation by fan-in for the convolutions, PyTorch's own for the classifier and BatchNorms."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            elif isinstance(module, (nn.BatchNorm2d, nn.Linear)):
                module.reset_parameters()

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] -> [N, 2048, h, w], 8x8 at 299 px; raises ValueError for another x."""
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"Inception V3 takes [N, {self.in_chans}, H, W], got {list(x.shape)}")
        height, width = x.shape[2], x.shape[3]
        if height < MIN_SIZE or width < MIN_SIZE:
            raise ValueError(
                f"Inception V3 takes pictures of at least {MIN_SIZE}x{MIN_SIZE} pixels, got {height}x{width}"
            )
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name in self.mixed:
            x = getattr(self, name)(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Global average, dropout, classifier: [N, 2048, h, w] -> [N, num_classes].

        With ``pre_logits``, or ``num_classes=0``, [N, 2048].
        """
        x = F.dropout(x.mean((2, 3)), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W], H and W at least 75 -> [N, num_classes]; raises ValueError for another x."""
        return self.forward_head(self.forward_features(x))


def inception_v3(num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.5) -> InceptionV3:
    """Inception V3 for pictures of 75 px or more, designed for 299 px, without the auxiliary classifier.

    Args:
        num_classes: width of the classifier; 0 for none, the model then gives the pooled features [N, 2048].
        in_chans: channels of the picture.
        drop_rate: dropout before the classifier.

    Raises:
        ValueError: an argument cannot be meant; the message names it.
    """
    return InceptionV3(num_classes, in_chans, drop_rate)
