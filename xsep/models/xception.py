"""Xception, with each of its 34 separable convolutions run as one op.

Architecture: Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions" (arXiv 1610.02357v3). Parameter
names are those of timm's ``legacy_xception`` (Cadene's, but for ``fc``), so that its checkpoints load as they are: a
ReLU before a separable convolution is that layer's prologue, and its number in ``rep`` stays vacant.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import ChannelAffine
from ..modules import FusedSeparableConv2d

#: The smallest height and width, as in the author's own implementation.
MIN_SIZE = 71

POOL_PADDINGS = ("torch", "same")


class FoldableBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that can lend its inference transform to the epilogue of the op before it.

    While folded, ``folded_scale`` and ``folded_shift`` [C] hold ``scale * v + shift``, and the caller that applies
    them skips this module. Training mode and loading a state dict drop them. They are no part of ``state_dict``.
    """

    folded_scale: Optional[Tensor]
    folded_shift: Optional[Tensor]

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
    conv: FusedSeparableConv2d,
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
    """3x3 max-pool of stride 2: ceil(H / 2) by ceil(W / 2).

    ``"torch"`` pads by one on every side; ``"same"`` as TensorFlow does, at the far end only where the size is even.
    """

    def __init__(self, padding: str) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        if self.padding == "torch":
            return F.max_pool2d(x, 3, 2, 1)
        # With an even size and no padding, ceil_mode lets the last window hang over the far end by one.
        return F.max_pool2d(x, 3, 2, (x.shape[2] % 2, x.shape[3] % 2), ceil_mode=True)

    def extra_repr(self) -> str:
        return f"kernel_size=3, stride=2, padding={self.padding!r}"


