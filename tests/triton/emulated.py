"""Runs launches as Triton compiled them for a card that is not here: their PTX, turned into C++, on the emulator.

Not for a process in which TRITON_INTERPRET is set. CPU tensors stand for those of the card.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.cuda import emulated, ptx
from tests.triton.ahead_of_time import DEVICES, source_of
from xsep.backends import chain_triton, triton_chain_layers
from xsep.backends import triton as backend
from xsep.backends.triton_launch import Launch

#: The architecture that kernels are compiled for.
ARCHITECTURE = int(os.environ.get("XSEP_EMULATED_TRITON", "90"))
TYPES = {"fp32": ctypes.c_float, "i32": ctypes.c_int32, "i64": ctypes.c_int64}


@cache
def runtime() -> ctypes.CDLL:
    """The emulator itself; its functions are there for the kernels that are loaded after it."""
    return ctypes.CDLL(str(emulated.build("emulator")), mode=ctypes.RTLD_GLOBAL)


class Kernel:
    """A launch compiled; for all launches that Triton would compile the same."""

    def __init__(self, made: Launch) -> None:
        import triton
        from triton.backends.compiler import GPUTarget

        source = source_of(made)
        self.types = {
            name: TYPES.get(kind, ctypes.c_void_p) for name, kind in source.signature.items() if kind != "constexpr"
        }
        compiled = triton.compile(source, target=GPUTarget("cuda", ARCHITECTURE, 32), options=made.options)
        self.ptx, self.shared, self.threads = compiled.asm["ptx"], compiled.metadata.shared, 32 * made.warps
        (entry,) = ptx.entries(self.ptx, emulated.PTX_COUNTED)
        runtime()
        path = _built(self.ptx)
        self.function = getattr(ctypes.CDLL(str(path)), ptx.PREFIX + entry.key)

    def __call__(self, made: Launch) -> None:
        values: list[Any] = []
        for name, kind in self.types.items():
            value = made.args[name]
            values.append(kind(value.data_ptr() if isinstance(value, Tensor) else value))
        # Two more pointers, to scratch memory that no kernel of ours wants.
        values += [ctypes.c_void_p(), ctypes.c_void_p()]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        grid = (ctypes.c_uint * 3)(*made.grid, *(1,) * (3 - len(made.grid)))
        message = ctypes.create_string_buffer(1024)
        if runtime().emulate_translated_grid(
            self.function, grid, self.threads, ctypes.c_size_t(self.shared), pointers, message, ctypes.c_size_t(1024)
        ):
            raise RuntimeError(f"{made.kernel}: {message.value.decode()}")


def _built(module: str) -> Path:
    """The translation as a library, kept for whoever needs it next."""
    digest = hashlib.sha256(f"{module} {emulated.PTX_COUNTED}".encode())
    for file in (Path(__file__), Path(emulated.__file__), Path(ptx.__file__), *sorted(emulated.EMULATOR.glob("*.h"))):
        digest.update(file.read_bytes())
    target = emulated.cache_folder() / f"triton-{digest.hexdigest()[:20]}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            source, out, library = (Path(scratch) / name for name in ("kernel.cpp", "kernel.o", "kernel.so"))
            emulated.compile_translation(module, source, out)
            emulated.run_command(["g++", "-shared", str(out), "-o", str(library)])
            os.replace(library, target)
    return target


KERNELS: dict[Any, Kernel] = {}
#: Launches of them in this process.
launched = 0


def run(made: Launch, device: torch.device) -> None:
    """In the place of ``Launch.run``."""
    global launched
    signature = tuple(
        (name, str(v.dtype), v.data_ptr() % 16) if isinstance(v, Tensor) else (name, type(v))
        for name, v in made.args.items()
    )
    key = (made.kernel, signature, tuple(made.constants.items()), made.warps, made.stages)
    if key not in KERNELS:
        KERNELS[key] = Kernel(made)
    KERNELS[key](made)
    launched += 1


def install() -> None:
    """From here on the triton backend takes CPU tensors, plans for the card and runs what is compiled for it."""
    assert not backend.interpreting(), "Triton would interpret the kernels"
    card = DEVICES[f"sm_{ARCHITECTURE}"]
    backend.interpreting = lambda: True
    for module in (backend, triton_chain_layers, chain_triton):
        module.device_of = lambda kind, index: card  # type: ignore[attr-defined]
    Launch.run = run  # type: ignore[method-assign,assignment]
    # The tests compare with float32 sums.
    torch.backends.cudnn.allow_tf32 = False
