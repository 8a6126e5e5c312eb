"""Bytes that one training step moves, counted from the shapes of the ops that run, without running them.

Every op is taken to read each of its inputs once and to write each of its outputs once, as an eager kernel does; a
BatchNorm that trains reads its inputs twice. Two gradients of a convolution are two kernels, and so is a chained
layer's backward, where both form the gradient of the raw output from du and r; in one pass, what they share is read
once. This is what kernels that do as the ops say would move, not what the plain backend of a CPU moves. Nothing is said
about caches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: MB a picture by the model of the chain's design, batch 64 at 299 px in bfloat16: eager PyTorch, a chain whose
#: backward is two kernels a layer, and one whose backward is one pass.
MODEL = {"eager": 1008.0, "two kernels": 383.0, "one pass": 285.0}

#: Ops that make memory without writing it, or only look at it.
SILENT = {"empty", "empty_like", "new_empty", "empty_strided", "empty_permuted", "detach", "lift_fresh"}


class Count(NamedTuple):
    """MB a picture."""

    two_kernels: float  # with a chained layer's backward in two kernels; else all there is
    one_pass: float
    saved: float  # kept for the backward beside the weights


def size_of(t: Tensor) -> int:
    return t.numel() * t.element_size()


class Bytes(TorchDispatchMode):
    """Adds up what the ops under it move."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0
        self.again = 0  # read a second time where a chained layer's backward is two kernels

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        space, name = func._schema.name.split("::")
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if space in ("aten", "xsep") and not views and name not in SILENT:
            self.moved += sum(size_of(t) for t in (*_different((args, kwargs)), *_different(found)))
            if name == "convolution_backward" and args[-1][0] and args[-1][1]:
                self.moved += size_of(args[0])
            if name == "native_batch_norm":  # once for the statistics
                self.moved += size_of(args[0])
            if name == "native_batch_norm_backward":  # and once for its sums
                self.moved += size_of(args[0]) + size_of(args[1])
            if name == "chain_sep_backward" and args[-2][0] and args[-2][2]:
                du, taps, r, x = args[0], args[1], args[2], args[7]
                self.again += sum(size_of(t) for t in (du, taps, r, x) if t is not None)
        return found


def _different(tree: Any) -> Iterator[Tensor]:
    """The tensors in a tree, of those that are the same memory one."""
    seen: set[Any] = set()
    for t in tree_leaves(tree):
        if isinstance(t, Tensor):
            place = (t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride())
            if place not in seen:
                seen.add(place)
                yield t


def count(make: Any, batch: int, size: int, dtype: torch.dtype) -> Count:
    """Of one step (forward, backward and SGD with momentum) of the network that ``make()`` gives, in channels_last."""
    with FakeTensorMode():
        model = make().train()
        x = torch.empty((batch, 3, size, size), memory_format=torch.channels_last)
        target = torch.zeros((batch,), dtype=torch.int64)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-5)
        kept: dict[int, Tensor] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = t
            return t

        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        with Bytes() as counter:
            mixed = dtype != torch.float32
            with (
                torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
                torch.autocast("cpu", dtype if mixed else None, enabled=mixed, cache_enabled=False),
            ):
                loss = F.cross_entropy(model(x).float(), target)
            saved = sum(t.untyped_storage().nbytes() for t in kept.values())
            kept.clear()
            loss.backward()
            optimizer.step()
    moved, again = counter.moved, counter.again
    return Count(*(1e-6 * total / batch for total in (moved + again, moved, saved)))
