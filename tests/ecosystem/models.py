"""A small network of both ops, for whatever takes a whole model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import xsep

SHAPE = (5, 12, 13)  # of one picture


class Network(nn.Module):
    """Two layers with a BatchNorm between, the first as Xception has it, the second as MobileNet does; a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first = xsep.FusedSeparableConv2d(5, 16, 3, padding=1, bias=False, prologue_activation="relu")
        self.norm = nn.BatchNorm2d(16)
        self.second = xsep.FusedSeparableConv2d(16, 16, 5, padding="same", middle_activation="hardswish")
        self.last = xsep.FusedSeparableConv2d(16, 7, 3, stride=2, padding="same", depth_multiplier=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        return self.last(self.second(x, residual=x, epilogue=xsep.ChannelAffine(activation="relu6")))


def network() -> Network:
    torch.manual_seed(17)
    return Network()


def pictures(n: int) -> Tensor:
    return torch.randn(n, *SHAPE)
