"""Builds the CUDA sources as C++ for the emulator and calls them on CPU tensors."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import math
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Optional

import torch
from torch import Tensor
from torch.utils import cpp_extension

from . import ptx

ROOT = Path(__file__).resolve().parents[2]
CUDA_SOURCES = ROOT / "csrc" / "cuda"
EMULATOR = Path(__file__).resolve().parent / "emulator"
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
#: Set by test_sanitizers.py for a process that has the sanitizers' runtime preloaded.
SANITIZED = os.environ.get("XSEP_EMULATOR_SANITIZED") == "1"
#: The architecture for which nvcc compiles kernels, whose PTX then runs in the place of the C++; "" for none. And of
#: which files: all that the expression is found in. And whether the instructions are counted, for counted.py.
PTX, PTX_FILES = os.environ.get("XSEP_EMULATED_PTX", ""), os.environ.get("XSEP_EMULATED_PTX_FILES", "")
PTX_COUNTED = os.environ.get("XSEP_EMULATED_PTX_COUNTED") == "1"
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g")

#: Translation units that stand on PyTorch, and have its headers and its registry.
GLUE = {
    *(p.name for p in CUDA_SOURCES.glob("torch_library*.cu")),
    "guarding_allocator.cpp",
}
#: Kernels that test_sanitizers.py chooses no test of, which it checks. Its process links them as every other one has
#: them: to compile them once more takes a minute.
NOT_SANITIZED = {
    *(f"depthwise/{name}.cu" for name in ("fprop_fp32", "fprop_fp16", "bprop_fp32")),
    *(f"separable/fprop_{kind}.cu" for kind in ("fp32", "tf32", "fp16")),
    *(f"chain/fused_backward_{kind}.cu" for kind in ("fp16", "bf16")),
}
#: Translation units of each test library beside the emulator's own.
LIBRARIES: dict[str, list[str]] = {
    "emulator": [],
    "depthwise": [
        *(f"depthwise/{way}{suffix}.cu" for way in ("fprop", "bprop") for suffix in ("", "_fp32", "_fp16", "_bf16")),
        "entry_depthwise.cpp",
    ],
    "separable": [
        *(f"separable/fprop{suffix}.cu" for suffix in ("", "_fp32", "_tf32", "_fp16", "_bf16")),
        "entry_separable.cpp",
    ],
    "ops": [*(str(p.relative_to(CUDA_SOURCES)) for p in sorted(CUDA_SOURCES.rglob("*.cu"))), "guarding_allocator.cpp"],
}


def cuda_include() -> Optional[Path]:
    """Where the CUDA headers are, or None: the emulator takes the 16-bit types from them."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", str(Path(nvcc).resolve().parents[1]) if nvcc else None]
    for home in homes:
        if home and (Path(home) / "include" / "cuda_bf16.h").is_file():
            return Path(home) / "include"
    return None


def missing_tools() -> Optional[str]:
    """Why the emulator cannot be built here, or None."""
    if shutil.which("g++") is None:
        return "the emulator needs g++"
    if cuda_include() is None:
        return "the emulator needs the CUDA headers (CUDA_HOME)"
    return None


def cache_folder() -> Path:
    """Where what was compiled is kept for whoever needs it next."""
    folder = Path(tempfile.gettempdir()) / f"xsep-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def build(name: str, sources: Path = CUDA_SOURCES, namespace: str = "xsep_emulated") -> Path:
    """The shared library of one entry of LIBRARIES, built once for each content of the sources.

    ``sources`` may be a changed copy of csrc/cuda, with csrc/common beside it; ``namespace`` is the operators'.
    """
    cache = cache_folder()
    units = [Unit(unit, sources, namespace) for unit in (*LIBRARIES[name], "emulator.cpp", "runtime.cpp")]
    if PTX:
        units += [TranslatedUnit(unit.name, sources, namespace) for unit in units if unit.is_translated]
    digest = hashlib.sha256(" ".join(unit.digest for unit in units).encode()).hexdigest()[:20]
    target = cache / f"{name}-{digest}.so"
    with open(cache / "lock", "w") as lock, tempfile.TemporaryDirectory(dir=cache) as scratch:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process would compile the same files beside this one
        if target.exists():
            return target
        units.sort(key=lambda unit: not unit.is_sanitized)  # the linker takes the first of equal inline functions
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda unit: str(unit.compiled(cache, Path(scratch))), units))
        glue = LINKED if any(unit.is_glue for unit in units) else ()
        library = str(Path(scratch) / "library.so")
        run_command(
            ["g++", "-shared", "-Wl,-Bsymbolic", *(SANITIZE if SANITIZED else ()), *objects, *glue, "-o", library]
        )
        os.replace(library, target)
    return target


