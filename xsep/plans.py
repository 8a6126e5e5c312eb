"""How long each way of running a problem on a GPU should take: pure functions of the problem and the device's figures.

Nothing here asks a device anything, so any card's choice can be shown on any machine. Whether a backend would run fused
or staged is asked of the backend's own planner, the one its launcher asks.

The model is a roofline: a kernel takes the longer of moving its bytes and of computing, kernels follow one another at
a launch's cost, and the host must be able to enqueue them. Its constants are assumptions with their source beside
them; a measurement (a shipped table, or xsep.autotune) always comes before it, and what a card took for layers it was
timed on (xsep.tuning.probes) corrects it there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Optional

import torch

from . import extension
from .backends import cuda as cuda_backend
from .backends import pointwise, triton_plans
from .problem import Problem
from .tuning.device import DeviceProperties

#: What a copy and a large matrix product reach of the data sheet: 4.3 of 4.8 TB/s and 790 of 989 TFLOP/s on an H200.
COPY_SHARE, PRODUCT_SHARE = 0.90, 0.80
#: ``mma.sync`` against ``wgmma`` on Hopper: 62.9 % of the peak on average (arXiv 2402.13499, section on tensor cores).
#: The fused CUDA kernel multiplies with it; PyTorch's GEMM and Triton use wgmma.
MMA_SYNC_SHARE = {(9, 0): 0.63}
#: The part of the float32 lanes' rate that a depthwise kernel's inner loop keeps: beside each multiply-add it converts
#: and moves operands.
LANE_SHARE = 0.5
#: The general kernels, for any filter: one thread makes one value. Instructions a value and tap of CUDA's, forward and
#: backward, counted in what nvcc makes of a dilated 3x3 in bfloat16 (``python -m tests.cuda.counted``); Triton's are
#: taken to be slower than memory by so much.
GENERAL_INSTRUCTIONS = (40.0, 122.0)
GENERAL_SLOWER = 4.0
#: L2 delivers about twice what memory does (arXiv 2402.13499 has 2.0 to 2.6 for A100, RTX 4090 and H100).
L2_RATE = 2.0
#: PyTorch's depthwise kernels, as a share of a copy's speed. cuDNN on channels_last: plain 16-byte-vector kernels are
#: reported 2 to 4.7 times as fast (haowen-han/tma-depthwise-conv, B200) and FCM's 3.7 times (arXiv 2404.19331), so a
#: third. PyTorch's own NCHW kernel loads single elements: a quarter with 16-bit types, half with float32. The weight
#: gradient is the slowest everywhere (arXiv 2604.25422, pytorch#18631): a third of that again.
CUDNN_DEPTHWISE = 0.33
NATIVE_DEPTHWISE = {2: 0.25, 4: 0.5}
WGRAD_SHARE = 0.33
#: Microseconds that the host needs to enqueue a forward in eager mode, and twice that for a backward; a CUDA graph has
#: none of it. Measured on a CPU: about 10 for each convolution of PyTorch's; 3 for a repeated call of the cuda backend
#: up to its operator, which allocates and launches; of float32, which Python makes, 40. The triton backend's needs 45,
#: and ``HOST_LAUNCH_US`` more for each launch, which is Python; a product that PyTorch makes of a slice counts as one,
#: since the slice is made in Python too.
HOST_US = {"aten": 20.0, "cuda": 20.0, "triton": 50.0}
HOST_US_BY_PYTHON = 50.0
HOST_LAUNCH_US = triton_plans.HOST_LAUNCH_US
#: What must be gained before the model, whose constants are guesses, prefers a kernel to PyTorch's.
MARGIN = 1.1

#: The part of its clocks in which a scheduler of a multiprocessor issues something, in CUDA kernels whose instructions
#: are counted (the fused one's in fused_clocks, csrc/common/cuda_separable_plan.h).
ISSUE_SHARE = 0.8
#: Float32 lanes of a multiprocessor, 128 unless it stands here (CUDA programming guide, arithmetic throughput). With
#: 64 a multiply-add takes its scheduler two clocks; three in five of the float32 kernel's instructions use those lanes,
#: of the 16-bit one's, whose multiply-adds are the tensor cores', hardly any.
LANES = {(8, 0): 64}
LANES_SHARE = 0.6


class Prediction(NamedTuple):
    """One way of running a problem, in microseconds; ``problem`` where it cannot run there."""

    way: str  # "aten, channels_last", "cuda, fused", ...
    backend: str
    card_forward: float  # what the card needs of it
    card_backward: float
    chosen_way: bool  # whether this is how the backend would run it
    note: str
    refused: str = ""
    launches: tuple[int, int] = (0, 0)  # forward and backward, of those that Python makes
    host: tuple[float, float] = (0.0, 0.0)  # what the host needs to enqueue it
    backward_note: str = "z is made anew, then two GEMMs and one pass for dx and dw_dw"

    @property
    def forward(self) -> float:
        return self.time("forward")

    @property
    def backward(self) -> float:
        return self.time("backward")

    @property
    def timed_as(self) -> str:
        """PyTorch's ways are told apart; another backend has the one that its planner takes."""
        return self.way if self.backend == "aten" else self.backend

    def on_card(self, direction: str) -> float:
        return self.card_forward if direction == "forward" else self.card_backward

    def time(self, direction: str, factor: float = 1.0) -> float:
        """The longer of card and host, the card's time corrected by a factor."""
        return max(factor * self.on_card(direction), self.host[direction != "forward"])


