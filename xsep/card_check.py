"""What a GPU backend must show on a card before ``auto`` runs its kernels there: ``python -m xsep.card_check cuda``.

Separable and depthwise problems with a plan of each kind; of ``cuda-chain``, a training step of a small network as a
chain. Forward and every gradient are held to float64 (:mod:`xsep.testing`), with memory that is NaN beforehand: the
tests' rule on a small share of the tests; ``make gpu-check`` runs all of them. Where all is right, a few layers are
timed beside PyTorch's convolutions (:mod:`xsep.tuning.probes`). The process prints one line of JSON, which
:mod:`xsep.tuning.card_checks` reads.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import sys
import time
import warnings
from collections.abc import Generator, Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import dispatch
from .backends.chain import Load, RawGradient
from .backends.chain_cuda_launch import form, wgrad_of_raw
from .backends.cuda import device_facts, wgrad_on_chip, wgrad_plan
from .cases import Case, generate
from .measuring import Effort, pytorchs_ways, time_ways
from .models.blocks import Block, Design, MaxPool
from .problem import IDENTITY, RELU, Affine, Geometry, Problem
from .testing import failures, float32_products, held_as, norm_violation, poisoned_memory
from .tuning import findings, probes
from .tuning.card_checks import CHAIN, backend_of

Timed = dict[str, findings.Finding]
SAME = {3: (1, 1, 1, 1), 5: (2, 2, 2, 2), 7: (3, 3, 3, 3)}


def _layer(n: int, c_in: int, c_out: int, size: tuple[int, int], k: int = 3, stride: int = 1, **more: Any) -> Case:
    h, w = size
    return Case(
        n=n, c_in=c_in, c_out=c_out, h=h, w=w, filter=(k, k), stride=(stride, stride), padding=SAME[k],
        activations=("relu", None, None), **more,
    )  # fmt: skip


#: Layers of real networks, and what lies beside the fast paths.
LAYERS = (
    _layer(2, 64, 128, (37, 41)), _layer(3, 128, 256, (19, 19)), _layer(2, 728, 728, (19, 19)),
    _layer(2, 96, 24, (29, 31), stride=2), _layer(2, 144, 40, (28, 28), k=5, stride=2, vectors=("scale_m", "shift_m")),
    _layer(2, 240, 80, (14, 14), k=5, bias=True), _layer(2, 96, 96, (21, 19), k=7, residual=True),
    _layer(2, 13, 17, (23, 19), vectors=("scale_p", "shift_p", "scale_e", "shift_e")),
    _layer(2, 128, 128, (37, 37), op="depthwise"), _layer(2, 64, 64, (27, 25), k=5, stride=2, op="depthwise"),
)  # fmt: skip
#: Some whose pointwise weights' gradient cuda makes in one kernel where they are large, checked by itself: one chunk of
#: channels, two, two parts of them, and a stride. The first three have the training chain's, too.
LARGE = (LAYERS[0], LAYERS[1], _layer(1, 256, 256, (19, 19)), LAYERS[3])
#: Tiles that a CTA of it has in the check, so that its buffers turn over.
TILES = 4
#: The network's channels, and batch and size of its pictures.
CHANNELS, PICTURES = (128, 256, 728), (2, 63, 58)
#: In float32 there are pictures and random numbers with which nothing lies within 1e-5 of its tensor's size of a
#: ReLU's jump or of a tie in a pool, where rounding, PyTorch's or ours, would decide over a whole share of the
#: gradients. In 16 bits there are so many such that both have their part.
FLOAT32_SEED, FLOAT32_PICTURES, SEED = 15, (2, 11, 10), 5
#: The cost model is corrected by what is measured so: a few runs of each, for whoever waits is at their first call.
PROBING, PROBING_SECONDS = Effort(rounds=7, seconds=0.0), 20.0


def types_of(backend: str, device: str) -> tuple[torch.dtype, ...]:
    """In which layers and the network are checked. Triton makes both 16-bit types of one source; on a CPU, PyTorch's
    own 16-bit convolutions may take minutes for them."""
    if device == "cpu":
        return (torch.float32,)
    return (torch.bfloat16, torch.float32) if backend == "triton" else (torch.bfloat16, torch.float16, torch.float32)


def cases(backend: str, device: str) -> Iterator[Case]:
    """The problems; fewer for Triton, which compiles each anew."""
    layers = (*LAYERS[:3], LAYERS[4], LAYERS[7], LAYERS[9]) if backend == "triton" else LAYERS
    for dtype in types_of(backend, device):
        yield from (replace(layer, dtype=dtype) for layer in layers)
    if backend != "triton":
        yield from generate(24, seed=7)


class Part(nn.Module):
    """Two blocks that halve the size, two that keep it, and a head: every kernel of the chain at Xception's widths."""

    def __init__(self, backend: str, channels: tuple[int, int, int] = CHANNELS) -> None:
        super().__init__()
        design, (narrow, middle, wide) = Design(backend=backend), channels
        self.stem = nn.Conv2d(3, narrow, 3, bias=False)
        self.blocks = nn.Sequential(
            Block(narrow, middle, 2, design, pool=MaxPool("torch"), start_with_relu=False),
            Block(middle, wide, 2, design, pool=MaxPool("same")),
            Block(wide, wide, 3, design), Block(wide, wide, 3, design),
        )  # fmt: skip
        self.fc = nn.Linear(wide, 10)
        norms: list[Any] = [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)]
        for bn in norms:
            nn.init.normal_(bn.weight)  # both signs
            nn.init.normal_(bn.bias)
            bn.weight.data[0] = 0
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 2)

    def chained(self, chain: bool) -> Part:
        for block in self.blocks:
            block.chain = chain  # type: ignore[assignment]
        return self

    def by_pytorch(self) -> Part:
        """A copy whose convolutions and BatchNorms are PyTorch's, each for itself."""
        plain = copy.deepcopy(self).chained(False)
        for block in plain.blocks:
            for conv, _ in block.pairs():  # type: ignore[operator]
                conv.backend = "aten"
        return plain

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).relu().mean((2, 3)))


