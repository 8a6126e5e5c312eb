"""The training chain layer by layer, by every way of every backend, beside PyTorch's modules; behind a gate."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, Optional

import common
import micro
import torch
import torch.nn.functional as F
from torch import Tensor

from xsep import ChannelAffine, separable_conv2d
from xsep.chain import measuring as chain
from xsep.problem import RELU, Problem

DESCRIPTION = """\
Times one training step of every separable layer of Xception at 299 px as a chain has it (ReLU, both convolutions and
BatchNorm with the batch's statistics; a raw output in, a raw output out), in channels_last. Beside it the same by
PyTorch's modules, and by xsep's layer with the ReLU in it and BatchNorm behind it. Where a backend can go over a
layer's backward in several ways, the one that its planner takes has the backend's name alone.

A floor is the larger of the bytes that must be moved over the speed of a copy and of the FLOP over the speed of a
matrix product, both measured here: x and r in the forward; du, r, x, dx and two products in the backward.

On a GPU each figure is the median of CUDA-event times with the L2 cache flushed before each; the host's share is not in
it. Before anything is timed it is held against float64 on the same tensors: by norms, at most twice the error of the
chain in plain PyTorch, plus a few ulp. What is wrong gets no figure and makes the exit code 1."""

DIRECTIONS = ("forward", "backward")
PYTORCH, LAYER = "PyTorch's modules", "xsep's layer"
Calls = dict[str, Callable[[], Any]]


def modules(a: chain.Layer, fused: bool) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward and backward of the layer as PyTorch's modules, or with xsep's layer among them."""
    x, w_dw, w_pw, gamma, beta = leaves = [
        t.detach().requires_grad_() for t in (a.x, a.w_dw, a.w_pw, a.gamma, a.beta)
    ]  # fmt: skip

    def run() -> Tensor:
        if fused:
            z = separable_conv2d(x, w_dw, w_pw, padding=1, prologue=ChannelAffine(activation="relu"))
        else:
            z = F.conv2d(F.conv2d(F.relu(x), w_dw, padding=1, groups=x.shape[1]), w_pw)
        return F.batch_norm(z, None, None, gamma, beta, True, eps=chain.EPS)

    y = run()
    return run, lambda: torch.autograd.grad(y, leaves, a.du, retain_graph=True)


class Run(micro.Choices):
    """One run of the chain's layers."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        common.prepare_out(self.out)

    def problem(self, c_in: int, c_out: int, size: int) -> Problem:
        return micro.layer_problem(self.device.type, self.dtype, self.batch, c_in, c_out, size, RELU)

    def layer(self, problem: Problem) -> tuple[dict[str, dict[str, common.Times]], list[str]]:
        """Times by direction and way, and what is wrong."""
        a = chain.draw(problem)
        called: dict[str, Calls] = {direction: {} for direction in DIRECTIONS}
        for name, fused in ((PYTORCH, False), (LAYER, True)):
            called["forward"][name], called["backward"][name] = modules(a, fused)
        failures: list[str] = []
        gate = chain.Gate(a)
        for name, way in chain.ways(problem)[0].items():
            if name == "aten":
                continue
            wrong = [] if "," in name else gate.wrong_forward(way)
            failures += [f"chain, {name}, forward: {said}" for said in wrong]
            if not wrong and "," not in name:
                called["forward"][f"chain, {name}"] = functools.partial(chain.forward, way, a)
            wrong = gate.wrong_backward(way)
            failures += [f"chain, {name}, backward: {said}" for said in wrong]
            if not wrong:
                called["backward"][f"chain, {name}"] = functools.partial(chain.backward, way, a, gate.b)
        del gate
        return {direction: self.time(ways) for direction, ways in called.items()}, failures


def floors(run: Run, problem: Problem, limits: tuple[float, float]) -> dict[str, float]:
    """Microseconds by direction."""
    c_in, c_out, size, (bandwidth, rate) = problem.c_in, problem.c_out, run.dtype.itemsize, limits
    pixels = problem.n * problem.h * problem.w
    moved, flop = size * (pixels * (c_in + c_out) + c_in * (c_out + 9)), 2.0 * pixels * c_in * c_out
    one = 1e6 * max(moved / bandwidth, flop / rate)
    return {"forward": one, "backward": 2 * one}


def totals(layers: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Milliseconds of all the network's layers by direction and way; of ways that every layer has."""
    found: dict[str, dict[str, float]] = {}
    for direction in DIRECTIONS:
        us = [{way: t["us"] for way, t in layer[direction].items()} for layer in layers]
        found[direction] = {
            way: 1e-3 * sum(layer["occurs"] * times[way] for layer, times in zip(layers, us))
            for way in (us[0] if us else ()) if all(way in times for times in us)
        }  # fmt: skip
        chains = [[t for way, t in times.items() if way.startswith("chain")] for times in us]
        if chains and all(chains):
            best = sum(layer["occurs"] * min(times) for layer, times in zip(layers, chains))
            found[direction]["chain, the fastest of each layer"] = 1e-3 * best
    return found


def lines(layer: dict[str, Any]) -> Iterator[str]:
    for direction in DIRECTIONS:
        floor, plain = layer["floor_us"][direction], layer[direction][PYTORCH]["us"]
        yield f"{layer['layer']}, {direction}: the floor is {floor:.1f} us"
        for way, t in layer[direction].items():
            us = t["us"]
            yield f"{way:>30s} {us:10.1f} us, {us / floor:6.2f} floors, {plain / us:5.2f} times PyTorch's speed"


def main(argv: Optional[list[str]] = None) -> int:
    torch.backends.cudnn.benchmark = True
    run = Run(micro.parser("bench_chain", DESCRIPTION).parse_args(argv))
    limits = common.measure_limits(run.device, run.dtype)
    print(
        f"{common.device_name(run.device)}, {run.kind}, batch {run.batch}; a copy moves {1e-9 * limits[0]:.0f} GB/s, "
        f"a product makes {1e-12 * limits[1]:.2f} TFLOP/s"
    )
    missing = [f"{name}: {why}" for name, why in chain.ways(run.problem(*run.layers[0][:3]))[1].items()]
    for sentence in missing:
        print(f"left out: {sentence}")
    layers: list[dict[str, Any]] = []
    failures: list[str] = []
    for c_in, c_out, size, count in run.layers:
        name, problem = f"{c_in}->{c_out} @{size} x{count}", run.problem(c_in, c_out, size)
        try:
            times, found = run.layer(problem)
        except RuntimeError as error:
            failures.append(f"{name}: {str(error).strip().splitlines()[0]}")
            print(f"WRONG: {failures[-1]}", flush=True)
            continue
        failures += [f"{name}: {said}" for said in found]
        layers.append({"layer": name, "occurs": count, "floor_us": floors(run, problem, limits), **times})
        print("\n".join([*lines(layers[-1]), *(f"WRONG: {said}" for said in found)]), flush=True)
    record = {
        "benchmark": "chain", "environment": common.environment(run.device), "dtype": run.kind, "batch": run.batch,
        "limits": {"bytes_per_second": limits[0], "flops": limits[1]}, "missing": missing, "failures": failures,
        "layers": layers, "totals_ms": totals(layers),
    }  # fmt: skip
    for direction, ways in record["totals_ms"].items():
        for way, ms in ways.items():
            print(f"all layers, {direction}: {way} {ms:.3f} ms")
    with common.whole_files(run.out) as temporary:
        common.write_json(temporary("chain.json"), record)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(common.run("bench_chain", main))