class Fit(NamedTuple):
    """What a layer took on a card over what the model has for its part there, to correct it by for layers like it."""

    layer: str
    factors: dict[str, float]  # by Prediction.timed_as

    def factor(self, p: Prediction) -> float:
        """A backend that was not timed beside the others is given no advantage over them."""
        return self.factors.get(p.timed_as, max(self.factors.values()))


@dataclass(frozen=True)
class Work:
    """Bytes of each tensor, and FLOPs."""

    x: float
    z: float
    y: float
    weights: float
    depthwise: float
    pointwise: float

    @property
    def bytes(self) -> float:
        """What must pass through memory if z never does."""
        return self.x + self.y + self.weights


def work_of(problem: Problem) -> Work:
    p, q = problem.output_size
    size, pixels = problem.dtype.itemsize, problem.n * p * q
    taps = problem.r * problem.s
    separable = problem.op == "separable"
    weights = problem.c_mid * taps + (problem.c_mid * problem.c_out if separable else 0)
    return Work(
        x=size * problem.n * problem.c_in * problem.h * problem.w,
        z=size * pixels * problem.c_mid if separable else 0.0,
        y=size * pixels * problem.c_out,
        weights=size * weights,
        depthwise=2.0 * pixels * problem.c_mid * taps,
        pointwise=2.0 * pixels * problem.c_mid * problem.c_out if separable else 0.0,
    )


def triton_device(device: DeviceProperties) -> triton_plans.Device:
    """The device as the Triton planner sees it."""
    rates = triton_plans.cuda_rates(device.capability)
    return triton_plans.Device("cuda", device.multiprocessors, 32, device.l2_bytes, *rates)


def cuda_facts(device: DeviceProperties) -> cuda_backend.DeviceFacts:
    """The device as the CUDA planner sees it."""
    return cuda_backend.DeviceFacts(device.multiprocessors, device.shared_bytes, device.l2_bytes)


def refusal(backend: str, problem: Problem, device: DeviceProperties) -> str:
    """Why a backend could not run the problem on such a device even if everything were installed; "" where it could."""
    if backend == "aten":
        return ""
    if problem.dtype not in cuda_backend.DTYPES:
        return f"its kernels take float32, bfloat16 and float16, not {str(problem.dtype).removeprefix('torch.')}"
    if device.vendor != "nvidia":
        return "its kernels run on NVIDIA GPUs" if backend == "cuda" else ""
    if device.capability < cuda_backend.LOWEST_CAPABILITY:
        return "its kernels need compute capability 8.0, and this card has {}.{}".format(*device.capability)
    return ""


