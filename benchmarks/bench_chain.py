"""The training chain layer by layer, by every way of every backend, beside PyTorch's modules; behind a gate."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Optional

import common
import micro
import torch
import torch.nn.functional as F
from micro import SAME
from torch import Tensor

from xsep import ChannelAffine, separable_conv2d
from xsep.backends import chain_cuda_launch
from xsep.backends.chain import Load, RawGradient
from xsep.backends.cuda import device_facts
from xsep.ops.training import calls
from xsep.ops.training.selection import chain_backend
from xsep.problem import RELU, Problem
from xsep.testing import held_as, norm_violation, poisoned_memory

DESCRIPTION = """\
Times one training step of every separable layer of Xception at 299 px as a chain has it (ReLU, both convolutions and
BatchNorm with the batch's statistics; a raw output in, a raw output out), in channels_last. Beside it the same by
PyTorch's modules, and by xsep's layer with the ReLU in it and BatchNorm behind it. A backend that can go over a layer's
backward in several ways is timed in each; the one that its planner takes has an asterisk.

A floor is the larger of the bytes that must be moved over the speed of a copy and of the FLOP over the speed of a
matrix product, both measured here: x and r in the forward; du, r, x, dx and two products in the backward.

On a GPU each figure is the median of CUDA-event times with the L2 cache flushed before each; the host's share is not in
it. Before anything is timed it is held against float64 on the same tensors: by norms, at most twice the error of the
chain in plain PyTorch, plus a few ulp. What is wrong gets no figure and makes the exit code 1."""

EPS = 1e-5
DIRECTIONS = ("forward", "backward")
PYTORCH, LAYER = "PyTorch's modules", "xsep's layer"
Results = dict[str, Tensor]


class Layer(NamedTuple):
    """A layer's tensors, between the layers before and behind."""

    x: Tensor  # [N, C_in, H, W], the raw output before
    vec: Tensor  # [2, C_in], of the BatchNorm before
    w_dw: Tensor
    w_pw: Tensor
    gamma: Tensor  # [C_out]
    beta: Tensor
    du: Tensor  # [N, C_out, H, W]
    centres: Tensor  # [2, C_in]

    @property
    def problem(self) -> Problem:
        n, c_in, h, w = self.x.shape
        return Problem(
            "separable", self.x.device.type, self.x.dtype, True, n, c_in, h, w, 1, 3, 3, self.w_pw.shape[0], SAME,
            (RELU, 0, 0),
        )  # fmt: skip


def draw(batch: int, c_in: int, c_out: int, size: int, dtype: torch.dtype, device: torch.device) -> Layer:
    def image(c: int) -> Tensor:
        return torch.randn(batch, c, size, size, device=device).to(dtype).contiguous(memory_format=torch.channels_last)

    x = image(c_in)
    # An open ReLU or a shut one, and nothing between: no rounding may decide.
    x = torch.where(x < 0, x - 0.5, x + 0.5)
    scale = 0.5 + torch.rand(c_in, device=device)
    w_dw = (torch.randn(c_in, 1, 3, 3, device=device) / 3).to(dtype)
    w_pw = (torch.randn(c_out, c_in, 1, 1, device=device) * c_in**-0.5).to(dtype)
    gamma, beta = 0.5 + torch.rand(c_out, device=device), torch.randn(c_out, device=device)
    centres = torch.zeros(2, c_in, device=device)
    return Layer(x, torch.stack([scale, torch.zeros_like(scale)]), w_dw, w_pw, gamma, beta, image(c_out), centres)


class Between(NamedTuple):
    """What the backward finds: of the forward, and from the layer behind. The same for every backend."""

    r: Tensor
    mean: Tensor
    invstd: Tensor
    values: Tensor  # a channel
    sums: Tensor  # [2, C_out] of du and du * (r - mean)


def forward(a: Layer, backend: str) -> Results:
    f = calls.sep_fprop(a.x, a.vec, None, RELU, 0.0, a.w_dw, a.w_pw, SAME, backend=backend)
    assert f.partials is not None and f.counts is not None
    vec, centres, invstd, count = calls.bn_finalize(
        f.partials, f.counts, a.gamma, a.beta, eps=EPS, backend=backend
    )  # fmt: skip
    return {"r": f.r, "vec": vec, "centres": centres, "invstd": invstd, "count": count}


def backward(a: Layer, b: Between, backend: str) -> Results:
    coef, dgamma, dbeta = calls.bn_backward_finalize(b.sums, b.mean, b.invstd, a.gamma, b.values, backend=backend)
    found = calls.sep_backward(
        RawGradient(a.du, b.r, coef), a.w_pw, a.w_dw, a.x, Load(a.vec, RELU), SAME, None, [a.x], a.centres,
        backend=backend,
    )  # fmt: skip
    named = {"dgamma": dgamma, "dbeta": dbeta, **found._asdict()}
    return {name: t for name, t in named.items() if t is not None}


def in_float64(a: Layer) -> Layer:
    return Layer(*(t.double() for t in a))


def between(a: Layer, exact: Results) -> Between:
    r, mean = exact["r"].to(a.x.dtype), exact["centres"][1]
    off = a.du.double() * (r.double() - mean[:, None, None])
    sums = torch.stack([a.du.double().sum((0, 2, 3)), off.sum((0, 2, 3))])
    return Between(r, mean.float(), exact["invstd"].float(), exact["count"], sums.float())


@contextlib.contextmanager
def going(plan: Optional[chain_cuda_launch.BackwardPlan]) -> Iterator[None]:
    """The cuda backend's backward by one plan, whatever its planner says."""
    chosen = chain_cuda_launch.backward_plan
    if plan is not None:
        chain_cuda_launch.backward_plan = lambda problem, device: plan  # type: ignore[assignment]
    try:
        yield
    finally:
        chain_cuda_launch.backward_plan = chosen


def backward_ways(a: Layer, backend: str) -> tuple[dict[str, Callable[[Between], Results]], str]:
    """By name, and which of them the backend's planner takes."""

    def way(plan: Optional[chain_cuda_launch.BackwardPlan], b: Between) -> Results:
        with going(plan):
            return backward(a, b, backend)

    if backend != "cuda":
        return {f"chain, {backend}": functools.partial(way, None)}, f"chain, {backend}"
    facts = device_facts(a.x.get_device())
    found = chain_cuda_launch.backward_ways(a.problem, facts)
    planned = chain_cuda_launch.backward_plan(a.problem, facts)
    chosen = next((name for name, plan in found.items() if plan == planned), "")
    return {f"chain, cuda, {name}": functools.partial(way, plan) for name, plan in found.items()}, (
        f"chain, cuda, {chosen}"
    )


def modules(a: Layer, fused: bool) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward and backward of the layer as PyTorch's modules, or with xsep's layer among them."""
    x, w_dw, w_pw, gamma, beta = leaves = [
        t.detach().requires_grad_() for t in (a.x, a.w_dw, a.w_pw, a.gamma, a.beta)
    ]  # fmt: skip

    def run() -> Tensor:
        if fused:
            z = separable_conv2d(x, w_dw, w_pw, padding=1, prologue=ChannelAffine(activation="relu"))
        else:
            z = F.conv2d(F.conv2d(F.relu(x), w_dw, padding=1, groups=x.shape[1]), w_pw)
        return F.batch_norm(z, None, None, gamma, beta, True, eps=EPS)

    y = run()
    return run, lambda: torch.autograd.grad(y, leaves, a.du, retain_graph=True)


def wrong(got: Results, exact: Results, own: Results, kind: torch.dtype) -> list[str]:
    """Sentences on what is wrong with a backend's results; only images are rounded to the type."""
    found = []
    for name, truth in exact.items():
        rounded = kind if name in ("r", "dx") else torch.promote_types(kind, torch.float32)
        if said := norm_violation(got[name], truth, own[name], rounded):
            found.append(f"{name} is {said}")
    return found


class Run:
    """The choices of one run."""

    def __init__(self, options: Any) -> None:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise common.BenchmarkError("it needs a GPU, and PyTorch sees none here (--device cpu is a dry run)")
        self.device, self.gpu = torch.device(options.device), options.device == "cuda"
        self.kind, self.dtype = options.dtype, common.DTYPES[options.dtype]
        self.batch = options.batch or (1 if options.quick else 64)
        self.rounds = options.rounds or (2 if options.quick else 30)
        self.layers = [(16, 24, 19, 1), (24, 32, 10, 25)] if options.quick else micro.LAYERS
        first = draw(1, 8, 8, 8, self.dtype, self.device).problem
        self.backends, self.missing = [], []
        for name in ("cuda", "triton") if self.gpu else ("cpu",):
            reasons = chain_backend(name).not_supported_reasons(first)
            self.missing += [f"{name}: {'; '.join(reasons)}"] if reasons else []
            self.backends += [] if reasons else [name]
        self.out = options.out or common.default_out(self.device)
        common.prepare_out(self.out)

    def time(self, called: dict[str, Callable[[], Any]]) -> dict[str, common.Times]:
        return common.time_on_gpu(called, self.rounds) if self.gpu else common.time_on_cpu(called, self.rounds, 0.0)

    def layer(self, c_in: int, c_out: int, size: int) -> tuple[dict[str, Any], list[str]]:
        """Times by direction and way, with the ways that planners take, and what is wrong."""
        a = draw(self.batch, c_in, c_out, size, self.dtype, self.device)
        kind = held_as(self.dtype, self.device)
        wide = in_float64(a)
        exact = forward(wide, "aten")
        b = between(a, exact)
        exact_b = backward(wide, Between(*(t.double() for t in b)), "aten")
        del wide
        own, own_b = forward(a, "aten"), backward(a, b, "aten")
        failures: list[str] = []
        planned: list[str] = []
        called: dict[str, dict[str, Callable[[], Any]]] = {"forward": {}, "backward": {}}
        for name, fused in ((PYTORCH, False), (LAYER, True)):
            called["forward"][name], called["backward"][name] = modules(a, fused)
        for backend in self.backends:
            name = f"chain, {backend}"
            with poisoned_memory():
                found = wrong(forward(a, backend), exact, own, kind)
            failures += [f"{name}, forward: {said}" for said in found]
            if not found:
                called["forward"][name] = functools.partial(forward, a, backend)
            ways, chosen = backward_ways(a, backend)
            planned.append(chosen)
            for way, run in ways.items():
                with poisoned_memory():
                    found = wrong(run(b), exact_b, own_b, kind)
                failures += [f"{way}, backward: {said}" for said in found]
                if not found:
                    called["backward"][way] = functools.partial(run, b)
        del exact, exact_b, own, own_b
        times = {direction: self.time(ways) for direction, ways in called.items()}
        return {**times, "planned": planned}, failures


def floors(run: Run, c_in: int, c_out: int, size: int, limits: tuple[float, float]) -> dict[str, float]:
    """Microseconds by direction."""
    pixels, bandwidth, rate = run.batch * size * size, *limits
    image, weights = pixels * run.dtype.itemsize, c_in * (c_out + 9) * run.dtype.itemsize
    product = 2.0 * pixels * c_in * c_out
    moved = {"forward": image * (c_in + c_out) + weights, "backward": 2 * (image * (c_in + c_out) + weights)}
    flop = {"forward": product, "backward": 2 * product}
    return {direction: 1e6 * max(moved[direction] / bandwidth, flop[direction] / rate) for direction in moved}


def totals(layers: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Milliseconds of all the network's layers by direction and way; of ways that every layer has."""
    found: dict[str, dict[str, float]] = {}
    for direction in DIRECTIONS:
        plain = [{way: t["us"] for way, t in layer[direction].items()} for layer in layers]
        shared = [way for way in plain[0] if all(way in times for times in plain)] if plain else []
        found[direction] = {
            way: 1e-3 * sum(layer["occurs"] * times[way] for layer, times in zip(layers, plain)) for way in shared
        }
        chains = [min((us for way, us in times.items() if way.startswith("chain")), default=None) for times in plain]
        if chains and all(us is not None for us in chains):
            best = sum(layer["occurs"] * us for layer, us in zip(layers, chains) if us is not None)
            found[direction]["chain, the fastest of each layer"] = 1e-3 * best
    return found


def lines(layer: dict[str, Any]) -> Iterator[str]:
    for direction in DIRECTIONS:
        floor, plain = layer["floor_us"][direction], layer[direction][PYTORCH]["us"]
        yield f"{layer['layer']}, {direction}: the floor is {floor:.1f} us"
        for way, t in layer[direction].items():
            mark = "*" if direction == "backward" and way in layer["planned"] else " "
            us = t["us"]
            yield f"{way:>30s}{mark}{us:10.1f} us, {us / floor:6.2f} floors, {plain / us:5.2f} times PyTorch's speed"


def main(argv: Optional[list[str]] = None) -> int:
    torch.backends.cudnn.benchmark = True
    run = Run(micro.parser("bench_chain", DESCRIPTION).parse_args(argv))
    limits = common.measure_limits(run.device, run.dtype)
    print(
        f"{common.device_name(run.device)}, {run.kind}, batch {run.batch}; a copy moves {1e-9 * limits[0]:.0f} GB/s, "
        f"a product makes {1e-12 * limits[1]:.2f} TFLOP/s"
    )
    for sentence in run.missing:
        print(f"left out: {sentence}")
    layers: list[dict[str, Any]] = []
    failures: list[str] = []
    for c_in, c_out, size, count in run.layers:
        name = f"{c_in}->{c_out} @{size} x{count}"
        try:
            times, found = run.layer(c_in, c_out, size)
        except RuntimeError as error:
            failures.append(f"{name}: {str(error).strip().splitlines()[0]}")
            print(f"WRONG: {failures[-1]}", flush=True)
            continue
        failures += [f"{name}: {said}" for said in found]
        layer = {"layer": name, "occurs": count, "floor_us": floors(run, c_in, c_out, size, limits), **times}
        layers.append(layer)
        print("\n".join([*lines(layer), *(f"WRONG: {said}" for said in found)]), flush=True)
    record = {
        "benchmark": "chain", "environment": common.environment(run.device), "dtype": run.kind, "batch": run.batch,
        "limits": {"bytes_per_second": limits[0], "flops": limits[1]}, "missing": run.missing, "failures": failures,
        "layers": layers, "totals_ms": totals(layers),
    }  # fmt: skip
    for direction, found in record["totals_ms"].items():
        for way, ms in found.items():
            print(f"all layers, {direction}: {way} {ms:.3f} ms")
    with common.whole_files(run.out) as temporary:
        common.write_json(temporary("chain.json"), record)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(common.run("bench_chain", main))
