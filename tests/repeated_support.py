"""What the tests of repeated calls share, whichever op is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Noting(TorchDispatchMode):
    """Which operations ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def assert_gradients_come_in_batches(y: Tensor, inputs: Sequence[Tensor]) -> None:
    """Of several gradients from above at once, what each alone gives."""
    dy = torch.randn(3, *y.shape)
    found = torch.autograd.grad(y, inputs, dy, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        for a, b in zip(found, torch.autograd.grad(y, inputs, dy[i], retain_graph=True), strict=True):
            torch.testing.assert_close(a[i], b)
