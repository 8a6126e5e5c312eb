"""The kernels as nvcc compiled them: the emulator's tests once more, on their PTX; in processes of their own.

What the emulator runs in place of inline PTX is C++ of the same meaning. Here that PTX itself is run, and what the
compiler made of all around it: only ptxas, which makes machine code of PTX, is then between the tests and a GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from . import emulated

NIGHTLY = os.environ.get("XSEP_NIGHTLY", "") not in ("", "0")
#: Of which the compilers take minutes; the rest are of the same sources.
ORDINARY = r"(depthwise/[fb]prop|separable/fprop)_bf16"
#: Libraries, files of tests and which of them, and how many launches of translated kernels there are at least.
RUNS = {
    "depthwise": (("depthwise",), ("depthwise",), "bf16", 30),
    "separable": (("separable",), ("separable",), "bf16", 20),
    **({"all": (("depthwise", "separable", "ops"), ("depthwise", "separable", "statistics", "chain", "fused_backward",
                                                    "ops"), "", 500)} if NIGHTLY else {}),
}  # fmt: skip
ARCHITECTURES = ("90a", "80") if NIGHTLY else ("90a",)


@pytest.mark.skipif(emulated.missing_tools() is not None, reason=str(emulated.missing_tools()))
@pytest.mark.skipif(shutil.which(emulated.nvcc()) is None, reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", RUNS)
def test_as_compiled(name: str, architecture: str) -> None:
    libraries, files, chosen, fewest = RUNS[name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XSEP_EMULATED_PTX": architecture,
                   "XSEP_EMULATED_PTX_FILES": "" if name == "all" else ORDINARY}  # fmt: skip
    build = f"from tests.cuda import emulated; [emulated.build(name) for name in {libraries!r}]"
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen,
        *(str(emulated.ROOT / "tests" / "cuda" / f"test_emulated_{file}.py") for file in files),
    ]  # fmt: skip
    for words in ([sys.executable, "-c", build], command):
        done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=emulated.ROOT)
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    launches = re.search(r"(\d+) launches of kernels as compiled", done.stdout)
    assert launches is not None and int(launches[1]) >= fewest
