"""Models drawn from a seed, swapped: same outputs, gradients, buffers and hooked values as before, in float64.

Values are read twice, written in place and returned from the middle; modules are called twice, nested, frozen, watched.
In eval mode, torch.fx, torch.jit.trace, torch.export and torch.compile see the same function of them.
A failure names the seed; ``hold_model(seed)``, or ``hold_traced(seed)``, is that model again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from random import Random
from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzzing import batch_norm, examples, hold_same, hold_seeds
from xsep.swap import swap_separable_convs, unswap

ACTIVATIONS = (
    nn.ReLU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.ELU, nn.LeakyReLU, nn.GELU, nn.Identity, nn.Sigmoid, nn.Tanh,
)  # fmt: skip
STEPS = 4
Shape = tuple[int, ...]


class Program(nn.Module):
    """Steps over values, of which each may use any that came before; x is the first."""

    def __init__(self, steps: list[tuple[Any, ...]], parts: dict[str, nn.Module], returned: list[int]) -> None:
        super().__init__()
        self.steps, self.returned = steps, returned
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for what, i, other in self.steps:
            value = values[i]
            if what == "module":
                value = getattr(self, other)(value)
            elif what == "relu":
                value = F.relu(value, inplace=other)
            elif what == "add":
                value = value + values[other]
            elif what == "add_":
                value += values[other]
            elif what == "mul_":
                value = value.mul_(0.7)
            else:
                value = value * getattr(self, other).weight.sum()
            values.append(value)
        found = tuple(values[i] for i in self.returned)
        return found if len(found) > 1 else found[0]


def depthwise(r: Random, c: int) -> nn.Conv2d:
    kernel, dilation = r.choice([(1, 1), (3, 3), (3, 3), (5, 5), (3, 1)]), r.choice([1, 1, 2])
    stride = r.choice([1, 1, 1, 2])
    centred = tuple(dilation * (k // 2) for k in kernel)
    padding: Any = r.choice([centred, centred, 0, 1, "same" if stride == 1 else 0])
    return nn.Conv2d(
        c, c * r.choice([1, 1, 1, 2]), kernel, stride, padding, dilation, groups=c, bias=r.random() < 0.4,
        padding_mode="reflect" if r.random() < 0.1 else "zeros",
    )  # fmt: skip


def pointwise(r: Random, c: int) -> nn.Conv2d:
    stride, padding = r.choice([(1, 0)] * 10 + [(2, 0), (1, 1)])
    return nn.Conv2d(c, r.randint(2, 7), 1, stride, padding, bias=r.random() < 0.4)


def norm(r: Random, c: int) -> nn.Module:
    return nn.GroupNorm(1, c) if r.random() < 0.05 else batch_norm(r, c)


def activation(r: Random) -> nn.Module:
    kind = r.choice(ACTIVATIONS)
    options: dict[str, Any] = {}
    if kind not in (nn.GELU, nn.Identity, nn.Sigmoid, nn.Tanh):
        options["inplace"] = r.random() < 0.4
    if kind is nn.GELU:
        options["approximate"] = r.choice(["none", "tanh"])
    if kind is nn.ELU:
        options["alpha"] = r.choice([1.0, 0.3, -0.2])
    if kind is nn.LeakyReLU:
        options["negative_slope"] = r.choice([0.01, 0.3, 0.0, -0.2])
    return kind(**options)


def sequence(r: Random, c: int) -> nn.Sequential:
    """A pair in the order of networks, more or less of it."""
    first = depthwise(r, c)
    middle, last = first.out_channels, pointwise(r, first.out_channels)
    some = [
        (0.5, activation(r)), (1.0, first), (0.4, norm(r, middle)), (0.4, activation(r)),
        (0.1, nn.Dropout(r.choice([0.0, 0.3]))), (1.0, last), (0.6, norm(r, last.out_channels)), (0.5, activation(r)),
    ]  # fmt: skip
    modules = [module for likely, module in some if r.random() < likely]
    if r.random() < 0.3:
        cut = r.randint(1, len(modules) - 1)
        modules = [nn.Sequential(*modules[:cut]), *modules[cut:]]
    return nn.Sequential(*modules)


def shape_behind(module: nn.Module, shape: Shape) -> Optional[Shape]:
    """None where the module cannot take it."""
    try:
        with torch.no_grad():
            found = tuple(copy.deepcopy(module).eval()(torch.zeros(2, *shape)).shape[1:])
    except RuntimeError:
        return None
    return found if min(found) > 0 else None


def made(r: Random, kind: str, shape: Shape, depth: int) -> nn.Module:
    if kind == "activation":
        return activation(r)
    if kind == "pool":
        return nn.MaxPool2d(3, 1, 1)
    if kind == "dropout":
        return nn.Dropout(r.choice([0.0, 0.2]))
    if kind == "program":
        return program(r, shape, depth + 1)
    of_channels = {"depthwise": depthwise, "pointwise": pointwise, "norm": norm, "sequence": sequence}
    return of_channels[kind](r, shape[0])


def program(r: Random, shape: Shape, depth: int = 0) -> Program:
    steps: list[tuple[Any, ...]] = []
    parts: dict[str, nn.Module] = {}
    shapes = [shape]
    kinds = ["depthwise", "pointwise", "norm", "activation", "sequence"] * 3
    kinds += ["relu", "add", "add", "mul_", "again", "weight", "pool", "dropout", "program"]
    for _ in range(r.randint(2, 9) if depth == 0 else r.randint(2, 5)):
        i = len(shapes) - 1 if r.random() < 0.85 else r.randrange(len(shapes))
        kind, now = r.choice(kinds), shapes[i]
        name, module = f"part{len(steps)}", None
        behind: Optional[Shape] = now
        if kind == "relu":
            step: tuple[Any, ...] = ("relu", i, r.random() < 0.4)
        elif kind == "add":
            step = (r.choice(["add", "add_"]), i, r.choice([j for j, s in enumerate(shapes) if s == now]))
        elif kind == "mul_":
            step = ("mul_", i, None)
        elif kind == "weight":
            convolutions = [known for known, part in parts.items() if isinstance(part, nn.Conv2d)]
            if not convolutions:
                continue
            step = ("weight", i, r.choice(convolutions))
        elif kind == "again":
            if not parts:
                continue
            name = r.choice(list(parts))
            step, behind = ("module", i, name), shape_behind(parts[name], now)
        else:
            if kind == "program" and depth == 2:
                continue
            module = made(r, kind, now, depth)
            step, behind = ("module", i, name), shape_behind(module, now)
        if behind is None:
            continue
        if module is not None:
            parts[name] = module
        steps.append(step)
        shapes.append(behind)
    returned = [len(shapes) - 1]
    if depth == 0 and r.random() < 0.15:
        returned.append(r.randrange(len(shapes)))
    return Program(steps, parts, returned)


class Watched:
    """A model, and what a hook on one of its modules saw last."""

    def __init__(self, model: nn.Module, name: Optional[str], before: bool) -> None:
        self.model = model
        self.seen: dict[str, Tensor] = {}
        if name is not None:
            module = model.get_submodule(name)
            if before:
                module.register_forward_pre_hook(lambda _, inputs: self.see(inputs))
            else:
                module.register_forward_hook(lambda _, inputs, output: self.see(output))

    def see(self, values: Any) -> None:
        values = values if isinstance(values, tuple) else (values,)
        self.seen = {f"hook's {i}": t.detach().clone() for i, t in enumerate(values)}

    def called(self, x: Tensor, gradients: bool, seed: int) -> Optional[dict[str, Tensor]]:
        """Everything a call can change; None where the model itself cannot be called so."""
        torch.manual_seed(seed)  # dropout, and what comes from above
        leaf = x.detach().clone().requires_grad_(x.requires_grad and gradients)
        given = leaf * 1.0  # which may be written in place
        try:
            with torch.set_grad_enabled(gradients):
                outputs = self.model(given)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                found = {f"y{i}": y.detach().clone() for i, y in enumerate(outputs)}
                ends = [y for y in outputs if y.requires_grad]
                if ends:
                    torch.autograd.backward(ends, [torch.randn_like(y) for y in ends])
        except (RuntimeError, ValueError):
            return None  # a value that autograd needs was written in place, or one value a channel
        found["x afterwards"] = given.detach()
        if leaf.grad is not None:
            found["dx"] = leaf.grad
        found.update({f"d {name}": p.grad for name, p in self.model.named_parameters() if p.grad is not None})
        self.model.zero_grad()
        return {**found, **{name: t.double() for name, t in self.model.state_dict().items()}, **self.seen}


def hold_model(seed: int) -> bool:
    """Whether there was something to swap and to compare."""
    torch.manual_seed(seed)
    r = Random(seed)
    shape = (r.randint(2, 6), r.randint(5, 9), r.randint(5, 9))
    model = program(r, shape).double()
    x = torch.randn(r.choice([1, 2, 3]), *shape, dtype=torch.float64).requires_grad_(r.random() < 0.7)
    for p in model.parameters():
        p.requires_grad_(r.random() < 0.9)
    truth = copy.deepcopy(model)
    if not len(swap_separable_convs(model, fold_bn=r.random() < 0.6, report=False)):
        return False
    names = [name for name, _ in model.named_modules()]
    watch = r.choice(names) if r.random() < 0.3 else None, r.random() < 0.3
    ours, theirs = Watched(model, *watch), Watched(truth, *watch)
    for step in range(STEPS):
        part, mode, part_mode = r.choice(names), r.random() < 0.5, r.random() < 0.5
        gradients, moves = r.random() < 0.7, r.random() < 0.5
        for one in (model, truth):
            one.train(mode)
            if moves:
                one.get_submodule(part).train(part_mode)
        expected, got = theirs.called(x, gradients, seed + step), ours.called(x, gradients, seed + step)
        if not hold_same(expected, got, f"seed {seed}, step {step}"):
            return False
        with torch.no_grad():  # what was kept of the parameters must not be used again
            for p, q in zip(model.parameters(), truth.parameters()):
                change = 0.1 * torch.randn_like(p)
                p.add_(change)
                q.add_(change)
    unswap(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in truth.modules()]
    return True


def compiled(model: nn.Module, x: Tensor) -> Callable[[Tensor], Any]:
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager")


TRACERS: dict[str, Callable[[nn.Module, Tensor], Callable[[Tensor], Any]]] = {
    "fx": lambda model, x: torch.fx.symbolic_trace(model),
    "jit": lambda model, x: torch.jit.trace(model, x.clone(), check_trace=False),
    "export": lambda model, x: torch.export.export(model, (x.clone(),)).module(),
    "compile": compiled,
}


def seen(model: nn.Module, tracer: Callable[[nn.Module, Tensor], Callable[[Tensor], Any]], x: Tensor) -> Any:
    """What a traced model makes of x, and of x; None where it cannot be traced."""
    try:
        with torch.no_grad():
            given = x.clone()  # which may be written in place
            outputs = tracer(model, x)(given)
    except Exception:  # anything, of four tracers
        return None
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {**{f"y{i}": y for i, y in enumerate(outputs)}, "x afterwards": given}


def hold_traced(seed: int) -> bool:
    """Whether there was something to swap and to trace."""
    torch.manual_seed(seed)
    r = Random(seed)
    shape = (r.randint(2, 6), r.randint(5, 9), r.randint(5, 9))
    truth = program(r, shape).double().eval()
    x = torch.randn(r.choice([1, 2, 3]), *shape, dtype=torch.float64)
    model = copy.deepcopy(truth)
    if not len(swap_separable_convs(model, fold_bn=r.random() < 0.6, report=False)):
        return False
    how = r.choice(list(TRACERS))
    # Not what the model makes of x untraced: torch.fx has `x += y` make another tensor.
    return hold_same(seen(truth, TRACERS[how], x), seen(model, TRACERS[how], x), f"seed {seed}, {how}")


def test_any_model() -> None:
    hold_seeds(hold_model, examples(100, 3000), share=0.2)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_any_model_traced() -> None:
    hold_seeds(hold_traced, examples(60, 1000), share=0.2)