#: Nothing it needs is missing, and the stand-ins come before what a PyTorch with CUDA has of that name.
LINKED = (f"-L{Path(torch.__file__).parent / 'lib'}", "-Wl,--no-undefined", "-ltorch", "-ltorch_cpu", "-lc10")


class Unit:
    """One file to compile; its object is kept for whoever links it, under a name made of all that goes into it."""

    def __init__(self, name: str, sources: Path, namespace: str) -> None:
        self.name = name
        self.folders = (EMULATOR, sources)
        self.file = (sources if name.endswith(".cu") else EMULATOR) / name
        self.is_glue = name in GLUE
        self.is_translated = name.endswith(".cu") and not self.is_glue and re.search(PTX_FILES, name) is not None
        self.is_sanitized = SANITIZED and name not in NOT_SANITIZED
        # The sanitizers' own code takes the optimizer longer than it saves. Nothing is shared by name with another
        # library of the process: what this one knows of its cards is its own.
        self.flags = ["-std=c++20", *(("-O0", *SANITIZE) if self.is_sanitized else ("-O1",)), "-fPIC",
                      "-fno-gnu-unique", "-DXSEP_EMULATOR", "-Wall", "-Wno-unknown-pragmas", "-Werror"]  # fmt: skip
        if self.is_glue:
            self.flags += [f"-DXSEP_NAMESPACE={namespace}", "-DUSE_CUDA", "-Wno-attributes"]
            if name.endswith(".cu"):
                self.flags.append("-DTORCH_TARGET_VERSION=0x020a000000000000")
        digest = hashlib.sha256(" ".join([*self.flags, torch.__version__ if self.is_glue else ""]).encode())
        for file in self.included():
            digest.update(file.name.encode() + file.read_bytes())
        self.digest = digest.hexdigest()[:20]

    def included(self) -> list[Path]:
        """The file and all of this project's that it includes, in a fixed order."""
        found, wanted = [], [self.file]
        while wanted:
            file = wanted.pop().resolve()
            if file in found:
                continue
            found.append(file)
            for name in re.findall(r'^#include "(.*)"', file.read_text(), re.MULTILINE):
                wanted.append(next(p for p in (folder / name for folder in (file.parent, *self.folders)) if p.exists()))
        return found

    def compiled(self, cache: Path, scratch: Path) -> Path:
        target = cache / f"{self.file.stem}-{self.digest}.o"
        if not target.exists():
            out = scratch / target.name
            includes = [f"-I{folder}" for folder in self.folders]
            systems = [str(cuda_include()), *(cpp_extension.include_paths() if self.is_glue else ())]
            includes += [word for path in systems for word in ("-isystem", path)]
            run_command(["g++", "-x", "c++", *self.flags, *includes, "-c", str(self.file), "-o", str(out)])
            os.replace(out, target)
        return target


class TranslatedUnit(Unit):
    """What nvcc makes of one file, as PTX that is turned into C++."""

    def __init__(self, name: str, sources: Path, namespace: str) -> None:
        super().__init__(name, sources, namespace)
        self.is_sanitized = False
        digest = hashlib.sha256(f"{self.digest} {PTX} {PTX_COUNTED}".encode())
        headers = (EMULATOR / name for name in ("ptx_machine.h", "host_ptx.h", "emulator.h"))
        for file in (Path(__file__), Path(ptx.__file__), *headers):
            digest.update(file.read_bytes())
        self.digest = digest.hexdigest()[:20]

    def compiled(self, cache: Path, scratch: Path) -> Path:
        target = cache / f"{self.file.stem}-ptx-{self.digest}.o"
        if not target.exists():
            module, source, out = (scratch / f"{target.stem}.{suffix}" for suffix in ("ptx", "cpp", "o"))
            run_command([nvcc(), "-std=c++17", "-O3", f"-arch=sm_{PTX}", "-ptx", str(self.file), "-o", str(module)])
            compile_translation(module.read_text(), source, out)
            os.replace(out, target)
        return target


def nvcc() -> str:
    include = cuda_include()
    return shutil.which("nvcc") or ("nvcc" if include is None else str(include.parent / "bin" / "nvcc"))


def compile_translation(module: str, source: Path, out: Path) -> None:
    """A module of PTX to an object; source is written on the way."""
    source.write_text(
        "\n".join(['#include "ptx_machine.h"', *(entry.source for entry in ptx.entries(module, PTX_COUNTED))])
    )
    # Each instruction stands for itself: no two of them may become one that rounds once.
    flags = ["-std=c++20", "-O1", "-march=native", "-ffp-contract=off", "-fPIC", "-DXSEP_EMULATOR", f"-I{EMULATOR}"]
    run_command(["g++", *flags, "-isystem", str(cuda_include()), "-c", str(source), "-o", str(out)])


