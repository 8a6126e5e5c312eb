"""Which backend runs the training chain, and a layer's backward by which of its ways."""

from __future__ import annotations

from functools import cache
from itertools import chain
from typing import Optional

import torch

from ...backends.chain import ChainBackend
from ...backends.chain_aten import ATEN_CHAIN
from ...dispatch import card_of, may_take, note_chain, place, remembered, requested, trusting
from ...problem import Geometry, Problem
from ...tuning import findings
from ...tuning.card_checks import CHAIN

#: What ``auto`` tries, in order; elsewhere it is ``aten``. On a GPU, as for the ops themselves, only what was verified
#: on a card of its architecture or checked on this one.
AUTO = {"cpu": ("cpu", "aten"), "cuda": ("cuda", "triton", "aten")}
NAMES = ("cuda", "triton", "cpu", "aten")
POINT = Geometry(1, 1, 0, 0, 0, 0, 1, 1)


@cache
def chain_backend(name: str) -> ChainBackend:
    """The backend of that name; loading one never fails, it answers with reasons instead.

    "cuda, in slices" and the like is one that goes over a layer's backward in a way of its own.
    """
    if name == "aten":
        return ATEN_CHAIN
    if name == "cpu":
        from ...backends.chain_cpu import CPU_CHAIN

        return CPU_CHAIN
    if name == "triton":
        from ...backends.chain_triton import TRITON_CHAIN

        return TRITON_CHAIN
    if name == "cuda":
        from ...backends.chain_cuda import CUDA_CHAIN

        return CUDA_CHAIN
    if name.startswith("cuda, "):
        from ...backends.chain_cuda import CudaChain

        return CudaChain(name.partition(", ")[2])
    raise ValueError(f"no backend of the training chain is called {name!r}; there are {', '.join(NAMES)}")


def not_supported_reasons(problem: Problem, name: str = "auto") -> list[str]:
    """Why the chain cannot run a layer on the backend asked for: sentences, or an empty list where it can."""
    name = requested(name)
    if name == "auto":
        return []
    return chain_backend(name).not_supported_reasons(problem)


def select(problem: Problem, name: str, direction: str = "forward") -> ChainBackend:
    """The backend that runs a layer, ``"forward"`` or ``"backward"``.

    Raises:
        RuntimeError: one was asked for by name and cannot run it; the message carries all its reasons.
    """
    note_chain(problem)
    return _select(problem, requested(name), direction, place(problem.device), trusting())


def _measured(problem: Problem, direction: str, index: int) -> Optional[ChainBackend]:
    """The fastest by what was measured for this layer; what is in such a record has passed its gate."""
    found = findings.lookup(problem.as_chain_layer(), card_of(problem.device, index))
    if found is None:
        return None
    able = [way for way in found[0].times.get(direction, {}) if not chain_backend(way).not_supported_reasons(problem)]
    best = found[0].best(direction, able)
    return None if best is None else chain_backend(best)


@remembered
def _select(problem: Problem, name: str, direction: str, index: int, trusted: bool) -> ChainBackend:
    """Whether the user trusts what no card has verified is part of the question."""
    if name != "auto":
        found = chain_backend(name)
        reasons = found.not_supported_reasons(problem)
        if reasons:
            raise RuntimeError(f"the training chain cannot run {problem}: {'; '.join(reasons)}")
        return found
    candidates = AUTO.get(problem.device, ("aten",))
    # One after the other, as far as needed: to ask the triton backend is to import Triton.
    able = (name for name in candidates if not chain_backend(name).not_supported_reasons(problem))
    first = next(able)
    if first == "aten":
        return ATEN_CHAIN
    measured = _measured(problem, direction, index)
    if measured is not None:
        return measured
    return chain_backend(next(name for name in chain((first,), able) if _may_take(name, problem.device, index)))


def _may_take(name: str, device: str, index: int) -> bool:
    return device != "cuda" or may_take(name + CHAIN, card_of(device, index), index)


def select_for(device: torch.device, dtype: torch.dtype, name: str) -> ChainBackend:
    """The backend for what is no convolution, so that only device and type can matter."""
    point = Problem("separable", device.type, dtype, True, 1, 1, 1, 1, 1, 1, 1, 1, POINT, (0, 0, 0))
    return _select(point, requested(name), "forward", place(device.type), trusting())