class _Clock:
    """Microseconds on one device and problem."""

    def __init__(self, problem: Problem, device: DeviceProperties, tf32: bool) -> None:
        self.problem, self.device, self.work = problem, device, work_of(problem)
        self.copy = device.bandwidth * COPY_SHARE / 1e6
        self.product = device.matrix_flops(problem.dtype, tf32) * PRODUCT_SHARE / 1e6
        self.lane = device.float32_flops * LANE_SHARE / 1e6
        # Beside R * S multiply-adds a value: loading and widening what a sliding window meets anew, two rows of taps.
        taps = problem.r * problem.s
        self.lanes = self.work.depthwise * (taps + 2 * problem.s) / taps / self.lane

    def move(self, memory: float, cached: float = 0.0) -> float:
        return memory / self.copy + cached / (self.copy * L2_RATE)

    def depthwise(self, moved: float, share: float = 1.0, cached: float = 0.0) -> float:
        return max(self.move(moved, cached) / share, self.lanes)

    def general(self, backend: str, fast_ones: bool) -> tuple[float, float]:
        """How much longer than the fast depthwise kernels, forward and backward, the ones take that run here."""
        if fast_ones:
            return 0.0, 0.0
        w = self.work
        fast = [self.depthwise(moved) for moved in (w.x + (w.z or w.y), 2 * w.x + (w.z or w.y))]
        if backend != "cuda":
            return fast[0] * (GENERAL_SLOWER - 1), fast[1] * (GENERAL_SLOWER - 1)
        # A multiply-add is two operations and one instruction.
        issued = [n * w.depthwise / (self.device.float32_flops * ISSUE_SHARE) * 1e6 for n in GENERAL_INSTRUCTIONS]
        return max(issued[0] - fast[0], 0.0), max(issued[1] - fast[1], 0.0)

    def gemm(self, moved: float, cached: float = 0.0) -> float:
        return max(self.move(moved, cached), self.work.pointwise / self.product)

    def launches(self, count: int) -> float:
        return count * self.device.launch_us

    def floor(self, direction: str) -> float:
        """The least possible: each tensor once, z never; the backward reads dy and x and writes dx and the weights'."""
        w = self.work
        if direction == "forward":
            return max(self.move(w.bytes), w.pointwise / self.product)
        return max(self.move(2 * w.x + w.y + 2 * w.weights), 2 * w.pointwise / self.product)


def floor(problem: Problem, device: DeviceProperties, direction: str = "forward", tf32: bool = False) -> float:
    """Microseconds that no way of running the problem can go below: the larger of bytes and matrix FLOPs."""
    return _Clock(problem, device, tf32).floor(direction)


def _aten(clock: _Clock, channels_last: bool) -> Prediction:
    w, separable = clock.work, clock.problem.op == "separable"
    share = CUDNN_DEPTHWISE if channels_last else NATIVE_DEPTHWISE.get(clock.problem.dtype.itemsize, 0.5)
    z = w.z if separable else w.y
    # Prologue, middle and epilogue are passes of their own over x, z and y.
    activations = clock.problem.activations
    tensors = (w.x, z, w.y) if separable else (w.x, w.y)
    passes = sum(2 * t for t, code in zip(tensors, activations) if code)
    count = sum(1 for code in activations if code)
    gemm = clock.gemm(z + w.y) if separable else 0.0
    forward = clock.depthwise(w.x + z, share) + gemm + clock.move(passes) + clock.launches(1 + separable + count)
    gradients = 2 * clock.gemm(z + w.y) if separable else 0.0
    backward = (
        clock.depthwise(w.x + z, share) + clock.depthwise(w.x + z, share * WGRAD_SHARE) + gradients
        + clock.move(1.5 * passes) + clock.launches(2 + 2 * separable + count)
    )  # fmt: skip
    layout = "channels_last" if channels_last else "NCHW"
    mine = channels_last == clock.problem.channels_last
    note = f"its depthwise kernel is taken to reach {share:.0%} of a copy's speed, z goes through memory"
    return Prediction(f"aten, {layout}", "aten", forward, backward, mine, note)


