"""Times every way of running a layer of the training chain that is right, for ``xsep.autotune`` and the benchmarks.

A layer is timed as it lies in the middle of a chain: a raw output in, the activation on load, both convolutions, the
statistics of a raw output and the vectors that BatchNorm makes of them.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.chain import ChainBackend, Load, RawGradient
from ..backends.chain_aten import ATEN_CHAIN
from ..measuring import QUICK, Effort, for_the_gate, gate_reasons, timed
from ..ops.training.selection import AUTO, chain_backend
from ..problem import DEFAULT_ALPHA, Problem
from ..testing import held_as, norm_violation, poisoned_memory
from ..tuning.findings import Finding

EPS = 1e-5
Results = dict[str, Tensor]


class Layer(NamedTuple):
    """A layer's tensors, between the layers before and behind."""

    problem: Problem
    x: Tensor  # [N, C_in, H, W], the raw output before
    vec: Tensor  # [2, C_in], of the BatchNorm before
    w_dw: Tensor
    w_pw: Tensor
    gamma: Tensor  # [C_out]
    beta: Tensor
    du: Tensor  # [N, C_out, P, Q]
    centres: Tensor  # [2, C_in]

    @property
    def load(self) -> Load:
        code = self.problem.activations[0]
        return Load(self.vec, code, DEFAULT_ALPHA.get(code, 0.0))

    def double(self) -> Layer:
        return Layer(self.problem, *(t.double() for t in self[1:]))


class Between(NamedTuple):
    """What a backward finds: of the forward, and from the layer behind. The same for every backend."""

    r: Tensor
    mean: Tensor
    invstd: Tensor
    values: Tensor  # how many a channel
    sums: Tensor  # [2, C_out] of du and du * (r - mean)

    def double(self) -> Between:
        return Between(*(t.double() for t in self))


def draw(problem: Problem) -> Layer:
    """Random tensors that make this problem, channels_last; the same each time."""
    p = problem
    generator = torch.Generator(p.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=p.device)

    def image(c: int, h: int, w: int) -> Tensor:
        return normal(p.n, c, h, w).to(p.dtype).contiguous(memory_format=torch.channels_last)

    x = image(p.c_in, p.h, p.w)
    # A ReLU that is open or shut, and nothing between: no rounding may decide. |scale x| is 0.25 at least, |shift| 0.2.
    x = torch.where(x < 0, x - 0.5, x + 0.5)
    shift = 0.4 * torch.rand(p.c_in, generator=generator, device=p.device) - 0.2
    scale, gamma = (0.5 + torch.rand(c, generator=generator, device=p.device) for c in (p.c_in, p.c_out))
    w_dw = (normal(p.c_in, 1, p.r, p.s) * (p.r * p.s) ** -0.5).to(p.dtype)
    w_pw = (normal(p.c_out, p.c_in, 1, 1) * p.c_in**-0.5).to(p.dtype)
    vec, centres = torch.stack([scale, shift]), normal(2, p.c_in)
    return Layer(p, x, vec, w_dw, w_pw, gamma, normal(p.c_out), image(p.c_out, *p.output_size), centres)


def forward(chain: ChainBackend, a: Layer) -> Results:
    f = chain.sep_fprop(a.x, a.load, None, a.w_dw, a.w_pw, a.problem.geometry, True)
    assert f.partials is not None and f.counts is not None
    found = chain.bn_finalize(f.partials, f.counts, a.gamma, a.beta, None, None, None, 0.1, EPS)
    return {"r": f.r, **dict(zip(("vec", "centres", "invstd", "values"), found))}


def backward(chain: ChainBackend, a: Layer, b: Between) -> Results:
    coef, dgamma, dbeta = chain.bn_backward_finalize(b.sums, b.mean, b.invstd, a.gamma, b.values, True)
    found = chain.sep_backward(
        RawGradient(a.du, b.r, coef), a.w_pw, a.w_dw, a.x, a.load, a.problem.geometry, None, [a.x], a.centres,
        (True, True, True),
    )  # fmt: skip
    named = {"dgamma": dgamma, "dbeta": dbeta, **found._asdict()}
    return {name: t for name, t in named.items() if t is not None}


