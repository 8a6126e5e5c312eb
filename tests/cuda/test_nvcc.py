"""What nvcc and ptxas say of the kernels, and the built library beside a PyTorch that may have no CUDA."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from xsep import extension
from xsep.backends.cuda import CUDA
from xsep.problem import Geometry, Problem

from .emulated import CUDA_SOURCES

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
NIGHTLY = os.environ.get("XSEP_NIGHTLY", "") not in ("", "0")
ARCHITECTURES = ["80", "90a", *(["86", "89"] if NIGHTLY else [])]
ROOT = CUDA_SOURCES.parents[1]
#: The files of torch glue hold no kernel to look at, and are compiled by the build.
KERNELS = sorted(p for p in CUDA_SOURCES.rglob("*.cu") if not p.name.startswith("torch_library"))
OPS = {
    "cuda_depthwise_fprop", "cuda_depthwise_fprop_residual", "cuda_depthwise_fprop_chain", "cuda_depthwise_bprop",
    "cuda_separable_fprop", "cuda_separable_wgrad", "cuda_separable_fprop_chain", "cuda_chain_raw_gradient",
    "cuda_chain_statistics", "cuda_chain_apply",
    "cuda_chain_input_gradient", "cuda_chain_depthwise_bprop", "cuda_chain_sum_partials", "cuda_chain_bn_pool_add",
    "cuda_chain_bn_finalize", "cuda_chain_bn_backward_finalize", "cuda_chain_bn_relu_gap",
    "cuda_chain_bn_relu_gap_backward", "cuda_chain_fused_backward", "cuda_chain_wgrad",
}  # fmt: skip
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


def _compile(source: Path, architecture: str) -> str:
    assert NVCC is not None
    with tempfile.TemporaryDirectory() as scratch:
        command = [NVCC, "-std=c++17", "-O3", f"-arch=sm_{architecture}", "--Werror", "all-warnings", "-cubin",
                   "-Xptxas", "-v", str(source), "-o", f"{scratch}/kernel.cubin"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{source.name} for sm_{architecture}:\n{done.stderr}"
    return done.stderr


def _sources() -> list[Path]:
    folders = (CUDA_SOURCES, CUDA_SOURCES.parent / "common")
    return [file for folder in folders for file in sorted(p for p in folder.rglob("*") if p.is_file())]


def _of_the_build(source: Path, architecture: str) -> str:
    """What .ci/nvcc kept of ptxas's words, or nothing: not built with it, for another card, or of older sources."""
    objects = f"{sys.implementation.cache_tag}-torch{torch.__version__}/xsep._C_cuda/csrc/cuda"
    kept = ROOT / "build" / objects / source.relative_to(CUDA_SOURCES).with_suffix(".o.ptxas")
    if not kept.exists() or kept.stat().st_mtime <= max(file.stat().st_mtime for file in _sources()):
        return ""
    kernels = re.split(r"(?=^ptxas info *: Compiling entry function)", kept.read_text(), flags=re.MULTILINE)
    return "".join(words for words in kernels if f"for 'sm_{architecture}'" in words.partition("\n")[0])


