"""Which backend runs which problem, and why the others do not.

``auto`` asks, in this order: what was measured for this very problem on this card (by ``xsep.autotune`` or a shipped
table); on a GPU the cost model of :mod:`xsep.plans`, corrected by what a few layers took on the card; else a fixed
order, with ``aten`` first where a backend says of itself that it is slower. On a GPU a backend takes part only where
the sources at hand were verified on a card of that architecture, or have been checked on this very one, so that
nobody's network runs on kernels no card has tested. The first problem that could run on it has it checked
(:mod:`xsep.tuning.card_checks`).
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple, Optional, TypeVar

import torch

from .backends.aten import ATEN
from .backends.base import Backend
from .extension import forget_repeated
from .problem import Problem
from .tuning import card_checks, findings
from .tuning.device import cpu_name, running
from .tuning.findings import DIRECTIONS, Card

#: What ``auto`` may take on each kind of device, in the order in which it does where nothing better is known; elsewhere
#: it is ``aten``.
AUTO = {"cpu": ("cpu", "aten"), "cuda": ("cuda", "triton", "aten")}
#: Tested in every change, so they need no card's word.
ALWAYS = ("cpu", "aten")

NAMES = ("cuda", "triton", "cpu", "aten")

Answer = TypeVar("Answer")

#: Empties what :func:`remembered` keeps.
_forgetting: list[Callable[[], None]] = []
#: Problems that ran while :func:`recording`, in order; None while nobody records.
_recorded: Optional[dict[Problem, None]] = None
#: The same of the training chain's layers, and where they are worth it.
_recorded_chains: Optional[dict[Problem, None]] = None
CHAINS_TUNED = ("cuda",)


def remembered(decide: Callable[..., Answer]) -> functools._lru_cache_wrapper[Answer]:
    """Decides each question once, until :func:`forget_choices`."""
    kept = functools.lru_cache(maxsize=8192)(decide)
    _forgetting.append(kept.cache_clear)
    return kept


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


def trusting() -> bool:
    """Whether the user lets ``auto`` take kernels that no card has verified: XSEP_TRUST_UNVERIFIED=1."""
    return os.environ.get("XSEP_TRUST_UNVERIFIED", "0") not in ("", "0")


@cache
def card_of(device: str, index: int) -> Card:
    """The card that problems on such a device run on, as the tables and the cache name it; index as :func:`place`."""
    if device == "cuda":
        properties = running(index)
        return Card(properties.name, properties.architecture)
    if device == "cpu":
        level = os.environ.get("XSEP_CPU_ISA", "") or torch.backends.cpu.get_cpu_capability().lower()
        return Card(f"{cpu_name()}, {index} thread{'' if index == 1 else 's'}", level)
    return Card(device, device)


def place(device: str) -> int:
    """What, beside its kind, tells a device's speed from another's here: a GPU's index, a CPU's threads."""
    if device == "cpu":
        return torch.get_num_threads()
    if device == "cuda":
        with contextlib.suppress(RuntimeError, AssertionError):  # a problem made up where there is no GPU
            return torch.cuda.current_device()
    return 0


class Choice(NamedTuple):
    """The backend for a problem, and the reason in words."""

    backend: Backend
    why: str
    left: bool = False  # PyTorch's convolutions, because they are known to be faster, and nobody asked for them


def why_not_eligible(subject: str, card: Card) -> str:
    """Why ``auto`` may not take a GPU backend, or its training chain (:mod:`xsep.tuning.card_checks` has the names), by
    what is known now; "" where it may."""
    name = card_checks.backend_of(subject)
    if name in ALWAYS or trusting() or findings.verified_on(name, card.architecture) is not None:
        return ""
    wrong = card_checks.known(subject, card)
    if wrong is None:
        unanswered = card_checks.why_unanswered(subject, card)
        return (
            f"its kernels, as they are now, have not been verified on any {card.architecture} card"
            + (f", and could not be checked on this one ({unanswered})" if unanswered else "")
            + ": run `python -m xsep check` or `make gpu-check` on one, or set XSEP_TRUST_UNVERIFIED=1"
        )
    return f"its kernels were wrong when `python -m xsep check` ran on this card: {wrong}" if wrong else ""


def may_take(subject: str, card: Card, index: int) -> bool:
    """Whether ``auto`` may take it; where nobody has found out yet, the card is checked, once and for all."""
    if not why_not_eligible(subject, card):
        return True
    return card_checks.enabled() and card_checks.is_right(subject, index, card)


def _eligible(able: list[str], card: Card, index: int) -> list[str]:
    """Those of a GPU's backends that ``auto`` may take. Where that is PyTorch's alone, one after the other is checked
    until one is right: to know of all of them would take Triton's minutes."""
    known = [name for name in able if not why_not_eligible(name, card)]
    if known != ["aten"]:
        return known
    return list(dict.fromkeys([next(name for name in able if may_take(name, card, index)), "aten"]))


