"""Whoever looks inside a swapped pair, by a hook, a tap or a member put in its place, sees the true values."""

from __future__ import annotations

import copy
import functools
from typing import Any, Optional

import pytest
import torch
from torch import Tensor, nn

from xsep.swap import swap_separable_convs

from .swap_patterns import (
    AlignedSeparable,
    InvertedResidual,
    OneModuleNorm,
    SeparableNamed,
    build,
    depthwise,
    fused_calls,
    picture,
    pointwise,
)


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(sum(request.node.name.encode()))


class Watched:
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(output.detach().clone())


def _keep_output_gradient(values: list[Tensor], module: nn.Module, dx: Any, dy: Any) -> None:
    values.append(dy[0].clone())


@pytest.mark.parametrize("where", ["conv.1.0", "conv.1.1", "conv.1.2", "conv.1", "conv.2"])
def test_a_hook_before_the_swap_leaves_the_pair_alone(where: str) -> None:
    model = build(lambda: InvertedResidual(5, 9, 5)).eval()
    tap = Watched()
    model.get_submodule(where).register_forward_hook(tap)
    x = picture()
    expected = model(x)
    report = swap_separable_convs(model, True, report=False)
    assert len(report) == 0
    missed = report.missed[0]
    assert where in f"{missed.name}: {missed.reason}" and "hooks, which would" in missed.reason
    assert torch.equal(model(x), expected)
    assert torch.equal(tap.seen[0], tap.seen[1])


@pytest.mark.parametrize(
    "where", ["conv.0", "conv.0.2", "conv.1.0", "conv.1.1", "conv.1.2", "conv.1", "conv.2", "conv.3"]
)
@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
def test_a_hook_after_the_swap_sees_the_true_value(where: str, kind: str) -> None:
    truth = build(lambda: InvertedResidual(5, 9, 5)).eval()
    for m in truth.modules():
        if isinstance(m, nn.ReLU6):
            m.inplace = False  # PyTorch refuses a backward hook in front of an operation in place
    model = copy.deepcopy(truth)
    swap_separable_convs(model, True, report=False)
    x = picture()
    seen = []
    for m in (model, truth):
        values: list[Tensor] = []
        module = m.get_submodule(where)
        if kind == "forward":
            handle = module.register_forward_hook(lambda _, args, out, keep=values.append: keep(out.clone()))
        elif kind == "pre":
            handle = module.register_forward_pre_hook(lambda _, args, keep=values.append: keep(args[0].clone()))
        else:
            handle = module.register_full_backward_hook(functools.partial(_keep_output_gradient, values))
        v = x.clone().requires_grad_()
        y = m(v)
        y.square().sum().backward()
        seen.append([*values, y, v.grad])
        handle.remove()
    assert len(seen[0]) == 3
    for ours, theirs in zip(*seen, strict=True):
        assert ours is not None and theirs is not None
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert fused_calls(model, x) == 1  # and once the hook is gone, as one again


def test_a_hook_for_all_modules_sees_the_true_values() -> None:
    truth = build(lambda: InvertedResidual(5, 9, 5)).eval()
    model = copy.deepcopy(truth)
    swap_separable_convs(model, True, report=False)
    x, seen = picture(), []
    for m in (model, truth):
        values: list[Tensor] = []
        hook = nn.modules.module.register_module_forward_hook(
            lambda _, args, out, values=values: values.append(out.detach().clone())
        )
        try:
            m(x)
        finally:
            hook.remove()
        seen.append(values)
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_hooks_on_the_host_stay_and_run() -> None:
    model = build(lambda: nn.Sequential(SeparableNamed(5, 4)))
    tap = Watched()
    model[0].register_forward_hook(tap)  # type: ignore[index]
    assert len(swap_separable_convs(model, report=False)) == 1
    y = model(picture())
    assert fused_calls(model, picture()) == 1
    assert torch.equal(tap.seen[0], y)


