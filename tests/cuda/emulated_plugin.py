"""A pytest plugin: the chain's tests run the ``cuda`` backend, whose operators the emulator stands in for.

With ``XSEP_EMULATED_CHANNELS``, as in ``24,16``, on layers of so many channels.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.chain import support
from xsep.backends import chain_cuda, cuda

from .test_backend_python import ChainOperators

support.WAYS[:] = [("cuda", kind) for kind in ("fp32", "bf16", "fp16")]
if "XSEP_EMULATED_CHANNELS" in os.environ:
    support.CHANNELS[:] = [int(c) for c in os.environ["XSEP_EMULATED_CHANNELS"].split(",")]
support.WAY_IDS[:] = ["-".join(way) for way in support.WAYS]

_operators = ChainOperators()
for _name in dir(_operators):
    if _name.startswith("cuda_"):
        setattr(torch.ops.xsep, _name, getattr(_operators, _name))


def _facts(index: int) -> cuda.DeviceFacts:
    return cuda.DeviceFacts(132, 227 * 1024)


cuda.device_facts = chain_cuda.device_facts = _facts  # type: ignore[assignment]
chain_cuda.CudaChain.not_supported_reasons = lambda self, problem: []  # type: ignore[method-assign]
torch.cuda.current_device = lambda: 0


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"{_operators.fused_backwards} fused backwards")
