"""Times every way of running one problem, behind a correctness gate, for ``xsep.autotune`` and the command line.

What is timed is what the op does inside: the backend's forward, and its backward from a given dy, each result with the
strides that the op promises. A backend that is wrong on a problem gets no time there, and so is never chosen for it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor

from . import dispatch, testing
from .activations import output_determines_gradient
from .backends.aten import ATEN
from .backends.base import Backend
from .ops.definitions import DEPTHWISE, SEPARABLE, ConvOp
from .ops.layout import conform
from .problem import DEFAULT_ALPHA, IDENTITY, DepthwiseArgs, Problem, SeparableArgs
from .tuning.findings import DIRECTIONS, Finding

#: Elements of x, z and y together up to which the gate runs the whole batch; beyond, as many pictures as fit.
GATE_ELEMENTS = 2**26
LAYOUTS = {True: torch.channels_last, False: torch.contiguous_format}
#: Well above the largest L2 of any card so far.
FLUSH_BYTES = 2**29

Args = Union[SeparableArgs, DepthwiseArgs]
#: By name: a backend, and whether on channels_last tensors.
Ways = dict[str, tuple[Backend, bool]]


class Effort(NamedTuple):
    """How long to measure: rounds of every candidate in turn, at least and until the seconds are over."""

    rounds: int = 5
    seconds: float = 0.5


QUICK = Effort()


def layout_name(channels_last: bool) -> str:
    return "channels_last" if channels_last else "NCHW"


def random_arguments(problem: Problem, channels_last: Optional[bool] = None) -> tuple[Args, Tensor]:
    """Random tensors that make this problem, without vectors, and a dy for them; another layout where one is given."""
    p = problem
    layout = LAYOUTS[p.channels_last if channels_last is None else channels_last]
    generator = torch.Generator(p.device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=p.device) * scale
        return drawn.to(p.dtype).contiguous(memory_format=layout)

    x, w_dw = draw(p.n, p.c_in, p.h, p.w), draw(p.c_mid, 1, p.r, p.s, scale=(p.r * p.s) ** -0.5)
    codes, alphas = list(p.activations), [DEFAULT_ALPHA.get(code, 0.0) for code in p.activations]
    dy = draw(p.n, p.c_out, *p.output_size)
    no = None
    if p.op == "depthwise":
        return DepthwiseArgs(x, w_dw, no, no, no, no, no, list(p.geometry), codes, alphas), dy
    w_pw = draw(p.c_out, p.c_mid, 1, 1, scale=p.c_mid**-0.5)
    return SeparableArgs(x, w_dw, w_pw, no, no, no, no, no, no, no, no, list(p.geometry), codes, alphas), dy


def op_of(args: Args) -> ConvOp:
    return SEPARABLE if isinstance(args, SeparableArgs) else DEPTHWISE


def _wanted(args: Args) -> list[bool]:
    """Every tensor that is there wants its gradient."""
    tensors: tuple[Any, ...] = args[: op_of(args).tensors]
    return [t is not None for t in tensors]


def forward(backend: Backend, args: Args) -> Tensor:
    op = op_of(args)
    layout = LAYOUTS[op.problem(args).channels_last]
    return conform(op.run(backend, args), layout)


def backward(backend: Backend, args: Args, dy: Tensor, y: Optional[Tensor]) -> list[Tensor]:
    op = op_of(args)
    gradients = op.run_backward(backend, dy, args, y, _wanted(args))
    return [g for g in gradients if g is not None]


def _saved(args: Args, backend: Backend) -> Optional[Tensor]:
    """What the op keeps of y for its backward."""
    code = args.activations[-1]
    keeps = code != IDENTITY and output_determines_gradient(code, args.alphas[-1])
    return forward(backend, args) if keeps else None


def _results(backend: Backend, args: Args, dy: Tensor) -> dict[str, Tensor]:
    y = forward(backend, args)
    names = [n for n, want in zip(type(args)._fields, _wanted(args)) if want]
    gradients = backward(backend, args, dy, _saved(args, backend))
    return {"y": y, **{f"d{name}": g for name, g in zip(names, gradients)}}


def for_the_gate(problem: Problem) -> Problem:
    """The problem with as many of its pictures as the gate runs."""
    p = problem
    elements = p.c_in * p.h * p.w + (p.c_mid + p.c_out) * p.output_size[0] * p.output_size[1]
    return p._replace(n=min(p.n, max(2, GATE_ELEMENTS // max(elements, 1))))


def gate_reasons(gate: Callable[[], Iterable[str]]) -> list[str]:
    """Why what a gate looks at is left out, as sentences: it is wrong, or raised."""
    try:
        return [f"wrong: {sentence}" for sentence in gate()]
    except (RuntimeError, AssertionError) as error:
        said = str(error.args[0] if error.args else error).strip().splitlines()
        return [f"failed: {said[0] if said else type(error).__name__}"]


def gate(problem: Problem, backend: Backend) -> list[str]:
    """What is wrong with a backend's results on a problem, as sentences; the project's one tolerance rule."""
    p = problem
    args, dy = random_arguments(for_the_gate(p))
    changed: dict[str, Any] = {k: t.double() for k, t in args._asdict().items() if isinstance(t, Tensor)}
    wide: Any = args._replace(**changed)
    exact = _results(ATEN, wide, dy.double())
    truth = testing.Truth(exact, {name: float(t.abs().max()) if t.numel() else 0.0 for name, t in exact.items()})
    with testing.poisoned_memory():
        ours = _results(backend, args, dy)
    kind = testing.held_as(p.dtype, args.x.device) if p.op == "separable" else p.dtype
    return testing.violations(ours, truth, _results(ATEN, args, dy), kind)


def pytorchs_ways(problem: Problem) -> Ways:
    """PyTorch's convolutions in the problem's memory layout, and in the other one."""
    own = problem.channels_last
    return {"aten": (ATEN, own), f"aten, {layout_name(not own)}": (ATEN, not own)}


def _candidates(problem: Problem) -> tuple[Ways, dict[str, str]]:
    """Ways to measure, PyTorch's two first; and refusals."""
    found, refused = pytorchs_ways(problem), {}
    for name in dispatch.AUTO.get(problem.device, ("aten",)):
        if name == "aten":
            continue
        candidate = dispatch.backend(name)
        reasons = candidate.not_supported_reasons(problem) or gate_reasons(partial(gate, problem, candidate))
        if reasons:
            refused[name] = "; ".join(reasons)
        else:
            found[name] = (candidate, problem.channels_last)
    return found, refused


