"""Microbenchmark of the CUDA kernels on the card at hand, behind a correctness gate.

    python benchmarks/bench_cuda.py [--dtype bfloat16] [--batch 64] [--json results.json]

For every separable layer of Xception at 299 pixels: bytes a second of each depthwise kernel as a share of a device copy
of the same number of bytes, and floating point operations a second of the fused forward as a share of a matrix product
of the pointwise convolution's shape. Each figure is the median of CUDA event timings with the L2 cache flushed before
each, with the 20th and 80th percentile beside it. A layer whose result is wrong gets no figure, and makes the exit
status 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xsep.backends.aten import ATEN
from xsep.backends.cuda import CUDA
from xsep.problem import IDENTITY, Affine, Geometry, SeparableArgs, separable_problem

#: C_in, C_out, height and width, how often in the network (Chollet 2017, arXiv:1610.02357, figure 5).
LAYERS = [
    (64, 128, 147, 1), (128, 128, 147, 1), (128, 256, 74, 1), (256, 256, 74, 1), (256, 728, 37, 1), (728, 728, 37, 1),
    (728, 728, 19, 25), (728, 1024, 19, 1), (1024, 1536, 10, 1), (1536, 2048, 10, 1),
]  # fmt: skip
SAME = Geometry(1, 1, 1, 1, 1, 1, 1, 1)
PLAIN = Affine()


class Timing(NamedTuple):
    """Microseconds."""

    median: float
    p20: float
    p80: float


def time_us(run: Callable[[], object], repeats: int, flush: Tensor) -> Timing:
    """CUDA event timings of run, the L2 cache flushed before each."""
    for _ in range(3):
        run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, stop in events:
        flush.zero_()
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(stop) * 1e3 for start, stop in events)
    return Timing(statistics.median(times), times[len(times) // 5], times[len(times) * 4 // 5])


def layer_args(c_in: int, c_out: int, size: int, batch: int, dtype: torch.dtype) -> SeparableArgs:
    """Random inputs of one layer on the device, channels_last."""
    x = torch.randn(batch, c_in, size, size, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)
    w_dw = torch.randn(c_in, 1, 3, 3, device="cuda", dtype=dtype) / 3
    w_pw = torch.randn(c_out, c_in, 1, 1, device="cuda", dtype=dtype) / c_in**0.5
    no = None
    return SeparableArgs(
        x, w_dw, w_pw, no, no, no, no, no, no, no, no, list(SAME), [IDENTITY] * 3, [0.0] * 3
    )  # fmt: skip


def is_right(ours: Tensor, theirs: Tensor, truth: Tensor) -> bool:
    """At most twice PyTorch's error, and an ulp of the largest result."""
    allowed = 2 * (theirs.double() - truth).abs().max() + torch.finfo(ours.dtype).eps * truth.abs().max()
    return bool((ours.double() - truth).abs().max() <= allowed)


def gate(a: SeparableArgs) -> list[str]:
    """Which kernels are wrong on two pictures of this layer."""
    small = a._replace(x=a.x[:2].contiguous(memory_format=torch.channels_last))
    exact = small._replace(x=small.x.double(), w_dw=small.w_dw.double(), w_pw=small.w_pw.double())
    wrong = []
    z, z_exact = (ATEN.depthwise(t.x, t.w_dw, PLAIN, PLAIN, SAME) for t in (small, exact))
    if not is_right(CUDA.depthwise(small.x, small.w_dw, PLAIN, PLAIN, SAME), z, z_exact):
        wrong.append("depthwise forward")
    dz, wanted = torch.randn_like(z), (True, True, False, False)
    ours = CUDA.depthwise_backward_kernel(dz, small.x, small.w_dw, PLAIN, SAME, wanted)
    theirs = ATEN.depthwise_backward_kernel(dz, small.x, small.w_dw, PLAIN, SAME, wanted)
    truth = ATEN.depthwise_backward_kernel(dz.double(), exact.x, exact.w_dw, PLAIN, SAME, wanted)
    for name, mine, peer, right in zip(("dx", "dw_dw"), ours, theirs, truth):
        assert mine is not None and peer is not None and right is not None
        if not is_right(mine, peer, right):
            wrong.append(f"depthwise backward, {name}")
    if not is_right(CUDA.separable_forward(small), ATEN.separable_forward(small), ATEN.separable_forward(exact)):
        wrong.append("separable forward")
    return wrong


