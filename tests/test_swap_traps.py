"""What only looks like a separable convolution is left alone, with the reason; what hides one is still swapped right.

Every trap runs: the swapped model must give what the model gave.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from xsep.modules import FusedSeparableConv2d
from xsep.swap import SwapReport, swap_separable_convs, unswap

from .swap_patterns import (
    NormThenAct,
    SeparableNamed,
    assert_same_results,
    build,
    depthwise,
    fused_calls,
    picture,
    pointwise,
)


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(sum(request.node.name.encode()))


class Pair(nn.Module):
    """dw and pw, and whatever a test's ``way`` does with them."""

    def __init__(self, way: Callable[..., Any], **children: nn.Module) -> None:
        super().__init__()
        self.way = way
        self.dw, self.pw = depthwise(5), pointwise(5, 5)
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: Tensor) -> Any:
        return self.way(self, x)


class SamePadding(nn.Conv2d):
    """Pads as TensorFlow does, by the input's size, in a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 1, 2)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Gate(nn.Module):
    """Squeeze-excite."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Conv2d(5, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3), keepdim=True)).sigmoid()


class StrangeNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(2 * x, self.running_mean, self.running_var, self.weight, self.bias)


class OtherEpsNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=0.25)


class DependsOnSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dw, self.pw = depthwise(5), pointwise(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw(self.dw(x)) if x.shape[2] > 3 else self.pw(x)


def twice(m: Any, x: Tensor) -> Tensor:
    z = m.dw(x)
    return m.pw(z) + z.mean()


def by_mode(m: Any, x: Tensor) -> Any:
    z = m.dw(x)
    return (m.pw(z), z) if m.training else m.pw(z)


def in_place_between(m: Any, x: Tensor) -> Tensor:
    x = x * 1
    z = m.dw(x)
    shortcut = x.relu_()
    return m.pw(z) + shortcut


def sequential(dw: Optional[nn.Module] = None, *rest: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(dw or depthwise(5), *(rest or (pointwise(5, 3),)))


SHARED = nn.ReLU()

#: trap -> (model, fold_bn, what the report says about the depthwise convolution)
LEFT_ALONE: dict[str, tuple[Callable[[], nn.Module], bool, str]] = {
    "forward-of-its-own": (
        sequential(SamePadding(5, 5, 3, groups=5)), False, "0: with 1 (Conv2d): conv_dw is a SamePadding with a forward"
    ),
    "one-channel": (
        lambda: nn.Sequential(nn.Conv2d(5, 1, 1), nn.Conv2d(1, 4, 3), pointwise(4, 3)), False,
        "1: has one input channel",
    ),
    "pointwise-with-stride": (sequential(depthwise(5), pointwise(5, 3, stride=2)), False, "conv_pw has stride=(2, 2)"),
    "pointwise-with-padding": (sequential(depthwise(5), pointwise(5, 3, padding=1)), False, "conv_pw has padding"),
    "pointwise-3x3": (sequential(depthwise(5), nn.Conv2d(5, 3, 3)), False, "conv_pw has kernel_size=(3, 3)"),
    "pointwise-grouped": (sequential(depthwise(5, multiplier=2), nn.Conv2d(10, 4, 1, groups=2)), False, "groups=2"),
    "padding-mode": (sequential(depthwise(5, padding_mode="reflect")), False, "0: with 1 (Conv2d): conv_dw has pad"),
    "used-twice": (lambda: Pair(twice), False, "dw: the value after dw (Conv2d) is used 2 times: by pw (Conv2d), th"),
    "returned-too": (lambda: Pair(lambda m, x: m.pw(z := m.dw(x)) + z), False, "is used 2 times"),
    "function-between": (
        lambda: Pair(lambda m, x: m.pw(F.relu(m.dw(x)))), False,
        "dw: the value after dw (Conv2d) goes into the function relu, which is no module that could be fused",
    ),
    "method-between": (lambda: Pair(lambda m, x: m.pw(m.dw(x).clamp(0))), False, "goes into the method clamp"),
    "in-place-between": (lambda: Pair(in_place_between), False, "dw: the method relu_ runs between it and pw (Conv2d)"),
    "called-twice": (
        lambda: Pair(lambda m, x: m.pw(m.dw(m.dw(x)))), False, "dw: is called 2 times by the model (Pair)"
    ),
    "pointwise-called-twice": (
        lambda: Pair(lambda m, x: m.pw(m.dw(x)) + m.pw(x)), False, "with pw (Conv2d): is called more than once"
    ),
    "activation-shared": (
        lambda: Pair(lambda m, x: m.pw(m.act(m.dw(x))), act=SHARED, other=SHARED), False, "act (ReLU) is one module at"
    ),
    "activation-called-twice": (
        lambda: Pair(lambda m, x: m.act(m.pw(m.act(m.dw(x)))), act=nn.ReLU()), False, "act (ReLU) is called more than"
    ),
    "other-way-in-training": (lambda: Pair(by_mode), False, "dw: in training mode, the value after dw (Conv2d) is us"),
    "other-members-in-training": (
        lambda: Pair(lambda m, x: m.pw(m.dw(x) if m.training else m.act(m.dw(x))), act=nn.ReLU()), False,
        "dw: training and eval mode take different ways",
    ),
    "pointwise-inside-another-call": (
        lambda: Pair(lambda m, x: m.opaque.pw(m.dw(x)) + m.opaque(x), opaque=DependsOnSize()), False,
        "dw: with opaque.pw (Conv2d): is called more than once",
    ),
    "squeeze-excite": (sequential(depthwise(5), Gate(), pointwise(5, 3)), False, "is used 2 times: by the function "),
    "alpha-dropout-between": (
        sequential(depthwise(5), nn.AlphaDropout(0.0), pointwise(5, 3)), False, "1 (AlphaDropout) stands"
    ),
    "group-norm-between": (sequential(depthwise(5), nn.GroupNorm(1, 5), pointwise(5, 3)), True, "1 (GroupNorm) stands"),
    "norm-after-activation": (
        sequential(depthwise(5), nn.ReLU(), nn.BatchNorm2d(5), pointwise(5, 3)), True,
        "0: 2 (BatchNorm2d) stands behind 1 (ReLU), where it cannot be folded",
    ),
    "two-activations": (sequential(depthwise(5), nn.ReLU(), nn.SiLU(), pointwise(5, 3)), True, "2 (SiLU) is a second"),
    "unknown-activation": (sequential(depthwise(5), nn.Mish(), pointwise(5, 3)), True, "1 (Mish) stands between"),
    "norm-without-statistics": (
        sequential(depthwise(5), nn.BatchNorm2d(5, track_running_stats=False), pointwise(5, 3)), True,
        "0: 1 (BatchNorm2d) has no running statistics",
    ),
    "norm-of-its-own": (sequential(depthwise(5), StrangeNorm(5), pointwise(5, 3)), True, "1 (StrangeNorm) has a forw"),
    "norm-with-another-eps": (
        sequential(depthwise(5), OtherEpsNorm(5), pointwise(5, 3)), True, "1 (OtherEpsNorm) has a forward of its own"
    ),
    "norm-with-unknown-activation": (
        sequential(depthwise(5), NormThenAct(5, nn.Mish), pointwise(5, 3)), True, "1 (NormThenAct) applies Mish"
    ),
    "norm-with-activation-not-folded": (
        sequential(depthwise(5), NormThenAct(5), pointwise(5, 3)), False, "1 (NormThenAct) stands between: fold_bn=True"
    ),
    "depends-on-size": (DependsOnSize, False, "dw: the model (DependsOnSize) cannot be traced: TraceError: "),
    "no-pointwise": (lambda: nn.Sequential(nn.Conv2d(5, 5, 1), depthwise(5)), False, "1: no pointwise convolution t"),
    "then-depthwise": (lambda: nn.Sequential(depthwise(5), depthwise(5)), False, "0: with 1 (Conv2d): conv_pw has k"),
    "not-called": (lambda: Pair(lambda m, x: m.pw(x)), False, "dw: is not called by the forward of any module ar"),
}  # fmt: skip


def flat(y: Any) -> Tensor:
    return y if isinstance(y, Tensor) else y[0]


@pytest.mark.parametrize("trap", LEFT_ALONE)
def test_left_alone_with_its_reason(trap: str) -> None:
    make, fold_bn, reason = LEFT_ALONE[trap]
    model = build(make).eval()
    x = picture()
    expected = flat(model(x))
    classes = [type(m) for m in model.modules()]
    report = swap_separable_convs(model, fold_bn, report=False)
    assert len(report) == 0
    text = str(report)
    assert any(reason in f"{m.name}: {m.reason}" for m in report.missed), text
    assert all(f"{m.name}: {m.reason}" in text for m in report.missed)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(flat(model(x)), expected)


def test_one_module_at_two_places_is_left_alone() -> None:
    shared = depthwise(5)
    model = nn.Sequential(nn.Sequential(shared, pointwise(5, 5)), nn.Sequential(shared, pointwise(5, 3)))
    x = picture()
    expected = model(x)
    report = swap_separable_convs(model, report=False)
    assert [m.reason for m in report.missed] == ["is one module at several places (0.0, 1.0)"]
    assert torch.equal(model(x), expected)


def test_a_whole_block_at_two_places_is_swapped() -> None:
    block = SeparableNamed(5, 5)
    model = nn.Sequential(block, nn.ReLU(), block)
    truth = copy.deepcopy(model)
    assert len(swap_separable_convs(model, report=False)) == 1
    assert fused_calls(model, picture()) == 2
    assert_same_results(model, truth, picture(), 1e-5)


def test_one_parameter_in_two_modules_gets_both_gradients() -> None:
    model = nn.Sequential(SeparableNamed(5, 5), SeparableNamed(5, 5))
    model[1].conv1.weight = model[0].conv1.weight  # type: ignore[union-attr]
    model[1].pointwise.weight = model[0].pointwise.weight  # type: ignore[union-attr]
    truth = copy.deepcopy(model)
    assert len(swap_separable_convs(model, report=False)) == 2
    assert len(list(model.parameters())) == 2
    assert_same_results(model, truth, picture(), 1e-5)


def test_a_depthwise_bias_is_folded_into_the_norm_behind_it() -> None:
    truth = build(sequential(depthwise(5, bias=True), nn.BatchNorm2d(5), nn.ReLU(), pointwise(5, 3, True))).eval()
    model = copy.deepcopy(truth)
    assert len(swap_separable_convs(model, True, report=False)) == 1
    assert fused_calls(model, picture()) == 1
    assert_same_results(model, truth, picture(), 1e-5)
    with torch.no_grad():
        x = picture()
        torch.testing.assert_close(model(x), truth(x), rtol=1e-5, atol=1e-5)


class Guarded(nn.Module):
    """A model that cannot be traced, because it looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(depthwise(5), nn.ReLU(), pointwise(5, 5))
        self.named = SeparableNamed(5, 5)
        self.rest = DependsOnSize()

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.isnan().any()):
            raise ValueError("not a number")
        return self.rest(self.named(self.body(x)))


def test_a_model_that_cannot_be_traced_is_swapped_where_it_can() -> None:
    model = Guarded()
    truth = copy.deepcopy(model)
    report = swap_separable_convs(model, report=False)
    assert ["+".join(s.members) for s in report.swapped] == ["body.0+body.1+body.2", "named.conv1+named.pointwise"]
    assert [m.name for m in report.missed] == ["rest.dw"]
    assert "rest (DependsOnSize) cannot be traced: TraceError" in report.missed[0].reason
    assert_same_results(model, truth, picture(), 1e-5)


def test_tracing_runs_no_hooks_and_leaves_the_modes() -> None:
    model = nn.Sequential(nn.Sequential(depthwise(5), pointwise(5, 5)).eval(), nn.Sequential(depthwise(5))).train()
    model[0].eval()
    calls: list[int] = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    modes = [m.training for m in model.modules()]
    swap_separable_convs(model, report=False)
    assert calls == []
    assert [m.training for m in model.modules()] == modes


def test_an_own_forward_on_the_instance_is_respected() -> None:
    model = nn.Sequential(SeparableNamed(5, 4))
    original = model[0].forward
    model[0].forward = lambda x: original(x) * 2
    x = picture()
    expected = model(x)
    report = swap_separable_convs(model, report=False)
    assert "replaced on the instance" in report.missed[0].reason
    assert torch.equal(model(x), expected)


def test_a_parametrised_convolution_is_left_alone_and_one_parametrised_later_is_read() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = nn.Sequential(depthwise(5), pointwise(5, 3))
    x = picture()
    expected = 2 * model(x)
    assert len(swap_separable_convs(model, report=False)) == 1
    parametrize.register_parametrization(model[0], "weight", Doubled())
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="parametrization"):
        unswap(model)
    assert fused_calls(model, x) == 1
    parametrize.remove_parametrizations(model[0], "weight")
    assert unswap(model) == 1
    parametrize.register_parametrization(model[0], "weight", Doubled())
    report = swap_separable_convs(model, report=False)
    assert "has a parametrization" in report.missed[0].reason


def test_a_fused_layer_is_not_taken_apart() -> None:
    model = nn.Sequential(FusedSeparableConv2d(5, 4, 3), SeparableNamed(4, 3))
    report = swap_separable_convs(model, report=False)
    assert [s.conv_dw for s in report.swapped] == ["1.conv1"]
    assert report.missed == []


@pytest.mark.parametrize("act", [nn.SiLU, nn.ReLU6, nn.ELU, nn.LeakyReLU], ids=lambda a: a.__name__)
def test_what_follows_may_change_the_output_in_place(act: Callable[[], nn.Module]) -> None:
    def add_to_the_output(m: Any, x: Tensor) -> Tensor:
        y = m.act(m.pw(m.dw(x)))
        y += x
        return y

    truth = Pair(add_to_the_output, act=act())
    model = copy.deepcopy(truth)
    assert len(swap_separable_convs(model, report=False)) == 1
    assert_same_results(model, truth, picture(), 1e-5)


def test_what_is_before_may_be_changed_in_place_afterwards() -> None:
    def add_to_the_input(m: Any, x: Tensor) -> Tensor:
        x = x * 1
        x += m.pw(m.dw(m.act(x)))
        return x

    truth = Pair(add_to_the_input, act=nn.ReLU())
    model = copy.deepcopy(truth)
    report = swap_separable_convs(model, report=False)
    assert report.swapped[0].members == ("act", "dw", "pw")
    assert_same_results(model, truth, picture(), 1e-5)
    with torch.no_grad():
        x = picture()
        torch.testing.assert_close(model(x), truth(x), rtol=1e-5, atol=1e-5)


def test_an_activation_in_place_on_a_shared_value_is_not_taken_in() -> None:
    def reads_what_was_changed(m: Any, x: Tensor) -> Tensor:
        x = x * 1
        y = m.pw(m.dw(m.act(x)))
        return y + x

    truth = Pair(reads_what_was_changed, act=nn.ReLU(inplace=True))
    model = copy.deepcopy(truth)
    report: SwapReport = swap_separable_convs(model, report=False)
    assert report.swapped[0].members == ("dw", "pw")
    assert_same_results(model, truth, picture(), 1e-5)
