"""The emulator catches what it is there to catch: faults planted into a copy of the kernels fail the same checks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from . import emulated
from .test_emulated_separable import CASES, check, draw
from .test_emulated_statistics import check_far_from_zero

pytestmark = pytest.mark.skipif(emulated.missing_tools() is not None, reason=str(emulated.missing_tools()))


class Fault(NamedTuple):
    name: str
    right: str  # occurs once in the file
    wrong: str
    file: str = "separable/fprop.cuh"


FAULTS = [
    Fault(
        "missing-barrier",
        "    __syncthreads();\n    if (chunk + 2 < p.plan.chunks) halo.copy(chunk + 2);\n",
        "    if (chunk + 2 < p.plan.chunks) halo.copy(chunk + 2);\n",
    ),
    Fault("missing-cp-async-wait", "    cp_async_wait<0>();\n", ""),
    Fault("one-past-the-halo", "while (row < plan.halo_rows) {", "while (row <= plan.halo_rows) {"),
]
STATISTICS = "depthwise/statistics.cuh"
FAULTS_OF_STATISTICS = [
    Fault("missing-barrier", "    __syncthreads();\n", "", STATISTICS),
    Fault("pixels-beside-the-picture", " && pixel % kStripWidth < columns;", ";", STATISTICS),
    Fault("sums-of-unrounded-values", "round_to<T>(strip[i][v]) - centre", "strip[i][v] - centre", STATISTICS),
]


def with_fault(folder: Path, fault: Fault) -> Path:
    """A copy of csrc/cuda with the fault in it."""
    shutil.copytree(emulated.CUDA_SOURCES.parent / "common", folder / "common")
    sources = folder / "cuda"
    shutil.copytree(emulated.CUDA_SOURCES, sources)
    kernel = sources / fault.file
    text = kernel.read_text()
    assert text.count(fault.right) == 1, "the line to spoil has moved"
    kernel.write_text(text.replace(fault.right, fault.wrong))
    return sources


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: str(fault.name))
def test_fault_is_caught(fault: Fault, tmp_path: Path) -> None:
    library = emulated.Library(emulated.build("separable", with_fault(tmp_path, fault)))
    case = CASES[6]  # several chunks, so that the pipeline turns over
    with pytest.raises((AssertionError, RuntimeError), match=r"error|past the end|cp\.async|shared"):
        check(library, case, "bf16", draw(case, "bf16"))


@pytest.mark.parametrize("fault", FAULTS_OF_STATISTICS, ids=lambda fault: str(fault.name))
def test_fault_in_the_statistics_is_caught(fault: Fault, tmp_path: Path) -> None:
    library = emulated.Library(emulated.build("depthwise", with_fault(tmp_path, fault)))
    with pytest.raises(AssertionError):
        check_far_from_zero(library, "many-tiles", "bf16")
