"""Exact shapes, strides and types of what the ops return: one rule for the fakes and for every backend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Optional

import torch
from torch import Tensor

from ..problem import Geometry, output_format


def empty(shape: Sequence[int], like: Tensor, memory_format: torch.memory_format) -> Tensor:
    return torch.empty(list(shape), dtype=like.dtype, device=like.device, memory_format=memory_format)


def fake_forward(x: Tensor, weights: Sequence[Tensor], geometry: Sequence[int]) -> Tensor:
    """y of either op without data: as many channels as the last weight has rows."""
    p, q = Geometry(*geometry).output_size(x.shape[2], x.shape[3], weights[0].shape[2], weights[0].shape[3])
    return empty((x.shape[0], weights[-1].shape[0], p, q), x, output_format(x, *weights))


def fake_gradients(
    tensors: Sequence[Optional[Tensor]], weights: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    """What a backward op returns without data: a gradient like its tensor, or an empty [0] where none is wanted."""
    x = tensors[0]
    assert x is not None
    out = []
    for t, want in zip(tensors, wanted):
        if not want or t is None:
            out.append(x.new_empty((0,)))
        else:
            images = t.dim() == 4 and not any(t is w for w in weights)
            out.append(empty(t.shape, t, output_format(x, *weights) if images else torch.contiguous_format))
    return tuple(out)


def conform(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    """``t`` with exactly the strides of a fresh tensor of that format, so that reality and fake never differ.

    Strides of size-1 dimensions are rewritten in place of a copy: ATen itself leaves them to chance.
    """
    strides = _dense_strides(tuple(t.shape), memory_format)
    if t.stride() == strides:
        return t
    if all(a == b or n == 1 for a, b, n in zip(t.stride(), strides, t.shape)):
        return t.as_strided(t.shape, strides)
    return torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=memory_format).copy_(t)


def conform_gradients(
    gradients: Sequence[Optional[Tensor]],
    tensors: Sequence[Optional[Tensor]],
    weights: Sequence[int],
    wanted: Sequence[bool],
    images: torch.memory_format,
    dy: Tensor,
) -> list[Optional[Tensor]]:
    """A backend's gradients as the schema promises: each in its tensor's type, none aliasing another or dy.

    None where none is wanted. ``images`` is the layout of all 4-d ones but those whose places ``weights`` names.
    """
    taken = {dy.untyped_storage().data_ptr()}
    out: list[Optional[Tensor]] = []
    for i, (gradient, t, want) in enumerate(zip(gradients, tensors, wanted)):
        if not want or t is None:
            out.append(None)
            continue
        assert gradient is not None
        result = conform(gradient.to(t.dtype), images if t.dim() == 4 and i not in weights else torch.contiguous_format)
        if result.numel() and result.untyped_storage().data_ptr() in taken:
            result = result.clone()
        taken.add(result.untyped_storage().data_ptr())
        out.append(result)
    return out


@lru_cache(maxsize=4096)
def _dense_strides(shape: tuple[int, ...], memory_format: torch.memory_format) -> tuple[int, ...]:
    order = (1, 3, 2, 0) if memory_format is torch.channels_last else tuple(reversed(range(len(shape))))
    strides = [0] * len(shape)
    step = 1
    for d in order:
        strides[d] = step
        step *= max(shape[d], 1)
    return tuple(strides)
