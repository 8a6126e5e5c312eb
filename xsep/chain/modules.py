"""Modules to build chained networks of: a layer, and layers one after another."""

from __future__ import annotations

from typing import Any, Optional, Union

from torch import Tensor, nn

from ..modules import FusedSeparableConv2d
from .handle import Handle
from .layers import separable
from .reasons import call_reasons, image_type, module_reasons, pair_reasons


class SeparableConvBN(nn.Module):
    """[activation], depthwise, pointwise convolution and BatchNorm: a layer of a chain.

    Called with a tensor it gives a tensor; called with a :class:`Handle` it gives one, and the BatchNorm is left to
    whoever reads it.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        kernel_size: depthwise filter, odd, padded so that the size stays.
        prologue_activation: before the convolutions; None, "relu" or another of xsep's.
        eps, momentum, affine, track_running_stats: of the BatchNorm.
        backend: which backend runs the layer; None for the fastest there is.

    Raises:
        ValueError: an argument cannot be meant.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        prologue_activation: Optional[str] = "relu",
        eps: float = 1e-5,
        momentum: Optional[float] = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        backend: Optional[str] = None,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, so that the size stays, got {kernel_size}")
        self.conv = FusedSeparableConv2d(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False,
            prologue_activation=prologue_activation, backend=backend,
        )  # fmt: skip
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats)

    def not_chained_reasons(self, x: Union[Tensor, Handle]) -> list[str]:
        """Why a call with x would run as two ordinary modules; an empty list where it is chained."""
        if isinstance(x, Handle):
            return pair_reasons(self.conv, self.bn, x.x.dtype)
        return call_reasons(x) or pair_reasons(self.conv, self.bn, image_type(x))

    def forward(self, x: Any) -> Any:
        """[N, C_in, H, W] -> [N, C_out, H, W]; or a handle of the one -> a handle of the other."""
        if isinstance(x, Handle):
            if self.not_chained_reasons(x):
                return Handle.of(self.bn(self.conv(x.tensor())), backend=self.conv.backend)
            return separable(x, (self.conv, self.bn))
        if self.not_chained_reasons(x):
            return self.bn(self.conv(x))
        weights = [c.weight for c in self.conv.convs]
        return separable(Handle.of(x, *weights, backend=self.conv.backend), (self.conv, self.bn)).tensor()


class SeparableChain(nn.Sequential):
    """:class:`SeparableConvBN` layers one after another, with handles between them; tensor in, tensor out.

    What is no such layer, or is watched by hooks, is called with an ordinary tensor.
    """

    def forward(self, input: Any) -> Any:
        """[N, C, H, W] -> what the last layer gives, as a tensor; a handle -> a handle."""
        if isinstance(input, Handle):
            return self._run(input)
        if call_reasons(input) or not len(self):
            return super().forward(input)
        return self._run(input, True)

    def not_chained_reasons(self, x: Tensor) -> list[str]:
        """Why a call with x would not be chained, or which of the layers would not; empty where all are."""
        found = call_reasons(x)
        for name, module in self.named_children():
            found += [f"{name}: {reason}" for reason in self._reasons(module, image_type(x))]
        return found

    @staticmethod
    def _reasons(module: nn.Module, dtype: Any) -> list[str]:
        if type(module) is not SeparableConvBN:
            return [f"is a {type(module).__name__}"]
        return module_reasons(module) + pair_reasons(module.conv, module.bn, dtype)

    def _run(self, x: Any, leave: bool = False) -> Any:
        for module in self:
            dtype = x.x.dtype if isinstance(x, Handle) else image_type(x)
            if self._reasons(module, dtype):
                x = module(x.tensor() if isinstance(x, Handle) else x)
            else:
                assert isinstance(module, SeparableConvBN)
                weights = [c.weight for c in module.conv.convs]
                backend = module.conv.backend
                x = separable(
                    x if isinstance(x, Handle) else Handle.of(x, *weights, backend=backend), (module.conv, module.bn)
                )
        return x.tensor() if leave and isinstance(x, Handle) else x


__all__ = ["Handle", "SeparableChain", "SeparableConvBN"]
