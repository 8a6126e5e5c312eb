"""The torch-free programs beside this file, optimised as they are shipped, by other compilers and for other chips.

Each night (XSEP_NIGHTLY=1), where they are installed: Clang, and for ARM64 a cross compiler with an emulator.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import NIGHTLY

from .test_cpu_kernels import AVX2, ROOT, built, has_avx2

pytestmark = pytest.mark.skipif(not NIGHTLY, reason="XSEP_NIGHTLY=1 runs it")
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=fast", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]


@pytest.mark.parametrize("main, said", [("kernels", "forward right, backward right"), ("chain", "passes right")])
@pytest.mark.parametrize(
    "compiler, flags, runner",
    [("clang++", [], []), ("clang++", AVX2, []), ("aarch64-linux-gnu-g++", ["-static"], ["qemu-aarch64"])],
    ids=["clang", "clang-avx2", "arm64"],
)  # fmt: skip
def test_kernels(compiler: str, flags: list[str], runner: list[str], main: str, said: str) -> None:
    missing = [tool for tool in (compiler, *runner) if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}")
    if flags is AVX2 and not has_avx2():
        pytest.skip("needs AVX2")
    sources = [Path(__file__).with_name(f"{main}_main.cpp"), ROOT / "csrc" / "cpu" / "activate.cpp"]
    program = built(main, sources, [*FLAGS, *flags], ["-lpthread"], compiler)
    done = subprocess.run([*runner, str(program)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    assert said in done.stdout and not re.search("wrong", done.stdout, re.IGNORECASE)
