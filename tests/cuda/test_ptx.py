"""Instructions of PTX, one by one, as they are translated: what the PTX ISA says that they do."""

from __future__ import annotations

import ctypes
import re
import struct
import subprocess
from collections.abc import Callable

import pytest

from . import emulated, ptx

pytestmark = pytest.mark.skipif(emulated.missing_tools() is not None, reason=str(emulated.missing_tools()))


def of_float(value: float) -> int:
    """Its bits."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def word(value: float) -> str:
    return f"0f{of_float(value):08X}"


BIG = 2.0**24
#: Statements that leave a word in %r0, and that word as thread ``lane`` of a warp finds it.
CASES: dict[str, tuple[str, Callable[[int], int]]] = {
    "add-wraps": ("add.s32 %r0, 2147483647, %r1;", lambda lane: (2147483647 + lane) & 0xFFFFFFFF),
    "mul-hi-s32": ("mul.hi.s32 %r0, -3, 5;", lambda lane: 0xFFFFFFFF),
    "mul-hi-u32": ("mul.hi.u32 %r0, -3, 5;", lambda lane: 4),
    "mad-wide": ("mad.wide.s32 %rd0, -2, 3, 1; cvt.u32.u64 %r0, %rd0;", lambda lane: (-5) & 0xFFFFFFFF),
    "div-s32": ("div.s32 %r0, -7, 2;", lambda lane: (-3) & 0xFFFFFFFF),
    "rem-s32": ("rem.s32 %r0, -7, 2;", lambda lane: (-1) & 0xFFFFFFFF),
    "shl-clamps": ("shl.b32 %r0, 1, 32;", lambda lane: 0),
    "shr-s32-clamps": ("mov.u32 %r2, -8; shr.s32 %r0, %r2, 40;", lambda lane: 0xFFFFFFFF),
    "shr-u32": ("mov.u32 %r2, -8; shr.u32 %r0, %r2, 28;", lambda lane: 15),
    "cvt-sign": ("cvt.u16.u32 %rs0, 65535; cvt.s32.s16 %r0, %rs0;", lambda lane: 0xFFFFFFFF),
    "unpacks": ("mov.b32 {%rs0, %rs1}, 305419896; mov.b32 %r0, {%rs1, %rs0};", lambda lane: 0x56781234),
    "fma-rounds-once": (
        f"fma.rn.f32 %f0, {word(1 + 2**-23)}, {word(1 - 2**-23)}, {word(-1)}; mov.b32 %r0, %f0;",
        lambda lane: of_float(-(2.0**-46)),
    ),
    "mul-add-rounds-twice": (
        f"mov.f32 %f1, {word(1 - 2**-23)}; mul.f32 %f0, %f1, {word(1 + 2**-23)}; add.f32 %f0, %f0, {word(-1)}; "
        "mov.b32 %r0, %f0;",
        lambda lane: 0,
    ),
    "fma-down": (f"fma.rm.f32 %f0, {word(-1)}, {word(2**-30)}, {word(BIG)}; mov.b32 %r0, %f0;",
                 lambda lane: of_float(BIG - 1)),
    "cvt-sat-nan": ("mov.b32 %f1, 2143289344; cvt.sat.f32.f32 %f0, %f1; mov.b32 %r0, %f0;", lambda lane: 0),
    "cvt-rni-to-even": (f"cvt.rni.f32.f32 %f0, {word(2.5)}; mov.b32 %r0, %f0;", lambda lane: of_float(2.0)),
    "bf16x2-first-is-high": (f"cvt.rn.bf16x2.f32 %r0, {word(1)}, {word(-2)};", lambda lane: 0x3F80C000),
    "f16-overflows": (f"cvt.rn.f16.f32 %rs0, {word(65520)}; cvt.u32.u16 %r0, %rs0;", lambda lane: 0x7C00),
    "max-drops-nan": (f"mov.b32 %f1, 2143289344; max.f32 %f0, %f1, {word(3)}; mov.b32 %r0, %f0;",
                      lambda lane: of_float(3.0)),
    "max-nan-keeps-nan": (f"mov.b32 %f1, 2143289344; max.NaN.f32 %f0, %f1, {word(3)}; mov.b32 %r0, %f0;",
                          lambda lane: 2143289344),
    "setp-is-false-of-nan": ("mov.b32 %f1, 2143289344; setp.le.f32 %p0, %f1, %f1; selp.b32 %r0, 1, 2, %p0;",
                             lambda lane: 2),
    "setp-ltu-is-true-of-nan": ("mov.b32 %f1, 2143289344; setp.ltu.f32 %p0, %f1, %f1; selp.b32 %r0, 1, 2, %p0;",
                                lambda lane: 1),
    "setp-unsigned": ("setp.lt.u32 %p0, -1, 1; selp.b32 %r0, 1, 2, %p0;", lambda lane: 2),
    "copysign": (f"copysign.f32 %f0, {word(-1)}, {word(5)}; mov.b32 %r0, %f0;", lambda lane: of_float(-5.0)),
    "guards": ("mov.u32 %r0, 1; setp.gt.u32 %p0, %r1, 3; @!%p0 mov.u32 %r0, 2;", lambda lane: 1 if lane > 3 else 2),
    "branches": ("setp.gt.u32 %p0, %r1, 3; mov.u32 %r0, 7; @%p0 bra $L; mov.u32 %r0, 8; $L:",
                 lambda lane: 7 if lane > 3 else 8),
    "shuffles-between-lanes": ("shfl.sync.bfly.b32 %r0|%p0, %r1, 3, 31, -1;", lambda lane: lane ^ 3),
    "shared-memory": ("mov.u32 %r2, memory; shl.b32 %r3, %r1, 2; add.s32 %r2, %r2, %r3; st.shared.u32 [%r2], %r1; "
                      "bar.sync 0; mov.u32 %r4, memory; sub.s32 %r4, %r4, %r3; ld.shared.u32 %r0, [%r4+124];",
                      lambda lane: 31 - lane),
}  # fmt: skip


def kernel(name: str, statements: str) -> str:
    return f"""
