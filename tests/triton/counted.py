"""``python -m tests.triton.counted``: the instructions that Triton's kernels run for a value, by kind.

As ``python -m tests.cuda.counted`` for the CUDA ones: counted in the PTX that Triton makes for sm_90, on the emulator.
"issue" is how many of its clocks a multiprocessor begins instructions in while memory delivers, at the speed of an
H200's copy, the bytes that must move; above 1 the kernel cannot keep up with memory. A value is one of y for the
depthwise forward, of dx for its backward, and of z for the fused one.
"""

from __future__ import annotations

import ctypes
import os

#: Read by tests.cuda.emulated when it is imported.
os.environ["XSEP_EMULATED_PTX_COUNTED"] = "1"

import torch
from torch import Tensor

from tests.cuda import ptx
from tests.triton import emulated
from tests.triton.ahead_of_time import DEVICES
from xsep.backends import triton_launch as launch
from xsep.backends.triton_plans import backward_tile, fprop_tile, separable_plan
from xsep.problem import IDENTITY, RELU, Affine, Geometry, Problem

CARD = DEVICES["sm_90"]
#: Bytes that a multiprocessor of an H200 has of a copy in a clock: 4.3 TB/s, 132 of them, 1.755 GHz.
BYTES_A_CLOCK = 4.3e12 / 132 / 1.755e9
KINDS = [kind for kind in ptx.KINDS if kind != "none"]
#: Pictures, channels, size, filter, stride.
DEPTHWISE = [(1, 128, 147, 3, 1), (1, 256, 74, 3, 1), (2, 728, 37, 3, 1), (4, 728, 19, 3, 1), (1, 64, 74, 5, 1),
             (1, 128, 74, 3, 2)]  # fmt: skip
#: Pictures, channels in and out, size.
FUSED = [(1, 64, 128, 64), (1, 128, 128, 64), (1, 256, 256, 64)]


def image(n: int, c: int, size: int) -> Tensor:
    return torch.randn(n, size, size, c).bfloat16().permute(0, 3, 1, 2)


def problem(c_in: int, c_out: int, size: int, k: int, stride: int, activation: int) -> Problem:
    pad = k // 2
    geometry = Geometry(stride, stride, pad, pad, pad, pad, 1, 1)
    # Planned for a batch that fills the card.
    return Problem("separable", "cuda", torch.bfloat16, True, 64, c_in, size, size, 1, k, k, c_out, geometry,
                   (activation, 0, 0))  # fmt: skip


def forward(n: int, c: int, size: int, k: int, stride: int, load: Affine) -> tuple[launch.Launch, int, int]:
    """The launch, the values that it makes, and the bytes that must move."""
    made = problem(c, c, size, k, stride, load.activation)
    tile = fprop_tile(made, CARD)
    assert tile is not None
    x, weight = image(n, c, size), torch.randn(k * k, c).bfloat16()
    z = image(n, c, made.output_size[0])
    one = launch.depthwise_fprop(x, weight, z, (k, k), load, Affine(), made.geometry, tile)
    return one, z.numel(), 2 * (x.numel() + z.numel())


def backward(n: int, c: int, size: int, k: int, stride: int, load: Affine) -> tuple[launch.Launch, int, int]:
    made = problem(c, c, size, k, stride, load.activation)
    tile = backward_tile(made, CARD)
    assert tile is not None
    x, weight = image(n, c, size), torch.randn(k * k, c).bfloat16()
    dz, dx = image(n, c, made.output_size[0]), torch.empty_like(x)
    split = launch.backward_split(x, made.geometry, tile)
    share = -(-split.tiles * split.channel_blocks // 16)  # few programs, so that what each does once weighs little
    partials = torch.empty(split.programs(share), k * k + 2, c)
    one = launch.depthwise_backward(
        x, dz, weight, dx, partials, (k, k), load, made.geometry, True, False, tile, split, share
    )
    return one, x.numel(), 2 * (2 * x.numel() + dz.numel())


def fused(n: int, c_in: int, c_out: int, size: int, load: Affine) -> tuple[launch.Launch, int, int]:
    made = problem(c_in, c_out, size, 3, 1, load.activation)
    x, y, w_pw = image(n, c_in, size), image(n, c_out, size), torch.randn(c_out, c_in).bfloat16()
    tensors = launch.SeparableTensors(x, w_pw, y, torch.randn(9, c_in).bfloat16())
    tile = separable_plan(made, CARD, False).tile
    one = launch.separable_fprop(tensors, (3, 3), load, Affine(), Affine(), made.geometry, tile, False)
    return one, x.numel(), 2 * (x.numel() + y.numel())


def report(label: str, made: launch.Launch, values: int, moved: int) -> None:
    counts = (ctypes.c_uint64 * 16).in_dll(emulated.runtime(), "emulate_counts")
    ctypes.memset(counts, 0, ctypes.sizeof(counts))
    emulated.run(made, torch.device("cpu"))
    each = {kind: counts[list(ptx.KINDS).index(kind)] / values for kind in KINDS}
    clocks = sum(each.values()) * values / 32 / 4
    print(
        f"{label:34}{clocks / (moved / BYTES_A_CLOCK):7.2f}{sum(each.values()):7.1f}  "
        + "  ".join(f"{each[kind]:{len(kind)}.2f}" for kind in KINDS),
        flush=True,
    )


def main() -> None:
    print(f"{'bfloat16':34}{'issue':>7}{'all':>7}  " + "  ".join(KINDS))
    for n, c, size, k, stride in DEPTHWISE:
        for name, make in (("fprop", forward), ("bprop", backward)):
            for ending, code in (("", IDENTITY), ("relu", RELU)):
                load = Affine(None, None, code, 0.0)
                report(f"{name} {c}@{size} {k}x{k} /{stride} {ending}", *make(n, c, size, k, stride, load))
    for n, c_in, c_out, size in FUSED:
        vector = torch.randn(c_in)
        for ending, load in (
            ("", Affine()), ("relu", Affine(None, None, RELU, 0.0)), ("bn, relu", Affine(vector, vector, RELU, 0.0)),
        ):  # fmt: skip
            report(f"fused {c_in}->{c_out}@{size} {ending}", *fused(n, c_in, c_out, size, load))


if __name__ == "__main__":
    main()
