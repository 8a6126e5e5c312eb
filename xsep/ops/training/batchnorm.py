"""BatchNorm's ops in the training chain: partials to vectors, and sums to the coefficients of its backward."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from . import checks
from .registry import Outputs, define
from .selection import select_for


def _finalize_checked(
    partials: Tensor, counts: Tensor, gamma: Optional[Tensor], beta: Optional[Tensor],
    running_mean: Optional[Tensor], running_var: Optional[Tensor], batches: Optional[Tensor],
    momentum: Optional[float],
) -> None:  # fmt: skip
    if partials.dim() != 3 or partials.shape[1] != 3 or counts.dim() != 1 or counts.shape[0] != partials.shape[0]:
        raise ValueError(f"partials must be [T, 3, C] and counts [T], got {list(partials.shape)} and "
                         f"{list(counts.shape)}")  # fmt: skip
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var come together or not at all")
    if batches is None and momentum is None:
        raise ValueError("momentum is None, so batches must say how many batches have been seen")
    if batches is not None and (batches.dim() != 0 or batches.dtype != torch.int64):
        raise ValueError(f"batches must be one int64, got {list(batches.shape)} {batches.dtype}")
    for name, t in (("gamma", gamma), ("beta", beta), ("running_mean", running_mean), ("running_var", running_var)):
        checks.channel_vector(name, t, partials.shape[2])


def _finalize(
    partials: Tensor, counts: Tensor, gamma: Optional[Tensor], beta: Optional[Tensor],
    running_mean: Optional[Tensor], running_var: Optional[Tensor], batches: Optional[Tensor],
    momentum: Optional[float], eps: float, backend: str,
) -> Outputs:  # fmt: skip
    _finalize_checked(partials, counts, gamma, beta, running_mean, running_var, batches, momentum)
    chosen = select_for(partials.device, partials.dtype, backend)
    found = chosen.bn_finalize(
        partials, counts, gamma, beta, running_mean, running_var, batches, momentum, eps
    )  # fmt: skip
    # Kernels write through addresses: whoever has saved these, or what came of them, has to be told.
    changed = [t for t in (running_mean, running_var, batches) if t is not None and not t.is_inference()]
    torch.autograd.graph.increment_version(changed)
    return found


def _finalize_fake(
    partials: Tensor, counts: Tensor, gamma: Optional[Tensor], beta: Optional[Tensor],
    running_mean: Optional[Tensor], running_var: Optional[Tensor], batches: Optional[Tensor],
    momentum: Optional[float], eps: float, backend: str,
) -> Outputs:  # fmt: skip
    _finalize_checked(partials, counts, gamma, beta, running_mean, running_var, batches, momentum)
    c = partials.shape[2]
    return (
        partials.new_empty((2, c)), partials.new_empty((2, c)), partials.new_empty((c,)),
        partials.new_empty((), dtype=torch.float64),
    )  # fmt: skip


define(
    "chain_bn_finalize", "Tensor partials, Tensor counts, Tensor? gamma, Tensor? beta, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? batches, float? momentum, float eps", 4, _finalize, _finalize_fake,
)  # fmt: skip


def _backward_checked(sums: Tensor, mean: Tensor, invstd: Tensor, gamma: Optional[Tensor]) -> None:
    c = mean.shape[0]
    checks.vectors("sums", sums, 2, c)
    checks.channel_vector("invstd", invstd, c)
    checks.channel_vector("gamma", gamma, c)


def _backward(
    sums: Tensor, mean: Tensor, invstd: Tensor, gamma: Optional[Tensor], count: Tensor, batch: bool, backend: str
) -> Outputs:
    _backward_checked(sums, mean, invstd, gamma)
    chosen = select_for(sums.device, sums.dtype, backend)
    return chosen.bn_backward_finalize(sums, mean, invstd, gamma, count, batch)


def _backward_fake(
    sums: Tensor, mean: Tensor, invstd: Tensor, gamma: Optional[Tensor], count: Tensor, batch: bool, backend: str
) -> Outputs:
    _backward_checked(sums, mean, invstd, gamma)
    c = mean.shape[0]
    return sums.new_empty((3, c)), sums.new_empty((c,)), sums.new_empty((c,))


define(
    "chain_bn_backward_finalize", "Tensor sums, Tensor mean, Tensor invstd, Tensor? gamma, Tensor count, bool batch", 3,
    _backward, _backward_fake,
)  # fmt: skip