class Block(nn.Module):
    """``reps`` times (ReLU, separable convolution, BatchNorm) beside a residual.

    Where channels and size stay, the residual is the input itself, from before its ReLU; else a strided 1x1
    convolution with BatchNorm, and the main path ends in a max-pool.

    Args:
        c_in: channels of the input.
        c_out: channels of the output.
        reps: how many separable convolutions.
        stride: 1 or 2.
        bn_eps: of every BatchNorm.
        pool_padding: of the max-pool, "torch" or "same".
        backend: of the separable convolutions.
        start_with_relu: whether a ReLU precedes the first of them.
        grow_first: whether the first of them, not the last, goes from c_in to c_out channels.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        reps: int,
        stride: int,
        *,
        bn_eps: float,
        pool_padding: str,
        backend: Optional[str],
        start_with_relu: bool = True,
        grow_first: bool = True,
    ) -> None:
        super().__init__()
        self.rep = nn.ModuleDict()
        first = 1 if start_with_relu else 0
        for i in range(reps):
            inner = c_out if grow_first else c_in
            before = c_in if i == 0 else inner
            after = c_out if i == reps - 1 else inner
            relu = start_with_relu or i > 0
            self.rep[str(3 * i + first)] = _separable(before, after, backend, relu)
            self.rep[str(3 * i + first + 1)] = FoldableBatchNorm2d(after, bn_eps)
        self.skip: Optional[nn.Conv2d] = None
        if c_out != c_in or stride != 1:
            self.skip = nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False)
            self.skipbn = nn.BatchNorm2d(c_out, eps=bn_eps)
        self.pool = MaxPool(pool_padding) if stride != 1 else nn.Identity()

    def pairs(self) -> list[tuple[Any, Any]]:
        """The separable convolutions, each with the BatchNorm after it, in order."""
        layers = list(self.rep.values())
        return [(layers[i], layers[i + 1]) for i in range(0, len(layers), 2)]

    def forward(self, x: Tensor) -> Tensor:
        *before, (last_conv, last_bn) = self.pairs()
        y = x
        for conv, bn in before:
            y = separable_batchnorm(conv, bn, y)
        if self.skip is None:
            return separable_batchnorm(last_conv, last_bn, y, residual=x)
        return self.pool(separable_batchnorm(last_conv, last_bn, y)) + self.skipbn(self.skip(x))


class Xception(nn.Module):
    """Xception; use :func:`xception`, which documents the arguments."""

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        bn_eps: float = 1e-5,
        pool_padding: str = "torch",
        backend: Optional[str] = None,
    ) -> None:
        super().__init__()
        if num_classes < 0:
            raise ValueError(f"num_classes must be at least 0, got {num_classes!r}")
        if in_chans < 1:
            raise ValueError(f"in_chans must be at least 1, got {in_chans!r}")
        if not 0.0 <= drop_rate < 1.0:
            raise ValueError(f"drop_rate must be in [0, 1), got {drop_rate!r}")
        if bn_eps <= 0.0:
            raise ValueError(f"bn_eps must be positive, got {bn_eps!r}")
        if pool_padding not in POOL_PADDINGS:
            raise ValueError(f"pool_padding must be one of {', '.join(POOL_PADDINGS)}, got {pool_padding!r}")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.num_features = 2048

        self.conv1 = nn.Conv2d(in_chans, 32, 3, stride=2, bias=False)
        self.bn1 = nn.BatchNorm2d(32, eps=bn_eps)
        self.conv2 = nn.Conv2d(32, 64, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(64, eps=bn_eps)

        def block(c_in: int, c_out: int, reps: int, stride: int, **kwargs: bool) -> Block:
            return Block(c_in, c_out, reps, stride, bn_eps=bn_eps, pool_padding=pool_padding, backend=backend, **kwargs)

        self.block1 = block(64, 128, 2, 2, start_with_relu=False)
        self.block2 = block(128, 256, 2, 2)
        self.block3 = block(256, 728, 2, 2)
        for i in range(4, 12):
            self.add_module(f"block{i}", block(728, 728, 3, 1))
        self.block12 = block(728, 1024, 2, 2, grow_first=False)

        self.conv3 = _separable(1024, 1536, backend, relu=False)
        self.bn3 = FoldableBatchNorm2d(1536, bn_eps)
        self.conv4 = _separable(1536, self.num_features, backend, relu=False)
        self.bn4 = FoldableBatchNorm2d(self.num_features, bn_eps)
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming initialisation by fan-in for the convolutions, PyTorch's own for the classifier and BatchNorms."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # No 1x1 convolution here stands behind a ReLU, so none has a halved second moment to make up for.
                pointwise = module.kernel_size == (1, 1)
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="linear" if pointwise else "relu")
            elif isinstance(module, (nn.BatchNorm2d, nn.Linear)):
                module.reset_parameters()

    def separable_layers(self) -> Iterator[tuple[FusedSeparableConv2d, nn.Module]]:
        """The 34 separable convolutions, each with the BatchNorm after it, in the order they run."""
        for i in range(1, 13):
            yield from getattr(self, f"block{i}").pairs()
        yield self.conv3, self.bn3
        yield self.conv4, self.bn4

    def fold_batchnorm(self) -> Xception:
        """Makes each separable layer's BatchNorm part of its op, for inference; returns the model.

        The transform of each BatchNorm (as its parameters and statistics are now) becomes the epilogue of the layer
        before it, together with the ReLU that follows it in the last two layers and, in the eight blocks whose
        residual is the identity, the residual's addition. Results change by rounding only. Parameters and
        ``state_dict`` stay as they are; gradients still reach the input and the convolutions, but no longer the
        folded BatchNorms. :meth:`unfold_batchnorm`, ``train()`` and ``load_state_dict()`` undo it; after changing
        a BatchNorm in any other way, call it again.

        Raises:
            RuntimeError: the model is in training mode.
        """
        if self.training:
            raise RuntimeError("fold_batchnorm() is for inference: call eval() first")
        for _, bn in self.separable_layers():
            # Another kind of BatchNorm, put here by a conversion, keeps working where it stands.
            if isinstance(bn, FoldableBatchNorm2d):
                bn.fold()
        return self

    def unfold_batchnorm(self) -> Xception:
        """Undoes :meth:`fold_batchnorm`; returns the model."""
        for _, bn in self.separable_layers():
            if isinstance(bn, FoldableBatchNorm2d):
                bn.unfold()
        return self

    def features(self, x: Tensor) -> list[Tensor]:
        """The last feature map at each resolution, as decoders want them.

        Args:
            x: [N, in_chans, H, W], H and W at least 71.

        Returns:
            Five tensors: of stride 2 with 64 channels (the stem, after its ReLU), 4 with 128 (block1), 8 with 256
            (block2), 16 with 728 (block3 to block11) and 32 with 2048 (the end, after its ReLU). Those of the blocks
            come before the ReLU with which the next block begins. At 299 px they are 147, 74, 37, 19 and 10 wide.

        Raises:
            ValueError: x is not such a tensor.
        """
        stem = self._stem(x)
        stride4 = self.block1(stem)
        stride8 = self.block2(stride4)
        stride16 = self._middle(stride8)
        return [stem, stride4, stride8, stride16, self._exit(stride16)]

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] -> [N, 2048, H / 32, W / 32], rounded as ``features`` says; raises as it does."""
        return self._exit(self._middle(self.block2(self.block1(self._stem(x)))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Global average, dropout, classifier: [N, 2048, h, w] -> [N, num_classes].

        With ``pre_logits``, or ``num_classes=0``, [N, 2048].
        """
        x = F.dropout(x.mean((2, 3)), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W], H and W at least 71 -> [N, num_classes]; raises ValueError for another x."""
        return self.forward_head(self.forward_features(x))

    def _stem(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"Xception takes [N, {self.in_chans}, H, W], got {list(x.shape)}")
        height, width = x.shape[2], x.shape[3]
        if height < MIN_SIZE or width < MIN_SIZE:
            raise ValueError(f"Xception takes pictures of at least {MIN_SIZE}x{MIN_SIZE} pixels, got {height}x{width}")
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)))

    def _middle(self, x: Tensor) -> Tensor:
        for i in range(3, 12):
            x = getattr(self, f"block{i}")(x)
        return x

    def _exit(self, x: Tensor) -> Tensor:
        x = self.block12(x)
        x = separable_batchnorm(self.conv3, self.bn3, x, activation="relu")
        return separable_batchnorm(self.conv4, self.bn4, x, activation="relu")


