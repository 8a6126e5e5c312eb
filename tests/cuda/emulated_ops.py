"""The CUDA operators themselves on CPU tensors: their library built for the emulator, in place of the real one."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xsep.backends import cuda
from xsep.backends.cuda import DeviceFacts

from . import emulated

H200 = DeviceFacts(132, 227 * 1024, 60 << 20)
SMALL = DeviceFacts(1, 227 * 1024, 0)


class EmulatedOps:
    """One built library, and what was called of it.

    Its operators take CPU tensors, which count as lying on a card of whatever facts ``on`` was told. While they are
    ``guarded``, all CPU tensors start as NaN and lie between margins of NaN: see guarding_allocator.cpp.
    """

    def __init__(self, path: Path, namespace: str = "xsep_emulated") -> None:
        torch.ops.load_library(str(path))
        self.lib, self.ops = emulated.load(path), getattr(torch.ops, namespace)
        self.lib.emulate_damaged_tensors.restype = ctypes.c_int64
        known = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
        self.names = sorted(name for own, _, name in known if own == namespace)
        self.called: Counter[str] = Counter()

    def start(self, facts: DeviceFacts = H200, seed: int = 0) -> None:
        """As if nothing had been called; on a card of these facts, the threads in an order drawn from the seed."""
        self.called.clear()
        self.seed(seed)
        self.on(facts)

    def seed(self, seed: int) -> None:
        self.lib.emulate_seed(seed)

    def on(self, facts: DeviceFacts) -> None:
        self.lib.emulate_card(*facts)
        cuda.device_facts.cache_clear()

    def installed(self, patch: Callable[[Any, str, Any], None]) -> None:
        """``torch.ops.xsep`` has these operators, as ``patch(object, name, value)`` puts them there."""
        for name in self.names:
            counted = name not in ("cuda_device_facts", "cuda_probe", "cuda_architectures")
            patch(torch.ops.xsep, name, self._counted(name) if counted else getattr(self.ops, name))
        # PyTorch's word for the index of a CPU's tensor; the emulator takes it for that of the card.
        patch(torch.cuda, "current_device", lambda: -1)

    def _counted(self, name: str) -> Callable[..., Any]:
        op = getattr(self.ops, name)

        def call(*arguments: Any) -> Any:
            self.called[name.removeprefix("cuda_")] += 1
            return op(*arguments)

        return call

    def guard(self, on: bool) -> None:
        self.lib.emulate_guard(int(on and not emulated.SANITIZED))  # which has margins of its own

    def check(self) -> None:
        assert self.lib.emulate_damaged_tensors() == 0, "an operator wrote past the ends of a tensor"
        assert self.lib.emulate_current_device() == 0, "an operator left its device the current one"


@cache
def library() -> EmulatedOps:
    return EmulatedOps(emulated.build("ops"))


def misaligned(t: Tensor) -> Tensor:
    """The same image, one element past where 16-byte accesses can begin."""
    n, c, h, w = t.shape
    place = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(n, h, w, c).permute(0, 3, 1, 2)
    return place.copy_(t)


@contextlib.contextmanager
def guarded(monkeypatch: pytest.MonkeyPatch, found: EmulatedOps) -> Iterator[EmulatedOps]:
    """The operators in place, and everything guarded that is allocated meanwhile."""
    found.installed(lambda owner, name, value: monkeypatch.setattr(owner, name, value, raising=False))
    found.start(seed=int(os.environ.get("XSEP_SEED", "0")))
    found.guard(True)
    try:
        yield found
        found.check()
    finally:
        found.guard(False)
        cuda.device_facts.cache_clear()