def _slices(problem: Problem, slice_n: Optional[int]) -> int:
    return 1 if slice_n is None else math.ceil(problem.n / max(slice_n, 1))


def _staged(clock: _Clock, slice_n: Optional[int], general: tuple[float, float]) -> tuple[float, str]:
    """The forward in two kernels, z in L2 where a slice of the batch keeps it there."""
    w, slices = clock.work, _slices(clock.problem, slice_n)
    kept = 2 * w.z / slices <= clock.device.l2_bytes
    z_memory, z_cached = (0.0, w.z) if kept else (w.z, 0.0)
    time = clock.depthwise(w.x + z_memory, cached=z_cached) + clock.gemm(w.y + w.weights + z_memory, cached=z_cached)
    where = "z stays in L2" if kept else "z goes through memory once each way"
    how = f", {slice_n} pictures at a time" if slice_n is not None and slices > 1 else ""
    kernel = "the general depthwise kernel; " if general[0] > 0 else ""
    return time + general[0] + clock.launches(2 * slices), kernel + where + how


def _fused(clock: _Clock, again: int) -> tuple[float, str]:
    """The forward in one Triton kernel that makes z ``again`` times."""
    matrix = clock.work.pointwise / clock.product
    time = max(clock.move(clock.work.bytes), matrix + again * clock.lanes) + clock.launches(1)
    note = "z never leaves the chip" if again == 1 else f"z is made {again} times, once for each block of C_out"
    return time, note


def _megahertz(device: DeviceProperties) -> float:
    return device.float32_flops / (device.multiprocessors * 2 * LANES.get(device.capability, 128)) / 1e6


def _fused_cuda(clock: _Clock, plan: Any) -> tuple[float, str]:
    """The forward in one CUDA kernel: the longest of bytes, tensor cores and instructions."""
    device, (p, q) = clock.device, clock.problem.output_size
    waste = plan.tiles * plan.tile_rows * plan.tile_columns / max(clock.problem.n * p * q, 1)
    # In 16 bits the depthwise is a product too, by matrices of which one value in eight is not zero.
    zeros = 0.0 if clock.problem.dtype is torch.float32 else 8 * clock.work.depthwise
    matrix = waste * (clock.work.pointwise + zeros) / (clock.product * MMA_SYNC_SHARE.get(device.capability, 1.0))
    lanes = LANES.get(device.capability, 128)
    slower = LANES_SHARE * (128 / lanes - 1) if clock.problem.dtype is torch.float32 else 0.0
    issued = plan.clocks * (1 + slower) / _megahertz(device) / ISSUE_SHARE
    memory = clock.move(clock.work.bytes)
    limit = "memory" if memory >= max(matrix, issued) else "instructions" if issued >= matrix else "tensor cores"
    return max(memory, matrix, issued) + clock.launches(1), f"z never leaves the chip; the limit: {limit}"


def _own_backward(clock: _Clock, general: tuple[float, float], wgrad: Any = None) -> float:
    """z again, two GEMMs, and one pass for dx and dw_dw with the small kernel that adds up its sums.

    By ``wgrad``, a plan of the CUDA backend, z stays on the chip for its GEMM.
    """
    w = clock.work
    if clock.problem.op == "depthwise":
        return clock.depthwise(2 * w.x + w.y) + general[1] + clock.launches(2)
    gemm = clock.gemm(w.z + w.y)
    rest = gemm + clock.depthwise(2 * w.x + w.z) + general[1] + clock.launches(3)
    if wgrad is None:
        return rest + clock.depthwise(w.x + w.z) + gemm + general[0] + clock.launches(2)
    return rest + max(clock.move(w.x + w.y), wgrad.clocks / _megahertz(clock.device) / ISSUE_SHARE)


