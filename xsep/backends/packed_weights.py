"""Packed pointwise weights that a layer keeps between the forwards of inference on a CPU.

Whether a weight is still what was packed is told by a checksum of its values, not by its version counter: that one
does not see what is written through ``.data``, NumPy or a memory map. Reading a weight once costs about a fifth of
packing it, which reads it, writes the panels and fetches their lines.
"""

from __future__ import annotations

import threading
from typing import Optional

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

#: Elements of a weight below which packing is too cheap to be worth a look at what was kept.
FEWEST = 1 << 16

_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_writing = threading.Lock()
_wish = threading.local()


class kept:
    """A context in which a forward that multiplies by this very tensor may keep what it packs."""

    __slots__ = ("before", "w_pw")

    def __init__(self, w_pw: Tensor) -> None:
        self.w_pw = w_pw

    def __enter__(self) -> None:
        self.before: Optional[Tensor] = getattr(_wish, "weight", None)
        _wish.weight = self.w_pw

    def __exit__(self, *error: object) -> None:
        _wish.weight = self.before


def find(w_pw: Tensor, multiplier: int) -> Optional[Tensor]:
    """w_pw ``[C_out, C_in * multiplier, 1, 1]`` as the chip multiplies by it; None where none is to be kept."""
    if getattr(_wish, "weight", None) is not w_pw or w_pw.numel() < FEWEST:
        return None
    pairs = w_pw.dtype == torch.bfloat16 and torch.ops.xsep.cpu_has_bfloat16_gemm()
    key = (torch.ops.xsep.cpu_checksum(w_pw), tuple(w_pw.shape), w_pw.dtype, multiplier, pairs)
    known = _kept.get(w_pw)
    if known is not None and known[0] == key:
        packed: Tensor = known[1]
        return packed
    packed = torch.ops.xsep.cpu_pack_pointwise(w_pw, multiplier)
    with _writing:
        _kept[w_pw] = (key, packed)
    return packed


def held(w_pw: Tensor) -> int:
    """Bytes kept for that weight."""
    known = _kept.get(w_pw)
    return 0 if known is None else known[1].numel() * known[1].element_size()


def forget_packed_weights() -> None:
    """Gives back the memory of all packed weights that layers keep; the next inference packs them anew."""
    with _writing:
        _kept.clear()
