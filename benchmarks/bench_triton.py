"""Microbenchmark of the Triton kernels on the card at hand, behind a correctness gate."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Optional

import common
import micro
import torch
from micro import PLAIN, SAME
from torch import Tensor

from xsep.backends import triton as backend
from xsep.problem import SeparableArgs, separable_problem

DESCRIPTION = """\
Times the Triton kernels on every separable layer of Xception at 299 px, each figure the median of CUDA-event times with
the L2 cache flushed before each.

Depthwise kernels: bytes a second, and the share of the speed of a device copy of as many bytes. Separable forward, once
with the fused kernel and once staged: FLOP a second of its pointwise part, the share of the speed of a matrix product
of that shape, and the time over the floor (the larger of bytes over the copy's bandwidth and FLOP over the product's
rate). The time is that of the backend's call: it includes the small copies of the weights that it makes.

Before anything is timed, what is timed is held against float64 on the same tensors (at most twice PyTorch's own error,
plus a few ulp; of TF32 for float32 products, where PyTorch's settings allow it), both plans too. A layer that is wrong
gets no figure and makes the exit code 1."""

Call = Callable[[], object]


def planned(session: micro.Session, a: SeparableArgs, fused: bool) -> Callable[[], Tensor]:
    """The forward by one plan, whatever the planner would choose."""
    chosen = backend.separable_plan
    if not session.gpu:
        return lambda: session.backend.separable_forward(a)

    def run() -> Tensor:
        backend.separable_plan = lambda *key: replace(chosen(*key), fused=fused)  # type: ignore[assignment]
        try:
            return session.backend.separable_forward(a)
        finally:
            backend.separable_plan = chosen

    return run


def ways(session: micro.Session, a: SeparableArgs) -> micro.Ways:
    return {"fused": planned(session, a, True), "staged": planned(session, a, False)}


def depthwise_calls(session: micro.Session, a: SeparableArgs, dz: Tensor) -> dict[str, tuple[int, Call]]:
    """By name: how many tensors of x's size the kernel has to move, and the call."""
    ours = session.backend

    def backward(*wanted: bool) -> Call:
        return lambda: ours.depthwise_backward_kernel(dz, a.x, a.w_dw, PLAIN, SAME, wanted)

    return {
        "fprop": (2, lambda: ours.depthwise(a.x, a.w_dw, PLAIN, PLAIN, SAME)),
        "dgrad": (2, backward(True, False, False, False)),
        "wgrad": (2, backward(False, True, False, False)),
        "dgrad+wgrad": (3, backward(True, True, False, False)),
    }


def measure(session: micro.Session, a: SeparableArgs, dz: Tensor) -> dict[str, Any]:
    """Times of one layer, and what they are shares of."""
    n, c_in, h, w = a.x.shape
    c_out, size = a.w_pw.shape[0], a.x.element_size()
    depthwise = depthwise_calls(session, a, dz)
    rows, weights = a.x.permute(0, 2, 3, 1).reshape(-1, c_in), a.w_pw.view(c_out, c_in).t()
    sources = {
        tensors: torch.empty(tensors * a.x.numel() // 2, device=a.x.device, dtype=a.x.dtype) for tensors in (2, 3)
    }
    targets = {tensors: torch.empty_like(source) for tensors, source in sources.items()}
    calls: dict[str, Callable[[], Any]] = {name: call for name, (_, call) in depthwise.items()}
    for tensors, source in sources.items():
        calls[f"copy {tensors}"] = partial(targets[tensors].copy_, source)
    calls |= {**ways(session, a), "matmul": lambda: torch.mm(rows, weights)}
    times = session.time(calls)
    found: dict[str, Any] = {"plan": session.backend.plan(separable_problem(a)), "times": times}
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
    session = micro.Session("triton", micro.parser("bench_triton", DESCRIPTION).parse_args(argv))
    print(micro.head(session))
    print("microseconds; share of copy or of matmul; time over the floor")
    heads = "".join(f"{k:>15s}" for k in ("fprop", "dgrad", "wgrad", "dgrad+wgrad"))
    print(f"{'layer':>18s}{heads}{'fused':>21s}{'staged':>21s}  chosen")
    return session.run(lambda a, dz: measure(session, a, dz), line, lambda a: ways(session, a))


if __name__ == "__main__":
    sys.exit(common.run("bench_triton", main))
