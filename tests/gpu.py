"""Where the tests of a GPU run and how large they are, in one place: on the card, at the sizes of real networks.

tests/cuda/emulated_plugin.py has them run on a CPU before, the cuda backend's kernels in the emulator, small.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from .host_waits import HostWaits


@dataclass
class Place:
    device: str = "cuda"
    emulated: bool = False
    backends: tuple[str, ...] = ("aten", "cuda", "triton")
    #: Of the tests of every backend that ask for the fixture of that name: those of a CPU, wherever there is one.
    everywhere: tuple[str, ...] = ("aten", "cpu")
    #: N, C_in, C_out, H, W, k, stride
    sizes: tuple[tuple[int, ...], ...] = (
        (8, 64, 128, 147, 147, 3, 1), (4, 128, 256, 74, 74, 3, 1), (4, 256, 256, 37, 37, 3, 1),
        (8, 728, 728, 19, 19, 3, 1), (8, 96, 24, 57, 57, 3, 2), (4, 144, 40, 28, 28, 5, 2), (4, 240, 80, 14, 14, 5, 1),
        (2, 96, 96, 31, 29, 7, 1), (2, 13, 17, 23, 19, 3, 1), (2, 32, 62, 17, 19, 5, 1),
    )  # fmt: skip
    #: The same, of layers whose dw_pw can be made with z on the chip; the first two can be the training chain's.
    wgrad_sizes: tuple[tuple[int, ...], ...] = (
        (8, 128, 128, 74, 74, 3, 1), (4, 128, 256, 74, 74, 3, 1), (16, 64, 128, 147, 147, 3, 1),
        (8, 128, 128, 147, 147, 3, 1), (16, 256, 256, 74, 74, 3, 1), (8, 96, 24, 57, 57, 3, 2),
        (4, 144, 40, 28, 28, 5, 2), (4, 240, 80, 14, 14, 5, 1),
    )  # fmt: skip
    #: Channels of a layer whose backward is one pass.
    fused_channels: int = 128
    #: Of the network: channels, and batch and size of its pictures.
    channels: tuple[int, int, int] = (128, 256, 728)
    pictures: tuple[int, int, int] = (4, 63, 58)


PLACE = Place()


@contextlib.contextmanager
def never_waiting(*operators: str) -> Iterator[None]:
    """Fails where the host waits for the card within. In the emulator these operators of the cuda backend's were seen
    inside of xsep's ops, where the waits are looked for too."""
    if PLACE.emulated:
        with HostWaits() as waits:
            yield
        assert not waits.found
        assert set(operators) <= waits.seen
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def needs_card(what: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(PLACE.emulated, reason=f"a CPU has no {what}")
