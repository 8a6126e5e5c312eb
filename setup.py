"""Builds the compiled parts: ``xsep._C`` (planner, build info), ``xsep._repeated`` (calls on the CPU that were made
before), one CPU library a level, and the CUDA library.

Environment: ``MAX_JOBS`` limits the compilers run at once, ``TORCH_CUDA_ARCH_LIST`` chooses GPU architectures,
``XSEP_BUILD_CUDA`` is ``0``, ``1`` or ``auto`` (the default: where nvcc is found, of PyTorch's CUDA where it has one),
``XSEP_BUILD_CPU=0`` leaves the CPU's kernels out. Metadata is in pyproject.toml.
"""

from __future__ import annotations

import copy
import glob
import importlib.util
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
from unittest import mock

from setuptools import Extension, setup


def find_cuda() -> str:
    """The CUDA toolkit's folder, or nothing: where nvcc has its libraries beside it, not merely a script on PATH."""
    on_path = os.path.dirname(os.path.dirname(shutil.which("nvcc") or ""))
    places = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), on_path, "/usr/local/cuda")
    needed = (os.path.join("bin", "nvcc"), os.path.join("lib64", "libcudart_static.a"))
    return next((p for p in places if p and all(os.path.exists(os.path.join(p, n)) for n in needed)), "")


CUDA = find_cuda()
try:
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths
except ImportError as error:
    sys.exit(
        f"xsep builds against the PyTorch you have installed, and none can be imported here ({error}). Type:\n"
        "    pip install torch\n"
        "    pip install ninja pybind11 'setuptools>=77'\n"
        "    pip install --no-build-isolation ."
    )

if torch.__version__ < "2.10":  # compared as versions: it is no plain str
    sys.exit(f"xsep needs PyTorch 2.10 or newer, and {torch.__version__} is installed here.")
if CUDA:
    # A CPU-only PyTorch looks for no CUDA, yet the library is built beside it too: nothing in it needs CUDA to load.
    cpp_extension.CUDA_HOME = CUDA
