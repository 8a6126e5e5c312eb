"""Products of a warp group (wgmma) as PTX, on matrices laid out in shared memory by a rule of their own.

The rule is written down here a second time, by lines and panels, so that test_ptx.py holds the emulator's reading of
matrix descriptors to it and to the product of the matrices.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


def wgmma(shape: str, d: list[str], a: str, b: str, scale: str, flags: tuple[int, ...]) -> str:
    last = ", ".join(map(str, (1, 1, *flags)))
    return f"wgmma.mma_async.sync.aligned.{shape} {{{', '.join(d)}}}, {a}, {b}, {scale}, {last};"


class Tile(NamedTuple):
    """A matrix as bytes of shared memory, its descriptor but for the address, and where each product's part begins."""

    picture: Tensor
    descriptor: int
    starts: list[int]

    @classmethod
    def of(cls, matrix: Tensor, span: int, transposed: bool) -> Tile:
        """Of [rows, k]. Lines of ``span`` times 16 bytes, which run along k, or, transposed, along the rows.

        Where a panel of them ends the next one begins. In lines of 128 bytes, the 16 bytes at place c of line l stand
        at c ^ (l % 8); shorter ones change places each time that so many of them make 128 bytes.
        """
        flat = (matrix.T if transposed else matrix).contiguous()
        lines = flat.shape[0]
        chunks = flat.view(torch.uint8).view(lines, -1, 16)
        picture = torch.empty(chunks.shape[1] // span, lines, span, 16, dtype=torch.uint8)
        for line in range(lines):
            for chunk in range(chunks.shape[1]):
                picture[chunk // span, line, chunk % span ^ (line * span // 8 % span)] = chunks[line, chunk]
        panel, atom = 16 * span * lines, 16 * span * 8
        leading, stride = (atom, panel) if transposed and span == 1 else (panel, atom)
        reached = range(0, matrix.shape[1] * matrix.element_size(), 32)
        if transposed:
            starts = [2 * atom * step for step in range(len(reached))]
        else:
            starts = [byte // (16 * span) * panel + byte % (16 * span) for byte in reached]
        mode = {1: 0, 8: 1, 4: 2, 2: 3}[span]
        return cls(picture.flatten(), leading >> 4 << 16 | stride >> 4 << 32 | mode << 62, starts)


class Product(NamedTuple):
    """A [64, k] times B [columns, k] transposed, in as many steps as there is k."""

    type: str
    columns: int
    span: int
    transposed: bool = False
    a_span: int = 0  # 0: A is in registers
    a_transposed: bool = False

    @property
    def id(self) -> str:
        turned = ("T" if self.transposed else "") + (f"-a{16 * self.a_span}" if self.a_span else "")
        return f"{self.type}-n{self.columns}-{16 * self.span}{turned}{'T' if self.a_transposed else ''}"

    def matrices(self) -> tuple[Tensor, Tensor]:
        dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}[self.type]
        generator = torch.Generator().manual_seed(self.columns + self.span)
        a, b = (
            torch.randint(-4, 5, (rows, 128 // dtype.itemsize), generator=generator).to(dtype)
            for rows in (64, self.columns)
        )
        return a, b

    def tiles(self) -> list[Tile]:
        a, b = self.matrices()
        tiles = [Tile.of(b, self.span, self.transposed)]
        return [*tiles, Tile.of(a, self.a_span, self.a_transposed)] if self.a_span else tiles

    def places(self) -> list[int]:
        """Where in shared memory the tiles begin, and where the last one ends."""
        return list(accumulate((-(-t.picture.numel() // 2048) * 2048 for t in self.tiles()), initial=0))

    def tensors(self, threads: int) -> tuple[Tensor, ...]:
        """The output, shared memory, and A as registers, [steps, 128, 4]: as mma has them, each warp 16 rows."""
        picture = torch.zeros(self.places()[-1], dtype=torch.uint8)
        for place, tile in zip(self.places(), self.tiles()):
            picture[place : place + tile.picture.numel()] = tile.picture
        a = self.matrices()[0]
        parts = 4 // a.element_size()
        fragments = a.view(4, 2, 8, -1, 2, 4, parts).permute(3, 0, 2, 5, 4, 1, 6)
        return torch.full((threads, self.columns // 2), math.nan), picture, fragments.contiguous()

    def kernel(self, name: str) -> str:
        a, _ = self.matrices()
        depth = 32 // a.element_size()
        d = [f"%r{100 + i}" for i in range(self.columns // 2)]
        turned = (self.a_transposed, self.transposed) if self.a_span else (self.transposed,)
        flags = () if self.type == "tf32" else tuple(map(int, turned))
        lines = ["and.b32 %r2, %r1, 127;", "mul.wide.u32 %rd4, %r2, 16;", "mov.b32 %r3, memory;",
                 "mad.lo.s32 %r3, %r2, 16, %r3;", "setp.ne.b32 %p0, %r1, %r1;", "mov.pred %p1, -1;"]  # fmt: skip
        for number, register in enumerate(("%rd0", "%rd1", "%rd2")):
            lines.append(f"ld.param.b64 {register}, [{name}_param_{number}];")
        lines += ["add.s64 %rd1, %rd1, %rd4;", "add.s64 %rd2, %rd2, %rd4;"]
        for place in range(0, self.places()[-1], 2048):
            lines.append(f"ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd1+{place}];")
            lines.append(f"st.shared.v4.b32 [%r3+{place}], {{%r4, %r5, %r6, %r7}};")
        lines += ["fence.proxy.async.shared::cta;", "bar.sync 0;", "wgmma.fence.sync.aligned;"]
        for step in range(a.shape[1] // depth):
            for number, (place, tile) in enumerate(zip(self.places(), self.tiles())):
                lines += [f"mov.b32 %r8, memory+{place + tile.starts[step]};", "shr.u32 %r8, %r8, 4;",
                          f"cvt.u64.u32 %rd{5 + number}, %r8;",
                          f"or.b64 %rd{5 + number}, %rd{5 + number}, {signed(tile.descriptor)};"]  # fmt: skip
            lines.append(f"ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd2+{2048 * step}];")
            held = "%rd6" if self.a_span else "{%r4, %r5, %r6, %r7}"
            shape = f"m64n{self.columns}k{depth}.f32.{self.type}.{self.type}"
            lines.append(wgmma(shape, d, held, "%rd5", f"%p{min(step, 1)}", flags))
        lines += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;", "bar.sync 0;",
                  "st.shared.b32 [%r3], %r1;", "wgmma.wait_group.sync.aligned 0;",
                  f"mad.wide.u32 %rd0, %r1, {4 * len(d)}, %rd0;"]  # fmt: skip
        lines += [f"st.global.b32 [%rd0+{4 * i}], {{ {register} }};" for i, register in enumerate(d)]
        parameters = ", ".join(f".param .u64 .ptr .global .align 1 {name}_param_{i}" for i in range(3))
        text = "\n".join(lines)
        return f"""
.visible .entry {name}({parameters})
.reqntid 256
{{
  .reg .pred %p<2>; .reg .b32 %r<{100 + len(d)}>; .reg .b64 %rd<8>;
  mov.u32 %r1, %tid.x;
  {text}
  ret;
}}"""


def signed(bits: int) -> int:
    """As the assembly of 64 bits has it."""
    return bits - (bits >> 63 << 64)


PRODUCTS = [
    *(Product("bf16", 64, span, transposed) for span in (1, 2, 4, 8) for transposed in (False, True)),
    *(Product("tf32", 32, span) for span in (1, 2, 4, 8)),
    *(Product("f16", 8, 8, False, span, turned) for span in (1, 2, 4, 8) for turned in (False, True)),
    Product("f16", 256, 8, True),
    Product("tf32", 8, 4, False, 8),
]
