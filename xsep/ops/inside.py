"""What holds inside every op."""

from __future__ import annotations

from typing import Any

import torch


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
