"""Xception, with each of its 34 separable convolutions run as one op.

Architecture: Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions" (arXiv 1610.02357v3). Parameter
names are those of timm's ``legacy_xception`` (Cadene's, but for ``fc``), so that its checkpoints load as they are: a
ReLU before a separable convolution is that layer's prologue, and its number in ``rep`` stays vacant.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, Optional, Union

import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import finite, whole
from ..modules import FusedSeparableConv2d
from ..problem import ACTIVATIONS
from .blocks import Block, Design, FoldableBatchNorm2d, MaxPool, separable_batchnorm
from .chained import ChainedXception

__all__ = ["Block", "FoldableBatchNorm2d", "MaxPool", "Xception", "xception"]

#: The smallest height and width, as in the author's own implementation.
MIN_SIZE = 71

#: What each option may be; the segments are those that divide all of the widths.
CHOICES: dict[str, tuple[Any, ...]] = {
    "pool_padding": ("torch", "same"),
    "global_pool": ("avg", "max"),
    "middle_activation": (None, *ACTIVATIONS[1:]),
    "residual": (True, False),
    "order": ("depthwise_first", "pointwise_first"),
    "segments": (None, 1, 2, 4, 8),
    "output_stride": (8, 16, 32),
}


class Xception(ChainedXception):
    """Xception; use :func:`xception`, which documents the arguments."""

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        bn_eps: float = 1e-5,
        pool_padding: str = "torch",
        backend: Optional[str] = None,
        *,
        global_pool: str = "avg",
        fc_layers: Sequence[int] = (),
        middle_activation: Optional[str] = None,
        residual: bool = True,
        order: str = "depthwise_first",
        segments: Optional[int] = None,
        output_stride: int = 32,
        chain: Optional[bool] = None,
    ) -> None:
        super().__init__()
        num_classes, in_chans = whole("num_classes", num_classes, 0), whole("in_chans", in_chans, 1)
        drop_rate, bn_eps = finite("drop_rate", drop_rate), finite("bn_eps", bn_eps)
        if not 0.0 <= drop_rate < 1.0:
            raise ValueError(f"drop_rate must be in [0, 1), got {drop_rate!r}")
        if bn_eps <= 0.0:
            raise ValueError(f"bn_eps must be positive, got {bn_eps!r}")
        if not isinstance(fc_layers, Sequence):
            raise ValueError(f"fc_layers must be a sequence of widths, got {fc_layers!r}")
        fc_layers = [whole("each width in fc_layers", width, 1) for width in fc_layers]
        chosen = {
            "pool_padding": pool_padding, "global_pool": global_pool, "middle_activation": middle_activation,
            "residual": residual, "order": order, "segments": segments, "output_stride": output_stride,
        }  # fmt: skip
        for name, value in chosen.items():
            if value not in CHOICES[name]:
                raise ValueError(f"{name} must be one of {', '.join(map(str, CHOICES[name]))}, got {value!r}")
        segments = None if segments is None else whole("segments", segments, 1)  # 2.0 and True are among the choices
        output_stride = whole("output_stride", output_stride, 1)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.global_pool = global_pool
        self.output_stride = output_stride
        self.backend = backend
        self.num_features = 2048

        self.conv1 = nn.Conv2d(in_chans, 32, 3, stride=2, bias=False)
        self.bn1 = nn.BatchNorm2d(32, eps=bn_eps)
        self.conv2 = nn.Conv2d(32, 64, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(64, eps=bn_eps)

        design = Design(bn_eps, pool_padding, middle_activation, residual, order, segments, backend)
        self.block1: nn.Module
        self.block2: nn.Module
        stride, dilation = 2, 1
        for i, (c_in, c_out, reps) in enumerate(((64, 128, 2), (128, 256, 2), (256, 728, 2)), 1):
            strided = stride < output_stride
            pool = MaxPool(pool_padding, 2) if strided else MaxPool(pool_padding, 1, dilation)
            block = Block(c_in, c_out, reps, design, pool=pool, dilation=dilation, start_with_relu=i > 1)
            setattr(self, f"block{i}", block)
            stride, dilation = (2 * stride, dilation) if strided else (stride, 2 * dilation)
        for i in range(4, 12):
            self.add_module(f"block{i}", Block(728, 728, 3, design, dilation=dilation))
        strided = stride < output_stride
        pool = MaxPool(pool_padding, 2) if strided else MaxPool(pool_padding, 1, dilation)
        self.block12 = Block(728, 1024, 2, design, pool=pool, dilation=dilation, grow_first=False)
        dilation = dilation if strided else 2 * dilation

        self.conv3 = design.convolution(1024, 1536, relu=False, dilation=dilation)
        self.bn3 = FoldableBatchNorm2d(1536, bn_eps)
        self.conv4 = design.convolution(1536, self.num_features, relu=False, dilation=dilation)
        self.bn4 = FoldableBatchNorm2d(self.num_features, bn_eps)

        widths = [self.num_features, *fc_layers]
        linear = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(widths)]
        self.fc_layers = nn.Sequential(*linear)
        self.fc = nn.Linear(widths[-1], num_classes) if num_classes > 0 else nn.Identity()
        self.chain = chain
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming initialisation by fan-in for the convolutions, PyTorch's own for the classifier and BatchNorms."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # No 1x1 convolution of the paper's stands behind a ReLU, so none has a halved second moment to make up
                # for; where an experiment puts one there, the BatchNorm behind it takes care of the scale.
                pointwise = module.kernel_size == (1, 1)
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="linear" if pointwise else "relu")
            elif isinstance(module, (nn.BatchNorm2d, nn.Linear)):
                module.reset_parameters()

    def separable_layers(self) -> Iterator[tuple[Any, nn.Module]]:
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
        for conv, bn in self.separable_layers():
            # Another kind of BatchNorm, put here by a conversion, keeps working where it stands; and an experiment's
            # convolution has no epilogue.
            if isinstance(bn, FoldableBatchNorm2d) and isinstance(conv, FusedSeparableConv2d):
                bn.fold()
        return self

    def unfold_batchnorm(self) -> Xception:
        """Undoes :meth:`fold_batchnorm`; returns the model."""
        for _, bn in self.separable_layers():
            if isinstance(bn, FoldableBatchNorm2d):
                bn.unfold()
        return self

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """For each tensor of :meth:`features` its ``num_chs``, ``reduction`` (the stride) and last ``module``."""
        places = ((64, 2, "bn2"), (128, 4, "block1"), (256, 8, "block2"), (728, 16, "block11"), (2048, 32, "bn4"))
        return [
            {"num_chs": channels, "reduction": min(stride, self.output_stride), "module": module}
            for channels, stride, module in places
        ]

    def features(self, x: Tensor) -> list[Tensor]:
        """The last feature map at each resolution, as decoders want them.

        Args:
            x: [N, in_chans, H, W], H and W at least 71.

        Returns:
            Five tensors, of the channels and strides in :attr:`feature_info`: of stride 2 with 64 channels (the stem,
            after its ReLU), 4 with 128 (block1), 8 with 256 (block2), 16 with 728 (block3 to block11) and 32 with
            2048 (the end, after its ReLU). Those of the blocks come before the ReLU with which the next block begins.
            At 299 px they are 147, 74, 37, 19 and 10 wide; with an ``output_stride`` below 32 none is narrower than
            that stride makes it.

        Raises:
            ValueError: x is not such a tensor.
        """
        if self._chains(x):
            return self._chained_features(self._checked(x))
        stem = self._stem(x)
        stride4 = self.block1(stem)
        stride8 = self.block2(stride4)
        stride16 = self._middle(stride8)
        return [stem, stride4, stride8, stride16, self._exit(stride16)]

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] -> [N, 2048, H / 32, W / 32], rounded as ``features`` says; raises as it does."""
        if self._chains(x):
            return self._chained(self._checked(x)).tensor()
        return self._exit(self._middle(self.block2(self.block1(self._stem(x)))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Global pool, fully connected layers if any, dropout, classifier: [N, 2048, h, w] -> [N, num_classes].

        With ``pre_logits``, or ``num_classes=0``, what the classifier would see: [N, 2048] without such layers.
        """
        return self._classify(x.mean((2, 3)) if self.global_pool == "avg" else x.amax((2, 3)), pre_logits)

    def _classify(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.fc_layers(x)
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W], H and W at least 71 -> [N, num_classes]; raises ValueError for another x."""
        if self.global_pool == "avg" and self._pools_itself() and self._chains(x):
            return self._classify(self._chained(self._checked(x)).relu_mean())
        return self.forward_head(self.forward_features(x))

    def _pools_itself(self) -> bool:
        """Whether nobody has put another way of making or reading the features in place of this class's."""
        return not any(
            name in vars(self) or getattr(type(self), name) is not getattr(Xception, name)
            for name in ("forward_features", "forward_head")
        )

    def _stem(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(self._checked(x))))
        return F.relu(self.bn2(self.conv2(x)))

    def _checked(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"Xception takes [N, {self.in_chans}, H, W], got {list(x.shape)}")
        height, width = x.shape[2], x.shape[3]
        if height < MIN_SIZE or width < MIN_SIZE:
            raise ValueError(f"Xception takes pictures of at least {MIN_SIZE}x{MIN_SIZE} pixels, got {height}x{width}")
        return x

    def _middle(self, x: Tensor) -> Tensor:
        for i in range(3, 12):
            x = getattr(self, f"block{i}")(x)
        return x

    def _exit(self, x: Tensor) -> Tensor:
        x = self.block12(x)
        x = separable_batchnorm(self.conv3, self.bn3, x, activation="relu")
        return separable_batchnorm(self.conv4, self.bn4, x, activation="relu")


def xception(
    pretrained: Union[str, os.PathLike[str], None] = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
    bn_eps: float = 1e-5,
    pool_padding: str = "torch",
    fc_layers: Sequence[int] = (),
    middle_activation: Optional[str] = None,
    residual: bool = True,
    order: str = "depthwise_first",
    segments: Optional[int] = None,
    output_stride: int = 32,
    backend: Optional[str] = None,
    chain: Optional[bool] = None,
) -> Xception:
    """Xception for pictures of 71 px or more, designed for 299 px; 22,855,952 parameters at 1,000 classes.

    Published weights come in two conventions that give different features: those of timm and Cadene want the
    defaults, Keras's want ``bn_eps=1e-3, pool_padding="same"``; ``pretrained`` sets both.

    Args:
        pretrained: None, the path of a checkpoint (any that :func:`xsep.models.load_weights` reads), or "timm" for
            timm's ImageNet weights from the Hugging Face hub, without their classifier unless it has 1,000 classes.
        num_classes: width of the classifier; 0 for none, the model then gives the pooled features [N, 2048].
        in_chans: channels of the picture.
        drop_rate: dropout before the classifier; the paper uses 0.5 on ImageNet.
        global_pool: "avg" or "max", over height and width.
        bn_eps: epsilon of every BatchNorm.
        pool_padding: "torch" pads each max-pool by one on every side, "same" as TensorFlow does.
        fc_layers: widths of fully connected layers, each with a ReLU, before the classifier; in the paper's experiment
            (4096, 4096).
        middle_activation: between depthwise and pointwise convolution; the paper compares None, which is best, with
            "relu" and "elu".
        residual: whether the blocks have residual connections.
        order: "depthwise_first", or "pointwise_first" as in the paper's "extreme" Inception module, with a ReLU
            behind the pointwise convolution.
        segments: how many segments of channels the spatial convolutions see: 1 makes each a regular 3x3 convolution,
            2, 4 or 8 are on the way, None is one a channel.
        output_stride: 8, 16 or 32; below 32 the later strides become dilations, so that the output keeps that stride
            and every pixel of the strided network's output is among it.
        backend: which backend runs the separable convolutions; None for the fastest there is.
        chain: whether training runs as a chain, in which BatchNorm, ReLU and the residuals' additions are part of the
            layers around them, and less than half is kept for the backward of what PyTorch's modules keep. Results are
            the same up to rounding, and what cannot be chained runs as before: ``not_chained_reasons`` says what and
            why. Second derivatives are refused in a chain. None chooses what is faster, and that is False so far: on
            the CPUs measured (README) a chained step takes a little longer than an unchained one, and on a GPU nothing
            has been measured yet.

    Raises:
        ValueError: an argument cannot be meant, or the weights do not fit; the message says which and why.
    """
    if pretrained is not None and not isinstance(pretrained, (str, os.PathLike)):
        hint = ""
        if isinstance(pretrained, bool):
            hint = '; what is True for timm is "timm" here, and False is None'
        elif hasattr(pretrained, "__index__"):
            hint = "; num_classes is to be given by its name"
        raise ValueError(
            'pretrained, the first argument, must be None, "timm" or the path of a checkpoint, '
            f"got {pretrained!r}{hint}"
        )
    model = Xception(
        num_classes, in_chans, drop_rate, bn_eps, pool_padding, backend, global_pool=global_pool, fc_layers=fc_layers,
        middle_activation=middle_activation, residual=residual, order=order, segments=segments,
        output_stride=output_stride, chain=chain,
    )  # fmt: skip
    if pretrained is not None:
        from .weights import fetch_timm, load_weights

        if pretrained == "timm":
            load_weights(model, fetch_timm(), head=num_classes == 1000 and not fc_layers)
        else:
            load_weights(model, pretrained)
    return model
