"""Builds the CUDA sources as C++ for the emulator and calls them on CPU tensors."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Optional

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
CUDA_SOURCES = ROOT / "csrc" / "cuda"
EMULATOR = Path(__file__).resolve().parent / "emulator"
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
#: Set by test_sanitizers.py for a process that has the sanitizers' runtime preloaded.
SANITIZED = os.environ.get("XSEP_EMULATOR_SANITIZED") == "1"
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g")

#: Translation units of each test library: kernels, and what Python calls.
LIBRARIES = {
    "depthwise": [
        *(f"depthwise/{way}{suffix}.cu" for way in ("fprop", "bprop") for suffix in ("", "_fp32", "_fp16", "_bf16")),
        "entry_depthwise.cpp",
    ],
    "separable": [
        *(f"separable/fprop{suffix}.cu" for suffix in ("", "_fp32", "_tf32", "_fp16", "_bf16")),
        "entry_separable.cpp",
    ],
    "chain": [
        *(f"chain/{p.name}" for p in sorted((CUDA_SOURCES / "chain").glob("*.cu")) if "fused" not in p.name),
        "entry_chain.cpp",
    ],
    "fused_backward": [
        *(f"chain/fused_backward{suffix}.cu" for suffix in ("", "_fp16", "_bf16")),
        "entry_fused_backward.cpp",
    ],
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


def build(name: str, sources: Path = CUDA_SOURCES) -> Path:
    """The shared library of one entry of LIBRARIES, built once for each content of the sources.

    ``sources`` may be a changed copy of csrc/cuda, with csrc/common beside it.
    """
    chosen, sanitize = LIBRARIES[name], SANITIZED
    # The sanitizers' own code takes the optimizer longer than it saves.
    plain = ["-std=c++20", "-O0" if sanitize else "-O1", "-fPIC", "-DXSEP_EMULATOR", "-Wall", "-Wno-unknown-pragmas",
             "-Werror", *(SANITIZE if sanitize else ())]  # fmt: skip
    flags = [*plain, f"-I{EMULATOR}", f"-I{sources}", "-isystem", str(cuda_include())]
    digest = hashlib.sha256(" ".join([*plain, *chosen]).encode())
    for folder in (sources, sources.parent / "common", EMULATOR):
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    cache = Path(tempfile.gettempdir()) / f"xsep-emulator-{os.getuid()}"
    target = cache / f"{name}-{digest.hexdigest()[:20]}.so"
    if target.exists():
        return target
    cache.mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:

        def compile_unit(unit: str) -> str:
            source = (sources if unit.endswith(".cu") else EMULATOR) / unit
            out = str(Path(scratch) / (unit.replace("/", "_") + ".o"))
            _run(["g++", "-x", "c++", *flags, "-c", str(source), "-o", out])
            return out

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_unit, [*chosen, "emulator.cpp"]))
        library = str(Path(scratch) / "library.so")
        _run(["g++", "-shared", *(SANITIZE if sanitize else ()), *objects, "-o", library])
        os.replace(library, target)
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
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
        *_ints("vec vectors slices strip_rows strips_down strips_across tiles_down tiles_across workers shared_bytes"),
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


class SeparablePlan(ctypes.Structure):
    _fields_ = [
        ("fused", ctypes.c_bool),
        *_ints("chunk_bytes channel_warps tile_rows tile_columns group_rows tiles_of_group tiles_across tiles"),
        *_ints("halo_rows halo_columns halo_pitch table_channels chunks"),
        *((name, ctypes.c_int * 2) for name in ("halo", "w_pw", "z")),
        *_ints("taps halo_source slot affine sums shared_bytes"),
    ]


class SeparableFprop(ctypes.Structure):
    _fields_ = [
        ("shape", ConvShape), ("plan", SeparablePlan), ("type", ctypes.c_int), ("c_out", ctypes.c_int),
        ("allow_tf32", ctypes.c_int), *((name, ctypes.c_void_p) for name in
        ("x", "addend", "x_pre", "w_dw", "w_pw", "residual", "y", "statistics", "counts")), ("bias", ChannelVector),
        ("prologue", ChannelAffine), ("middle", ChannelAffine), ("epilogue", ChannelAffine),
        *_ints("has_prologue has_middle"),
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


class Library:
    """One built library; raises what the emulator reports."""

    def __init__(self, path: Path, seed: int = 0) -> None:
        self.lib = ctypes.CDLL(str(path))
        self.lib.emulate_seed(seed)

    def call(self, function: str, params: ctypes.Structure) -> None:
        sizeof = getattr(self.lib, function.replace("emulate_", "emulate_sizeof_"))
        sizeof.restype = ctypes.c_size_t
        assert sizeof() == ctypes.sizeof(params), f"{type(params).__name__} differs from the C++ struct"
        message = ctypes.create_string_buffer(1024)
        if getattr(self.lib, function)(ctypes.byref(params), message, ctypes.c_size_t(1024)):
            raise RuntimeError(message.value.decode())