.visible .entry {name}(.param .u64 {name}_param_0)
{{
  .reg .pred %p<1>; .reg .b16 %rs<2>; .reg .b32 %r<8>; .reg .f32 %f<2>; .reg .b64 %rd<4>;
  mov.u32 %r1, %tid.x;
  {statements}
  ld.param.u64 %rd1, [{name}_param_0];
  mul.wide.u32 %rd2, %r1, 4;
  add.s64 %rd3, %rd1, %rd2;
  st.global.u32 [%rd3], %r0;
  ret;
}}"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("ptx")
    module = ".extern .shared .align 16 .b8 memory[];\n" + "\n".join(
        kernel(f"k{number}", statements) for number, (statements, _) in enumerate(CASES.values())
    ) + kernel("past_the_end", "mov.u32 %r2, memory; ld.shared.u32 %r0, [%r2+128];") + kernel(
        "misaligned", "mov.u32 %r2, memory; ld.shared.u32 %r0, [%r2+2];"
    )  # fmt: skip
    emulated.compile_translation(module, folder / "kernels.cpp", folder / "kernels.o")
    sources = (str(emulated.EMULATOR / name) for name in ("emulator.cpp", "runtime.cpp"))
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-DXSEP_EMULATOR", f"-I{emulated.EMULATOR}", "-isystem",
               str(emulated.cuda_include()), *sources, f"{folder}/kernels.o", "-o", f"{folder}/kernels.so"]  # fmt: skip
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "kernels.so"))


def run(library: ctypes.CDLL, name: str) -> list[int]:
    """What each lane of a warp leaves."""
    out = (ctypes.c_uint32 * 32)()
    address = ctypes.c_uint64(ctypes.addressof(out))
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(address))
    message = ctypes.create_string_buffer(1024)
    if library.emulate_translated_block(
        getattr(library, ptx.PREFIX + name), 32, ctypes.c_size_t(128), parameters, message, ctypes.c_size_t(1024)
    ):
        raise RuntimeError(message.value.decode())
    return list(out)


@pytest.mark.parametrize("name", CASES)
def test_instruction(library: ctypes.CDLL, name: str) -> None:
    expected = [CASES[name][1](lane) for lane in range(32)]
    assert run(library, f"k{list(CASES).index(name)}") == expected


@pytest.mark.parametrize(("name", "words"), [("past_the_end", "at byte 128 of 128"), ("misaligned", "misaligned")])
def test_access_that_a_gpu_would_refuse(library: ctypes.CDLL, name: str, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        run(library, name)


@pytest.mark.parametrize(
    "words",
    ["wgmma.fence.sync.aligned", "add.rz.f32 %f0, %f1, %f1", "fma.rn.sat.f32 %f0, %f1, %f1, %f1", "bar.sync 1, 64"],
)
def test_what_is_not_known_is_named(words: str) -> None:
    with pytest.raises(NotImplementedError, match=re.escape(words)):
        list(ptx.entries(kernel("k", f"{words};")))


def test_names_of_both_compilers_meet() -> None:
    mine = "_ZN4xsep4cuda44_GLOBAL__N__c6ebd0a0_11_pool_add_cu_d3fd214615pool_add_kernelIfLi1EEEvNS0_1PE"
    assert ptx.kernel_key(mine) == "_ZN4xsep4cuda12_GLOBAL__N_115pool_add_kernelIfLi1EEEvNS0_1PE"
    assert ptx.kernel_key("_ZN4xsep1kE") == "_ZN4xsep1kE"
