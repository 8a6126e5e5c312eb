"""Instructions of PTX, one by one, as they are translated: what the PTX ISA says that they do."""

from __future__ import annotations

import ctypes
import re
import struct
import subprocess
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from . import emulated, ptx
from .warp_group import PRODUCTS, Product, wgmma

pytestmark = pytest.mark.skipif(emulated.missing_tools() is not None, reason=str(emulated.missing_tools()))


def of_float(value: float) -> int:
    """Its bits."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def word(value: float) -> str:
    return f"0f{of_float(value):08X}"


BIG = 2.0**24
TINY = 2.0**-130  # less than the smallest normal float32


def element(matrix: int, row: int, column: int) -> int:
    """What stands there in four 8 x 8 matrices of 16 bits that hold their places."""
    return 64 * matrix + 8 * row + column


def pair(low: int, high: int) -> int:
    return high << 16 | low


def of_matrix(matrix: int, lane: int) -> int:
    return pair(*(element(matrix, lane // 4, lane % 4 * 2 + i) for i in range(2)))


def of_transposed_matrix(matrix: int, lane: int) -> int:
    return pair(*(element(matrix, lane % 4 * 2 + i, lane // 4) for i in range(2)))


#: %r3 is where this lane's word of shared memory lies, and %r4 where its row of 16 bytes.
PLACES = "mov.b32 %r2, memory; mad.lo.s32 %r3, %r1, 4, %r2; mad.lo.s32 %r4, %r1, 16, %r2;"
#: %r8 to %r11 are this lane's parts of four matrices that hold their places.
HELD = (
    "shl.b32 %r5, %r1, 1; add.s32 %r6, %r5, 1; shl.b32 %r6, %r6, 16; or.b32 %r8, %r5, %r6; "
    "add.s32 %r9, %r8, 4194368; add.s32 %r10, %r9, 4194368; add.s32 %r11, %r10, 4194368;"
)
MATRICES = (
    f"{PLACES} {HELD} st.shared.b32 [%r3], %r8; st.shared.b32 [%r3+128], %r9; st.shared.b32 [%r3+256], %r10; "
    "st.shared.b32 [%r3+384], %r11; bar.warp.sync -1;"
)
#: Each lane's word of global memory, at %rd3, holds its number and 100, so that cp.async can read it; all see it.
IN_GLOBAL = (
    f"{PLACES} ld.param.b64 %rd1, [PARAMETER]; mad.wide.u32 %rd3, %r1, 4, %rd1; add.s32 %r5, %r1, 100; "
    "st.global.b32 [ %rd3 + 0 ], { %r5 }; bar.warp.sync -1;"
)
ARRIVED = "cp.async.commit_group; cp.async.wait_group 0; bar.warp.sync -1; ld.shared.b32 %r0, [%r3];"
#: %r2 and %r3 are this lane's parts of a 16 x 8 matrix of bfloat16 (or float16), the lane and 0.5, and the lane and 64;
#: %r4 of the unit matrix.
BY_ONES = (
    "cvt.rn.f32.u32 %f1, %r1; add.f32 %f2, %f1, {half}; add.f32 %f3, %f1, {more}; cvt.rn.{kind}x2.f32 %r2, %f2, %f1; "
    "cvt.rn.{kind}x2.f32 %r3, %f3, %f1; shr.u32 %r5, %r1, 3; and.b32 %r6, %r1, 3; setp.eq.u32 %p0, %r5, %r6; "
    "shl.b32 %r7, %r1, 2; and.b32 %r7, %r7, 16; mov.b32 %r8, {one}; shl.b32 %r8, %r8, %r7; selp.b32 %r4, %r8, 0, %p0; "
    "mma.sync.aligned.m16n8k8.row.col.f32.{kind}.{kind}.f32 {{%f4, %f5, %f6, %f7}}, {{%r2, %r3}}, {{%r4}}, "
    "{{%f2, %f2, %f2, %f2}};"
)
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
    "add-of-two": (
        f"cvt.rn.bf16x2.f32 %r2, {word(1)}, {word(-2)}; cvt.rn.bf16x2.f32 %r3, {word(2**-8)}, {word(0.5)}; "
        "add.bf16x2 %r0, %r2, %r3;",
        lambda lane: 0x3F80BFC0,
    ),
    "max-of-two-keeps-nan": (
        f"cvt.rn.bf16x2.f32 %r2, {word(1)}, {word(-2)}; mov.b32 %r3, 2143305728; max.NaN.bf16x2 %r0, %r2, %r3;",
        lambda lane: 0x7FFF4000,
    ),
    "max-of-16-bits": (
        f"cvt.rn.bf16.f32 %rs0, {word(1)}; cvt.rn.bf16.f32 %rs1, {word(-2)}; max.NaN.bf16 %rs0, %rs1, %rs0; "
        "cvt.u32.u16 %r0, %rs0;",
        lambda lane: 0x3F80,
    ),
    "max-of-16-bits-keeps-nan": (
        f"cvt.rn.bf16.f32 %rs0, {word(1)}; mov.u16 %rs1, 32704; max.NaN.bf16 %rs0, %rs0, %rs1; cvt.u32.u16 %r0, %rs0;",
        lambda lane: 0x7FFF,
    ),
    "setp-of-two": (
        f"cvt.rn.bf16x2.f32 %r2, {word(2)}, {word(-2)}; mov.b32 %r3, 0; setp.gt.bf16x2 %p0|%p1, %r2, %r3; "
        "selp.b32 %r0, 1, 0, %p0; @%p1 add.s32 %r0, %r0, 2;",
        lambda lane: 2,
    ),
    "setp-is-false-of-nan": ("mov.b32 %f1, 2143289344; setp.le.f32 %p0, %f1, %f1; selp.b32 %r0, 1, 2, %p0;",
                             lambda lane: 2),
    "setp-ltu-is-true-of-nan": ("mov.b32 %f1, 2143289344; setp.ltu.f32 %p0, %f1, %f1; selp.b32 %r0, 1, 2, %p0;",
                                lambda lane: 1),
    "setp-unsigned": ("setp.lt.u32 %p0, -1, 1; selp.b32 %r0, 1, 2, %p0;", lambda lane: 2),
    "copysign": (f"copysign.f32 %f0, {word(-1)}, {word(5)}; mov.b32 %r0, %f0;", lambda lane: of_float(-5.0)),
    "guards": ("mov.u32 %r0, 1; setp.gt.u32 %p0, %r1, 3; @!%p0 mov.u32 %r0, 2;", lambda lane: 1 if lane > 3 else 2),
    "branches": ("setp.gt.u32 %p0, %r1, 3; mov.u32 %r0, 7; @%p0 bra $L; mov.u32 %r0, 8; $L:",
                 lambda lane: 7 if lane > 3 else 8),
    "mma-m16n8k8-bf16": (
        BY_ONES.format(kind="bf16", one=0x3F80, half=word(0.5), more=word(64)) + "mov.b32 %r0, %f5;",
        lambda lane: of_float(2 * (lane + 0.5)),
    ),
    "mma-m16n8k8-f16": (
        BY_ONES.format(kind="f16", one=0x3C00, half=word(0.5), more=word(64)) + "mov.b32 %r0, %f7;",
        lambda lane: of_float(lane + 64 + lane + 0.5),
    ),
    "vote-any": ("setp.eq.u32 %p1, %r1, 5; vote.sync.any.pred %p0, %p1, -1; selp.b32 %r0, 1, 2, %p0;", lambda lane: 1),
    "vote-none": ("setp.eq.u32 %p1, %r1, 50; vote.sync.any.pred %p0, %p1, -1; selp.b32 %r0, 1, 2, %p0;",
                  lambda lane: 2),
    "shuffles-between-lanes": ("shfl.sync.bfly.b32 %r0|%p0, %r1, 3, 31, -1;", lambda lane: lane ^ 3),
    "shared-memory": ("mov.u32 %r2, memory; shl.b32 %r3, %r1, 2; add.s32 %r2, %r2, %r3; st.shared.u32 [%r2], %r1; "
                      "bar.sync 0; mov.u32 %r4, memory; sub.s32 %r4, %r4, %r3; ld.shared.u32 %r0, [%r4+124];",
                      lambda lane: 31 - lane),
    "bfe-u32": ("bfe.u32 %r0, 305419896, 8, 12;", lambda lane: 0x456),
    "bfe-s32-takes-the-sign": ("bfe.s32 %r0, 128, 4, 4;", lambda lane: 0xFFFFFFF8),
    "bfe-u32-past-the-end": ("bfe.u32 %r0, -2147483648, 28, 8;", lambda lane: 8),
    "bfe-s32-past-the-end": ("bfe.s32 %r0, -2147483648, 28, 8;", lambda lane: 0xFFFFFFF8),
    "bfe-of-no-bits": ("bfe.s32 %r0, -1, 4, 0;", lambda lane: 0),
    "shf-l-wraps": ("shf.l.wrap.b32 %r0, 0x89ABCDEF, 0x01234567, 36;", lambda lane: 0x12345678),
    "shf-r": ("shf.r.wrap.b32 %r0, 0x89ABCDEF, 0x01234567, 4;", lambda lane: 0x789ABCDE),
    "prmt-chooses-bytes": ("prmt.b32 %r0, 0x33221100, 0x77665544, 0x5410U;", lambda lane: 0x55441100),
    "prmt-spreads-a-sign": ("prmt.b32 %r0, 0x00000080, 0x7F000000, 0xF8U;", lambda lane: 0x808000FF),
    "redux-add": ("mov.b32 %r2, -1; redux.sync.add.s32 %r0, %r1, %r2;", lambda lane: 496),
    "redux-min-s32": ("sub.s32 %r2, %r1, 40; redux.sync.min.s32 %r0, %r2, -1;", lambda lane: (-40) & 0xFFFFFFFF),
    "redux-min-u32": ("sub.s32 %r2, %r1, 4; redux.sync.min.u32 %r0, %r2, -1;", lambda lane: 0),
    "redux-or": ("shl.b32 %r2, 1, %r1; redux.sync.or.b32 %r0, %r2, -1;", lambda lane: 0xFFFFFFFF),
    "float-in-a-plain-register": (f"mov.b32 %r2, {word(1.5)}; add.f32 %r0, %r2, {word(2)};",
                                  lambda lane: of_float(3.5)),
    "div-full": (f"mov.b32 %r2, {word(7)}; div.full.f32 %r0, %r2, {word(2)};", lambda lane: of_float(3.5)),
    "ftz-of-an-operand": (f"mov.b32 %r2, {word(-TINY)}; fma.rn.ftz.f32 %r0, %r2, {word(2.0**20)}, {word(0)};",
                          lambda lane: 0),
    "ftz-of-a-result": (f"mul.ftz.f32 %r0, {word(-(2.0**-100))}, {word(2.0**-30)};", lambda lane: 0x80000000),
    "subnormal-without-ftz": (f"mul.f32 %r0, {word(2.0**-100)}, {word(2.0**-30)};", lambda lane: of_float(TINY)),
    "setp-ftz": (f"setp.eq.ftz.f32 %p0, {word(TINY)}, {word(0)}; selp.b32 %r0, 1, 2, %p0;", lambda lane: 1),
    "pred-logic": (
        "setp.gt.u32 %p0, %r1, 7; setp.lt.u32 %p1, %r1, 20; and.pred %p2, %p0, %p1; mov.pred %p3, -1; "
        "xor.pred %p2, %p2, %p3; not.pred %p3, %p2; or.pred %p3, %p3, %p0; selp.b32 %r0, 1, 0, %p2; "
        "selp.b32 %r2, 2, 0, %p3; or.b32 %r0, %r0, %r2;",
        lambda lane: (0 if 7 < lane < 20 else 1) | (2 if lane > 7 else 0),
    ),
    "setp-combines": ("setp.gt.u32 %p0, %r1, 7; setp.lt.and.b32 %p1, %r1, 20, %p0; selp.b32 %r0, 1, 2, %p1;",
                      lambda lane: 1 if 7 < lane < 20 else 2),
    "setp-b16": ("cvt.u16.u32 %rs0, %r1; setp.eq.b16 %p0, %rs0, 15; selp.b16 %rs1, -1, 0, %p0; cvt.u32.u16 %r0, %rs1;",
                 lambda lane: 0xFFFF if lane == 15 else 0),
    "setp-b64": ("cvt.u64.u32 %rd0, %r1; shl.b64 %rd0, %rd0, 40; setp.ne.b64 %p0, %rd0, 0; selp.b32 %r0, 1, 2, %p0;",
                 lambda lane: 1 if lane else 2),
    "bf16-of-a-plain-register": ("mov.b32 {%rs0, %rs1}, 0x40003F80; cvt.f32.bf16 %r2, %rs1; cvt.rn.f16.f32 %rs0, %r2; "
                                 "cvt.u32.u16 %r0, %rs0;", lambda lane: 0x4000),
    "f16-of-a-plain-register": ("mov.b16 %rs0, 0xC500; cvt.f32.f16 %r0, %rs0;", lambda lane: of_float(-5.0)),
    "address-as-an-operand": (f"{PLACES} st.shared.b32 [%r3+128], %r1; mov.b32 %r2, memory+128; "
                              "mad.lo.s32 %r2, %r1, 4, %r2; ld.shared.b32 %r0, [%r2];", lambda lane: lane),
    "guarded-load-in-braces": (
        f"{PLACES} st.shared.v2.b32 [ %r4 + 0 ], {{%r1, %r1}}; setp.gt.u32 %p0, %r1, 7; {{ .reg .b32 %got; "
        "mov.u32 %got, 0x0; @%p0 ld.shared.b32 { %got }, [ %r4 + 4 ]; mov.u32 %r0, %got; }",
        lambda lane: lane if lane > 7 else 0,
    ),
    "cache-hints": (
        f"{IN_GLOBAL} createpolicy.fractional.L2::evict_last.b64 %rd0, 1.0; "
        "ld.global.L1::evict_last.L2::cache_hint.b32 { %r0 }, [ %rd3 + 0 ], %rd0;",
        lambda lane: lane + 100,
    ),
    "cp-async-of-4-bytes": (
        f"{IN_GLOBAL} and.b32 %r6, %r1, 1; shl.b32 %r6, %r6, 2; "
        f"cp.async.ca.shared.global [ %r3 + 0 ], [ %rd3 + 0 ], 0x4, %r6; {ARRIVED}",
        lambda lane: lane + 100 if lane % 2 else 0,
    ),
    "cp-async-of-8-bytes": (
        f"{IN_GLOBAL} shl.b32 %r5, %r1, 3; setp.lt.u32 %p0, %r1, 16; mad.wide.u32 %rd2, %r1, 8, %rd1; "
        f"add.s32 %r5, %r5, %r2; @%p0 cp.async.ca.shared.global.L2::128B [%r5], [%rd2], 8; {ARRIVED}",
        lambda lane: lane + 100,
    ),
    "cp-async-of-16-bytes": (
        f"{IN_GLOBAL} setp.lt.u32 %p0, %r1, 8; mad.wide.u32 %rd2, %r1, 16, %rd1; "
        f"@%p0 cp.async.cg.shared.global [ %r4 + 0 ], [ %rd2 + 0 ], 0x10; {ARRIVED}",
        lambda lane: lane + 100,
    ),
    "ldmatrix-x1": (f"{MATRICES} ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r0}}, [%r4];",
                    lambda lane: of_matrix(0, lane)),
    "ldmatrix-x2": (f"{MATRICES} ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {{%r5, %r0}}, [%r4+128];",
                    lambda lane: of_transposed_matrix(2, lane)),
    "ldmatrix-x4": (f"{MATRICES} ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r5, %r6, %r0, %r7}}, [%r4];",
                    lambda lane: of_matrix(2, lane)),
    "ldmatrix-x4-trans": (f"{MATRICES} ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{%r5, %r6, %r7, %r0}}, [%r4];",
                          lambda lane: of_transposed_matrix(3, lane)),
    "stmatrix-x1": (f"{PLACES} {HELD} stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r4], {{%r9}}; bar.warp.sync -1; "
                    "ld.shared.b32 %r0, [%r3];", lambda lane: of_matrix(1, lane)),
    "stmatrix-x2-trans": (
        f"{PLACES} {HELD} stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%r4], {{%r9, %r10}}; bar.warp.sync -1; "
        "ld.shared.b32 %r0, [%r3+128];",
        lambda lane: of_transposed_matrix(2, lane),
    ),
    "stmatrix-x4": (
        f"{PLACES} {HELD} stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r4+16], {{%r8, %r9, %r10, %r11}}; "
        "bar.warp.sync -1; ld.shared.b32 %r0, [%r3+400];",
        lambda lane: of_matrix(3, lane),
    ),
}  # fmt: skip


#: In %rd0, of a tile of 16-byte units 8 rows apart in k and as many rows as it has.
DESCRIPTOR = (
    "mov.b32 %r2, memory; shr.u32 %r3, %r2, 4; cvt.u64.u32 %rd0, %r3; "
    f"or.b64 %rd0, %rd0, {128 >> 4 << 16 | 256 >> 4 << 32}; mov.pred %p3, -1;"
)
WORD_PRODUCT = wgmma("m64n8k8.f32.tf32.tf32", ["%r4", "%r5", "%r6", "%r7"], "{%r4, %r5, %r6, %r7}", "%rd0", "%p3", ())


def kernel(name: str, statements: str) -> str:
    return f"""
