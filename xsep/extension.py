"""Finding and loading the compiled parts; every failure is a sentence that says what to do, kept for whoever asks.

``xsep._C`` holds the planner and build info, ``_cpu_<level>.so`` the CPU operators for one instruction set,
``_C_cuda.so`` the CUDA operators. None is needed to import xsep.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, Optional

import torch

HERE = Path(__file__).parent
#: Instruction sets that the CPU kernels are compiled for, worst first. The order is that of ``XSEP_CPU_ISA``'s values.
CPU_LEVELS = ("default", "avx2", "avx512")
HOW_TO_BUILD = "build it with `pip install --no-build-isolation -e .` in xsep's source folder"


class Loaded(NamedTuple):
    """What came of loading a library: ``reason`` is None where it is there."""

    reason: Optional[str]
    path: Optional[Path] = None
    level: str = ""  # CPU only


@cache
def _binding() -> tuple[Optional[ModuleType], Optional[str]]:
    try:
        return importlib.import_module("xsep._C"), None
    except ImportError as error:
        if not any(HERE.glob("_C.*")):
            return None, f"xsep's compiled extension is missing: {HOW_TO_BUILD}"
        return None, f"xsep's compiled extension does not load ({error}): {HOW_TO_BUILD} again"


def binding() -> Optional[ModuleType]:
    """The module ``xsep._C``, or None where it was not built or does not load."""
    return _binding()[0]


@cache
def _repeated() -> tuple[Optional[ModuleType], Optional[str]]:
    try:
        return importlib.import_module("xsep._repeated"), None
    except ImportError as error:
        return None, f"Python makes every call, which takes longer: xsep._repeated is missing ({error}): {HOW_TO_BUILD}"


def repeated() -> Optional[ModuleType]:
    """The module ``xsep._repeated``, or None where it was not built or does not load."""
    return _repeated()[0]


def why_not_repeated() -> str:
    """Why Python makes every call; "" where C++ makes those it knows."""
    return _repeated()[1] or ""


def forget_repeated() -> None:
    """Has calls that were made before checked anew, and decided by what is known now."""
    module = sys.modules.get("xsep._repeated")
    if module is not None:
        module.forget()


def cpu_level() -> str:
    """The CPU level to load: the best that this chip has and that was built, or the one XSEP_CPU_ISA names.

    Raises:
        ValueError: XSEP_CPU_ISA names no level.
        RuntimeError: the extension is missing, or XSEP_CPU_ISA names a level that this chip lacks or that was not
            built.
    """
    module, reason = _binding()
    wish = os.environ.get("XSEP_CPU_ISA", "")
    if wish and wish not in CPU_LEVELS:
        raise ValueError(f"XSEP_CPU_ISA must be one of {', '.join(CPU_LEVELS)}, got {wish!r}")
    if module is None:
        raise RuntimeError(reason)
    here, built = module.cpu_levels_here(), module.cpu_levels_built.split(",")
    if not wish:
        return [level for level in CPU_LEVELS if level in here and level in built][-1]
    if wish not in here:
        raise RuntimeError(f"XSEP_CPU_ISA={wish}, but this chip only has {', '.join(here)}")
    if wish not in built:
        raise RuntimeError(f"XSEP_CPU_ISA={wish}, but only {', '.join(built)} was built")
    return wish


def _load_library(path: Path) -> Optional[str]:
    if not path.exists():
        return f"{path.name} is missing: {HOW_TO_BUILD}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load beside PyTorch {torch.__version__} ({error}): {HOW_TO_BUILD} again"
    return None


@cache
def load_cpu() -> Loaded:
    """Load the CPU operators once, and no more than one level of them.

    Raises:
        ValueError: XSEP_CPU_ISA names no level.
    """
    try:
        level = cpu_level()
    except RuntimeError as error:
        return Loaded(str(error))
    path = HERE / f"_cpu_{level}.so"
    return Loaded(_load_library(path), path, level)


@cache
def load_cuda() -> Loaded:
    """Load the CUDA operators once.

    The library names no CUDA library of PyTorch, so that it also loads beside a CPU-only one; where PyTorch has CUDA,
    its ``libtorch_cuda`` is made visible first.
    """
    path = HERE / "_C_cuda.so"
    torch_cuda = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    if path.exists() and torch_cuda.exists():
        ctypes.CDLL(str(torch_cuda), mode=ctypes.RTLD_GLOBAL)
    return Loaded(_load_library(path), path)
