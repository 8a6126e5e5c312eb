"""What every test shares: which backends can run here, and how much of each matrix to run."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from tests.gpu import PLACE
from xsep import dispatch
from xsep.problem import Geometry, Problem

NIGHTLY = os.environ.get("XSEP_NIGHTLY", "") not in ("", "0")


# What auto does before a card's kernels were checked is some tests' subject; all others have none checked meanwhile.
os.environ["XSEP_CARD_CHECK"] = "0"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; run with pytest -m gpu")


#: What takes longest, in this order before the rest: no process is left alone with it at the end, or with what the
#: other one waits for.
LONGEST = (
    "tests/cuda/test_sanitizers.py", "tests/triton/interpreter", "tests/cuda/test_planted_faults.py",
    "tests/triton/test_ahead_of_time.py", "tests/cuda/test_nvcc.py", "tests/cuda/test_emulated_ops.py",
    "tests/test_cpu_kernels.py", "tests/train/test_runs.py", "tests/sanitizers/test_cpu_kernels.py",
    "tests/ecosystem/test_onnx.py", "tests/test_xception.py", "tests/hardening/test_fuzz.py",
)  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: next((i for i, p in enumerate(LONGEST) if item.nodeid.startswith(p)), len(LONGEST)))
    if torch.cuda.is_available() or PLACE.emulated:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Several processes take a file at a time; the interpreter's folder is one file, as it is one process anyway."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # by the number of tests

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            folder = "tests/triton/interpreter"
            return folder if nodeid.startswith(folder) else str(super()._split_scope(nodeid))

    return ByFile(config, log)


def pytest_report_header(config: pytest.Config) -> str:
    problem = Problem(
        "separable", "cpu", torch.float32, True, 1, 8, 8, 8, 1, 3, 3, 8, Geometry(1, 1, 1, 1, 1, 1, 1, 1), (0, 0, 0)
    )
    reasons = dispatch.backend("cpu").not_supported_reasons(problem)
    state = "; ".join(reasons) if reasons else dispatch.backend("cpu").plan(problem)
    return f"xsep: cpu backend: {state}; threads {torch.get_num_threads()}; nightly {NIGHTLY}"


@pytest.fixture(params=PLACE.everywhere)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that runs without a GPU in this process. The cpu backend must be built: it is never skipped.

    The cuda backend has its turn in the emulator (tests/cuda/test_emulated_ops.py).
    """
    return str(request.param)