.visible .entry {name}(.param .u64 {name}_param_0)
{{
  .reg .pred %p<4>; .reg .b16 %rs<2>; .reg .b32 %r<12>; .reg .f32 %f<8>; .reg .b64 %rd<4>;
  mov.u32 %r1, %tid.x;
  {statements.replace("PARAMETER", f"{name}_param_0")}
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
        [
            *(kernel(f"k{number}", statements) for number, (statements, _) in enumerate(CASES.values())),
            *(kernel(name, f"mov.u32 %r2, memory; {statements}") for name, (statements, _) in REFUSED.items()),
            *(case.kernel(f"w{number}") for number, case in enumerate(PRODUCTS)),
            *(kernel(name, f"{DESCRIPTOR} {statements}") for name, (statements, _) in GROUP_REFUSED.items()),
        ]
    )
    emulated.compile_translation(module, folder / "kernels.cpp", folder / "kernels.o")
    sources = (str(emulated.EMULATOR / name) for name in ("emulator.cpp", "runtime.cpp"))
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-DXSEP_EMULATOR", f"-I{emulated.EMULATOR}", "-isystem",
               str(emulated.cuda_include()), *sources, f"{folder}/kernels.o", "-o", f"{folder}/kernels.so"]  # fmt: skip
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "kernels.so"))


