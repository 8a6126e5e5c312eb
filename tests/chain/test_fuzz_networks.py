"""Networks of chained layers, drawn from a seed, against the same modules called one after another, in float64.

The kernels are test_fuzz.py's; this is about what links them: handles, shortcuts, several readers, frozen parts.
A failure names the seed; ``hold_network(seed)`` is that network again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from random import Random
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.chain.test_forward_ops import starts, torch_pool
from tests.fuzzing import batch_norm, examples, hold_same, hold_seeds
from xsep.chain import Handle
from xsep.chain.layers import identity_block, pooled_block, separable
from xsep.modules import FusedSeparableConv2d
from xsep.problem import ACTIVATIONS

WIDTHS = (2, 3, 5, 8)


def frozen_or_not(r: Random, channels: int) -> nn.BatchNorm2d:
    bn = batch_norm(r, channels)
    return bn.eval() if bn.running_mean is not None and r.random() < 0.15 else bn


def pair(r: Random, c_in: int, c_out: int, keeps_size: bool = True) -> nn.ModuleList:
    """A separable convolution and its BatchNorm."""
    activation = r.choice(["relu", "relu", *ACTIVATIONS])
    kernel: Any
    stride: Any = 1
    if keeps_size:
        kernel, dilation = r.choice([1, 3, 3, 5, (3, 5)]), r.choice([1, 1, 2])
        padding: Any = "same"
    else:
        kernel, dilation = r.choice([1, 2, 3, (2, 3)]), 1
        stride, padding = r.choice([1, 2, (1, 2)]), r.choice(["same", "valid", 1, (0, 1, 2, 1)])
    conv = FusedSeparableConv2d(
        c_in, c_out, kernel, stride, padding, dilation, bias=False,
        prologue_activation=None if activation == "identity" else activation,
        prologue_alpha=r.choice([None, 0.3, -0.2]) if activation in ("elu", "leaky_relu") else None,
    )  # fmt: skip
    return nn.ModuleList([conv, frozen_or_not(r, c_out)])


class Network(nn.Module):
    """Steps over modules, each in two ways: of tensors, and of handles."""

    def __init__(self, r: Random) -> None:
        super().__init__()
        self.steps: list[tuple[str, str]] = []  # what, and how
        self.parts: Any = nn.ModuleList()
        self.c_in = c = r.choice(WIDTHS)
        if r.random() < 0.6:
            self.add("stem", r.choice(["", "relu"]), nn.Conv2d(c, c, 3, padding=1), frozen_or_not(r, c))
        for _ in range(r.randint(1, 5)):
            what = r.choice(["layer", "layer", "layer", "identity", "pooled", "relu", "read", "settle"])
            c_out, between = r.choice(WIDTHS), [r.choice(WIDTHS) for _ in range(r.randint(0, 2))]
            if what == "layer":
                self.add(what, "", pair(r, c, c_out, r.random() < 0.6))
            elif what == "identity":
                widths = [c, *between, c]
                self.add(what, "", *(pair(r, a, b) for a, b in pairwise(widths)))
            elif what == "pooled":
                widths = [c, *(between or [c]), c_out]
                skip = nn.ModuleList([nn.Conv2d(c, c_out, 1, 2, bias=False), frozen_or_not(r, c_out)])
                self.add(what, r.choice(["torch", "same"]), *(pair(r, a, b) for a, b in pairwise(widths)), skip)
            else:
                self.add(what, "")
            c = c_out if what in ("layer", "pooled") else c
        self.add(r.choice(["mean", "mean", "read"]), "")
        for parameter in self.parameters():
            parameter.requires_grad_(r.random() < 0.85)

    def add(self, what: str, how: str, *modules: nn.Module) -> None:
        self.steps.append((what, how))
        self.parts.append(nn.ModuleList(modules))

    def plain(self, x: Tensor) -> list[Tensor]:
        found = []
        for (what, how), part in zip(self.steps, self.parts):
            modules: list[Any] = list(part)
            if what == "stem":
                x = modules[1](modules[0](x))
                x = F.relu(x) if how else x
            elif what in ("layer", "identity", "pooled"):
                y = x
                for conv, bn in modules[: -1 if what == "pooled" else None]:
                    y = bn(conv(y))
                if what == "pooled":
                    skip, skip_bn = modules[-1]
                    y = torch_pool(y, how) + skip_bn(skip(x))
                x = x + y if what == "identity" else y
            elif what == "relu":
                x = F.relu(x)
            elif what in ("read", "mean"):
                found.append(x if what == "read" else F.relu(x).mean((2, 3)))
        return found

    def chained(self, x: Tensor) -> list[Tensor]:
        found, h = [], Handle.of(x)
        for (what, how), part in zip(self.steps, self.parts):
            modules: list[Any] = list(part)
            pairs = [tuple(m) for m in modules if what != "stem"]
            if what == "stem":
                h = Handle.of_raw(modules[0](x), modules[1], relu=bool(how))
            elif what == "layer":
                h = separable(h, pairs[0])
            elif what == "identity":
                h = identity_block(h, pairs)
            elif what == "pooled":
                h = pooled_block(h, pairs[:-1], pairs[-1], starts(how, *h.x.shape[2:]))
            elif what == "relu":
                h = h.relu()
            elif what == "settle":
                h = h.settled()
            else:
                found.append(h.tensor() if what == "read" else h.relu_mean())
        return found


def trained(net: Network, way: Callable[[Tensor], list[Tensor]], x: Tensor, seed: int) -> Optional[dict[str, Tensor]]:
    """Outputs, every gradient and the buffers of two steps; None where the network cannot take such a picture."""
    found: dict[str, Tensor] = {}
    for step in range(2):
        torch.manual_seed(seed)
        leaf = x.detach().clone().requires_grad_(x.requires_grad)
        try:
            outputs = way(leaf)
        except (ValueError, RuntimeError):
            return None  # one value a channel, or a filter larger than its picture
        # Not every output has to count.
        counting = [y for i, y in enumerate(outputs) if y.requires_grad and (i + 1 == len(outputs) or (seed + i) % 3)]
        if counting:
            torch.autograd.backward(counting, [torch.randn_like(y) for y in counting])
        found.update({f"y{i} of step {step}": y.detach() for i, y in enumerate(outputs)})
        if leaf.grad is not None:
            found[f"dx of step {step}"] = leaf.grad
    found.update({f"d {name}": p.grad for name, p in net.named_parameters() if p.grad is not None})
    return {**found, **{name: b.double() for name, b in net.named_buffers()}}


def hold_network(seed: int) -> bool:
    """Whether there was something to compare."""
    torch.manual_seed(seed)
    r = Random(seed)
    net = Network(r).double()
    truth = copy.deepcopy(net)
    x = torch.randn(r.choice([1, 2, 3]), net.c_in, r.randint(3, 12), r.randint(3, 12), dtype=torch.float64)
    x = x.contiguous(memory_format=r.choice([torch.channels_last, torch.contiguous_format]))
    x.requires_grad_(r.random() < 0.6)
    way: Any = net.chained
    if r.random() < 0.15:
        way = lambda leaf: checkpoint(net.chained, leaf, use_reentrant=False)  # noqa: E731
    expected, got = trained(truth, truth.plain, x, seed), trained(net, way, x, seed)
    assert expected is not None or got is None, f"only PyTorch's modules raised; seed {seed}"
    return hold_same(expected, got, f"seed {seed}")


def test_any_network() -> None:
    hold_seeds(hold_network, examples(60, 2000), share=0.5)
