"""The networks that bench_xception holds against each other, the steps it times, and the gate they must pass."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bench_memory import TwoConvolutions
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from xsep.models import Xception, xception
from xsep.models.inception_v3 import ConvBatchNorm, inception_v3
from xsep.modules import FusedSeparableConv2d
from xsep.testing import ULPS, held_as, poisoned_memory

PLAIN, OURS, INCEPTION, CHAINED = "Xception, PyTorch", "Xception, xsep", "Inception V3", "Xception, chained"
NETWORKS = (PLAIN, OURS, INCEPTION, CHAINED)
MODES = ("training", "inference", "inference, BatchNorm folded")

#: Xception in parts that take one tensor: the blocks, and the last two convolutions.
PARTS = (*(f"block{i}" for i in range(1, 13)), "conv3", "conv4")

#: A float16 gradient of 1e-7 would vanish; this is the fixed scale of such a loss.
LOSS_SCALE = 1024.0


class Subject(NamedTuple):
    """One network, ready for one mode and type."""

    model: Any
    x: Tensor  # [N, 3, size, size], channels_last
    target: Tensor  # [N] classes
    dtype: torch.dtype


def plain_xception(model: Xception) -> Xception:
    """The same network, its separable convolutions as a PyTorch user writes them; a copy."""
    return written_plainly(copy.deepcopy(model))


def written_plainly(plain: Xception) -> Xception:
    """Each separable convolution replaced by two of PyTorch's, in place."""
    for name, module in list(plain.named_modules()):
        if isinstance(module, FusedSeparableConv2d):
            parent, _, leaf = name.rpartition(".")
            setattr(plain.get_submodule(parent), leaf, TwoConvolutions(module))
    return plain


def build(seed: int, num_classes: int = 1000) -> dict[str, nn.Module]:
    """All of them with random weights from a seed; the Xceptions have the same."""
    torch.manual_seed(seed)
    ours = xception(num_classes=num_classes)
    chained = copy.deepcopy(ours)
    chained.chain = True
    inception = inception_v3(num_classes, drop_rate=0.0)
    return {PLAIN: plain_xception(ours), OURS: ours, INCEPTION: inception, CHAINED: chained}


def takes_part(name: str, mode: str) -> bool:
    """Whether a network is another one in that mode: the chain is for training."""
    return name != CHAINED or mode == MODES[0]


def fold(model: Any) -> Any:
    """Every BatchNorm in the convolution before it, as PyTorch's own utility does it; ours as fold_batchnorm() does."""
    if isinstance(model, Xception):
        layers = list(model.separable_layers())
        if isinstance(layers[0][0], FusedSeparableConv2d):
            return model.fold_batchnorm()
        replaced: dict[nn.Module, nn.Module] = {}
        bn: Any
        for conv, bn in layers:
            conv.conv_pw = fuse_conv_bn_eval(conv.conv_pw, bn)
            replaced[bn] = nn.Identity()
        pairs: list[tuple[nn.Module, str, str]] = [(model, "conv1", "bn1"), (model, "conv2", "bn2")]
        pairs += [(b, "skip", "skipbn") for b in model.modules() if getattr(b, "skip", None) is not None]
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if child in replaced:
                    parent.add_module(name, replaced[child])
    else:
        pairs = [(module, "conv", "bn") for module in model.modules() if isinstance(module, ConvBatchNorm)]
    for parent, conv, bn in pairs:
        setattr(parent, conv, fuse_conv_bn_eval(getattr(parent, conv), getattr(parent, bn)))
        setattr(parent, bn, nn.Identity())
    return model


def subject(model: nn.Module, mode: str, dtype: torch.dtype, pictures: Tensor, num_classes: int = 1000) -> Subject:
    """A copy of the model in the mode and type; training keeps float32 weights and runs under autocast."""
    copied: Any = copy.deepcopy(model)
    copied = copied.to(pictures.device, memory_format=torch.channels_last)
    x = pictures.contiguous(memory_format=torch.channels_last)
    target = torch.arange(len(x), device=x.device) % num_classes
    if mode == "training":
        return Subject(copied.train(), x, target, dtype)
    copied = copied.eval().to(dtype)
    return Subject(fold(copied) if mode == MODES[2] else copied, x.to(dtype), target, dtype)


def loss_of(s: Subject) -> Tensor:
    mixed = s.dtype != torch.float32
    with torch.autocast(s.x.device.type, s.dtype if mixed else None, enabled=mixed, cache_enabled=False):
        return F.cross_entropy(s.model(s.x).float(), s.target)