def _conversions(clock: _Clock, time: float) -> float:
    """NCHW tensors are copied to NHWC and back around kernels that know NHWC only."""
    if clock.problem.channels_last:
        return time
    return time + clock.move(2 * (clock.work.x + clock.work.y)) + clock.launches(2)


def _separable(
    clock: _Clock, way: str, forward: tuple[float, str], chosen: bool, general: tuple[float, float],
    launches: tuple[int, int] = (0, 0), wgrad: Any = None,
) -> Prediction:  # fmt: skip
    (time, note), backend = forward, way.partition(",")[0]
    backward = _conversions(clock, _own_backward(clock, general, wgrad))
    found = Prediction(way, backend, _conversions(clock, time), backward, chosen, note, launches=launches)
    on_chip = "z is made anew on the chip for dw_pw, then a GEMM and one pass for dx and dw_dw"
    return found if wgrad is None else found._replace(backward_note=on_chip)


def _triton(clock: _Clock, tf32: bool) -> list[Prediction]:
    problem, device = clock.problem, triton_device(clock.device)
    fast = triton_plans.unrolled(problem)
    general = clock.general("triton", fast)
    if problem.op == "depthwise":
        time = clock.depthwise(clock.work.x + clock.work.y) + clock.launches(1)
        return [_depthwise(clock, "triton", time, general, (1, 2 if fast else 3))]
    plan = triton_plans.separable_plan(problem._replace(channels_last=True), device, tf32)
    time, note = _staged(clock, plan.slice_n, general)
    # For TF32 a launch rounds the weights. Backward: z again, then one pass and its sums, or the general kernels' two
    # passes and their sums.
    rounding = int(problem.dtype is torch.float32 and tf32 and clock.device.vendor == "nvidia")
    backward = 3 if fast else 4
    staged = time + clock.launches(rounding), note
    found = []
    if fast:
        again = math.ceil(problem.c_out / plan.tile.outputs)
        time, note = _fused(clock, again)
        fused = time + clock.launches(rounding), note
        found.append(_separable(clock, "triton, fused", fused, plan.fused, general, (1 + rounding, backward)))
    launches = 2 * _slices(problem, plan.slice_n) + rounding
    return [*found, _separable(clock, "triton, staged", staged, not plan.fused, general, (launches, backward))]


def _depthwise(
    clock: _Clock, backend: str, time: float, general: tuple[float, float], launches: tuple[int, int] = (0, 0)
) -> Prediction:
    note = "the general kernel, far from memory's speed" if general[0] > 0 else "memory-speed kernel"
    forward = _conversions(clock, time + general[0])
    backward = _conversions(clock, _own_backward(clock, general))
    return Prediction(backend, backend, forward, backward, True, note, launches=launches)


def _sliding_window(problem: Problem, facts: cuda_backend.DeviceFacts) -> bool:
    """Whether the CUDA depthwise kernel is the fast one; so taken to be where the planner is not built."""
    module = extension.binding()
    if module is None:
        return True
    shape = cuda_backend.shape_of(problem)
    plan = module.plan_cuda_depthwise_fprop(shape, element_bytes=problem.dtype.itemsize, **facts._asdict())
    return bool(plan.sliding_window)


