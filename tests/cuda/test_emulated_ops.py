"""The training chain's own tests, through its ops, with the cuda backend on the emulator; in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from . import emulated

FILES = ("backward_ops", "forward_ops", "layers")


@pytest.mark.skipif(emulated.missing_tools() is not None, reason=str(emulated.missing_tools()))
def test_chain_on_the_emulator() -> None:
    emulated.build("chain")
    emulated.build("depthwise")
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.cuda.emulated_plugin",
        "-k", "cuda", *(str(emulated.ROOT / "tests" / "chain" / f"test_{name}.py") for name in FILES),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=emulated.ROOT)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 100
