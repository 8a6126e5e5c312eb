"""A BatchNorm module's part in the chain: from a layer's statistics to the vectors its reader applies."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ops.training import calls

#: What the chain can stand in for; a subclass may do something else.
KINDS: tuple[type[nn.Module], ...] = (nn.BatchNorm2d, nn.SyncBatchNorm)


class Vectors(NamedTuple):
    """One BatchNorm, once its batch has been seen."""

    vec: Tensor  # [2, C] scale, shift
    centres: Tensor  # [2, C], the mean in both rows
    invstd: Tensor  # [C]
    values: Tensor  # [] how many a channel, of all ranks
    batch: bool  # whether mean and variance are the batch's own, and so have a gradient
    group: Any  # over which they were taken, or None for this process alone


def uses_batch(bn: Any) -> bool:
    """Whether it normalises by the statistics of the batch, as ``nn.BatchNorm2d`` decides it."""
    return bn.training or bn.running_mean is None


def sync_group(bn: Any) -> Any:
    """The process group over which a SyncBatchNorm takes its statistics now, or None."""
    if not (isinstance(bn, nn.SyncBatchNorm) and bn.training and dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def recomputing() -> bool:
    """Whether a checkpoint runs the layer a second time, inside a backward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def vectors(bn: Any, r: Tensor, partials: Optional[Tensor], counts: Optional[Tensor], backend: str) -> Vectors:
    """What a reader of r [N, C, P, Q] applies; moves the running statistics, but not when a checkpoint runs again.

    Raises:
        ValueError: one value a channel, of which there is no variance.
    """
    if partials is None or counts is None:
        return _fixed(bn, r)
    group = sync_group(bn)
    if group is None and r.shape[0] * r.shape[2] * r.shape[3] == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(r.shape)}")
    if group is None and r.shape[0] == 0:
        return _of_nothing(bn, r)
    running_mean = running_var = batches = None
    if bn.training and bn.track_running_stats and bn.running_mean is not None and not recomputing():
        running_mean, running_var, batches = bn.running_mean, bn.running_var, bn.num_batches_tracked
    # Without a counter nn.BatchNorm2d moves nothing unless it has a momentum.
    momentum = 0.0 if bn.momentum is None and batches is None else bn.momentum
    if group is not None:
        partials, counts = _gathered(partials, counts, group)
    found = calls.bn_finalize(
        partials, counts, bn.weight, bn.bias, running_mean, running_var, batches, momentum, bn.eps, backend
    )
    return Vectors(*found, True, group)


def _of_nothing(bn: Any, r: Tensor) -> Vectors:
    """Of an empty batch: as in ``nn.BatchNorm2d`` it is counted, and moves nothing else."""
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None and not recomputing():
        bn.num_batches_tracked.add_(1)
    zero = torch.zeros(r.shape[1], dtype=torch.promote_types(r.dtype, torch.float32), device=r.device)
    one = torch.ones((), dtype=torch.float64, device=r.device)
    zeros = torch.stack([zero, zero])
    return Vectors(zeros, zeros, zero + 1, one, False, None)


def _fixed(bn: Any, r: Tensor) -> Vectors:
    """Of a BatchNorm in eval mode: its running statistics as they are now."""
    dtype = torch.promote_types(r.dtype, torch.float32)
    mean = bn.running_mean.to(dtype)
    invstd = (bn.running_var.double() + bn.eps).rsqrt()
    scale = (invstd if bn.weight is None else bn.weight.double() * invstd).to(dtype)
    shift = -mean.double() * scale.double()
    if bn.bias is not None:
        shift = shift + bn.bias.double()
    vec = torch.stack([scale, shift.to(dtype)])
    one = torch.ones((), dtype=torch.float64, device=r.device)
    return Vectors(vec, mean.repeat(2, 1), invstd.to(dtype), one, False, None)


def _gathered(partials: Tensor, counts: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """A row a rank: each merges its own partials first, as the number of tiles may differ."""
    n = counts.double()[:, None]
    safe = n.clamp(min=1)
    shift, s, q = partials.double().unbind(1)
    count = n.sum()
    mean = (n * shift + s).sum(0) / count.clamp(min=1)
    deviations = (q - s.square() / safe + n * (shift + s / safe - mean).square()).sum(0)
    mine = torch.cat([count[None], mean, deviations])
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, mine, group=group)
    everyone = torch.stack(rows)
    count, (mean, deviations) = everyone[:, 0], everyone[:, 1:].chunk(2, 1)
    # K holds the mean as far as its type does, S and Q what is left.
    shift = mean.to(partials.dtype)
    off = mean - shift.double()
    s, q = count[:, None] * off, deviations + count[:, None] * off.square()
    return torch.stack([shift, s.to(shift.dtype), q.to(shift.dtype)], 1), count.to(counts.dtype)


class Gradients(NamedTuple):
    coef: Tensor  # [3, C]: dr = coef[0] * du + coef[1] * r + coef[2]
    dgamma: Tensor  # [C], of this process
    dbeta: Tensor  # [C]


def gradients(
    sums: Tensor, mean: Tensor, invstd: Tensor, gamma: Optional[Tensor], count: Tensor, batch: bool, group: Any,
    backend: str,
) -> Gradients:  # fmt: skip
    """From the sums of du and of du * (r - mean) over this process's pixels, [2, C]."""
    whole = sums
    if group is not None:
        whole = sums.clone()
        dist.all_reduce(whole, group=group)
    coef, dgamma, dbeta = calls.bn_backward_finalize(whole, mean, invstd, gamma, count, batch, backend)
    if group is not None:
        dgamma, dbeta = invstd * sums[1], sums[0].clone()  # another BatchNorm may have the same sum
    return Gradients(coef, dgamma, dbeta)