ROOT = os.path.dirname(os.path.abspath(__file__))
#: Architectures where TORCH_CUDA_ARCH_LIST names none: Ampere (Ada runs its code too), with PTX for what comes later,
#: and Hopper.
DEFAULT_CUDA_ARCHITECTURES = "8.0+PTX;9.0a"
CPU_LEVELS = {
    "default": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mavx2", "-mf16c"],
}
BUILD_CPU = os.environ.get("XSEP_BUILD_CPU") != "0"
#: Without -fopenmp, ``at::parallel_for`` silently runs one thread. Kernels begin at a cache line of their own: else the
#: same code was up to 12 % slower or faster by what happened to be compiled before it.
CPU_FLAGS = ["-O3", "-g0", "-fopenmp", "-ffp-contract=fast", "-falign-functions=64"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi"]
HIDDEN = ["-fvisibility=hidden", "-fvisibility-inlines-hidden"]


def other_cuda() -> str:
    """Where nvcc and PyTorch are of different CUDA major versions, which PyTorch refuses to build with, those two."""
    if not torch.version.cuda:
        return ""
    said = subprocess.run([os.path.join(CUDA, "bin", "nvcc"), "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.\d+", said)
    if release is None or release[1] == torch.version.cuda.partition(".")[0]:
        return ""
    return f"nvcc is of CUDA {release[1]}, PyTorch {torch.__version__} of CUDA {torch.version.cuda}"


def files(*patterns: str) -> list[str]:
    """Paths relative to the project, as setuptools wants them, in a fixed order."""
    found = [path for pattern in patterns for path in glob.glob(os.path.join(ROOT, pattern), recursive=True)]
    return sorted(os.path.relpath(path, ROOT) for path in found)


def cpu_levels() -> dict[str, list[str]]:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return CPU_LEVELS if x86 else {"default": CPU_LEVELS["default"]}


def binding_module() -> Extension:
    """``xsep._C``: a Python module that knows nothing of torch."""
    try:
        import pybind11

        headers = pybind11.get_include()
    except ImportError:
        headers = include_paths()[0]  # PyTorch brings a copy
    return Extension(
        "xsep._C",
        files("csrc/bindings*.cpp"),
        include_dirs=[headers],
        extra_compile_args=["-O2", "-g0", *HIDDEN, *WARNINGS, f'-DXSEP_CPU_LEVELS="{",".join(cpu_levels())}"'],
        language="c++",
    )


def torch_options() -> list[str]:
    """What whatever is compiled against PyTorch's headers needs."""
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    return [*(f"-isystem{path}" for path in include_paths()), *HIDDEN, *WARNINGS, abi]


def repeated_calls() -> Extension:
    """``xsep._repeated``: a Python module that makes calls without Python's checks."""
    return Extension(
        "xsep._repeated",
        files("csrc/eager/*.cpp"),
        library_dirs=library_paths(),
        libraries=["c10", "torch_cpu", "torch", "torch_python"],
        extra_compile_args=["-O2", "-g0", *torch_options()],
        language="c++",
    )


def cpu_library(level: str, flags: list[str]) -> Extension:
    """``xsep/_cpu_<level>.so``: the CPU operators compiled for one instruction set."""
    return Extension(
        f"xsep._cpu_{level}",
        files("csrc/cpu/*.cpp"),
        library_dirs=library_paths(),
        libraries=["c10", "torch_cpu", "torch"],
        extra_compile_args=[*torch_options(), *CPU_FLAGS, *flags],
        extra_link_args=["-fopenmp"],
        language="c++",
    )


def cuda_library() -> list[Extension]:
    """``xsep/_C_cuda.so`` on PyTorch's stable ABI, or nothing where it is not to be built."""
    wanted = os.environ.get("XSEP_BUILD_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        sys.exit(f"XSEP_BUILD_CUDA must be 0, 1 or auto, but is {wanted!r}.")
    sources = files("csrc/cuda/**/*.cu")
    if wanted == "1" and not CUDA:
        sys.exit("XSEP_BUILD_CUDA=1, but no nvcc was found: install the CUDA toolkit, or set CUDA_HOME to where it is.")
    if wanted == "0" or not CUDA or not sources:
        return []
    if wanted == "auto" and other_cuda():
        print(f"xsep: {other_cuda()}: the CUDA kernels are left out; CUDA_HOME may name another toolkit")
        return []
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHITECTURES)
    includes = [word for path in include_paths() for word in ("-isystem", path)]
    stable = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
    return [
        Extension(
            "xsep._C_cuda",
            sources,
            library_dirs=[*library_paths(), os.path.join(CUDA, "lib64")],
            extra_compile_args={"cxx": stable, "nvcc": ["-O3", "-std=c++17", *includes, *stable]},
            extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-lcudart_static", "-lrt", "-ldl", "-lpthread"],
            language="c++",
        )
    ]


def remove_stale_objects(folder: str, headers: list[str]) -> None:
    """Objects older than a header, where ninja does not know which headers they were made of."""
    newest = max((os.path.getmtime(os.path.join(ROOT, header)) for header in headers), default=0.0)
    for path in pathlib.Path(folder).rglob("*.o"):
        if path.stat().st_mtime < newest:
            path.unlink()


class Build(BuildExtension):
    """One folder of objects a library, since several share sources; no Python tag on what is no Python module."""

    def build_extensions(self) -> None:
        # Two libraries at a time, each with half of the compilers: what one's longest file leaves idle the other takes.
        limit = os.environ.get("MAX_JOBS", "")
        jobs = int(limit) if limit.isdigit() else 2 + (os.cpu_count() or 1)
        if self.parallel or not self.use_ninja or jobs < 2:
            return super().build_extensions()
        self.parallel = 2
        with mock.patch.dict(os.environ, MAX_JOBS=str(jobs // 2)):
            super().build_extensions()

    def run(self) -> None:
        super().run()
        if not self.inplace:
            # Where csrc/ will not lie beside the package, what was built of it can still be told.
            spec = importlib.util.spec_from_file_location("digest", os.path.join(ROOT, "xsep", "tuning", "digest.py"))
            digest = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(digest)
            with open(os.path.join(self.build_lib, "xsep", digest.BUILT.name), "w") as stream:
                folders = digest.of_csrc(pathlib.Path(ROOT, "csrc"))
                stream.writelines(f"{name} {value}\n" for name, value in folders.items())

    def build_extension(self, ext: Extension) -> None:
        build = copy.copy(self)  # as two are built at a time
        # Not setuptools' own choice: an editable install puts objects into a folder that is then thrown away.
        build.build_temp = os.path.join(
            ROOT, "build", f"{sys.implementation.cache_tag}-torch{torch.__version__}", ext.name
        )
        if ext.name == "xsep._C_cuda" and torch.version.cuda is None:
            # PyTorch has nvcc write down what it reads only where it has a CUDA of its own.
            remove_stale_objects(build.build_temp, files("csrc/common/*.h", "csrc/cuda/**/*.h", "csrc/cuda/**/*.cuh"))
        super(Build, build).build_extension(ext)

    def get_ext_filename(self, fullname: str) -> str:
        name = fullname.rpartition(".")[2]
        if name.startswith("_cpu_") or name == "_C_cuda":
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)


cuda = cuda_library()
setup(
    ext_modules=[
        *cuda,  # what takes longest comes first
        *(cpu_library(level, flags) for level, flags in reversed(cpu_levels().items()) if BUILD_CPU),
        *([repeated_calls()] if BUILD_CPU or cuda else []),  # by operators, of the one or the other
        binding_module(),
    ],
    cmdclass={"build_ext": Build},
)
