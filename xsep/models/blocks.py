"""What Xception is built of: separable convolution with BatchNorm, max-pool, and the block around a residual."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import ChannelAffine
from ..chain import Handle
from ..chain.layers import identity_block, pooled_block
from ..chain.reasons import call_reasons, image_type, module_reasons, pair_reasons, skip_reasons
from ..modules import FusedSeparableConv2d
from .experiments import SpectrumConv2d


class FoldableBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that can lend its inference transform to the epilogue of the op before it.

    While folded, ``folded_scale`` and ``folded_shift`` [C] hold ``scale * v + shift``, and the caller that applies
    them skips this module. Training mode and loading a state dict drop them. They are no part of ``state_dict``.
    """

    folded_scale: Optional[Tensor]
    folded_shift: Optional[Tensor]

    #: Unfolded it is an ``nn.BatchNorm2d``, and may be left to the training chain.
    chainable = True

    def __init__(self, num_features: int, eps: float) -> None:
        super().__init__(num_features, eps=eps)
        self.unfold()

    @torch.no_grad()
    def fold(self) -> None:
        """Takes the transform from the parameters and statistics as they are now, in float32 at least."""
        if self.training:
            raise RuntimeError("a BatchNorm is folded for inference only; call eval() first")
        assert self.running_mean is not None and self.running_var is not None
        wide = torch.promote_types(self.running_var.dtype, torch.float32)
        scale = self.weight.to(wide) * torch.rsqrt(self.running_var.to(wide) + self.eps)
        self.register_buffer("folded_scale", scale, persistent=False)
        self.register_buffer("folded_shift", self.bias.to(wide) - self.running_mean.to(wide) * scale, persistent=False)

    def unfold(self) -> None:
        self.register_buffer("folded_scale", None, persistent=False)
        self.register_buffer("folded_shift", None, persistent=False)

    def train(self, mode: bool = True) -> FoldableBatchNorm2d:
        if mode:
            self.unfold()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unfold()
        super()._load_from_state_dict(*args, **kwargs)


def separable_batchnorm(
    conv: nn.Module,
    bn: nn.Module,
    x: Tensor,
    *,
    activation: Optional[str] = None,
    residual: Optional[Tensor] = None,
) -> Tensor:
    """``act(bn(conv(x)) + residual)``, as one op where ``bn`` is folded; activation is None or "relu"."""
    if isinstance(bn, FoldableBatchNorm2d) and bn.folded_scale is not None:
        return conv(x, epilogue=ChannelAffine(bn.folded_scale, bn.folded_shift, activation), residual=residual)
    y = bn(conv(x))
    if residual is not None:
        y = y + residual
    return F.relu(y) if activation == "relu" else y


