"""Microbenchmark of the CPU kernels: each stage of every separable layer of Xception beside this machine's limits."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import common
import torch
from micro import LAYERS, PLAIN, SAME

from xsep import dispatch, testing
from xsep.backends.base import Backend
from xsep.problem import IDENTITY, SeparableArgs, separable_problem

DESCRIPTION = """\
Times each stage of the CPU backend, the minimum of interleaved repetitions, and prints which share of the roofline it
reaches: the time that its bytes need at the speed of a large copy, or its multiply-adds at the speed of those in
registers, whichever is longer, divided by the time it took. Both limits are measured here, with as many threads.

A stage whose tensors stay in the caches can be faster than memory allows: more than 100 %.

Before anything is timed, each layer's forward and gradients are held against float64 (at most twice PyTorch's own
error, plus a few ulp). A layer that is wrong gets no figure and makes the exit code 1."""

STAGES = ("to NHWC", "depthwise", "pointwise", "fused", "wgrad", "depthwise backward")
PEAK_SECONDS = 0.2


def parser() -> common.Parser:
    made = common.Parser("bench_cpu", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--batch", type=int, default=2, help="pictures (default: 2)")
    add("--threads", type=int, help="threads (default: PyTorch's choice)")
    add("--rounds", type=int, default=7, help="timings of each call (default: 7)")
    add("--quick", action="store_true", help="two small layers, few repetitions")
    add("--out", type=Path, help="folder for the JSON (default: benchmarks/results/<cpu>/)")
    return made


def limits(dtype: torch.dtype) -> dict[str, float]:
    """Bytes/s of a copy and FLOP/s in registers, of depthwise (always float32) and of pointwise arithmetic."""
    pairs = dtype is torch.bfloat16 and torch.ops.xsep.cpu_has_bfloat16_dot()
    depthwise = max(torch.ops.xsep.cpu_peak(False, PEAK_SECONDS) for _ in range(3))
    pointwise = max(torch.ops.xsep.cpu_peak(pairs, PEAK_SECONDS) for _ in range(3))
    copied, _ = common.measure_limits(torch.device("cpu"), dtype)
    return {"bytes_per_second": copied, "depthwise_flops": depthwise, "pointwise_flops": pointwise}


def stages(backend: Backend, a: SeparableArgs, limit: dict[str, float]) -> dict[str, tuple[Callable[[], Any], float]]:
    """Of each stage what runs it, and the least time that bytes or arithmetic allow, in seconds."""
    n, c_in, h, w = a.x.shape
    c_out, size = a.w_pw.shape[0], a.x.element_size()
    x, y = n * c_in * h * w * size, n * c_out * h * w * size
    weights = c_in * c_out * size
    dw = 2 * 9 * n * c_in * h * w / limit["depthwise_flops"]
    pw = 2 * n * c_in * c_out * h * w / limit["pointwise_flops"]
    nchw = a.x.contiguous()
    dy = torch.randn(n, c_out, h, w).to(a.x.dtype).contiguous(memory_format=torch.channels_last)
    every = (True, True, False, False)

    def floor(moved: int, arithmetic: float) -> float:
        return max(moved / limit["bytes_per_second"], arithmetic)

    return {
        "to NHWC": (lambda: torch.ops.xsep.cpu_to_nhwc(nchw), floor(2 * x, 0.0)),
        "depthwise": (lambda: backend.depthwise(a.x, a.w_dw, PLAIN, PLAIN, SAME), floor(2 * x, dw)),
        "pointwise": (lambda: backend.pointwise_dgrad(dy, a.w_pw), floor(x + y + weights, pw)),
        "fused": (lambda: backend.separable_forward(a), floor(x + y + weights, dw + pw)),
        "wgrad": (lambda: backend.separable_wgrad(dy, a), floor(x + y + weights, dw + pw)),
        "depthwise backward": (
            lambda: backend.depthwise_backward_kernel(a.x, a.x, a.w_dw, PLAIN, SAME, every), floor(3 * x, 2 * dw),
        ),
    }  # fmt: skip


def arguments(n: int, c_in: int, c_out: int, size: int, dtype: torch.dtype) -> SeparableArgs:
    def draw(*shape: int, scale: float) -> torch.Tensor:
        return (torch.randn(*shape) * scale).to(dtype).contiguous(memory_format=torch.channels_last)

    x, no = draw(n, c_in, size, size, scale=1.0), None
    w_dw, w_pw = draw(c_in, 1, 3, 3, scale=1 / 3), draw(c_out, c_in, 1, 1, scale=c_in**-0.5)
    return SeparableArgs(x, w_dw, w_pw, no, no, no, no, no, no, no, no, list(SAME), [IDENTITY] * 3, [0.0] * 3)


def main(argv: Optional[list[str]] = None) -> int:
    options = parser().parse_args(argv)
    for name in ("batch", "threads", "rounds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise common.BenchmarkError(f"--{name} must be at least 1, got {value}")
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = common.DTYPES[options.dtype]
    layers = [(16, 24, 19, 1), (24, 32, 10, 25)] if options.quick else LAYERS
    batch, rounds = (1, 2) if options.quick else (options.batch, options.rounds)
    backend = dispatch.backend("cpu")
    reasons = backend.not_supported_reasons(separable_problem(arguments(1, 8, 8, 8, dtype)))
    if reasons:
        raise common.BenchmarkError("; ".join(reasons))
    device = torch.device("cpu")
    out = options.out or common.default_out(device)
    common.prepare_out(out)

    limit = limits(dtype)
    print(f"{common.cpu_name()}, {torch.get_num_threads()} threads, {options.dtype}, batch {batch}: copy "
          f"{limit['bytes_per_second'] / 1e9:.1f} GB/s, multiply-adds {limit['depthwise_flops'] / 1e9:.0f} GFLOP/s in "
          f"depthwise and {limit['pointwise_flops'] / 1e9:.0f} in pointwise arithmetic")  # fmt: skip
    print("milliseconds, and share of the roofline")
    print(f"{'layer':>17s}" + "".join(f"{stage:>19s}" for stage in STAGES))
    rows, failures = [], []
    for c_in, c_out, size, count in layers:
        name = f"{c_in}->{c_out} @{size}"
        try:
            testing.check(testing.Case(n=2, c_in=c_in, h=size, w=size, c_out=c_out, dtype=dtype), "cpu")
        except AssertionError as wrong:
            failures.append(f"{name}: {wrong}")
            print(f"{name:>17s}  WRONG: {wrong}", flush=True)
            continue
        with torch.no_grad():
            found = stages(backend, arguments(batch, c_in, c_out, size, dtype), limit)
            times = common.time_on_cpu({stage: call for stage, (call, _) in found.items()}, rounds, 0.0)
        row = {
            stage: {"us": times[stage]["us"], "floor_us": 1e6 * least, "share": 1e6 * least / times[stage]["us"]}
            for stage, (_, least) in found.items()
        }
        rows.append({"layer": name, "occurs": count, "stages": row})
        print(f"{name:>17s}" + "".join(f"{v['us'] / 1e3:12.3f} {v['share']:5.0%} " for v in row.values()), flush=True)
    record = {
        "benchmark": "cpu", "environment": common.environment(device), "dtype": options.dtype, "batch": batch,
        "figure": "minimum of interleaved repetitions", "limits": limit, "failures": failures, "layers": rows,
    }  # fmt: skip
    with common.whole_files(out) as temporary:
        common.write_json(temporary(f"cpu-{options.dtype}.json"), record)
    print(f"written: {out / f'cpu-{options.dtype}.json'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(common.run("bench_cpu", main))
