"""Small models, each with one of the ways separable convolutions are written in networks people use.

Shapes are odd on purpose; batch norms have statistics and weights that matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def depthwise(channels: int, kernel: Any = 3, multiplier: int = 1, bias: bool = False, **options: Any) -> nn.Conv2d:
    options = {"padding": 1, **options}
    return nn.Conv2d(channels, channels * multiplier, kernel, groups=channels, bias=bias, **options)


def pointwise(c_in: int, c_out: int, bias: bool = False, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 1, bias=bias, **options)


class SeparableNamed(nn.Module):
    """The pair under Xception's names in PyTorch ports."""

    def __init__(self, c_in: int, c_out: int, **options: Any) -> None:
        super().__init__()
        self.conv1 = depthwise(c_in, **options)
        self.pointwise = pointwise(c_in, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.conv1(x))


class XceptionBlock(nn.Module):
    """ReLU before each pair, batch norm behind it, a strided residual around it all."""

    def __init__(self) -> None:
        super().__init__()
        self.rep = nn.Sequential(
            nn.ReLU(), SeparableNamed(5, 7), nn.BatchNorm2d(7),
            nn.ReLU(inplace=True), SeparableNamed(7, 7), nn.BatchNorm2d(7), nn.MaxPool2d(3, 2, 1),
        )  # fmt: skip
        self.skip = nn.Conv2d(5, 7, 1, 2, bias=False)
        self.skipbn = nn.BatchNorm2d(7)

    def forward(self, inp: Tensor) -> Tensor:
        x = self.rep(inp)
        skip = self.skipbn(self.skip(inp))
        x += skip
        return x


class AlignedSeparable(nn.Module):
    """Depthwise, batch norm, activation or none, pointwise, batch norm, activation."""

    def __init__(self, c_in: int, c_out: int, act: Optional[Callable[[], nn.Module]] = None) -> None:
        super().__init__()
        self.conv_dw = depthwise(c_in)
        self.bn_dw = nn.BatchNorm2d(c_in)
        self.act_dw = act() if act else nn.Identity()
        self.conv_pw = pointwise(c_in, c_out)
        self.bn_pw = nn.BatchNorm2d(c_out)
        self.act_pw = act() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act_dw(self.bn_dw(self.conv_dw(x)))
        return self.act_pw(self.bn_pw(self.conv_pw(x)))


class ConvNormAct(nn.Sequential):
    """A Sequential of its own name, as detection and mobile networks nest them."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU6(inplace=True),
        )


class InvertedResidual(nn.Module):
    """The pair spread over a nested and an outer Sequential, with a shortcut in the forward."""

    def __init__(self, c_in: int, hidden: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.shortcut = stride == 1 and c_in == c_out
        self.conv = nn.Sequential(
            ConvNormAct(c_in, hidden, 1), ConvNormAct(hidden, hidden, 3, stride, hidden),
            pointwise(hidden, c_out), nn.BatchNorm2d(c_out),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


class NormThenAct(nn.BatchNorm2d):
    """Batch norm and activation in one module, with a forward of its own."""

    def __init__(self, channels: int, act: Callable[[], nn.Module] = nn.SiLU) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4 dimensions, got {x.ndim}")
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum or 0.0,
            self.eps,
        )
        return self.act(self.drop(x))


class OneModuleNorm(nn.Module):
    """Depthwise and pointwise with norm and activation in one module between and behind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_dw = depthwise(5, 5, padding=2, stride=2)
        self.bn1 = NormThenAct(5)
        self.se = nn.Identity()
        self.conv_pw = pointwise(5, 6)
        self.bn2 = NormThenAct(6, nn.ReLU)
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.se(self.bn1(self.conv_dw(x)))
        return self.drop_path(self.bn2(self.conv_pw(x)))