def between(a: Layer, exact: Results) -> Between:
    """From a forward in float64."""
    r, mean = exact["r"].to(a.x.dtype), exact["centres"][1]
    off = a.du.double() * (r.double() - mean[:, None, None])
    sums = torch.stack([a.du.double().sum((0, 2, 3)), off.sum((0, 2, 3))])
    return Between(r, mean.float(), exact["invstd"].float(), exact["values"], sums.float())


class Gate:
    """What is right on a layer's tensors: the chain in plain PyTorch in float64, and its error at the type."""

    def __init__(self, a: Layer) -> None:
        wide = a.double()
        self.a, self.forward = a, forward(ATEN_CHAIN, wide)
        self.b = between(a, self.forward)
        self.backward = backward(ATEN_CHAIN, wide, self.b.double())
        self.own_forward, self.own_backward = forward(ATEN_CHAIN, a), backward(ATEN_CHAIN, a, self.b)

    def wrong(self, chain: ChainBackend) -> list[str]:
        """Sentences on what is wrong with a backend's results, forward and backward."""
        return self.wrong_forward(chain) + self.wrong_backward(chain)

    def wrong_forward(self, chain: ChainBackend) -> list[str]:
        with poisoned_memory():
            got = forward(chain, self.a)
        return self._wrong(got, self.forward, self.own_forward)

    def wrong_backward(self, chain: ChainBackend) -> list[str]:
        with poisoned_memory():
            got = backward(chain, self.a, self.b)
        return self._wrong(got, self.backward, self.own_backward)

    def _wrong(self, got: Results, exact: Results, own: Results) -> list[str]:
        """Only images are rounded to the type."""
        kind, found = held_as(self.a.x.dtype, self.a.x.device), []
        for name, truth in exact.items():
            rounded = kind if name in ("r", "dx") else torch.promote_types(kind, torch.float32)
            if said := norm_violation(got[name], truth, own[name], rounded):
                found.append(f"{name} is {said}")
        return found


def ways(problem: Problem) -> tuple[dict[str, ChainBackend], dict[str, str]]:
    """Backends that can run a layer, and refusals. One that can go over the backward in several ways has those that its
    planner does not take under names of their own."""
    found: dict[str, ChainBackend] = {}
    refused: dict[str, str] = {}
    for name in AUTO.get(problem.device, ("aten",)):
        chain = chain_backend(name)
        reasons = chain.not_supported_reasons(problem)
        if reasons:
            refused[name] = "; ".join(reasons)
            continue
        found[name] = chain
        found |= {f"{name}, {way}": chain_backend(f"{name}, {way}") for way in chain.other_ways(problem)}
    return found, refused


def measure(problem: Problem, effort: Effort = QUICK) -> Finding:
    """Times of every way of running a layer that is right, and why each other one was left out.

    Held to the truth are all pictures or, of large ones, as many as fit.
    """
    named = problem.as_chain_layer()
    with torch.no_grad(), torch._C._DisableAutocast():
        gate = Gate(draw(for_the_gate(problem)))
        able, refused = ways(problem)
        for name, chain in list(able.items()):
            if wrong := gate_reasons(partial(gate.wrong, chain)):
                refused[name] = "; ".join(wrong)
                del able[name]
        del gate
        a = draw(problem)
        b = between(a, forward(ATEN_CHAIN, a))
        times = {
            "forward": timed(
                problem.device, {name: partial(forward, c, a) for name, c in able.items() if "," not in name}, effort
            ),
            "backward": timed(problem.device, {name: partial(backward, c, a, b) for name, c in able.items()}, effort),
        }
    return Finding(str(named), times, refused)
