"""What the tests of `make gpu-check` share: where it lies, and a check without a GPU."""

from __future__ import annotations

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from gpu_phases import Check  # noqa: E402


def new_check(tmp_path: Path) -> Check:
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    out.mkdir()
    record = {"format": 1, "card": "card", "phases": {}, "verified": {}}
    return Check("cpu", True, out, time.monotonic() + 60, scratch, record)
