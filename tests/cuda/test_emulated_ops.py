"""The tests of a GPU, and those of every backend and of the chain with the cuda backend, on the emulator.

In processes of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from . import emulated

#: Files, which of their tests, and channels of their layers.
RUNS = {
    "whole": (("chain/test_backward_ops", "chain/test_forward_ops", "chain/test_layers"), "cuda", "", 100),
    "any-layer": (("chain/test_fuzz",), "cuda", "", 3),
    "fused-backward": (("chain/test_backward_ops",), "cuda and test_layer and not fp32", "24,16", 20),
    "of-a-gpu": (("cuda/test_on_gpu", "chain/test_on_gpu"), "", "", 300),
    "of-every-backend": (
        ("test_op", "test_autograd", "hardening/test_autograd_modes", "hardening/test_special_values"),
        "cuda and not many_pixels", "", 700,
    ),
}  # fmt: skip


@pytest.mark.skipif(emulated.missing_tools() is not None, reason=str(emulated.missing_tools()))
@pytest.mark.parametrize("name", RUNS)
def test_on_the_emulator(name: str) -> None:
    files, chosen, channels, fewest = RUNS[name]
    emulated.build("ops")
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.cuda.emulated_plugin",
        "-k", chosen, *(str(emulated.ROOT / "tests" / f"{file}.py") for file in files),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if channels:
        environment["XSEP_EMULATED_CHANNELS"] = channels
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=emulated.ROOT)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    passed, fused = re.search(r"(\d+) passed", done.stdout), re.search(r"(\d+) fused backwards", done.stdout)
    assert passed is not None and int(passed[1]) >= fewest
    assert fused is not None and (int(fused[1]) > 0) == (name in ("any-layer", "fused-backward", "of-a-gpu"))
