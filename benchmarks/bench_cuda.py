"""Microbenchmark of the CUDA kernels on the card at hand, behind a correctness gate."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Optional

import common
import micro
import torch
from micro import DW_PW, PLAIN, SAME
from torch import Tensor

from xsep.problem import SeparableArgs, separable_problem

DESCRIPTION = """\
Times the CUDA kernels on every separable layer of Xception at 299 px, each figure the median of CUDA-event times with
the L2 cache flushed before each.

Depthwise kernels, and the gradient of the pointwise weights, for which z is made again: bytes a second of what has to
move, and the share of the speed of a device copy of as many bytes. Separable forward: FLOP a second of its pointwise
part, and the share of the speed of a matrix product of that shape.

Before anything is timed, what is timed is held against float64 on the same tensors (at most twice PyTorch's own error,
plus a few ulp; of TF32 for float32 products, where PyTorch's settings allow it). A layer that is wrong gets no figure
and makes the exit code 1."""


def measure(session: micro.Session, a: SeparableArgs, dz: Tensor) -> dict[str, Any]:
    """Times of one layer, and what they are shares of."""
    backend = session.backend
    z = backend.depthwise(a.x, a.w_dw, PLAIN, PLAIN, SAME)
    n, c_in, p, q = z.shape
    c_out, size = a.w_pw.shape[0], a.x.element_size()
    rows, weights = z.permute(0, 2, 3, 1).reshape(-1, c_in), a.w_pw.view(c_out, c_in).t()
    every, dy = (True, True, False, False), micro.upstream(a)
    calls: dict[str, Callable[[], Any]] = {
        "depthwise_forward": lambda: backend.depthwise(a.x, a.w_dw, PLAIN, PLAIN, SAME),
        "depthwise_backward": lambda: backend.depthwise_backward_kernel(dz, a.x, a.w_dw, PLAIN, SAME, every),
        "pointwise_wgrad": lambda: backend.separable_backward(dy, a, None, DW_PW),
        "separable_forward": lambda: backend.separable_forward(a),
        "matmul": lambda: torch.mm(rows, weights),
    }
    moved = {"depthwise_forward": 2 * a.x.numel(), "depthwise_backward": 3 * a.x.numel(),
             "pointwise_wgrad": a.x.numel() + dy.numel()}  # fmt: skip
    for name, count in moved.items():
        source = torch.empty(count // 2, device=a.x.device, dtype=a.x.dtype)
        calls[f"copy for {name}"] = partial(torch.empty_like(source).copy_, source)
    times = session.time(calls)
    found: dict[str, Any] = {"plan": backend.plan(separable_problem(a)), "times": times}
    for name, count in moved.items():
        found[name] = {
            "terabytes_per_second": count * size / times[name]["us"] / 1e6,
            "share_of_copy": times[f"copy for {name}"]["us"] / times[name]["us"],
        }
    found["separable_forward"] = {
        "teraflops": 2 * n * p * q * c_out * c_in / times["separable_forward"]["us"] / 1e6,
        "share_of_matmul": times["matmul"]["us"] / times["separable_forward"]["us"],
    }
    return found


def line(name: str, found: dict[str, Any]) -> str:
    times, whole = found["times"], found["separable_forward"]
    depthwise = "".join(
        f" {times[k]['us']:9.1f} us {found[k]['share_of_copy']:5.0%}"
        for k in ("depthwise_forward", "depthwise_backward", "pointwise_wgrad")
    )
    return (
        f"{name:>18s}{depthwise} {times['separable_forward']['us']:9.1f} us {whole['teraflops']:4.0f} TF "
        f"{whole['share_of_matmul']:4.0%}  {found['plan']}"
    )


def main(argv: Optional[list[str]] = None) -> int:
    session = micro.Session("cuda", micro.parser("bench_cuda", DESCRIPTION).parse_args(argv))
    print(micro.head(session))
    print("depthwise, dw_pw: microseconds, share of a copy's speed; separable: share of a matrix product's speed")
    print(f"{'layer':>18s} {'dw forward':>18s} {'dw backward':>18s} {'dw_pw':>18s} {'separable':>25s}  plan")
    return session.run(lambda a, dz: measure(session, a, dz), line, lambda a: {})


if __name__ == "__main__":
    sys.exit(common.run("bench_cuda", main))