def _cuda(clock: _Clock) -> list[Prediction]:
    problem, facts = clock.problem, cuda_facts(clock.device)
    fast = _sliding_window(problem, facts)
    general = clock.general("cuda", fast)
    plan = None if problem.op == "depthwise" else cuda_backend.fused_plan(problem, facts)
    if problem.op == "depthwise":
        return [_depthwise(clock, "cuda", clock.depthwise(clock.work.x + clock.work.y) + clock.launches(1), general)]
    staged = _staged(clock, None, general)
    wgrad = cuda_backend.wgrad_plan(problem, facts)
    # Where something stands between the convolutions or behind them, z goes through memory.
    wgrad = wgrad if wgrad is not None and wgrad.pays and not any(problem.activations[1:]) else None
    found = []
    if plan is not None:
        found.append(_separable(clock, "cuda, fused", _fused_cuda(clock, plan), True, general, wgrad=wgrad))
    return [*found, _separable(clock, "cuda, staged", staged, not found, general, wgrad=wgrad)]


@lru_cache(maxsize=4096)
def predictions(problem: Problem, device: DeviceProperties, tf32: bool = False) -> tuple[Prediction, ...]:
    """Every way of running the problem on the device, PyTorch's two layouts first; refused ones at infinite times.

    A time is the larger of what the device needs and of what the host needs to enqueue it (``HOST_US``, and
    ``HOST_LAUNCH_US`` for each launch that Python makes).
    """
    clock = _Clock(problem, device, tf32)
    found = [_aten(clock, True), _aten(clock, False)]
    for backend in ("cuda", "triton"):
        why = refusal(backend, problem, device)
        if why:
            found.append(Prediction(backend, backend, math.inf, math.inf, True, "", why))
        else:
            found += _triton(clock, tf32) if backend == "triton" else _cuda(clock)

    def no_faster_than_the_host(p: Prediction) -> Prediction:
        by_python = p.backend == "cuda" and problem.dtype is torch.float32
        op = HOST_US_BY_PYTHON if by_python else HOST_US[p.backend]
        host, back = op + p.launches[0] * HOST_LAUNCH_US, 2 * op + p.launches[1] * HOST_LAUNCH_US
        note = p.note if p.forward >= host else f"the host's {host:.0f} us to enqueue it outlast the kernels"
        return p._replace(note=note, host=(host, back))

    return tuple(p if p.refused else no_faster_than_the_host(p) for p in found)


def choose(
    problem: Problem,
    device: DeviceProperties,
    eligible: tuple[str, ...],
    direction: str = "forward",
    tf32: bool = False,
    fit: Optional[Fit] = None,
) -> tuple[str, str]:
    """The backend to take among those that may run, and why, in words. ``aten`` may always run.

    Another one is taken only where the model, corrected by ``fit`` where a card was timed, has it faster by MARGIN than
    PyTorch in the problem's own layout.
    """
    runnable = [
        p for p in predictions(problem, device, tf32)
        if p.chosen_way and not p.refused and p.backend in (*eligible, "aten")
    ]  # fmt: skip
    times = {p: p.time(direction, 1.0 if fit is None else fit.factor(p)) for p in runnable}
    model = "the cost model" if fit is None else f"the cost model, corrected by what {fit.layer} took on this card,"
    baseline = next(p for p in runnable if p.backend == "aten")
    best = min(runnable, key=times.__getitem__)
    if best.backend == "aten" or times[best] * MARGIN > times[baseline]:
        others = [p for p in runnable if p.backend != "aten"]
        if not others:
            return "aten", "no other backend may run it"
        second = min(others, key=times.__getitem__)
        return "aten", (
            f"{model} has {second.way} at {times[second]:.0f} us and PyTorch at "
            f"{times[baseline]:.0f}: not {MARGIN:.1f} times as fast, which is what it takes"
        )
    note = best.note if direction == "forward" else best.backward_note
    return best.backend, (
        f"{model} has {best.way} at {times[best]:.0f} us and PyTorch at {times[baseline]:.0f}: {note}"
    )


def tf32_allowed(dtype: torch.dtype) -> bool:
    """Whether PyTorch's own float32 convolutions may use TF32, which xsep's then do too."""
    return dtype is torch.float32 and pointwise.tf32_allowed()