def _rounds(effort: Effort) -> Iterator[None]:
    """As often as the effort asks for."""
    start, done = time.perf_counter(), 0
    while done < effort.rounds or (done < 20 * effort.rounds and time.perf_counter() - start < effort.seconds):
        yield
        done += 1


def _timed_on_cpu(calls: dict[str, Callable[[], Any]], effort: Effort) -> dict[str, float]:
    """Microseconds of each call, taken in turns: the least."""
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in _rounds(effort):
        for name, call in calls.items():
            before = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - before)
    return {name: 1e6 * min(samples) for name, samples in taken.items()}


class Flush:
    """Keeps the card busy, by writes of more than its L2 holds, until the host has enqueued whichever of these calls
    comes next; else events around a call that is done sooner than it is asked for would time the host.

    Each call is made a few times for that, and is warm afterwards.
    """

    def __init__(self, calls: Iterable[Callable[[], Any]]) -> None:
        self.memory = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
        host = 0.0
        for call in calls:
            for _ in range(3):
                call()
            torch.cuda.synchronize()
            before = time.perf_counter()
            call()
            host = max(host, time.perf_counter() - before)
            torch.cuda.synchronize()
        self.memory.zero_()  # the first one may load its kernel
        torch.cuda.synchronize()
        before = time.perf_counter()
        self.memory.zero_()
        torch.cuda.synchronize()
        self.times = min(1 + int(3 * host / (time.perf_counter() - before)), 100)

    def __call__(self) -> None:
        for _ in range(self.times):
            self.memory.zero_()


def _timed_on_gpu(calls: dict[str, Callable[[], Any]], effort: Effort) -> dict[str, float]:
    """Microseconds that the card takes for each call, taken in turns: the median of CUDA events, with nothing in L2.

    The host's own time, which a loop of small calls is bound by, is not in the figure, for any backend.
    """
    flush = Flush(calls.values())
    taken: dict[str, list[Any]] = {name: [] for name in calls}
    for _ in _rounds(effort):
        for name, call in calls.items():
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            flush()
            events[0].record()
            call()
            events[1].record()
            taken[name].append(events)
        torch.cuda.synchronize()
    return {name: statistics.median(1e3 * a.elapsed_time(b) for a, b in pairs) for name, pairs in taken.items()}


def timed(device: str, calls: dict[str, Callable[[], Any]], effort: Effort) -> dict[str, float]:
    """Microseconds of each call on a kind of device."""
    return (_timed_on_gpu if device == "cuda" else _timed_on_cpu)(calls, effort)


def time_ways(
    problem: Problem, ways: Ways, effort: Effort, directions: Iterable[str] = DIRECTIONS
) -> dict[str, dict[str, float]]:
    """Microseconds by direction and way, for backends that are known to be right."""
    found: dict[str, dict[str, float]] = {}
    with torch.no_grad(), torch._C._DisableAutocast():
        inputs = {layout: random_arguments(problem, layout) for layout in {layout for _, layout in ways.values()}}
        for direction in directions:
            calls: dict[str, Callable[[], Any]] = {}
            for name, (candidate, layout) in ways.items():
                args, dy = inputs[layout]
                if direction == "forward":
                    calls[name] = partial(forward, candidate, args)
                else:
                    calls[name] = partial(backward, candidate, args, dy, _saved(args, candidate))
            found[direction] = timed(problem.device, calls, effort)
    return found


def measure(problem: Problem, effort: Effort = QUICK, directions: Iterable[str] = DIRECTIONS) -> Finding:
    """Times of every way of running a problem that is right, and why each other backend was left out."""
    with torch.no_grad(), torch._C._DisableAutocast():
        ways, refused = _candidates(problem)
    return Finding(str(problem), time_ways(problem, ways, effort, directions), refused)