@pytest.fixture(scope="session")
def reports() -> dict[str, str]:
    """ptxas's words for each source and architecture; kept from run to run for the same sources."""
    digest = hashlib.sha256(repr(ARCHITECTURES).encode())
    for file in _sources():
        digest.update(file.read_bytes())
    kept = Path(tempfile.gettempdir()) / f"xsep-ptxas-{os.getuid()}-{digest.hexdigest()[:20]}.json"
    if kept.exists():
        found: dict[str, str] = json.loads(kept.read_text())
        return found
    jobs = [(source, architecture) for source in KERNELS for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        words = list(pool.map(lambda job: _of_the_build(*job) or _compile(*job), jobs))
    found = {f"{source.relative_to(CUDA_SOURCES)} sm_{a}": text for (source, a), text in zip(jobs, words)}
    kept.write_text(json.dumps(found))
    return found


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", KERNELS, ids=lambda p: str(p.relative_to(CUDA_SOURCES)))
def test_no_warnings_and_no_spills(reports: dict[str, str], source: Path, architecture: str) -> None:
    report = reports[f"{source.relative_to(CUDA_SOURCES)} sm_{architecture}"]
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    kernels = re.findall(r"Function properties for (\S+)", report)
    assert len(spills) == len(kernels)
    has_some = re.search(r"__global__|^template void", source.read_text(), re.MULTILINE) is not None
    assert bool(kernels) == has_some, "only a dispatch holds no kernel"
    spilled = [kernel for kernel, bytes_of in zip(kernels, spills) if bytes_of != ("0", "0", "0")]
    assert not spilled, "\n".join(spilled)


def divisions_of_the_longest_loop(body: str, bits: str) -> list[str]:
    """Those of integers that stand in a kernel's PTX between a label and the jump back to it that is farthest away."""
    lines = body.splitlines()
    labels = {line.rstrip(":"): i for i, line in enumerate(lines) if re.fullmatch(r"\$\w+:", line)}
    jumps = ((labels.get(found[1], len(lines)), i) for i, line in enumerate(lines)
             if (found := re.search(r"\bbra(?:\.uni)?\s+(\$\w+);", line)))  # fmt: skip
    first, last = max(jumps, key=lambda jump: jump[1] - jump[0])
    assert first < last, "no loop"
    return [line.strip() for line in lines[first:last] if re.search(rf"\b(div|rem)\.[us]({bits})\b", line)]


@needs_nvcc
@pytest.mark.parametrize(
    "name, bits",
    [("separable/fprop_bf16", "32|64"), ("chain/raw_gradient", "32|64"), ("chain/pool_add", "32|64"),
     ("chain/input_gradient", "32|64"), ("depthwise/fprop", "64"), ("depthwise/bprop", "64")],
)  # fmt: skip
def test_the_loop_over_pixels_divides_nothing(name: str, bits: str) -> None:
    """A division of integers is twenty instructions and more; memory leaves some thirty for a value.

    The general kernels divide by strides and multipliers that are not 1.
    """
    assert NVCC is not None
    source = CUDA_SOURCES / f"{name}.cu"
    command = [NVCC, "-std=c++17", "-O3", "-arch=sm_90a", "-ptx", str(source), "-o", "-"]
    module = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = [body for body in module.split(".entry ")[1:] if "partials_kernel" not in body.partition("(")[0]]
    assert kernels
    assert [division for body in kernels for division in divisions_of_the_longest_loop(body, bits)] == []


def built() -> None:
    if NVCC is None or os.environ.get("XSEP_BUILD_CUDA") == "0":
        pytest.skip("the CUDA library is not built here")


def test_library_registers_every_op() -> None:
    """Beside a CPU-only PyTorch too: the ops are there, and refuse CPU tensors in PyTorch's own words."""
    built()
    assert extension.load_cuda().reason is None
    for op in OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"xsep::{op}", "CUDA"), op
    assert set(torch.ops.xsep.cuda_architectures()) != set()
    x = torch.randn(1, 8, 5, 5)
    with pytest.raises(NotImplementedError, match="CPU"):
        torch.ops.xsep.cuda_depthwise_fprop(
            x, torch.randn(8, 1, 3, 3), None, None, None, None, [1] * 8, [0, 0], [0.0, 0.0]
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device here")
def test_probe_answers_without_a_driver() -> None:
    built()
    assert torch.ops.xsep.cuda_probe() != 0


def problem(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Problem:
    same = Geometry(1, 1, 1, 1, 1, 1, 1, 1)
    return Problem("separable", device, dtype, True, 2, 64, 14, 14, 1, 3, 3, 128, same, (0, 0, 0))


def test_refusals_are_sentences() -> None:
    many = problem()._replace(c_out=2_097_121)
    assert "its kernels take up to 2097120 channels, not 2097121" in CUDA.not_supported_reasons(many)
    assert not any("channels" in r for r in CUDA.not_supported_reasons(many._replace(c_out=2_097_120)))
    reasons = CUDA.not_supported_reasons(problem(dtype=torch.float64))
    assert any("NVIDIA GPUs" in r and "cpu" in r for r in reasons)
    assert any("float64" in r for r in reasons)


def test_missing_library_says_how_to_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(extension, "HERE", tmp_path)
    monkeypatch.setattr(extension, "load_cuda", extension.load_cuda.__wrapped__)
    reasons = CUDA.not_supported_reasons(problem())
    assert any("_C_cuda.so is missing" in r and "build it" in r for r in reasons)


@pytest.mark.parametrize(
    "capability, answer, expected",
    [((7, 5), 0, "compute capability 8.0"), ((12, 0), 209, "sm_80, sm_90, and this device is sm_120"),
     ((8, 0), 35, "driver is too old"), ((9, 0), 719, "cudaError 719")],
    ids=["old-card", "other-architecture", "old-driver", "any-other-error"],
)  # fmt: skip
def test_device_refusals(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], answer: int, expected: str
) -> None:
    """A stand-in for the card: what the backend says of one that cannot run its library."""
    from xsep.backends import cuda

    class Ops:
        def cuda_probe(self) -> int:
            return answer

        def cuda_architectures(self) -> list[int]:
            return [800, 900]

    class NoDevice:
        def __init__(self, index: int) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "device", NoDevice)
    monkeypatch.setattr(torch.ops, "xsep", Ops())
    reasons = cuda._device_reasons.__wrapped__(0)
    assert len(reasons) == 1 and expected in reasons[0]
