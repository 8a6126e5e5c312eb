"""Xception in plain PyTorch, which ours is held against: its weights, its features, and which values it lets pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xsep.models import xception
from xsep.models.xception import MaxPool


def tensorflow_pool(x: Tensor) -> Tensor:
    """3x3, stride 2, SAME: an even size is padded at the far end only, an odd one at both."""
    pads = [side for size in (x.shape[3], x.shape[2]) for side in ((0, 1) if size % 2 == 0 else (1, 1))]
    return F.max_pool2d(F.pad(x, pads, value=-torch.inf), 3, 2)


class PlainXception(nn.Module):
    """From the paper's table, in nn.Conv2d, ReLU and MaxPool; modules are called as in the author's own code."""

    #: module number -> output channels of its separable convolutions, and whether a ReLU precedes the first
    TABLE: ClassVar[dict[int, tuple[tuple[int, ...], bool]]] = {
        2: ((128, 128), False),
        3: ((256, 256), True),
        4: ((728, 728), True),
        **{k: ((728, 728, 728), True) for k in range(5, 13)},
        13: ((728, 1024), True),
    }

    def __init__(self, num_classes: int, in_chans: int, pool: str) -> None:
        super().__init__()
        self.pool = pool
        self.seen: Optional[dict[str, Tensor]] = None
        self.choices: dict[str, Tensor] = {}
        self.parts = nn.ModuleDict()
        self._conv("block1_conv1", nn.Conv2d(in_chans, 32, 3, stride=2, bias=False))
        self._conv("block1_conv2", nn.Conv2d(32, 64, 3, bias=False))
        c = 64
        for k, (widths, _) in self.TABLE.items():
            if k in (2, 3, 4, 13):
                self._conv(f"block{k}_residual", nn.Conv2d(c, widths[-1], 1, stride=2, bias=False))
            for j, width in enumerate(widths, 1):
                self._separable(f"block{k}_sepconv{j}", c, width)
                c = width
        self._separable("block14_sepconv1", 1024, 1536)
        self._separable("block14_sepconv2", 1536, 2048)
        self.parts["predictions"] = nn.Linear(2048, num_classes)

    def _conv(self, name: str, conv: Any) -> None:
        self.parts[name] = conv
        width: Any = conv[-1].out_channels if hasattr(conv, "append") else conv.out_channels
        self.parts[f"{name}_bn"] = nn.BatchNorm2d(width)

    def _separable(self, name: str, c_in: int, c_out: int) -> None:
        depthwise = nn.Conv2d(c_in, c_in, 3, padding=1, groups=c_in, bias=False)
        self._conv(name, nn.Sequential(depthwise, nn.Conv2d(c_in, c_out, 1, bias=False)))

    def _run(self, name: str, x: Tensor) -> Tensor:
        return self.parts[f"{name}_bn"](self.parts[name](x))

    def _note(self, name: str, x: Tensor) -> None:
        if self.seen is not None:
            self.seen[name] = x.detach()

    def _relu(self, name: str, x: Tensor) -> Tensor:
        self._note(name, x)
        return x * self.choices[name] if self.choices else torch.relu(x)

    def _pool(self, name: str, x: Tensor) -> Tensor:
        self._note(name, x)
        if self.choices:
            index = self.choices[name]
            return x.flatten(2).gather(2, index.flatten(2)).view(index.shape)
        return F.max_pool2d(x, 3, 2, 1) if self.pool == "torch" else tensorflow_pool(x)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The outputs of all fourteen modules, and the logits.

        ``seen``, where it is a dictionary, then holds what each ReLU and pool was given. Where there are ``choices``,
        each takes those of its name and not its own.
        """
        outputs = {}
        for j in (1, 2):
            x = self._relu(f"block1_conv{j}", self._run(f"block1_conv{j}", x))
        outputs["block1"] = x
        for k, (widths, relu_first) in self.TABLE.items():
            y = x
            for j in range(1, len(widths) + 1):
                name = f"block{k}_sepconv{j}"
                y = self._run(name, self._relu(name, y) if relu_first or j > 1 else y)
            x = self._pool(f"block{k}_pool", y) + self._run(f"block{k}_residual", x) if k in (2, 3, 4, 13) else y + x
            outputs[f"block{k}"] = x
        for j in (1, 2):
            name = f"block14_sepconv{j}"
            x = self._relu(name, self._run(name, x))
            outputs[name] = x
        outputs["logits"] = self.parts["predictions"](x.mean((2, 3)))
        return outputs


def timm_name(plain: str) -> str:
    """Keras-style module name -> timm's, by the published rule."""
    name, *rest = plain.split(".")
    bn = name.endswith("_bn")
    name = name.removesuffix("_bn")
    leaf = rest[-1]
    if name == "predictions":
        return f"fc.{leaf}"
    number, kind = int(name.split("_")[0].removeprefix("block")), name.split("_")[1]
    depthwise_or_not = {"0": ".conv1", "1": ".pointwise"}.get(rest[0], "")
    if number == 1:
        return f"{'bn' if bn else 'conv'}{kind[-1]}.{leaf}"
    if number == 14:
        return f"{'bn' if bn else 'conv'}{int(kind[-1]) + 2}{depthwise_or_not}.{leaf}"
    if kind == "residual":
        return f"block{number - 1}.{'skipbn' if bn else 'skip'}.{leaf}"
    index = 3 * (int(kind[-1]) - 1) + (0 if number == 2 else 1) + (1 if bn else 0)
    return f"block{number - 1}.rep.{index}{depthwise_or_not}.{leaf}"


