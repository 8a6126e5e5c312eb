"""A pytest plugin: the tests of a GPU, those of every backend and the chain's own on ``cuda``, run on the emulator.

With ``XSEP_EMULATED_CHANNELS``, as in ``24,16``, the chain's are on layers of so many channels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests import gpu
from tests.chain import support
from xsep import extension
from xsep.backends.cuda import CudaBackend
from xsep.testing import float32_products

from . import emulated_ops

#: Whose launches take longer than all else of layers as small as the tests', so that one pass is their backward.
CARD = emulated_ops.H200._replace(l2_bytes=8 << 10)

support.WAYS[:] = [("cuda", kind) for kind in ("fp32", "bf16", "fp16")]
if "XSEP_EMULATED_CHANNELS" in os.environ:
    support.CHANNELS[:] = [int(c) for c in os.environ["XSEP_EMULATED_CHANNELS"].split(",")]
support.WAY_IDS[:] = ["-".join(way) for way in support.WAYS]

place = gpu.PLACE
place.device, place.emulated, place.backends, place.everywhere = "cpu", True, ("cuda",), ("cuda",)
place.sizes = (
    (2, 16, 32, 13, 11, 3, 1), (2, 24, 264, 5, 6, 3, 1), (4, 40, 24, 5, 4, 3, 1), (2, 24, 8, 11, 9, 3, 2),
    (2, 16, 10, 9, 8, 5, 2), (1, 8, 8, 9, 8, 7, 1), (2, 13, 17, 7, 9, 3, 1), (1, 32, 62, 6, 5, 5, 1),
)  # fmt: skip
place.wgrad_sizes = (
    (2, 64, 128, 13, 11, 3, 1), (2, 24, 264, 7, 6, 3, 1), (2, 24, 264, 7, 6, 3, 2), (1, 72, 40, 9, 13, 5, 1),
    (2, 32, 8, 9, 5, 5, 2),
)  # fmt: skip
place.fused_channels, place.channels, place.pictures = 16, (8, 16, 24), (4, 47, 42)

_operators = emulated_ops.library()
_operators.installed(setattr)
_operators.start(CARD)
_operators.guard(True)
CudaBackend.not_supported_reasons = lambda self, problem: []  # type: ignore[method-assign]
extension.repeated = lambda: None  # C++ would ask PyTorch's dispatcher, which has the operators of a card


@pytest.fixture(autouse=True)
def undamaged() -> Iterator[None]:
    with float32_products("ieee"):  # as a CPU multiplies
        yield
    _operators.check()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"{_operators.called['chain_fused_backward']} fused backwards")
