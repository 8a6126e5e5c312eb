"""The layers of a chain: handle in, handle out. Nothing elementwise is written in between."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Optional

import torch
from torch import Tensor

from ..arguments import same_padding
from ..backends.chain import Forward, Load
from ..modules import FusedSeparableConv2d
from ..ops.training import calls
from ..problem import ACTIVATIONS, DEFAULT_ALPHA, IDENTITY, Geometry
from .batchnorm import Vectors, uses_batch, vectors
from .functions import LayerSpec, PooledLayer, SeparableLayer
from .handle import Handle

Pair = tuple[FusedSeparableConv2d, Any]  # a convolution and the BatchNorm behind it


def geometry_of(conv: FusedSeparableConv2d, x: Tensor) -> Geometry:
    (stride_h, stride_w), (dilation_h, dilation_w), padding = conv.stride, conv.dilation, conv.padding
    if padding == "valid":
        left = right = top = bottom = 0
    elif padding == "same":
        top, bottom = same_padding(x.shape[2], conv.kernel_size[0], stride_h, dilation_h)
        left, right = same_padding(x.shape[3], conv.kernel_size[1], stride_w, dilation_w)
    elif len(padding) == 4:
        left, right, top, bottom = (int(p) for p in padding)
    else:
        top, left = bottom, right = int(padding[0]), int(padding[1])
    return Geometry(stride_h, stride_w, left, right, top, bottom, dilation_h, dilation_w)


def prologue_of(conv: FusedSeparableConv2d) -> tuple[int, float]:
    """(code, alpha) of the activation in front of the convolution."""
    code = IDENTITY if conv.prologue_activation is None else ACTIVATIONS.index(conv.prologue_activation)
    alpha = conv.prologue_alpha
    return code, DEFAULT_ALPHA.get(code, 0.0) if alpha is None else float(alpha)


def _keeps_size(geometry: Geometry, conv: FusedSeparableConv2d) -> bool:
    g, (r, s) = geometry, conv.kernel_size
    vertical = g.pad_top == g.pad_bottom == g.dilation_h * (r // 2)
    horizontal = g.pad_left == g.pad_right == g.dilation_w * (s // 2)
    return vertical and horizontal and r % 2 == s % 2 == 1 and g.stride == (1, 1)


class _Run:
    """A layer's forward, up to where its gradients are linked: shared by all kinds of layers."""

    def __init__(self, h: Handle, pair: Pair) -> None:
        conv, bn = pair
        prologue, alpha = prologue_of(conv)
        self.geometry = geometry_of(conv, h.x)
        if not h.readable_with(prologue) or (h.residual is not None and not _keeps_size(self.geometry, conv)):
            h = h.settled()
        # A layer may name a backend of its own.
        h = self.h = replace(h, backend=conv.backend or h.backend)
        self.load = h.load(prologue, alpha)
        self.weights = tuple(c.weight for c in conv.convs)
        self.bn = bn
        dtype = h.x.dtype
        with torch.no_grad():
            w_dw, w_pw = (w.detach().to(dtype) for w in self.weights)
            residual = None if h.residual is None else h.residual.detach()
            self.forward: Forward = calls.sep_fprop(
                h.x.detach(), h.vec, residual, self.load.activation, self.load.alpha, w_dw, w_pw, self.geometry,
                uses_batch(bn), h.backend,
            )  # fmt: skip
            f = self.forward
            self.vectors: Vectors = vectors(bn, f.r, f.partials, f.counts, h.backend)

    def spec(self, short: str = "") -> LayerSpec:
        v, h = self.vectors, self.h
        return LayerSpec(
            self.geometry, self.load.activation, self.load.alpha, v.batch, v.group, h.backend, short,
            h.activation != IDENTITY,
        )  # fmt: skip

    def linked(self, short: str = "") -> tuple[Handle, Optional[Tensor]]:
        """The handle of the layer's raw output, and the shortcut that was asked for."""
        h, f, v = self.h, self.forward, self.vectors
        r, centres, shortcut = SeparableLayer.apply(
            h.x, h.centres, h.residual, *self.weights, self.bn.weight, self.bn.bias, h.vec, f.r, f.x_pre,
            v.centres, v.invstd, v.values, self.spec(short), *h.operands,
        )  # fmt: skip
        return Handle(r, v.vec, centres, (f.r,), layout=h.layout, backend=h.backend), shortcut


def separable(h: Handle, pair: Pair) -> Handle:
    """``bn(conv(h))``."""
    return _Run(h, pair).linked()[0]


def identity_block(h: Handle, pairs: list[Pair]) -> Handle:
    """``h + bn(conv(... bn(conv(h))))``; whoever reads the result adds the two, and stores the sum."""
    if (h.vec is not None and h.residual is None) or h.activation != IDENTITY:
        h = h.settled()
    first, *rest = pairs
    found, shortcut = _Run(h, first).linked("full")
    for pair in rest:
        found = separable(found, pair)
    return replace(found, residual=shortcut)


def pooled_block(h: Handle, pairs: list[Pair], skip: tuple[Any, Any], pads: tuple[int, int]) -> Handle:
    """``maxpool3x3/2(bn(conv(... h))) + bn(skip(h))``, at least two pairs; skip a 1x1 convolution of stride 2."""
    first, *between, last = pairs
    head = _Run(h, first)
    h = head.h
    main, y = head.linked("half")
    assert y is not None
    for pair in between:
        main = separable(main, pair)
    run = _Run(main, last)
    skip_conv, skip_bn = skip
    load_y = Load(h.vec if h.residual is None else None, h.activation)
    with torch.no_grad():
        f, v = run.forward, run.vectors
        s = calls.pw_fprop(
            y.detach(), load_y, skip_conv.weight.detach().to(y.dtype), uses_batch(skip_bn), h.backend
        )  # fmt: skip
        v_s = vectors(skip_bn, s.r, s.partials, s.counts, h.backend)
        t, index, chosen = calls.bn_pool_add(f.r, v.vec, s.r, v_s.vec, pads, h.backend)
    out, centres = PooledLayer.apply(
        main.x, main.centres, *run.weights, run.bn.weight, run.bn.bias, y, skip_conv.weight, skip_bn.weight,
        skip_bn.bias, main.vec, load_y.vec, f.r, v.centres, v.invstd, v.values, s.r, v_s.centres, v_s.invstd,
        v_s.values, t, index, run.spec(), (load_y.activation, load_y.alpha), (v_s.batch, v_s.group), pads,
        *main.operands,
    )  # fmt: skip
    return Handle(out, None, centres, (chosen, s.r), layout=h.layout, backend=h.backend)
