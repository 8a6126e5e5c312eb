"""What a GPU can do, as numbers that a plan is made from: published ones for some cards, and the device at hand's."""

from __future__ import annotations

import contextlib
import platform
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class DeviceProperties:
    """Peak rates from a data sheet, all per second; what a program reaches of them is the cost model's business."""

    name: str
    capability: tuple[int, int]
    bandwidth: float  # bytes from memory
    half_flops: float  # float16 matrix products with float32 accumulation, dense
    bfloat16_flops: float  # likewise; a card without them has its float32 rate
    tf32_flops: float  # likewise
    float32_flops: float  # outside the matrix units
    l2_bytes: int
    multiprocessors: int
    shared_bytes: int  # of shared memory that one CTA can have
    launch_us: float = 3.0  # from one kernel's end to the next one's first instruction, both already enqueued
    vendor: str = "nvidia"

    @property
    def architecture(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}" if self.vendor == "nvidia" else self.vendor

    def matrix_flops(self, dtype: torch.dtype, tf32: bool) -> float:
        """Peak FLOP a second of a matrix product whose inputs are of that type."""
        if dtype is torch.float16:
            return self.half_flops
        if dtype is torch.bfloat16:
            return self.bfloat16_flops
        return self.tf32_flops if tf32 else self.float32_flops


#: NVIDIA H200 data sheet (SXM): 4.8 TB/s, 989 TFLOP/s bf16 and 495 TF32 dense, 67 float32. H100 white paper: 132
#: multiprocessors, 227 KB of shared memory a CTA. L2 as the CUDA runtime reports it.
H200 = DeviceProperties("NVIDIA H200", (9, 0), 4.8e12, 989e12, 989e12, 495e12, 67e12, 60 << 20, 132, 227 << 10)
#: NVIDIA H100 data sheet (SXM, whose name says HBM3; the others are slower): 3.35 TB/s, and the H200's chip; 50 MB of
#: L2 (H100 white paper).
H100 = DeviceProperties("NVIDIA H100 HBM3", (9, 0), 3.35e12, 989e12, 989e12, 495e12, 67e12, 50 << 20, 132, 227 << 10)
#: NVIDIA A100 80GB data sheet (SXM): 2,039 GB/s, 312 TFLOP/s, 156 TF32, 19.5 float32; A100 white paper: 108
#: multiprocessors, 40 MB of L2, 163 KB a CTA.
A100 = DeviceProperties("NVIDIA A100", (8, 0), 2.039e12, 312e12, 312e12, 156e12, 19.5e12, 40 << 20, 108, 163 << 10)
#: NVIDIA Ada white paper, appendix A: RTX 4090 with 1,008 GB/s, 165.2 TFLOP/s float16 and bf16 with float32
#: accumulation, 82.6 TF32, 82.6 float32, 72 MB of L2, 128 multiprocessors; 99 KB a CTA (CUDA programming guide, 8.9).
RTX_4090 = DeviceProperties(
    "NVIDIA GeForce RTX 4090", (8, 9), 1.008e12, 165.2e12, 165.2e12, 82.6e12, 82.6e12, 72 << 20, 128, 99 << 10
)
#: NVIDIA T4 data sheet: 320 GB/s, 65 TFLOP/s float16, 8.1 float32; Turing white paper: 40 multiprocessors, 4 MB of L2.
#: No bf16 and no TF32 in its matrix units. 64 KB a CTA (CUDA programming guide, 7.5).
T4 = DeviceProperties("NVIDIA T4", (7, 5), 0.32e12, 65e12, 8.1e12, 8.1e12, 8.1e12, 4 << 20, 40, 64 << 10)

PUBLISHED = (H200, H100, A100, RTX_4090, T4)

#: (FLOP a clock and multiprocessor of float16 matrix products, and of float32 lanes), by capability: the data sheets
#: above divided by multiprocessors and clock; Blackwell's from the RTX Blackwell and B200 data sheets alike.
_RATES = {
    (7, 0): (1024, 128), (7, 5): (1024, 128), (8, 0): (2048, 128), (8, 6): (1024, 256), (8, 9): (512, 256),
    (9, 0): (4096, 256), (10, 0): (8192, 256), (12, 0): (1024, 256),
}  # fmt: skip


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z]+|\d+", name.lower())) - {"nvidia", "geforce", "tesla"}


def published(name: str) -> DeviceProperties:
    """The card whose published name has all the words of ``name``: "h200", "NVIDIA H200", "rtx4090", "RTX 4090".

    Raises:
        ValueError: no card or more than one is meant; the message names those that are known.
    """
    wanted = _words(name)
    found = [card for card in PUBLISHED if wanted and wanted <= _words(card.name)]
    if len(found) != 1:
        known = ", ".join(card.name for card in PUBLISHED)
        raise ValueError(f"no card's published figures are known as {name!r}; there are {known}")
    return found[0]


def estimated(properties: Any, rates: tuple[int, int]) -> DeviceProperties:
    """A device that no data sheet here describes, from what the driver says of it.

    Args:
        properties: as ``torch.cuda.get_device_properties`` gives them.
        rates: FLOP a clock and multiprocessor of float16 matrix products and of float32 lanes.
    """
    capability = (int(properties.major), int(properties.minor))
    clock = 1e3 * float(getattr(properties, "clock_rate", 0) or 1.6e6)  # the driver says kHz
    # Two transfers a memory clock; where the driver does not say, 8 bytes a clock and multiprocessor, as on an A100.
    bits, memory_clock = (float(getattr(properties, n, 0)) for n in ("memory_bus_width", "memory_clock_rate"))
    bus = 2e3 * memory_clock * bits / 8
    count = int(properties.multi_processor_count)
    half, lanes = (rate * count * clock for rate in rates)
    wide = capability >= (8, 0)
    return DeviceProperties(
        name=str(properties.name), capability=capability, bandwidth=bus or 8.0 * count * clock, half_flops=half,
        bfloat16_flops=half if wide else lanes, tf32_flops=half / 2 if wide else lanes, float32_flops=lanes,
        l2_bytes=int(getattr(properties, "L2_cache_size", 0)) or 4 << 20, multiprocessors=count,
        shared_bytes=int(getattr(properties, "shared_memory_per_block_optin", 0)) or 48 << 10,
    )  # fmt: skip


@cache
def cpu_name() -> str:
    """The CPU's model name."""
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


@cache
def running(index: int) -> DeviceProperties:
    """The properties of the GPU ``cuda:index``: published where its name is known, else estimated."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        architecture = str(getattr(properties, "gcnArchName", "gfx")).split(":")[0]
        return replace(estimated(properties, (2048, 256)), vendor=architecture)
    capability = (int(properties.major), int(properties.minor))
    for card in PUBLISHED:
        if card.capability == capability and _words(card.name) <= _words(properties.name):
            return replace(card, name=str(properties.name), multiprocessors=int(properties.multi_processor_count))
    nearest = max((c for c in _RATES if c <= capability), default=(7, 0))
    return estimated(properties, _RATES[nearest])
