"""``python -m tests.cuda.counted``: the instructions that the depthwise kernels run for a value of y or dx, by kind.

Counted in the PTX that nvcc makes for sm_90a, on the emulator, in steady state (few CTAs, so that what each does once
weighs little). A multiprocessor begins four warps' instructions a clock at most: what is printed as "issue" is how many
of its clocks go into that while memory delivers, at the speed of an H200's copy, the bytes that must move. Above 1 the
kernel cannot keep up with memory.
"""

from __future__ import annotations

import ctypes
import os

#: Read by emulated.py when it is imported.
os.environ.setdefault("XSEP_EMULATED_PTX", "90a")
os.environ["XSEP_EMULATED_PTX_FILES"] = r"depthwise/[fb]prop(_bf16)?\.cu"
os.environ["XSEP_EMULATED_PTX_COUNTED"] = "1"

import torch

from . import emulated, ptx
from . import test_emulated_depthwise as depthwise

#: Bytes that a multiprocessor of an H200 has of a copy in a clock: 4.3 TB/s, 132 of them, 1.755 GHz.
BYTES_A_CLOCK = 4.3e12 / 132 / 1.755e9
SHAPES = [(128, 147, 3, 1), (256, 74, 3, 1), (728, 37, 3, 1), (728, 19, 3, 1), (64, 74, 5, 1), (128, 74, 3, 2)]
PROLOGUES = {"": depthwise.PLAIN, "relu": emulated.Affine(activation=1)}


def main() -> None:
    library = emulated.Library(emulated.build("depthwise"))
    counts = (ctypes.c_uint64 * 16).in_dll(library.lib, "emulate_counts")
    kinds = [kind for kind in ptx.KINDS if kind != "none"]
    print(f"{'bfloat16':28}{'issue':>7}{'all':>7}  " + "  ".join(kinds))
    for c, size, k, stride in SHAPES:
        case = depthwise.Case("counted", 1, c, size, size, (k, k), depthwise.same(k, stride))
        x, w = depthwise.draw(case, torch.bfloat16)
        shape = depthwise.shape_of(case)
        dz = torch.randn(1, c, shape.p, shape.q).bfloat16()
        for way in ("fprop", "bprop"):
            for name, prologue in PROLOGUES.items():
                ctypes.memset(counts, 0, ctypes.sizeof(counts))
                if way == "fprop":
                    depthwise.fprop(library, case, x, w, prologue)
                    values, moved = shape.p * shape.q * c, (size * size + shape.p * shape.q) * c * 2
                else:
                    depthwise.bprop(library, case, dz, x, w, prologue)
                    values, moved = size * size * c, (2 * size * size + shape.p * shape.q) * c * 2
                each = {kind: counts[list(ptx.KINDS).index(kind)] / values for kind in kinds}
                clocks = sum(each.values()) * values / 32 / 4
                label = f"{way} {c}@{size} {k}x{k} /{stride} {name}"
                print(
                    f"{label:28}{clocks / (moved / BYTES_A_CLOCK):7.2f}{sum(each.values()):7.1f}  "
                    + "  ".join(f"{each[kind]:{len(kind)}.2f}" for kind in kinds)
                )


if __name__ == "__main__":
    main()
