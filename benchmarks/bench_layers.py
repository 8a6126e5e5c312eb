"""Layers of networks that people have on a CPU, separable or depthwise alone: xsep against PyTorch, layer by layer."""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Optional

import common
import torch
import torch.nn.functional as F

import xsep
from xsep import testing

DESCRIPTION = """\
Times two of PyTorch's convolutions and xsep's one call, as `auto` runs it, on the separable layers of MobileNet V1 to
V3, EfficientNet-B0, MnasNet, Xception and DeepLab and on some beyond them, and prints PyTorch's time divided by xsep's:
above 1 xsep is faster. With --op depthwise it is their depthwise convolutions alone, one call against one. Calls take
turns, and the least time of each counts: on one thread of the processor's time, so that what else the machine does
disturbs little; on several of time.

Before anything is timed, each layer's forward and gradients are held against float64 (at most twice PyTorch's own
error, plus a few ulp). A layer that is wrong gets no figure and makes the exit code 1."""


class Layer(NamedTuple):
    c_in: int
    c_out: int  # 0: the depthwise convolution alone
    size: int  # height and width
    filter: int = 3
    stride: int = 1
    dilation: int = 1

    @property
    def padding(self) -> int:
        return self.dilation * (self.filter // 2)

    def __str__(self) -> str:
        dilated = f", dilation {self.dilation}" if self.dilation > 1 else ""
        channels = f"{self.c_in}->{self.c_out}" if self.c_out else f"{self.c_in}"
        return f"{channels} @{self.size}, {self.filter}x{self.filter}, stride {self.stride}{dilated}"


NETWORKS: dict[str, list[tuple[int, ...]]] = {
    "mobilenet_v1": [
        (32, 64, 112), (64, 128, 112, 3, 2), (128, 128, 56), (128, 256, 56, 3, 2), (256, 256, 28), (256, 512, 28, 3, 2),
        (512, 512, 14), (512, 1024, 14, 3, 2), (1024, 1024, 7),
    ],
    "mobilenet_v2": [
        (32, 16, 112), (96, 24, 112, 3, 2), (144, 24, 56), (144, 32, 56, 3, 2), (192, 32, 28), (192, 64, 28, 3, 2),
        (384, 64, 14), (384, 96, 14), (576, 96, 14), (576, 160, 14, 3, 2), (960, 160, 7), (960, 320, 7),
    ],
    "mobilenet_v3": [
        (16, 16, 112), (64, 24, 112, 3, 2), (72, 24, 56), (72, 40, 56, 5, 2), (120, 40, 28, 5), (240, 80, 28, 3, 2),
        (200, 80, 14), (480, 112, 14), (672, 160, 14, 5, 2), (960, 160, 7, 5),
    ],
    "efficientnet_b0": [
        (144, 40, 56, 5, 2), (240, 40, 28, 5), (480, 80, 14), (480, 112, 14, 5), (672, 112, 14, 5),
        (672, 192, 14, 5, 2), (1152, 192, 7, 5), (1152, 320, 7),
    ],
    "mnasnet": [(48, 24, 112, 3, 2), (240, 80, 28, 5, 2), (480, 96, 14), (576, 192, 14, 5, 2), (144, 16, 56, 3, 2)],
    "xception": [
        (64, 128, 147), (128, 128, 147), (128, 256, 74), (256, 256, 74), (256, 728, 37), (728, 728, 37),
        (728, 728, 19), (728, 1024, 19), (1024, 1536, 10), (1536, 2048, 10),
    ],
    "deeplab": [
        (256, 256, 65), (304, 256, 65), (2048, 256, 33, 3, 1, 6), (2048, 256, 33, 3, 1, 12), (728, 728, 33, 3, 1, 2),
        (1024, 1536, 33, 3, 1, 2), (320, 256, 33, 3, 1, 12),
    ],
    "others": [
        (32, 1280, 14, 5), (64, 64, 14, 7), (96, 96, 14, 7, 2), (96, 192, 14, 5, 2), (160, 160, 7, 7),
        (64, 128, 28, 7, 2), (24, 24, 224), (16, 32, 64, 7), (3, 32, 224, 3, 2), (384, 384, 14, 7), (1, 16, 112),
        (12, 24, 56),
    ],
}  # fmt: skip
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
DIRECTIONS = ("forward", "training")
QUICK = [Layer(16, 24, 10), Layer(8, 12, 9, 5, 2)]


def parser() -> common.Parser:
    made = common.Parser("bench_layers", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--op", choices=("separable", "depthwise"), default="separable")
    add("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    add("--dtype", nargs="+", choices=list(common.DTYPES), default=["float32"])
    add("--layout", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    add("--direction", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS), help="training: forward and backward")
    add("--batch", nargs="+", type=int, default=[1, 2, 4], help="pictures")
    add("--threads", nargs="+", type=int, default=[1])
    add("--seconds", type=float, default=0.3, help="for each figure (default: 0.3)")
    add("--below", type=float, default=math.inf, help="print only ratios below this")
    add("--quick", action="store_true", help="two small layers, few repetitions")
    add("--out", type=Path, help="folder for the figures and their chart (default: benchmarks/results/<cpu>/)")
    return made


def theirs(layer: Layer, x: torch.Tensor, w_dw: torch.Tensor, *w_pw: torch.Tensor) -> torch.Tensor:
    z = F.conv2d(x, w_dw, None, layer.stride, layer.padding, layer.dilation, layer.c_in)
    return F.conv2d(z, w_pw[0]) if w_pw else z


def ours(layer: Layer, x: torch.Tensor, w_dw: torch.Tensor, *w_pw: torch.Tensor) -> torch.Tensor:
    stride, padding, dilation = layer.stride, layer.padding, layer.dilation
    if not w_pw:
        return xsep.depthwise_conv2d(x, w_dw, stride=stride, padding=padding, dilation=dilation)
    return xsep.separable_conv2d(x, w_dw, *w_pw, stride=stride, padding=padding, dilation=dilation)


def calls(layer: Layer, n: int, dtype: torch.dtype, layout: str, direction: str) -> dict[str, Callable[[], Any]]:
    """One layer by PyTorch and by xsep, on the same tensors."""
    x = torch.randn(n, layer.c_in, layer.size, layer.size).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    w_dw = (torch.randn(layer.c_in, 1, layer.filter, layer.filter) / layer.filter).to(dtype)
    weights = [w_dw]
    if layer.c_out:
        weights.append((torch.randn(layer.c_out, layer.c_in, 1, 1) / layer.c_in**0.5).to(dtype))
    tensors = [t.requires_grad_(direction == "training") for t in (x, *weights)]
    with torch.no_grad():
        dy = torch.randn_like(theirs(layer, *tensors))

    def call(way: Callable[..., torch.Tensor]) -> Callable[[], Any]:
        if direction == "training":
            return lambda: torch.autograd.grad(way(layer, *tensors), tensors, dy)

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return way(layer, *tensors)

        return forward

    return {"PyTorch": call(theirs), "xsep": call(ours)}


def least_times(ways: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Seconds of each call, the least of those that took turns."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for way in ways.values():
        way()
    least = dict.fromkeys(ways, math.inf)
    begin, rounds = time.perf_counter(), 0
    while rounds < 4 or time.perf_counter() - begin < seconds:
        for name, way in ways.items():
            before = clock()
            way()
            least[name] = min(least[name], clock() - before)
        rounds += 1
    return least


def wrong(layer: Layer, dtype: torch.dtype, layout: str) -> Optional[str]:
    """What the gate says of a layer, None where it is right."""
    case = testing.Case(
        op="separable" if layer.c_out else "depthwise", n=1, c_in=layer.c_in, h=layer.size, w=layer.size,
        c_out=layer.c_out or layer.c_in, filter=(layer.filter,) * 2,
        stride=(layer.stride,) * 2, padding=(layer.padding,) * 4, dilation=(layer.dilation,) * 2, dtype=dtype,
        layout=layout,
    )  # fmt: skip
    try:
        testing.check(case, "auto")
    except AssertionError as error:
        return str(error)
    return None


def main(argv: Optional[list[str]] = None) -> int:
    options = parser().parse_args(argv)
    if min(*options.batch, *options.threads, 1) < 1:
        raise common.BenchmarkError("--batch and --threads must be at least 1")
    if options.quick:
        options.batch, options.seconds = [1], 0.0
    layers = QUICK if options.quick else [Layer(*sizes) for name in options.networks for sizes in NETWORKS[name]]
    if options.op == "depthwise":
        layers = list(dict.fromkeys(layer._replace(c_out=0) for layer in layers))
    device = torch.device("cpu")
    out = options.out or common.default_out(device)
    common.prepare_out(out)
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    for dtype, layout in itertools.product(options.dtype, options.layout):
        right = []
        for layer in layers:
            said = wrong(layer, common.DTYPES[dtype], layout)
            if said is None:
                right.append(layer)
            else:
                failures.append(f"{layer}, {dtype}, {layout}: {said}")
                print(f"WRONG: {failures[-1]}", flush=True)
        for threads, batch, direction in itertools.product(options.threads, options.batch, options.direction):
            torch.set_num_threads(threads)
            ratios = []
            for layer in right:
                times = least_times(calls(layer, batch, common.DTYPES[dtype], layout, direction), options.seconds)
                ratios.append(times["PyTorch"] / times["xsep"])
                where = {"layer": str(layer), "dtype": dtype, "layout": layout, "batch": batch, "threads": threads}
                us = {name: 1e6 * t for name, t in times.items()}
                rows.append({**where, "direction": direction, "us": us, "ratio": ratios[-1]})
                if ratios[-1] < options.below:
                    figures = ", ".join(f"{name} {t:10.1f} us" for name, t in us.items())
                    print(f"{direction:>8s} {layer!s:42s} {figures}: {ratios[-1]:.2f}", flush=True)
            if ratios:
                mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                print(f"{direction}, {dtype}, {layout}, batch {batch}, threads {threads}: geometric mean {mean:.3f}, "
                      f"least {min(ratios):.2f}", flush=True)  # fmt: skip
    record = {
        "benchmark": "layers", "op": options.op, "environment": common.environment(device), "failures": failures,
        "layers": rows,
        "figure": "least of calls that took turns: processor time on one thread, else time",
    }  # fmt: skip
    name = "layers" if options.op == "separable" else "depthwise"
    print(f"written: {common.write_results(out, name, record, 'layers_chart')}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(common.run("bench_layers", main))
