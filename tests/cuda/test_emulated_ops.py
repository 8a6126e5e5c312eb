"""The training chain's own tests, through its ops, with the cuda backend on the emulator; in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from . import emulated

#: Files, which of their tests, and channels of their layers.
RUNS = {
    "whole": (("backward_ops", "forward_ops", "layers"), "cuda", "", 100),
    "fused-backward": (("backward_ops",), "cuda and test_layer and not fp32", "24,16", 20),
}


@pytest.mark.skipif(emulated.missing_tools() is not None, reason=str(emulated.missing_tools()))
@pytest.mark.parametrize("name", RUNS)
def test_chain_on_the_emulator(name: str) -> None:
    files, chosen, channels, fewest = RUNS[name]
    for library in ("chain", "depthwise", "fused_backward"):
        emulated.build(library)
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.cuda.emulated_plugin",
        "-k", chosen, *(str(emulated.ROOT / "tests" / "chain" / f"test_{file}.py") for file in files),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if channels:
        environment["XSEP_EMULATED_CHANNELS"] = channels
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=emulated.ROOT)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    passed, fused = re.search(r"(\d+) passed", done.stdout), re.search(r"(\d+) fused backwards", done.stdout)
    assert passed is not None and int(passed[1]) >= fewest
    assert fused is not None and (int(fused[1]) > 0) == bool(channels)