def run(
    library: ctypes.CDLL, name: str, threads: int = 32, shared: int = 640, tensors: tuple[Tensor, ...] = ()
) -> Tensor:
    """What each thread leaves, or, of a kernel that has its tensors, nothing of use."""
    out = torch.zeros(threads, dtype=torch.int32)
    addresses = [ctypes.c_uint64(t.data_ptr()) for t in tensors or (out,)]
    parameters = (ctypes.c_void_p * len(addresses))(*map(ctypes.addressof, addresses))
    message, size = ctypes.create_string_buffer(1024), ctypes.c_size_t
    translated, grid = getattr(library, ptx.PREFIX + name), (ctypes.c_uint * 3)(1, 1, 1)
    if library.emulate_translated_grid(translated, grid, threads, size(shared), parameters, message, size(1024)):
        raise RuntimeError(message.value.decode())
    return out


@pytest.mark.parametrize("case", PRODUCTS, ids=lambda case: case.id)
def test_product_of_a_warp_group(library: ctypes.CDLL, case: Product) -> None:
    threads = 256
    out, *rest = case.tensors(threads)
    run(library, f"w{PRODUCTS.index(case)}", threads, case.places()[-1], (out, *rest))
    a, b = case.matrices()
    warps = out.view(2, 4, 8, 4, case.columns // 8, 2, 2)  # group, warp, row, pair, eight columns, half, side
    for product in warps.permute(0, 1, 5, 2, 4, 3, 6).reshape(2, 64, case.columns):
        assert torch.equal(product, a.float() @ b.float().T)


@pytest.mark.parametrize("name", CASES)
def test_instruction(library: ctypes.CDLL, name: str) -> None:
    expected = [CASES[name][1](lane) for lane in range(32)]
    assert [word & 0xFFFFFFFF for word in run(library, f"k{list(CASES).index(name)}").tolist()] == expected


#: Statements that fail where the launch has 128 bytes of shared memory, which begin at %r2, and how.
REFUSED = {
    "past_the_end": ("ld.shared.u32 %r0, [%r2+128];", "at byte 128 of 128"),
    "misaligned": ("ld.shared.u32 %r0, [%r2+2];", "misaligned"),
    "stmatrix_past_the_end": (
        "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r2+128], {%r1};", "stmatrix of shared memory at byte 128 of 128"
    ),
    "stmatrix_misaligned": ("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r2+8], {%r1};", "16 bytes, misaligned"),
    "redux_of_a_few": ("redux.sync.add.s32 %r0, %r1, 255;", "partial mask"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_access_that_a_gpu_would_refuse(library: ctypes.CDLL, name: str) -> None:
    with pytest.raises(RuntimeError, match=REFUSED[name][1]):
        run(library, name, shared=128)


#: As REFUSED, of 128 threads that have 256 bytes; the descriptor in %rd0 is that of eight columns without a swizzle.
GROUP_REFUSED = {
    "written_before_the_wait": (
        f"{WORD_PRODUCT} wgmma.commit_group.sync.aligned; setp.eq.b32 %p0, %r1, 0; @%p0 st.shared.b32 [%r2], %r1; "
        "wgmma.wait_group.sync.aligned 0;",
        "written while a matrix instruction might read it",
    ),
    "base_offset": (f"or.b64 %rd0, %rd0, {1 << 49}; {WORD_PRODUCT}", "base offset"),
    "several_descriptors": (
        f"shr.u32 %r3, %r1, 6; cvt.u64.u32 %rd1, %r3; shl.b64 %rd1, %rd1, 32; xor.b64 %rd0, %rd0, %rd1; {WORD_PRODUCT}",
        "several descriptors",
    ),
    "tile_past_the_end": (f"add.s64 %rd0, %rd0, 8; {WORD_PRODUCT}", r"wgmma of shared memory at byte \d+ of 256"),
    "meets_in_another": (
        f"setp.lt.u32 %p0, %r1, 64; @%p0 bra $L; {WORD_PRODUCT.replace('k8', 'k16').replace('tf32', 'f16')[:-1]}, 0; "
        f"$L: {WORD_PRODUCT}",
        "lanes of one warp group meet in wgmma",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUP_REFUSED)
def test_warp_group_that_a_gpu_would_refuse(library: ctypes.CDLL, name: str) -> None:
    with pytest.raises(RuntimeError, match=GROUP_REFUSED[name][1]):
        run(library, name, 128, 256)


def test_product_of_one_warp(library: ctypes.CDLL) -> None:
    with pytest.raises(RuntimeError, match="in a warp group of fewer than 128 threads"):
        run(library, "several_descriptors", 96, 256)


@pytest.mark.parametrize(
    "words",
    ["cp.async.bulk.commit_group", "add.rz.f32 %f0, %f1, %f1", "fma.rn.sat.f32 %f0, %f1, %f1, %f1", "bar.sync 1, 64"],
)
def test_what_is_not_known_is_named(words: str) -> None:
    with pytest.raises(NotImplementedError, match=re.escape(words)):
        list(ptx.entries(kernel("k", f"{words};")))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (WORD_PRODUCT, "tensor core"), ("wgmma.fence.sync.aligned;", "none"), ("fence.proxy.async;", "none"),
        ("prmt.b32 %r0, %r1, %r1, 0x5410U;", "integer"),
        ("shf.l.wrap.b32 %r0, %r1, %r1, 3;", "integer"), ("bfe.u32 %r0, %r1, 3, 4;", "integer"),
        ("div.full.f32 %r0, %r1, %r1;", "float"), ("div.s32 %r0, %r1, %r1;", "integer"),
        ("redux.sync.add.s32 %r0, %r1, -1;", "warp, block"), ("and.pred %p0, %p1, %p2;", "integer"),
        ("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r1], {%r2};", "shared"),
    ],
)  # fmt: skip
def test_kinds(text: str, kind: str) -> None:
    words, operands = text.rstrip(";").split(maxsplit=1) if " " in text else (text.rstrip(";"), "")
    assert ptx.kind_of(re.split(r"\.|::", words), ptx.split(operands)) == kind


def test_names_of_both_compilers_meet() -> None:
    mine = "_ZN4xsep4cuda44_GLOBAL__N__c6ebd0a0_11_pool_add_cu_d3fd214615pool_add_kernelIfLi1EEEvNS0_1PE"
    assert ptx.kernel_key(mine) == "_ZN4xsep4cuda12_GLOBAL__N_115pool_add_kernelIfLi1EEEvNS0_1PE"
    assert ptx.kernel_key("_ZN4xsep1kE") == "_ZN4xsep1kE"