class MaxPool(nn.Module):
    """3x3 max-pool: ceil(H / 2) by ceil(W / 2) with stride 2; with stride 1 the size stays, and every 2nd is the same.

    ``"torch"`` pads by one on every side; ``"same"`` as TensorFlow does, at the far end only where the size is even.

    Args:
        padding: "torch" or "same".
        stride: 1 or 2.
        dilation: distance of the window's elements, where strides before were given up for dilation; stride 1 only.
    """

    def __init__(self, padding: str, stride: int = 2, dilation: int = 1) -> None:
        super().__init__()
        self.padding = padding
        self.stride = stride
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            pads = [pad for size in (x.shape[3], x.shape[2]) for pad in self._sides(size)]
            return F.max_pool2d(F.pad(x, pads, value=float("-inf")), 3, 1, 0, self.dilation)
        if self.padding == "torch":
            return F.max_pool2d(x, 3, 2, 1)
        if any(isinstance(size, torch.SymInt) for size in x.shape[2:]):
            # Exported for any size, whose parity nobody may ask for: from the far end it is the padding by one.
            return F.max_pool2d(x.flip((2, 3)), 3, 2, 1).flip((2, 3))
        # With an even size and no padding, ceil_mode lets the last window hang over the far end by one.
        return F.max_pool2d(x, 3, 2, (x.shape[2] % 2, x.shape[3] % 2), ceil_mode=True)

    def starts(self, height: int, width: int) -> tuple[int, int]:
        """How far the first window begins above and left of the picture, stride 2."""
        return (1, 1) if self.padding == "torch" else (height % 2, width % 2)

    def _sides(self, size: int) -> tuple[int, int]:
        """Padding before and after that keeps the size and the strided pool's windows."""
        d = self.dilation
        strided_size = -(-size // d)
        before = d if self.padding == "torch" else d * (strided_size % 2)
        return before, 2 * d - before

    def extra_repr(self) -> str:
        dilation = f", dilation={self.dilation}" if self.dilation != 1 else ""
        return f"kernel_size=3, stride={self.stride}, padding={self.padding!r}{dilation}"


class Design(NamedTuple):
    """What every block of one network shares; :func:`xsep.models.xception` says what each means."""

    bn_eps: float = 1e-5
    pool_padding: str = "torch"
    middle_activation: Optional[str] = None
    residual: bool = True
    order: str = "depthwise_first"
    segments: Optional[int] = None
    backend: Optional[str] = None

    def convolution(self, c_in: int, c_out: int, *, relu: bool, dilation: int = 1) -> nn.Module:
        """The 3x3 separable convolution, with a ReLU before it or not; or what an experiment puts in its place."""
        prologue = "relu" if relu else None
        if self.segments is None and self.order == "depthwise_first":
            return FusedSeparableConv2d(
                c_in, c_out, 3, padding=dilation, dilation=dilation, bias=False, backend=self.backend,
                prologue_activation=prologue, middle_activation=self.middle_activation,
                child_names=("conv1", "pointwise"),
            )  # fmt: skip
        return SpectrumConv2d(
            c_in, c_out, dilation=dilation, prologue_activation=prologue, middle_activation=self.middle_activation,
            pointwise_first=self.order == "pointwise_first", segments=self.segments, backend=self.backend,
        )  # fmt: skip


class Block(nn.Module):
    """``reps`` times (ReLU, separable convolution, BatchNorm) beside a residual.

    Where channels and size stay, the residual is the input itself, from before its ReLU; else a 1x1 convolution of
    the pool's stride with BatchNorm, and the main path ends in the max-pool.

    Args:
        c_in: channels of the input.
        c_out: channels of the output.
        reps: how many separable convolutions.
        design: what the network's blocks share.
        pool: of the main path's end; None in blocks that keep the size.
        dilation: of the separable convolutions.
        start_with_relu: whether a ReLU precedes the first of them.
        grow_first: whether the first of them, not the last, goes from c_in to c_out channels.
    """

    #: Whether to run as a training chain where that is possible; the network sets it.
    chain = False

    def __init__(
        self,
        c_in: int,
        c_out: int,
        reps: int,
        design: Design,
        *,
        pool: Optional[MaxPool] = None,
        dilation: int = 1,
        start_with_relu: bool = True,
        grow_first: bool = True,
    ) -> None:
        super().__init__()
        self.residual = design.residual
        self.rep = nn.ModuleDict()
        first = 1 if start_with_relu else 0
        for i in range(reps):
            inner = c_out if grow_first else c_in
            before = c_in if i == 0 else inner
            after = c_out if i == reps - 1 else inner
            relu = start_with_relu or i > 0
            self.rep[str(3 * i + first)] = design.convolution(before, after, relu=relu, dilation=dilation)
            self.rep[str(3 * i + first + 1)] = FoldableBatchNorm2d(after, design.bn_eps)
        self.skip: Optional[nn.Conv2d] = None
        if design.residual and (c_out != c_in or pool is not None):
            self.skip = nn.Conv2d(c_in, c_out, 1, stride=1 if pool is None else pool.stride, bias=False)
            self.skipbn = nn.BatchNorm2d(c_out, eps=design.bn_eps)
        self.pool: nn.Module = nn.Identity() if pool is None else pool

    def pairs(self) -> list[tuple[Any, Any]]:
        """The separable convolutions, each with the BatchNorm after it, in order."""
        layers = list(self.rep.values())
        return [(layers[i], layers[i + 1]) for i in range(0, len(layers), 2)]

    def not_chained_reasons(self, dtype: Optional[torch.dtype] = None) -> list[str]:
        """Why the block cannot be part of a training chain on images of a type; an empty list where it can."""
        pairs, found = self.pairs(), []
        for conv, bn in pairs:
            found += pair_reasons(conv, bn, dtype)
        if not self.residual:
            found.append("it has no residual")
        elif self.skip is not None:
            found += skip_reasons(self.skip, self.skipbn, dtype)
            if type(self.pool) is not MaxPool or self.pool.stride != 2:
                found.append("it does not end in a 3x3 max-pool of stride 2")
            else:
                found += [f"its pool {reason}" for reason in module_reasons(self.pool)]
            if len(pairs) < 2:
                found.append("it has one convolution")
        return found

    def _call_reasons(self, x: Tensor) -> list[str]:
        dtype = image_type(x)
        found = call_reasons(x)
        if self.skip is None and x.dtype != dtype:
            found.append(f"autocast leaves its residual as it is, {x.dtype}")
        return found or self.not_chained_reasons(dtype)

    def chained(self, h: Handle) -> Handle:
        """The block as part of a training chain; :meth:`not_chained_reasons` must be none."""
        if self.skip is None:
            return identity_block(h, self.pairs())
        assert isinstance(self.pool, MaxPool)
        pads = self.pool.starts(h.x.shape[2], h.x.shape[3])
        return pooled_block(h, self.pairs(), (self.skip, self.skipbn), pads)

    def forward(self, x: Tensor) -> Tensor:
        if self.chain and self.training and not self._call_reasons(x):
            conv = self.pairs()[0][0]
            return self.chained(Handle.of(x, *(c.weight for c in conv.convs), backend=conv.backend)).tensor()
        *before, (last_conv, last_bn) = self.pairs()
        y = x
        for conv, bn in before:
            y = separable_batchnorm(conv, bn, y)
        if self.skip is not None:
            return self.pool(separable_batchnorm(last_conv, last_bn, y)) + self.skipbn(self.skip(x))
        if self.residual:
            return separable_batchnorm(last_conv, last_bn, y, residual=x)
        return self.pool(separable_batchnorm(last_conv, last_bn, y))
