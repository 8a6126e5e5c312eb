"""``python -m tests.cuda.counted [kernels]``: the instructions that kernels run for a value of y, dx or z, by kind.

Of the kernels named, or of all: depthwise, separable, wgrad, chain.

Counted in the PTX that nvcc makes for sm_90a, on the emulator, in steady state (few CTAs, so that what each does once
weighs little). A multiprocessor begins four warps' instructions a clock at most: what is printed as "issue" is how many
of its clocks go into that while memory delivers, at the speed of an H200's copy, the bytes that must move. Above 1 the
kernel cannot keep up with memory. The machine's own code may have more: moves that bring registers together.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

#: Read by emulated.py when it is imported.
os.environ.setdefault("XSEP_EMULATED_PTX", "90a")
os.environ["XSEP_EMULATED_PTX_FILES"] = (
    r"(depthwise/[fb]prop|separable/(fprop|wgrad)|chain/(fused_backward|wgrad))(_bf16)?\.cu"
)
os.environ["XSEP_EMULATED_PTX_COUNTED"] = "1"

import torch

from xsep.problem import Geometry

from . import emulated, emulated_ops, ptx
from . import test_emulated_depthwise as depthwise
from . import test_emulated_separable as separable

#: Bytes that a multiprocessor of an H200 has of a copy in a clock: 4.3 TB/s, 132 of them, 1.755 GHz.
BYTES_A_CLOCK = 4.3e12 / 132 / 1.755e9
#: Channels, size, filter, stride, dilation (the last has the general kernels, of which the cost model in xsep/plans.py
#: has its GENERAL_INSTRUCTIONS); and channels, outputs, size, filter.
DEPTHWISE = [
    (128, 147, 3, 1, 1), (256, 74, 3, 1, 1), (728, 37, 3, 1, 1), (728, 19, 3, 1, 1), (64, 74, 5, 1, 1),
    (128, 74, 3, 2, 1), (64, 37, 3, 1, 2),
]  # fmt: skip
SEPARABLE = [(128, 128, 147, 3), (128, 256, 74, 3), (256, 256, 37, 3), (64, 64, 56, 5)]
#: Channels, outputs, size; from them come the planner's constants (csrc/common/cuda_chain_plan.h).
CHAIN = [(64, 64, 147), (64, 128, 147), (128, 64, 147), (128, 128, 147)]
RELU = emulated.Affine(activation=1)
KINDS = [kind for kind in ptx.KINDS if kind != "none"]


class Run(NamedTuple):
    """What ran, for so many values, of how many bytes that must move."""

    label: str
    values: int
    moved: int


def depthwise_runs(library: emulated.Library) -> Iterator[Run]:
    """Each has run when it is given."""
    for c, size, k, stride, dilation in DEPTHWISE:
        pad = dilation * (k // 2)
        geometry = Geometry(stride, stride, pad, pad, pad, pad, dilation, dilation)
        case = depthwise.Case("counted", 1, c, size, size, (k, k), geometry)
        what = f"{c}@{size} {k}x{k} /{stride}" + (f" d{dilation}" if dilation > 1 else "")
        x, w = depthwise.draw(case, torch.bfloat16)
        shape = depthwise.shape_of(case)
        dz = torch.randn(1, c, shape.p, shape.q).bfloat16()
        for name, prologue in (("", depthwise.PLAIN), ("relu", RELU)):
            depthwise.fprop(library, case, x, w, prologue)
            pixels = shape.p * shape.q
            yield Run(f"fprop {what} {name}", pixels * c, (size * size + pixels) * c * 2)
            # Without a scale there are no more gradients.
            depthwise.bprop(library, case, dz, x, w, prologue, wanted=("dx", "dw_dw"))
            yield Run(f"bprop {what} {name}", size * size * c, (2 * size**2 + pixels) * c * 2)


def separable_runs(library: emulated.Library) -> Iterator[Run]:
    for c, c_out, size, k in SEPARABLE:
        case = separable.Case("counted", 4 if size < 40 else 1, c, c_out, size, size, k, separable.same(k))
        inputs = separable.draw(case, "bf16")
        batchnorm = emulated.Affine(torch.ones(c), torch.zeros(c), 1)
        for name, prologue in (("", emulated.Affine()), ("relu", RELU), ("bn relu", batchnorm)):
            separable.fprop(library, case, "bf16", inputs._replace(prologue=prologue))
            pixels = case.n * size * size
            yield Run(f"fused {c}->{c_out}@{size} {k}x{k} {name}", pixels * c, pixels * (c + c_out) * 2)


def wgrad_runs(library: emulated_ops.EmulatedOps) -> Iterator[Run]:
    """dw_pw with z on the chip, for a value of z; the training chain's, with dr too, behind BatchNorm and ReLU."""
    library.on(emulated_ops.SMALL._replace(multiprocessors=2))
    for c, c_out, size, k in SEPARABLE:
        n = 4 if size < 40 else 1
        x, dy = (torch.randn(n, size, size, channels).bfloat16().permute(0, 3, 1, 2) for channels in (c, c_out))
        w_dw, same = torch.randn(c, 1, k, k).bfloat16(), [1, 1, *[k // 2] * 4, 1, 1]
        for name, vectors, code in (("", None, 0), ("relu", None, 1), ("bn relu", torch.ones(c), 1)):
            library.ops.cuda_separable_wgrad(dy, x, w_dw, vectors, vectors, same, code, 0.0)
            pixels = n * size * size
            yield Run(f"wgrad {c}->{c_out}@{size} {k}x{k} {name}", pixels * c, pixels * (c + c_out) * 2)
        if k == 3:
            coef, vec = torch.randn(3, c_out), torch.ones(2, c)
            library.ops.cuda_chain_wgrad(dy, torch.randn_like(dy), coef, x, w_dw, vec, same, 1, 0.0)
            yield Run(f"chain's wgrad {c}->{c_out}@{size}", pixels * c, pixels * (c + 3 * c_out) * 2)


def chain_runs(library: emulated_ops.EmulatedOps) -> Iterator[Run]:
    """Backward in one pass, with ReLU, BatchNorm and the sums of a layer in a chain."""
    library.on(emulated_ops.SMALL)
    for c, c_out, size in CHAIN:
        x, r, du, shortcut = (
            torch.randn(1, size, size, channels).bfloat16().permute(0, 3, 1, 2) for channels in (c, c_out, c_out, c)
        )
        w_pw, w_dw = torch.randn(c_out, c).bfloat16(), torch.randn(c, 1, 3, 3).bfloat16()
        coef, vec, centres = torch.randn(3, c_out), torch.randn(2, c), torch.randn(2, c)
        for name, joined in (("", None), ("shortcut", shortcut)):
            library.ops.cuda_chain_fused_backward(
                du, None, r, coef, [0, 0], w_pw, w_dw, x, vec, joined, x, None, centres, False, [1] * 8, 1, 0.0
            )
            pixels = size * size
            moved = pixels * (2 * c_out + (2 if joined is None else 3) * c) * 2
            yield Run(f"backward {c}->{c_out}@{size} {name}", pixels * c, moved)


#: Which library of the emulator, and what runs on it.
KERNELS: dict[str, tuple[Callable[[], Any], Callable[[Any], Iterator[Run]]]] = {
    "depthwise": (lambda: emulated.Library(emulated.build("depthwise")), depthwise_runs),
    "separable": (lambda: emulated.Library(emulated.build("separable")), separable_runs),
    "wgrad": (emulated_ops.library, wgrad_runs),
    "chain": (emulated_ops.library, chain_runs),
}


def main(names: list[str]) -> None:
    print(f"{'bfloat16':32}{'issue':>7}{'all':>7}  " + "  ".join(KINDS))
    for name in names or KERNELS:
        build, runs = KERNELS[name]
        library = build()
        counts = (ctypes.c_uint64 * 16).in_dll(library.lib, "emulate_counts")
        ctypes.memset(counts, 0, ctypes.sizeof(counts))
        for label, values, moved in runs(library):
            each = {kind: counts[list(ptx.KINDS).index(kind)] / values for kind in KINDS}
            clocks = sum(each.values()) * values / 32 / 4
            print(
                f"{label:32}{clocks / (moved / BYTES_A_CLOCK):7.2f}{sum(each.values()):7.1f}  "
                + "  ".join(f"{each[kind]:{len(kind)}.2f}" for kind in KINDS),
                flush=True,
            )
            ctypes.memset(counts, 0, ctypes.sizeof(counts))


if __name__ == "__main__":
    main(sys.argv[1:])
