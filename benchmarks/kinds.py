"""Where the time of a step goes, by kind of layer, from PyTorch's profiler."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, Optional

import torch

# The profiler else logs its start and its stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

SEPARABLE, DEPTHWISE, POINTWISE, REGULAR = "separable", "depthwise", "1x1 conv", "other conv"
NORM, POOL, ELEMENTWISE, HEAD, UPDATE, REST = "BatchNorm", "pooling", "ReLU/sum/cat", "head", "update", "rest"
KINDS = (SEPARABLE, DEPTHWISE, POINTWISE, REGULAR, NORM, POOL, ELEMENTWISE, HEAD, UPDATE, REST)

#: What an operator's or an autograd node's name says; the first that fits.
NAMES = (
    (SEPARABLE, r"xsep::.*|Eager(Backward)?|torch::autograd::CppNode<xsep::.*|.*[sS]eparable.*Backward.*"),
    (UPDATE, r"Optimizer\.step.*"),
    (NORM, r"aten::.*batch_norm.*"),
    (POOL, r"aten::.*(max|avg)_pool.*"),
    (HEAD, r"aten::(linear|addmm|mm|mean|cross_entropy_loss|.*softmax.*|nll_loss.*)"),
    (ELEMENTWISE, r"aten::(relu_?|clamp_min_?|threshold_backward|add_?|mul_?|cat|narrow|slice_backward)"),
)
CONVOLUTIONS = {"aten::conv2d": 1, "aten::convolution": 1, "aten::convolution_backward": 2}  # which input is the weight


def kind_of(event: Any) -> Optional[str]:
    """The kind of layer an operator belongs to; None where its name does not tell."""
    if event.name in CONVOLUTIONS:
        weight = event.input_shapes[CONVOLUTIONS[event.name]]
        if len(weight) != 4:
            return REGULAR
        c_out, per_group, r, s = weight
        if per_group == 1 and c_out > 1:
            return DEPTHWISE
        return POINTWISE if (r, s) == (1, 1) else REGULAR
    return next((kind for kind, pattern in NAMES if re.fullmatch(pattern, event.name)), None)


def profile_step(step: Callable[[], Any], model: torch.nn.Module, gpu: bool) -> tuple[dict[str, float], int]:
    """Seconds by kind (of the card's on a GPU, else of the CPU's), and the peak of what the step allocates, in bytes.

    An operator counts where it is the outermost one of a known kind; what none covers is the rest. Gradients that a
    step before left are dropped first.
    """
    model.zero_grad(set_to_none=True)
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        model.zero_grad(set_to_none=True)
        peak = torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if gpu else [])]
    with torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=not gpu) as profile:
        with torch.profiler.record_function("whole step"):
            step()
        if gpu:
            torch.cuda.synchronize()
    if not gpu:
        now = peak = 0
        recorded = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(recorded, key=lambda e: e.start_ns()):
            now += event.nbytes()
            peak = max(peak, now)

    def microseconds(event: Any) -> float:
        return float(event.device_time_total if gpu else event.cpu_time_total)

    seconds = dict.fromkeys(KINDS, 0.0)
    whole = 0.0
    for event in profile.events() or []:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        parents = []
        parent = event.cpu_parent
        while parent is not None:
            parents.append(parent)
            parent = parent.cpu_parent
        if not parents:
            whole += microseconds(event)
        kind = kind_of(event)
        if kind is not None and all(kind_of(p) is None for p in parents):
            seconds[kind] += 1e-6 * microseconds(event)
    seconds[REST] = max(1e-6 * whole - sum(seconds.values()), 0.0)
    return seconds, peak