def run_command(command: list[str]) -> None:
    # Not with the sanitizers' runtime in the compiler itself, which takes several times as long with it.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def _ints(names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int) for name in names.split()]


class ConvShape(ctypes.Structure):
    _fields_ = _ints("n h w c_in p q c_mid r s stride_h stride_w pad_top pad_left dilation_h dilation_w")


class Device(ctypes.Structure):
    _fields_ = _ints("multiprocessors shared_bytes_per_cta l2_bytes")


class DepthwisePlan(ctypes.Structure):
    _fields_ = [
        ("sliding_window", ctypes.c_bool),
        *_ints("vec vectors slices strip_rows strips_down strips_across tiles_down tiles_across workers dgrad_workers"),
        *_ints("shared_bytes"),
    ]


class ChannelVector(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("is_float32", ctypes.c_int)]


class ChannelAffine(ctypes.Structure):
    _fields_ = [("scale", ChannelVector), ("shift", ChannelVector), ("activation", ctypes.c_int),
                ("alpha", ctypes.c_float)]  # fmt: skip


class Affine(NamedTuple):
    """act(scale * v + shift) per channel."""

    scale: Optional[Tensor] = None
    shift: Optional[Tensor] = None
    activation: int = 0
    alpha: float = 0.0

    def raw(self) -> ChannelAffine:
        return ChannelAffine(vector(self.scale), vector(self.shift), self.activation, self.alpha)


class Epilogue(ctypes.Structure):
    """GradientEpilogue: of the training chain, empty elsewhere."""

    _fields_ = [
        ("shortcut", ctypes.c_void_p), *_ints("shortcut_step before_mask sums"), ("operands", ctypes.c_void_p * 2),
        ("centres", ctypes.c_void_p),
    ]  # fmt: skip


class DepthwiseFprop(ctypes.Structure):
    _fields_ = [
        ("shape", ConvShape), ("plan", DepthwisePlan), ("type", ctypes.c_int), ("x", ctypes.c_void_p),
        ("residual", ctypes.c_void_p), ("w_dw", ctypes.c_void_p), ("x_pre", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("y", "statistics", "counts")), ("prologue", ChannelAffine),
        ("epilogue", ChannelAffine),
    ]  # fmt: skip


class DepthwiseBprop(ctypes.Structure):
    _fields_ = [
        ("shape", ConvShape), ("plan", DepthwisePlan), ("type", ctypes.c_int), ("dz", ctypes.c_void_p),
        ("x", ctypes.c_void_p), ("w_dw", ctypes.c_void_p), ("dx", ctypes.c_void_p), ("dw_dw", ctypes.c_void_p),
        ("dscale", ctypes.c_void_p), ("dshift", ctypes.c_void_p), ("centre", ctypes.c_void_p),
        ("partials", ctypes.c_void_p), ("prologue", ChannelAffine), ("epilogue", Epilogue),
    ]  # fmt: skip


class SumPartials(ctypes.Structure):
    _fields_ = [
        ("shape", ConvShape), *_ints("type rows"), ("partials", ctypes.c_void_p), ("dw_dw", ctypes.c_void_p),
        ("vectors", ctypes.c_void_p * 3),
    ]  # fmt: skip


class Divisor(ctypes.Structure):
    _fields_ = [*_ints("divisor shift"), ("multiplier", ctypes.c_uint32)]


class SeparablePlan(ctypes.Structure):
    _fields_ = [
        ("fused", ctypes.c_bool), ("keeps_w_pw", ctypes.c_bool),
        *_ints("chunk_bytes chunk_log2 pixel_bytes row_warps row_warps_log2 channel_warps warps pixels"),
        *_ints("tile_rows tile_columns strips group_rows"),
        *_ints("tiles_of_group tiles_across tiles workers halo_rows halo_columns halo_pitch halos maps"),
        *_ints("z_rows operand_rows operand_buffers table_channels tap_words chunks"),
        ("divisors", Divisor * 7),
        *_ints("at_halo at_operand at_z at_taps at_vectors at_source at_slot at_block at_tile at_place at_z_place"),
        *_ints("at_affine shared_bytes"), ("clocks", ctypes.c_double),
    ]  # fmt: skip


class SeparableFprop(ctypes.Structure):
    _fields_ = [
        ("shape", ConvShape), ("plan", SeparablePlan), ("type", ctypes.c_int), ("c_out", ctypes.c_int),
        ("allow_tf32", ctypes.c_int), *((name, ctypes.c_void_p) for name in
        ("x", "addend", "x_pre", "w_dw", "w_pw", "residual", "y", "statistics", "counts")), ("bias", ChannelVector),
        ("prologue", ChannelAffine), ("middle", ChannelAffine), ("epilogue", ChannelAffine),
        *_ints("has_prologue has_middle has_epilogue"),
    ]  # fmt: skip


