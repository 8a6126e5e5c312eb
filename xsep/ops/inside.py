"""What holds inside every op, and when an op may be run without asking the dispatcher."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

#: Below autograd, and below what takes note of views: a result that was laid out by one could else not be changed in
#: place.
skip_autograd = torch._C._AutoDispatchBelowADInplaceOrView


def unwatched(arguments: Iterable[Any]) -> bool:
    """Whether the tensors among these are plain ones and no dispatch mode, tracer, profiler or transform looks on."""
    for t in arguments:
        kind = type(t)
        if kind is not Tensor and kind is not torch.nn.Parameter and isinstance(t, Tensor):
            return False
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() or torch.autograd._profiler_enabled():
        return False
    return not torch._C._are_functorch_transforms_active()


class inside_op:
    """Autocast has had its say where the op was called: types stay as they are. And who runs out of memory in an
    operator on PyTorch's stable ABI, which can raise a RuntimeError alone, is told so in PyTorch's way."""

    __slots__ = ("autocast",)

    def __enter__(self) -> None:
        self.autocast = torch._C._DisableAutocast()
        self.autocast.__enter__()

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self.autocast.__exit__(kind, error, traceback)
        if kind is RuntimeError and "out of memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from None