def _measured(problem: Problem, card: Card, able: list[str], direction: str) -> Optional[Choice]:
    """The fastest backend by what was measured for this problem; each in such a record has passed its gate there."""
    found = findings.lookup(problem, card)
    if found is None:
        return None
    finding, by = found
    best = finding.best(direction, able)
    if best is None:
        return None
    times = finding.times[direction]
    figures = ", ".join(f"{name} {us:.1f} us" for name, us in sorted(times.items(), key=lambda item: item[1]))
    return Choice(backend(best), f"measured fastest, {direction}, by {by}: {figures}")


def _decide(problem: Problem, direction: str, index: int) -> Choice:
    able = [name for name in AUTO.get(problem.device, ("aten",)) if not backend(name).not_supported_reasons(problem)]
    if able == ["aten"]:
        return Choice(ATEN, "no other backend can run it here")
    card = card_of(problem.device, index)
    slower = "" if problem.device == "cuda" else backend(able[0]).slower_than_aten(problem, direction)
    measured = _measured(problem, card, able, direction)
    if measured is not None:
        return measured._replace(left=measured.backend is ATEN and bool(slower))
    if problem.device != "cuda":
        if slower:
            return Choice(ATEN, f"{slower}; xsep.autotune can measure", left=True)
        return Choice(backend(able[0]), "the first of those that can run it; xsep.autotune can measure")
    eligible = _eligible(able, card, index)
    if eligible == ["aten"]:
        return Choice(ATEN, "no other backend has been verified on such a card")
    from . import plans
    from .tuning import probes

    device, tf32 = running(index), plans.tf32_allowed(problem.dtype)
    fit = probes.fit(problem, card, device, direction, tf32)
    name, why = plans.choose(problem, device, tuple(eligible), direction, tf32, fit)
    return Choice(backend(name), why)


@remembered
def _select(problem: Problem, name: str, direction: str, index: int) -> Choice:
    if name == "auto":
        return _decide(problem, direction, index)
    chosen = backend(name)
    reasons = chosen.not_supported_reasons(problem)
    if reasons:
        raise RuntimeError(f"backend {name!r} cannot run {problem}: {'; '.join(reasons)}")
    return Choice(chosen, "it was asked for")


def choice(problem: Problem, name: str, direction: str = "forward") -> Choice:
    """The backend that runs the problem in one direction, and why; looked up, never measured, so a capture of a CUDA
    graph may ask too and keeps what it was told.

    Raises:
        RuntimeError: as :func:`select`.
    """
    return _select(problem, requested(name), direction, place(problem.device))


def select(problem: Problem, name: str, direction: str = "forward") -> Backend:
    """The backend that runs the problem, ``"forward"`` or ``"backward"``.

    Raises:
        RuntimeError: a backend was asked for by name, by argument or by XSEP_BACKEND, and cannot run the problem;
            the message carries all its reasons.
    """
    if _recorded is not None:
        _recorded[problem] = None
    return choice(problem, name, direction).backend


@contextlib.contextmanager
def recording() -> Iterator[dict[Problem, None]]:
    """Notes every problem that runs meanwhile, each once, in the order of its first call."""
    global _recorded
    before, _recorded = _recorded, {}
    forget_repeated()  # those would pass by unseen
    try:
        yield _recorded
    finally:
        _recorded = before


@contextlib.contextmanager
def recording_chains() -> Iterator[dict[Problem, None]]:
    """The same of the training chain's layers on devices that have several kinds of kernels for them."""
    global _recorded_chains
    before, _recorded_chains = _recorded_chains, {}
    try:
        yield _recorded_chains
    finally:
        _recorded_chains = before


def note_chain(problem: Problem) -> None:
    """A layer of the training chain runs."""
    if _recorded_chains is not None and problem.device in CHAINS_TUNED:
        _recorded_chains[problem] = None


def forget_choices() -> None:
    """Lets every problem be decided anew, by what is known now."""
    for forget in _forgetting:
        forget()
    forget_repeated()


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
        taken = choice(problem, wish)
        chosen = taken.backend
        lines.append(f"  runs on   {chosen.name}: {chosen.plan(problem)}")
        lines.append(f"  because   {taken.why}")
        backward = choice(problem, wish, DIRECTIONS[1])
        if backward.backend is not chosen:
            lines.append(f"  backward  {backward.backend.name}: {backward.why}")
    except RuntimeError as refusal:
        lines.append(f"  runs on   nothing: {refusal}")
    moved, flops = work(problem)
    lines.append(f"  floor     {moved / 1e6:.2f} MB through memory and {flops / 1e9:.3f} GFLOP, forward")
    for other in NAMES:
        candidate = backend(other)
        if candidate is chosen:
            continue
        lines.append(f"  not {other:<7}{_passed_over(problem, candidate, wish)}")
    return "\n".join(lines)


def _passed_over(problem: Problem, candidate: Backend, wish: str) -> str:
    reasons = candidate.not_supported_reasons(problem)
    if reasons:
        return "; ".join(reasons)
    if wish != "auto":
        return f"could run, but {wish} was asked for"
    if problem.device == "cuda":
        why = why_not_eligible(candidate.name, card_of("cuda", place("cuda")))
        if why:
            return f"could run, but {why}"
    return "could run, but another backend comes first"