def timm_keys() -> Iterator[str]:
    """Every key of timm's legacy_xception, as a rule."""

    def bn(name: str) -> Iterator[str]:
        for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            yield f"{name}.{leaf}"

    def sepconv(name: str) -> Iterator[str]:
        yield f"{name}.conv1.weight"
        yield f"{name}.pointwise.weight"

    for i in (1, 2):
        yield f"conv{i}.weight"
        yield from bn(f"bn{i}")
    for i in range(1, 13):
        first = (0, 3) if i == 1 else (1, 4) if i in (2, 3, 12) else (1, 4, 7)
        for index in first:
            yield from sepconv(f"block{i}.rep.{index}")
            yield from bn(f"block{i}.rep.{index + 1}")
        if i in (1, 2, 3, 12):
            yield f"block{i}.skip.weight"
            yield from bn(f"block{i}.skipbn")
    for i in (3, 4):
        yield from sepconv(f"conv{i}")
        yield from bn(f"bn{i}")
    yield from ("fc.weight", "fc.bias")


def randomize(model: nn.Module) -> None:
    """BatchNorms as training might leave them: nothing at its initial 0 or 1."""
    batchnorms: list[Any] = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for bn in batchnorms:
        for tensor, low, high in (
            (bn.weight, 0.5, 1.2), (bn.bias, -0.3, 0.3), (bn.running_mean, -0.3, 0.3), (bn.running_var, 0.5, 2.0),
        ):  # fmt: skip
            nn.init.uniform_(tensor, low, high)


def twins(num_classes: int = 5, in_chans: int = 3, pool: str = "torch") -> tuple[Any, Any]:
    """The same weights in both."""
    ours = xception(num_classes=num_classes, in_chans=in_chans, pool_padding=pool)
    randomize(ours)
    plain = PlainXception(num_classes, in_chans, pool)
    state = ours.state_dict()
    plain.load_state_dict({k: state[timm_name(k.removeprefix("parts."))] for k in plain.state_dict()})
    return ours.eval(), plain.eval()


def outputs(model: Any, x: Tensor) -> dict[str, Tensor]:
    """As PlainXception gives them, by hooks."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, y: Tensor) -> None:
            found[name] = y

        return hook

    handles = [getattr(model, f"block{k - 1}").register_forward_hook(keep(f"block{k}")) for k in range(2, 14)]
    handles.append(model.block1.register_forward_pre_hook(lambda module, args: found.update(block1=args[0])))
    handles.append(model.conv4.register_forward_pre_hook(lambda module, args: found.update(block14_sepconv1=args[0])))
    found["block14_sepconv2"] = model.forward_features(x)
    for handle in handles:
        handle.remove()
    found["logits"] = model.forward_head(found["block14_sepconv2"])
    return found


def watch(model: Any) -> dict[str, Tensor]:
    """PlainXception's ``seen`` of the model's next run."""
    seen: dict[str, Tensor] = {}

    def given(module: nn.Module, name: str) -> None:
        module.register_forward_pre_hook(lambda m, args: seen.update({name: args[0].detach()}))

    def made(module: nn.Module, name: str) -> None:
        module.register_forward_hook(lambda m, args, y: seen.update({name: y.detach()}))

    for module, name in ((model.bn1, "1_conv1"), (model.bn2, "1_conv2"), (model.bn3, "14_sepconv1"),
                         (model.bn4, "14_sepconv2")):  # fmt: skip
        made(module, f"block{name}")
    for k in range(2, 14):
        block = getattr(model, f"block{k - 1}")
        for j, (conv, _) in enumerate(block.pairs(), 1):
            if conv.prologue_activation is not None:
                given(conv, f"block{k}_sepconv{j}")
        if isinstance(block.pool, MaxPool):
            given(block.pool, f"block{k}_pool")
    return seen


def choices_of(seen: dict[str, Tensor]) -> dict[str, Tensor]:
    """Which values each ReLU lets pass, and which each pool takes."""
    return {
        name: F.max_pool2d(u, 3, 2, 1, return_indices=True)[1] if name.endswith("pool") else u > 0
        for name, u in seen.items()
    }


def gradients_of_these_choices(plain: Any, seen: dict[str, Tensor], x: Tensor, dy: Tensor) -> list[Tensor]:
    """In float64, of the very function that a run in float32 computed.

    Of some million values a few lie within float32's rounding of a ReLU's kink or of another one in a pool's window.
    On which side each of them falls is open, and moves whole gradients; that they lie so near is checked.
    """
    wide = copy.deepcopy(plain).double()
    wide.seen, wide.choices = {}, choices_of(seen)
    wide(x.double())["logits"].backward(dy.double())
    assert wide.seen.keys() == seen.keys() and len(seen) == 4 + 31 + 4
    for name, u in wide.seen.items():
        chosen = wide.choices[name]
        if name.endswith("pool"):
            lost = F.max_pool2d(u, 3, 2, 1) - u.flatten(2).gather(2, chosen.flatten(2)).view(chosen.shape)
        else:
            lost = u * ((u > 0).double() - chosen.double())
        assert lost.abs().max() <= 1e-5 * u.abs().max(), name
    return [p.grad for p in wide.parameters()]