class Features(nn.Module):
    """Calls the children of a flat Sequential itself, and returns what some of them give."""

    def __init__(self, taps: tuple[int, ...]) -> None:
        super().__init__()
        self.taps = taps
        self.features = nn.Sequential(depthwise(5), nn.ReLU(), pointwise(5, 5), depthwise(5), pointwise(5, 4))

    def forward(self, x: Tensor) -> list[Tensor]:
        out = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                out.append(x)
        return out


@pytest.mark.parametrize("taps", [(0, 4), (1, 3), (2, 4)], ids=str)
def test_feature_taps_get_the_true_values(taps: tuple[int, ...]) -> None:
    model = Features(taps)
    truth = copy.deepcopy(model)
    swap_separable_convs(model, report=False)
    x = picture()
    for ours, theirs in zip(model(x), truth(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_member_that_is_replaced_or_wrapped_is_obeyed() -> None:
    class Adapted(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + 1

    truth = build(lambda: nn.Sequential(AlignedSeparable(5, 5, nn.ReLU), AlignedSeparable(5, 5))).eval()
    model = copy.deepcopy(truth)
    assert len(swap_separable_convs(model, True, report=False)) == 2
    for m in (model, truth):
        m[0].conv_dw = Adapted(m[0].conv_dw)  # type: ignore[index]
        m[1].bn_pw = nn.Identity()  # type: ignore[index]
    x = picture()
    torch.testing.assert_close(model(x), truth(x), rtol=1e-5, atol=1e-5)
    assert fused_calls(model, x) == 0


def test_what_only_handed_a_value_on_may_be_replaced() -> None:
    model = nn.Sequential(depthwise(5), nn.Identity(), pointwise(5, 4), nn.Identity())
    truth = copy.deepcopy(model)
    assert len(swap_separable_convs(model, report=False)) == 1
    x = picture()
    assert fused_calls(model, x) == 1
    for place, fused in ((3, 1), (1, 0)):  # behind all members it never mattered
        for m in (model, truth):
            m[place] = nn.Tanh()
        torch.testing.assert_close(model(x), truth(x), rtol=1e-5, atol=1e-5)
        assert fused_calls(model, x) == fused


def test_what_a_norm_applies_may_be_replaced() -> None:
    truth = build(OneModuleNorm).eval()
    model = copy.deepcopy(truth)
    assert len(swap_separable_convs(model, True, report=False)) == 1
    x = picture()
    assert fused_calls(model, x) == 1
    for m in (model, truth):
        m.bn1.act = nn.Tanh()  # type: ignore[union-attr]
    torch.testing.assert_close(model(x), truth(x), rtol=1e-5, atol=1e-5)
    assert fused_calls(model, x) == 0


def test_one_more_module_among_the_members_is_obeyed() -> None:
    model = nn.Sequential(nn.Sequential(depthwise(5)), pointwise(5, 4))
    truth = copy.deepcopy(model)
    assert len(swap_separable_convs(model, report=False)) == 1
    x = picture()
    for m in (model, truth):
        m.append(nn.Tanh())
    assert fused_calls(model, x) == 1, "at the end of all it is none of theirs"
    for m in (model, truth):
        m[0].append(nn.Tanh())  # type: ignore[operator]
    torch.testing.assert_close(model(x), truth(x), rtol=1e-5, atol=1e-5)
    assert fused_calls(model, x) == 0


class WithOption(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dw, self.pw = depthwise(5), pointwise(5, 3)

    def forward(self, x: Tensor, tap: Optional[list[Tensor]] = None) -> Tensor:
        z = self.dw(x)
        if tap is not None:
            tap.append(z)
        return self.pw(z)


def test_an_optional_argument_that_taps_gets_the_true_value() -> None:
    model = WithOption()
    truth = copy.deepcopy(model)
    assert len(swap_separable_convs(model, report=False)) == 1
    x = picture()
    assert fused_calls(model, x) == 1
    for call in (lambda m, t: m(x, t), lambda m, t: m(x, tap=t)):
        ours: list[Tensor] = []
        theirs: list[Tensor] = []
        torch.testing.assert_close(call(model, ours), call(truth, theirs))
        assert torch.equal(ours[0], theirs[0])
