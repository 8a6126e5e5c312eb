"""Microbenchmark of the Triton kernels on the card at hand, behind a correctness gate."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Optional

import common
import torch
from torch import Tensor

from xsep import testing
from xsep.backends import triton as backend
from xsep.backends.triton import TRITON
from xsep.problem import IDENTITY, Affine, Geometry, SeparableArgs, separable_problem

DESCRIPTION = """\
Times the Triton kernels on every separable layer of Xception at 299 px, each figure the median of CUDA-event times with
the L2 cache flushed before each.

Depthwise kernels: bytes a second, and the share of the speed of a device copy of as many bytes. Separable forward, once
with the fused kernel and once staged: FLOP a second of its pointwise part, the share of the speed of a matrix product
of that shape, and the time over the floor (the larger of bytes over the copy's bandwidth and FLOP over the product's
rate). The time is that of the backend's call: it includes the small copies of the weights that it makes.

Before anything is timed, each layer's forward and gradients are held against float64 on two pictures (at most twice
PyTorch's own error, plus a few ulp). A layer that is wrong gets no figure and makes the exit code 1."""

#: C_in, C_out, height and width, how often in the network (Chollet 2017, arXiv:1610.02357, figure 5).
LAYERS = [
    (64, 128, 147, 1), (128, 128, 147, 1), (128, 256, 74, 1), (256, 256, 74, 1), (256, 728, 37, 1), (728, 728, 37, 1),
    (728, 728, 19, 25), (728, 1024, 19, 1), (1024, 1536, 10, 1), (1536, 2048, 10, 1),
]  # fmt: skip
SAME = Geometry(1, 1, 1, 1, 1, 1, 1, 1)
PLAIN = Affine()
Call = Callable[[], object]


def layer_args(c_in: int, c_out: int, size: int, batch: int, dtype: torch.dtype) -> SeparableArgs:
    """Random inputs of one layer on the device, channels_last."""
    x = torch.randn(batch, c_in, size, size, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)
    w_dw = (torch.randn(c_in, 1, 3, 3, device="cuda") / 3).to(dtype)
    w_pw = (torch.randn(c_out, c_in, 1, 1, device="cuda") / c_in**0.5).to(dtype)
    no = None
    return SeparableArgs(
        x, w_dw, w_pw, no, no, no, no, no, no, no, no, list(SAME), [IDENTITY] * 3, [0.0] * 3
    )  # fmt: skip


def gate(c_in: int, c_out: int, size: int, dtype: torch.dtype) -> list[str]:
    """What is wrong with this layer on two pictures: sentences, none where all is well."""
    case = testing.Case(n=2, c_in=c_in, h=size, w=size, c_out=c_out, dtype=dtype)
    try:
        testing.check(case, "triton", "cuda")
    except AssertionError as wrong:
        return [str(wrong)]
    return []


def planned(a: SeparableArgs, fused: bool) -> Callable[[], Tensor]:
    """The forward by one plan, whatever the planner would choose."""
    chosen = backend.separable_plan

    def run() -> Tensor:
        backend.separable_plan = lambda *key: replace(chosen(*key), fused=fused)  # type: ignore[assignment]
        try:
            return TRITON.separable_forward(a)
        finally:
            backend.separable_plan = chosen

    return run


def depthwise_calls(a: SeparableArgs) -> dict[str, tuple[int, Call]]:
    """By name: how many tensors of x's size the kernel has to move, and the call."""
    dz = torch.randn_like(a.x)

    def backward(*wanted: bool) -> Call:
        return lambda: TRITON.depthwise_backward_kernel(dz, a.x, a.w_dw, PLAIN, SAME, wanted)

    return {
        "fprop": (2, lambda: TRITON.depthwise(a.x, a.w_dw, PLAIN, PLAIN, SAME)),
        "dgrad": (2, backward(True, False, False, False)),
        "wgrad": (2, backward(False, True, False, False)),
        "dgrad+wgrad": (3, backward(True, True, False, False)),
    }