def step(m: Any, x: Tensor) -> dict[str, Tensor]:
    """Output, every parameter's gradient and every running statistic after one step of training."""
    m.zero_grad(set_to_none=True)
    y = m(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape))
    found = {"y": y.detach()} | {name: p.grad.clone() for name, p in m.named_parameters() if p.grad is not None}
    return found | {name: b.clone().float() for name, b in m.named_buffers() if b.is_floating_point()}


def network_failures(part: Part, x: Tensor) -> list[str]:
    """What is wrong with a chained step of a network, against float64 and PyTorch's own of that type."""
    plain = part.by_pytorch()
    truth, own = step(copy.deepcopy(plain).double(), x.double()), step(plain, x)
    with poisoned_memory():
        ours = step(copy.deepcopy(part).chained(True), x)
    found = ((what, norm_violation(ours[what], truth[what], own[what], x.dtype)) for what in truth)
    return [f"{what}: {wrong}" for what, wrong in found if wrong]


def network(
    backend: str, dtype: torch.dtype, device: str, channels: tuple[int, int, int] = CHANNELS,
    pictures: Optional[tuple[int, int, int]] = None,
) -> tuple[Part, Tensor]:  # fmt: skip
    """The network and its pictures, random from a fixed seed."""
    torch.manual_seed(FLOAT32_SEED if dtype is torch.float32 else SEED)
    n, h, w = pictures or (FLOAT32_PICTURES if dtype is torch.float32 else PICTURES)
    x = torch.randn(n, 3, h, w).to(device, dtype).contiguous(memory_format=torch.channels_last)
    part: Any = Part(backend, channels).to(device, dtype)
    return part.to(memory_format=torch.channels_last).train(), x


def _problem(case: Case) -> Problem:
    """A separable one's, channels_last on a GPU, behind ReLU."""
    return Problem(
        "separable", "cuda", case.dtype, True, case.n, case.c_in, case.h, case.w, 1, *case.filter, case.c_out,
        Geometry(*case.stride, *case.pads, *case.dilation), (RELU, IDENTITY, IDENTITY),
    )  # fmt: skip


def wgrad_failures(case: Case, device: str, chained: bool = False) -> list[str]:
    """What is wrong with a layer's dw_pw by the kernel that keeps z on the chip, which only large problems take.

    Or by the training chain's, which forms dr there too.
    """
    torch.manual_seed(SEED)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape).to(device, case.dtype).contiguous(memory_format=torch.channels_last)

    x, w_dw = randn(case.n, case.c_in, case.h, case.w), randn(case.c_in, 1, *case.filter)
    dy, geometry = randn(case.n, case.c_out, *case.output_size), _problem(case).geometry

    def by_pytorch(dtype: torch.dtype) -> Tensor:
        padded = F.pad(x.to(dtype).relu(), case.pads)
        z = F.conv2d(padded, w_dw.to(dtype), None, case.stride, 0, case.dilation, case.c_in)
        wide = torch.promote_types(dtype, torch.float32)
        return dy.to(wide).transpose(0, 1).flatten(1) @ z.to(wide).transpose(0, 1).flatten(1).t()

    with poisoned_memory():
        if chained:
            raw = RawGradient(dy, torch.randn_like(dy), torch.randn(3, case.c_out, device=dy.device))
            dy, ours = wgrad_of_raw(raw, x, Load(activation=RELU), w_dw, geometry)
            if not torch.equal(dy, form(raw)):
                return ["dr: not the kernel's that does nothing else"]
        else:
            ours = wgrad_on_chip(dy, x, w_dw, Affine(activation=RELU), geometry)
    found = norm_violation(ours, by_pytorch(torch.float64), by_pytorch(case.dtype), torch.float32)
    return [f"dw_pw: {found}"] if found else []


