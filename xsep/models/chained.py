"""Xception's training step as a chain: which parts run as one, and why the others do not."""

from __future__ import annotations

from typing import Any, Optional

import torch.nn.functional as F
from torch import Tensor, nn

from ..chain import Handle
from ..chain.layers import separable
from ..chain.reasons import batchnorm_reasons, call_reasons, image_type, module_reasons, pair_reasons
from .blocks import separable_batchnorm


class ChainedXception(nn.Module):
    """What :class:`xsep.models.Xception` is made of, run as a chain from the second convolution's raw output."""

    conv1: nn.Conv2d
    bn1: nn.Module
    conv2: nn.Conv2d
    bn2: nn.Module
    backend: Optional[str]
    _chain: Optional[bool] = None

    @property
    def chain(self) -> Optional[bool]:
        """Whether training runs as a chain (see :func:`xsep.models.xception`); may be set at any time."""
        return self._chain

    @chain.setter
    def chain(self, wish: Optional[bool]) -> None:
        if wish not in (None, False, True):
            raise ValueError(f"chain must be None, False or True, got {wish!r}")
        self._chain = wish
        for i in range(1, 13):
            getattr(self, f"block{i}").chain = bool(wish)

    def not_chained_reasons(self, x: Tensor) -> list[str]:
        """Why a training step with x [N, in_chans, H, W] would not run as a chain, wholly or in parts.

        An empty list where all of it does. A sentence that names a part is about that part alone; the others still
        are chained.
        """
        whole = [] if self.chain else [f"it was not asked for: chain is {self.chain}"]
        if not self.training:
            whole.append("the network is in eval mode")
        whole += call_reasons(x)
        dtype = image_type(x)
        parts: dict[str, list[str]] = {"bn2": batchnorm_reasons(self.bn2)}
        for i in range(1, 13):
            block = getattr(self, f"block{i}")
            parts[f"block{i}"] = module_reasons(block) + block.not_chained_reasons(dtype)
        for i in (3, 4):
            parts[f"conv{i}"] = pair_reasons(getattr(self, f"conv{i}"), getattr(self, f"bn{i}"), dtype)
        return whole + [f"{name}: {reason}" for name, reasons in parts.items() for reason in reasons]

    def _chains(self, x: Tensor) -> bool:
        return bool(self._chain) and self.training and not call_reasons(x)

    def _chained(self, x: Tensor) -> Handle:
        """From the checked picture to the features, whose last ReLU is still to be applied."""
        return self._chained_exit(self._chained_blocks(self._chained_stem(x), 1, 11))

    def _chained_stem(self, x: Tensor) -> Handle:
        r = self.conv2(F.relu(self.bn1(self.conv1(x))))
        if batchnorm_reasons(self.bn2):
            return self._handle(F.relu(self.bn2(r)))
        return Handle.of_raw(r, self.bn2, relu=True, backend=self.backend)

    def _handle(self, x: Tensor) -> Handle:
        return Handle.of(x, backend=self.backend)

    def _chained_blocks(self, h: Handle, first: int, last: int) -> Handle:
        for i in range(first, last + 1):
            block: Any = getattr(self, f"block{i}")
            if module_reasons(block) or block.not_chained_reasons(h.x.dtype):
                h = self._handle(block(h.tensor()))
            else:
                h = block.chained(h)
        return h

    def _chained_exit(self, h: Handle) -> Handle:
        h = self._chained_blocks(h, 12, 12)
        for i in (3, 4):
            conv: Any = getattr(self, f"conv{i}")
            bn = getattr(self, f"bn{i}")
            if pair_reasons(conv, bn, h.x.dtype):
                h = self._handle(separable_batchnorm(conv, bn, h.tensor()))
            else:
                h = separable(h, (conv, bn))
            h = h.relu()
        return h

    def _chained_features(self, x: Tensor) -> list[Tensor]:
        """The last map at each resolution; each has a second reader, the next block."""
        h = self._chained_stem(x)
        found = [h.tensor()]
        for first, last in ((1, 1), (2, 2), (3, 11)):
            h = self._chained_blocks(h, first, last)
            found.append(h.tensor())
        return [*found, self._chained_exit(h).tensor()]