def measure(a: SeparableArgs, rounds: int) -> dict[str, Any]:
    """Times of one layer, and what they are shares of."""
    n, c_in, h, w = a.x.shape
    c_out, size = a.w_pw.shape[0], a.x.element_size()
    depthwise = depthwise_calls(a)
    rows, weights = a.x.permute(0, 2, 3, 1).reshape(-1, c_in), a.w_pw.view(c_out, c_in).t()
    sources = {tensors: torch.empty(tensors * a.x.numel() // 2, device="cuda", dtype=a.x.dtype) for tensors in (2, 3)}
    targets = {tensors: torch.empty_like(source) for tensors, source in sources.items()}
    calls: dict[str, Callable[[], Any]] = {name: call for name, (_, call) in depthwise.items()}
    for tensors, source in sources.items():
        calls[f"copy {tensors}"] = partial(targets[tensors].copy_, source)
    calls |= {"fused": planned(a, True), "staged": planned(a, False), "matmul": lambda: torch.mm(rows, weights)}
    times = common.time_on_gpu(calls, rounds)
    found: dict[str, Any] = {"plan": TRITON.plan(separable_problem(a)), "times": times}
    for name, (tensors, _) in depthwise.items():
        found[name] = {
            "terabytes_per_second": tensors * a.x.numel() * size / times[name]["us"] / 1e6,
            "share_of_copy": times[f"copy {tensors}"]["us"] / times[name]["us"],
        }
    flop, moved = 2 * n * h * w * c_in * c_out, n * h * w * (c_in + c_out) * size
    bandwidth = 2 * a.x.numel() * size / times["copy 2"]["us"]
    floor = max(moved / bandwidth, times["matmul"]["us"])
    for name in ("fused", "staged"):
        found[name] = {
            "teraflops": flop / times[name]["us"] / 1e6,
            "share_of_matmul": times["matmul"]["us"] / times[name]["us"],
            "over_floor": times[name]["us"] / floor,
        }
    return found


def line(name: str, found: dict[str, Any]) -> str:
    times = found["times"]
    shares = "".join(
        f"{times[k]['us']:9.1f} {found[k]['share_of_copy']:5.0%}" for k in ("fprop", "dgrad", "wgrad", "dgrad+wgrad")
    )
    plans = "".join(
        f"{times[k]['us']:9.1f} {found[k]['share_of_matmul']:5.0%} {found[k]['over_floor']:5.2f}"
        for k in ("fused", "staged")
    )
    return f"{name:>18s}{shares}{plans}  {found['plan'].partition(',')[0]}"


def main(argv: Optional[list[str]] = None) -> int:
    parser = common.Parser(
        "bench_triton.py", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=list(common.DTYPES), default="bfloat16")
    parser.add_argument("--batch", type=int, default=64, help="pictures (default 64)")
    parser.add_argument("--rounds", type=int, default=30, help="timings of each call (default 30)")
    parser.add_argument("--out", type=Path, help="folder for triton.json (default: benchmarks/results/<card>/)")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise common.BenchmarkError("bench_triton.py needs a GPU, and PyTorch sees none here")
    dtype, device = common.DTYPES[options.dtype], torch.device("cuda")
    reasons = TRITON.not_supported_reasons(separable_problem(layer_args(8, 8, 8, 1, dtype)))
    if reasons:
        raise common.BenchmarkError("; ".join(reasons))
    out = options.out or common.default_out(device)
    common.prepare_out(out)
    print(f"{common.device_name(device)}, {options.dtype}, batch {options.batch}")
    print("microseconds; share of copy or of matmul; time over the floor")
    heads = "".join(f"{k:>15s}" for k in ("fprop", "dgrad", "wgrad", "dgrad+wgrad"))
    print(f"{'layer':>18s}{heads}{'fused':>21s}{'staged':>21s}  chosen")
    layers, failed = [], False
    for c_in, c_out, size, count in LAYERS:
        name = f"{c_in}->{c_out} @{size} x{count}"
        wrong = gate(c_in, c_out, size, dtype)
        if wrong:
            failed = True
            print(f"{name:>18s} WRONG: {'; '.join(wrong)}")
            continue
        found = measure(layer_args(c_in, c_out, size, options.batch, dtype), options.rounds)
        layers.append({"layer": name, "occurs": count, **found})
        print(line(name, found), flush=True)
    record = {"environment": common.environment(device), "dtype": options.dtype, "batch": options.batch}
    common.write_json(out / "triton.json", {**record, "layers": layers})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(common.run("bench_triton.py", main))
