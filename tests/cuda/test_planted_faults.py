"""The tests catch what they are there to catch: faults planted into a copy of the kernels fail the same checks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from . import emulated, test_emulated_fused_backward
from .emulated_chain import EmulatedChain
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


def copied(folder: Path) -> Path:
    """A copy of csrc/cuda, beside what it includes."""
    shutil.copytree(emulated.CUDA_SOURCES.parent / "common", folder / "common")
    return Path(shutil.copytree(emulated.CUDA_SOURCES, folder / "cuda"))


def with_fault(folder: Path, fault: Fault) -> Path:
    """A copy of csrc/cuda with the fault in it."""
    sources = copied(folder)
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


class Switch(NamedTuple):
    """A fault of the fused backward that is there while ``planted_fault`` says so: one build serves them all."""

    name: str
    file: str  # below csrc/cuda
    right: str  # occurs once in it
    wrong: str


SWITCHES = [
    Switch(
        "missing-barrier",
        "chain/fused_backward.cuh",
        "form_dz<T>(p.plan, memory);\n    __syncthreads();",
        "form_dz<T>(p.plan, memory);\n    if (!FAULT) __syncthreads();",
    ),
    Switch(
        "dz-off-by-one",
        "chain/fused_backward.cuh",
        "memory.dz.get() + ((i + k) * kHaloColumns + j)",
        "memory.dz.get() + ((i + k) * kHaloColumns + j + FAULT)",
    ),
    Switch(
        "sums-before-rounding",
        "gradient_epilogue.cuh",
        "  rounded.widen(d);\n",
        "  if (!FAULT) rounded.widen(d);\n",
    ),
    Switch(
        "dr-not-zero-outside",
        "chain/fused_backward.cuh",
        "    float dr[8] = {};\n",
        "    float dr[8] = {};\n    for (float& v : dr) v = FAULT * 0.25f;\n",
    ),
    Switch(
        "missing-row-of-the-reduction",
        "chain/fused_backward.cu",
        "for (int row = 0; row < rows; ++row)",
        "for (int row = FAULT; row < rows; ++row)",
    ),
    Switch(
        "a-share-of-dw_pw-twice",
        "chain/fused_multiply.cuh",
        "int row = block.share; row < plan.tile_rows; row += plan.shares",
        "int row = FAULT ? 0 : block.share; row < plan.tile_rows; row += plan.shares",
    ),
]


@pytest.fixture(scope="module")
def switched(tmp_path_factory: pytest.TempPathFactory) -> emulated.Library:
    sources = copied(tmp_path_factory.mktemp("switched"))
    for number, switch in enumerate(SWITCHES, 1):
        file = sources / switch.file
        text = file.read_text()
        assert text.count(switch.right) == 1, f"the line to spoil has moved: {switch.name}"
        file.write_text(text.replace(switch.right, switch.wrong.replace("FAULT", f"(planted_fault == {number})")))
    header = sources / "params.h"
    visible = 'extern "C" inline __attribute__((used, visibility("default")))'
    header.write_text(
        f"{header.read_text()}\n"
        "inline int planted_fault = 0;\n"
        f"{visible} void plant_fault(int number) {{ planted_fault = number; }}\n"
    )
    return emulated.Library(emulated.build("fused_backward", sources))


@pytest.mark.parametrize("number", range(len(SWITCHES) + 1), ids=["none", *(s.name for s in SWITCHES)])
def test_fault_of_the_fused_backward_is_caught(
    monkeypatch: pytest.MonkeyPatch, switched: emulated.Library, number: int
) -> None:
    layer = test_emulated_fused_backward.LAYERS["pool-same"]
    case, chain = layer.case("bf16"), EmulatedChain(0, layer.ctas)
    chain.fused = switched
    switched.lib.plant_fault(number)
    found = test_emulated_fused_backward.run(monkeypatch, case, layer.ctas, chain)
    if number == 0:
        test_emulated_fused_backward.check(case, found)
        return
    with pytest.raises(AssertionError, match=r"off by"):
        test_emulated_fused_backward.check(case, found)
