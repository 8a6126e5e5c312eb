"""What travels between the layers of a chain instead of a tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ..backends.chain import Load
from ..functional import autocasts
from ..ops.training import calls
from ..problem import IDENTITY, RELU, output_format
from .batchnorm import uses_batch, vectors
from .functions import Enter, GlobalPool, Leave


def image_type(x: Tensor) -> torch.dtype:
    """Of the images in a chain that starts from x, as autocast has it."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if autocasts(kind) and x.dtype != torch.float64 else x.dtype


@dataclass(frozen=True)
class Handle:
    """A tensor that is not there: ``act(scale * x + shift + residual)``, and what its gradient is to be summed with."""

    x: Tensor  # [N, C, H, W] a raw output, or an ordinary tensor
    vec: Optional[Tensor] = None  # [2, C] scale and shift to apply on load
    centres: Optional[Tensor] = None  # [1 + K, C]; its gradient is the sums that x's producer needs
    operands: tuple[Tensor, ...] = ()  # K tensors shaped like x
    residual: Optional[Tensor] = None  # [N, C, H, W] still to be added
    activation: int = IDENTITY  # still to be applied
    layout: torch.memory_format = torch.channels_last  # of the tensor that leaves the chain
    backend: str = "auto"

    @staticmethod
    def of(x: Tensor, *weights: Tensor, backend: Optional[str] = None) -> Handle:
        """An ordinary tensor, cast as autocast would cast a convolution's input; weights may decide the layout."""
        x = x.to(image_type(x))
        return Handle(x, layout=output_format(x, *weights), backend=backend or "auto")

    @staticmethod
    def of_raw(r: Tensor, bn: Any, *, relu: bool = False, backend: Optional[str] = None) -> Handle:
        """``bn(r)``, with a ReLU or not, of an ordinary convolution's output r; moves bn's running statistics."""
        name = backend or "auto"
        with torch.no_grad():
            raw = r.detach()
            partials, counts = calls.statistics(raw, name) if uses_batch(bn) else (None, None)
            v = vectors(bn, raw, partials, counts, name)
        out, centres = Enter.apply(
            r, bn.weight, bn.bias, v.centres, v.invstd, v.values, (v.batch, v.group, name)
        )  # fmt: skip
        activation = RELU if relu else IDENTITY
        return Handle(out, v.vec, centres, (raw,), None, activation, output_format(r), name)

    def relu(self) -> Handle:
        """The ReLU of this, applied by whoever reads it."""
        return replace(self, activation=RELU) if self.activation == IDENTITY else self.settled().relu()

    def tensor(self) -> Tensor:
        """The ordinary tensor that this stands for: the way out of the chain."""
        if self.vec is None and self.centres is None and self.residual is None and not self.activation:
            return self.x
        y = Leave.apply(
            self.x, self.centres, self.residual, self.vec, self.activation, 0.0, self.backend, *self.operands
        )  # fmt: skip
        return y.contiguous(memory_format=self.layout)

    def settled(self) -> Handle:
        """The same with nothing left to apply."""
        return Handle(self.tensor(), layout=self.layout, backend=self.backend)

    def relu_mean(self) -> Tensor:
        """The global average of the ReLU of this, [N, C]."""
        if self.vec is None or self.centres is None or self.residual is not None or len(self.operands) != 1:
            return nn.functional.relu(self.tensor()).mean((2, 3))
        return GlobalPool.apply(self.x, self.centres, self.vec, self.backend)

    def load(self, prologue: int, alpha: float) -> Load:
        """How a layer with a prologue reads x; for ``readable_with`` prologues."""
        return Load(self.vec, prologue or self.activation, alpha if prologue else 0.0)

    def readable_with(self, prologue: int) -> bool:
        """Whether what is left to apply and a layer's own prologue are one activation."""
        return self.activation in (IDENTITY, prologue) or prologue == IDENTITY
