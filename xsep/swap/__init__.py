"""The swap: separable convolutions of a model that exists run as one op each, and everything else stays as it was."""

from __future__ import annotations

from .report import Missed, Swapped, SwapReport
from .surgery import swap_separable_convs, unswap

__all__ = ["Missed", "SwapReport", "Swapped", "swap_separable_convs", "unswap"]