class InTheModel(nn.Module):
    """Both convolutions are the model's own children, the pair is visible in its forward only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(5, 6, 3)
        self.spatial = depthwise(6, (3, 5), bias=True, padding=(1, 2), dilation=(1, 1))
        self.branch = nn.Conv2d(6, 4, 1)
        self.mix = pointwise(6, 4, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        other = self.branch(x).sigmoid()
        return other * self.mix(self.spatial(x))


def mobile_v1() -> nn.Module:
    def block(c_in: int, c_out: int, stride: int) -> list[nn.Module]:
        return [
            depthwise(c_in, stride=stride), nn.BatchNorm2d(c_in), nn.ReLU(inplace=True),
            pointwise(c_in, c_out), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True),
        ]  # fmt: skip

    return nn.Sequential(nn.Conv2d(5, 6, 3), *block(6, 7, 1), *block(7, 5, 2))


#: name -> (model, members of each swapped pair without fold_bn, and with)
PATTERNS: dict[str, tuple[Callable[[], nn.Module], list[str], list[str]]] = {
    "sequential": (lambda: nn.Sequential(depthwise(5, bias=True), pointwise(5, 4, True)), ["0+1"], ["0+1"]),
    "sequential-activation": (
        lambda: nn.Sequential(depthwise(5, bias=True), nn.Hardswish(), pointwise(5, 4), nn.LeakyReLU(0.2)),
        ["0+1+2+3"],
        ["0+1+2+3"],
    ),
    "named": (lambda: SeparableNamed(5, 6), ["conv1+pointwise"], ["conv1+pointwise"]),
    "multiplier-2": (lambda: nn.Sequential(depthwise(5, multiplier=2), pointwise(10, 3)), ["0+1"], ["0+1"]),
    "dilated": (lambda: nn.Sequential(depthwise(5, dilation=3, padding=3), pointwise(5, 3)), ["0+1"], ["0+1"]),
    "same-padding": (lambda: nn.Sequential(depthwise(5, 5, padding="same"), pointwise(5, 3)), ["0+1"], ["0+1"]),
    "xception-block": (
        XceptionBlock,
        ["rep.0+rep.1.conv1+rep.1.pointwise", "rep.3+rep.4.conv1+rep.4.pointwise"],
        ["rep.0+rep.1.conv1+rep.1.pointwise+rep.2", "rep.3+rep.4.conv1+rep.4.pointwise+rep.5"],
    ),
    "in-the-model": (InTheModel, ["spatial+mix"], ["spatial+mix"]),
    "norm-between": (lambda: AlignedSeparable(5, 6), [], ["conv_dw+bn_dw+conv_pw+bn_pw"]),
    **{
        f"norm-{act.__name__}-between": (
            lambda act=act: AlignedSeparable(5, 6, act),  # type: ignore[misc]
            [],
            ["conv_dw+bn_dw+act_dw+conv_pw+bn_pw+act_pw"],
        )
        for act in (nn.ReLU, nn.SiLU, nn.GELU, nn.ELU)
    },
    "inverted-residual": (
        lambda: InvertedResidual(5, 9, 5), [], ["conv.0.2+conv.1.0+conv.1.1+conv.1.2+conv.2+conv.3"]
    ),
    "norm-and-activation-in-one": (OneModuleNorm, [], ["conv_dw+bn1+conv_pw+bn2"]),
    "mobilenet-v1": (mobile_v1, [], ["1+2+3+4+5", "6+7+8+9+10+11+12"]),
}  # fmt: skip


def build(make: Callable[[], nn.Module]) -> nn.Module:
    """The model with batch norms whose statistics and weights are not the initial ones."""
    model = make()
    for norm in model.modules():
        if isinstance(norm, NORMS):
            randomise_norm(norm)
    return model


def randomise_norm(norm: Any) -> None:
    with torch.no_grad():
        if norm.running_mean is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        if norm.weight is not None:
            norm.weight.normal_(1, 0.4)
            norm.bias.normal_()


def picture(batch: int = 2, channels: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, channels, 11, 13, dtype=dtype)


class CountedOps(TorchDispatchMode):
    """Which of xsep's ops and which of PyTorch's convolutions run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("xsep.") or "convolution" in name:
            self.seen.append(name.split(".")[1])
        return func(*args, **(kwargs or {}))

    def count(self, name: str) -> int:
        return self.seen.count(name)


def fused_calls(model: nn.Module, *inputs: Tensor) -> int:
    """How often a forward runs the fused op."""
    with CountedOps() as ops:
        model(*inputs)
    return ops.count("separable_conv2d")


def results(model: Any, x: Tensor, dy: Optional[Tensor] = None) -> dict[str, Tensor]:
    """Of one forward and backward: output, its gradient, gradients of the input and of every parameter, by name."""
    x = x.detach().clone().requires_grad_()
    y = model(x)
    dy = torch.randn_like(y) if dy is None else dy
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(y, [x, *parameters.values()], dy)
    names = ["dx", *(f"d{name.removeprefix('_orig_mod.')}" for name in parameters)]
    return {"y": y.detach(), "dy": dy, **dict(zip(names, grads, strict=True))}


def assert_same_results(model: Any, truth: Any, x: Tensor, relative: float) -> None:
    """Output and every gradient agree to ``relative`` of the largest value; one training step of each, no more."""
    expected = results(truth, x)
    got = results(model, x, expected["dy"])
    assert got.keys() == expected.keys()
    for name, theirs in expected.items():
        error, size = (got[name] - theirs).abs().max().item(), theirs.abs().max().item()
        assert size > 0, f"{name} says nothing: it is zero"
        assert error <= relative * size, f"{name}: {error:.3g} > {relative} x {size:.3g}"
