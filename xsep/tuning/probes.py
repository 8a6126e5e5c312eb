"""Layers that a card is timed on once, and by which the cost model is corrected for layers like them.

A card check (:mod:`xsep.card_check`) times its backend and PyTorch on them, ``make gpu-check`` all backends. The cost
model's constants are guesses; whether a kernel is faster than PyTorch's convolutions then is no guess any more.
"""

from __future__ import annotations

import math
from typing import Optional

import torch

from .. import plans
from ..problem import IDENTITY, Geometry, Problem
from . import findings
from .device import DeviceProperties
from .findings import Card, Finding

#: Pictures: enough that the host's time does not count, few enough for a card with little memory.
BATCH = 16
#: Which type's times stand for those of a type that was not timed: matrix units and bytes are the same.
STANDS_FOR = {torch.float16: torch.bfloat16}


def _layer(c_in: int, c_out: int, size: int, k: int = 3, stride: int = 1, op: str = "separable") -> Problem:
    pad = k // 2
    geometry = Geometry(stride, stride, pad, pad, pad, pad, 1, 1)
    activations = (IDENTITY,) * (3 if op == "separable" else 2)
    return Problem(
        op, "cuda", torch.bfloat16, True, BATCH, c_in, size, size, 1, k, k, c_out, geometry, activations
    )  # fmt: skip


#: Of Xception, MobileNetV2, EfficientNet-B0 and ConvNeXt-T; the likeliest first, in case time runs out.
LAYERS = (
    _layer(728, 728, 19), _layer(128, 128, 147), _layer(256, 256, 74), _layer(128, 128, 147, op="depthwise"),
    _layer(240, 80, 28, k=5), _layer(96, 24, 112, stride=2), _layer(728, 728, 19, op="depthwise"),
    _layer(1536, 2048, 10), _layer(240, 240, 28, k=5, stride=2, op="depthwise"), _layer(32, 16, 112),
    _layer(96, 96, 56, k=7, op="depthwise"), _layer(960, 320, 7),
)  # fmt: skip


def of_type(dtype: torch.dtype) -> list[Problem]:
    """The layers in a type; float32 is timed with TF32 allowed, which is PyTorch's default for convolutions."""
    return [layer._replace(dtype=dtype) for layer in LAYERS]


def _distance(a: Problem, b: Problem) -> float:
    """How unlike two layers are, in factors of two."""

    def sizes(p: Problem) -> tuple[int, ...]:
        rows, columns = p.output_size
        return p.c_in, p.c_out, p.n * rows * columns, p.r * p.s, p.geometry.stride_h * p.geometry.stride_w

    return sum(abs(math.log2(max(x, 1) / max(y, 1))) for x, y in zip(sizes(a), sizes(b)))


def _factors(probe: Problem, found: Finding, device: DeviceProperties, direction: str, tf32: bool) -> dict[str, float]:
    """What the card took over what the model says: by backend, and of PyTorch's by memory layout."""
    took = found.times.get(direction, {})
    factors = {}
    for p in plans.predictions(probe, device, tf32):
        name = p.backend if p.backend != "aten" or p.chosen_way else p.way
        if name in took and (p.chosen_way or p.backend == "aten"):
            factors[p.timed_as] = took[name] / p.on_card(direction)
    return {name: factor for name, factor in factors.items() if 0 < factor < math.inf}


def fit(problem: Problem, card: Card, device: DeviceProperties, direction: str, tf32: bool) -> Optional[plans.Fit]:
    """By what the model is to be corrected for a problem: the timed layer most like it; None where none was timed."""
    if problem.dtype is torch.float32 and not tf32:
        return None
    near = sorted((layer for layer in LAYERS if layer.op == problem.op), key=lambda layer: _distance(problem, layer))
    for dtype in (problem.dtype, STANDS_FOR.get(problem.dtype, problem.dtype)):
        for layer in near:
            probe = layer._replace(dtype=dtype)
            found = findings.timed(probe, card)
            factors = _factors(probe, found, device, direction, tf32) if found is not None else {}
            if len([name for name in factors if name.startswith("aten")]) == 2 and len(factors) > 2:
                return plans.Fit(f"{layer.c_in}->{layer.c_out} @{layer.h}", factors)
    return None
