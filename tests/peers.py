"""Other people's implementations, where they can be imported; and Keras's, in a process of its own."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def peer(name: str) -> Any:
    """The module, or a skip with the reason why it cannot be imported."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # torchvision beside a CPU-only PyTorch raises RuntimeError
        pytest.skip(f"{name} cannot be imported: {str(error).splitlines()[0]}")


@pytest.fixture(scope="session")
def keras_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder with what keras_peer.py saves: a process can import Keras with one backend only, so another does."""
    for needed in ("keras", "h5py"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    out = _run_keras_peer(tmp_path_factory.getbasetemp())
    yield out
    shutil.rmtree(out, ignore_errors=True)


@functools.cache
def _run_keras_peer(folder: Path) -> Path:
    """Once a session, however many test files import the fixture."""
    out = folder / "keras"
    out.mkdir()
    # As a module of the checkout: a script's own folder would come first on the path, and tests/triton be triton.
    command = [sys.executable, "-m", "tests.keras_peer", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parent.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return out
