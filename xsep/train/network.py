"""The networks that can be trained: Xception, and a small relative of it for pictures of a few pixels."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..chain import Handle
from ..chain.layers import separable
from ..chain.reasons import call_reasons
from ..models import xception
from ..models.blocks import Block, Design, FoldableBatchNorm2d, MaxPool, separable_batchnorm


class SmallXception(nn.Module):
    """Xception's parts in little: a stem, a block that halves the size, one that keeps it, a separable layer, a head.

    For grey pictures of 8x8 pixels or more; 27,274 parameters at 10 classes. As :class:`xsep.models.Xception` it
    trains as a chain where ``chain`` is True, and then every BatchNorm is part of the layers around it.
    """

    def __init__(self, num_classes: int, drop_rate: float = 0.0, chain: bool = False) -> None:
        super().__init__()
        design = Design()
        self.chain = chain
        self.drop_rate = drop_rate
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.bn1 = FoldableBatchNorm2d(32, design.bn_eps)
        self.block1 = Block(32, 64, 2, design, pool=MaxPool(design.pool_padding), start_with_relu=False)
        self.block2 = Block(64, 64, 2, design)
        self.conv2: Any = design.convolution(64, 96, relu=False)
        self.bn2 = FoldableBatchNorm2d(96, design.bn_eps)
        self.fc = nn.Linear(96, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 1, H, W], H and W at least 8 -> [N, num_classes]."""
        r = self.conv1(x)
        if self.chain and self.training and not call_reasons(x):
            h = self.block2.chained(self.block1.chained(Handle.of_raw(r, self.bn1, relu=True)))
            pooled = separable(h, (self.conv2, self.bn2)).relu().relu_mean()
        else:
            y = self.block2(self.block1(F.relu(self.bn1(r))))
            pooled = separable_batchnorm(self.conv2, self.bn2, y, activation="relu").mean((2, 3))
        return self.fc(F.dropout(pooled, self.drop_rate, self.training))


def build(kind: str, classes: int, drop_rate: float, chain: bool) -> nn.Module:
    """The network of a preset: kind is "xception" or "small"."""
    if kind == "small":
        return SmallXception(classes, drop_rate, chain)
    return xception(num_classes=classes, drop_rate=drop_rate, chain=chain)