def training_step(s: Subject) -> Callable[[], Any]:
    """Forward, backward and the update of all weights (SGD with momentum, as in the paper)."""
    # What the rate is does not change the time; so small a one keeps any number of steps on one batch finite.
    optimizer = torch.optim.SGD(s.model.parameters(), lr=1e-5, momentum=0.9, weight_decay=1e-5)
    scale = LOSS_SCALE if s.dtype == torch.float16 else 1.0
    parameters = list(s.model.parameters())

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(s)
        (loss * scale).backward()
        if scale != 1.0:
            torch._foreach_div_([p.grad for p in parameters if p.grad is not None], scale)
        optimizer.step()
        return loss

    return step


def inference_step(s: Subject) -> Callable[[], Tensor]:
    def step() -> Tensor:
        with torch.no_grad():
            return s.model(s.x)

    return step


def as_graph(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step recorded once as a CUDA graph, and replayed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def settle(models: dict[str, nn.Module], x: Tensor) -> None:
    """Running statistics that fit the pictures, as training would leave them; the same in both Xceptions."""
    for name in (PLAIN, INCEPTION):
        norms = [m for m in models[name].modules() if isinstance(m, nn.BatchNorm2d)]
        for m in norms:
            m.momentum = 1.0
        with torch.no_grad():
            models[name].train()(x)
        for m in norms:
            m.momentum = 0.1
    for name in (OURS, CHAINED):
        for ours, plain in zip(models[name].buffers(), models[PLAIN].buffers(), strict=True):
            ours.copy_(plain)


def logits(model: nn.Module, mode: str, dtype: torch.dtype, x: Tensor) -> Tensor:
    return inference_step(subject(model, mode, dtype, x))()


Inputs = dict[str, tuple[Tensor, Tensor]]  # x and dy by part


def gradients(
    model: nn.Module, dtype: torch.dtype, inputs: dict[str, tuple[Tensor, Tensor]]
) -> dict[str, list[Tensor]]:
    """Of every part's input and parameters in training, each part fed its own x and dy; float64 without autocast."""
    trained = copy.deepcopy(model).train().to(torch.float64 if dtype == torch.float64 else torch.float32)
    mixed = dtype in (torch.float16, torch.bfloat16)
    found = {}
    for name, (x, dy) in inputs.items():
        part = trained.get_submodule(name)
        x = x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast(x.device.type, dtype if mixed else None, enabled=mixed):
            y = part(x)
        found[name] = list(torch.autograd.grad(y, [x, *part.parameters()], dy.to(y)))
    return found


class Truth(NamedTuple):
    """What the plain network gives in float64: all logits, and part by part the gradients on what reaches it."""

    logits: Tensor
    inputs: Inputs
    gradients: dict[str, list[Tensor]]


def truth(plain: nn.Module, x: Tensor, parts: Sequence[str] = PARTS) -> Truth:
    wide = copy.deepcopy(plain).double().train()
    inputs: Inputs = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
            inputs[name] = (args[0], torch.randn(y.shape, generator=generator).to(y))

        return hook

    generator = torch.Generator().manual_seed(0)
    for name in parts:
        wide.get_submodule(name).register_forward_hook(keep(name))
    with torch.no_grad():
        wide(x.double())
    return Truth(logits(plain, MODES[1], torch.float64, x), inputs, gradients(plain, torch.float64, inputs))


def gate(ours: nn.Module, plain: nn.Module, dtype: torch.dtype, x: Tensor, exact: Truth) -> list[str]:
    """What is wrong with ours, as sentences: logits in each mode, and the gradients of every part in training.

    The measure is the norm of a tensor's error relative to its own, root mean square over the tensors: at most twice
    the plain network's at the same type, plus a few ulp (:func:`xsep.testing.held_as`). Part by part, because through
    all 36 layers a gradient carries every value that rounding put on the other side of a ReLU, anybody's: 0.6 % in
    float32, all of it in bfloat16. By norms for the same reason.
    """

    def distance(got: list[Tensor], expected: list[Tensor]) -> float:
        relative = [float((g.double() - e).norm() / e.norm().clamp_min(1e-30)) for g, e in zip(got, expected)]
        return math.sqrt(sum(r * r for r in relative) / len(relative))

    compared: dict[str, tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}
    with poisoned_memory():
        for mode in MODES[1:]:
            a, b = ([logits(model, mode, dtype, x)] for model in (ours, plain))
            compared[f"{mode}: logits"] = (a, b, [exact.logits])
        got, own = (gradients(model, dtype, exact.inputs) for model in (ours, plain))
    for name, expected in exact.gradients.items():
        compared[f"training: gradients of {name}"] = (got[name], own[name], expected)
    found = []
    for what, (a, b, e) in compared.items():
        error, bound = distance(a, e), 2 * distance(b, e) + ULPS * torch.finfo(held_as(dtype, x.device)).eps
        if not error <= bound:
            found.append(f"{what} are off by {error:.3g} relative, {bound:.3g} allowed")
    return found
