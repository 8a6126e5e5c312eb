"""Digests of what each backend is made of, so that a finding is never used for other kernels than it was made with."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
#: Written by setup.py into the package where csrc/ does not lie beside it: the digest of each folder of csrc it built.
BUILT = PACKAGE / "_csrc.sha256"

_SHARED = ("problem.py", "activations.py", "backends/base.py", "backends/pointwise.py")
#: What each backend is made of: Python sources by glob within the package, then folders of csrc.
PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "aten": (("backends/aten.py",), ()),
    "cpu": (("repeated.py", "backends/cpu.py", "backends/packed_weights.py"), ("common", "cpu", "eager")),
    "triton": (("backends/triton*.py", "backends/chain*.py", "kernels/*.py"), ()),
    "cuda": (("repeated.py", "backends/cuda.py", "backends/chain*.py"), ("common", "cuda", "eager")),
}
_SOURCES = (".cpp", ".cu", ".cuh", ".h")


def of_folder(folder: Path) -> str:
    """sha256 over names and contents of the C++ and CUDA sources below a folder."""
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.suffix in _SOURCES):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def of_csrc(csrc: Path) -> dict[str, str]:
    """The digest of each folder of csrc that a backend is made of."""
    return {name: of_folder(csrc / name) for name in ("common", "cpu", "cuda", "eager")}


def _csrc() -> dict[str, str]:
    beside = PACKAGE.parent / "csrc"
    if beside.is_dir():
        return of_csrc(beside)
    if BUILT.is_file():
        pairs = (line.split() for line in BUILT.read_text().splitlines())
        return {name: value for name, value in pairs}
    return {}


@cache
def sources(backend: str) -> str:
    """sha256 in hexadecimal over everything a backend is made of; read once a process."""
    python, folders = PARTS[backend]
    digest = hashlib.sha256()
    names = [PACKAGE / name for name in _SHARED]
    for pattern in python:
        names += sorted(PACKAGE.glob(pattern))
    for file in names:
        digest.update(file.relative_to(PACKAGE).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    built = _csrc() if folders else {}
    for folder in folders:
        digest.update(f"csrc/{folder} {built.get(folder, 'unknown')}\0".encode())
    return digest.hexdigest()


def all_sources() -> dict[str, str]:
    return {backend: sources(backend) for backend in PARTS}


def package_version() -> str:
    try:
        return version("xsep")
    except PackageNotFoundError:
        return "0+not.installed"