def vector(t: Optional[Tensor]) -> ChannelVector:
    return ChannelVector(None, 0) if t is None else ChannelVector(t.data_ptr(), int(t.dtype == torch.float32))


def pointer(t: Optional[Tensor]) -> Optional[int]:
    return None if t is None else t.data_ptr()


MARGIN = 64


class Guarded:
    """A tensor inside a buffer with margins: of NaN about an input, where a read past its ends spoils the result.

    About an output they hold a number, so that NaN read past the ends of an input and written past those of an output
    is found too; the output itself starts as NaN.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0, margin: float = 77.0) -> None:
        count = math.prod(shape)
        self.start, self.stop, self.margin = MARGIN + offset, MARGIN + offset + count, margin
        self.buffer = torch.full((count + 2 * MARGIN + offset,), margin, dtype=dtype)
        self.tensor = self.buffer[self.start : self.stop].view(shape)
        if dtype.is_floating_point:
            self.tensor.fill_(math.nan)

    @classmethod
    def of(cls, t: Tensor, offset: int = 0) -> Guarded:
        guarded = cls(tuple(t.shape), t.dtype, offset, math.nan if t.is_floating_point() else 200)
        guarded.tensor.copy_(t)
        return guarded

    def check(self) -> Tensor:
        outside = torch.cat([self.buffer[: self.start], self.buffer[self.stop :]])
        untouched = outside.isnan() if math.isnan(self.margin) else outside == self.margin
        assert bool(untouched.all()), "a kernel wrote past the ends of its output"
        return self.tensor


def nhwc(t: Tensor, offset: int = 0) -> Guarded:
    return Guarded.of(t.permute(0, 2, 3, 1), offset)


def check_statistics(y: Tensor, statistics: Tensor, counts: Tensor) -> None:
    """Merged in float64, [T, 3, C] are the statistics of y, NCHW, as it is stored; every pixel counted once."""
    rows = y.permute(0, 2, 3, 1).reshape(-1, y.shape[1]).double()
    mean_of_tile, s, q = statistics.double().unbind(1)
    n = counts.double()[:, None]
    assert float(n.sum()) == rows.shape[0]
    tile_mean = mean_of_tile + s / n
    mean = (n * tile_mean).sum(0) / n.sum()
    m2 = (q - s.square() / n + n * (tile_mean - mean).square()).sum(0)
    torch.testing.assert_close(mean, rows.mean(0), rtol=0, atol=1e-6 * float(rows.abs().max()))
    torch.testing.assert_close(m2, (rows - rows.mean(0)).square().sum(0), rtol=2e-6, atol=1e-30)


def load(path: Path) -> ctypes.CDLL:
    """The library, each kernel of which runs as it was translated if it was."""
    library = ctypes.CDLL(str(path))
    if PTX:
        listed = subprocess.run(["nm", str(path)], capture_output=True, text=True, check=True).stdout.split("\n")
        places = {words[2]: int(words[0], 16) for words in map(str.split, listed) if len(words) == 3}
        base = (ctypes.cast(library.emulate_seed, ctypes.c_void_p).value or 0) - places["emulate_seed"]
        for name, place in places.items():
            if name.startswith(ptx.PREFIX):
                kernel = places[name.removeprefix(ptx.PREFIX)]
                library.emulate_translation(ctypes.c_void_p(base + kernel), ctypes.c_void_p(base + place))
        LOADED.append(library)
    return library


#: Those whose kernels run as they were translated.
LOADED: list[ctypes.CDLL] = []


def translated_launches() -> int:
    return sum(library.emulate_translated_launches() for library in LOADED)


class Launch(NamedTuple):
    kernel: str
    x: int  # CTAs
    y: int


def launches(library: ctypes.CDLL) -> list[Launch]:
    """Those since this was last asked of the library."""
    library.emulate_launches.restype = ctypes.c_char_p
    lines = (line.split() for line in library.emulate_launches().decode().splitlines())
    return [Launch(kernel, int(x), int(y)) for kernel, x, y in lines]


class Library:
    """One built library; raises what the emulator reports."""

    def __init__(self, path: Path, seed: int = 0) -> None:
        self.lib = load(path)
        self.lib.emulate_seed(seed)

    def call(self, function: str, params: ctypes.Structure) -> None:
        sizeof = getattr(self.lib, function.replace("emulate_", "emulate_sizeof_"))
        sizeof.restype = ctypes.c_size_t
        assert sizeof() == ctypes.sizeof(params), f"{type(params).__name__} differs from the C++ struct"
        message = ctypes.create_string_buffer(1024)
        if getattr(self.lib, function)(ctypes.byref(params), message, ctypes.c_size_t(1024)):
            raise RuntimeError(message.value.decode())
