"""What setup.py would build, by the toolkit and the PyTorch it finds."""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from setuptools import Distribution
from torch.utils import cpp_extension
from torch.utils.cpp_extension import BuildExtension

SETUP = Path(__file__).parent.parent / "setup.py"


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Names of the extensions beside a toolkit of CUDA 13.0 and a PyTorch of a version."""
    for folder, name, content in (
        ("bin", "nvcc", "#!/bin/sh\necho release 13.0, V13.0.88\n"),
        ("lib64", "libcudart_static.a", ""),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(content)
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.delenv("XSEP_BUILD_CUDA", raising=False)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)

    def run(cuda: Optional[str]) -> set[str]:
        found: dict[str, Any] = {}
        monkeypatch.setattr("setuptools.setup", found.update)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        runpy.run_path(str(SETUP))
        return {extension.name for extension in found["ext_modules"]}

    return run


def test_objects_older_than_a_header_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    remove = runpy.run_path(str(SETUP))["remove_stale_objects"]
    files = {name: tmp_path / "csrc" / name for name in ("old.o", "header.cuh", "new.o", "old.txt")}
    for path in files.values():
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    for name, seconds in (("old.o", 1), ("old.txt", 1), ("header.cuh", 2), ("new.o", 3)):
        os.utime(files[name], (seconds, seconds))
    remove(str(tmp_path), [str(files["header.cuh"])])
    assert {path.name for path in files["old.o"].parent.iterdir()} == {"header.cuh", "new.o", "old.txt"}
    remove(str(tmp_path), [])
    assert files["new.o"].exists()


@pytest.mark.parametrize("limit, seen", [("", (2, "4")), ("7", (2, "3")), ("1", (None, "1"))])
def test_two_libraries_at_a_time(limit: str, seen: tuple[Optional[int], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Together they have as many compilers as one would have; of one that MAX_JOBS allows there is no half."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    monkeypatch.setenv("MAX_JOBS", limit)
    command = runpy.run_path(str(SETUP))["Build"](Distribution())
    found = []
    monkeypatch.setattr(
        BuildExtension, "build_extensions", lambda self: found.append((self.parallel, os.environ["MAX_JOBS"]))
    )
    command.finalize_options()
    command.build_extensions()
    assert found == [seen] and os.environ["MAX_JOBS"] == limit


@pytest.mark.parametrize("cuda", [None, "13.0", "13.2"])
def test_cuda_library_beside_a_cpu_pytorch_and_one_of_the_same_cuda(built: Any, cuda: Optional[str]) -> None:
    assert "xsep._C_cuda" in built(cuda)


def test_a_toolkit_of_another_cuda_is_left_alone(
    built: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "xsep._C_cuda" not in built("12.8") and "xsep._C" in built("12.8")
    assert "nvcc is of CUDA 13, PyTorch" in capsys.readouterr().out
    monkeypatch.setenv("XSEP_BUILD_CUDA", "1")  # PyTorch's own refusal is what the user then sees
    assert "xsep._C_cuda" in built("12.8")


@pytest.mark.parametrize("version, right", [("2.9.1+cpu", False), ("2.10.0", True), ("2.15.0+cu132", True)])
def test_an_older_pytorch_is_named(built: Any, version: str, right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    if right:
        assert "xsep._C" in built(None)
        return
    with pytest.raises(SystemExit, match=r"needs PyTorch 2\.10 or newer, and 2\.9\.1\+cpu is installed"):
        built(None)
