"""The kernels as Triton compiled them, without a GPU: the interpreter's tests once more, on their PTX.

The interpreter runs the kernels' Python. Here runs what the compiler made of it, layouts, shared memory, barriers and
matrix instructions included; only ptxas is then between the tests and a card. A part for sm_90, which has warp-group
products, in an ordinary run; all, for sm_80 as well, under XSEP_NIGHTLY=1.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import NIGHTLY
from tests.cuda import emulated

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent / "interpreter"
#: A test's file, which of them, and how many launches there are at least.
RUNS = {
    "ops": (
        "test_op.py",
        "test_each_kernel and not float32 and "
        "(2x7x9x11-o5-m1-k33-s11-p2222 or 2x64x7x5 or k55-s11 or shift_m-scale_e)", 12,
    ),
    "chain": ("test_training.py", "test_forward_and_statistics and bfloat16 and relu and same and 24", 2),
    # Each kernel that multiplies, in the precision that the tests above switch off.
    "tf32": ("test_tf32.py", "fused or forward_of_a_chain or input_gradient", 14),
}  # fmt: skip
if NIGHTLY:
    RUNS = {"ops": ("test_op.py", "kernel or generated or plans", 200), "fprop": ("test_training.py", "", 50),
            "bprop": ("test_training_backward.py", "", 50), "tf32": ("test_tf32.py", "", 25)}  # fmt: skip
ARCHITECTURES = ("90", "80") if NIGHTLY else ("90",)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(emulated.missing_tools() is not None, reason=str(emulated.missing_tools()))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", RUNS)
def test_as_compiled(name: str, architecture: str) -> None:
    file, chosen, fewest = RUNS[name]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, str(FOLDER / file)],
        capture_output=True, text=True, cwd=ROOT,
        # Of generated problems the few of an ordinary run: each is minutes of compiling for ten.
        env={**environment, "OMP_NUM_THREADS": "1", "XSEP_EMULATED_TRITON": architecture, "XSEP_NIGHTLY": ""},
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    launches = re.search(r"(\d+) launches of kernels as compiled", done.stdout)
    assert launches is not None and int(launches[1]) >= fewest, done.stdout[-2000:]
