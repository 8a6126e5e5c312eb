"""The emulated kernels under the address and undefined-behaviour sanitizers, in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from . import emulated

HERE = Path(__file__).resolve().parent
#: One of every path: fast and general, forward and backward, fused with everything, statistics.
CHOICE = (
    "(test_forward and not prologue and bf16 and (k3 or odd-channels or small-pictures or tf-same)) "
    "or (test_backward and fp16 and (k5-stride2 or multiplier3 or k3-several)) "
    "or (test_forward_residual_prologue and bf16) or (everything and bf16) "
    "or (test_statistics and bf16 and not (row-warps or rows-of-warps or two-steps)) "
    "or (test_raw_gradient and bf16) or (test_input_gradient and half and fp16) or (test_pool_add and even and bf16) "
    "or (test_global_average and fp32) or (ends_with_the_epilogue and half and bf16)"
)


def runtime(name: str) -> str:
    """Where g++ keeps a library, or an empty string."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = found.stdout.strip()
    return path if os.path.isabs(path) else ""


@pytest.mark.skipif(emulated.missing_tools() is not None, reason=str(emulated.missing_tools()))
@pytest.mark.skipif(emulated.SANITIZED, reason="this is that process")
def test_no_report() -> None:
    libraries = [runtime("libasan.so"), runtime("libubsan.so")]
    if not all(libraries):
        pytest.skip("g++ has no sanitizer runtime here")
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "XSEP_EMULATOR_SANITIZED": "1",
        "OMP_NUM_THREADS": "1",
    }
    names = ("depthwise", "separable", "chain", "statistics")
    command = [sys.executable, "-m", "pytest", "-q", "-rpfE", "-p", "no:cacheprovider", "-k", CHOICE,
               *(str(HERE / f"test_emulated_{name}.py") for name in names)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=emulated.ROOT)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout and "runtime error" not in done.stderr
    of_kernels = r"^PASSED \S+/test_emulated_(depthwise|separable|statistics)\.py::(\S+)"
    ran = re.findall(of_kernels, done.stdout, re.MULTILINE)
    assert {file for file, _ in ran} == {"depthwise", "separable", "statistics"}
    for file, name in ran:
        sanitized = "bf16" in name or (file == "depthwise" and "backward" in name and "fp16" in name)
        assert sanitized, f"{name} runs kernels of emulated.NOT_SANITIZED"
