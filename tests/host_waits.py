"""What would have the host wait for a card, or copy to it, found where there is none: no CUDA graph could hold it.

A look at a value, a shape that depends on one, or a tensor made of Python's numbers, which is made on the CPU. On a
card ``torch.cuda.set_sync_debug_mode("error")`` finds the same.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {
    "_local_scalar_dense", "_unique2", "equal", "lift_fresh", "lift_fresh_copy", "masked_select", "nonzero",
    "unique_dim",
}  # fmt: skip
PACKAGE = Path(__file__).resolve().parents[1] / "xsep"


class HostWaits(TorchDispatchMode):
    """Notes in ``found`` where code below ``folder`` does so, also inside xsep's ops; in ``seen`` the names of ops."""

    def __init__(self, folder: Path = PACKAGE) -> None:
        super().__init__()
        self.folder = folder
        self.found: set[str] = set()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = func._schema.name.split("::")
        self.seen.add(name)
        if name in WAITING:
            ours = [f for f in traceback.extract_stack()[:-1] if self.folder in Path(f.filename).parents]
            if ours:
                self.found.add(f"{name} at {Path(ours[-1].filename).relative_to(self.folder)}:{ours[-1].lineno}")
        python = torch._C.DispatchKey.CompositeExplicitAutograd
        if space == "xsep" and func.has_kernel_for_dispatch_key(python):
            with self:
                return func._op_dk(python, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