def measure(a: SeparableArgs, repeats: int, flush: Tensor) -> dict[str, Any]:
    """Shares of the device's own speed for one layer."""
    z = CUDA.depthwise(a.x, a.w_dw, PLAIN, PLAIN, SAME)
    n, c_in, p, q = z.shape
    c_out = a.w_pw.shape[0]

    def share_of_copy(tensors: int, run: Callable[[], object]) -> dict[str, Any]:
        """tensors: how many of x's size the kernel reads and writes; the copy moves as many bytes."""
        source = torch.empty(tensors * a.x.numel() // 2, device="cuda", dtype=a.x.dtype)
        target = torch.empty_like(source)
        copy, ours = time_us(lambda: target.copy_(source), repeats, flush), time_us(run, repeats, flush)
        moved = tensors * a.x.numel() * a.x.element_size()
        return {
            "us": ours,
            "terabytes_per_second": moved / ours.median / 1e6,
            "share_of_copy": copy.median / ours.median,
        }

    rows, weights = z.permute(0, 2, 3, 1).reshape(-1, c_in), a.w_pw.view(c_out, c_in).t()
    product = time_us(lambda: torch.mm(rows, weights), repeats, flush)
    separable = time_us(lambda: CUDA.separable_forward(a), repeats, flush)
    operations = 2 * n * p * q * c_out * c_in
    every = (True, True, False, False)
    return {
        "plan": CUDA.plan(separable_problem(a)),
        "depthwise_forward": share_of_copy(2, lambda: CUDA.depthwise(a.x, a.w_dw, PLAIN, PLAIN, SAME)),
        "depthwise_backward": share_of_copy(
            3, lambda: CUDA.depthwise_backward_kernel(z, a.x, a.w_dw, PLAIN, SAME, every)
        ),
        "separable_forward": {
            "us": separable,
            "teraflops": operations / separable.median / 1e6,
            "share_of_matmul": product.median / separable.median,
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--batch", type=int, default=64, help="pictures")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_cuda.py needs an NVIDIA GPU, and PyTorch sees none here.")
        return 0
    dtype = getattr(torch, options.dtype)
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    card = torch.cuda.get_device_name()
    print(f"{card}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}, {options.dtype}, batch {options.batch}")
    print(f"{'layer':>18s} {'dw forward':>16s} {'dw backward':>16s} {'separable':>20s}  plan")
    results, failed = [], False
    for c_in, c_out, size, count in LAYERS:
        a = layer_args(c_in, c_out, size, options.batch, dtype)
        name = f"{c_in}->{c_out} @{size} x{count}"
        reasons = CUDA.not_supported_reasons(separable_problem(a))
        if reasons:
            print(f"{name:>18s} not run: {'; '.join(reasons)}")
            return 1
        wrong = gate(a)
        if wrong:
            failed = True
            print(f"{name:>18s} WRONG: {', '.join(wrong)}")
            continue
        found = measure(a, options.repeats, flush)
        results.append({"layer": name, **found})
        forward, backward, whole = (
            found[k] for k in ("depthwise_forward", "depthwise_backward", "separable_forward")
        )  # fmt: skip
        print(
            f"{name:>18s} {forward['us'].median:7.1f} us {forward['share_of_copy']:5.0%} "
            f"{backward['us'].median:7.1f} us {backward['share_of_copy']:5.0%} "
            f"{whole['us'].median:7.1f} us {whole['teraflops']:4.0f} TF {whole['share_of_matmul']:4.0%}  "
            f"{found['plan']}"
        )
    print("Depthwise: share of the speed of a device copy. Separable: share of the speed of a matrix product.")
    if options.json:
        head = {"card": card, "torch": torch.__version__, "cuda": torch.version.cuda, "dtype": options.dtype}
        options.json.write_text(json.dumps({**head, "batch": options.batch, "layers": results}, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