def large_failures(device: str, chained: bool) -> Iterator[tuple[str, list[str]]]:
    """Those of ``wgrad_failures``, of layers for which this card has such a kernel, with several tiles for each CTA."""
    facts, of = device_facts(torch.cuda.current_device()), "chain" if chained else "separable"
    for dtype in (torch.bfloat16, torch.float16):
        for layer in LARGE[:3] if chained else LARGE:
            case = replace(layer, dtype=dtype)
            plan = wgrad_plan(_problem(case), facts, of)
            while plan is not None and plan.walk.tiles < TILES * plan.walk.workers:
                case = replace(case, n=2 * case.n)
                plan = wgrad_plan(_problem(case), facts, of)
            if plan is not None:
                yield f"{case.id}, dw_pw with z on the chip", wgrad_failures(case, device, chained)


def check(subject: str, device: str) -> Generator[tuple[str, list[str]], None, None]:
    """Each thing that is checked, by name, and what is wrong with it."""
    backend = backend_of(subject)
    if subject != backend:
        with float32_products("ieee"):
            for dtype in types_of(backend, device):
                yield f"a network's step, {dtype}", network_failures(*network(backend, dtype, device))
            if backend == "cuda":
                yield from large_failures(device, chained=True)
        return
    with float32_products("ieee"):
        for case in cases(backend, device):
            yield case.id, failures(case, backend, device)
        if backend == "cuda":
            yield from large_failures(device, chained=False)
    if device != "cpu":
        with float32_products("tf32"):
            for case in (LAYERS[0], LAYERS[2]):
                kind = held_as(case.dtype, torch.device(device))
                yield f"{case.id}, TF32", failures(case, backend, device, kind)


def time_probes(backends: Iterable[str], dtypes: Iterable[torch.dtype], effort: Effort, seconds: float) -> Timed:
    """Times, on the current GPU, of backends known to be right and of PyTorch on the layers of tuning/probes.py.

    PyTorch has cuDNN's fastest algorithms and TF32, as it would at its best. Left out are a backend where it cannot run
    a layer, layers for which the card has no memory, and all that remain after so many seconds.
    """
    found: Timed = {}
    able = [dispatch.backend(name) for name in backends]
    started, benchmark = time.monotonic(), torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with float32_products("tf32"):
            for layer in (layer for dtype in dtypes for layer in probes.of_type(dtype)):
                if time.monotonic() - started > seconds:
                    break
                ways = pytorchs_ways(layer)
                ways |= {b.name: (b, layer.channels_last) for b in able if not b.not_supported_reasons(layer)}
                with contextlib.suppress(torch.OutOfMemoryError):
                    found[findings.problem_key(layer)] = findings.Finding(str(layer), time_ways(layer, ways, effort))
    finally:
        torch.backends.cudnn.benchmark = benchmark
    return found


def main(argv: Optional[list[str]] = None) -> int:
    parser = argparse.ArgumentParser("python -m xsep.card_check", description=(__doc__ or "").split("\n")[0])
    names = [name + part for name in ("cuda", "triton", "cpu", "aten") for part in ("", CHAIN)]
    parser.add_argument("subject", choices=names, metavar="SUBJECT", help=f"one of {', '.join(names)}")
    parser.add_argument("--device", default="cuda:0", help="cpu, cuda or cuda:N (default: cuda:0)")
    args = parser.parse_args(argv)
    result: dict[str, Any] = {"problems": 0, "wrong": "", "why": ""}
    name = ""
    try:
        if args.device != "cpu":
            if not torch.cuda.is_available():
                raise RuntimeError("PyTorch sees no GPU here")
            torch.cuda.set_device(args.device)
        with warnings.catch_warnings(), contextlib.closing(check(args.subject, args.device)) as checked:
            warnings.simplefilter("ignore")  # PyTorch's, about what of it is not deterministic
            for name, wrong in checked:
                result["problems"] += 1
                if wrong:
                    more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
                    result["wrong"] = f"{name}: {'; '.join(wrong[:3])}{more}"
                    break
        if not result["wrong"] and args.device != "cpu" and args.subject == backend_of(args.subject):
            name = "layers that were timed"
            timed = time_probes([args.subject], types_of(args.subject, args.device), PROBING, PROBING_SECONDS)
            result["probes"] = {key: asdict(found) for key, found in timed.items()}
    except torch.OutOfMemoryError:
        result["why"] = f"the card's memory ran out after {result['problems']} problems"
    except RuntimeError as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if name:
            result["wrong"] = f"after {name}: {said}"
        else:  # nothing of ours has run before
            result["why"] = said
    print(json.dumps(result))
    return 1 if result["wrong"] else 2 if result["why"] else 0


if __name__ == "__main__":
    sys.exit(main())
