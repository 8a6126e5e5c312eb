"""The CPU kernels under g++'s sanitizers.

The torch-free kernels, in a program of their own (kernels_main.cpp): a thread sanitizer through Python would report
OpenMP's own. The whole library, with torch and through Python, takes minutes to compile: each night (XSEP_NIGHTLY=1).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

from tests.conftest import NIGHTLY

ROOT = Path(__file__).resolve().parents[2]
MAIN = Path(__file__).resolve().parent / "kernels_main.cpp"
#: The sanitizers' own code takes the optimizer longer than it saves.
FLAGS = ["-std=c++20", "-O0", "-g1", "-Wno-psabi", "-fno-sanitize-recover=all"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
#: Not alignment and null: a check at each of a kernel's loads takes the compiler many times as long.
UNDEFINED = "address,bounds,shift,signed-integer-overflow,integer-divide-by-zero,bool,enum,return,unreachable"

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def has_avx2() -> bool:
    return Path("/proc/cpuinfo").exists() and " avx2 " in Path("/proc/cpuinfo").read_text()


def runtime(name: str) -> str:
    """Where g++ keeps a library, or an empty string."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip() if os.path.isabs(found.stdout.strip()) else ""


def built(name: str, sources: list[Path], flags: list[str], link: list[str], compiler: str = "g++") -> Path:
    """A program or library, compiled once for each content of the sources."""
    digest = hashlib.sha256(" ".join([compiler, *flags, *link]).encode())
    headers = [p for folder in ("cpu", "common") for p in sorted((ROOT / "csrc" / folder).iterdir())]
    for file in [*headers, *sources]:
        digest.update(file.name.encode() + file.read_bytes())
    cache = Path(tempfile.gettempdir()) / f"xsep-sanitizers-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    target = cache / f"{digest.hexdigest()[:20]}-{name}"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=cache) as scratch:

        def compile_unit(source: Path) -> str:
            out = str(Path(scratch) / f"{source.stem}.o")
            run([compiler, *flags, f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", out])
            return out

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_unit, sources))
        out = str(Path(scratch) / name)
        run([compiler, *flags, *objects, *link, "-o", out])
        os.replace(out, target)
    return target


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"


each_sanitizer = pytest.mark.parametrize(
    "sanitizer", ["thread", UNDEFINED if NIGHTLY else "address"], ids=["thread", "address"]
)


def said_by(name: str, main: Path, sanitizer: str) -> str:
    """What a program prints that runs kernels under a sanitizer; it must have found nothing."""
    if not runtime("libtsan.so" if sanitizer == "thread" else "libasan.so"):
        pytest.skip("g++ has no sanitizer runtime here")
    flags = [*FLAGS, f"-fsanitize={sanitizer}", *(AVX2 if has_avx2() else [])]
    program = built(name, [main, ROOT / "csrc" / "cpu" / "activate.cpp"], flags, ["-lpthread"])
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr[-6000:]
    return done.stdout


@each_sanitizer
def test_kernels_without_torch(sanitizer: str) -> None:
    """Buffers of exactly the right size; several threads, whose results are those of one."""
    assert said_by("kernels", MAIN, sanitizer).count("forward right, backward right") == 11


@each_sanitizer
def test_the_chains_passes_without_torch(sanitizer: str) -> None:
    assert said_by("passes", MAIN.with_name("chain_main.cpp"), sanitizer) == "passes right\n"


DRIVER = """
import sys
from pathlib import Path
import torch
from xsep import extension, testing
from xsep.testing import Case, VECTORS

extension.HERE = Path(sys.argv[1])
loaded = extension.load_cpu()
assert loaded.reason is None and str(loaded.path).startswith(sys.argv[1]), loaded
torch.set_num_threads(2)
count = 0
for case in testing.generate(40, seed=9):
    testing.check(case, "cpu")
    count += 1
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for layout in testing.LAYOUTS:
        testing.check(Case(c_in=33, c_out=67, h=8, w=9, vectors=VECTORS, dtype=dtype, layout=layout, residual=True,
                           bias=True, activations=("relu", "silu", "relu")), "cpu")
        count += 1
    # Plane by plane, with a multiplier too; outputs a dilation apart; pixels moved apart.
    for fields in (dict(c_in=3, h=41, w=37, stride=(2, 2), c_out=19, layout="contiguous", residual=True, bias=True),
                   dict(c_in=20, multiplier=3, c_out=13, h=13, w=29, layout="contiguous"),
                   dict(c_in=70, c_out=13, h=9, w=41, dilation=(1, 3), padding=(2, 3, 1, 1)),
                   dict(c_in=1024, c_out=3, h=6, w=9, layout="channels_last", activations=(None, None, None))):
        testing.check(Case(dtype=dtype, **fields), "cpu")
        count += 1
print(count, "cases")
"""


@pytest.mark.skipif(not NIGHTLY, reason="minutes of compiling: each night")
def test_the_library_through_python() -> None:
    """Address and undefined-behaviour sanitizers: the kernels and the code between them and torch."""
    libraries = [runtime("libasan.so"), runtime("libubsan.so")]
    if not all(libraries):
        pytest.skip("g++ has no sanitizer runtime here")
    level = "avx2" if has_avx2() else "default"
    includes = [word for path in include_paths() for word in ("-isystem", path)]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    checks = [
        "-fsanitize=address,bounds,shift,signed-integer-overflow,integer-divide-by-zero,bool,enum,return,unreachable"
    ]
    flags = [*FLAGS, *checks, "-fPIC", "-fopenmp", abi, *includes, *(AVX2 if level == "avx2" else [])]
    link = ["-shared", *(f"-L{p}" for p in library_paths()), "-lc10", "-ltorch_cpu", "-ltorch"]
    library = built(f"_cpu_{level}.so", sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), flags, link)
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "XSEP_CPU_ISA": level,
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / f"_cpu_{level}.so").symlink_to(library)
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, folder],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=1800,
        )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "73 cases" in done.stdout and "runtime error" not in done.stderr
