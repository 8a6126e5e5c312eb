"""Which backend runs which problem, and why the others do not."""

from __future__ import annotations

import os
from functools import cache, lru_cache
from typing import Optional

import torch

from .backends.aten import ATEN
from .backends.base import Backend
from .problem import Problem

#: What ``auto`` tries, in order, for each kind of device; elsewhere it is ``aten``. The GPU backends join once their
#: kernels have been verified and measured on a card: until then they run where they are asked for.
AUTO = {"cpu": ("cpu", "aten"), "cuda": ("aten",)}

NAMES = ("cuda", "triton", "cpu", "aten")


@cache
def backend(name: str) -> Backend:
    """The backend of that name; loading one never fails, it answers with reasons instead."""
    if name == "aten":
        return ATEN
    if name == "cpu":
        from .backends.cpu import CPU

        return CPU
    if name == "triton":
        from .backends.triton import TRITON

        return TRITON
    if name == "cuda":
        from .backends.cuda import CUDA

        return CUDA
    raise ValueError(f"no backend is called {name!r}; there are {', '.join(NAMES)}")


def requested(name: str) -> str:
    """``auto`` replaced by the environment variable XSEP_BACKEND where that is set."""
    if name != "auto":
        return name
    wish = os.environ.get("XSEP_BACKEND", "")
    if wish in ("", "auto"):
        return "auto"
    if wish not in NAMES:
        raise ValueError(f"XSEP_BACKEND must be auto or one of {', '.join(NAMES)}, got {wish!r}")
    return wish


@lru_cache(maxsize=4096)
def _select(problem: Problem, name: str) -> Backend:
    if name != "auto":
        chosen = backend(name)
        reasons = chosen.not_supported_reasons(problem)
        if reasons:
            raise RuntimeError(f"backend {name!r} cannot run {problem}: {'; '.join(reasons)}")
        return chosen
    for candidate in AUTO.get(problem.device, ("aten",)):
        chosen = backend(candidate)
        if not chosen.not_supported_reasons(problem):
            return chosen
    return ATEN


def select(problem: Problem, name: str) -> Backend:
    """The backend that runs the problem.

    Raises:
        RuntimeError: a backend was asked for by name, by argument or by XSEP_BACKEND, and cannot run the problem;
            the message carries all its reasons.
    """
    return _select(problem, requested(name))


def work(problem: Problem) -> tuple[int, int]:
    """(bytes, FLOPs) that no way of running the forward can go below.

    Bytes: x, the weights and y once each, z never. FLOPs: two a multiply-add of both convolutions.
    """
    p, q = problem.output_size
    size = torch.empty((), dtype=problem.dtype).element_size()
    pixels = problem.n * p * q
    weights = problem.c_mid * problem.r * problem.s
    flops = 2 * pixels * weights
    if problem.op == "separable":
        weights += problem.c_mid * problem.c_out
        flops += 2 * pixels * problem.c_mid * problem.c_out
    moved = problem.n * problem.c_in * problem.h * problem.w + pixels * problem.c_out + weights
    return moved * size, flops


def explain(problem: Problem, name: str = "auto") -> str:
    """What runs the problem, the floor it is held against, and why each other backend was passed over."""
    wish = requested(name)
    lines = [str(problem)]
    chosen: Optional[Backend] = None
    try:
        chosen = _select(problem, wish)
        lines.append(f"  runs on   {chosen.name}: {chosen.plan(problem)}")
    except RuntimeError as refusal:
        lines.append(f"  runs on   nothing: {refusal}")
    moved, flops = work(problem)
    lines.append(f"  floor     {moved / 1e6:.2f} MB through memory and {flops / 1e9:.3f} GFLOP, forward")
    for other in NAMES:
        candidate = backend(other)
        if candidate is chosen:
            continue
        reasons = candidate.not_supported_reasons(problem)
        if reasons:
            why = "; ".join(reasons)
        elif wish != "auto":
            why = f"could run, but {wish} was asked for"
        elif other in ("cuda", "triton"):
            why = "could run, but is not chosen by itself before it has been verified and measured on a card"
        else:
            why = "could run, but another backend comes first"
        lines.append(f"  not {other:<7}{why}")
    return "\n".join(lines)