def xception(
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    bn_eps: float = 1e-5,
    pool_padding: str = "torch",
    backend: Optional[str] = None,
) -> Xception:
    """Xception for pictures of 71 px or more, designed for 299 px; 22,855,952 parameters at 1,000 classes.

    Published weights come in two conventions that give different features: those of timm and Cadene want the
    defaults, Keras's want ``bn_eps=1e-3, pool_padding="same"``.

    Args:
        num_classes: width of the classifier; 0 for none, the model then gives the pooled features [N, 2048].
        in_chans: channels of the picture.
        drop_rate: dropout before the classifier; the paper uses 0.5 on ImageNet.
        bn_eps: epsilon of every BatchNorm.
        pool_padding: "torch" pads each max-pool by one on every side, "same" as TensorFlow does.
        backend: which backend runs the separable convolutions; None for the fastest there is.

    Raises:
        ValueError: an argument cannot be meant; the message names it.
    """
    return Xception(num_classes, in_chans, drop_rate, bn_eps, pool_padding, backend)


def _separable(c_in: int, c_out: int, backend: Optional[str], relu: bool) -> FusedSeparableConv2d:
    return FusedSeparableConv2d(
        c_in, c_out, 3, padding=1, bias=False, backend=backend,
        prologue_activation="relu" if relu else None, child_names=("conv1", "pointwise"),
    )  # fmt: skip
